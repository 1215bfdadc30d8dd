"""The storage engine beside LevelDB, RocksDB, LMDB and SQLite, all called from Python, in one run.

    python -m tests.bench.engine [--quick] [--rounds 3] [--only WORK ...] [--json]

Every contender runs every group of works in a process of its own, in alternation, round after round, so that a busy
machine hurts all alike. Ratios are to the better of LevelDB and RocksDB, medians over the rounds, with their bars.
The peers come with `pip install 'shardkv[bench]'`; one that is not there is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from tests.bench import engine_report as report
from tests.bench.engine_contenders import CONTENDERS, OURS, PEERS, Budget, installed, open_store
from tests.bench.engine_data import KEY_BYTES, Counts, write_keys
from tests.bench.engine_report import ROWS
from tests.bench.engine_works import Spec
from tests.bench.report import machine, machine_lines, note

MIB = 1024 * 1024
SAMPLE_S = 0.1
LARGE_VALUE_SHARE = 4
"""With 1 KiB values there are this many times fewer keys."""
ONLY = {"recover": (OURS, *PEERS), "tail": (OURS, *PEERS), "lag": (OURS,)}
"""Groups that are not for everyone."""
READ_GROUPS = ("warm", "big", "cold")
WARM_CACHE_FACTOR = 3
"""Our cache charges what a decoded row costs in Python, at 100 B nearly twice its bytes; all get as much."""


class PeakSampler(threading.Thread):
    """The largest memory of a process tree, by proportional set size: shared pages count once."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            try:
                tree = [self._process, *self._process.children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(one.memory_full_info().pss for one in tree))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def finish(self) -> int:
        self._over.set()
        self.join()
        return self.peak_bytes


