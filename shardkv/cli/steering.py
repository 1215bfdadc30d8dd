"""What commands that ask for jobs share: the Admin they ask, plans and jobs shown, a question before data is lost.

Invariant: with --json standard output is one JSON object (or one a line, for `watch`); what else is said goes to
standard error.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

from shardkv.cli.main import NOT_FOUND, UNAVAILABLE
from shardkv.cli.options import DEFAULT_ROUTER, ROUTER_VARIABLE, as_json, counted, printable

if TYPE_CHECKING:
    from shardkv.admin import Admin, Job, Plan

P = ParamSpec("P")
R = TypeVar("R")

MOVES_SHOWN = 20
MB = 1_000_000

rate_option = click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="MB/s", help="Limit for each shard that moves."
)
wait_option = click.option("--no-wait", is_flag=True, help="Return at once; `shardkv job watch` shows the rest.")
json_option = click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def with_admin(command: Callable[Concatenate[Admin, P], R]) -> Callable[..., R]:
    """Adds --router, --data-dir and --timeout; the command gets an Admin as its first argument."""

    @click.option("--router", metavar="HOST:PORT", help=f"The router, or several with commas. [{ROUTER_VARIABLE}]")
    @click.option("--data-dir", metavar="DIR", help="Of a cluster on this machine: its router.")
    @click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds an answer may take.")
    @click.pass_context
    @functools.wraps(command)
    def with_connection(ctx: click.Context, /, *args: Any, **options: Any) -> R:
        from shardkv.admin import Admin

        router, data_dir = options.pop("router"), options.pop("data_dir")
        address = router_address(ctx, router, data_dir)
        with Admin(address, timeout=options.pop("timeout")) as admin:
            return command(admin, *args, **options)

    return with_connection


def router_address(ctx: click.Context, router: str | None, data_dir: str | None) -> str:
    """What was named, before the command or in the environment; else the router of the cluster on this machine."""
    given = router or (None if data_dir else (ctx.find_root().obj or {}).get("router"))
    if given:
        return str(given)
    if data_dir is None and ROUTER_VARIABLE in os.environ:
        return os.environ[ROUTER_VARIABLE]
    from shardkv.launcher.control import address_in

    return address_in(data_dir) or DEFAULT_ROUTER


def bytes_a_second(rate: float | None) -> int:
    """`--rate` as Admin takes it; 0: no limit of its own."""
    return 0 if rate is None else max(1, int(rate * MB))


# Showing


def plain(value: Any) -> Any:
    """What Admin returned as JSON can hold it: maps, lists, text and numbers; tokens as `token_text`."""
    import msgspec

    if isinstance(value, msgspec.Struct):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        if {"start", "stop"} <= fields.keys():
            fields["start"], fields["stop"] = (token_text(fields[name]) for name in ("start", "stop"))
        return {name: plain(field) for name, field in fields.items()}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def token_text(token: int | bytes | None) -> str | None:
    """16 hexadecimal digits of a hash, a key with its odd bytes escaped; None: the end."""
    if token is None:
        return None
    return f"{token:016x}" if isinstance(token, int) else printable(token)


def size_text(size: int | float | None) -> str:
    """Bytes for a person, in decimal units."""
    if size is None:
        return "-"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float | None) -> str:
    """A duration for a person."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def about(seconds: float) -> str:
    """An estimate for a person."""
    return time_text(seconds) if seconds < 1 else f"about {time_text(seconds)}"


def table_text(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    from shardkv.launcher.summary import table

    return "\n".join(table(header, rows))


def show_plan(plan: Plan, *, json_wanted: bool) -> None:
    """Say what would move, and how long that takes."""
    if json_wanted:
        return
    if not plan.moves:
        click.echo("Plan: nothing has to move.")
        return
    click.echo(
        f"Plan: {counted(len(plan.moves), 'shard')} with {size_text(plan.bytes)} to move, in {about(plan.eta_s)}."
    )
    rows = [(str(move.shard), move.source, move.target, size_text(move.bytes)) for move in plan.moves[:MOVES_SHOWN]]
    click.echo(table_text(("shard", "from", "to", "size"), rows))
    if len(plan.moves) > MOVES_SHOWN:
        click.echo(f"  and {len(plan.moves) - MOVES_SHOWN} more")
    loads = [(name, size_text(plan.before[name]), size_text(plan.after.get(name, 0))) for name in sorted(plan.before)]
    loads += [(name, "-", size_text(size)) for name, size in sorted(plan.after.items()) if name not in plan.before]
    click.echo(table_text(("node", "now", "then"), loads))


def job_line(job: Job) -> str:
    """A job in one sentence."""
    over = len(job.done) + len(job.skipped)
    how_far = f", {over} of {counted(len(job.moves), 'shard')}" if job.moves else ""
    told = f"Job {job.id} ({job.kind}) is {job.state}{how_far}."
    return f"{told} {job.problem}".rstrip()


def confirm(question: str, *, yes: bool) -> None:
    """Ask before data is lost. Raises UsageError where nobody can be asked, Abort when the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Say so with --yes.")
    click.confirm(question, abort=True, err=True)


# Following


def follow_job(admin: Admin, job: Job, *, no_wait: bool, json_wanted: bool, **more: Any) -> int:
    """Show a job until it ended (unless `no_wait`), then say how it did; the exit code. `more` goes into the JSON."""
    if not no_wait:
        job = watch(admin, job)
    if json_wanted:
        click.echo(as_json(plain({**more, "job": job})))
    elif no_wait:
        click.echo(f"{job_line(job)} `shardkv job watch {job.id}` shows how it goes.")
    else:
        click.echo(_ending(job))
    return exit_code_of(job)


def watch(admin: Admin, job: Job) -> Job:
    """A live bar on standard error until the job has ended. Ctrl-C ends the watching, not the job."""
    from shardkv.cli.job_bar import JobBar

    with JobBar(job) as bar:
        try:
            for job in admin.watch_job(job.id):  # noqa: B020
                bar.show(job)
        except KeyboardInterrupt as error:
            raise click.Abort() from RuntimeError(
                f"Job {job.id} goes on; `shardkv job cancel {job.id}` would end it: {error}".rstrip(": ")
            )
    return job


def exit_code_of(job: Job) -> int:
    """0 for a job that goes on or is done, 1 for a cancelled one, 3 for one that failed."""
    return {"cancelled": NOT_FOUND, "failed": UNAVAILABLE}.get(job.state, 0)


def _ending(job: Job) -> str:
    took = time_text((job.ended_ms - (job.started_ms or job.created_ms)) / 1000)
    if job.state != "done":
        return job_line(job)
    if job.kind in ("split", "merge"):
        return f"Job {job.id} ({job.kind}) is done after {took}: {_made(job.done)}."
    skipped = f"; {counted(len(job.skipped), 'shard')} went elsewhere meanwhile" if job.skipped else ""
    moved = f"{counted(len(job.done), 'shard')} moved" if job.moves else "nothing had to move"
    return f"Job {job.id} ({job.kind}) is done after {took}: {moved}{skipped}."


def _made(shards: Sequence[int]) -> str:
    return f"{'shard' if len(shards) == 1 else 'shards'} {' and '.join(map(str, shards)) or 'unknown'}"
