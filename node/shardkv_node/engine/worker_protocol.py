"""What a store and its worker process say to each other over two pipes.

    message  = length u32 LE | body                 the body is msgpack, at most MESSAGE_BYTES_MAX
    request  = one job (job.py): an array, its first element the type of job
    reply    = [1, job_id, tables]                          done: JobResult
             | [2, job_id, code, message, detail, hint]     failed: an error of the tree in shardkv.errors

One reply per request, in any order: a flush overtakes a compaction. The store closes its end to end the worker. Both
ends are of the same release, so there is no version: a worker lives no longer than the process that started it.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import msgspec

from shardkv.errors import ShardKVError, StorageError, from_wire
from shardkv_node.engine.job import Job, JobResult
from shardkv_node.engine.table_meta import TableMeta

MESSAGE_BYTES_MAX = 256 * 1024 * 1024
_LENGTH = struct.Struct("<I")


Outcome = JobResult | ShardKVError


class Done(msgspec.Struct, array_like=True, frozen=True, tag=1):
    job_id: str
    tables: dict[int, list[TableMeta]]


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=2):
    job_id: str
    code: str
    message: str
    detail: dict[str, Any]
    hint: str


_encode = msgspec.msgpack.Encoder().encode
_decode_job: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
_decode_reply: msgspec.msgpack.Decoder[Done | Failed] = msgspec.msgpack.Decoder(Done | Failed)


def encode_job(job: Job) -> bytes:
    return _encode(job)


def decode_job(body: bytes) -> Job:
    return _decode_job.decode(body)


def encode_reply(job_id: str, outcome: JobResult | Exception) -> bytes:
    """An error that is not of the tree becomes a `StorageError` that names its type: a bug in a job."""
    if isinstance(outcome, JobResult):
        return _encode(Done(job_id, outcome.tables))
    if isinstance(outcome, ShardKVError):
        return _encode(Failed(job_id, outcome.code, outcome.message, outcome.detail, outcome.hint))
    failed = job_error(outcome)
    return _encode(Failed(job_id, failed.code, failed.message, failed.detail, failed.hint))


def job_error(error: Exception) -> StorageError:
    """What a job came to that ended with an error nobody expects: one of a bug, or of memory or threads."""
    if isinstance(error, MemoryError):
        return StorageError(
            "A storage job ran out of memory (MemoryError).",
            hint="Free memory on this machine, or open the store with a smaller memtable_bytes_max or block_bytes.",
        )
    return StorageError(f"A storage job failed with {type(error).__name__}: {error}.")


def decode_reply(body: bytes) -> tuple[str, Outcome]:
    """The id of the job and how it ended. Raises `msgspec.MsgspecError` for what is no reply."""
    reply = _decode_reply.decode(body)
    if isinstance(reply, Done):
        return reply.job_id, JobResult(reply.tables)
    return reply.job_id, from_wire(reply.code, reply.message, reply.detail, reply.hint)


def write_message(pipe: BinaryIO, body: bytes) -> None:
    """Raises `OSError` when nobody listens any more."""
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def read_message(pipe: BinaryIO) -> bytes | None:
    """The next body, or None when the other end is gone, in the middle of a message too."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MESSAGE_BYTES_MAX:
        return None
    body = pipe.read(length)
    return body if len(body) == length else None
