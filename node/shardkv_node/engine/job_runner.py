"""`JobRunner`: runs jobs in worker processes, one or two, and reports back to the owner of the store.

Invariants:
  - every submitted job is answered exactly once through `post`, unless `close` came first: after `close` nothing is;
  - a worker that dies costs a retry under a new job id, so the outputs of two attempts never meet; those of the dead
    one are removed;
  - one flush and one other job run at a time, each kind in the order submitted: a flush never waits for a compaction,
    which may take minutes (it has a worker of its own, or the only one lets it overtake).

A worker is started by its first job and ended after a while without one. Each kind of jobs has a daemon thread here,
which does nothing but wait.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from shardkv.errors import ShardKVError, StorageError
from shardkv_node.engine.filenames import parse_table_name
from shardkv_node.engine.job import FlushJob, Job
from shardkv_node.engine.run_job import run
from shardkv_node.engine.vfs import OsVfs, Vfs
from shardkv_node.engine.worker_process import END_WAIT_S, WorkerProcess
from shardkv_node.engine.worker_protocol import Outcome, job_error

ATTEMPTS_MAX = 3
RETRY_PAUSE_S = 0.2
IDLE_S = 10.0
"""A worker without a job for so long is ended: it costs some 15 MB and starts in a tenth of a second."""

Done = Callable[[Outcome], None]
Post = Callable[[Callable[[], None]], None]

WORKER_COMMAND = (sys.executable, "-P", "-m", "shardkv_node.engine.worker")


class JobRunner:
    """`submit` jobs; `done(outcome)` comes back through `post`.

    `workers` = 0 runs each job inside `submit`, on `vfs`. With 1 or 2 `post` is called from another thread, and must
    pass the call on to the owner of the store (an event loop's `call_soon_threadsafe`, a queue). With 2 flushes have a
    worker, and everything else has one.
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
        self._workers = [_Worker(command, self._vfs, retry_pause_s) for _ in range(workers)]
        kinds = {True: 0, False: -1} if workers else {}
        self._lanes = {flushes: _Lane(self._workers[which], post, idle_s) for flushes, which in kinds.items()}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def submit(self, job: Job, done: Done) -> None:
        """Run the job some time; `done` gets its result, or the error when it failed or no worker survived it."""
        if not self._workers:
            outcome = _run_inline(self._vfs, job)
            self._post(lambda: done(outcome))
        elif not self._workers[0].closed.is_set():
            self._lanes[isinstance(job, FlushJob)].put(job, done)

    def close(self) -> None:
        """End the workers, whatever they do, and wait for their end. Safe to call twice; returns within seconds."""
        for worker in self._workers:
            worker.close()
        for lane in self._lanes.values():
            lane.join()


def _run_inline(vfs: Vfs, job: Job) -> Outcome:
    try:
        return run(vfs, job)
    except ShardKVError as error:
        return error
    except Exception as error:  # noqa: BLE001
        return job_error(error)


class _Lane:
    """Jobs that run one after the other, and the thread that sees them through."""

    def __init__(self, worker: _Worker, post: Post, idle_s: float) -> None:
        self._worker = worker
        self._post = post
        self._idle_s = idle_s
        self._jobs: queue.SimpleQueue[tuple[Job, Done] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, job: Job, done: Done) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._feed, name="shardkv-worker-feed", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._post(_Answer(done, job_error(error)))
                return
            self._thread = thread
        self._jobs.put((job, done))

    def join(self) -> None:
        """Requires: the worker is closed."""
        self._jobs.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(END_WAIT_S)

    def _feed(self) -> None:
        while not self._worker.closed.is_set():
            try:
                item = self._jobs.get(timeout=self._idle_s)
            except queue.Empty:
                self._worker.end_if_idle()
                continue
            if item is None:
                return
            job, done = item
            outcome = self._worker.run(job)
            if self._worker.closed.is_set():
                return
            self._post(_Answer(done, outcome))


class _Worker:
    """The worker process there is, if any, and the retries when it dies. Called by the threads of the lanes."""

    def __init__(self, command: tuple[str, ...], vfs: Vfs, retry_pause_s: float) -> None:
        self.closed = threading.Event()
        self._command = command
        self._vfs = vfs
        self._retry_pause_s = retry_pause_s
        self._lock = threading.Lock()
        """Guards `_process`."""
        self._process: WorkerProcess | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None else None

    def close(self) -> None:
        self.closed.set()
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.end()

    def end_if_idle(self) -> None:
        process = self._process
        if process is not None and process.end_if_idle():
            self._forget(process)

    def run(self, job: Job) -> Outcome:
        """The outcome of the job, after up to `ATTEMPTS_MAX` workers died of it. Whatever goes wrong is one."""
        try:
            return self._tried(job)
        except Exception as error:  # noqa: BLE001
            return job_error(error)

    def _tried(self, job: Job) -> Outcome:
        problem = ""
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                if self.closed.wait(self._retry_pause_s):
                    break
                job = msgspec.structs.replace(job, job_id=os.urandom(4).hex())
            found = self._attempt(job)
            if not isinstance(found, str):
                return found
            problem = found
        return StorageError(
            f"A storage job failed {ATTEMPTS_MAX} times: {problem}.",
            detail={"job": type(job).__name__, "attempts": ATTEMPTS_MAX},
            hint="Look at the log for what ended the worker; memory is the usual cause.",
        )

    def _attempt(self, job: Job) -> Outcome | str:
        """The outcome, or what went wrong with the worker; then nothing is left of the attempt."""
        ended = ""
        for _ in range(2):
            try:
                process = self._running()
            except OSError as error:
                return f"could not start a worker ({error})"
            if process is None:
                return "it was closed"
            answer = process.submit(job)
            if answer is not None:
                break
            self._forget(process)  # it died, or was ended because it had nothing to do, before this job: once more
            ended = process.how_it_ended()
        else:
            return f"the worker ended before the job ({ended})"
        outcome = answer.get()
        if outcome is not None:
            return outcome
        problem = f"the worker ended in the middle of the job ({process.how_it_ended()})"
        self._forget(process)
        if not self.closed.is_set():
            _sweep(self._vfs, job)
        return problem

    def _running(self) -> WorkerProcess | None:
        """The process, started if there is none; None after `close`."""
        with self._lock:
            if self.closed.is_set():
                return None
            if self._process is None:
                self._process = WorkerProcess(self._command)
            return self._process

    def _forget(self, process: WorkerProcess) -> None:
        """The process is of no use any more. Only ever one started here; it is gone on return."""
        with self._lock:
            if self._process is process:
                self._process = None
        process.end()


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
