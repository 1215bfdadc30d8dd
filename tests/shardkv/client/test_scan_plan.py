"""Paging: any sequence of honest pages gives each key of the range exactly once, in order."""

from __future__ import annotations

from itertools import islice

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.client.cursor import decode_cursor
from shardkv.client.scan import ScanPlan, next_prefix, plan_range, plan_scan
from shardkv.errors import InvalidArgument, InvalidRange, RemoteProtocolError, ShardUnavailable
from shardkv.limits import DEFAULT_LIMITS
from shardkv.wire.messages import Page, Scan, ShardProblem

KEYS = st.binary(min_size=1, max_size=3)


def planned(
    start="", stop=None, *, prefix=None, limit=None, reverse=False, keys_only=True, cursor=None, on_shard_error="fail"
):
    return plan_scan(
        start,
        stop,
        prefix=prefix,
        limit=limit,
        reverse=reverse,
        keys_only=keys_only,
        cursor=cursor,
        on_shard_error=on_shard_error,
        keyspace="default",
        limits=DEFAULT_LIMITS,
    )


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
    plan = planned(start, stop, prefix=prefix, limit=limit, reverse=reverse)
    wanted = [key for key in held if start <= key and (stop is None or key < stop) and key.startswith(prefix or b"")]
    if reverse:
        wanted.reverse()
    assert everything(plan, held, most) == wanted[:limit]


@given(
    held=st.sets(KEYS, max_size=30).map(sorted),
    bounds=st.tuples(st.binary(max_size=2), st.one_of(st.none(), st.binary(min_size=1, max_size=3))),
    reverse=st.booleans(),
    most=st.integers(1, 7),
    stretches=st.lists(st.integers(0, 9), max_size=12),
    limit=st.one_of(st.none(), st.integers(0, 9)),
)
def test_scans_that_go_on_by_cursor_together_are_the_range(held, bounds, reverse, most, stretches, limit):
    start, stop = bounds
    if stop is not None and stop < start:
        start, stop = stop, start
    wanted = [key for key in held if start <= key and (stop is None or key < stop)]
    if reverse:
        wanted.reverse()
    plan = planned(start, stop, reverse=reverse, limit=limit)
    got: list[bytes] = []
    for rows in [*stretches, None]:
        got += read(plan, held, most, rows)
        if plan.cursor is None:
            break
        assert got != wanted or rows is not None or limit is not None, "a cursor, and nothing is left"
        plan = planned(cursor=plan.cursor, limit=None if rows is None else limit)
    else:
        got += read(plan, held, most, None)
    assert got == wanted


def read(plan: ScanPlan, held: list[bytes], most: int, rows: int | None) -> list[bytes]:
    """So many keys, page by page as a client reads them, leaving off in the middle of a page; None: all."""
    got: list[bytes] = []
    while not plan.finished and (rows is None or len(got) < rows):
        plan.take(page_of(held, asked(plan), most))
        got += islice(plan.unread, None if rows is None else rows - len(got))
    return got


def test_a_cursor_that_is_not_one_is_refused():
    cursor = planned("a", "b").cursor
    assert cursor is not None
    with pytest.raises(InvalidArgument, match="by itself"):
        planned("a", cursor=cursor)
    with pytest.raises(InvalidArgument, match="by itself"):
        planned(reverse=True, cursor=cursor)
    for damaged in (cursor[:-1], cursor[1:], "", "?" + cursor, cursor.swapcase(), "AAAAAAAA", "å"):
        with pytest.raises(InvalidArgument, match="not whole"):
            planned(cursor=damaged)
    with pytest.raises(InvalidArgument, match="not bytes"):
        planned(cursor=cursor.encode())
    with pytest.raises(InvalidArgument, match=r"'default'.*'other'"):
        decode_cursor(cursor, keyspace="other")


def away(shard: int, start: object, stop: object) -> ShardProblem:
    return ShardProblem(shard, ShardUnavailable.code, "Away.", {"start": start, "stop": stop}, "")


def test_what_partial_pages_lack_is_told_by_ranges_of_keys():
    plan = planned("a", "z", on_shard_error="partial")
    assert asked(plan).partial
    plan.take(Page([b"b"], None, b"c", None, [away(3, 0, 2**62)]))
    plan.take(Page([b"d"], None, b"e", None, [away(3, 0, 2**62)]))
    plan.take(Page([b"f"], None, b"g", None, []))
    plan.take(Page([b"h"], None, None, None, [away(3, 0, 2**62), away(4, 2**62, None)]))
    told = [(one.shard, one.start, one.stop, one.tokens) for one in plan.missing]
    assert told == [
        (3, b"a", b"e", (0, 2**62)),
        (3, b"g", b"z", (0, 2**62)),
        (4, b"g", b"z", (2**62, 2**64)),
    ]
    assert isinstance(plan.missing[0].error, ShardUnavailable)
    plan = planned("a", reverse=True, on_shard_error="partial")
    plan.take(Page([b"y"], None, b"x", None, [away(7, b"t", None)]))
    plan.take(Page([], None, None, None, [away(7, b"t", None), away(6, b"", b"t")]))
    assert [(one.shard, one.start, one.stop, one.tokens) for one in plan.missing] == [
        (7, b"t", None, None),
        (6, b"a", b"t", None),
    ]
    with pytest.raises(InvalidArgument, match="on_shard_error"):
        planned(on_shard_error="ignore")


def test_a_range_includes_both_ends():
    plan = plan_range("b", "d", limit=None, reverse=False, keys_only=True, keyspace="default", limits=DEFAULT_LIMITS)
    assert everything(plan, [b"a", b"b", b"c", b"d", b"d\0", b"e"], 2) == [b"b", b"c", b"d"]


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff\xff", None), (b"", None), (b"a\xfe\xff", b"a\xff")]
)
def test_the_end_of_a_prefix(prefix, end):
    assert next_prefix(prefix) == end


def test_pages_grow():
    plan = planned()
    sizes = []
    for number in range(4):
        sizes.append(asked(plan).page_bytes)
        plan.take(Page([], None, bytes([1 + number]), None))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize(("reverse", "frontier"), [(False, b"b"), (True, b"f"), (True, b"g")])
def test_a_page_that_covers_nothing_does_not_loop(reverse, frontier):
    plan = planned("b", "f", reverse=reverse)
    with pytest.raises(RemoteProtocolError, match="covered nothing"):
        plan.take(Page([], None, frontier, None))


def test_bad_ranges_are_refused():
    def scan(start, stop=None, limit=None):
        planned(start, stop, limit=limit)

    with pytest.raises(InvalidRange):
        scan("b", "a")
    for limit in (-1, 1.5, True):
        with pytest.raises(InvalidArgument, match="limit"):
            scan("a", limit=limit)
    with pytest.raises(InvalidArgument, match="range start"):
        scan(7)
