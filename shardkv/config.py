"""Configuration: a TOML file and command-line options over it, as typed sections.

    [cluster]   what `shardkv cluster up` and `shardkv meta run` make
    [metadata]  where `shardkv meta run` keeps what it knows
    [engine]    a node's storage engine
    [node]      the node program
    [router]    the router program
    [limits]    what the wire accepts (limits.py)
    [launcher]  watching and restarting
    [logs]      the log file of each process

Every key has a default here; the files in `configs/` say what each is for. Sizes are bytes, times milliseconds,
and the unit is the last word of a key's name.

Invariant: a Config that exists is valid. Every problem of a file is reported at once, each with its place.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from shardkv.errors import ConfigError
from shardkv.limits import KIB, MIB, Limits

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Tables = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Bytes = Annotated[int, msgspec.Meta(ge=KIB, le=1 << 50)]
BytesOrNone = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Compression = Literal["none", "lz4", "zstd"]
Duration = Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]


class ClusterSection(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster on this machine consists of. Partition and shards are fixed when it is made."""

    nodes: Annotated[int, msgspec.Meta(ge=1, le=256)] = 3
    routers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    partition: Literal["hash", "range"] = "hash"
    shards: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 16
    split_at: list[str] = []
    data_dir: Annotated[str, msgspec.Meta(min_length=1)] = "shardkv-data"
    bind: Annotated[str, msgspec.Meta(min_length=1)] = "127.0.0.1"
    port: Port = 7400
    advertise: str = ""
    insecure: bool = False


class MetadataSection(msgspec.Struct, frozen=True, kw_only=True):
    """Where the metadata process keeps what it knows (`shardkv.metadata.stores` says how that is written)."""

    store: Annotated[str, msgspec.Meta(min_length=1)] = "embedded"
    lease_ms: Annotated[int, msgspec.Meta(ge=2_000, le=600_000)] = 5_000


class EngineSection(msgspec.Struct, frozen=True, kw_only=True):
    """A node's storage engine; passed to it by name (`shardkv_node.engine.options` says what each is for)."""

    durability: Literal["always", "interval", "os"] = "always"
    sync_interval_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 200
    memtable_bytes_max: Bytes = 64 * MIB
    frozen_memtables_max: Tables = 2
    block_cache_bytes: BytesOrNone = 64 * MIB
    block_bytes: Annotated[int, msgspec.Meta(ge=128, le=64 * MIB)] = 6 * KIB
    table_bytes_max: Bytes = 32 * MIB
    upper_compression: Compression = "lz4"
    bottom_compression: Compression = "zstd"
    filter_bits_per_key: Annotated[int, msgspec.Meta(ge=0, le=64)] = 10
    l0_compaction_trigger: Tables = 4
    l0_slow_tables: Tables = 8
    l0_stall_tables: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)] = 12
    level1_bytes_max: Bytes = 64 * MIB
    level_multiplier: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)] = 10
    compaction_bytes_max: Bytes = 128 * MIB
    compaction_bytes_per_s: BytesOrNone = 0
    disk_reserve_bytes: BytesOrNone = 256 * MIB
    scrub_bytes_per_s: BytesOrNone = 1 * MIB
    workers: Annotated[int, msgspec.Meta(ge=0, le=2)] = 1
    open_files_max: Annotated[int, msgspec.Meta(ge=8, le=1 << 20)] = 256
    manifest_bytes_max: Bytes = 4 * MIB


class NodeSection(msgspec.Struct, frozen=True, kw_only=True):
    """The node program."""

    fence_abort_ms: Annotated[int, msgspec.Meta(ge=100, le=600_000)] = 2_000


class RouterSection(msgspec.Struct, frozen=True, kw_only=True):
    """The router program."""

    park_ms: Duration = 10_000
    parked_bytes_max: BytesOrNone = 64 * MIB
    page_bytes_max: Bytes = MIB


class LauncherSection(msgspec.Struct, frozen=True, kw_only=True):
    """How `shardkv cluster up` watches its processes."""

    ready_timeout_ms: Duration = 30_000
    stop_grace_ms: Duration = 10_000
    restart_first_ms: Annotated[int, msgspec.Meta(ge=1, le=60_000)] = 100
    restart_most_ms: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 10_000
    crash_loop_starts: Count = 5
    crash_loop_window_ms: Duration = 60_000


class LogsSection(msgspec.Struct, frozen=True, kw_only=True):
    """The log file of each process."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    bytes_max: Annotated[int, msgspec.Meta(ge=4 * KIB, le=1 << 50)] = 8 * MIB
    files_kept: Annotated[int, msgspec.Meta(ge=0, le=1_000)] = 3


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All sections. `given` names the keys that were set ("cluster.port"), as against left at their defaults."""

    cluster: ClusterSection = ClusterSection()
    metadata: MetadataSection = MetadataSection()
    engine: EngineSection = EngineSection()
    node: NodeSection = NodeSection()
    router: RouterSection = RouterSection()
    limits: Limits = Limits()
    launcher: LauncherSection = LauncherSection()
    logs: LogsSection = LogsSection()
    given: frozenset[str] = frozenset()


SECTIONS: dict[str, type[Any]] = {
    "cluster": ClusterSection,
    "metadata": MetadataSection,
    "engine": EngineSection,
    "node": NodeSection,
    "router": RouterSection,
    "limits": Limits,
    "launcher": LauncherSection,
    "logs": LogsSection,
}


