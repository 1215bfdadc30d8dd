"""The generator as a process: a Load as JSON on standard input, its Figures as JSON on standard output."""

from __future__ import annotations

import gc
import signal
import sys

import msgspec

from shardkv.loadgen.generator import generate
from shardkv.loadgen.load import Load

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started this tells of Ctrl-C
    gc.disable()
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    sys.stdout.buffer.write(msgspec.json.encode(generate(load)))
