"""Runs a load in a process of its own, so that neither the caller's work nor its memory shows in the figures."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from shardkv.loadgen.load import Figures, Load


def run_load(load: Load) -> Figures:
    """What came of the load. The process is gone when this returns, or raises."""
    command = [sys.executable, "-P", "-m", "shardkv.loadgen"]
    done = subprocess.run(command, input=msgspec.json.encode(load), stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        return Figures(problem=f"The generator failed with exit code {done.returncode}.")
    return msgspec.json.decode(done.stdout, type=Figures)
