#!/usr/bin/env python3
"""Which caches of which mlx-lm model families are compressed, and what works with them, as the table of docs/models.md.

    python scripts/model_table.py [--write]

Needs the extra `test`. Builds each family small and random (tests/support/families.py), looks at the caches it gets and
decodes a few tokens; the other cells are that file's, and the tests hold every family to them. --write: replace the
table in docs/models.md.
"""

import argparse
import collections
import contextlib
import io
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PAGE = ROOT / "docs" / "models.md"


def how_it_decodes(model, cache):
    """What the reports of a cache say of a decode step behind 30 tokens: "fused", "restored", both, or "nothing
    packed", on a backend with the limits of the kernels. It computes by MLX operations."""
    import mlx.core as mx

    from mlx_turbo import TurboKVCache, use_backend
    from mlx_turbo.backends.attend_launch import attend_unsupported
    from mlx_turbo.backends.mlx_ops import CpuBackend
    from mlx_turbo.backends.tiled_attention import tiled_attention
    from mlx_turbo.cache.last_step import ELSEWHERE
    from mlx_turbo.integration.prompt_cache import flatten_caches

    class LikeKernels(CpuBackend):
        def why_not_fused(self, keys, values, n_query_tokens):
            return attend_unsupported(keys[0], values[0], keys[1], values[1], n_query_tokens)

        def attend(self, queries, keys, values, counts, **options):
            return tiled_attention(queries, keys, values, counts, self.read_rows, **options)

    with use_backend(LikeKernels()):
        for n in 30, 1, 1:
            mx.eval(model(mx.arange(n)[None], cache=cache))
        ours = [c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
        ways = {c.report()["attention"].partition(":")[0] for c in ours if c.report()["packed"]}
    ways = {
        "restored" if way == ELSEWHERE.partition(":")[0] else way for way in ways
    }  # by attention of the model's own
    return ", ".join(sorted(ways)) or "nothing packed"


def rows():
    """[[kinds of caches that are compressed, kinds that stay, how it decodes, a cell for each phase, families]], what
    compresses most and has the fewest exceptions first."""
    from mlx_lm.models.cache import make_prompt_cache
    from support import families

    from mlx_turbo import TurboConfig
    from mlx_turbo import make_prompt_cache as ours
    from mlx_turbo.integration.prompt_cache import flatten_caches, reports

    found, config = collections.defaultdict(list), TurboConfig(recent=4, block=4)  # their windows have 16 tokens
    for name in (n for n in families.all_names() if n not in families.NOT_BUILT):
        model = families.build(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = ours(model, config)
            theirs, mine = flatten_caches(make_prompt_cache(model)), reports(cache)
        compressed = {type(c).__name__ for c, (_, _, _, why) in zip(theirs, mine) if why is None}
        kept = {f"{type(c).__name__}: {why}" for _, c, _, why in mine if why}
        compressed, kept = (", ".join(sorted(kinds)) or "nothing" for kinds in (compressed, kept))
        decode = how_it_decodes(model, cache)
        found[(compressed, kept, decode, *(families.cell(name, phase) for phase in families.PHASES))].append(name)
    return sorted(
        ([*key, names] for key, names in found.items()),
        key=lambda r: (
            r[0] == "nothing",
            r[1] != "nothing",
            r[1],
            r[2] != "fused",
            [cell != "yes" for cell in r[3:-1]],
            r,
        ),
    )


def table():
    """The table in Markdown."""
    from support import families

    lines = ["| " + " | ".join(["Compressed", "Left as it is", "A decode step", *families.PHASES, "Families"]) + " |"]
    lines += ["|" + "---|" * (4 + len(families.PHASES))]
    lines += [f"| {' | '.join(cells)} | {' '.join(names)} |" for *cells, names in rows()]
    return "\n".join(lines) + "\n"


def read(page):
    """The rows, as of `rows`, of the table in a page."""
    lines = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [[*cells, names.split()] for *cells, names in lines[1:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    args = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # olmo prints that a package is missing
        text = table()
    if not args.write:
        print(text, end="")
        return
    page = PAGE.read_text()
    start, end = page.index("| Compressed |"), page.index("\n\n", page.index("| Compressed |")) + 1
    PAGE.write_text(page[:start] + text + page[end:])


if __name__ == "__main__":
    main()
