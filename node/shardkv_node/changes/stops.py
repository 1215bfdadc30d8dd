"""Named steps at which a test has the process die, or stop, by its own hand: `SHARDKV_STOP_AT=<step>[:STOP]`.

Without `:STOP` the process kills itself (SIGKILL) the first time it comes to the step; with it, it stops (SIGSTOP) and
goes on when it is told to. Nobody but tests sets this.

    source.begin      the round is pinned, the target not told
    source.fencing    the fence is not on disk yet
    source.fenced     the fence is on disk, the target not told
    source.drop       before the shard's tablet is dropped
    source.unfence    before the fence is forgotten
    target.ship       the round has begun
    target.staged     the staging is installed
    target.tail       a batch of the tail is applied
    target.fence      before the fence is asked for
    target.commit     all is here and synced, the commit not sent
    target.committed  the commit was applied, nothing was done about it yet
    target.adopt      before the staging is adopted
    target.serve      adopted, not served
    owner.staged      the stagings of a split or merge are made
    owner.fencing, owner.fenced, owner.commit, owner.committed     as above
    owner.adopt       before a child is adopted
    owner.drop        before a parent's tablet is dropped
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SHARDKV_STOP_AT"

_reached: set[str] = set()


def reached(step: str) -> None:
    """This process is at `step`."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None or step in _reached:
        return
    name, _, how = wanted.partition(":")
    if name == step:
        _reached.add(step)
        os.kill(os.getpid(), signal.SIGSTOP if how == "STOP" else signal.SIGKILL)
