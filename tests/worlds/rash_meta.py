"""The `shardkv` program, but its metadata processes all lead at the same time, and no transaction is refused for not
being the leader's. Leading is for economy only: no harm may come of it.

    python -m tests.worlds.rash_meta meta run ...
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from shardkv.cli.main import main
from shardkv.metadata.leading import Leading, Term
from shardkv.wire.messages import MetaCompare


async def _lead_at_once(self: Leading, lead: Callable[[Term], Awaitable[None]]) -> None:
    self.term = Term(0, MetaCompare("nobody/leads", 0), math.inf)
    await lead(self.term)


if __name__ == "__main__":
    Leading.run = _lead_at_once  # type: ignore[method-assign]
    main()
