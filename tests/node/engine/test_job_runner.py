"""The worker process: does jobs, dies with its parent, and may be killed at any time at the cost of a retry."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from shardkv.errors import Corruption, StorageError
from shardkv_node.engine import job_runner
from shardkv_node.engine.columns import PUT
from shardkv_node.engine.entries import WriteEntry
from shardkv_node.engine.job import CompactionInput, CompactionJob, FlushJob, JobResult, SegmentSpan
from shardkv_node.engine.job_runner import JobRunner
from shardkv_node.engine.log_writer import LogWriter
from shardkv_node.engine.vfs import OsVfs
from shardkv_node.engine.worker_protocol import (
    Outcome,
    decode_job,
    decode_reply,
    encode_job,
    encode_reply,
    write_message,
)
from tests.node.engine.tables import open_table, options, read_all, write_table

CRASH_ONCE = """
import os, sys
marker = sys.argv[1]
if not os.path.exists(marker):
    open(marker, "w").close()
    sys.stdin.buffer.read(4)
    open(os.path.join(sys.argv[2], "000007-0badcafe.sst"), "w").close()
    os.kill(os.getpid(), 9)
from shardkv_node.engine.worker import main
main()
"""
ALWAYS_DIES = "import sys; sys.stdin.buffer.read(4); sys.exit(3)"
NEVER_ANSWERS = "import sys; sys.stdin.buffer.read()"


class Owner:
    """The owner of a store: runs what is posted to it, when it waits."""

    def __init__(self) -> None:
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.outcomes: list[Outcome] = []

    def wait(self, n: int = 1) -> list[Outcome]:
        while len(self.outcomes) < n:
            self.posted.get(timeout=30)()
        return self.outcomes


@contextmanager
def running(
    owner: Owner, command: tuple[str, ...] | None = None, idle_s: float = 60, workers: int = 1
) -> Iterator[JobRunner]:
    runner = JobRunner(
        workers, owner.posted.put, command=command or job_runner.WORKER_COMMAND, retry_pause_s=0.01, idle_s=idle_s
    )
    try:
        yield runner
    finally:
        runner.close()


def some_job(tmp_path: Path, *, rows: int = 100) -> CompactionJob:
    path = str(tmp_path / "000001-00000000.sst")
    meta = write_table(OsVfs(), path, {b"%06d" % n: b"v" for n in range(rows)})
    (tmp_path / "out").mkdir()
    return CompactionJob(
        job_id="0badcafe",
        output_directory=str(tmp_path / "out"),
        file_number=7,
        tablet=1,
        runs=[[CompactionInput(path, meta)]],
        drop_tombstones=True,
        options=options(),
    )


def check_result(tmp_path: Path, outcome: Outcome) -> JobResult:
    assert isinstance(outcome, JobResult), outcome
    (meta,) = outcome.tables[1]
    assert os.listdir(tmp_path / "out") == [meta.file_name]
    table = open_table(OsVfs(), str(tmp_path / "out" / meta.file_name), meta)
    assert len(read_all(table)) == 100
    table.close()
    return outcome


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition never came"
        time.sleep(0.005)


def test_a_worker_does_jobs_and_ends_with_the_runner(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner) as runner:
        assert runner.worker_pids == [], "nothing is started before there is work"
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        result = check_result(tmp_path, owner.wait()[0])
        assert result.tables[1][0].file_name == "000007-0badcafe.sst"
        (pid,) = runner.worker_pids
        assert psutil.Process(pid).nice() > psutil.Process().nice()
    assert not psutil.pid_exists(pid)
    assert owner.posted.empty()


def test_a_worker_that_is_told_what_it_does_not_know_ends_instead_of_standing_there() -> None:
    process = subprocess.Popen(job_runner.WORKER_COMMAND, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    try:
        write_message(process.stdin, msgspec.msgpack.encode(["a job of another release"]))
        assert process.wait(30) == 1
        assert b"does not understand its store" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stderr.close()


def test_without_workers_jobs_run_inline(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    runner = JobRunner(0, lambda call: call())
    runner.submit(some_job(tmp_path), outcomes.append)
    check_result(tmp_path, outcomes[0])
    runner.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_flush_never_waits_behind_a_compaction(tmp_path: Path, workers: int) -> None:
    owner = Owner()
    with running(owner, workers=workers) as runner:
        slow = msgspec.structs.replace(some_job(tmp_path, rows=100_000), bytes_per_s=1)
        runner.submit(slow, owner.outcomes.append)
        empty = FlushJob(
            job_id="0badcafe",
            output_directory=str(tmp_path / "out"),
            file_number=1,
            segments=[],
            tablets={},
            options=options(),
        )
        runner.submit(empty, owner.outcomes.append)
        assert owner.wait() == [JobResult({})]
        assert len(runner.worker_pids) == workers


def test_a_flush_in_the_middle_of_a_compaction_leaves_both_whole(tmp_path: Path) -> None:
    owner = Owner()
    log = LogWriter.create(OsVfs(), str(tmp_path / "log"), store_id=bytes(16), number=1)
    log.append([WriteEntry(9, 1, 1, None, [b"k"], PUT, 0, [b"v"])], 1)
    log.close()
    compaction = some_job(tmp_path, rows=100_000)
    size = compaction.runs[0][0].meta.size
    compaction = msgspec.structs.replace(compaction, bytes_per_s=2 * size)
    flush = FlushJob(
        job_id="12345678",
        output_directory=str(tmp_path / "out"),
        file_number=1,
        segments=[SegmentSpan(log.path)],
        tablets={9: (0, 1)},
        options=options(),
    )
    with running(owner) as runner:
        runner.submit(compaction, owner.outcomes.append)
        wait_until(lambda: bool(os.listdir(tmp_path / "out")))
        runner.submit(flush, owner.outcomes.append)
        first, second = owner.wait(2)
    assert isinstance(first, JobResult) and isinstance(second, JobResult)
    assert first.tables[9][0].count == 1, "the flush came in later and was done first"
    assert second.tables[1][0].count == 100_000
    for meta in (first.tables[9][0], second.tables[1][0]):
        open_table(OsVfs(), str(tmp_path / "out" / meta.file_name), meta).verify()


def test_both_jobs_of_a_worker_that_dies_are_done_again(tmp_path: Path) -> None:
    owner = Owner()
    compaction = some_job(tmp_path, rows=100_000)
    slow = msgspec.structs.replace(compaction, bytes_per_s=2 * compaction.runs[0][0].meta.size)
    flush = FlushJob(
        job_id="12345678",
        output_directory=str(tmp_path / "out"),
        file_number=1,
        segments=[],
        tablets={},
        options=options(),
    )
    with running(owner) as runner:
        runner.submit(slow, owner.outcomes.append)
        wait_until(lambda: bool(os.listdir(tmp_path / "out")))
        (pid,) = runner.worker_pids
        os.kill(pid, signal.SIGSTOP)
        runner.submit(flush, owner.outcomes.append)
        os.kill(pid, signal.SIGKILL)
        first, second = owner.wait(2)
        assert runner.worker_pids != [pid]
    assert first == JobResult({}) and isinstance(second, JobResult)
    (meta,) = second.tables[1]
    assert meta.count == 100_000
    assert os.listdir(tmp_path / "out") == [meta.file_name], "nothing is left of the first attempts"


def test_a_worker_that_ends_before_its_first_job_is_an_error(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner, (sys.executable, "-c", "import sys; sys.exit(4)")) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        outcome = owner.wait()[0]
    assert isinstance(outcome, StorageError) and "exit code 4" in str(outcome)


def test_a_compaction_keeps_to_its_rate(tmp_path: Path) -> None:
    job = some_job(tmp_path, rows=30_000)
    size = job.runs[0][0].meta.size
    owner = Owner()
    with running(owner) as runner:
        runner.submit(msgspec.structs.replace(job, bytes_per_s=2 * size), owner.outcomes.append)
        started = time.monotonic()
        assert isinstance(owner.wait()[0], JobResult)
        assert time.monotonic() - started > 0.35


def test_a_worker_killed_in_the_middle_costs_a_retry(tmp_path: Path) -> None:
    owner = Owner()
    command = (sys.executable, "-c", CRASH_ONCE, str(tmp_path / "marker"), str(tmp_path / "out"))
    with running(owner, command) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        result = check_result(tmp_path, owner.wait()[0])
    assert (tmp_path / "marker").exists()
    assert not result.tables[1][0].file_name.endswith("-0badcafe.sst"), "the retry has names of its own"


def test_a_worker_killed_between_jobs_is_replaced(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        owner.wait()
        (pid,) = runner.worker_pids
        os.kill(pid, signal.SIGKILL)
        os.unlink(next((tmp_path / "out").iterdir()))
        (tmp_path / "out").rmdir()
        (tmp_path / "again").mkdir()
        runner.submit(some_job(tmp_path / "again"), owner.outcomes.append)
        check_result(tmp_path / "again", owner.wait(2)[1])


def test_a_worker_that_always_dies_is_an_error_in_the_end(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner, (sys.executable, "-c", ALWAYS_DIES)) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        outcome = owner.wait()[0]
    assert isinstance(outcome, StorageError)
    assert "failed 3 times" in str(outcome) and "exit code 3" in str(outcome)


def test_a_worker_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner, (str(tmp_path / "no-such-program"),)) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        assert isinstance(owner.wait()[0], StorageError)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_job_that_no_message_can_hold_is_an_error_and_the_next_one_is_done(tmp_path: Path, workers: int) -> None:
    owner = Owner()
    job = some_job(tmp_path)
    with running(owner, workers=workers) as runner:
        huge = msgspec.structs.replace(job, options=msgspec.structs.replace(job.options, filter_bits_per_key=1 << 64))
        runner.submit(huge, owner.outcomes.append)
        assert isinstance(owner.wait()[0], StorageError)
        runner.submit(job, owner.outcomes.append)
        check_result(tmp_path, owner.wait(2)[1])


@pytest.mark.parametrize("name", ["shardkv-worker-feed", "shardkv-worker-replies"])
def test_a_thread_that_cannot_be_started_is_an_error_and_the_next_job_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    owner = Owner()
    with running(owner) as runner:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            runner.submit(some_job(tmp_path), owner.outcomes.append)
            outcome = owner.wait()[0]
        assert isinstance(outcome, StorageError) and "can't start new thread" in str(outcome)
        (tmp_path / "again").mkdir()
        runner.submit(some_job(tmp_path / "again"), owner.outcomes.append)
        check_result(tmp_path / "again", owner.wait(2)[1])


def test_a_job_without_memory_says_so_and_what_to_do() -> None:
    _, outcome = decode_reply(encode_reply("1", MemoryError()))
    assert isinstance(outcome, StorageError)
    assert "MemoryError" in outcome.message and "memtable_bytes_max" in outcome.hint


def test_the_error_of_a_job_is_not_retried(tmp_path: Path) -> None:
    owner = Owner()
    job = some_job(tmp_path)
    path = job.runs[0][0].path
    data = bytearray(Path(path).read_bytes())
    data[9] ^= 1
    Path(path).write_bytes(data)
    with running(owner) as runner:
        runner.submit(job, owner.outcomes.append)
        outcome = owner.wait()[0]
        assert len(runner.worker_pids) == 1
    assert isinstance(outcome, Corruption)
    assert outcome.detail["path"] == path
    assert os.listdir(tmp_path / "out") == []


def test_close_does_not_wait_for_a_job(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner, (sys.executable, "-c", NEVER_ANSWERS)) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        runner.submit(some_job(tmp_path / "out"), owner.outcomes.append)
        wait_until(lambda: bool(runner.worker_pids))
        (pid,) = runner.worker_pids
        started = time.monotonic()
        runner.close()
        assert time.monotonic() - started < 5
    assert not psutil.pid_exists(pid)
    assert owner.posted.empty(), "after close nobody is called"


def test_an_idle_worker_is_ended_and_comes_back(tmp_path: Path) -> None:
    owner = Owner()
    with running(owner, idle_s=0.05) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        owner.wait()
        wait_until(lambda: runner.worker_pids == [])
        (tmp_path / "again").mkdir()
        runner.submit(some_job(tmp_path / "again"), owner.outcomes.append)
        check_result(tmp_path / "again", owner.wait(2)[1])


def test_a_worker_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "from shardkv_node.engine.job_runner import WORKER_COMMAND\n"
        "p = subprocess.Popen(WORKER_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdin is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    assert worker.is_running()
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_a_worker_inherits_no_lock(tmp_path: Path) -> None:
    vfs, owner = OsVfs(), Owner()
    lock = vfs.lock(str(tmp_path / "LOCK"))
    with running(owner) as runner:
        runner.submit(some_job(tmp_path), owner.outcomes.append)
        owner.wait()
        assert runner.worker_pids
        lock.release()
        vfs.lock(str(tmp_path / "LOCK")).release()


def test_the_worker_imports_little() -> None:
    """A worker is started per node: what it imports is memory and start-up time of each."""
    code = (
        "import sys, shardkv_node.engine.worker;"
        "print([m for m in ('asyncio', 'uvloop', 'msgpack', 'click', 'sortedcontainers', 'shardkv_node.engine.store', "
        "'subprocess', 'dataclasses', 'inspect', 'hashlib') if sys.modules.get(m)])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_jobs_and_answers_survive_the_pipe(tmp_path: Path) -> None:
    job = some_job(tmp_path)
    assert decode_job(encode_job(job)) == job
    result = JobResult({5: [job.runs[0][0].meta]})
    assert decode_reply(encode_reply("0badcafe", result)) == ("0badcafe", result)
    job_id, bug = decode_reply(encode_reply("0badcafe", ZeroDivisionError("oops")))
    assert job_id == "0badcafe" and type(bug) is StorageError and "ZeroDivisionError: oops" in str(bug)


@pytest.mark.parametrize("times", [2])
def test_close_may_be_called_again(times: int) -> None:
    runner = JobRunner(1, lambda call: call())
    for _turn in range(times):
        runner.close()
