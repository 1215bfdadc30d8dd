"""`cluster up --detach`: the launcher as a background process that tells its starter how the start went.

Invariant: the starter returns only when the cluster serves or has failed; then nothing ties the two together.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from shardkv.config import Config
from shardkv.errors import LaunchError, ShardKVError, from_wire
from shardkv.launcher.state import Layout
from shardkv.launcher.summary import Started, summary
from shardkv.logs import configure_logging, event

NAME = "launcher"
log = logging.getLogger(__name__)


class _Outcome(msgspec.Struct):
    """What the background process says once: a summary, or the error that it ended with."""

    summary: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""


def run_detached(config: Config, *, config_file: str | None) -> str:
    """Start a launcher in the background; the summary of the cluster once it serves. Raises what it failed with."""
    Layout(config.cluster.data_dir).make()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        os.close(reader)
        _become_launcher(config, config_file, writer)
    os.close(writer)
    with open(reader, "rb") as told:
        data = told.read()
    if not data:
        log_file = Layout(config.cluster.data_dir).log_of(NAME)
        raise LaunchError("The launcher ended before the cluster was up.", hint=f"See {log_file}.")
    outcome = msgspec.msgpack.decode(data, type=_Outcome)
    if outcome.code:
        raise from_wire(outcome.code, outcome.message, {}, outcome.hint)
    return outcome.summary


def _become_launcher(config: Config, config_file: str | None, writer: int) -> NoReturn:
    """The rest of the background process's life."""
    from shardkv.launcher.up import run_cluster

    told = False

    def tell(outcome: _Outcome) -> None:
        nonlocal told
        if not told:
            told = True
            with suppress(BrokenPipeError):
                os.write(writer, msgspec.msgpack.encode(outcome))
            os.close(writer)

    def on_ready(started: Started) -> None:
        log.info(event("cluster_up", address=started.plan.address, seconds=f"{started.seconds:.2f}"))
        tell(_Outcome(summary=summary(started)))

    code = 1
    try:
        os.setsid()
        _leave_the_terminal(config)
        run_cluster(config, config_file=config_file, report=log.warning, on_ready=on_ready)
        code = 0
    except ShardKVError as error:
        log.error(event("launcher_ended", code=error.code, reason=error))
        tell(_Outcome(code=error.code, message=error.message, hint=error.hint))
    except Exception:
        log.exception("launcher_failed")
    finally:
        logging.shutdown()
        os._exit(code)


def _leave_the_terminal(config: Config) -> None:
    """Standard input from nowhere; output into the launcher's log."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    log_file: Path = Layout(config.cluster.data_dir).log_of(NAME)
    configure_logging(NAME, log_file=log_file, **msgspec.structs.asdict(config.logs))
