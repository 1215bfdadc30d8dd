"""import and export: what is read is what is stored, what is stored is what comes back, and nothing is skipped."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.cli import importing
from shardkv.cli.exporting import as_line
from shardkv.cli.rows import Lines, read_header, read_rows
from shardkv.errors import ShardUnavailable
from shardkv.wire.messages import Op, ShardProblem


def rows_of(text: bytes, form: str = "jsonl", template: str | None = None, prefix: bytes = b""):
    lines = Lines(io.BytesIO(text), "file")
    header = read_header(lines, form)
    return list(read_rows(lines, form, template, prefix, header))


def test_exported_rows_come_back_exactly():
    @given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.binary(max_size=9))))
    def check(rows):
        assert rows_of(b"".join(as_line(key, value) for key, value in rows)) == rows

    check()


def test_what_each_form_stores():
    assert rows_of(b'{"key":"a","value":"1"}\n\n{"value":[1,{"x":"\xc3\xa5"}],"key":"b"}') == [
        (b"a", b"1"),
        (b"b", '[1,{"x":"å"}]'.encode()),
    ]
    table = b'\xef\xbb\xbfcc,name,value\r\nIS,"Rey, ""R""",1\r\nNO,"two\nlines",\r\n'
    assert [key for key, _ in rows_of(table, "csv", "{cc}:{name}", b"city:")] == [
        b'city:IS:Rey, "R"',
        b"city:NO:two\nlines",
    ]
    assert rows_of(b'{"key":7,"value":"x"}') == [(b"7", b"x")]
    assert rows_of(b"key\tvalue\na\t1\n", "tsv") == [(b"a", b"1")]
    assert rows_of(b'{"id":7,"x":1.5}\n', template="id", prefix=b"p") == [(b"p7", b'{"id":7,"x":1.5}')]


@pytest.mark.parametrize(
    ("text", "form", "template", "says"),
    [
        (b'{"key":"a","value":"1"}\nnonsense\n', "jsonl", None, "line 2: it is not JSON"),
        (b"[1]\n", "jsonl", None, "line 1: it is not a JSON object"),
        (b'{"key":"a"}\n', "jsonl", None, 'it has no "value"'),
        (b'{"key":"","value":""}\n', "jsonl", None, "its key is empty"),
        (b'{"key":true,"value":""}\n', "jsonl", None, 'its "key" is neither text nor a number'),
        (b'{"key_b64":"***","value":""}\n', "jsonl", None, 'its "key_b64" is not base64'),
        (b'{"key":"\\ud800","value":""}\n', "jsonl", None, "surrogate"),
        (b'{"key":"\xff","value":""}\n', "jsonl", None, "not UTF-8"),
        (b'{"a":1}\n', "jsonl", "id", 'column "id"'),
        (b'{"id":null}\n', "jsonl", "id", 'column "id"'),
        (b'{"id":1}\n', "jsonl", "{id", "not a template"),
        (b'{"id":1}\n', "jsonl", "{}", "names no column"),
        (b"key,value\na,1\nb\n", "csv", None, "line 3: it has 1 column and the header has 2"),
        (b'key,value\na,"1"x\n', "csv", None, "line 2: it is not valid"),
        (b"", "csv", None, "no header"),
        (b"[" * 100_000, "jsonl", None, "not JSON"),
    ],
)
def test_a_row_that_cannot_be_stored_is_named(text, form, template, says):
    with pytest.raises(Exception, match=says):
        rows_of(text, form, template)


