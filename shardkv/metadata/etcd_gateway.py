"""etcd's JSON gateway (etcd 3.4 and newer) at any of several endpoints: one request, one reply, and the watch stream.

Invariants: a request that may be carried out only once is sent to another endpoint only when it certainly reached
none before; otherwise the caller is told OutcomeUnknown. All endpoints are of one etcd cluster.
Numbers come as text and bytes as base64; msgspec reads both. What the requests mean is the caller's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar

import msgspec

from shardkv.errors import (
    ClusterMismatch,
    ConfigError,
    DiskFull,
    InvalidArgument,
    MetadataUnavailable,
    OutcomeUnknown,
    Overloaded,
    ShardKVError,
)
from shardkv.transport.address import Address, format_address

try:
    import aiohttp
except ImportError as error:
    raise ConfigError(
        ["The metadata store is in etcd, and the library that talks to it, aiohttp, is not installed: "
         "pip install 'shardkv[etcd]'."]
    ) from error  # fmt: skip

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
ATTEMPT_TIMEOUT_S = 2.0
"""How long one endpoint may take over something that can be asked of the next one as well."""
ONCE_TIMEOUT_S = 4.0
"""How long an endpoint may take over something that must be carried out only once."""


class Header(msgspec.Struct):
    cluster_id: int = 0
    revision: int = 0


class Reply(msgspec.Struct, kw_only=True):
    header: Header = msgspec.field(default_factory=Header)


class KeyValue(msgspec.Struct):
    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class RangeReply(Reply):
    kvs: list[KeyValue] = []
    more: bool = False


class TxnReply(Reply):
    succeeded: bool = False


class LeaseReply(Reply):
    id: int = msgspec.field(name="ID", default=0)
    ttl: int = msgspec.field(name="TTL", default=0)


class KeptAlive(msgspec.Struct):
    result: LeaseReply


class Event(msgspec.Struct):
    kv: KeyValue
    type: str = "PUT"


class WatchReply(Reply):
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[Event] = []


class WatchLine(msgspec.Struct):
    """One line of a watch stream."""

    result: WatchReply | None = None
    error: Any = None


class _Refusal(msgspec.Struct):
    message: str = ""
    code: int = 0


Kind = TypeVar("Kind", bound=msgspec.Struct)

_INVALID, _NOT_FOUND, _EXHAUSTED = 3, 5, 8
"""gRPC's codes of what was certainly not carried out. Never renumbered."""


class LeaseNotFound(MetadataUnavailable):
    """The lease has ended; nothing was carried out. Does not leave this package."""


