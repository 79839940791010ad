"""`mlx-turbo bench compare`: the rows of several runs side by side."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ..cli.common import CliError, describe_error
from ..cli.provenance import command_line
from .common import complain, make_parser
from .rows import Row, describe_row, is_fault
from .tables import heading

KEYS = {
    "kernels": ("operation", "scheme", "name", "column", "head_dim", "gqa", "query_tokens", "tokens", "dtype"),
    "generate": ("context", "generated", "name"),
}


def _read(name: str, file: str) -> Row:
    try:
        document = json.loads(Path(file).read_text())
    except (OSError, ValueError) as e:
        raise CliError(f"{name}: cannot read {file!r}: {describe_error(e)}") from e
    document = document if isinstance(document, dict) else {}
    fields, rows = KEYS.get(str(document.get("benchmark"))), document.get("rows")
    rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else [{}]
    if "query_tokens" in (fields or ()):
        for row in rows:  # files written before there was a choice have one
            row.setdefault("query_tokens", row.get("gqa") and 1)
    if (
        not fields
        or document.get("format") != 1
        or not {"machine", "backend", "command", "commit", "date", "rows"} <= document.keys()
        or any(not {*fields, "status"} <= row.keys() for row in rows)
    ):
        raise CliError(f"{name}: {file!r} is not what mlx-turbo bench --json writes")
    return document


def _figure(row: Row, benchmark: str) -> tuple[float, ...] | None:
    """(seconds of a call or per token, low, high), or None for a row without."""
    if benchmark == "kernels":
        return tuple(row[f"{x}_seconds"] for x in ("median", "low", "high")) if "median_seconds" in row else None
    if "generation_tps" not in row:
        return None
    low, high = row["generation_tps_quartiles"]
    return 1 / row["generation_tps"], 1 / high, 1 / low


def compare(argv: Sequence[str]) -> int:
    """`mlx-turbo bench compare A.json B.json`: the same rows of two documents."""
    parser = make_parser("compare", "The rows that two files of bench --json have in common: time of B over time of A.")
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    args = parser.parse_args(argv)
    a, b = _read("A.json", args.a), _read("B.json", args.b)
    if a["benchmark"] != b["benchmark"]:
        raise CliError(f"B.json: {args.a!r} is of bench {a['benchmark']}, {args.b!r} of bench {b['benchmark']}")
    keys = KEYS[a["benchmark"]]
    olds = {tuple(r[k] for k in keys): r for r in a["rows"]}
    rows = []
    for new in b["rows"]:
        key = tuple(new[k] for k in keys)
        if key not in olds:
            continue
        old = olds[key]
        was, now = (_figure(r, a["benchmark"]) for r in (old, new))
        row = dict(zip(keys, key)) | {"status_a": old["status"], "status_b": new["status"]}
        if was and now:
            apart = now[1] > was[2] or now[2] < was[1]
            row |= {
                "seconds_a": was[0],
                "seconds_b": now[0],
                "ratio": now[0] / was[0],
                "verdict": ("slower" if now[0] > was[0] else "faster") if apart else "within the spread",
            }
        else:
            row["verdict"] = "not compared: " + "; ".join(
                f"{n} is {r['status']}" for n, r in (("A", old), ("B", new)) if r["status"] != "ok"
            )
        rows.append(row)
    if not rows:
        raise CliError(f"B.json: {args.a!r} and {args.b!r} have no row in common")
    different = {
        name: (a["machine"].get(name), b["machine"].get(name))
        for name in ("chip", "system", "mlx", "mlx-lm", "mlx_turbo", "attention tuning")
        if a["machine"].get(name) != b["machine"].get(name)
    }
    different |= {
        name: (a.get(name), b.get(name))
        for name in ("commit", "backend", "model", "power")
        if a.get(name) != b.get(name)
    }
    bad = [
        f"{letter}: {row['status'].upper()}: {describe_row(row)}: {row.get('problem')}"
        for letter, document in (("A", a), ("B", b))
        for row in document["rows"]
        if is_fault(row)
    ]
    if args.json:
        print(
            json.dumps(
                {
                    "benchmark": a["benchmark"],
                    "command": command_line(["bench", "compare", *argv]),
                    **{letter: {k: v for k, v in d.items() if k != "rows"} for letter, d in (("a", a), ("b", b))},
                    "different": different,
                    "rows": rows,
                    "bad": bad,
                },
                indent=1,
            )
        )
        complain(bad)
        return 1 if bad else 0
    for letter, document in (("A", a), ("B", b)):
        print(
            f"{letter}: {document['command']} (commit {document['commit'] or 'unknown'}, {document['date']})\n"
            f"{textwrap.indent(heading(document), '   ')}"
        )
    for name, (x, y) in different.items():
        print(f"different {name}: A {x}; B {y}")
    print(f"{'A ms':>10}{'B ms':>10}{'B / A':>8}  {'':<18}")
    for row in rows:
        figures = (
            f"{row['seconds_a'] * 1e3:>10.3f}{row['seconds_b'] * 1e3:>10.3f}{row['ratio']:>8.2f}"
            if "ratio" in row
            else f"{'-':>10}{'-':>10}{'-':>8}"
        )
        print(f"{figures}  {row['verdict']:<18} {describe_row(row)}")
    print(
        f"\n{len(rows)} rows in common, {len(a['rows'])} in A, {len(b['rows'])} in B. faster, slower: the quartiles "
        "do not overlap."
    )
    complain(bad)
    return 1 if bad else 0
