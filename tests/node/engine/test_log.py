"""The log's bytes: the worked example, round trips, and the line between a torn tail and damage."""

from __future__ import annotations

import google_crc32c
import msgspec
import pytest

from shardkv.errors import Corruption, StoreMismatch, UnsupportedFormat
from shardkv_node.engine import entries as log_entries
from shardkv_node.engine import log_format
from shardkv_node.engine.entries import Entry, WriteEntry
from shardkv_node.engine.entry_runs import WriteRun, read_runs
from shardkv_node.engine.log_format import GROUP_BYTES, HEADER_BYTES
from shardkv_node.engine.log_reader import ENTRY_DECODER, FileHeader, SegmentReader, check_identity
from shardkv_node.engine.log_writer import LogWriter, file_header
from tests.node.engine.crash_vfs import CrashVfs

STORE_ID = bytes(range(16))
PATH = "/000002.wal"


def write_entry(seqno: int, key: bytes = b"k", value: bytes = b"v") -> WriteEntry:
    return WriteEntry(1, 1, seqno, None, [key], 1, 0, [value])


def make_log(vfs: CrashVfs, groups: int, *, synced: int = 0) -> list[int]:
    """A segment with one write per group; the first `synced` groups are known to be on disk. Returns group offsets."""
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2, previous=(1, 56), hlc=5)
    offsets = []
    for number in range(groups):
        offsets.append(log.offset)
        log.append([write_entry(number + 1)], 10 + number)
        if number < synced:
            log.sync()
            log.note_synced(log.offset)
    log.close()
    return offsets


def open_reader(vfs: CrashVfs, end: int | None = None) -> SegmentReader[Entry]:
    return SegmentReader(vfs, PATH, decoder=ENTRY_DECODER, end=end)


def example_bytes() -> bytes:
    lines = (log_format.__doc__ or "").split("Worked example")[1].splitlines()
    words = [line.split() for line in lines if line.startswith("    0")]
    return b"".join(bytes.fromhex("".join(w for w in row[1:] if len(w) == 2)) for row in words)


def test_the_worked_example_reads_as_it_says() -> None:
    vfs = CrashVfs()
    vfs.replace(PATH, example_bytes())
    reader = open_reader(vfs)
    assert reader.header == FileHeader(STORE_ID, 2, 1, 56)
    group, mark = reader.groups()
    assert reader.decode(group) == [WriteEntry(1, 1, 7, None, [b"k"], 1, 0, [b"v"])]
    assert (group.hlc, group.synced_offset) == (1 << 32, HEADER_BYTES)
    assert (mark.payload, mark.synced_offset) == (b"", group.end)
    assert reader.torn_tail is None and reader.valid_end == len(example_bytes())


def test_the_writer_writes_the_worked_example() -> None:
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2, previous=(1, 56), hlc=0)
    log.append([write_entry(7)], 1 << 32)
    log.note_synced(log.offset)
    log.mark((1 << 32) + 1)
    assert bytes(vfs.files[PATH].data) == example_bytes()


def test_every_entry_type_is_read_back() -> None:
    token = (b"client", 9)
    everything: list[Entry] = [
        WriteEntry(1, 2, 3, token, [b"a", b"b"], b"\x01\x02", bytes(16), [b"x", b""]),
        log_entries.TruncateEntry(1, 2),
        log_entries.TermEntry(1, 2, 3),
        log_entries.CommitEntry(1, 2),
        log_entries.FenceEntry(1, 2, 3),
        log_entries.TabletCreateEntry(1, b"label"),
        log_entries.TabletDropEntry(1),
        log_entries.DedupeEntry(1, 2, 3, token, 4, b"result", 5),
    ]
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2)
    log.append(everything, 1)
    assert list(read_runs(vfs, PATH)) == everything
    types = [msgspec.msgpack.decode(msgspec.msgpack.encode(entry))[0] for entry in everything]
    assert types == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("length", [0, 1, 4095, 70_000, 3 << 20])
