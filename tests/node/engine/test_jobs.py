"""Flushes and compactions as pure jobs: right rows out, bounded files, nothing left after a failure."""

from __future__ import annotations

import errno
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.errors import Corruption, DiskFull, StorageError
from shardkv_node.engine import flush
from shardkv_node.engine.columns import DELETE, PUT, collapse, make_version
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.job import CompactionInput, CompactionJob, FlushJob, JobResult, SegmentSpan
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.run_job import run
from shardkv_node.engine.table_lookup import TableLookup
from shardkv_node.engine.table_meta import TableMeta
from tests.node.engine.crash_vfs import CrashVfs
from tests.node.engine.tables import open_table, options, read_all, value_in, write_table

TABLES = "/tables"
Op = tuple[int, bytes, bytes | None]
"""(tablet, key, value or None for a delete)"""


def new_vfs() -> CrashVfs:
    vfs = CrashVfs()
    vfs.make_dirs(TABLES)
    return vfs


def write_log(vfs: CrashVfs, batches: list[list[Op]], *, number: int = 1, seqno: int = 1) -> SegmentSpan:
    """One segment; each batch is one write entry per tablet in it, numbered from `seqno` on."""
    path = f"/{number:06d}.wal"
    log = LogWriter.create(vfs, path, store_id=bytes(16), number=number)
    for turn, batch in enumerate(batches):
        by_tablet: dict[int, list[Op]] = {}
        for op in batch:
            by_tablet.setdefault(op[0], []).append(op)
        entries = [
            WriteEntry(
                tablet,
                1,
                seqno + turn,
                None,
                [key for _, key, _ in ops],
                collapse(bytes(DELETE if value is None else PUT for _, _, value in ops), 1),
                0,
                [value or b"" for _, _, value in ops],
            )
            for tablet, ops in by_tablet.items()
        ]
        log.append(entries, 0)
    log.sync()
    log.close()
    return SegmentSpan(path, log.offset)


def flush_job(segments: list[SegmentSpan], tablets: dict[int, tuple[int, int]], **changes: int) -> FlushJob:
    return FlushJob(
        job_id="00000000",
        output_directory=TABLES,
        file_number=1,
        segments=segments,
        tablets=tablets,
        options=options(**changes),
    )


def rows_in(vfs: CrashVfs, metas: list[TableMeta]) -> dict[bytes, bytes | None]:
    rows: dict[bytes, bytes | None] = {}
    for meta in metas:
        rows.update(read_all(open_table(vfs, f"{TABLES}/{meta.file_name}", meta, cache_bytes=None)))
    return rows


@settings(max_examples=100, deadline=None)
@given(
    batches=st.lists(
        st.lists(
            st.tuples(st.integers(1, 3), st.binary(min_size=1, max_size=2), st.none() | st.binary(max_size=9)),
            max_size=8,
        ),
        max_size=25,
    ),
    cut=st.integers(0, 25),
    after=st.integers(0, 5),
    write_rows=st.sampled_from([1, 3, 2048]),
)
def test_a_flush_equals_a_replay(batches: list[list[Op]], cut: int, after: int, write_rows: int) -> None:
    vfs = new_vfs()
    segments = [
        write_log(vfs, batches[:cut], number=1),
        write_log(vfs, batches[cut:], number=2, seqno=1 + len(batches[:cut])),
    ]
    upto = len(batches) - 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flush, "_WRITE_ROWS", write_rows)
        result = run(vfs, flush_job(segments, {1: (after, upto), 2: (0, len(batches))}))
    for tablet, (low, high) in {1: (after, upto), 2: (0, len(batches))}.items():
        expected: dict[bytes, bytes | None] = {}
        for batch in batches[low : max(high, 0)]:
            expected.update({key: value for number, key, value in batch if number == tablet})
        assert rows_in(vfs, result.tables.get(tablet, [])) == expected
    assert 3 not in result.tables


def test_a_flush_keeps_versions_and_splits_tables() -> None:
    vfs = new_vfs()
    batches: list[list[Op]] = [[(1, b"k%05d" % n, b"%d" % n * 20)] for n in range(3000)]
    batches.append([(1, b"k00007", b"new")])
    result = run(vfs, flush_job([write_log(vfs, batches)], {1: (0, 9999)}, table_bytes_max=10_000))
    metas = result.tables[1]
    assert len(metas) > 3
    assert all(meta.size < 15_000 for meta in metas)
    assert [meta.file_name for meta in metas] == vfs.list(TABLES)
    assert all(one.last_key < two.first_key for one, two in pairwise(metas))
    found = TableLookup([open_table(vfs, f"{TABLES}/{metas[0].file_name}", metas[0])]).find(b"k00007")
    assert found is not None
    assert found[0].version(found[1]) == make_version(1, 3001)
    assert metas[0].max_version == make_version(1, 3001)


