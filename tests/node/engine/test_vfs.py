"""The file seam, on the real file system and in the crash model: the same promises."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shardkv.errors import DiskFull, StorageError, StoreLocked
from shardkv_node.engine import filenames
from shardkv_node.engine import vfs as vfs_module
from shardkv_node.engine.vfs import OsVfs, Vfs, _OsWritableFile
from tests.node.engine.crash_vfs import CrashVfs, keep_everything, keep_nothing, keep_some


@pytest.fixture(params=["os", "crash"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Vfs, str]:
    if request.param == "os":
        return OsVfs(), str(tmp_path)
    vfs = CrashVfs()
    vfs.make_dirs("/store")
    return vfs, "/store"


def test_files_are_written_and_read(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    path = os.path.join(root, "a")
    file = vfs.create(path)
    file.write(b"hello ")
    file.write(memoryview(b"world"))
    assert file.offset == 11
    file.sync()
    file.close()
    vfs.sync_dir(root)
    assert vfs.read_all(path) == b"hello world"
    assert vfs.size(path) == 11
    reader = vfs.open_read(path)
    assert reader.pread(6, 100) == b"world"
    assert reader.pread(11, 5) == b""
    vfs.remove(path)
    assert reader.pread(0, 5) == b"hello", "an open file outlives its name"
    reader.close()
    assert not vfs.exists(path)


def test_create_refuses_a_file_that_exists(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    path = os.path.join(root, "a")
    vfs.create(path).close()
    with pytest.raises(StorageError, match="File exists") as caught:
        vfs.create(path)
    assert isinstance(caught.value.__cause__, FileExistsError)
    assert path in str(caught.value)


def test_missing_files_are_storage_errors(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    path = os.path.join(root, "missing")
    for operation in (vfs.open_read, vfs.size, vfs.remove, vfs.list):
        with pytest.raises(StorageError, match="No such file"):
            operation(path)


def test_write_atomic_replaces_and_ignores_leftovers(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    path = os.path.join(root, "CURRENT")
    vfs.create(path + ".tmp").close()
    vfs.write_atomic(path, b"one")
    vfs.write_atomic(path, b"two")
    assert vfs.read_all(path) == b"two"
    assert vfs.list(root) == ["CURRENT"]


def test_a_link_is_the_same_file_under_a_second_name_and_a_copy_is_another(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    source, link, copy = (os.path.join(root, name) for name in ("source", "link", "copy"))
    file = vfs.create(source)
    file.write(b"bytes" * 1000)
    file.close()
    assert vfs.link(source, link)
    vfs.copy(source, copy)
    vfs.sync_file(link)
    for taken in (link, copy):
        with pytest.raises(StorageError, match="File exists"):
            vfs.link(source, taken)
        with pytest.raises(StorageError, match="File exists"):
            vfs.copy(source, taken)
    vfs.remove(source)
    assert vfs.read_all(link) == vfs.read_all(copy) == b"bytes" * 1000
    for missing in (vfs.link, vfs.copy):
        with pytest.raises(StorageError, match="No such file"):
            missing(source, os.path.join(root, "another"))


def test_no_link_leads_to_another_file_system(tmp_path: Path) -> None:
    vfs = CrashVfs()
    vfs.make_dirs("/one")
    vfs.make_dirs("/two")
    vfs.replace("/one/file", b"bytes")
    assert not vfs.link("/one/file", "/two/file") and not vfs.exists("/two/file")
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    (tmp_path / "file").write_bytes(b"bytes")
    target = f"/dev/shm/{tmp_path.name}-{os.getpid()}"
    assert not OsVfs().link(str(tmp_path / "file"), target) and not os.path.exists(target)


def test_a_lock_keeps_others_out_until_it_is_released(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    path = os.path.join(root, "LOCK")
    lock = vfs.lock(path)
    with pytest.raises(StoreLocked):
        vfs.lock(path)
    lock.release()
    vfs.lock(path).release()


HOLDER_WITH_A_CHILD = """
import os, sys
from shardkv_node.engine.vfs import OsVfs
lock = OsVfs().lock(sys.argv[1])
if os.fork():
    print("held", flush=True)
    os.kill(os.getpid(), 9)
