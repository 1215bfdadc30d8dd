"""The worker process: `python -P -m shardkv_node.engine.worker`. Does jobs from stdin, answers on stdout.

One job at a time, but a flush does not wait for a compaction, which may take minutes: the compaction stands still,
every few hundred KiB, while a flush that came in meanwhile is done. One process for both is half the memory of two,
and leaves the other cores to the store.

It runs niced, holds nothing of the store open between jobs, and ends the moment stdin closes, also in the middle of a
job: when its parent was killed, nobody waits for the result, and a restarted parent must not meet its writes.
What a job left half written is swept when the store is opened.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any, BinaryIO, cast

# msgspec takes what it needs from `typing` where this is not installed; it would bring `inspect`, together 2 MB.
sys.modules.setdefault("typing_extensions", cast(Any, None))

from shardkv_node.engine.job import FlushJob, Job, JobResult  # noqa: E402
from shardkv_node.engine.run_job import run  # noqa: E402
from shardkv_node.engine.vfs import OsVfs  # noqa: E402
from shardkv_node.engine.worker_protocol import decode_job, encode_reply, read_message, write_message  # noqa: E402

_NICENESS = 5


def main() -> None:
    """Serve jobs until stdin closes."""
    replies = _own_stdout()
    # Ctrl-C in a terminal reaches the whole foreground group: the parent decides what that means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    gc.disable()  # jobs make millions of objects and no cycles: counting references frees them all
    gc.freeze()
    inbox = Inbox()
    threading.Thread(target=_read_jobs, args=(cast(BinaryIO, sys.stdin.buffer), inbox), daemon=True).start()
    worker = Worker(inbox, replies)
    while True:
        worker.serve(inbox.get())


class Inbox:
    """The jobs not begun yet. One thread puts, another takes."""

    def __init__(self) -> None:
        self._flushes: deque[FlushJob] = deque()
        self._others: deque[Job] = deque()
        self._arrived = threading.Condition()

    def put(self, job: Job) -> None:
        with self._arrived:
            if isinstance(job, FlushJob):
                self._flushes.append(job)
            else:
                self._others.append(job)
            self._arrived.notify()

    def get(self) -> Job:
        """Wait for a job; flushes come first."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._flushes or self._others)
            return self._flushes.popleft() if self._flushes else self._others.popleft()

    def get_flush(self, wait_s: float) -> FlushJob | None:
        """The next flush, if one is there within so many seconds."""
        if not self._flushes and wait_s <= 0:
            return None
        with self._arrived:
            self._arrived.wait_for(lambda: self._flushes, wait_s)
            return self._flushes.popleft() if self._flushes else None


class Worker:
    """Does jobs and answers them."""

    def __init__(self, inbox: Inbox, replies: BinaryIO) -> None:
        self._inbox = inbox
        self._replies = replies
        self._vfs = OsVfs()

    def serve(self, job: Job) -> None:
        """Do the job and answer; every failure is an answer, also that of a bug."""
        try:
            outcome: JobResult | Exception = self._run(job)
        except Exception as error:  # noqa: BLE001
            outcome = error
        try:
            write_message(self._replies, encode_reply(job.job_id, outcome))
        except OSError:
            os._exit(0)  # nobody listens any more
        del job, outcome
        gc.collect()  # empties the lists of objects kept for reuse, some in each stretch of memory that is to be freed

    def _run(self, job: Job) -> JobResult:
        if isinstance(job, FlushJob):
            return run(self._vfs, job)
        started = time.monotonic()

        def pause(written_bytes: int) -> None:
            """Do the flushes that came in, and keep to the rate of the job."""
            while True:
                due_s = written_bytes / job.bytes_per_s if job.bytes_per_s else 0.0
                flush = self._inbox.get_flush(due_s - (time.monotonic() - started))
                if flush is None:
                    return
                self.serve(flush)

        return run(self._vfs, job, pause)


def _read_jobs(requests: BinaryIO, inbox: Inbox) -> None:
    try:
        while (body := read_message(requests)) is not None:
            inbox.put(decode_job(body))
    except Exception as error:  # noqa: BLE001
        # No job of this release: the program was replaced while its store was open. Nobody may wait for an answer.
        print(f"The storage worker does not understand its store: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _own_stdout() -> BinaryIO:
    """The pipe to the parent; what anybody prints goes to stderr instead of into it."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main()