def test_groups_of_any_size_are_read_back(length: int) -> None:
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2)
    for seqno in range(1, 4):
        log.append([write_entry(seqno, value=b"v" * length)], seqno)
    runs = [run for run in read_runs(vfs, PATH) if isinstance(run, WriteRun | WriteEntry)]
    assert [len(value) for run in runs for value in run.values] == [length] * 3


def test_a_log_cut_at_any_byte_gives_the_whole_groups_before_and_reports_the_rest() -> None:
    vfs = CrashVfs()
    offsets = make_log(vfs, 4)
    data = bytes(vfs.files[PATH].data)
    for length in range(HEADER_BYTES, len(data)):
        vfs.replace(PATH, data[:length])
        reader = open_reader(vfs)
        whole = [group.offset for group in reader.groups()]
        assert whole == [
            offset for offset, end in zip(offsets, [*offsets[1:], len(data)], strict=True) if end <= length
        ]
        torn = reader.torn_tail
        if length in offsets:
            assert torn is None
        else:
            assert torn is not None and torn.offset + torn.bytes == length and torn.offset == reader.valid_end


def test_a_flipped_bit_before_the_synced_end_is_corruption_and_behind_it_a_torn_tail() -> None:
    vfs = CrashVfs()
    offsets = make_log(vfs, 4, synced=2)  # the third group says that two are on disk
    data = bytes(vfs.files[PATH].data)
    for offset in range(HEADER_BYTES, len(data)):
        for bit in (0, 5):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit
            vfs.replace(PATH, bytes(flipped))
            reader = open_reader(vfs)
            if offset < offsets[2]:
                with pytest.raises(Corruption) as caught:
                    list(reader.groups())
                assert caught.value.path == PATH and caught.value.offset in offsets[:2]
            else:
                assert len(list(reader.groups())) in (2, 3)
                assert reader.torn_tail is not None and reader.torn_tail.offset in offsets[2:]


def test_a_closed_segment_must_be_valid_to_the_end_its_successor_names() -> None:
    vfs = CrashVfs()
    offsets = make_log(vfs, 3)
    data = bytes(vfs.files[PATH].data)
    assert len(list(open_reader(vfs, end=len(data)).groups())) == 3
    assert len(list(open_reader(vfs, end=offsets[2]).groups())) == 2  # what is behind is void, and not looked at
    vfs.replace(PATH, data[:-1])
    with pytest.raises(Corruption, match="shorter than it was"):
        open_reader(vfs, end=len(data))
    flipped = bytearray(data)
    flipped[offsets[2] + 3] ^= 1
    vfs.replace(PATH, bytes(flipped))
    with pytest.raises(Corruption, match="as the next segment"):
        list(open_reader(vfs, end=len(data)).groups())


def test_a_group_where_it_was_not_written_is_not_a_group() -> None:
    vfs = CrashVfs()
    offsets = make_log(vfs, 3)
    data = bytes(vfs.files[PATH].data)
    doubled = data + data[offsets[2] :]  # a disk block twice
    vfs.replace(PATH, doubled)
    reader = open_reader(vfs)
    assert len(list(reader.groups())) == 3
    assert reader.torn_tail is not None
    other = file_header(log_format.LOG_MAGIC, STORE_ID, 3, (2, 56)) + data[HEADER_BYTES:]
    vfs.replace(PATH, other)
    assert list(open_reader(vfs).groups()) == []


def test_headers_of_other_stores_numbers_and_formats_are_told_apart() -> None:
    vfs = CrashVfs()
    make_log(vfs, 1)
    header = open_reader(vfs).header
    with pytest.raises(StoreMismatch, match="belongs to store 000102"):
        check_identity(header, PATH, bytes(16), 2)
    with pytest.raises(Corruption, match="under another's name"):
        check_identity(header, PATH, STORE_ID, 7)
    head = log_format.HEADER.pack(log_format.LOG_MAGIC, 2, STORE_ID, 2, 1, 56)
    vfs.replace(PATH, head + log_format.HEADER_CRC.pack(google_crc32c.value(head)))
    with pytest.raises(UnsupportedFormat, match="log format 2; this program knows format 1"):
        open_reader(vfs)
    for damaged in (b"", b"shkvlog\n", bytes(HEADER_BYTES)):
        vfs.replace(PATH, damaged)
        with pytest.raises(Corruption):
            open_reader(vfs)


