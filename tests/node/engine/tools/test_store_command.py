"""`shardkv store` as a person types it: output, bounds, exit codes, and refusals in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from shardkv.errors import InvalidArgument, StoreLocked, UnsupportedFormat
from shardkv_node.store_command import store
from tests.node.engine.tools.stores import Made, copy_of, flip, image, make_store, open_at, rows_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_store(tmp_path_factory.mktemp("command") / "store")


@pytest.fixture
def made(whole: Made, tmp_path: Path) -> Made:
    return copy_of(whole, tmp_path / "store")


def run(*arguments: str | Path) -> int:
    return int(store.main(list(map(str, arguments)), prog_name="shardkv store", standalone_mode=False))


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in store.commands:
        run(name, "--help")
        assert f"Example: shardkv store {name}" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["wal/*.wal", "tables/*.sst", "MANIFEST-*", "CURRENT", "IDENTITY", ""])
def test_inspect_dumps_any_file_for_people_and_as_json(
    whole: Made, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole.files(pattern)[0] if pattern else whole.path
    before = image(whole.path)
    assert run("inspect", path, "--limit", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert run("inspect", path, "--limit", "0", "--json") == 0
    items = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(items) > 0 and all(item["what"] for item in items)
    assert image(whole.path) == before


def test_inspect_shows_rows_writes_and_edits(whole: Made, capsys: pytest.CaptureFixture[str]) -> None:
    def items(path: Path) -> list[dict[str, object]]:
        run("inspect", path, "--limit", "0", "--json")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    rows = [item for path in whole.files("tables/*.sst") for item in items(path) if item["what"] == "row"]
    assert any(item.get("deleted") for item in rows) and any(item.get("value") for item in rows)
    writes = [item for path in whole.files("wal/*.wal") for item in items(path) if item["what"] == "write"]
    assert len(writes) == 2 * 9 and all(str(item["keys"]).startswith("['key") for item in writes)
    edits = items(whole.files("MANIFEST-*")[0])
    assert {"created", "tables", "flushed", "term", "segment"} <= {item["what"] for item in edits}


def test_inspect_is_bounded_and_goes_on_behind_damage(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    table = made.files("tables/*.sst")[0]
    flip(table, 3)
    assert run("inspect", table, "--limit", "5") == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 5 and "there is more" in shown.err
    run("inspect", table, "--limit", "0")
    shown = capsys.readouterr()
    assert "damage: " in shown.out and "row: " in shown.out


def test_verify_says_what_is_wrong_and_exits_with_1(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", made.path) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    table = made.files("tables/*.sst")[0]
    flip(table, 3)
    assert run("verify", made.path) == 1
    assert f"Damaged: {table} at offset 0" in capsys.readouterr().out
    assert run("verify", made.path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert [problem["path"] for problem in report["problems"]] == [str(table)]
    assert run("verify", table) == 1 and run("verify", made.files("wal/*.wal")[0]) == 0


def test_repair_writes_beside_or_replaces_and_leaves_a_whole_store_alone(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("repair", made.path) == 0
    assert "Nothing is wrong" in capsys.readouterr().out and not (tmp_path / "store.repaired").exists()
    table = made.files("tables/*.sst")[0]
    flip(table, 3)
    before = image(made.path)
    assert run("repair", made.path) == 1
    said = capsys.readouterr().out
    assert f"Damaged: {table} at offset 0" in said and f"mv {made.path}.repaired {made.path}" in said
    assert image(made.path) == before
    assert run("repair", made.path, "--to", tmp_path / "other", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["repaired"] == str(tmp_path / "other") and facts["lost"][0]["path"] == str(table)
    (tmp_path / "store.repaired").rename(tmp_path / "first")
    assert run("repair", made.path, "--replace") == 1
    assert image(tmp_path / "store.damaged") == before
    assert rows_of(made.path) == rows_of(tmp_path / "other")
    with pytest.raises(click.UsageError, match="leave out --to"):
        run("repair", made.path, "--replace", "--to", tmp_path / "third")
    with pytest.raises(click.BadParameter, match="not TABLET=LABEL"):
        run("repair", tmp_path / "store.damaged", "--label", "seven")


def test_compact_leaves_one_level_and_all_rows(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compact", made.path) == 0
    assert "bytes before" in capsys.readouterr().out
    assert run("stats", made.path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tombstones"] == 0 and facts["log"]["operations"] == 0
    assert facts["rows"] == sum(map(len, made.rows.values()))
    assert all(len(tablet["levels"]) == 1 for tablet in facts["tablets"])
    assert rows_of(made.path) == made.rows
    assert run("compact", made.path) == 0
    assert rows_of(made.path) == made.rows


def test_stats_counts_levels_rows_and_what_only_the_log_has(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    before = image(made.path)
    assert run("stats", made.path) == 0
    said = capsys.readouterr().out
    assert "tablet 1: label default" in said and "level 0: tables" in said
    run("stats", made.path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["log"]["operations"] == facts["log"]["writes"] == 2 * 9
    assert facts["tombstones"] > 0
    assert facts["bytes"] == sum(path.stat().st_size for path in made.files("tables/*.sst"))
    assert image(made.path) == before


def test_a_nodes_directory_works_and_anything_else_is_refused_with_a_sentence(made: Made, tmp_path: Path) -> None:
    node = tmp_path / "cluster" / "node-1"
    node.mkdir(parents=True)
    made.path.rename(node / "store")
    (node / "node.json").write_text("{}")
    assert run("verify", node) == 0 and run("stats", node) == 0 and run("inspect", node) == 0
    with pytest.raises(InvalidArgument, match="Name one of its nodes: node-1"):
        run("verify", node.parent)
    with pytest.raises(InvalidArgument, match="no file or directory"):
        run("verify", tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match="not a file of a store"):
        run("verify", node / "node.json")


def test_a_store_in_use_is_refused_by_all_that_need_it_still(made: Made) -> None:
    opened = open_at(made.path)
    for name in ("verify", "repair", "compact", "upgrade"):
        with pytest.raises(StoreLocked, match="in use by process"):
            run(name, made.path)
    assert run("inspect", made.path) == 0 and run("stats", made.path) == 0
    opened.close()


def test_upgrade_says_that_there_is_nothing_and_refuses_a_newer_store(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("upgrade", made.path) == 0
    assert "nothing to upgrade" in capsys.readouterr().out
    import google_crc32c

    words = (made.path / "IDENTITY").read_bytes().split()
    checked = b" ".join([words[0], b"2", words[2]])
    (made.path / "IDENTITY").write_bytes(checked + b" %08x\n" % google_crc32c.value(checked))
    for name in ("upgrade", "verify", "repair", "stats"):
        with pytest.raises(UnsupportedFormat, match="format 2; this program knows format 1"):
            run(name, made.path)