def test_import_and_export(run, router, tmp_path):
    source, copy = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(as_line(b"k%05d" % number, bytes([number % 256])) for number in range(9_000)))
    assert run("import", str(source)).code == 0
    assert len(router.store) == 9_000
    assert run("export", "--prefix", "k0", str(copy)).code == 0
    assert copy.read_bytes() == source.read_bytes()
    assert run("export", "-").out == source.read_bytes()
    router.store.clear()
    assert run("import", "-", stdin=source.read_bytes()).code == 0
    assert len(router.store) == 9_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_format_follows_the_name_and_the_prefix_is_put_in_front(run, router, tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("id\tname\n1\tAnn\n")
    assert run("import", str(table), "--key", "id", "--prefix", "user:").code == 0
    assert router.store == {b"user:1": b'{"id":"1","name":"Ann"}'}


def test_an_export_that_fails_leaves_the_old_file(run, router, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    router.store = {b"k": b"v"}
    router.refusals = [ShardUnavailable("Away.") for _ in range(1000)]
    assert run("export", str(target), "--timeout", "0.1").code == 3
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_export_of_nothing_does_not_replace_a_file(run, router, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    done = run("export", str(target))
    assert (done.code, "was left as it is" in done.err) == (2, True)
    assert target.read_text() == "old"
    assert run("export", str(tmp_path / "new.jsonl")).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl", "out.jsonl"]


def test_a_bad_row_stops_the_import_and_correcting_it_lets_it_go_on(run, router, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "BATCH_ROWS", 10)
    rows = [as_line(b"k%03d" % number, b"v") for number in range(50)]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join([*rows[:35], b"nonsense\n", *rows[36:]]))
    done = run("import", str(source))
    assert done.code == 2
    assert "line 36" in done.err
    assert "35 rows were stored" in done.err
    assert len(router.store) == 35
    source.write_bytes(b"".join(rows))
    router.store.clear()
    done = run("import", str(source), "--resume")
    assert done.code == 0, done.err
    assert "Resuming after 30 rows" in done.err
    assert set(router.store) == {b"k%03d" % number for number in range(30, 50)}
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_an_import_resumes_after_the_last_acknowledged_row(form, run, router, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "BATCH_ROWS", 10)
    between = "," if form == "csv" else "\t"
    source = tmp_path / f"in.{form}"
    source.write_text(
        f"key{between}value\n" + "".join(f'k{number:03}{between}"two\nlines {number}"\n' for number in range(40))
    )
    monkeypatch.setattr(importing, "RETRY_S", 0)
    failing = Failing(router.store, after=25)
    router.store = failing
    done = run("import", str(source), "--timeout", "1")
    assert done.code == 3
    assert "20 rows were stored" in done.err
    assert "--resume" in done.err
    router.store = dict(failing)
    router.requests.clear()
    assert run("import", str(source), "--resume").code == 0
    assert router.store == {f"k{number:03}".encode(): f"two\nlines {number}".encode() for number in range(40)}
    assert len(router.requests) == 2
    assert list(tmp_path.iterdir()) == [source]


class Failing(dict):
    """A store that takes so many keys and then fails."""

    def __init__(self, held, after):
        super().__init__(held)
        self._after = after

    def __setitem__(self, key, value):
        if len(self) >= self._after:
            raise ShardUnavailable("Away.")
        super().__setitem__(key, value)


def test_a_resume_of_something_else_is_refused(run, router, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "BATCH_ROWS", 2)
    source = tmp_path / "in.jsonl"
    rows = [as_line(b"k%d" % number, b"v") for number in range(5)]
    source.write_bytes(b"".join([*rows, b"nonsense\n"]))
    assert run("import", str(source)).code == 2
    sidecar = Path(f"{source}.shardkv-progress")
    assert json.loads(sidecar.read_text())["rows"] == 4
    done = run("import", str(source), "--resume", "--prefix", "x:")
    assert (done.code, "was started with --format jsonl --keyspace default." in done.err) == (2, True)
    source.write_bytes(b"".join([as_line(b"changed", b"v"), *rows[1:]]))
    done = run("import", str(source), "--resume")
    assert (done.code, "has changed" in done.err) == (2, True)
    sidecar.write_text("nonsense")
    done = run("import", str(source), "--resume")
    assert (done.code, "cannot be read" in done.err) == (2, True)
    assert run("import", str(source)).code == 0
    assert not sidecar.exists()
    assert "no unfinished import" in run("import", str(source), "--resume").err


def test_standard_input_cannot_be_resumed(run, router):
    done = run("import", "-", "--resume")
    assert done.code == 2
    assert "cannot be resumed" in done.err


def test_an_import_writes_a_batch_again_whose_outcome_is_unknown(run, router, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(as_line(b"k%02d" % number, b"v") for number in range(50)))
    router.lost_keys = {b"k07": ShardProblem(3, "outcome_unknown", "Shard 3 was lost.", {}, "")}
    tokens = set()

    def look(op: Op) -> float:
        """Once the client has given the batch up, and another write comes, the shard is back."""
        tokens.update(write.token.number for write in router.writes if write.token is not None)
        if len(tokens) > 1:
            router.lost_keys = {}
        return 0.0

    router.delay_s = look
    done = run("import", "--timeout", "0.5", str(source))
    assert done.code == 0, done.err
    assert "Trying again" in done.err
    assert "Imported 50 rows." in done.err
    assert len(router.store) == 50


def test_an_import_that_gives_up_says_how_to_go_on_and_nothing_about_single_keys(run, router, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "RETRY_S", 0)
    monkeypatch.setattr(importing, "BATCH_ROWS", 1)
    source = tmp_path / "in.jsonl"
    source.write_bytes(as_line(b"a", b"v") + as_line(b"b", b"v"))
    router.lost_keys = {b"b": ShardProblem(3, "outcome_unknown", "Shard 3 was lost.", {}, "Read the key.")}
    done = run("import", str(source))
    assert done.code == 3
    assert done.err.endswith("Shard 3 was lost. 1 row was stored. Run the same command with --resume to go on.\n")
    router.lost_keys = {}
    done = run("import", str(source), "--resume")
    assert "Imported 2 rows: 1 by the earlier run, 1 by this one." in done.err


def test_an_import_that_fails_in_its_first_batch_can_be_resumed(run, router, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(as_line(b"a", b"v") + b"nonsense\n")
    assert "1 row was stored. Run the same command with --resume" in run("import", str(source)).err
    source.write_bytes(as_line(b"a", b"v"))
    done = run("import", str(source), "--resume")
    assert "Resuming with the first row." in done.err
    assert (done.code, list(tmp_path.iterdir())) == (0, [source])
