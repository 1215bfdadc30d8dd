"""`shardkv job`: look at jobs and steer them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shardkv.cli.options import as_json
from shardkv.cli.steering import (
    about,
    exit_code_of,
    follow_job,
    job_line,
    json_option,
    plain,
    size_text,
    table_text,
    watch,
    with_admin,
)

if TYPE_CHECKING:
    from shardkv.admin import Admin, Job


@click.group(short_help="Look at jobs (moves, splits, merges) and steer them.")
def job() -> None:
    """Jobs: what was asked of the cluster, or what it decided, and how far it is.

    planned: nothing is decided yet. running. paused: nothing begins, nothing more is shipped. cancelling: what is under
    way is given up. cancelled, done, failed: it has ended.

    \b
    Example:
      shardkv job list
      shardkv job watch 7
      shardkv job pause 7
    """


@job.command("list")
@json_option
@with_admin
def list_jobs(admin: Admin, *, json_wanted: bool) -> None:
    """List the jobs there are, oldest first.

    \b
    Example:
      shardkv job list
    """
    found = admin.jobs()
    if json_wanted:
        click.echo(as_json({"jobs": plain(found)}))
    elif not found:
        click.echo("There are no jobs.")
    else:
        click.echo(table_text(("job", "kind", "state", "asked", "shards", "size", "problem"), [_row(j) for j in found]))


def _row(job: Job) -> tuple[str, ...]:
    shards = f"{len(job.done) + len(job.skipped)}/{len(job.moves)}" if job.moves else str(len(job.done))
    return (str(job.id), job.kind, job.state, _asked(job), shards, size_text(job.bytes_total), job.problem or "-")


def _asked(job: Job) -> str:
    return " ".join(f"{name}={value}" for name, value in plain(job.asked).items()) or "-"


@job.command()
@click.argument("job_id", metavar="ID", type=int)
@json_option
@with_admin
def show(admin: Admin, job_id: int, *, json_wanted: bool) -> None:
    """Show one job: its plan, what has arrived, what is under way.

    \b
    Example:
      shardkv job show 7
    """
    found = admin.job(job_id)
    click.echo(as_json(plain(found)) if json_wanted else _text(found))


def _text(job: Job) -> str:
    lines = [job_line(job), f"  asked     {_asked(job)}", f"  moved     {size_text(job.bytes_done)} of "]
    lines[-1] += size_text(job.bytes_total)
    if not job.ended and job.eta_s is not None:
        lines.append(f"  left      {about(job.eta_s)}")
    under_way = {change.shard: change for change in job.changes}
    rows = []
    for move in job.moves:
        state = "arrived" if move.shard in job.done else "overtaken" if move.shard in job.skipped else "waits"
        change = under_way.get(move.shard)
        if change is not None:
            state = f"{change.phase}, {size_text(change.bytes_s)}/s"
        rows.append((str(move.shard), move.source, move.target, size_text(move.bytes), state))
    return "\n".join(lines) + (f"\n{table_text(('shard', 'from', 'to', 'size', 'state'), rows)}" if rows else "")


@job.command("watch")
@click.argument("job_id", metavar="ID", type=int)
@click.option("--json", "json_wanted", is_flag=True, help="Print a JSON object a line whenever something is new.")
@with_admin
def watch_job(admin: Admin, job_id: int, *, json_wanted: bool) -> int:
    """Follow a job until it has ended. Exit code 0 when it is done, 1 cancelled, 3 failed.

    \b
    Example:
      shardkv job watch 7
    """
    found = admin.job(job_id)
    if json_wanted:
        for found in admin.watch_job(job_id):
            click.echo(as_json(plain(found)))
        return exit_code_of(found)
    if found.ended:
        click.echo(job_line(found))
        return exit_code_of(found)
    return follow_job(admin, watch(admin, found), no_wait=False, json_wanted=False)


def _steering(name: str, summary: str, ask: str) -> None:
    """Add a command that steers one job."""

    @job.command(name, help=f"{summary}\n\n\b\nExample:\n  shardkv job {name} 7", short_help=summary)
    @click.argument("job_id", metavar="ID", type=int)
    @json_option
    @with_admin
    def steer(admin: Admin, job_id: int, *, json_wanted: bool) -> None:
        found: Job = getattr(admin, ask)(job_id)
        click.echo(as_json(plain(found)) if json_wanted else job_line(found))


_steering("pause", "Begin nothing more of a job, and ship nothing more of what is under way.", "pause_job")
_steering("resume", "Let a paused job go on.", "resume_job")
_steering("cancel", "Give a job up. What has arrived stays where it is.", "cancel_job")
