"""What the docs promise of a damaged store: refused by name or harmless, named by verify, and saved by repair."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardkv import Corruption
from shardkv_node.engine import Engine

ROWS = 600


def store_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardkv", "store", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store closed in order: a table of each third of the rows but the last, which is in the log."""
    directory = tmp_path_factory.mktemp("healthy") / "store"
    with Engine.open(directory, workers=0, scrub_bytes_per_s=0) as engine:
        for number in range(ROWS):
            engine.put(b"key:%03d" % number, b"value %d" % number)
            if number in (ROWS // 3, 2 * ROWS // 3):
                engine.flush()
    return directory


def files_of(store: Path, pattern: str) -> list[Path]:
    return sorted(path for path in store.glob(pattern) if path.is_file())


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("pattern", ["wal/*.wal", "tables/*.sst", "MANIFEST-*", "CURRENT", "IDENTITY"])
def test_a_flipped_bit_is_refused_with_its_file_or_is_harmless(healthy: Path, tmp_path: Path, pattern: str) -> None:
    chance = random.Random(pattern)
    refused = 0
    for attempt in range(15):
        damaged = tmp_path / str(attempt)
        shutil.copytree(healthy, damaged)
        victim = chance.choice(files_of(damaged, pattern))
        flip(victim, chance.randrange(victim.stat().st_size))
        try:
            with Engine.open(damaged, workers=0, scrub_bytes_per_s=0) as engine:
                assert engine.count() == ROWS
                for number in range(ROWS):
                    assert engine.get(b"key:%03d" % number) == b"value %d" % number
        except Corruption as error:
            refused += 1
            assert str(victim) in str(error)
            assert "offset" in str(error)
    assert refused > 0


def test_verify_names_the_file_and_repair_leaves_the_damaged_store_as_it_is(healthy: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(healthy, tmp_path / "store")
    table = files_of(damaged, "tables/*.sst")[0]
    flip(table, 20)
    (damaged / "LOCK").unlink()
    before = {path: path.read_bytes() for path in files_of(damaged, "**/*")}
    verified = store_command("verify", damaged)
    assert verified.returncode == 1
    assert table.name in verified.stdout
    repaired = store_command("repair", damaged, "--to", tmp_path / "repaired")
    assert repaired.returncode == 1
    (damaged / "LOCK").unlink()
    assert {path: path.read_bytes() for path in files_of(damaged, "**/*")} == before
    with Engine.open(tmp_path / "repaired") as engine:
        assert ROWS // 2 < engine.count() < ROWS


def test_repair_saves_the_tables_that_a_cut_manifest_does_not_name(healthy: Path, tmp_path: Path) -> None:
    (manifest,) = files_of(healthy, "MANIFEST-*")
    size = manifest.stat().st_size
    refused = 0
    for cut in sorted({size // 2, *range(size - 1, 0, -150)}):
        damaged = shutil.copytree(healthy, tmp_path / f"{cut}")
        os.truncate(damaged / manifest.name, cut)
        repaired = store_command("repair", damaged, "--to", tmp_path / f"{cut}.repaired")
        try:
            with Engine.open(damaged, workers=0, scrub_bytes_per_s=0) as engine:  # nothing had acted on what is gone
                assert engine.count() == ROWS
            assert repaired.returncode == 0
        except Corruption as error:
            refused += 1
            assert manifest.name in str(error)
            assert repaired.returncode == 1
            assert "deleted" in repaired.stdout + repaired.stderr
            with Engine.open(tmp_path / f"{cut}.repaired", workers=0, scrub_bytes_per_s=0) as engine:
                assert engine.count() == ROWS
    assert refused > 0


@pytest.mark.parametrize("durability", ["always", "interval", "os"])
def test_a_log_cut_short_after_the_store_was_closed_is_refused_and_named(tmp_path: Path, durability: str) -> None:
    with Engine.open(tmp_path / "store", workers=0, scrub_bytes_per_s=0, durability=durability) as engine:
        for number in range(5):
            engine.put(b"key:%03d" % number, b"value %d" % number)
    log = files_of(tmp_path / "store", "wal/*.wal")[-1]
    size = log.stat().st_size
    for cut in range(0, size, 29):
        damaged = shutil.copytree(tmp_path / "store", tmp_path / f"{cut}")
        os.truncate(damaged / "wal" / log.name, cut)
        with pytest.raises(Corruption, match=log.name):
            Engine.open(damaged, workers=0, scrub_bytes_per_s=0)
    verified = store_command("verify", damaged)
    assert verified.returncode == 1
    assert log.name in verified.stdout and "never known to be on disk" not in verified.stdout
    assert store_command("repair", damaged, "--to", tmp_path / "repaired").returncode == 1
    (damaged / "wal" / log.name).unlink()
    with pytest.raises(Corruption, match=rf"A log segment is missing in \S+{log.name}"):
        Engine.open(damaged, workers=0, scrub_bytes_per_s=0)


def test_a_store_whose_manifest_was_cut_off_names_the_manifest(healthy: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(healthy, tmp_path / "store")
    (manifest,) = files_of(damaged, "MANIFEST-*")
    os.truncate(manifest, manifest.stat().st_size // 2)
    with pytest.raises(Corruption, match=rf"manifest ends too early in \S+{manifest.name} at offset \d+"):
        Engine.open(damaged, workers=0, scrub_bytes_per_s=0)
    verified = store_command("verify", damaged)
    assert verified.returncode == 1
    assert f"{manifest.name} at offset" in verified.stdout and "ends too early" in verified.stdout
