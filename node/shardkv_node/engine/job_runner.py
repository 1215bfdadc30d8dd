"""`JobRunner`: runs jobs in worker processes and reports back to the owner of the store.

Invariants:
  - every submitted job is answered exactly once through `post`, unless `close` came first: after `close` nothing is;
  - a worker that dies costs a retry under a new job id, so the outputs of two attempts never meet; those of the dead
    one are removed;
  - at most `workers` flushes and as many other jobs run at a time, each kind in the order submitted: a flush has a
    worker of its own, so that it never waits for a compaction, which may take minutes.

A worker is started by the first job and ended after a while without one. It is a fresh Python (`subprocess`, never a
fork): it inherits no descriptor, so no lock, and it ends by itself when this process dies, because its stdin closes.
Each worker is fed by one daemon thread here, which does nothing but wait on pipes.
"""

from __future__ import annotations

import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, cast

import msgspec

from shardkv.errors import ShardKVError, StorageError
from shardkv_node.engine.filenames import parse_table_name
from shardkv_node.engine.job import FlushJob, Job, JobResult
from shardkv_node.engine.run_job import run
from shardkv_node.engine.vfs import OsVfs, Vfs
from shardkv_node.engine.worker_protocol import decode_reply, encode_job, read_message, write_message

ATTEMPTS_MAX = 3
RETRY_PAUSE_S = 0.2
IDLE_S = 60.0
"""A worker without a job for so long is ended: it costs some 20 MB and starts in a tenth of a second."""
_END_WAIT_S = 2.0

Outcome = JobResult | ShardKVError
Done = Callable[[Outcome], None]
Post = Callable[[Callable[[], None]], None]

WORKER_COMMAND = (sys.executable, "-P", "-m", "shardkv_node.engine.worker")


_Jobs = queue.SimpleQueue[tuple[Job, Done] | None]


class JobRunner:
    """`submit` jobs; `done(outcome)` comes back through `post`.

    `workers` = 0 runs each job inside `submit`, on `vfs`. With workers `post` is called from another thread, and must
    pass the call on to the owner of the store (an event loop's `call_soon_threadsafe`, a queue).
    """

    def __init__(
        self,
        workers: int,
        post: Post,
        *,
        vfs: Vfs | None = None,
        command: tuple[str, ...] = WORKER_COMMAND,
        retry_pause_s: float = RETRY_PAUSE_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._post = post
        self._vfs = vfs if vfs is not None else OsVfs()
        self._closed = threading.Event()

        def lane(jobs: _Jobs) -> _Lane:
            return _Lane(jobs, post, self._closed, self._vfs, command, retry_pause_s, idle_s)

        flushes, others = _Jobs(), _Jobs()
        self._flush_lanes = [lane(flushes) for _ in range(workers)]
        self._other_lanes = [lane(others) for _ in range(workers)]

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [pid for lane in self._lanes() if (pid := lane.pid) is not None]

    def submit(self, job: Job, done: Done) -> None:
        """Run the job some time; `done` gets its result, or the error when it failed or no worker survived it."""
        if self._closed.is_set():
            return
        lanes = self._flush_lanes if isinstance(job, FlushJob) else self._other_lanes
        if not lanes:
            outcome = _run_inline(self._vfs, job)
            self._post(lambda: done(outcome))
            return
        lanes[0].jobs.put((job, done))
        for lane in lanes:
            lane.start()

    def close(self) -> None:
        """End the workers, whatever they do, and wait for their end. Safe to call twice; returns within seconds."""
        self._closed.set()
        for lane in self._lanes():
            lane.jobs.put(None)
            lane.end_worker()
        for lane in self._lanes():
            lane.join()

    def _lanes(self) -> list[_Lane]:
        return [*self._flush_lanes, *self._other_lanes]


def _run_inline(vfs: Vfs, job: Job) -> Outcome:
    try:
        return run(vfs, job)
    except ShardKVError as error:
        return error


class _Lane:
    """One worker process and the thread that feeds it. The lock guards `_process` against `close`."""

    def __init__(
        self,
        jobs: _Jobs,
        post: Post,
        closed: threading.Event,
        vfs: Vfs,
        command: tuple[str, ...],
        retry_pause_s: float,
        idle_s: float,
    ) -> None:
        self.jobs = jobs
        self._post = post
        self._closed = closed
        self._vfs = vfs
        self._command = command
        self._retry_pause_s = retry_pause_s
        self._idle_s = idle_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None else None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._feed, name="shardkv-worker-feed", daemon=True)
            self._thread.start()

    def join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_END_WAIT_S)

    def end_worker(self) -> None:
        """Close the worker's stdin, which ends it; kill it when it does not go. Only ever the process started here."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):  # the worker may be gone already, and with it what was buffered for it
            cast(BinaryIO, process.stdin).close()
        try:
            process.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        cast(BinaryIO, process.stdout).close()

    def _feed(self) -> None:
        while not self._closed.is_set():
            try:
                item = self.jobs.get(timeout=self._idle_s)
            except queue.Empty:
                self.end_worker()
                continue
            if item is None:
                return
            job, done = item
            outcome = self._run(job)
            if self._closed.is_set():
                return
            self._post(_Answer(done, outcome))

    def _run(self, job: Job) -> Outcome:
        problem = ""
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                if self._closed.wait(self._retry_pause_s):
                    break
                job = msgspec.structs.replace(job, job_id=secrets.token_hex(4))
            try:
                reply = self._ask(encode_job(job))
            except (OSError, ValueError) as error:  # ValueError: `close` shut the pipe under our hands
                problem = f"could not start or reach a worker ({error})"
            else:
                if reply is not None:
                    return decode_reply(reply)
                problem = f"the worker ended in the middle of the job ({self._how_it_ended()})"
            self.end_worker()
            if not self._closed.is_set():
                _sweep(self._vfs, job)
        return StorageError(
            f"A storage job failed {ATTEMPTS_MAX} times: {problem}.",
            detail={"job": type(job).__name__, "attempts": ATTEMPTS_MAX},
            hint="Look at the log for what ended the worker; memory is the usual cause.",
        )

    def _ask(self, body: bytes) -> bytes | None:
        """Send one job and wait for the answer; None when the worker died or the runner was closed."""
        with self._lock:
            if self._closed.is_set():
                return None
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    close_fds=True,
                    start_new_session=True,
                )
            process = self._process
        write_message(cast(BinaryIO, process.stdin), body)
        return read_message(cast(BinaryIO, process.stdout))

    def _how_it_ended(self) -> str:
        process = self._process
        if process is None:
            return "it was told to"
        try:
            code = process.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _sweep(vfs: Vfs, job: Job) -> None:
    """Remove what an attempt whose worker is dead has written. What stays is swept when the store is opened."""
    with suppress(StorageError):
        for name in vfs.list(job.output_directory):
            parsed = parse_table_name(name)
            if parsed is not None and parsed[1] == job.job_id:
                vfs.remove(os.path.join(job.output_directory, name))


class _Answer:
    """A posted call: `done(outcome)`."""

    __slots__ = ("_done", "_outcome")

    def __init__(self, done: Done, outcome: Outcome) -> None:
        self._done = done
        self._outcome = outcome

    def __call__(self) -> None:
        self._done(self._outcome)
