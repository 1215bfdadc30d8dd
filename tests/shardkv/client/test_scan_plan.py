"""Paging: any sequence of honest pages gives each key of the range exactly once, in order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.client.scan import ScanPlan, next_prefix, plan_range, plan_scan
from shardkv.errors import InvalidArgument, InvalidRange, RemoteProtocolError
from shardkv.limits import DEFAULT_LIMITS
from shardkv.wire.messages import Page, Scan

KEYS = st.binary(min_size=1, max_size=3)


def asked(plan: ScanPlan) -> Scan:
    return msgspec.msgpack.decode(plan.call().payload(), type=Scan)


def page_of(held: list[bytes], scan: Scan, most: int) -> Page:
    """An honest page of at most `most` rows."""
    keys = [key for key in held if scan.start <= key and (scan.stop is None or key < scan.stop)]
    if scan.reverse:
        keys.reverse()
    rows = keys[: min(most, scan.limit)]
    frontier = None if rows == keys else rows[-1] if scan.reverse else rows[-1] + b"\0"
    return Page(rows, None if scan.keys_only else rows, frontier, None)


def everything(plan: ScanPlan, held: list[bytes], most: int) -> list[bytes]:
    got: list[bytes] = []
    while not plan.finished:
        page = page_of(held, asked(plan), most)
        plan.take(page)
        got += page.keys
    return got


@given(
    held=st.sets(KEYS, max_size=30).map(sorted),
    bounds=st.tuples(st.binary(max_size=3), st.one_of(st.none(), st.binary(max_size=3))),
    prefix=st.one_of(st.none(), st.binary(max_size=2)),
    limit=st.one_of(st.none(), st.integers(0, 40)),
    reverse=st.booleans(),
    most=st.integers(1, 7),
)
def test_pages_together_are_the_range(held, bounds, prefix, limit, reverse, most):
    start, stop = bounds
    if stop is not None and stop < start:
        start, stop = stop, start
    plan = plan_scan(start, stop, prefix=prefix, limit=limit, reverse=reverse, keys_only=True, limits=DEFAULT_LIMITS)
    wanted = [key for key in held if start <= key and (stop is None or key < stop) and key.startswith(prefix or b"")]
    if reverse:
        wanted.reverse()
    assert everything(plan, held, most) == wanted[:limit]


def test_a_range_includes_both_ends():
    plan = plan_range("b", "d", limit=None, reverse=False, keys_only=True, limits=DEFAULT_LIMITS)
    assert everything(plan, [b"a", b"b", b"c", b"d", b"d\0", b"e"], 2) == [b"b", b"c", b"d"]


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff\xff", None), (b"", None), (b"a\xfe\xff", b"a\xff")]
)
def test_the_end_of_a_prefix(prefix, end):
    assert next_prefix(prefix) == end


def test_pages_grow():
    plan = plan_scan("", None, prefix=None, limit=None, reverse=False, keys_only=True, limits=DEFAULT_LIMITS)
    sizes = []
    for number in range(4):
        sizes.append(asked(plan).page_bytes)
        plan.take(Page([], None, bytes([1 + number]), None))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize(("reverse", "frontier"), [(False, b"b"), (True, b"f"), (True, b"g")])
def test_a_page_that_covers_nothing_does_not_loop(reverse, frontier):
    plan = plan_scan("b", "f", prefix=None, limit=None, reverse=reverse, keys_only=True, limits=DEFAULT_LIMITS)
    with pytest.raises(RemoteProtocolError, match="covered nothing"):
        plan.take(Page([], None, frontier, None))


def test_bad_ranges_are_refused():
    def scan(start, stop=None, limit=None):
        plan_scan(start, stop, prefix=None, limit=limit, reverse=False, keys_only=False, limits=DEFAULT_LIMITS)

    with pytest.raises(InvalidRange):
        scan("b", "a")
    for limit in (-1, 1.5, True):
        with pytest.raises(InvalidArgument, match="limit"):
            scan("a", limit=limit)
    with pytest.raises(InvalidArgument, match="range start"):
        scan(7)
