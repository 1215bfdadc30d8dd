"""What an `incr` writes: the number its key has at that place in the sequence, plus an amount.

What is logged is the plain put of the result, so replaying or shipping the log needs no reading. Reads what is applied
and what stands earlier in the group; changes nothing but the write itself.
"""

from __future__ import annotations

from collections.abc import Callable

from shardkv.errors import InvalidNumber
from shardkv.whole_number import LEAST, MOST, format_number, in_range, parse_number
from shardkv_node.engine.columns import DELETE, NO_EXPIRY, PUT, PUT_EXPIRING, expand_kinds, expand_u64
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.write import Write

Latest = dict[bytes, Write]
"""The last write of the group that has the key, for every key the group has so far."""


def add_up(write: Write, tablet: Tablet, latest: Latest, clock: Callable[[], int]) -> InvalidNumber | None:
    """Give a write with `add` its value, and the expiry its key has unless it has one itself; or why it cannot be."""
    (key,) = write.keys
    earlier = latest.get(key)
    found = tablet.get_expiring(key) if earlier is None else _left_by(earlier, key, clock)
    text, expiry = (b"0", NO_EXPIRY) if found is None else found
    number = parse_number(text)
    if number is None:
        return InvalidNumber(
            f"The value of the key {key[:40]!r} is not a whole number from {LEAST} to {MOST}: {text[:40]!r}. "
            "Nothing was written.",
            hint="Numbers are plain decimal text, such as 42.",
        )
    result = number + (write.add or 0)
    if not in_range(result):
        return InvalidNumber(
            f"The key {key[:40]!r} holds {number}; adding {write.add} would leave the range from {LEAST} to {MOST}. "
            "Nothing was written."
        )
    write.values = [format_number(result)]
    if not write.expiries and expiry:
        write.kinds, write.expiries = PUT_EXPIRING, expiry
    return None


def _left_by(write: Write, key: bytes, clock: Callable[[], int]) -> tuple[bytes, int] | None:
    """(value, expiry) of a key after a write that has it; None: it does not exist then."""
    n = len(write.keys)
    row = n - 1 - write.keys[::-1].index(key) if n > 1 else 0
    kind, expiry = expand_kinds(write.kinds, n)[row], expand_u64(write.expiries, n)[row]
    if kind == DELETE or (kind != PUT and expiry <= clock()):
        return None
    return write.values[row], expiry
