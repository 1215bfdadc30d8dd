"""Whole numbers as values: decimal ASCII text of a signed 64-bit number, what `incr` counts with. Pure.

Invariant: a number has exactly one text ("0", "-7", "42"; no sign +, no spaces, no leading zeros), so that what `incr`
leaves behind and what a program writes with `str(number)` are the same bytes.
"""

from __future__ import annotations

import re

LEAST, MOST = -(1 << 63), (1 << 63) - 1
"""Both included."""

_TEXT = re.compile(rb"0|-?[1-9][0-9]{0,18}")


def parse_number(text: bytes) -> int | None:
    """The number that `text` is, or None when it is none."""
    if _TEXT.fullmatch(text) is None:
        return None
    number = int(text)
    return number if in_range(number) else None


def format_number(number: int) -> bytes:
    """The text of a number."""
    return b"%d" % number


def in_range(number: int) -> bool:
    """Whether it has 64 bits at most."""
    return LEAST <= number <= MOST
