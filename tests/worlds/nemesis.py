"""What happens to a cluster under test: killed and frozen processes, broken links; one thing after the other.

Invariant: a fault has ended when its method returns: the process runs, the link is healed. Only links that lost bytes
stay mute: whoever uses them has to find out by himself.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from tests.worlds.proxy import Way
from tests.worlds.wired_cluster import WiredCluster

FAULT_S = (0.1, 0.35)
"""How long a fault lasts."""
PAUSE_MOST_S = 0.1
SLOW_BYTES_PER_S = 200_000
LATE_S = 0.03

KINDS = (
    *("kill", "freeze", "cut", "refuse", "mute", "hold both ways", "hold to", "hold back", "slow", "late"),
    *4 * ("lose answers",),
)
"""Lost answers are the most telling: writes are applied, nobody is told, and others go on writing."""


class Nemesis(threading.Thread):
    """Goes `rounds` times through all KINDS in random order, each on one of `victims`. `counts` says what was done."""

    def __init__(self, world: WiredCluster, victims: Sequence[str], *, rng: random.Random, rounds: int) -> None:
        super().__init__(daemon=True)
        self.counts: Counter[str] = Counter()
        self.surprises: list[BaseException] = []
        self._world = world
        self._victims = victims
        self._rng = rng
        self._rounds = rounds

    def run(self) -> None:
        try:
            for _ in range(self._rounds):
                for kind in self._rng.sample(KINDS, len(KINDS)):
                    self.strike(kind, self._rng.choice(self._victims))
                    time.sleep(self._rng.uniform(0, PAUSE_MOST_S))
        except BaseException as error:
            self.surprises.append(error)
            raise

    def strike(self, kind: str, name: str) -> None:
        """One fault, from its begin to its end."""
        self.counts[kind] += 1
        world, proxy = self._world, self._world.proxies[name]
        if kind == "kill":
            world.kill(name)
            self._last()
            world.restart(name)
            return
        if kind == "freeze":
            world.signal(name, signal.SIGSTOP)
            self._last()
            world.signal(name, signal.SIGCONT)
            return
        faults: dict[str, Callable[[], None]] = {
            "cut": proxy.cut,
            "refuse": proxy.refuse,
            "lose answers": partial(proxy.lose_answers, self._rng.random()),
            "mute": proxy.mute,
            "hold both ways": proxy.hold,
            "hold to": partial(proxy.hold, Way.TO_TARGET),
            "hold back": partial(proxy.hold, Way.BACK),
            "slow": partial(proxy.throttle, SLOW_BYTES_PER_S),
            "late": partial(proxy.delay, LATE_S),
        }
        world.wires.do(faults[kind])
        if kind != "cut":
            self._last()
            world.wires.do(proxy.cut_mute if kind == "lose answers" else proxy.heal)

    def _last(self) -> None:
        time.sleep(self._rng.uniform(*FAULT_S))
