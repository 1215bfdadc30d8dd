"""Moves a tablet from one store to another, step by step, as two nodes would, on one file system."""

from __future__ import annotations

from shardkv_node.engine.memory_dump import decode_slice, encode_slice
from shardkv_node.engine.staging import Staging
from shardkv_node.engine.store import Store
from shardkv_node.engine.tablet_pin import TabletPin
from shardkv_node.engine.tail import decode_tail, encode_tail
from shardkv_node.engine.vfs import Vfs

STAGED, ADOPTED = b"7/ab12", b"7"
"""Labels."""


class Move:
    """`begin_round` once or more, then `step` until there is nothing more, then `fence`, `settle` and `adopt`."""

    def __init__(self, vfs: Vfs, source: Store, tablet: int, target: Store, directory: str) -> None:
        self.vfs = vfs
        self.source = source
        self.tablet = tablet
        self.target = target
        self.directory = directory
        self.pin: TabletPin | None = None
        self.staging: Staging | None = None
        self.shipped: list[str] = []
        """Every file that was shipped, in order."""

    def begin_round(self, *, tail_bytes_max: int = 1 << 20) -> None:
        """Pin, ship what is missing, install."""
        if self.pin is not None:
            self.pin.close()
        self.pin = self.source.pin_tablet(self.tablet, tail_bytes_max=tail_bytes_max)
        self.install()

    def install(self) -> None:
        assert self.pin is not None
        found = self.target.begin_staging(self.directory, self.pin.manifest, before=self.staging)
        index = 0
        while (one := self.pin.dump_slice(index)) is not None:
            for _ in range(2):  # it is told twice
                found.add_slice(decode_slice(encode_slice(one)))
            index += 1
        if not self.vfs.exists(self.directory):
            self.vfs.make_dirs(self.directory)
        for meta in found.absent():
            path = f"{self.directory}/{meta.file_name}"
            if self.vfs.exists(path):
                self.vfs.remove(path)
            self.vfs.copy(self.pin.path(meta.file_name), path)
            self.shipped.append(meta.file_name)
        assert not found.absent()
        found.fetch()
        self.staging = self.target.install_staging(found, STAGED, before=self.staging)

    def step(self, bytes_max: int = 500) -> int:
        """One batch of the tail, which arrives twice; returns how many writes it had."""
        assert self.pin is not None and self.staging is not None
        batch = decode_tail(encode_tail(self.pin.tail.batch(self.staging.applied, bytes_max=bytes_max)))
        for _ in range(2):
            self.target.stage(self.staging, batch)
        return len(batch.writes)

    def settle(self) -> None:
        """Fence, bring over the rest, sync, and compare."""
        self.source.fence_tablet(self.tablet)
        while self.step():
            pass
        told: list[object] = []
        self.target.sync_log(told.append)
        assert told == [None]
        assert self.pin is not None and self.staging is not None
        assert self.pin.tail.added == self.pin.tail.given == self.staging.applied
        assert self.pin.digest.value == self.staging.digest.value and self.pin.seqnos == self.staging.seqnos

    def adopt(self) -> int:
        """The target's own from now on; the source drops it. Returns its number."""
        assert self.pin is not None and self.staging is not None
        self.target.adopt_staging(self.staging.number, ADOPTED)
        self.pin.close()
        self.source.drop_tablet(self.tablet)
        return self.staging.number
