"""A program that writes to an engine until it is killed, and says after each acknowledged write what it was.

python -m tests.node.engine.embedded_writer DIRECTORY FIRST
"""

from __future__ import annotations

import sys

from shardkv.write_batch import WriteBatch
from shardkv_node.engine import Engine

KEYS = 500


def operations(number: int) -> list[tuple[bytes, bytes | None]]:
    """What write `number` does: three puts, and every third time a delete."""
    found: list[tuple[bytes, bytes | None]] = [
        (b"key%04d" % ((number * 31 + n * 7) % KEYS), b"%d." % number * 40) for n in range(3)
    ]
    if number % 3 == 0:
        found.append((b"key%04d" % ((number * 17) % KEYS), None))
    return found


def main() -> None:
    directory, first = sys.argv[1], int(sys.argv[2])
    with Engine.open(directory, memtable_bytes_max=64 * 1024, disk_reserve_bytes=0, l0_compaction_trigger=2) as engine:
        number = first
        while True:
            batch = WriteBatch()
            for key, value in operations(number):
                if value is None:
                    batch.delete(key)
                else:
                    batch.put(key, value)
            engine.write(batch)
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
            number += 1


if __name__ == "__main__":
    main()
