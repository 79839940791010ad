"""What a row of results is called."""

from typing import Any

Row = dict[str, Any]


def is_fault(row: Row) -> bool:
    """Whether a row failed or is wrong. Not run is what MLX has no implementation of: no fault of ours."""
    return row["status"] not in ("ok", "not run")


def describe_queries(row: Row) -> str:
    """For a name: how many query tokens, where there are several."""
    n = row["query_tokens"] or 1
    return f"{n} query tokens, " if n > 1 else ""


def describe_tuning(row: Row, left_out: Row) -> str:
    """The name of launch parameters that were tried and are not ranked."""
    return f"tuning {row['scheme']}, head_dim {row['head_dim']}, {left_out['changes']}"


def describe_row(row: Row) -> str:
    """A row's name in a sentence."""
    if "context" in row:
        return f"{row['name']} at {row['context']} tokens"
    gqa = f", GQA {row['gqa']}" if row["gqa"] else ""
    where = f"head_dim {row['head_dim']}{gqa}, {describe_queries(row)}{row['tokens']} tokens"
    return f"{row['operation']} {row['name']} by {row['column']} ({where})"
