"""Configuration: every problem at once, options over files, and shipped files that say the truth."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from shardkv.config import Config, defaults, load_config
from shardkv.errors import ConfigError
from shardkv.limits import Limits
from shardkv_node.engine.options import Options
from shardkv_router.options import RouterOptions

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.toml"))


def problems_of(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_nothing_given_is_all_defaults() -> None:
    assert load_config() == Config()
    assert load_config().cluster.nodes == 3


def test_options_win_over_the_file_and_none_is_not_set(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[cluster]\nnodes = 5\nport = 7500\n")
    config = load_config(path, {"cluster.nodes": 1, "cluster.port": None, "engine.memtable_bytes_max": 2048})
    assert (config.cluster.nodes, config.cluster.port, config.engine.memtable_bytes_max) == (1, 7500, 2048)
    assert config.given == {"cluster.nodes", "cluster.port", "engine.memtable_bytes_max"}


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = """
    [cluster]
    nodes = 0
    partitoin = "range"
    port = "7400"
    [enigne]
    workers = 1
    [engine]
    durability = "sometimes"
    [limits]
    key_bytes_max = -1
    """
    assert problems_of(tmp_path, text) == [
        "There is no section [enigne]; the nearest is [engine].",
        "[cluster] nodes = 0: expected a whole number of at least 1 and at most 256.",
        "[cluster] has no key 'partitoin'; the nearest is 'partition'.",
        "[cluster] port = '7400': expected a whole number of at least 0 and at most 65_535.",
        "[engine] durability = 'sometimes': expected one of 'always', 'interval', 'os'.",
        "[limits] key_bytes_max = -1: expected a whole number of at least 1.",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cluster\n", "not valid TOML"),
        ("cluster = 3\n", "cluster is a section"),
        ("[cluster]\nsplit_at = ['a']\n", "partition is 'hash'"),
        ("[cluster]\npartition = 'range'\nshards = 5\nsplit_at = ['a']\n", "split_at makes 2"),
        ("[limits]\nframe_bytes_max = 1000000\n", "frame_bytes_max = 1000000 cannot hold"),
        ("[engine]\nl0_stall_tables = 4\n", "l0_stall_tables = 4 must be above"),
        ("[engine]\nblock_bytes = 9223372036854775807\n", "at most 67_108_864"),
        ("[launcher]\nrestart_first_ms = 20000\n", "restart_first_ms = 20000 is above"),
        ("[cluster]\ninsecure = 1\n", "expected true or false"),
        ("[cluster]\nnodes = true\n", "expected a whole number"),
        ("[router]\nzzz = 1\n", "known are 'park_ms'"),
    ],
)
def test_each_problem_says_what_would_be_right(tmp_path: Path, text: str, said: str) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert said in problem


def test_a_missing_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml:\n  - The file cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.toml")


def test_cuts_decide_the_number_of_shards() -> None:
    config = load_config(options={"cluster.partition": "range", "cluster.split_at": ["m", "", "m", "x"]})
    assert config.cluster.shards == 3


def test_engine_and_router_sections_are_the_options_of_the_programs() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(Options)}
    limits = {field.name for field in dataclasses.fields(Limits)}
    assert defaults()["engine"] == {name: value for name, value in theirs.items() if name not in limits}
    assert defaults()["router"] == {field.name: field.default for field in dataclasses.fields(RouterOptions)}


def documented(path: Path) -> dict[tuple[str, str], Any]:
    """(section, key) -> the default that the comment above the key states."""
    found: dict[tuple[str, str], Any] = {}
    section, comment = "", ""
    for line in path.read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif line.startswith("#"):
            comment += line.removeprefix("#")
            continue
        elif key := re.match(r"(\w+) = ", line):
            stated = re.search(r"Default: (.+)\.$", comment)
            assert stated, f"{path.name}: {key[1]} has no comment that states its default"
            found[section, key[1]] = tomllib.loads(f"default = {stated[1]}")["default"]
        comment = ""
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_and_state_the_real_defaults(name: str) -> None:
    load_config(CONFIGS / name)
    real = defaults()
    stated = documented(CONFIGS / name)
    assert stated == {(section, key): real[section][key] for section, key in stated}
    in_file = tomllib.loads((CONFIGS / name).read_text())
    assert set(stated) == {(section, key) for section, table in in_file.items() for key in table}


def test_the_one_machine_file_holds_every_key_at_its_default() -> None:
    assert tomllib.loads((CONFIGS / "one-machine.toml").read_text()) == defaults()


def test_all_four_purposes_are_shipped() -> None:
    assert SHIPPED == ["durability.toml", "one-machine.toml", "range.toml", "several-machines.toml"]
