"""Real disks that fail, for `test_real_faults`. Run as root inside a mount namespace of its own:

    unshare --mount --propagation private python -m tests.node.engine.real_faults FAULT DIRECTORY

Mounts are seen by this process alone and end with it, loop device included. Exit code 77: nothing could be mounted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from shardkv.errors import DiskFull, StorageError, StorePoisoned
from shardkv_node.engine import Engine

CANNOT_MOUNT = 77
MIB = 1 << 20
ROW = 2000


def mount(*arguments: str) -> None:
    run("mount", *arguments)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        print(f"{' '.join(command)}: {done.stderr.strip()}")
        sys.exit(CANNOT_MOUNT)


def value(number: int) -> bytes:
    """Different for each, and it does not compress."""
    return number.to_bytes(8, "big") * (ROW // 16) + os.urandom(ROW // 2)


def fill(engine: Engine, acked: dict[bytes, bytes], count: int) -> StorageError | None:
    """Put up to `count` rows; the error that ended it, if one did."""
    for number in range(len(acked), len(acked) + count):
        key, held = b"key%06d" % number, value(number)
        try:
            engine.put(key, held)
        except StorageError as error:
            return error
        acked[key] = held
    return None


def holds(engine: Engine, acked: dict[bytes, bytes]) -> None:
    """Every acknowledged row is there; at most the one that failed besides."""
    rows = dict(engine.scan())
    missing = acked.keys() - rows.keys()
    assert not missing, f"{len(missing)} acknowledged writes are lost: {sorted(missing)[:3]}"
    assert all(rows[key] == held for key, held in acked.items()), "a value is wrong"
    assert len(rows) <= len(acked) + 1, sorted(rows.keys() - acked.keys())


def a_later_sync_lies(path: str) -> bool:
    """The kernel soon says that all is well, though what it failed to write was never written."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        for _ in range(5):
            try:
                os.fdatasync(descriptor)
            except OSError:
                continue
            return True
        return False
    finally:
        os.close(descriptor)


def failed_fsync(directory: Path) -> None:
    """ext4 on a loop file on a tmpfs too small for it: writes succeed, an fsync fails, a later one lies.

    What the disk kept is not looked at: once its tmpfs is full, a loop device also calls writes done that it dropped,
    so a program that does nothing but append and fdatasync loses bytes whose sync succeeded. No engine can mend that.
    That nothing acknowledged is lost after a failed sync is shown on `CrashVfs`, whose disk keeps what it says it does.
    """
    small, disk = directory / "small", directory / "disk"
    small.mkdir()
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=6m", "none", str(small))
    image = small / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image))
    mount("-o", "loop", str(image), str(disk))
    acked: dict[bytes, bytes] = {}
    engine = Engine.open(disk / "data", disk_reserve_bytes=0, workers=0, memtable_bytes_max=64 * MIB)
    error = fill(engine, acked, 10_000)
    assert isinstance(error, StorePoisoned), f"a failed fsync gave {error!r}"
    assert "Could not sync" in str(error), error
    assert len(acked) > 100
    assert a_later_sync_lies(engine._store._log.path), "this kernel is honest: the test shows nothing"
    size = os.path.getsize(engine._store._log.path)
    assert isinstance(fill(engine, acked, 1), StorePoisoned), "a write was taken after a failed fsync"
    assert engine.get(b"key%06d" % 7) == acked[b"key%06d" % 7], "reads must go on"
    engine.close()
    assert os.path.getsize(disk / "data" / "wal" / os.path.basename(engine._store._log.path)) == size


def disk_full(directory: Path) -> None:
    """Writes are refused below the reserve, reads go on, and writes resume by themselves when there is space again."""
    mount("-t", "tmpfs", "-o", "size=12m", "none", str(directory))
    acked: dict[bytes, bytes] = {}
    options = {"workers": 0, "memtable_bytes_max": 256 * 1024, "table_bytes_max": 256 * 1024}
    with Engine.open(directory / "data", disk_reserve_bytes=3 * MIB, **options) as engine:
        assert fill(engine, acked, 200) is None
        ballast = directory / "ballast"
        ballast.write_bytes(bytes(os.statvfs(directory).f_bavail * 4096 - 2 * MIB))
        deadline = time.monotonic() + 5
        while (error := fill(engine, acked, 1)) is None:  # free space is looked at once a second
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert type(error) is DiskFull, repr(error)
        assert "writes are refused, reads go on" in str(error), error
        holds(engine, acked)
        assert type(fill(engine, acked, 1)) is DiskFull
        ballast.unlink()
        deadline = time.monotonic() + 5
        while (error := fill(engine, acked, 1)) is not None:
            assert type(error) is DiskFull and time.monotonic() < deadline, error
            time.sleep(0.05)
        assert fill(engine, acked, 200) is None
        holds(engine, acked)
    with Engine.open(directory / "data", disk_reserve_bytes=3 * MIB, **options) as engine:
        holds(engine, acked)


def no_reserve(directory: Path) -> None:
    """The disk fills to its last byte in the middle of writing: nothing acknowledged is lost, and it opens again."""
    mount("-t", "tmpfs", "-o", "size=4m", "none", str(directory))
    acked: dict[bytes, bytes] = {}
    engine = Engine.open(directory / "data", disk_reserve_bytes=0, workers=0, memtable_bytes_max=512 * 1024)
    error = fill(engine, acked, 10_000)
    assert isinstance(error, DiskFull | StorePoisoned), repr(error)
    assert "No space left" in str(error), error
    holds(engine, acked)
    engine.close()
    mount("-o", "remount,size=32m", str(directory))
    with Engine.open(directory / "data", disk_reserve_bytes=0, workers=0) as engine:
        holds(engine, acked)
        assert fill(engine, acked, 300) is None
        engine.compact()
        holds(engine, acked)


FAULTS = {"failed-fsync": failed_fsync, "disk-full": disk_full, "no-reserve": no_reserve}

if __name__ == "__main__":
    FAULTS[sys.argv[1]](Path(sys.argv[2]))
