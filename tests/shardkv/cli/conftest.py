"""A router in this process, and the command line run against it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from shardkv.cli.main import main
from tests.shardkv.client.dict_router import DictRouter


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()


Run = Callable[..., Done]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[DictRouter]:
    with DictRouter() as running:
        monkeypatch.setenv("SHARDKV_ROUTER", running.address)
        yield running


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("get", "k", stdin=b"...")` as a shell would, in this process."""

    def run_command(*arguments: str, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = main(list(arguments))
        except SystemExit as exit_asked:
            code = int(exit_asked.code or 0)
        captured = capfdbinary.readouterr()
        return Done(code, captured.out, captured.err.decode())

    return run_command
