#!/usr/bin/env python3
"""Which caches of which mlx-lm model families are compressed, as the table of docs/models.md.

    python scripts/model_table.py [--write]

Needs the extra `test`. Builds each family small and random (tests/families.py) and looks at the caches it gets.
--write: into docs/models.md, in the place of the table there.
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


def kinds(caches):
    """"KVCache, RotatingKVCache" of some caches."""
    return ", ".join(sorted({type(c).__name__ for c in caches}))


def rows():
    """[(kinds of caches that are compressed, kinds that stay, families)], what compresses most first."""
    import families
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_turbo import TurboConfig, TurboKVCache
    from mlx_turbo import make_prompt_cache as ours
    from mlx_turbo.models import members

    found, config = collections.defaultdict(list), TurboConfig(recent=4, block=4)  # their windows have 16 tokens
    for name in (n for n in families.all_names() if n not in families.NOT_BUILT):
        model = families.build(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pairs = list(zip(members(make_prompt_cache(model)), members(ours(model, config))))
        compressed = kinds(theirs for theirs, own in pairs if isinstance(own, TurboKVCache))
        kept = kinds(own for _, own in pairs if not isinstance(own, TurboKVCache))
        found[compressed, kept].append(name)
    return sorted(((*key, names) for key, names in found.items()), key=lambda r: (r[0] == "", r[1] != "", r[1]))


def table():
    """The table in Markdown."""
    lines = ["| Compressed | Left as it is | Families |", "|---|---|---|"]
    lines += [f"| {compressed or 'nothing'} | {kept or 'nothing'} | {' '.join(names)} |"
              for compressed, kept, names in rows()]
    return "\n".join(lines) + "\n"


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
