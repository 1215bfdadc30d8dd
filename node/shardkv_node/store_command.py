"""`shardkv store`: look at, check, salvage and compact a store while no process has it open."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from shardkv_node.engine.tools.verify import VerifyReport

DAMAGED = 1
"""Exit code when something is wrong with the store, or was lost by a repair."""


@click.group(epilog="Example: shardkv store verify shardkv-data/node-1")
def store() -> None:
    """The files of a store, offline: look, verify, repair, compact.

    PATH is a node's data directory, its store directory, or the directory of an embedded engine; inspect and verify
    take one file too.
    """


@store.command(epilog="Example: shardkv store inspect shardkv-data/node-1/store/wal/000001.wal --limit 20")
@click.argument("path", type=click.Path())
@click.option("--limit", default=100, show_default=True, type=click.IntRange(0), help="Items to print; 0: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def inspect(path: str, limit: int, as_json: bool) -> int:
    """Print what a log segment, table, manifest or whole store holds."""
    from shardkv_node.engine.tools.dump import dump
    from shardkv_node.engine.tools.places import find_target
    from shardkv_node.engine.vfs import OsVfs

    vfs = OsVfs()
    items = dump(vfs, *find_target(path, vfs))
    for item in islice(items, limit or None):
        click.echo(_json(item) if as_json else _line(item))
    if limit and next(items, None) is not None:
        click.echo(f"... there is more; --limit {limit} was reached.", err=True)
    return 0


@store.command(epilog="Example: shardkv store verify shardkv-data/node-1")
@click.argument("path", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def verify(path: str, as_json: bool) -> int:
    """Check every checksum of every file. Exit code 1 when something is wrong, each problem named with its place."""
    from shardkv_node.engine.tools.places import Kind, find_target, offline
    from shardkv_node.engine.tools.verify import verify_file, verify_store
    from shardkv_node.engine.vfs import OsVfs

    vfs = OsVfs()
    kind, found = find_target(path, vfs)
    if kind is Kind.STORE:
        with offline(vfs, found), _bytes_bar(_bytes_below(found), "Verifying") as progress:
            report = verify_store(vfs, found, progress)
    else:
        report = verify_file(vfs, kind, found)
    _show_verified(found, report, as_json=as_json)
    return DAMAGED if report.problems else 0


@store.command(epilog="Example: shardkv store repair shardkv-data/node-1 --replace")
@click.argument("path", type=click.Path())
@click.option("--to", metavar="DIR", help="Where to write the repaired store.  [default: beside it, .repaired]")
@click.option("--replace", is_flag=True, help="Put it in the place of the damaged one, which is kept as .damaged.")
@click.option("--label", "labels", multiple=True, metavar="TABLET=LABEL", help="For a lost label; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def repair(path: str, to: str | None, replace: bool, labels: tuple[str, ...], as_json: bool) -> int:
    """Write a consistent store with everything that can be read, and say what could not be saved.

    The damaged store is never changed and nothing of it is deleted. Exit code 1 when something was lost.
    """
    from shardkv_node.engine.tools.places import find_store, offline
    from shardkv_node.engine.tools.repair import put_in_place, repair_store
    from shardkv_node.engine.tools.verify import verify_store
    from shardkv_node.engine.vfs import OsVfs

    if replace and to:
        raise click.UsageError("--replace puts the repaired store in the place of the damaged one; leave out --to.")
    vfs = OsVfs()
    found = find_store(path).rstrip("/")
    with offline(vfs, found):
        if not verify_store(vfs, found).problems:
            click.echo(_json({"store": found, "damaged": False}) if as_json else f"Nothing is wrong with {found}.")
            return 0
        with _bytes_bar(_bytes_below(found), "Saving") as progress:
            report = repair_store(vfs, found, to or f"{found}.repaired", labels=_labels(labels), progress=progress)
        kept = put_in_place(vfs, found, report.target) if replace else None
    facts = {
        "store": found,
        "damaged": True,
        "repaired": found if kept else report.target,
        "kept": kept or found,
        "rows": report.rows,
        "lost": [_facts(loss) for loss in report.losses],
        "warnings": report.warnings,
    }
    if as_json:
        click.echo(_json(facts))
    else:
        for loss in report.losses:
            click.echo(f"Damaged: {loss}")
        for warning in report.warnings:
            click.echo(f"Note: {warning}")
        click.echo(f"Saved {sum(report.rows.values())} rows in {len(report.rows)} tablets: {facts['repaired']}")
        click.echo(f"The damaged store is kept: {facts['kept']}")
        if not kept:
            click.echo(f"To use the repaired one: mv {found} {found}.damaged && mv {report.target} {found}")
    return DAMAGED if report.losses else 0


@store.command(epilog="Example: shardkv store compact shardkv-data/node-1")
@click.argument("path", type=click.Path())
def compact(path: str) -> int:
    """Merge all tables of every tablet into one level, which frees what overwritten and deleted rows hold."""
    from shardkv_node.engine.tools.compact import compact_store
    from shardkv_node.engine.tools.places import find_store
    from shardkv_node.engine.vfs import OsVfs

    found = find_store(path)
    shown = 0
    with _bytes_bar(_bytes_below(found), "Compacting") as progress:

        def look(written: int, whole: int) -> None:
            nonlocal shown
            progress(max(0, min(written, whole) - shown))
            shown = max(shown, min(written, whole))

        report = compact_store(OsVfs(), found, look)
    click.echo(
        f"{found}: {report.bytes_before:,} bytes before, {report.bytes_after:,} after; "
        f"{report.compactions} compactions."
    )
    return 0


@store.command(epilog="Example: shardkv store stats shardkv-data/node-1 --json")
@click.argument("path", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The facts as one JSON object.")
def stats(path: str, as_json: bool) -> int:
    """Sizes, levels, rows and tombstones, from the manifest and the log; no table is read."""
    from shardkv_node.engine.tools.places import find_store
    from shardkv_node.engine.tools.stats import store_stats
    from shardkv_node.engine.vfs import OsVfs

    facts = store_stats(OsVfs(), find_store(path))
    if as_json:
        click.echo(_json(facts))
        return 0
    log = facts.pop("log")
    tablets = facts.pop("tablets")
    for name, value in facts.items():
        click.echo(f"{name:15} {value:,}" if isinstance(value, int) else f"{name:15} {value}")
    click.echo("log             " + _pairs(log))
    for tablet in tablets:
        levels = tablet.pop("levels")
        click.echo(f"tablet {tablet.pop('tablet')}: {_pairs(tablet)}")
        for level in levels:
            click.echo(f"  level {level.pop('level')}: {_pairs(level)}")
    return 0


@store.command(epilog="Example: shardkv store upgrade shardkv-data/node-1")
@click.argument("path", type=click.Path())
def upgrade(path: str) -> int:
    """Bring a store of an older format to the newest one this program knows."""
    from shardkv_node.engine.identity import STORE_FORMAT, read_identity
    from shardkv_node.engine.tools.places import find_store, offline
    from shardkv_node.engine.vfs import OsVfs

    vfs = OsVfs()
    found = find_store(path)
    with offline(vfs, found):
        read_identity(vfs, found)  # refuses any other format, and says so
    click.echo(f"{found} has format {STORE_FORMAT}, the only one there has been: there is nothing to upgrade.")
    return 0


def _show_verified(path: str, report: VerifyReport, *, as_json: bool) -> None:
    if as_json:
        problems = [_facts(problem) for problem in report.problems]
        facts = {"path": path, "files": report.files, "bytes": report.bytes, "problems": problems}
        click.echo(_json({**facts, "notes": report.notes}))
        return
    for note in report.notes:
        click.echo(f"Note: {note}")
    for problem in report.problems:
        click.echo(f"Damaged: {problem}")
    count = len(report.problems)
    outcome = "nothing is wrong" if not count else "1 problem" if count == 1 else f"{count} problems"
    click.echo(f"{path}: {report.files} files, {report.bytes:,} bytes, {outcome}.")


def _labels(given: tuple[str, ...]) -> dict[int, bytes]:
    found = {}
    for text in given:
        number, equals, label = text.partition("=")
        if not equals or not number.isdigit():
            raise click.BadParameter(f"{text!r} is not TABLET=LABEL, for example 3=7.", param_hint="--label")
        found[int(number)] = label.encode()
    return found


@contextmanager
def _bytes_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on standard error for a person at a terminal; nothing for a pipe."""
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    with click.progressbar(length=max(total, 1), label=what, file=sys.stderr) as bar:
        yield bar.update


def _bytes_below(directory: str) -> int:
    import os

    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(directory) for name in names)


def _facts(problem: Any) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("path", "offset", "bytes", "problem", "lost")}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _line(item: dict[str, Any]) -> str:
    inside = "" if item["what"] in ("header", "table", "file", "damage", "torn tail") else "  "
    deep = "  " if item["what"] == "row" else ""
    return f"{inside}{deep}{item['what']}: {_pairs({name: v for name, v in item.items() if name != 'what'})}"


def _pairs(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_json(v) if isinstance(v, list | dict) else v}" for name, v in facts.items())
