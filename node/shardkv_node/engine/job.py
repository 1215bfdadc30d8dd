"""Jobs: the heavy work of the engine as plain values (`FlushJob`, `CompactionJob`...) and their result.

A job names its inputs and outputs and nothing else, so that it can run in a worker process, inline, or again after
a worker died. It never touches the manifest, the log or its inputs: only the result, once installed by the
store, makes its outputs part of the store.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shardkv_node.engine.table_meta import TableMeta


class TableOptions(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """How tables are written."""

    codec: int
    """block.CODEC_NONE, CODEC_LZ4 or CODEC_ZSTD."""
    block_bytes: int = 6 * 1024
    """A data block ends when its rows pass this many bytes before compression."""
    filter_bits_per_key: int = 10
    """0: no filter."""
    table_bytes_max: int = 32 * 1024 * 1024
    """A job starts another table when one passes this many stored bytes."""


class SegmentSpan(msgspec.Struct, array_like=True, frozen=True):
    """A log segment to read from its start to `end`."""

    path: str
    end: int | None = None
    """Offset of the first byte not to read; None: to the end of the file."""


class FlushJob(msgspec.Struct, array_like=True, frozen=True, kw_only=True, tag=1):
    """Turn the writes of log segments into tables: newest row per key wins, deletes are kept."""

    job_id: str
    """8 lower-case hex digits, random; part of the output names."""
    output_directory: str
    file_number: int
    """Outputs are numbered from here. Names are unique by job id, so numbers may overlap those of other jobs."""
    segments: list[SegmentSpan]
    """In log order."""
    tablets: dict[int, tuple[int, int]]
    """Per tablet (after, upto): writes with after < seqno <= upto are flushed. Other tablets are skipped."""
    options: TableOptions
    superseded_terms: list[int] = []
    """Terms whose writes are void; empty while there is one replica."""
    now_ms: int = 0
    """Rows whose expiry is not after it become deletes. Milliseconds since 1970 of the store's clock."""


class CompactionInput(msgspec.Struct, array_like=True, frozen=True):
    path: str
    meta: TableMeta


class CompactionJob(msgspec.Struct, array_like=True, frozen=True, kw_only=True, tag=2):
    """Merge tables of one tablet into tables that do not overlap."""

    job_id: str
    output_directory: str
    file_number: int
    tablet: int
    runs: list[list[CompactionInput]]
    """Oldest run first; inside a run tables are disjoint and in key order."""
    drop_tombstones: bool
    """Nothing older than these runs can hold one of their keys."""
    options: TableOptions
    now_ms: int = 0
    """As in `FlushJob`."""
    start: bytes = b""
    """Only keys in [start, stop) are merged."""
    stop: bytes | None = None
    bytes_per_s: int = 0
    """A worker writes no faster than this; 0: as fast as it can."""


class SplitJob(msgspec.Struct, array_like=True, frozen=True, kw_only=True, tag=3):
    """Merge a part of all tables of one tablet into tables of two others, by the hash token of the keys."""

    job_id: str
    output_directory: str
    file_number: int
    tablets: tuple[int, int]
    """Where keys with a token below `token` go, and the others."""
    token: int
    runs: list[list[CompactionInput]]
    """As in `CompactionJob`."""
    drop_tombstones: bool
    options: TableOptions
    now_ms: int = 0
    start: bytes = b""
    stop: bytes | None = None
    bytes_per_s: int = 0


class UniteJob(msgspec.Struct, array_like=True, frozen=True, kw_only=True, tag=4):
    """Merge the records of tokens of two tablets into tables of a third one (see dedupe.py)."""

    job_id: str
    output_directory: str
    file_number: int
    tablet: int
    left: list[list[CompactionInput]]
    """With records of the tablet that has the keys below the boundary; as in `CompactionJob`."""
    right: list[list[CompactionInput]]
    """Of the other one."""
    boundary: bytes | int
    """A key, or a hash token."""
    options: TableOptions
    now_ms: int = 0
    bytes_per_s: int = 0
    looked_up: tuple[list[list[CompactionInput]], list[list[CompactionInput]]] = ([], [])
    """Where a lane that only the other side has is looked up; oldest run first. Empty: there is no more of it."""


Pause = Callable[[int], None]
"""Called by a long job every few hundred KiB with the bytes it has written so far."""


def no_pause(written_bytes: int) -> None:
    """Go on at once."""


Job = FlushJob | CompactionJob | SplitJob | UniteJob


class JobResult(msgspec.Struct, array_like=True, frozen=True):
    tables: dict[int, list[TableMeta]]
    """Per tablet, the new tables in key order; a tablet that had nothing to write is absent."""
