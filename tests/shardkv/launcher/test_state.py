"""Files for the next launcher, pids that are not trusted, and ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shardkv.directory_lock import DirectoryLock, is_locked, lock_holder
from shardkv.errors import LaunchError, StorageError, StoreLocked, UnsupportedFormat
from shardkv.launcher.ports import check_port, free_port
from shardkv.launcher.processes import last_words, take_over
from shardkv.launcher.state import (
    ClusterFile,
    Layout,
    ProcessesFile,
    ProcessRecord,
    birth_of,
    is_running,
    read_state,
    write_state,
)

CLUSTER = ClusterFile(nodes=3, partition="range", shards=2, split_at=["m"], port=1, meta_port=2)


def record(pid: int, birth: str) -> ProcessRecord:
    return ProcessRecord(name="node-1", role="node", command=["x"], pid=pid, birth=birth, state="running")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    processes = ProcessesFile(bind="127.0.0.1", processes=[record(5, "b/1")])
    write_state(tmp_path / "a", CLUSTER)
    write_state(tmp_path / "b", processes)
    assert read_state(tmp_path / "a", ClusterFile) == CLUSTER
    assert read_state(tmp_path / "b", ProcessesFile) == processes
    assert read_state(tmp_path / "c", ClusterFile) is None


def test_a_newer_and_a_damaged_file_are_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"format": 2}')
    with pytest.raises(UnsupportedFormat, match="has format 2; this shardkv knows format 1"):
        read_state(tmp_path / "a", ClusterFile)
    for text in ("{", '{"format": 1}', "[]"):
        (tmp_path / "a").write_text(text)
        with pytest.raises(StorageError, match="is damaged"):
            read_state(tmp_path / "a", ClusterFile)


def test_a_pid_given_to_another_process_is_not_taken_over() -> None:
    mine = birth_of(os.getpid())
    assert mine is not None
    assert is_running(record(os.getpid(), mine))
    stale = record(os.getpid(), mine[:-1] + ("0" if mine[-1] != "0" else "1"))
    assert not is_running(stale)
    assert take_over(stale) is None


def test_an_ended_process_is_not_running_even_before_it_is_reaped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    birth = birth_of(child.pid)
    assert birth is not None
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert take_over(record(child.pid, birth)) is None
    child.wait()
    assert take_over(record(child.pid, birth)) is None
    assert not is_running(record(0, ""))


def test_a_directory_is_locked_once_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    lock = DirectoryLock(path)
    assert is_locked(path)
    with pytest.raises(StoreLocked, match=f"in use by process {os.getpid()}"):
        DirectoryLock(path)
    lock.release()
    assert not is_locked(path)
    assert lock_holder(path) == os.getpid()
    DirectoryLock(path).release()


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from shardkv.directory_lock import DirectoryLock\n"
        "held = DirectoryLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert is_locked(path)
    assert lock_holder(path) == holder.pid
    holder.kill()
    holder.communicate()
    assert not is_locked(path)


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file cannot be used as a data directory: not a directory"):
        Layout(tmp_path / "file").make()


def test_a_taken_port_is_named_even_when_its_owner_shares_it() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"Port {port} on 127\.0\.0\.1 is taken .* --port"):
            check_port("127.0.0.1", port)
        assert free_port("127.0.0.1", near=port) != port


def test_an_address_of_another_machine_is_refused_with_a_sentence() -> None:
    with pytest.raises(LaunchError, match="cannot be listened on"):
        check_port("192.0.2.1", 7400)


def test_last_words_are_the_last_line_that_says_something(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("first\nError: The store is locked.\n\n")
    assert last_words(log) == "The store is locked."
    assert last_words(tmp_path / "none") == ""
