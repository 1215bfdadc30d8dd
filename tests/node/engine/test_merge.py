"""Merges against the dict they should equal, over random sources, chunkings, limits and byte bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.errors import InvalidArgument
from shardkv_node.engine import merge
from shardkv_node.engine.columns import DEDUPE, PUT, Columns
from shardkv_node.engine.merge import merge_newest, merge_page
from tests.node.engine.tables import columns_of, rows_of

KEYS = st.binary(min_size=1, max_size=3).map(lambda key: bytes(byte % 4 for byte in key))
ROWS = st.dictionaries(KEYS, st.one_of(st.none(), st.binary(max_size=20)), max_size=30)


class Chunked:
    """A source that yields its rows in chunks of the given sizes, over and over, empty chunks too."""

    def __init__(self, rows: dict[bytes, bytes | None], sizes: list[int]) -> None:
        self.rows, self.sizes = rows, sizes
        self.chunks_read = 0

    def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
        inside = {k: v for k, v in self.rows.items() if k >= start and (stop is None or k < stop)}
        columns = columns_of(inside)
        position, turn, chunks = 0, 0, []
        while position < len(columns):
            size = self.sizes[turn % len(self.sizes)] if turn < 50 else 1
            chunks.append(columns.slice(position, position + size))
            position, turn = position + size, turn + 1
        for chunk in reversed(chunks) if reverse else chunks:
            self.chunks_read += 1
            yield chunk


SOURCES = st.lists(st.builds(Chunked, ROWS, st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=5)


def newest(sources: list[Chunked]) -> dict[bytes, bytes | None]:
    rows: dict[bytes, bytes | None] = {}
    for source in sources:
        rows.update(source.rows)
    return rows


@settings(max_examples=400, deadline=None)
@given(
    sources=SOURCES,
    bounds=st.tuples(KEYS | st.just(b""), KEYS | st.none()),
    reverse=st.booleans(),
    limit=st.none() | st.integers(1, 10),
    bytes_max=st.integers(0, 60) | st.just(10**9),
    keys_only=st.booleans(),
    examined_max=st.sampled_from([1, 7, 10**6]),
)
def test_pages_equal_a_dict(
    sources: list[Chunked],
    bounds: tuple[bytes, bytes | None],
    reverse: bool,
    limit: int | None,
    bytes_max: int,
    keys_only: bool,
    examined_max: int,
) -> None:
    first_start, first_stop = start, stop = bounds
    expected = sorted(
        (k, v) for k, v in newest(sources).items() if v is not None and k >= start and (stop is None or k < stop)
    )
    got: list[tuple[bytes, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "ROWS_EXAMINED_MAX", examined_max)
        for _turn in range(1000):
            page = merge_page(
                sources,
                start,
                stop,
                reverse=reverse,
                limit=limit,
                bytes_max=bytes_max,
                keys_only=keys_only,
            )
            values = [b""] * len(page.keys) if keys_only else page.values
            assert len(values) == len(page.keys)
            assert not keys_only or page.values == []
            assert limit is None or len(page.keys) <= limit
            size = sum(map(len, page.keys)) + sum(map(len, page.values))
            assert size <= bytes_max or len(page.keys) == 1
            got += zip(page.keys, values, strict=True)
            if page.frontier is None:
                break
            if reverse:
                assert start < page.frontier and (stop is None or page.frontier < stop), "no progress"
                assert all(key >= page.frontier for key in page.keys)
                stop = page.frontier
            else:
                assert start < page.frontier and (stop is None or page.frontier < stop), "no progress"
                assert all(key < page.frontier for key in page.keys)
                start = page.frontier
        else:
            raise AssertionError(f"[{first_start!r}, {first_stop!r}) never ended")
    wanted = [(k, b"" if keys_only else v) for k, v in expected]
    assert got == (wanted[::-1] if reverse else wanted)


@settings(max_examples=300, deadline=None)
@given(runs=st.lists(ROWS, max_size=5), drop=st.booleans())
def test_merge_newest_equals_a_dict(runs: list[dict[bytes, bytes | None]], drop: bool) -> None:
    columns = [columns_of(rows, version=100 * number) for number, rows in enumerate(runs)]
    merged = merge_newest(columns, drop_tombstones=drop)
    expected: dict[bytes, tuple[bytes | None, int]] = {}
    for run in columns:
        for index, (key, value) in enumerate(rows_of(run)):
            expected[key] = (value, run.version(index))
    wanted = [(k, v, n) for k, (v, n) in sorted(expected.items()) if not (drop and v is None)]
    got = [(k, v, merged.version(index)) for index, (k, v) in enumerate(rows_of(merged))]
    assert got == wanted
    assert merged.check() is None


def test_a_long_run_of_deletes_ends_pages_with_bounded_work() -> None:
    dead = {b"%06d" % n: None for n in range(3 * merge.ROWS_EXAMINED_MAX)}
    source = Chunked({**dead, b"z": b"alive"}, [512])
    source.sizes = [512] * 50
    read = columns_of(source.rows)

    class Whole:
        def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
            keys = read.keys
            for low in range(0, len(keys), 512):
                chunk = read.slice(low, low + 512)
                if chunk.keys[-1] >= start:
                    yield chunk

    page = merge_page([Whole()], b"", None, reverse=False, limit=10, bytes_max=1 << 20, keys_only=False)
    assert page.keys == []
    assert page.frontier is not None and b"" < page.frontier < b"z"


def test_internal_records_are_not_shown() -> None:
    class Internal:
        def chunks(self, start: bytes, stop: bytes | None, *, reverse: bool) -> Iterator[Columns]:
            yield Columns([b"a", b"b"], bytes([DEDUPE, PUT]), 1, 0, [b"x", b"y"])

    page = merge_page([Internal()], b"", None, reverse=False, limit=None, bytes_max=99, keys_only=False)
    assert (page.keys, page.values, page.frontier) == ([b"b"], [b"y"], None)


def test_a_page_of_no_rows_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        merge_page([], b"", None, reverse=False, limit=0, bytes_max=1, keys_only=False)


def test_a_small_page_reads_one_chunk_of_a_source() -> None:
    source = Chunked({b"%03d" % n: b"v" for n in range(100)}, [10])
    page = merge_page([source], b"", None, reverse=False, limit=5, bytes_max=1 << 20, keys_only=False)
    assert len(page.keys) == 5
    assert source.chunks_read == 1
