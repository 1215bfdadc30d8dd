"""Opening a store: from the files a process left behind to a state that may serve.

    1. the manifest that CURRENT names gives tablets, tables and the first needed log segment;
    2. the segments from there on are read in order; writes past a tablet's `flushed_seqno` go into memtables;
    3. what lies past the known-synced end of the last segment is copied into a new, synced segment, since pages that
       were never on disk can still be readable after a crash of the process, and gone after one of the machine;
    4. a new manifest, with the term raised by one, is put in force;
    5. only then is anything deleted: files that no manifest names.

Invariants: until step 4 is durable every file the old manifest needs is untouched, so a crash at any point, again and
again, leads back to the same state. Damage raises `Corruption` and changes nothing.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from shardkv.errors import Corruption
from shardkv_node.engine import filenames
from shardkv_node.engine.columns import make_version
from shardkv_node.engine.entries import Entry, WriteEntry
from shardkv_node.engine.entry_runs import WriteRun, entry_runs
from shardkv_node.engine.identity import STORE_ID_BYTES, create_store, make_directories, read_identity
from shardkv_node.engine.log_format import NO_SEGMENT
from shardkv_node.engine.log_reader import (
    ENTRY_DECODER,
    FileHeader,
    GroupRun,
    SegmentReader,
    TornTail,
    check_identity,
)
from shardkv_node.engine.log_writer import LogWriter, join_payloads
from shardkv_node.engine.manifest import ManifestState, ManifestWriter, manifest_numbers, read_current, read_manifest
from shardkv_node.engine.memtable import Memtable
from shardkv_node.engine.vfs import Vfs


@dataclass(slots=True)
class RecoveryReport:
    """What opening the store found; shown to people, and looked at by tests."""

    created: bool = False
    """The directory was empty and is a new store now."""
    torn_tails: list[TornTail] = field(default_factory=list)
    """Ends of files that were being written when the machine or process died, never acknowledged as durable."""
    segments: int = 0
    writes_replayed: int = 0
    swept: list[str] = field(default_factory=list)
    """Names of files that belonged to nothing and were deleted."""


@dataclass(slots=True)
class Recovered:
    """Everything `Store` needs to start."""

    store_id: bytes
    state: ManifestState
    manifest: ManifestWriter
    log: LogWriter
    segments: list[tuple[int, int]]
    """(number, end) of the closed segments whose writes are in `memtables`."""
    memtables: dict[int, Memtable]
    last_seqnos: dict[int, int]
    report: RecoveryReport


def recover(vfs: Vfs, directory: str, *, now_hlc: int, random_bytes: Callable[[int], bytes]) -> Recovered:
    """Bring the store in `directory` to life, making it when there is none. Requires: the lock is held."""
    report = RecoveryReport()
    make_directories(vfs, directory)
    store_id = read_identity(vfs, directory)
    if store_id is None:
        store_id = random_bytes(STORE_ID_BYTES)
        create_store(vfs, directory, store_id)
        report.created = True
    current = filenames.current_path(directory)
    if not vfs.exists(current):
        raise Corruption("A store without its manifest", path=current, offset=0, expected="a file", got="no file")
    state, torn = read_manifest(vfs, directory, read_current(vfs, directory), store_id)
    report.torn_tails += [torn] if torn is not None else []
    require_files(vfs, directory, state, torn)
    replay = Replay(vfs, directory, state, report)
    replay.run()
    log = _continue_log(vfs, directory, replay, max(now_hlc, replay.hlc + 1))
    state.term += 1
    state.closed = None
    number = max([*manifest_numbers(vfs, directory), 0]) + 1
    try:
        manifest = ManifestWriter.start(vfs, directory, number, state, log.hlc)
    except BaseException:
        log.close()
        raise
    return Recovered(store_id, state, manifest, log, replay.segments, replay.memtables, replay.last_seqnos, report)


class Replay:
    """Reads the needed log segments into memtables. `run` once, then read the fields."""

    def __init__(self, vfs: Vfs, directory: str, state: ManifestState, report: RecoveryReport) -> None:
        self._vfs = vfs
        self._directory = directory
        self._state = state
        self._report = report
        self._seen: dict[int, int] = {}
        self.memtables = {number: Memtable() for number in state.tablets}
        self.last_seqnos = {number: tablet.flushed_seqno for number, tablet in state.tablets.items()}
        self.segments: list[tuple[int, int]] = []
        self.tail: list[bytes] = []
        """Payloads of the groups of the last segment that are not known to be on disk."""
        self._tail_ends: list[int] = []
        self.hlc = 0
        self.store_id = state.store_id

    @property
    def next_segment(self) -> int:
        return self.segments[-1][0] + 1 if self.segments else self._state.first_segment

    def run(self) -> None:
        numbers = self._segment_numbers()
        headers = [self._read_header(number) for number in numbers]
        for index, number in enumerate(numbers):
            self._replay_segment(number, headers[index + 1] if index + 1 < len(headers) else None)
        self._report.segments = len(numbers)

    def _segment_numbers(self) -> list[int]:
        """The needed segments. Requires: there is no gap, see `require_files`."""
        names = self._vfs.list(filenames.wal_directory(self._directory))
        first = self._state.first_segment
        return sorted(n for n in map(filenames.parse_segment_name, names) if n is not None and n >= first)

    def _open(self, number: int, end: int | None) -> SegmentReader[Entry]:
        path = filenames.segment_path(self._directory, number)
        reader: SegmentReader[Entry] = SegmentReader(self._vfs, path, decoder=ENTRY_DECODER, end=end)
        try:
            check_identity(reader.header, path, self._state.store_id, number)
        except BaseException:
            reader.close()
            raise
        return reader

    def _read_header(self, number: int) -> FileHeader:
        reader = self._open(number, None)
        reader.close()
        if reader.header.previous_number != number - 1:
            got = reader.header.previous_number
            raise Corruption("A log segment out of line", path=reader.path, offset=0, expected=number - 1, got=got)
        return reader.header

    def _replay_segment(self, number: int, successor: FileHeader | None) -> None:
        closed = dict([self._state.closed] if self._state.closed is not None else [])
        end = closed.get(number) if successor is None else successor.previous_end
        reader = self._open(number, end)
        try:
            for groups in reader.runs():
                self.hlc = max(self.hlc, *groups.hlcs)
                self._replay_groups(reader, groups)
                if end is None:
                    self._note_tail(groups, reader.synced_end)
        finally:
            reader.close()
        if reader.torn_tail is not None:
            self._report.torn_tails.append(reader.torn_tail)
        self.segments.append((number, reader.synced_end if end is None else reader.valid_end))

    def _note_tail(self, groups: GroupRun, synced_end: int) -> None:
        self.tail += groups.payloads
        self._tail_ends += groups.ends()
        synced = bisect_right(self._tail_ends, synced_end)
        del self.tail[:synced], self._tail_ends[:synced]

    def _replay_groups(self, reader: SegmentReader[Entry], groups: GroupRun) -> None:
        for offset, found in entry_runs(reader, groups):
            if isinstance(found, WriteRun):
                problem = self._replay_run(found)
            elif isinstance(found, WriteEntry):
                problem = self._replay_write(found)
            else:
                continue
            if problem is not None:
                expected, got = problem
                raise Corruption(
                    "The log does not follow itself", path=reader.path, offset=offset, expected=expected, got=got
                )

    def _replay_write(self, entry: WriteEntry) -> tuple[str, str] | None:
        """Apply one write unless a table has it already. Returns (expected, got) for one that cannot be."""
        problem = self._misplaced(entry.tablet, entry.term, entry.seqno)
        if problem is None and entry.tablet in self._state.tablets and self._is_new(entry.tablet, entry.seqno):
            version = make_version(entry.term, entry.seqno)
            self.memtables[entry.tablet].apply(entry.keys, entry.kinds, version, entry.values, entry.expiries)
            self._report.writes_replayed += 1
        return problem

    def _replay_run(self, run: WriteRun) -> tuple[str, str] | None:
        """As `_replay_write` for each of these writes."""
        number = run.tablet
        problem = self._misplaced(number, run.term, run.seqno)
        last = run.seqno + len(run.keys) - 1
        if problem is None and number in self._state.tablets and self._is_new(number, last):
            old = max(0, self._state.tablets[number].flushed_seqno + 1 - run.seqno)
            version = make_version(run.term, run.seqno + old)
            self.memtables[number].apply_run(run.keys[old:], run.kind, version, run.values[old:])
            self._report.writes_replayed += len(run.keys) - old
        return problem

    def _misplaced(self, number: int, term: int, seqno: int) -> tuple[str, str] | None:
        """(expected, got) for a write that cannot stand here in the log."""
        if number >= self._state.next_tablet:
            return f"a tablet below {self._state.next_tablet}", f"tablet {number}"
        if term > self._state.term:
            return f"a term up to {self._state.term}", f"term {term}"
        tablet = self._state.tablets.get(number)
        if tablet is None:
            return None  # dropped since
        last = self._seen.get(number)
        if seqno != last + 1 if last is not None else seqno > tablet.flushed_seqno + 1:
            expected = tablet.flushed_seqno + 1 if last is None else last + 1
            return f"seqno {expected} of tablet {number}", f"seqno {seqno}"
        return None

    def _is_new(self, number: int, seqno: int) -> bool:
        """Note the last write seen of a tablet that was not dropped; whether no table has it."""
        self._seen[number] = seqno
        if seqno <= self._state.tablets[number].flushed_seqno:
            return False
        self.last_seqnos[number] = seqno
        return True


def _continue_log(vfs: Vfs, directory: str, replay: Replay, hlc: int) -> LogWriter:
    """A new segment behind those replayed, holding the tail of the last one; durable."""
    number = replay.next_segment
    path = filenames.segment_path(directory, number)
    previous = replay.segments[-1] if replay.segments else (NO_SEGMENT, 0)
    return LogWriter.create(
        vfs,
        path,
        store_id=replay.store_id,
        number=number,
        previous=previous,
        payloads=join_payloads(replay.tail),
        hlc=hlc,
    )


def require_files(vfs: Vfs, directory: str, state: ManifestState, torn: TornTail | None) -> None:
    """Raise `Corruption` when a table or segment that the state needs is not there.

    `torn`: the torn tail of its manifest. Files are deleted only after the edit that makes them unneeded is on disk:
    where such an edit may have been, it is the manifest that is damaged.
    """
    missing = missing_files(vfs, directory, state)
    if missing and torn is not None:
        raise Corruption(
            "The manifest ends too early",
            path=torn.path,
            offset=torn.offset,
            expected=f"the edits that made {os.path.relpath(missing[0], directory)} unneeded",
            got=torn.problem,
        )
    if missing:
        is_table = filenames.parse_table_name(os.path.basename(missing[0])) is not None
        what = "A table is missing" if is_table else "A log segment is missing"
        raise Corruption(what, path=missing[0], offset=0, expected="a file", got="no file")


def missing_files(vfs: Vfs, directory: str, state: ManifestState) -> list[str]:
    """Paths of the tables, then of the log segments, that the state needs and that are not there."""
    present = [_names(vfs, folder(directory)) for folder in (filenames.table_directory, filenames.wal_directory)]
    numbers = {number for number in map(filenames.parse_segment_name, present[1]) if number is not None}
    first = state.first_segment
    last = max([first - (state.term == 0), *numbers, *(state.closed or ())[:1]])
    missing = [filenames.table_path(directory, name) for name in sorted(state.table_names().difference(present[0]))]
    return missing + [filenames.segment_path(directory, n) for n in range(first, last + 1) if n not in numbers]


def _names(vfs: Vfs, folder: str) -> list[str]:
    return vfs.list(folder) if vfs.exists(folder) else []


def sweep(vfs: Vfs, directory: str, state: ManifestState, manifest_number: int) -> list[str]:
    """Delete what no manifest in force names: older manifests and segments, tables of lost jobs, half-made files."""
    tables = state.table_names()
    doomed = [filenames.manifest_path(directory, n) for n in manifest_numbers(vfs, directory) if n != manifest_number]
    for folder in (filenames.wal_directory(directory), filenames.table_directory(directory), directory):
        doomed += [os.path.join(folder, name) for name in vfs.list(folder) if filenames.is_tmp(name)]
    for name in vfs.list(filenames.wal_directory(directory)):
        number = filenames.parse_segment_name(name)
        if number is not None and number < state.first_segment:
            doomed.append(filenames.segment_path(directory, number))
    for name in vfs.list(filenames.table_directory(directory)):
        if filenames.parse_table_name(name) is not None and name not in tables:
            doomed.append(filenames.table_path(directory, name))
    for path in doomed:
        vfs.remove(path)
    return [os.path.relpath(path, directory) for path in doomed]
