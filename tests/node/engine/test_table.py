"""Tables: what was written is what is read; damage is named, never served."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.errors import Corruption, InvalidArgument, StorageError, UnsupportedFormat
from shardkv_node.engine import block, table_format
from shardkv_node.engine.block import CODEC_LZ4, CODEC_NONE, CODEC_ZSTD
from shardkv_node.engine.block_cache import BlockCache
from shardkv_node.engine.columns import Columns
from shardkv_node.engine.open_files import OpenFiles
from shardkv_node.engine.sorted_run import SortedRun
from shardkv_node.engine.table_lookup import TableLookup
from shardkv_node.engine.table_reader import Table
from shardkv_node.engine.table_writer import TableWriter
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.tables import columns_of, open_table, options, read_all, rows_of, value_in, write_table

PATH = "/000001-00000000.sst"
CODECS = [CODEC_NONE, CODEC_LZ4, CODEC_ZSTD]


def numbered(n: int, step: int = 1) -> dict[bytes, bytes | None]:
    return {b"key%06d" % (i * step): (None if i % 7 == 3 else b"value %d " % i * 3) for i in range(n)}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.dictionaries(
        st.binary(min_size=1, max_size=12), st.none() | st.binary(max_size=200), min_size=1, max_size=300
    ),
    codec=st.sampled_from(CODECS),
    block_bytes=st.sampled_from([1, 64, 4096]),
    bits=st.sampled_from([0, 10]),
    pieces=st.integers(1, 5),
    cache_bytes=st.sampled_from([None, 0, 4096, 1 << 20]),
    absent=st.lists(st.binary(max_size=12), max_size=20),
)
def test_round_trip(
    rows: dict[bytes, bytes | None],
    codec: int,
    block_bytes: int,
    bits: int,
    pieces: int,
    cache_bytes: int | None,
    absent: list[bytes],
) -> None:
    vfs = CrashVfs()
    columns = columns_of(rows, version=5)
    writer = TableWriter(
        vfs,
        PATH,
        tablet=3,
        options=options(codec=codec, block_bytes=block_bytes, filter_bits_per_key=bits),
    )
    step = -(-len(columns) // pieces)
    for low in range(0, len(columns), step):
        writer.add(columns.slice(low, low + step))
    meta = writer.finish()
    assert (meta.tablet, meta.count, meta.first_key, meta.last_key) == (3, len(rows), min(rows), max(rows))
    assert (meta.min_version, meta.max_version) == (5, 4 + len(rows))
    assert meta.tombstones == list(rows.values()).count(None)
    assert meta.size == vfs.size(PATH)

    table = open_table(vfs, PATH, meta, cache_bytes=cache_bytes)
    table.verify()
    assert list(read_all(table).items()) == sorted(rows.items(), key=lambda row: row[0])
    assert read_all(table, reverse=True) == rows
    for key in [*rows, *absent]:
        assert value_in(table, key) == rows.get(key, "absent")


def test_versions_and_kinds_survive() -> None:
    vfs = CrashVfs()
    meta = write_table(vfs, PATH, numbered(500), version=1 << 40)
    table = open_table(vfs, PATH, meta)
    for i in (0, 3, 499):
        found = TableLookup([table]).find(b"key%06d" % i)
        assert found is not None
        columns, row = found
        assert columns.version(row) == (1 << 40) + i
        assert columns.expiry(row) == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_a_bounded_scan_reads_only_its_range(reverse: bool) -> None:
    vfs = CrashVfs()
    rows = numbered(20_000)
    table = open_table(vfs, PATH, write_table(vfs, PATH, rows))
    assert len(table._offsets) > 3, "the test wants several partitions"
    for low, high in [(0, 1), (500, 501), (777, 9_999), (19_999, 20_000), (5, 5)]:
        start, stop = b"key%06d" % low, b"key%06d" % high
        chunks = list(table.chunks(start, stop, reverse=reverse))
        got = [row for chunk in (reversed(chunks) if reverse else chunks) for row in rows_of(chunk)]
        assert got == sorted((k, v) for k, v in rows.items() if start <= k < stop)
    before = vfs.operations
    cold = Table.open(vfs, PATH, table.meta, BlockCache(1 << 20))
    list(cold.chunks(b"key000500", b"key000501", reverse=reverse))
    assert vfs.operations - before <= 6, "open, tail, index part, partition, at most two blocks"


def test_every_flipped_byte_is_detected_or_harmless() -> None:
    vfs = CrashVfs()
    rows = numbered(60)
    meta = write_table(vfs, PATH, rows)
    good = vfs.read_all(PATH)
    noticed = 0
    for position in range(len(good)):
        for bit in (1, 0x80):
            damaged = bytearray(good)
            damaged[position] ^= bit
            vfs.replace(PATH, bytes(damaged))
            try:
                table = open_table(vfs, PATH, meta)
                for key in rows:
                    assert value_in(table, key) == rows[key], f"a wrong value after a flip at {position}"
                assert read_all(table) == rows
            except (Corruption, UnsupportedFormat) as error:
                assert PATH in str(error)
                noticed += 1
            with pytest.raises((Corruption, UnsupportedFormat)):
                open_table(vfs, PATH, meta).verify()
    assert noticed == 2 * len(good), "no byte of a table is without meaning"


def test_damage_is_named_with_its_offset() -> None:
    vfs = CrashVfs()
    meta = write_table(vfs, PATH, numbered(60))
    damaged = bytearray(vfs.read_all(PATH))
    damaged[3] ^= 1
    vfs.replace(PATH, bytes(damaged))
    with pytest.raises(Corruption) as caught:
        TableLookup([open_table(vfs, PATH, meta)]).find(b"key000000")
    assert (caught.value.path, caught.value.offset) == (PATH, 0)


def test_a_truncated_or_swapped_table_is_refused() -> None:
    vfs = CrashVfs()
    meta = write_table(vfs, PATH, numbered(60))
    other = write_table(vfs, "/000002-00000000.sst", numbered(60, step=2))
    good = vfs.read_all(PATH)
    for size in (0, 1, 31, 32, len(good) - 1):
        vfs.replace(PATH, good[:size])
        with pytest.raises(Corruption, match="Wrong size of a table"):
            open_table(vfs, PATH, meta)
    vfs.replace(PATH, vfs.read_all("/000002-00000000.sst"))
    with pytest.raises(Corruption):
        open_table(vfs, PATH, msgspec.structs.replace(meta, size=other.size))


def test_blocks_that_changed_places_are_noticed() -> None:
    """Both blocks are whole and their checksums right: only their places are wrong."""
    vfs = CrashVfs()
    rows: dict[bytes, bytes | None] = {b"%04d" % n: b"x" * 12 for n in range(40)}
    meta = write_table(vfs, PATH, rows, options=options(codec=CODEC_NONE, block_bytes=32))
    table = open_table(vfs, PATH, meta)
    partition = table._read_partition(0)
    (a, b), size = partition.offsets[2:4], partition.sizes[2]
    assert partition.sizes[3] == size
    data = bytearray(vfs.read_all(PATH))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    vfs.replace(PATH, bytes(data))
    with pytest.raises(Corruption):
        TableLookup([open_table(vfs, PATH, meta)]).find(b"0005")


def test_a_newer_format_is_refused_with_advice() -> None:
    vfs = CrashVfs()
    meta = write_table(vfs, PATH, numbered(3))
    data = bytearray(vfs.read_all(PATH))
    data[-12:-8] = (2).to_bytes(4, "little")
    vfs.replace(PATH, bytes(data))
    with pytest.raises(UnsupportedFormat, match=r"version 2; this program knows version 1"):
        open_table(vfs, PATH, meta)


def test_a_block_never_grows_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for codec in (CODEC_LZ4, CODEC_ZSTD):
        sealed = block.Compressor(codec).seal(bytes(100_000), 0)
        with monkeypatch.context() as patch:
            patch.setattr(block, "RAW_BYTES_MAX", 50_000)
            with pytest.raises(Corruption, match="claims 100000 bytes"):
                block.Decompressor().open_block(sealed, path="f", offset=0)


def test_rows_out_of_order_are_refused() -> None:
    writer = TableWriter(CrashVfs(), PATH, tablet=1, options=options())
    writer.add(columns_of({b"b": b""}))
    with pytest.raises(InvalidArgument, match="out of order"):
        writer.add(columns_of({b"b": b""}))


def test_an_abandoned_table_leaves_no_file() -> None:
    vfs = CrashVfs()
    writer = TableWriter(vfs, PATH, tablet=1, options=options())
    writer.add(columns_of(numbered(1000)))
    writer.abandon()
    assert vfs.list("/") == []


def test_a_read_error_is_an_error_not_a_missing_key() -> None:
    vfs = CrashVfs()
    table = open_table(vfs, PATH, write_table(vfs, PATH, numbered(60)))
    vfs.fail_at(vfs.operations + 1)
    with pytest.raises(StorageError):
        TableLookup([table]).find(b"key000001")
    assert value_in(table, b"key000001") == b"value 1 " * 3


def test_few_absent_keys_pass_the_filter() -> None:
    vfs = CrashVfs()
    meta = write_table(vfs, PATH, {b"%08d" % n: b"v" for n in range(0, 40_000, 2)})
    table = open_table(vfs, PATH, meta, cache_bytes=1 << 24)
    cache = table._cache
    assert cache is not None
    lookups = 5000
    before = cache.hits + cache.misses
    lookup = TableLookup([table])
    assert all(lookup.find(b"%08d" % n) is None for n in range(1, 2 * lookups, 2))
    partitions_asked = len(table.partition_ends())
    blocks_asked = cache.hits + cache.misses - before - partitions_asked
    assert blocks_asked < 0.04 * lookups


def test_the_cache_stays_inside_its_bytes() -> None:
    vfs = CrashVfs()
    rows = numbered(5000)
    meta = write_table(vfs, PATH, rows)
    cache = BlockCache(50_000)
    table = Table.open(vfs, PATH, meta, cache)
    for key in rows:
        TableLookup([table]).find(key)
        assert cache.charged_bytes <= 50_000
    assert cache.charged_bytes > 40_000
    assert cache.hits > cache.misses
    table.close()
    assert cache.charged_bytes == sum(charge for _block, charge in cache._blocks.values())


def test_a_closed_table_leaves_the_cache_at_once_and_others_stay() -> None:
    vfs, cache, rows = CrashVfs(), BlockCache(1 << 24), {b"%05d" % n: b"v" * 50 for n in range(2000)}
    tables = []
    for number in range(2):
        path = f"/{number}.sst"
        tables.append(Table.open(vfs, path, write_table(vfs, path, rows), cache))
    read_all(tables[0])
    alone = cache.charged_bytes
    read_all(tables[1])
    assert cache.charged_bytes == 2 * alone > 0
    tables[0].close()
    assert cache.charged_bytes == alone
    misses = cache.misses
    read_all(tables[1])
    assert cache.misses == misses, "the blocks of the open table are still there"
    tables[1].close()
    assert cache.charged_bytes == len(cache) == 0


def test_open_files_are_bounded() -> None:
    vfs = CrashVfs()
    files, cache = OpenFiles(vfs, 3), BlockCache(0)
    tables = []
    for number in range(10):
        path = f"/{number:06d}-00000000.sst"
        meta = write_table(vfs, path, {b"%d" % number: b"v"})
        tables.append(Table.open(vfs, path, meta, cache, files))
        assert len(files) <= 3
    for number, table in enumerate(tables):
        assert value_in(table, b"%d" % number) == b"v"
    assert len(files) == 3
    files.close_all()


@settings(max_examples=50, deadline=None)
@given(keys=st.sets(st.integers(0, 200), min_size=15), bounds=st.tuples(st.integers(0, 200), st.integers(0, 200)))
def test_a_sorted_run_is_one_source(keys: set[int], bounds: tuple[int, int]) -> None:
    vfs = CrashVfs()
    ordered = [b"%04d" % n for n in sorted(keys)]
    tables = []
    for number, low in enumerate(range(0, len(ordered), 10)):
        path = f"/{number:06d}-00000000.sst"
        meta = write_table(vfs, path, dict.fromkeys(ordered[low : low + 10], b"v"))
        tables.append(open_table(vfs, path, meta))
    run = SortedRun(tables)
    start, stop = b"%04d" % bounds[0], b"%04d" % bounds[1]
    wanted = [key for key in ordered if start <= key < stop]
    assert [key for chunk in run.chunks(start, stop, reverse=False) for key in chunk.keys] == wanted
    backwards = [key for chunk in run.chunks(start, stop, reverse=True) for key in chunk.keys[::-1]]
    assert backwards == wanted[::-1]
    for n in range(0, 201, 5):
        assert (TableLookup([run]).find(b"%04d" % n) is not None) == (n in keys)


# --- the worked examples in the format texts ---


def hex_lines(text: str | None) -> bytes:
    """All bytes of the lines of an example: groups of two hex digits before the remarks."""
    assert text is not None
    lines = re.findall(r"^ {4}(?:example = )?((?:[0-9a-f]{2} ?){8,})(?: .*)?$", text, re.MULTILINE)
    return bytes.fromhex("".join(lines))


def test_the_example_of_a_block_is_true() -> None:
    example = hex_lines(block.__doc__)
    assert block.Compressor(CODEC_NONE).seal(example[1:-4], 16) == example
    raw = block.Decompressor().open_block(example, path="example", offset=16)
    columns = msgspec.msgpack.decode(raw, type=Columns)
    assert columns == Columns([b"k"], 1, 7, 0, [b"v"])


def test_the_example_of_a_table_is_true() -> None:
    vfs = CrashVfs()
    meta = write_table(
        vfs,
        PATH,
        {b"k": b"v"},
        tablet=5,
        version=7,
        options=options(codec=CODEC_NONE, filter_bits_per_key=0),
    )
    made = vfs.read_all(PATH)
    example = hex_lines(table_format.__doc__)
    assert example == made
    vfs.replace(PATH, example)
    assert value_in(open_table(vfs, PATH, meta), b"k") == b"v"