def load_config(path: str | Path | None = None, options: Mapping[str, object] | None = None) -> Config:
    """The configuration of file `path` with `options` over it.

    `options` maps "section.key" to a value; a value of None is not set. Raises ConfigError with all problems.
    """
    problems: list[str] = []
    tables = _read_tables(Path(path), problems) if path is not None else {}
    for name, value in (options or {}).items():
        if value is not None:
            section, _, key = name.partition(".")
            tables.setdefault(section, {})[key] = value
    sections = {name: _section(name, kind, tables.get(name, {}), problems) for name, kind in SECTIONS.items()}
    given = frozenset(f"{name}.{key}" for name, table in tables.items() for key in table)
    config = Config(**sections, given=given)
    if not problems:
        problems += _contradictions(config)
    if problems:
        raise ConfigError(problems, where=str(path) if path is not None else "the options")
    return _with_counted_shards(config)


def defaults() -> dict[str, dict[str, Any]]:
    """Every section's keys and their default values."""
    return {name: {field.name: field.default for field in _fields(kind)} for name, kind in SECTIONS.items()}


# Reading


def _read_tables(path: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    import tomllib

    try:
        document = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError([f"The file cannot be read: {error.strerror}."], where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(["The file is not UTF-8 text."], where=str(path)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"The file is not valid TOML: {error}."], where=str(path)) from error
    tables = {}
    for name, table in document.items():
        if name not in SECTIONS:
            problems.append(f"There is no section [{name}]{_nearest(name, SECTIONS, '[{}]')}.")
        elif not isinstance(table, dict):
            problems.append(f"{name} is a section: write [{name}] and its keys below.")
        else:
            tables[name] = table
    return tables


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    type: Any
    default: Any


def _fields(kind: type[Any]) -> list[_Field]:
    if kind is Limits:
        return [_Field(field.name, Count, field.default) for field in dataclasses.fields(Limits)]
    return [_Field(field.name, field.type, _default(field)) for field in msgspec.structs.fields(kind)]


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default is msgspec.NODEFAULT and callable(field.default_factory):
        return field.default_factory()
    return field.default


def _section(name: str, kind: type[Any], table: Mapping[str, Any], problems: list[str]) -> Any:
    """A section from its table; with problems, the values in question stay at their defaults."""
    fields = {field.name: field for field in _fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            problems.append(f"[{name}] has no key {key!r}{_nearest(key, fields)}.")
            continue
        try:
            values[key] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            problems.append(f"[{name}] {key} = {value!r}: {_wanted(fields[key].type, error)}.")
    return kind(**values)


def _nearest(wrong: str, known: Iterable[str], form: str = "{!r}") -> str:
    """`; did you mean ...?` without its end, or the known names when none is near."""
    import difflib

    known = list(known)
    near = difflib.get_close_matches(wrong, known, n=1)
    if near:
        return f"; the nearest is {form.format(near[0])}"
    return f"; known are {', '.join(form.format(name) for name in known)}"


_WORDS = {"`int`": "a whole number", "`str`": "text", "`bool`": "true or false", "`array`": "a list"}


def _wanted(kind: Any, error: msgspec.ValidationError) -> str:
    """What would be right, in words."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        return f"expected one of {', '.join(repr(choice) for choice in choices)}"
    if typing.get_origin(kind) is Annotated:
        base, meta = typing.get_args(kind)
        bounds = [f"at least {meta.ge:_}"] if meta.ge is not None else []
        bounds += [f"at most {meta.le:_}"] if meta.le is not None else []
        if base is int:
            return f"expected a whole number of {' and '.join(bounds)}"
        return "expected text that is not empty"
    reason = str(error)
    for word, words in _WORDS.items():
        reason = reason.replace(word, words)
    return reason[0].lower() + reason[1:]


# Across keys


def _contradictions(config: Config) -> list[str]:
    cluster, engine, limits, launcher = config.cluster, config.engine, config.limits, config.launcher
    cuts = len(set(cluster.split_at) - {""})
    smallest_frame = limits.key_bytes_max + limits.value_bytes_max + KIB
    rules = [
        (
            cuts and cluster.partition == "hash",
            "[cluster] split_at cuts a range-partitioned cluster, and partition is 'hash'.",
        ),
        (
            cuts and "cluster.shards" in config.given and cluster.shards != cuts + 1,
            f"[cluster] shards = {cluster.shards}, but split_at makes {cuts + 1}; leave one of them out.",
        ),
        (
            limits.frame_bytes_max < smallest_frame,
            f"[limits] frame_bytes_max = {limits.frame_bytes_max} cannot hold the longest key and value; "
            f"at least {smallest_frame} is needed.",
        ),
        (
            engine.l0_stall_tables <= engine.l0_compaction_trigger,
            f"[engine] l0_stall_tables = {engine.l0_stall_tables} must be above l0_compaction_trigger = "
            f"{engine.l0_compaction_trigger}, or writers would wait before compaction starts.",
        ),
        (
            launcher.restart_first_ms > launcher.restart_most_ms,
            f"[launcher] restart_first_ms = {launcher.restart_first_ms} is above restart_most_ms = "
            f"{launcher.restart_most_ms}.",
        ),
    ]
    return [sentence for broken, sentence in rules if broken]


def _with_counted_shards(config: Config) -> Config:
    cuts = len(set(config.cluster.split_at) - {""})
    if not cuts:
        return config
    return msgspec.structs.replace(config, cluster=msgspec.structs.replace(config.cluster, shards=cuts + 1))
