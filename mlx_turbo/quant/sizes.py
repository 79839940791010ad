"""Sizes in bytes as people write them: "6GB", "512 MiB"."""

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes of "24GB", "24 GiB" or "24" (GB). Raises ValueError for anything else."""
    digits = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = float(digits) * UNITS[unit or "GB"]
    except (ValueError, KeyError):
        size = 0
    if not 0 < size < 2**63:
        raise ValueError(f"got {text!r}, expected a size such as 24GB or 512MB")
    return round(size)


def size_name(n: int) -> str:
    """The shortest of the names that `parse_size` reads as n bytes, in decimal units: "6GB", "1500MB", "123B"."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if n % UNITS[unit] == 0)
    return f"{n // UNITS[unit]}{unit}"
