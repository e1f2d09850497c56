"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from maskft.errors import UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "24GB", "80 GiB" or "40000MB"; GB counts 10^9 bytes, GiB 2^30.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UserError(f"'{text}' is no size of memory. Give a number and a unit, such as 24GB, 80GiB or 40000MB.")
    return round(float(match[1]) * unit)


def readable(size: int) -> str:
    """1530000000 -> "1.53 GB"."""
    for unit, digits in (("TB", 2), ("GB", 2), ("MB", 1)):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.{digits}f} {unit}"
    return f"{size / 1000:.1f} kB"
