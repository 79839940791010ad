"""What a row of results is called."""

from .tables import _queries


def describe_row(row):
    """A row's name in a sentence."""
    if "context" in row:
        return f"{row['name']} at {row['context']} tokens"
    gqa = f", GQA {row['gqa']}" if row["gqa"] else ""
    where = f"head_dim {row['head_dim']}{gqa}, {_queries(row)}{row['tokens']} tokens"
    return f"{row['operation']} {row['name']} by {row['column']} ({where})"