def test_writes_of_superseded_terms_are_left_out() -> None:
    vfs = new_vfs()
    job = flush_job([write_log(vfs, [[(1, b"k", b"v")]])], {1: (0, 9)})
    voided = FlushJob(
        job_id=job.job_id,
        output_directory=TABLES,
        file_number=1,
        segments=job.segments,
        tablets=job.tablets,
        options=job.options,
        superseded_terms=[1],
    )
    assert run(vfs, voided) == JobResult({})
    assert vfs.list(TABLES) == []


def compaction_job(
    vfs: CrashVfs,
    runs: list[list[dict[bytes, bytes | None]]],
    *,
    drop_tombstones: bool,
    table_bytes_max: int = 1 << 20,
) -> CompactionJob:
    number, inputs = 100, []
    for run_rows in runs:
        tables = []
        for rows in run_rows:
            path = f"/{number:06d}-00000000.sst"
            tables.append(CompactionInput(path, write_table(vfs, path, rows)))
            number += 1
        inputs.append(tables)
    return CompactionJob(
        job_id="0000000a",
        output_directory=TABLES,
        file_number=1,
        tablet=1,
        runs=inputs,
        drop_tombstones=drop_tombstones,
        options=options(table_bytes_max=table_bytes_max),
    )


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(
        st.dictionaries(st.integers(0, 150), st.none() | st.binary(max_size=40), min_size=1, max_size=60),
        min_size=1,
        max_size=4,
    ),
    pieces=st.integers(1, 3),
    drop=st.booleans(),
)
def test_a_compaction_equals_a_dict(runs: list[dict[int, bytes | None]], pieces: int, drop: bool) -> None:
    vfs = new_vfs()
    expected: dict[bytes, bytes | None] = {}
    tables = []
    for rows in runs:
        keyed = {b"%04d" % n: rows[n] for n in sorted(rows)}
        expected.update(keyed)
        step = -(-len(keyed) // pieces)
        items = list(keyed.items())
        tables.append([dict(items[low : low + step]) for low in range(0, len(items), step)])
    result = run(vfs, compaction_job(vfs, tables, drop_tombstones=drop, table_bytes_max=600))
    if drop:
        expected = {key: value for key, value in expected.items() if value is not None}
    metas = result.tables.get(1, [])
    assert rows_in(vfs, metas) == expected
    assert sum(meta.count for meta in metas) == len(expected)
    assert all(one.last_key < two.first_key for one, two in pairwise(metas))


def test_a_compaction_of_deletes_only_writes_nothing_at_the_bottom() -> None:
    vfs = new_vfs()
    job = compaction_job(vfs, [[{b"a": None}]], drop_tombstones=True)
    assert run(vfs, job) == JobResult({})


def test_outputs_are_durable_before_the_result() -> None:
    vfs = new_vfs()
    result = run(vfs, compaction_job(vfs, [[{b"a": b"1"}], [{b"b": b"2"}]], drop_tombstones=False))
    survivor = vfs.crash()
    meta = result.tables[1][0]
    assert value_in(open_table(survivor, f"{TABLES}/{meta.file_name}", meta), b"b") == b"2"


def test_every_failing_operation_fails_the_job_and_leaves_no_file() -> None:
    rows: dict[bytes, bytes | None] = {b"%05d" % n: random.Random(n).randbytes(50) for n in range(200)}
    operations = 0
    for n in range(1, 1000):
        vfs = new_vfs()
        job = compaction_job(vfs, [[rows], [{b"00005": None}]], drop_tombstones=True, table_bytes_max=1500)
        before = vfs.operations
        vfs.fail_at(before + n, errno=errno.ENOSPC if n % 2 else errno.EIO)
        try:
            run(vfs, job)
        except StorageError as error:
            assert isinstance(error, DiskFull) == bool(n % 2)
            assert vfs.list(TABLES) == [], vfs.journal[before:]
            operations = n
        else:
            break
    assert operations > 20


def test_a_damaged_input_is_named_and_nothing_is_written() -> None:
    vfs = new_vfs()
    job = compaction_job(vfs, [[{b"a": b"1" * 100}], [{b"b": b"2"}]], drop_tombstones=False)
    path = job.runs[0][0].path
    damaged = bytearray(vfs.read_all(path))
    damaged[5] ^= 4
    vfs.replace(path, bytes(damaged))
    with pytest.raises(Corruption) as caught:
        run(vfs, job)
    assert caught.value.path == path
    assert vfs.list(TABLES) == []


def test_output_that_the_disk_spoiled_is_noticed_before_it_is_reported() -> None:
    class SpoilingVfs(CrashVfs):
        def sync_dir(self, directory: str) -> None:
            super().sync_dir(directory)
            for path, inode in self.files.items():
                if path.startswith(TABLES):
                    inode.data[7] ^= 1

    vfs = SpoilingVfs()
    vfs.make_dirs(TABLES)
    with pytest.raises(Corruption):
        run(vfs, compaction_job(vfs, [[{b"a": b"1"}]], drop_tombstones=False))
    assert vfs.list(TABLES) == []
