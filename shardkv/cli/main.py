"""The `shardkv` command: finds a command by name and loads its module only when it is called.

Invariant: `shardkv --help` and command lookup import no client, no asyncio and no command. Exit codes: 0 ok,
1 not found or a condition that did not hold, 2 usage or a refused request, 3 unavailable (and any other failure of the
cluster).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module

import click

from shardkv.errors import ConditionFailed, ConfigError, RequestError, ShardKVError

NOT_FOUND, USAGE, UNAVAILABLE, INTERRUPTED = 1, 2, 3, 130
PLUGINS = "shardkv.commands"
"""The entry point group in which programs outside this package offer commands."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command is, and its line in `shardkv --help`. No `home`: an entry point of that name."""

    home: str | None
    summary: str


COMMANDS = {
    "cluster": Entry("shardkv.cli.cluster:cluster", "Start, stop and look at a whole cluster on this machine."),
    "put": Entry("shardkv.cli.data:put", "Store a value under a key."),
    "get": Entry("shardkv.cli.data:get", "Print the value of a key."),
    "delete": Entry("shardkv.cli.data:delete", "Delete a key."),
    "incr": Entry("shardkv.cli.data:incr", "Add to the number stored under a key."),
    "scan": Entry("shardkv.cli.scan:scan", "List keys and values in key order."),
    "count": Entry("shardkv.cli.ranges:count", "Count keys."),
    "delete-range": Entry("shardkv.cli.ranges:delete_range", "Delete all keys of a range."),
    "ping": Entry("shardkv.cli.data:ping", "Measure the round trip to the router."),
    "import": Entry("shardkv.cli.importing:import_command", "Load a JSONL, CSV or TSV file."),
    "export": Entry("shardkv.cli.exporting:export", "Write keys and values to a JSONL file."),
    "shell": Entry("shardkv.cli.shell:shell", "Type commands one after another, with history and completion."),
    "bench": Entry("shardkv.cli.bench:bench", "Measure throughput and latency of a workload."),
    "shard": Entry("shardkv.cli.shards:shard", "List, split, merge and move shards."),
    "keyspace": Entry("shardkv.cli.keyspaces:keyspace", "Make, list and drop keyspaces."),
    "job": Entry("shardkv.cli.jobs:job", "Look at jobs (moves, splits, merges) and steer them."),
    "meta": Entry("shardkv.cli.meta:meta", "Run the metadata process by itself."),
    "node": Entry(None, "Run one storage node by itself."),
    "router": Entry(None, "Run one router by itself."),
    "store": Entry(None, "Look at, verify, repair and compact a store offline."),
}


class LazyGroup(click.Group):
    """A group whose commands are looked up in COMMANDS, and in the entry points for names that are not there."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is not None and entry.home is not None:
            module, _, name = entry.home.partition(":")
            command: click.Command = getattr(import_module(module), name)
            return command
        return _plugin(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            if close := get_close_matches(args[0], COMMANDS, n=1):
                raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


def _plugin(name: str) -> click.Command | None:
    from importlib.metadata import entry_points

    for found in entry_points(group=PLUGINS, name=name):
        command: click.Command = found.load()
        return command
    return None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="shardkv", prog_name="shardkv")
@click.option("--router", metavar="HOST:PORT", help="The router to talk to; several with commas between.")
@click.option("--keyspace", metavar="NAME", help="The keyspace to work in.")
@click.pass_context
def cli(ctx: click.Context, router: str | None, keyspace: str | None) -> None:
    """shardkv: a sharded, ordered, durable key-value cluster.

    The router is --router, else the environment variable SHARDKV_ROUTER, else 127.0.0.1:7400.
    Exit codes: 0 ok, 1 not found or a condition that did not hold, 2 usage, 3 unavailable.

    \b
    Example:
      shardkv cluster up --detach
      shardkv put user:1000 John
      shardkv get user:1000
      shardkv scan --prefix user: --limit 10
    """
    ctx.obj = {"router": router, "keyspace": keyspace}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        result = cli.main(args=arguments, prog_name="shardkv", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return USAGE if isinstance(error, click.UsageError) else error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(f"Interrupted. {error.__cause__ or error}".rstrip(), err=True)
        return INTERRUPTED
    except BrokenPipeError:
        return _output_closed()
    except ShardKVError as error:
        click.echo(f"Error: {error}", err=True)
        return exit_code(error)
    return result if isinstance(result, int) else 0


def exit_code(error: ShardKVError) -> int:
    """The exit code that tells of `error`."""
    if isinstance(error, ConditionFailed):
        return NOT_FOUND
    return USAGE if isinstance(error, RequestError | ConfigError) else UNAVAILABLE


def _output_closed() -> int:
    """Whoever read our output has seen enough (`shardkv scan | head`): not an error, and nothing more to write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
