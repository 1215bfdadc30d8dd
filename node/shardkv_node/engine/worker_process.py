"""`WorkerProcess`: a running worker as its parent sees it. Several jobs may be with it at once, from several threads.

It is a fresh Python (`subprocess`, never a fork): it inherits no descriptor, so no lock, and it ends by itself when
this process dies, because its stdin closes.

Invariant: every job given to `submit` is answered exactly once: with its outcome, or with None when the worker ended
before that.
"""

from __future__ import annotations

import queue
import subprocess
import threading
from contextlib import suppress
from typing import BinaryIO, cast

import msgspec

from shardkv_node.engine.job import Job
from shardkv_node.engine.worker_protocol import Outcome, decode_reply, encode_job, read_message, write_message

END_WAIT_S = 2.0

Answer = queue.SimpleQueue[Outcome | None]


class WorkerProcess:
    """Safe to use from any thread. Raises `OSError` when the command cannot be started, `RuntimeError` when no thread
    can."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True, start_new_session=True
        )
        self._requests = cast(BinaryIO, self._process.stdin)
        self._replies = cast(BinaryIO, self._process.stdout)
        self._lock = threading.Lock()
        """Guards `_ended` and `_waiting`."""
        self._ended = False
        self._waiting: dict[str, Answer] = {}
        self._writing = threading.Lock()
        self._ending = threading.Lock()
        try:
            threading.Thread(target=self._read_replies, name="shardkv-worker-replies", daemon=True).start()
        except RuntimeError:
            self.end()
            self._replies.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, job: Job) -> Answer | None:
        """Give it the job; the answer will come in the queue. None: it had ended before, and knows nothing of it.

        Raises what `encode_job` does for a job that no message can hold; then no answer comes.
        """
        body = encode_job(job)
        answer: Answer = queue.SimpleQueue()
        with self._lock:
            if self._ended:
                return None
            self._waiting[job.job_id] = answer
        with suppress(OSError, ValueError), self._writing:  # it is gone, or being ended: the reader answers then
            write_message(self._requests, body)
        return answer

    def end(self) -> None:
        """Close its stdin, which ends it; kill it when it does not go. It is gone on return."""
        with self._lock:
            self._ended = True
        with self._ending:
            with suppress(OSError):  # it may be gone already, and with it what was buffered for it
                self._requests.close()
            try:
                self._process.wait(END_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def end_if_idle(self) -> bool:
        """End it unless it has a job; returns whether it ended."""
        with self._lock:
            self._ended = self._ended or not self._waiting
        if self._ended:
            self.end()
        return self._ended

    def how_it_ended(self) -> str:
        """In words, for whoever got None. Waits for the end."""
        try:
            code = self._process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _read_replies(self) -> None:
        with suppress(msgspec.MsgspecError), self._replies:  # what is no reply ends the talk
            while (body := read_message(self._replies)) is not None:
                job_id, outcome = decode_reply(body)
                with self._lock:
                    answer = self._waiting.pop(job_id, None)
                if answer is not None:
                    answer.put(outcome)
        with self._lock:
            self._ended = True
            unanswered = list(self._waiting.values())
            self._waiting.clear()
        for answer in unanswered:
            answer.put(None)
