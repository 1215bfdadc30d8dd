"""What all data commands share: the options that say where to connect, opening a client, keys and values as typed.

Invariant: an option given to a command wins over the same option given before it, that one over the environment.
"""

from __future__ import annotations

import base64
import functools
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from shardkv.client.sync import Client

ROUTER_VARIABLE = "SHARDKV_ROUTER"
DEFAULT_ROUTER = "127.0.0.1:7400"
DEFAULT_KEYSPACE = "default"

P = ParamSpec("P")
R = TypeVar("R")


class Target:
    """The keyspace and routers a command works on."""

    def __init__(self, router: str, keyspace: str, timeout_s: float) -> None:
        self.router = router
        self.keyspace = keyspace
        self.timeout_s = timeout_s

    def client(self) -> Client[bytes]:
        """A client for it; connects when first used."""
        from shardkv.client.sync import Client

        return Client(self.router, keyspace=self.keyspace, timeout=self.timeout_s)


def with_target(command: Callable[Concatenate[Target, P], R]) -> Callable[..., R]:
    """Adds --router, --keyspace and --timeout; the command gets a Target as its first argument."""

    @click.option("--router", metavar="HOST:PORT", help=f"The router, or several with commas. [{ROUTER_VARIABLE}]")
    @click.option("--keyspace", metavar="NAME", help=f"The keyspace. [default: {DEFAULT_KEYSPACE}]")
    @click.option("--timeout", type=float, default=5.0, show_default=True, help="Seconds a request may take.")
    @click.pass_context
    @functools.wraps(command)
    def with_connection(ctx: click.Context, /, *args: Any, **options: Any) -> R:
        given = ctx.find_root().obj or {}
        router = options.pop("router") or given.get("router") or os.environ.get(ROUTER_VARIABLE) or DEFAULT_ROUTER
        keyspace = options.pop("keyspace") or given.get("keyspace") or DEFAULT_KEYSPACE
        return command(Target(router, keyspace, options.pop("timeout")), *args, **options)

    return with_connection


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A key or value argument: the bytes that were typed, valid text or not."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        return value if isinstance(value, bytes) else os.fsencode(value)


BYTES = Bytes()


def as_json(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def as_fields(key: bytes, value: bytes | None) -> dict[str, Any]:
    """A key, and its value if given, as fields of a JSON object; what is not text as base64 under another name."""
    return _field("key", key) | ({} if value is None else _field("value", value))


def _field(name: str, value: bytes) -> dict[str, str]:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(value).decode()}


def counted(number: int, what: str) -> str:
    """A number with its noun: "1 row", "20,000 rows"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def printable(value: bytes) -> str:
    """Text for a person: on one line, what cannot be printed escaped as in Python."""
    text = value.decode(errors="backslashreplace")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
