"""The worker process: `python -P -m shardkv_node.engine.worker`. Does jobs from stdin, answers on stdout.

It runs niced, holds nothing of the store open between jobs, and ends the moment stdin closes, also in the middle of a
job: when its parent was killed, nobody waits for the result, and a restarted parent must not meet its writes.
What a job left half written is swept when the store is opened.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
from typing import BinaryIO, cast

from shardkv_node.engine.job import CompactionJob, Pause, no_pause
from shardkv_node.engine.run_job import run
from shardkv_node.engine.vfs import OsVfs
from shardkv_node.engine.worker_protocol import decode_job, encode_reply, read_message, write_message

_NICENESS = 5


def main() -> None:
    """Serve jobs until stdin closes."""
    replies = _own_stdout()
    # Ctrl-C in a terminal reaches the whole foreground group: the parent decides what that means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    gc.disable()  # jobs make millions of objects and no cycles: counting references frees them all
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(cast(BinaryIO, sys.stdin.buffer), jobs), daemon=True).start()
    vfs = OsVfs()
    while True:
        body = jobs.get()
        try:
            job = decode_job(body)
            reply = encode_reply(run(vfs, job, pace(job.bytes_per_s) if isinstance(job, CompactionJob) else no_pause))
        except Exception as error:  # noqa: BLE001  every failure of a job is an answer, also that of a bug
            reply = encode_reply(error)
        try:
            write_message(replies, reply)
        except OSError:
            return


def pace(bytes_per_s: int) -> Pause:
    """A pause that keeps a job from writing faster than this; 0: no limit."""
    if not bytes_per_s:
        return no_pause
    started = time.monotonic()

    def pause(written_bytes: int) -> None:
        ahead_s = written_bytes / bytes_per_s - (time.monotonic() - started)
        if ahead_s > 0:
            time.sleep(ahead_s)

    return pause


def _read_jobs(requests: BinaryIO, jobs: queue.SimpleQueue[bytes]) -> None:
    while (body := read_message(requests)) is not None:
        jobs.put(body)
    os._exit(0)


def _own_stdout() -> BinaryIO:
    """The pipe to the parent; what anybody prints goes to stderr instead of into it."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main()
