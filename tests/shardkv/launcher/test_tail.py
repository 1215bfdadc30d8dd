"""Following logs: every line once, also across a rotation."""

from __future__ import annotations

from pathlib import Path

from shardkv.launcher.tail import follow, last_lines


def test_the_last_lines_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(f"line {number} {'x' * 100}\n" for number in range(5000)))
    assert [line.split()[1] for line in last_lines(log, 3)] == ["4997", "4998", "4999"]
    assert len(last_lines(log, 4000)) == 4000
    assert last_lines(log, 0) == []
    assert last_lines(tmp_path / "none", 3) == []


def test_lines_are_followed_through_a_rotation_and_half_lines_are_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n1\n")

    def grow() -> None:
        with log.open("a") as file:
            file.write("2\nha")

    def rotate() -> None:
        with log.open("a") as file:
            file.write("lf\n3\n")
        log.rename(tmp_path / "a.log.1")
        log.write_text("4\n")

    def rest() -> None:
        """Nothing happens."""

    steps = [grow, rotate, rest]

    def stopped() -> bool:
        if not steps:
            return True
        steps.pop(0)()
        return False

    assert list(follow([log], 1, stopped=stopped)) == ["1", "2", "half", "3", "4"]