class EtcdGateway:
    """Requests to one etcd cluster. Use inside a running event loop."""

    def __init__(self, endpoints: Sequence[Address]) -> None:
        self._urls = [f"http://{format_address(host, port)}" for host, port in endpoints]
        random.shuffle(self._urls)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False, connector=aiohttp.TCPConnector(limit=0))
        self._cluster_id = 0

    async def close(self) -> None:
        await self._http.close()

    @property
    def first(self) -> str:
        """The endpoint that is asked first, the last one that answered."""
        return self._urls[0]

    def pass_over(self, url: str) -> None:
        """Ask `url` last from now on: it does not answer as it should."""
        if self._urls[0] == url:
            self._urls.append(self._urls.pop(0))

    async def ask(self, path: str, body: dict[str, Any], kind: type[Kind], *, only: str = "") -> Kind:
        """The reply to a request that does no harm when it is carried out twice.

        `only`: ask this endpoint. Raises MetadataUnavailable, LeaseNotFound, InvalidArgument, ClusterMismatch.
        """
        problem: ShardKVError = MetadataUnavailable("There is no etcd to ask.")
        for url in [only] if only else list(self._urls):
            try:
                async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                    return await self._post(url, path, body, kind)
            except TimeoutError:
                problem = MetadataUnavailable(f"etcd at {url} did not answer within {ATTEMPT_TIMEOUT_S:g} s.")
            except LeaseNotFound:
                raise
            except (MetadataUnavailable, OutcomeUnknown, Overloaded) as error:
                problem = MetadataUnavailable(error.message)
            self.pass_over(url)
        raise problem

    async def ask_once(self, path: str, body: dict[str, Any], kind: type[Kind]) -> Kind:
        """The reply to a request that must not be carried out twice.

        Raises OutcomeUnknown; and, when it was certainly not carried out, what `ask` raises, DiskFull, Overloaded.
        """
        problem: ShardKVError = MetadataUnavailable("There is no etcd to ask.")
        for url in list(self._urls):
            try:
                async with asyncio.timeout(ONCE_TIMEOUT_S):
                    return await self._post(url, path, body, kind)
            except TimeoutError:
                self.pass_over(url)
                raise OutcomeUnknown(
                    f"etcd at {url} did not answer a transaction within {ONCE_TIMEOUT_S:g} s: "
                    "it may or may not have been applied."
                ) from None
            except LeaseNotFound:
                raise
            except MetadataUnavailable as error:
                problem = error
                self.pass_over(url)
        raise problem

    async def watch(self, body: dict[str, Any], *, url: str) -> AsyncGenerator[WatchReply, None]:
        """The stream of a watch at this endpoint, until it ends. Raises MetadataUnavailable, ClusterMismatch."""
        try:
            async with self._http.post(f"{url}/v3/watch", data=msgspec.json.encode(body)) as response:
                async for line in _lines(response):
                    told = msgspec.json.decode(line, type=WatchLine, strict=False)
                    if told.result is None:
                        raise MetadataUnavailable(f"etcd at {url} ended a watch: {told.error}.")
                    self._check_cluster(told.result.header, url)
                    yield told.result
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MetadataUnavailable(f"The watch of etcd at {url} broke: {_reason(error)}.") from error
        raise MetadataUnavailable(f"etcd at {url} ended a watch.")

    async def _post(self, url: str, path: str, body: dict[str, Any], kind: type[Kind]) -> Kind:
        """Raises MetadataUnavailable (not sent), OutcomeUnknown (sent), or what etcd answered."""
        try:
            async with self._http.post(url + path, data=msgspec.json.encode(body)) as response:
                content = await response.read()
                if response.status != 200:
                    raise _refusal(url, content)
            reply = msgspec.json.decode(content, type=kind, strict=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise MetadataUnavailable(f"etcd at {url} cannot be reached: {_reason(error)}.") from error
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise OutcomeUnknown(f"The answer of etcd at {url} was lost: {_reason(error)}.") from error
        if isinstance(reply, Reply):
            self._check_cluster(reply.header, url)
        return reply

    def _check_cluster(self, header: Header, url: str) -> None:
        """Two etcd clusters number their revisions apart: following first one and then the other would mix them."""
        if self._cluster_id and header.cluster_id != self._cluster_id:
            raise ClusterMismatch(
                f"etcd at {url} is cluster {header.cluster_id:x}, not {self._cluster_id:x} as before.",
                hint="Name the members of one etcd cluster only; start again if it was set up anew.",
            )
        self._cluster_id = header.cluster_id


def _refusal(url: str, content: bytes) -> ShardKVError:
    """What an answer other than 200 means for whoever asked."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        told = msgspec.json.decode(content, type=_Refusal)
        message = f"etcd at {url} says: {told.message.removeprefix('etcdserver: ')}."
        if told.code == _NOT_FOUND:
            return LeaseNotFound(message)
        if told.code == _INVALID:
            return InvalidArgument(message)
        if told.code == _EXHAUSTED and "space" in told.message:
            return DiskFull(message, hint="Compact and defragment etcd, then disarm its alarm.")
        if told.code == _EXHAUSTED:
            return Overloaded(message)
        return OutcomeUnknown(message)
    return OutcomeUnknown(f"etcd at {url} gave an answer that cannot be read.")


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a stream, however long each is."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        *complete, last = chunk.split(b"\n")
        for line in complete:
            yield bytes(rest) + line
            rest.clear()
        rest += last


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "the connection was closed"
    return str(error).rstrip(".") or type(error).__name__