sys.stdin.read()  # the child has what its parent had, until it is told to go
"""


def test_a_lock_that_a_child_of_a_dead_holder_has_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "LOCK")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER_WITH_A_CHILD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "held\n" and holder.wait(20) < 0
    with monkeypatch.context() as impatient:
        impatient.setattr(vfs_module, "DEAD_HOLDER_WAIT_S", 0.0)
        with pytest.raises(StoreLocked, match=f"a child of process {holder.pid}, which is gone"):
            OsVfs().lock(path)
    monkeypatch.setattr(vfs_module, "DEAD_HOLDER_WAIT_S", 20.0)
    let_go = threading.Timer(0.05, holder.stdin.close)
    let_go.start()
    OsVfs().lock(path).release()
    let_go.join()
    holder.stdout.close()


def test_the_holder_of_a_lock_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "LOCK")
    code = (
        "import sys; from shardkv_node.engine.vfs import OsVfs;"
        "lock = OsVfs().lock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreLocked, match=f"in use by process {holder.pid}"):
            OsVfs().lock(path)
        holder.kill()
        holder.wait()
    OsVfs().lock(path).release()


def test_no_space_is_disk_full() -> None:
    file = _OsWritableFile("/dev/full", os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(DiskFull, match="Could not write to /dev/full") as caught:
        file.write(b"x")
    file.close()
    assert caught.value.retriable
    assert isinstance(caught.value.__cause__, OSError)


def test_free_bytes(world: tuple[Vfs, str]) -> None:
    vfs, root = world
    assert vfs.free_bytes(root) > 0


# --- the crash model itself ---


def crashed_world() -> CrashVfs:
    vfs = CrashVfs()
    vfs.make_dirs("/d")
    file = vfs.create("/d/a")
    file.write(b"synced")
    file.sync()
    vfs.sync_dir("/d")
    file.write(b" and not")
    vfs.create("/d/b")
    return vfs


def test_a_crash_loses_what_was_not_synced() -> None:
    vfs = crashed_world()
    lost, kept = vfs.crash(keep_nothing), vfs.crash(keep_everything)
    assert (lost.list("/d"), lost.read_all("/d/a")) == (["a"], b"synced")
    assert (kept.list("/d"), kept.read_all("/d/a")) == (["a", "b"], b"synced and not")
    states = set()
    for seed in range(30):
        some = vfs.crash(keep_some(seed, 50))
        states.add((tuple(some.list("/d")), some.read_all("/d/a")))
    assert len(states) == 4


def test_a_rename_is_lost_without_a_sync_of_the_directory() -> None:
    vfs = CrashVfs()
    vfs.make_dirs("/d")
    vfs.write_atomic("/d/x", b"old")
    file = vfs.create("/d/x.tmp")
    file.write(b"new")
    file.sync()
    vfs.rename("/d/x.tmp", "/d/x")
    assert vfs.crash().read_all("/d/x") == b"old"
    vfs.sync_dir("/d")
    assert vfs.crash().read_all("/d/x") == b"new"


def test_write_atomic_is_old_or_new_at_every_crash() -> None:
    for n in range(1, 20):
        vfs = CrashVfs()
        vfs.make_dirs("/d")
        vfs.write_atomic("/d/x", b"old")
        before = vfs.operations
        vfs.fail_at(before + n, sticky=True)
        try:
            vfs.write_atomic("/d/x", b"new")
        except StorageError:
            for seed in range(5):
                assert vfs.crash(keep_some(seed, 50)).read_all("/d/x") in (b"old", b"new")
        else:
            assert n > 4 and vfs.crash().read_all("/d/x") == b"new"
            return
    raise AssertionError("write_atomic never got through")


def test_a_failing_write_takes_half_and_the_next_works() -> None:
    vfs = CrashVfs()
    file = vfs.create("/a")
    vfs.fail_at(2, errno=errno.ENOSPC)
    with pytest.raises(DiskFull):
        file.write(b"abcd")
    file.write(b"X")
    assert vfs.read_all("/a") == b"abX"


# --- names ---


def test_names_are_made_and_parsed() -> None:
    assert filenames.parse_manifest_name(filenames.manifest_name(7)) == 7
    assert filenames.parse_segment_name(filenames.segment_name(12_345_678)) == 12_345_678
    assert filenames.parse_table_name(filenames.table_name(123, "a1b2c3d4")) == (123, "a1b2c3d4")
    assert filenames.table_path("/s", "x.sst") == "/s/tables/x.sst"
    assert filenames.is_tmp(filenames.tmp_path("/s/CURRENT"))


@pytest.mark.parametrize(
    "name",
    ["", "CURRENT", "000001.sst", "000001-A1B2C3D4.sst", "1-a1b2c3d4.sst", "000001-a1b2c3d4.sst\n", "٠٠٠٠٠١.wal"],
)
def test_other_names_are_nobodys(name: str) -> None:
    assert filenames.parse_table_name(name) is None
    assert filenames.parse_segment_name(name) is None
    assert filenames.parse_manifest_name(name) is None


def test_a_reserve_is_zeros_behind_what_is_written_until_it_is_trimmed(tmp_path: Path) -> None:
    vfs, path = OsVfs(), str(tmp_path / "file")
    file = vfs.create(path)
    file.write(b"abc")
    file.reserve(10)
    assert vfs.read_all(path) == b"abc" + bytes(7)
    file.write(b"def")
    file.sync()
    assert vfs.read_all(path) == b"abcdef" + bytes(4) and file.offset == 6
    file.write(b"ghijkl")
    assert vfs.read_all(path) == b"abcdefghijkl"
    file.reserve(20)
    file.trim()
    assert vfs.read_all(path) == b"abcdefghijkl"
    file.close()
