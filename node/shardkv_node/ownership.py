"""Which shards this node answers for, at which epoch, and which tablet of its store holds each.

Invariant: `tablet_of` answers only for a shard that is served (what is, `shardkv.control.duties` decides), at exactly
the epoch asked for; anything else is refused, so a request can never read or write what moved away.
Requests are counted here, per shard: one list item is all that costs.

A shard is *expected* from when this node sends the transaction that makes it its own until it serves it: who heard of
that transaction first asks too early by some milliseconds, and is told so by `Expected`, to be kept waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shardkv.errors import ShardFenced, ShardKVError, ShardUnavailable, StaleEpoch, WrongShard

_EPOCH, _TABLET, _ASKED = range(3)


class Expected(ShardFenced):
    """The shard will be served here in a moment, or it will be known that it is not."""


class Ownership:
    """Told what to serve; asked once per request."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._served: dict[int, list[int]] = {}
        """Shard -> epoch, tablet, requested keys so far."""
        self._fenced: dict[int, int] = {}
        """Shard -> the epoch of its fence."""
        self._unserved: dict[int, str] = {}
        """Owned and not served: why, as a sentence."""
        self._lost: dict[int, str] = {}
        """Owned and not served, and not soon: why."""
        self._expected: dict[int, str] = {}
        """Shard -> the change that brings it."""
        self.on_settled: Callable[[], None] = lambda: None
        """Called when shards that were expected are served, or are not expected any more."""
        self.revision = 0
        """Of the topology that was carried out."""

    @property
    def shards(self) -> dict[int, int]:
        """Shard id -> epoch of what is served."""
        return {shard: served[_EPOCH] for shard, served in self._served.items()}

    # Being told

    def serve(self, shard: int, epoch: int, tablet: int) -> None:
        """Answer for a shard from now on, at this epoch only."""
        known = self._served.get(shard)
        self._served[shard] = [epoch, tablet, known[_ASKED] if known else 0]
        self._forget(shard)

    def stop(self, shard: int) -> None:
        """Answer nothing for a shard any more."""
        self._served.pop(shard, None)
        self._forget(shard)

    def _forget(self, shard: int) -> None:
        for reasons in (self._unserved, self._lost):
            reasons.pop(shard, None)
        self._fenced.pop(shard, None)

    def fence(self, shard: int, epoch: int) -> None:
        """Answer nothing for a shard that is fenced at this epoch, but say that it is so."""
        self._served.pop(shard, None)
        self._fenced[shard] = epoch

    def refuse(self, shard: int, why: str) -> None:
        """Answer nothing for a shard that this node owns and will serve soon."""
        self.stop(shard)
        self._unserved[shard] = why

    def lose(self, shard: int, why: str) -> None:
        """Answer nothing for a shard that this node owns and cannot serve."""
        self.stop(shard)
        self._lost[shard] = why

    def expect(self, shards: Iterable[int], change: str) -> None:
        """These will be served as soon as the transaction of a change is known to be applied."""
        self._expected.update(dict.fromkeys(shards, change))

    def settle(self, under_way: Iterable[str]) -> None:
        """Expect no more than what these changes bring."""
        known = len(self._expected)
        going = set(under_way)
        self._expected = {shard: change for shard, change in self._expected.items() if change in going}
        if len(self._expected) < known:
            self.on_settled()

    def epoch_of(self, shard: int) -> int | None:
        """At which epoch a shard is served; None: it is not."""
        served = self._served.get(shard)
        return None if served is None else served[_EPOCH]

    # Being asked

    def tablet_of(self, shard: int | None, epoch: int | None) -> int:
        """The tablet of a shard at an epoch. Raises WrongShard, StaleEpoch, ShardFenced, ShardUnavailable."""
        served = self._served.get(shard) if shard is not None else None
        if served is None or served[_EPOCH] != epoch:
            raise self._refusal(shard, epoch)
        served[_ASKED] += 1
        return served[_TABLET]

    def tablets_of(self, shards: Sequence[tuple[int, int]]) -> list[int]:
        """The tablets of several (shard, epoch) pairs. Raises as `tablet_of`, for the first that is refused."""
        return [self.tablet_of(shard, epoch) for shard, epoch in shards]

    def require_settled(self, shards: Iterable[tuple[int, int, int]]) -> None:
        """Raises Expected when one of these (shard, epoch, count) is expected and not served yet."""
        if self._expected:
            for shard, epoch, _ in shards:
                if shard in self._expected and shard not in self._served:
                    raise self._refusal(shard, epoch)

    def count_more(self, shard: int, keys: int) -> None:
        """The request that was asked for last is of so many keys more than one."""
        served = self._served.get(shard)
        if served is not None:
            served[_ASKED] += keys

    def asked(self) -> dict[int, tuple[int, int]]:
        """For each shard that is served its tablet, and how many keys were read or written so far."""
        return {shard: (served[_TABLET], served[_ASKED]) for shard, served in self._served.items()}

    def _refusal(self, shard: int | None, epoch: int | None) -> ShardKVError:
        detail = {"shard": shard, "node": self._node}
        if shard in self._served:
            held = self._served[shard][_EPOCH]
            return StaleEpoch(
                f"Shard {shard} is at epoch {held} on node {self._node}, the request names {epoch}.",
                detail={**detail, "epoch": held},
            )
        if shard in self._expected:
            return Expected(f"Shard {shard} is about to be served by node {self._node}.", detail=detail)
        if shard in self._fenced:
            return ShardFenced(
                f"Shard {shard} is about to leave node {self._node}, or to be divided or merged there.",
                detail={**detail, "epoch": self._fenced[shard]},
            )
        if shard in self._unserved:
            return ShardFenced(self._unserved[shard], detail=detail)
        if shard in self._lost:
            return ShardUnavailable(self._lost[shard], detail=detail)
        return WrongShard(f"Node {self._node} does not own shard {shard}.", detail=detail)
