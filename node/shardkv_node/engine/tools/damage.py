"""`Damage`: one stretch of a file that cannot be used, as all tools report it."""

from __future__ import annotations

from dataclasses import dataclass

from shardkv.errors import Corruption, StorageError


@dataclass(frozen=True, slots=True)
class Damage:
    """Where, what, and, as far as it is known, what is lost with it."""

    path: str
    offset: int
    bytes: int
    """From `offset` on; 0: not known, or the whole file."""
    problem: str
    lost: str = ""

    def __str__(self) -> str:
        size = f", {self.bytes} bytes" if self.bytes else ""
        lost = f" Lost: {self.lost}." if self.lost else ""
        return f"{self.path} at offset {self.offset}{size}: {self.problem}.{lost}"


def damage_of(error: StorageError, path: str, *, size: int = 0, lost: str = "") -> Damage:
    """The damage an error tells of; `path` when the error names none."""
    if isinstance(error, Corruption):
        what = str(error.message).partition(f" in {error.path}")[0]
        return Damage(error.path, error.offset, size, f"{what}: expected {error.expected}, got {error.got}", lost)
    return Damage(path, 0, size, str(error.message).rstrip("."), lost)


def text_of(data: bytes, bytes_max: int = 60) -> str:
    """Bytes for a person, on one line: text as it is, the rest as \\xNN; shortened with its length told."""
    text = data[:bytes_max].decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)
    return shown if len(data) <= bytes_max else f"{shown}... ({len(data)} bytes)"
