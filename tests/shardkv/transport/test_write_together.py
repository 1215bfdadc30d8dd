"""Writes that wait one behind the other are begun in one go where nothing stands in the way, and else one by one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from shardkv.errors import DeadlineExceeded, Draining, OutcomeUnknown
from shardkv.limits import Limits
from shardkv.transport import server as server_module
from shardkv.transport.admission import Load
from shardkv.transport.lone import reply_to_all
from shardkv.transport.server import SINGLY, TOGETHER_BYTES, TOGETHER_MAX, Connection, Server
from shardkv.wire.messages import NOTHING, OK, Op, RawReply, Reply, Request, decode_any, raw, reply_error
from tests.shardkv.transport.test_read_together import Talk
from tests.shardkv.transport.test_server import HELLO, SERVER, Echo

pytestmark = pytest.mark.usefixtures("in_no_hurry")


@pytest.fixture
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way is left while the machine is slow."""
    monkeypatch.setattr(server_module, "QUICK_S", 60.0)


class Together(Echo):
    """WRITE gives its payload back, those begun in one go when `answer` is called. None is begun so with "no" in it."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []
        """How many writes were begun in each go."""
        self._begun: list[tuple[list[Connection], list[Request]]] = []

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if request.op == Op.WRITE:
            connection.reply(request.id, request.payload)
        else:
            super().on_request(connection, request, deadline)

    def write_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> bool:
        assert len(requests) == len(deadlines)
        if "no" in [decode_any(request.payload) for request in requests]:
            return False
        self.runs.append(len(requests))
        self._begun.append((list(askers), list(requests)))
        return True

    def answer(self) -> None:
        begun, self._begun = self._begun, []
        for askers, requests in begun:
            reply_to_all(askers, [Reply(one.id, OK, one.payload) for one in requests])


class Answering(Together):
    """Answers by itself, soon after."""

    def write_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> bool:
        asyncio.get_running_loop().call_soon(self.answer)
        return super().write_together(askers, requests, deadlines)


@contextlib.asynccontextmanager
async def talk(service: Together, limits: Limits | None = None) -> AsyncIterator[Talk]:
    server = Server(service, me=lambda: SERVER, limits=limits or Limits(), write_together=service.write_together)
    port = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        talking = Talk(server, service, reader, writer)  # type: ignore[arg-type]
        await talking.ask(HELLO)
        yield talking
    finally:
        writer.close()
        await server.drain(grace_s=0)


def writes(*values: str, deadline_ms: int | None = None) -> list[Request]:
    return [Request(number, Op.WRITE, 0, None, None, deadline_ms, raw(value)) for number, value in enumerate(values, 1)]


def told(replies: Sequence[RawReply]) -> dict[int, object]:
    return {
        reply.id: decode_any(reply.payload) if reply.status == OK else reply_error(reply.payload) for reply in replies
    }


def numbered(count: int) -> list[str]:
    return [str(number) for number in range(1, count + 1)]


@pytest.mark.parametrize("in_flight", [10, 4096])
def test_many_writes_are_begun_in_few_goes_and_never_more_than_may_be_open(in_flight: int) -> None:
    async def main() -> None:
        service = Answering()
        async with talk(service, Limits(requests_in_flight_max=in_flight)) as peer:
            values = numbered(3 * TOGETHER_MAX + 5)
            replies = await peer.ask(*writes(*values, deadline_ms=60_000))
            assert told(replies) == {int(value): value for value in values}
            assert max(service.runs) <= min(in_flight, TOGETHER_MAX)
            (connection,) = peer.server.connections
            assert connection.load() == Load(0, 0, 0)

    asyncio.run(main())


def test_what_is_not_begun_together_is_handed_over_and_so_are_some_after_it() -> None:
    async def main() -> None:
        service = Answering()
        async with talk(service) as peer:
            values = ["a", "b", "no", *numbered(SINGLY + 9)]
            assert told(await peer.ask(*writes(*values))) == dict(enumerate(values, 1))
            assert sum(service.runs) <= len(values) - SINGLY

    asyncio.run(main())


def test_large_writes_are_not_copied_to_be_begun_together() -> None:
    async def main() -> None:
        service = Answering()
        async with talk(service) as peer:
            values = [letter * TOGETHER_BYTES for letter in "abc"]
            assert told(await peer.ask(*writes(*values))) == dict(enumerate(values, 1))
            assert service.runs == []

    asyncio.run(main())


def test_a_write_whose_time_is_over_fails_among_others() -> None:
    async def main() -> None:
        async with talk(Answering()) as peer:
            late = Request(99, Op.WRITE, 0, None, None, 0, raw("late"))
            replies = told(await peer.ask(*writes("a", "b"), late))
            assert isinstance(replies.pop(99), DeadlineExceeded)
            assert replies == {1: "a", 2: "b"}

    asyncio.run(main())


def test_those_not_answered_by_their_deadline_are_unknown_and_late_answers_go_nowhere() -> None:
    async def main() -> None:
        service = Together()
        async with talk(service) as peer:
            replies = told(await peer.ask(*writes("a", "b", deadline_ms=50)))
            assert service.runs == [2]
            assert {type(reply) for reply in replies.values()} == {OutcomeUnknown}
            service.answer()
            ping = Request(9, Op.PING, 0, None, None, None, NOTHING)
            assert set(told(await peer.ask(ping))) == {9}

    asyncio.run(main())


def test_an_id_is_free_again_once_it_is_answered_and_not_before() -> None:
    async def main() -> None:
        service = Together()
        async with talk(service) as peer:
            await peer.ask(*writes("a", "b"), replies=0)
            (refusal,) = await peer.ask(*writes("c", "d"), replies=1)
            assert service.runs == [2]
            assert "1 is used twice" in reply_error(refusal.payload).message

    asyncio.run(main())


def test_a_server_that_drains_begins_nothing_together() -> None:
    async def main() -> None:
        service = Answering()
        async with talk(service) as peer:
            peer.server.draining = True
            replies = told(await peer.ask(*writes("a", "b", "c")))
            assert {type(reply) for reply in replies.values()} == {Draining}
            assert service.runs == []

    asyncio.run(main())
