"""The data of the engine benchmark: key files made once by the parent, values made on the fly, the same for everyone.

Keys are 16 random bytes: so put order is random, and every absent key lies inside the range of the tables.
Half of a value repeats the other half, so any codec brings it to a little over half its size.
Files hold keys back to back; they are read in small chunks, so that the data is no part of anybody's peak memory.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY_BYTES = 16
CHUNK_KEYS = 1000
OVERWRITE_EVERY = 5
"""Every fifth put overwrites an earlier key: 20 %."""
COLD_STRIDE_BYTES = 24 * 1024
"""Keys of the cold gets lie so far apart that no two of them share a block."""


@dataclass(frozen=True)
class Counts:
    """How much of everything. `keys` distinct ones, and a quarter more puts."""

    keys: int
    reads: int
    seeks: int
    synced: int

    @property
    def puts(self) -> int:
        return self.keys + self.keys // (OVERWRITE_EVERY - 1)


def write_keys(directory: Path, counts: Counts, row_bytes: int, seed: int = 1) -> None:
    """Make the files puts, gets, misses, seeks and cold."""
    directory.mkdir(parents=True)
    rng = random.Random(seed)
    blob = rng.randbytes(KEY_BYTES * counts.keys)

    def key(index: int) -> bytes:
        return blob[KEY_BYTES * index : KEY_BYTES * (index + 1)]

    with (directory / "puts").open("wb") as file:
        new = 0
        while new < counts.keys:
            part = []
            for _ in range(OVERWRITE_EVERY - 1):
                if new < counts.keys:
                    part.append(key(new))
                    new += 1
            part.append(key(rng.randrange(new)))
            file.write(b"".join(part))
    _write(directory / "gets", [key(rng.randrange(counts.keys)) for _ in range(counts.reads)])
    _write(directory / "seeks", [key(rng.randrange(counts.keys)) for _ in range(counts.seeks)])
    _write(directory / "misses", [rng.randbytes(KEY_BYTES) for _ in range(counts.reads)])
    _write(directory / "cold", _far_apart(blob, counts, row_bytes, rng))


def _far_apart(blob: bytes, counts: Counts, row_bytes: int, rng: random.Random) -> list[bytes]:
    """One key out of each of as many equal stretches of the key space as there are strides of data."""
    stretches = max(1, counts.keys * row_bytes // COLD_STRIDE_BYTES)
    found: dict[int, bytes] = {}
    for index in range(counts.keys):
        key = blob[KEY_BYTES * index : KEY_BYTES * (index + 1)]
        found.setdefault(int.from_bytes(key[:4], "big") * stretches >> 32, key)
        if len(found) == stretches:
            break
    keys = list(found.values())
    rng.shuffle(keys)
    return keys[: counts.reads]


def _write(path: Path, keys: list[bytes]) -> None:
    path.write_bytes(b"".join(keys))


def key_chunks(path: Path, keys_max: int | None = None) -> Iterator[tuple[bytes, ...]]:
    """The keys of a file, `CHUNK_KEYS` at a time."""
    left = keys_max if keys_max is not None else path.stat().st_size // KEY_BYTES
    with path.open("rb") as file:
        while left > 0 and (part := file.read(KEY_BYTES * min(left, CHUNK_KEYS))):
            count = len(part) // KEY_BYTES
            left -= count
            yield struct.unpack(f"{KEY_BYTES}s" * count, part)


def values(seed: int, count: int, value_bytes: int) -> list[bytes]:
    """So many values, each compressing to about half."""
    half = value_bytes // 2
    blob = random.Random(seed).randbytes(half * count)
    return [blob[at : at + half] * 2 for at in range(0, half * count, half)]
