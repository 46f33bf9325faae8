"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

from moestro.core.errors import InputError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | int, whole: int | None = None) -> int:
    """Bytes of '2GiB', '12GB', '500M', '123456', or with `whole` of '50%' of it. Raises InputError."""
    if isinstance(text, int):
        text = str(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]I?)?(B?)\s*", text.upper())
    value = 0
    if found and found[2] == "%" and whole is not None and not found[3]:
        value = int(float(found[1]) * whole / 100)
    elif found and found[2] != "%":
        value = int(float(found[1]) * UNITS[found[2] or ""])
    if value <= 0:
        raise InputError(f"{text!r} is not a size", expected="a size above zero such as 2GiB, 12GB or 500M")
    return value


def format_size(size: int) -> str:
    """'2.31GiB': binary units, two decimals, rounded up, so that the size as written is never too small."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{math.ceil(size * 100 / factor) / 100:.2f}{unit}"
    return f"{size}B"