class Bench:
    """One run over one size of values: directories, rounds, figures."""

    def __init__(self, options: argparse.Namespace, value_bytes: int, root: Path) -> None:
        self.options = options
        self.value_bytes = value_bytes
        large = value_bytes > 500
        keys = options.keys // (LARGE_VALUE_SHARE if large else 1)
        self.counts = Counts(keys, min(options.reads, keys), options.reads // 10, options.synced)
        self.root = root / str(value_bytes)
        self.found: report.Found = {}
        self._data: dict[str, str] = {}
        """Of each contender, the store the read works use."""
        write_keys(self.root / "keys", self.counts, self.row_bytes)

    @property
    def row_bytes(self) -> int:
        return KEY_BYTES + self.value_bytes

    def run(self, wanted: set[str]) -> None:
        groups: list[str] = []
        for row in ROWS:
            if row.group not in groups:
                groups.append(row.group)
        if self.options.compacted:
            groups.remove("compact")
            groups.insert(groups.index("warm"), "compact")
        for group in groups:
            rows = [row.name for row in ROWS if row.group == group and row.name in wanted]
            if not rows and not (group == "compact" and self.options.compacted):
                continue
            for number in range(1 if group == "compact" else self.options.rounds):
                for contender in self._order(number, group):
                    note(f"{self.value_bytes} B  round {number + 1}  {group:<8} {contender}")
                    self._run_group(contender, group, rows, number)
        note("")

    def _order(self, number: int, group: str) -> list[str]:
        """The contenders of a round: each goes first in turn."""
        names = [name for name in self.options.contenders if name in ONLY.get(group, CONTENDERS)]
        turn = number % max(1, len(names))
        return names[turn:] + names[:turn]

    def _run_group(self, contender: str, group: str, rows: list[str], number: int) -> None:
        if group == "recover":
            for row in rows:
                self._run_recover(contender, row, number)
            return
        if group in (*READ_GROUPS, "compact"):
            directory = self._data_of(contender)
            self._keep(contender, self._child(contender, group, rows, directory, number))
            return
        directory = str(self.root / f"{contender}-{group}-{number}")
        self._keep(contender, self._child(contender, group, rows, directory, number))
        if group == "batch" and number == 0:
            self._data[contender] = directory
        else:
            for leftover in self.root.glob(f"{contender}-{group}-{number}*"):
                shutil.rmtree(leftover)

    def _run_recover(self, contender: str, row: str, number: int) -> None:
        directory = str(self.root / f"{contender}-{row}-{number}")
        self._child(contender, "log", [row], directory, number)
        self._keep(contender, self._child(contender, "recover", [row], directory, number))
        shutil.rmtree(directory)

    def _data_of(self, contender: str) -> str:
        """The settled store with all rows, made now if no work before left one."""
        if contender not in self._data:
            self._data[contender] = str(self.root / f"{contender}-data")
            self._child(contender, "batch", [], self._data[contender], 0)
        return self._data[contender]

    def _keep(self, contender: str, figures: dict[str, dict[str, float]]) -> None:
        for row, found in figures.items():
            if row == "lag":
                found["longest_ms"] = max(value for name, value in found.items() if name.endswith("_ms"))
            self.found.setdefault((self.value_bytes, row, contender), []).append(found)

    def _child(
        self, contender: str, group: str, rows: list[str], directory: str, number: int
    ) -> dict[str, dict[str, float]]:
        """Run one group in a process of its own. Peak memory is added to every row."""
        raw_bytes = self.counts.keys * self.row_bytes
        cache_bytes = {"warm": WARM_CACHE_FACTOR * raw_bytes, "cold": WARM_CACHE_FACTOR * raw_bytes}
        spec = Spec(
            contender=contender,
            group=group,
            rows=rows,
            keys=str(self.root / "keys"),
            directory=directory,
            value_bytes=self.value_bytes,
            memtable_bytes=int(self.options.memtable_mib * MIB),
            cache_bytes=cache_bytes.get(group, raw_bytes // 4),
            codec=self.options.codec,
            key_count=self.counts.keys,
            synced=self.counts.synced,
            log_bytes=self.options.log_mb * 1_000_000,
            seed=number + 1,
        )
        command = [sys.executable, "-m", "tests.bench.engine_works", json.dumps(asdict(spec))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            sampler = PeakSampler(child.pid)
            sampler.start()
            output = child.communicate()[0]
            peak_bytes = sampler.finish()
        if group == "log" and child.returncode == -signal.SIGKILL:
            return {}
        if child.returncode != 0:
            raise SystemExit(f"{contender} failed in {group} with exit code {child.returncode}.")
        found: dict[str, dict[str, float]] = json.loads(output.splitlines()[-1])
        for figures in found.values():
            figures["peak_bytes"] = peak_bytes
        return {row: figures for row, figures in found.items() if row in rows}


PROOF = """
import os, sys
from shardkv_node.engine import Engine
engine = Engine.open(sys.argv[1], durability=sys.argv[2])
wal = os.path.join(sys.argv[1], "wal")
def logged():
    return b"".join(open(entry.path, "rb").read().rstrip(bytes(1)) for entry in os.scandir(wal))
for number in range(int(sys.argv[3])):
    before = len(logged())
    engine.put(b"key-%d" % number, b"value-%d" % number)
    assert b"value-%d" % number in logged()[before:], "put returned before write() did"
engine.put(b"last", b"put")
os.kill(os.getpid(), 9)
"""


def prove_writes(root: Path, puts: int = 200) -> Iterator[str]:
    """Kill ours right after a put returned, and see that every put is there."""
    for durability in ("always", "interval", "os"):
        directory = str(root / f"proof-{durability}")
        command = [sys.executable, "-c", PROOF, directory, durability, str(puts)]
        code = subprocess.run(command, check=False).returncode
        if code != -signal.SIGKILL:
            raise SystemExit(f"The proof that write() comes before the answer failed: exit code {code}.")
        store = open_store(OURS, directory, Budget(memtable_bytes=MIB, cache_bytes=MIB))
        lost = [n for n in range(puts) if store.get(b"key-%d" % n) != b"value-%d" % n]
        last = store.get(b"last")
        store.close()
        if lost or last != b"put":
            raise SystemExit(f"With durability {durability} acknowledged puts were lost at kill -9: {lost}, {last!r}.")
        yield f"proof: durability={durability}: kill -9 right after put returned, all {puts + 1} puts are there"


def versions(names: Sequence[str], root: Path) -> dict[str, str]:
    found = {}
    for name in names:
        store = open_store(name, str(root / f"version-{name}"), Budget(memtable_bytes=MIB, cache_bytes=MIB))
        found[name] = store.version
        store.close()
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute: few keys, one round")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--keys", type=int, help=f"with 100 B values; 1/{LARGE_VALUE_SHARE} of it with 1 KiB")
    parser.add_argument("--reads", type=int, help="gets per work; a tenth of it seeks")
    parser.add_argument("--synced", type=int, help="synced puts one by one; 8 times as many by 64 writers")
    parser.add_argument("--log-mb", type=int, help="rows in the log that is recovered")
    parser.add_argument("--values", type=int, nargs="+", help="bytes of a value; default 100 1024")
    parser.add_argument("--memtable-mib", type=float, help="of one memtable; there are two")
    parser.add_argument("--codec", choices=("lz4", "none"), default="lz4", help="LevelDB: snappy for lz4")
    parser.add_argument("--compacted", action="store_true", help="reads on fully compacted data, not as it settled")
    parser.add_argument("--only", nargs="+", metavar="WORK", choices=[row.name for row in ROWS])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--directory", help="where the stores are made; default: the directory for temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quick = {"rounds": 1, "keys": 50_000, "reads": 10_000, "synced": 250, "log_mb": 5, "values": [100]}
    full = {"rounds": 3, "keys": 1_000_000, "reads": 100_000, "synced": 2_000, "log_mb": 200, "values": [100, 1024]}
    # Small data in quick runs gets small memtables, so that there is something to flush and compact.
    quick["memtable_mib"], full["memtable_mib"] = 2, 16
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse_arguments()
    facts = machine()
    absent = [name for name in options.contenders if not installed(name)]
    options.contenders = [name for name in options.contenders if name not in absent]
    wanted = set(options.only or [row.name for row in ROWS])
    settings = [
        f"{options.keys:,} keys of {KEY_BYTES} B (1/{LARGE_VALUE_SHARE} of it with 1 KiB values) in random order, "
        f"20 % of all puts overwrite; {options.rounds} rounds; two memtables of {options.memtable_mib:g} MiB; "
        f"codec {options.codec}; reads on {'compacted' if options.compacted else 'settled'} data",
    ]
    settings += [f"{name} is not installed and left out: pip install 'shardkv[bench]'" for name in absent]
    with tempfile.TemporaryDirectory(prefix="shardkv-bench-", dir=options.directory) as name:
        root = Path(name)
        os.makedirs(root, exist_ok=True)
        settings += prove_writes(root)
        known = versions(options.contenders, root)
        benches = [Bench(options, value_bytes, root) for value_bytes in options.values]
        for bench in benches:
            bench.run(wanted)
    if options.json:
        _print_json(facts, known, settings, benches)
        return
    for line in machine_lines(facts, known, settings):
        print(line)
    for bench in benches:
        for table in (report.main_table, report.cost_table, report.memory_table, report.details):
            print()
            for line in table(bench.found, bench.value_bytes):
                print(line)


def _print_json(
    facts: dict[str, object], known: dict[str, str], settings: Sequence[str], benches: Sequence[Bench]
) -> None:
    rows = []
    for bench in benches:
        for row in ROWS:
            rounds = report.ratios(bench.found, bench.value_bytes, row)
            figures = {
                name: bench.found[bench.value_bytes, row.name, name]
                for name in CONTENDERS
                if (bench.value_bytes, row.name, name) in bench.found
            }
            if figures:
                rows.append(
                    {"value_bytes": bench.value_bytes, "work": row.name, "bar": row.bar, "ratios": rounds} | figures
                )
    print(json.dumps({"machine": facts, "versions": known, "settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
