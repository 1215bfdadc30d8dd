"""What people and scripts may ask of the cluster as a whole: a verb and its arguments in, a map out.

A verb is an async function from (store, arguments) to a reply; `AdminVerbs.add` registers one. Everything a verb
changes it changes by transactions on the store, so that it does not matter which metadata process is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from shardkv.errors import UnknownOperation
from shardkv.metadata.store import MetaStore
from shardkv.wire.messages import MetaEntry

Verb = Callable[[MetaStore, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Raises any ShardKVError; it reaches whoever asked."""


class AdminVerbs:
    """The registry of one metadata process."""

    def __init__(self, store: MetaStore) -> None:
        self._store = store
        self._verbs: dict[str, Verb] = {"topology": topology}

    def add(self, name: str, verb: Verb) -> None:
        """Register a verb. Requires: there is none of that name."""
        assert name not in self._verbs, name
        self._verbs[name] = verb

    async def carry_out(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The reply to `asked`, a map with a `verb`. Raises UnknownOperation, and what the verb raises."""
        verb = self._verbs.get(asked["verb"])
        if verb is None:
            known = ", ".join(sorted(self._verbs))
            raise UnknownOperation(f"There is no admin verb {asked['verb']!r}; known verbs: {known}.")
        return await verb(self._store, {key: value for key, value in asked.items() if key != "verb"})


async def topology(store: MetaStore, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every document there is, in a map for each family; those that stand alone under `single`."""
    everything = await store.read("")
    families: dict[str, Any] = {"revision": everything.revision}
    for entry in everything.entries:
        family, slash, name = entry.key.partition("/")
        families.setdefault(family if slash else "single", {})[name or family] = _document(entry)
    return families


def _document(entry: MetaEntry) -> dict[str, Any]:
    """As a map without a declared shape, so that fields of later versions are told as well."""
    document: dict[str, Any] = msgspec.msgpack.decode(entry.value or b"\x80")
    return document
