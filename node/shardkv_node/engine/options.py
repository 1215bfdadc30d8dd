"""`Options`: everything about an open store that may be chosen. None of it is stored; each open may choose anew.

Sizes are bytes, times milliseconds. The defaults suit a node with a few GB of data beside its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardkv.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB

DURABILITIES = ("always", "interval", "os")
WORKERS_MAX = 2
BYTES_MAX = 1 << 50
"""Of sizes and rates: 1 PiB. Sums and products of them stay inside 64 bits."""
COUNT_MAX = 1 << 20
"""Of tables, memtables and files."""
COMPRESSIONS = ("none", "lz4", "zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a store writes, caches and compacts. Call `validate` before use."""

    durability: str = "always"
    """When a write is acknowledged. always: after the log was synced, so it survives power loss. interval: after the
    log was written, with a sync every `sync_interval_ms`. os: after the log was written; the system syncs when it
    likes. All three survive a kill of the process. Leave it unless the last second of writes may be lost."""
    sync_interval_ms: int = 200
    """With durability "interval": the most a power loss can take."""
    memtable_bytes_max: int = 64 * MIB
    """Memory of the writes not yet handed to a flush, over all tablets. Smaller: more and smaller tables."""
    frozen_memtables_max: int = 2
    """Generations that may wait for their flush before writers are made to wait. Bounds memory; leave it."""
    block_cache_bytes: int = 64 * MIB
    """Decoded blocks and rows kept in memory. Raise it when the working set is larger and memory is free."""
    block_bytes: int = 6 * KIB
    """Size of a data block before compression. Leave it unless values are much larger than 1 KiB."""
    table_bytes_max: int = 32 * MIB
    """A table is closed when it passes this many bytes. Leave it."""
    upper_compression: str = "lz4"
    """Of new tables and the upper levels: none, lz4 or zstd."""
    bottom_compression: str = "zstd"
    """Of the last level, where most data lies."""
    filter_bits_per_key: int = 10
    """0 turns filters off. Leave it unless nothing but existing keys is ever read."""
    l0_compaction_trigger: int = 4
    """Flushed tables of one tablet that start a compaction. Leave it."""
    l0_slow_tables: int = 8
    """Flushed tables of one tablet at which writers are slowed down, more with each further one. Leave it."""
    l0_stall_tables: int = 12
    """Flushed tables of one tablet at which writers wait for compaction. Leave it."""
    level1_bytes_max: int = 64 * MIB
    """Size of the first sorted level; each further one may hold `level_multiplier` times as much. Leave it."""
    level_multiplier: int = 10
    """Growth from level to level. Leave it."""
    compaction_bytes_max: int = 128 * MIB
    """What one compaction reads, about; a larger one is done in parts, each with an end of its own. Leave it."""
    compaction_bytes_per_s: int = 0
    """How fast compactions may write, 0 for no limit. Lower it when they disturb a slow disk; it is not kept to once
    `l0_slow_tables` is reached, nor with `workers` = 0."""
    disk_reserve_bytes: int = 256 * MIB
    """Writes are refused while the disk has less free than this, so that compaction can still run. Tests lower it."""
    scrub_bytes_per_s: int = 1 * MIB
    """Tables are re-read in the background at this rate, once an hour at most, and damage is reported. 0 turns it off.
    The default reads 86 GB a day; raise it when a store is larger than that."""
    workers: int = 1
    """1: flushes and compactions run in a process of their own. 2: in one each, which takes some 12 MB more and makes a
    long load faster where there are cores for it. 0: inside the caller, which waits."""
    key_bytes_max: int = 64 * KIB
    """Longest key."""
    value_bytes_max: int = 16 * MIB
    """Longest value."""
    open_files_max: int = 256
    """Tables kept open for reading. Stay well below the limit of the process."""
    manifest_bytes_max: int = 4 * MIB
    """A manifest that grew past this is written anew. Leave it."""

    @property
    def memory_bytes_max(self) -> int:
        """What an open store holds at most, beside the interpreter and the top indexes of its tables: the memtable that
        fills, those that wait for their flush, and the block cache. A writer may overshoot by its last group.

        The worker of a flush holds about one memtable more while it works, that of a compaction some MiB.
        """
        return (1 + self.frozen_memtables_max) * self.memtable_bytes_max + self.block_cache_bytes

    def validate(self) -> None:
        """Raise `ConfigError` with a sentence for every option that cannot be used."""
        problems = [
            f"{name} = {getattr(self, name)!r}: must be one of {', '.join(words)}."
            for name, words in (
                ("durability", DURABILITIES),
                ("upper_compression", COMPRESSIONS),
                ("bottom_compression", COMPRESSIONS),
            )
            if getattr(self, name) not in words
        ]
        problems += [
            f"{name} = {value!r}: must be a whole number of at least {minimum}."
            for name, minimum in _MINIMUMS.items()
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < minimum
        ]
        problems += [
            f"{name} = {value!r}: must be at most {_MAXIMUMS.get(name, BYTES_MAX)}."
            for name in _MINIMUMS
            if isinstance(value := getattr(self, name), int) and value > _MAXIMUMS.get(name, BYTES_MAX)
        ]
        if not problems and self.l0_stall_tables <= self.l0_compaction_trigger:
            problems.append(
                f"l0_stall_tables = {self.l0_stall_tables}: must be above l0_compaction_trigger "
                f"({self.l0_compaction_trigger}), or writers would wait before compaction starts."
            )
        if problems:
            raise ConfigError(problems, where="the engine options")


_MINIMUMS = {
    "sync_interval_ms": 1,
    "memtable_bytes_max": 1 * KIB,
    "frozen_memtables_max": 1,
    "block_cache_bytes": 0,
    "block_bytes": 128,
    "table_bytes_max": 1 * KIB,
    "filter_bits_per_key": 0,
    "l0_compaction_trigger": 1,
    "l0_slow_tables": 1,
    "l0_stall_tables": 2,
    "level1_bytes_max": 1 * KIB,
    "level_multiplier": 2,
    "compaction_bytes_max": 1 * KIB,
    "compaction_bytes_per_s": 0,
    "disk_reserve_bytes": 0,
    "scrub_bytes_per_s": 0,
    "workers": 0,
    "key_bytes_max": 1,
    "value_bytes_max": 0,
    "open_files_max": 8,
    "manifest_bytes_max": 1 * KIB,
}

_MAXIMUMS = {
    "sync_interval_ms": 60_000,
    "frozen_memtables_max": COUNT_MAX,
    "block_bytes": 64 * MIB,
    "filter_bits_per_key": 64,
    "l0_compaction_trigger": COUNT_MAX,
    "l0_slow_tables": COUNT_MAX,
    "l0_stall_tables": COUNT_MAX,
    "level_multiplier": COUNT_MAX,
    "workers": WORKERS_MAX,
    "key_bytes_max": 512 * MIB,
    "value_bytes_max": 512 * MIB,
    "open_files_max": COUNT_MAX,
}
"""Of the rest: `BYTES_MAX`."""
