"""`python -m shardkv` is the `shardkv` command."""

from __future__ import annotations

import sys

from shardkv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