@pytest.mark.parametrize("payload", [b"\x91\x92\x63\x01", b"\x93\x01", b"\xc1", b"\x91\x92\x07\xa1a"])
def test_a_payload_with_a_right_checksum_and_wrong_content_is_corruption(payload: bytes) -> None:
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2)
    log.append_payload(payload, 1)
    with pytest.raises(Corruption, match="no known entries"):
        list(read_runs(vfs, PATH))
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2)
    log.append_payload(msgspec.msgpack.encode([[1, 1, 1, 1, None, [b"a"], 1, 0, []]]), 1)
    with pytest.raises(Corruption, match="contradicts itself"):
        list(read_runs(vfs, PATH))


def test_a_group_header_is_32_bytes() -> None:
    assert (HEADER_BYTES, GROUP_BYTES) == (56, 32)  # on disk: never change


RESERVED = 500


def reserved_log(vfs: CrashVfs, groups: int) -> tuple[bytes, int, int]:
    """The bytes of a log with a reserve, its groups synced but not the last; where that begins, and where it ends."""
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2, previous=(1, 56), hlc=5)
    log.reserve_ahead(RESERVED)
    last = log.offset
    for number in range(groups):
        last = log.offset
        log.note_synced(last)
        log.append([write_entry(number + 1)], 10 + number)
    return bytes(vfs.files[PATH].data), last, log.offset


def test_a_reserve_is_the_end_of_the_log_and_no_torn_tail() -> None:
    vfs = CrashVfs()
    for groups in (0, 1, 3, 40):  # the last of them is longer than one reserve
        data, _, end = reserved_log(vfs, groups)
        assert end + RESERVED // 5 < len(data) <= end + RESERVED
        reader = open_reader(vfs)
        assert len(list(reader.groups())) == groups
        assert reader.torn_tail is None and reader.valid_end == end
        vfs = CrashVfs()


def test_a_log_with_a_reserve_that_was_torn_or_damaged_is_judged_as_any_other() -> None:
    vfs = CrashVfs()
    data, last, end = reserved_log(vfs, 3)
    for cut in range(last + 1, end):  # the last group reached the disk in part
        vfs.replace(PATH, data[:cut] + bytes(len(data) - cut))
        reader = open_reader(vfs)
        assert len(list(reader.groups())) in (2, 3)  # 3: what is missing is zeros
        if reader.torn_tail is not None:
            assert reader.torn_tail.offset == last and 0 < reader.torn_tail.bytes <= cut - last
    for bad in range(HEADER_BYTES, len(data)):
        flipped = bytearray(data)
        flipped[bad] ^= 1
        vfs.replace(PATH, bytes(flipped))
        reader = open_reader(vfs)
        if bad < last:
            with pytest.raises(Corruption):
                list(reader.groups())
        else:
            assert len(list(reader.groups())) == (2 if bad < end else 3)
            assert reader.torn_tail is not None and reader.torn_tail.offset == (last if bad < end else end)


def test_without_space_for_a_reserve_the_log_grows_as_it_is_written() -> None:
    vfs = CrashVfs()
    log = LogWriter.create(vfs, PATH, store_id=STORE_ID, number=2)
    vfs.fail_at(vfs.operations + 1, errno=28)
    log.reserve_ahead(RESERVED)
    for number in range(20):
        log.append([write_entry(number + 1)], 10 + number)
    assert vfs.size(PATH) == log.offset
    assert len(list(open_reader(vfs).groups())) == 20
