"""The picker: right levels, right tables, and levels that stay disjoint whatever it is fed."""

from __future__ import annotations

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv_node.engine.compaction_picker import CompactionTask, PickerOptions, check_levels, pick, pick_all
from shardkv_node.engine.table_meta import TableMeta

MIB = 1024 * 1024
OPTIONS = PickerOptions(l0_trigger=4, level1_bytes_max=10 * MIB, level_multiplier=10)


def table(name: str, first: str, last: str, *, size: int = MIB, tombstones: int = 0) -> TableMeta:
    return TableMeta(name, size, 0, 1, first.encode(), last.encode(), 1, 9, 10, tombstones, 0, size)


def names(task: CompactionTask | None) -> list[list[str]]:
    assert task is not None
    return [[meta.file_name for meta in run] for run in task.runs]


def test_nothing_is_full() -> None:
    assert pick([], OPTIONS) is None
    assert pick([[table("a", "a", "b")] * 3, [table("b", "a", "z", size=9 * MIB)]], OPTIONS) is None


def test_level_0_goes_down_with_what_it_overlaps_oldest_first() -> None:
    flushed = [table(f"f{n}", "d", "h") for n in range(4)]
    level1 = [table("x", "a", "c"), table("y", "e", "g"), table("z", "h", "k"), table("q", "m", "p")]
    task = pick([flushed, level1], OPTIONS)
    assert names(task) == [["y", "z"], ["f0"], ["f1"], ["f2"], ["f3"]]
    assert task is not None
    assert (task.level, task.output_level, task.bottommost) == (0, 1, True)


def test_deletes_are_kept_while_a_deeper_level_holds_their_range() -> None:
    flushed = [table(f"f{n}", "d", "h") for n in range(4)]
    deep_inside, deep_outside = [table("x", "g", "g")], [table("x", "i", "z")]
    with_older = pick([flushed, [], deep_inside], OPTIONS)
    without = pick([flushed, [], deep_outside], OPTIONS)
    assert with_older is not None and not with_older.bottommost
    assert without is not None and without.bottommost
    # The range of the outputs is that of all inputs, so what level 1 brings along counts too.
    wide = pick([flushed, [table("l1", "h", "j")], deep_outside], OPTIONS)
    assert wide is not None and not wide.bottommost


def test_tables_of_a_full_level_take_turns() -> None:
    level1 = [table(name, name, name + "z", size=6 * MIB) for name in "abc"]
    cursors: dict[int, bytes] = {}
    picked = []
    for _turn in range(4):
        task = pick([[], level1], OPTIONS, cursors)
        assert task is not None and task.level == 1 and task.output_level == 2
        picked.append(task.runs[-1][0].file_name)
        cursors[task.level] = task.cursor
    assert picked == ["a", "b", "c", "a"]


def test_the_fullest_level_goes_first() -> None:
    flushed = [table(f"f{n}", "a", "z") for n in range(5)]
    level1 = [table("x", "a", "z", size=30 * MIB)]
    task = pick([flushed, level1], OPTIONS)
    assert task is not None and task.level == 1


def test_the_last_level_is_never_full() -> None:
    levels: list[list[TableMeta]] = [[] for _level in range(7)]
    levels[6] = [table("x", "a", "z", size=10**18)]
    assert pick(levels, OPTIONS) is None


def test_all_of_it() -> None:
    assert pick_all([]) is None
    assert pick_all([[], [table("x", "a", "b")]]) is None
    assert names(pick_all([[], [table("x", "a", "b", tombstones=1)]])) == [["x"]]
    task = pick_all([[table("f0", "a", "b"), table("f1", "a", "b")], [table("x", "a", "b")], [table("y", "a", "b")]])
    assert names(task) == [["y"], ["x"], ["f0"], ["f1"]]
    assert task is not None and task.output_level == 2 and task.bottommost


def split(merged: list[int], pieces: int, name: int) -> list[TableMeta]:
    step = max(1, -(-len(merged) // pieces))
    parts = [merged[low : low + step] for low in range(0, len(merged), step)]
    return [table(f"{name}.{n}", f"{p[0]:03d}", f"{p[-1]:03d}") for n, p in enumerate(parts)]


@settings(max_examples=100, deadline=None)
@given(
    flushes=st.lists(st.sets(st.integers(0, 199), min_size=1, max_size=20), min_size=1, max_size=40),
    pieces=st.integers(1, 6),
)
def test_levels_stay_disjoint_and_rows_never_overtake_newer_ones(flushes: list[set[int]], pieces: int) -> None:
    """Plays tasks on tables that are sets of (key, age) and checks order and coverage after each."""
    options = PickerOptions(l0_trigger=2, level1_bytes_max=2 * MIB, level_multiplier=2)
    levels: list[list[TableMeta]] = [[] for _level in range(7)]
    rows: dict[str, dict[int, int]] = {}
    cursors: dict[int, bytes] = {}
    numbers = count()
    newest: dict[int, int] = {}
    for age, keys in enumerate(flushes):
        meta = split(sorted(keys), 1, next(numbers))[0]
        rows[meta.file_name] = dict.fromkeys(keys, age)
        newest.update(dict.fromkeys(keys, age))
        levels[0].append(meta)
        while (task := pick(levels, options, cursors)) is not None:
            merged: dict[int, int] = {}
            for meta in task.inputs:
                for key, its_age in rows.pop(meta.file_name).items():
                    assert merged.get(key, -1) < its_age, "an older row came after a newer one"
                    merged[key] = its_age
            inputs = set(task.inputs)
            levels = [[kept for kept in tables if kept not in inputs] for tables in levels]
            outputs = split(sorted(merged), pieces, next(numbers))
            for meta in outputs:
                low, high = int(meta.first_key), int(meta.last_key)
                rows[meta.file_name] = {key: its for key, its in merged.items() if low <= key <= high}
            levels[task.output_level] = sorted([*levels[task.output_level], *outputs], key=lambda meta: meta.first_key)
            cursors[task.level] = task.cursor
            assert check_levels(levels) == []
    found: dict[int, int] = {}
    for tables in reversed(levels):
        for meta in tables:
            found.update(rows[meta.file_name])
    assert found == newest


def test_the_checker_names_an_overlap() -> None:
    assert check_levels([[], [table("x", "a", "c"), table("y", "c", "d")]]) == [
        "Level 1: x ends at b'c' but y begins at b'c'."
    ]
