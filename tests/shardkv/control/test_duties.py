"""What a node does about the tablets and fences it has: nothing goes that something may still need."""

from __future__ import annotations

import msgspec
import pytest

from shardkv.control import changes
from shardkv.control.draft import Draft
from shardkv.control.duties import Abort, Adopt, Create, Drop, Fence, Keep, Missing, Serve, Step, Unfence, Work, duties
from shardkv.control.labels import Label, owned_label, parse_label, staging_label
from shardkv.control.registration import is_newest_directory, next_incarnation
from shardkv.topology.documents import NodeDocument
from tests.shardkv.control.world import Book

CHANGE = "00c0ffee00c0ffee"


def steps(book: Book, node: str, labels: list[bytes], *fences: Fence, incarnation: int = 1) -> list[Step]:
    found = duties(node, incarnation, book.topology, labels, fences)
    assert found is not None
    return found


def moving(book: Book, shard: int = 1, target: str = "n2") -> Book:
    draft = Draft(book.topology)
    changes.begin_move(draft, book.shard(shard), target, job=1, change=CHANGE)
    assert book.apply(draft.txn())
    return book


@pytest.mark.parametrize("label", [Label(7, "", 1), Label(7, "", 12), Label(7, CHANGE, 0), Label(7, CHANGE, 812)])
def test_a_label_reads_as_it_was_written(label: Label) -> None:
    assert parse_label(label.encode()) == label


def test_labels_of_placed_shards_are_their_ids_and_strange_ones_are_left_alone() -> None:
    assert owned_label(7, 1) == b"7"
    assert [parse_label(each) for each in (b"", b"x", b"7@", b"7/", b"7@x", b"7/a b")] == [None] * 6
    book = Book("n1", shards=1)
    assert Keep(b"x", "Its label is of another version.") in steps(book, "n1", [b"1", b"x"])


def test_a_placed_shard_is_made_and_served() -> None:
    book = Book("n1", shards=1)
    assert steps(book, "n1", []) == [Create(b"1"), Serve(1, 1, b"1")]
    assert steps(book, "n1", [b"1"]) == [Serve(1, 1, b"1")]


def test_a_move_from_begin_to_clean_up() -> None:
    book = moving(Book("n1", "n2", shards=1))
    source, target = steps(book, "n1", [b"1"]), steps(book, "n2", [])
    assert source[0] == Serve(1, 1, b"1")
    assert isinstance(source[1], Work) and source[1].role == "source"
    assert isinstance(target[0], Work) and target[0].role == "target"
    staging = target[0].stagings[0]
    assert staging == staging_label(1, CHANGE, book.topology.revision)
    fence = Fence(1, 1, CHANGE)
    assert [type(step) for step in steps(book, "n1", [b"1"], fence)] == [Work]
    assert book.apply(changes.commit(book.topology, 1, CHANGE))
    assert steps(book, "n2", [staging]) == [Adopt(staging, b"1@2"), Serve(1, 2, b"1@2")]
    assert [type(step) for step in steps(book, "n1", [b"1"], fence)] == [Drop, Unfence]
    assert changes.commit(book.topology, 1, CHANGE) is None
    assert changes.abort(book.topology, 1, CHANGE, "") is None


def test_of_commit_and_abort_one_is_applied() -> None:
    for first, second in ((0, 1), (1, 0)):
        book = moving(Book("n1", "n2", shards=1))
        both = [changes.commit(book.topology, 1, CHANGE), changes.abort(book.topology, 1, CHANGE, "Because.")]
        assert book.apply(both[first]) and not book.apply(both[second])
        assert book.shard(1).epoch == 2


def test_an_abort_ends_the_fence_and_the_staging_and_the_tablet_keeps_its_name() -> None:
    book = moving(Book("n1", "n2", shards=1))
    staging, fence = staging_label(1, CHANGE, 2), Fence(1, 1, CHANGE)
    assert book.apply(changes.abort(book.topology, 1, CHANGE, "Because."))
    assert steps(book, "n1", [b"1"], fence) == [Unfence(fence), Serve(1, 2, b"1")]
    assert steps(book, "n2", [staging]) == [Drop(staging, f"Change {CHANGE} is over.")]
    assert book.shard(1).problem == "Because."


@pytest.mark.parametrize(("node", "labels"), [("n1", [b"1"]), ("n2", [staging_label(1, CHANGE, 2)])])
def test_a_node_that_was_started_again_aborts_and_does_nothing_else(node: str, labels: list[bytes]) -> None:
    book = moving(Book("n1", "n2", shards=1))
    found = steps(book, node, labels, incarnation=2)
    assert [type(step) for step in found] == [Abort]


def test_a_shard_that_came_back_is_never_served_from_what_was_left_of_its_first_life() -> None:
    book = moving(Book("n1", "n2", shards=1))
    book.apply(changes.commit(book.topology, 1, CHANGE))
    draft = Draft(book.topology)
    changes.begin_move(draft, book.shard(1), "n1", job=1, change="beef")
    book.apply(draft.txn())
    book.apply(changes.commit(book.topology, 1, "beef"))
    staging = staging_label(1, "beef", 9)
    found = steps(book, "n1", [b"1", staging])
    assert found == [
        Adopt(staging, b"1@3"),
        Drop(b"1", "Node n1 has the shard since epoch 3."),
        Serve(1, 3, b"1@3"),
    ]
    assert isinstance(steps(book, "n1", [b"1"])[0], Missing)


def test_a_split_leaves_the_parent_until_both_halves_have_a_tablet() -> None:
    book = Book("n1", shards=1)
    draft = Draft(book.topology)
    changes.begin_split(draft, book.shard(1), 2**63, job=1, change=CHANGE)
    assert book.apply(draft.txn())
    work = steps(book, "n1", [b"1"])[1]
    assert isinstance(work, Work)
    assert book.apply(changes.commit(book.topology, 1, CHANGE))
    book.topology.keyspace("default").check()
    lower, upper = work.stagings
    assert [type(step) for step in steps(book, "n1", [b"1", lower, upper])] == [Adopt, Adopt, Drop, Serve, Serve]
    half = steps(book, "n1", [b"1", lower])
    assert [type(step) for step in half] == [Adopt, Missing, Keep, Serve]
    assert [type(step) for step in steps(book, "n9", [b"1"])] == [Drop], "an earlier owner has no use for it"


def merging() -> Book:
    book = Book("n1", shards=2)
    draft = Draft(book.topology)
    changes.begin_merge(draft, book.shard(1), book.shard(2), job=1, change=CHANGE)
    assert book.apply(draft.txn())
    return book


def test_a_merge_is_carried_by_both_and_ends_for_both() -> None:
    topology = merging().topology
    for end in (changes.commit(topology, 1, CHANGE), changes.abort(topology, 1, CHANGE, "Because.")):
        assert end is not None
        assert {compare.key for compare in end.compares} >= {"shards/1", "shards/2"}
    book = merging()
    assert book.apply(changes.commit(book.topology, 2, CHANGE))
    (merged,) = book.topology.keyspace("default").shards
    assert (merged.id, merged.parents, merged.epoch) == (3, [1, 2], 2)
    staging = staging_label(3, CHANGE, 1)
    assert [type(step) for step in steps(book, "n1", [b"1", b"2", staging])] == [Adopt, Drop, Drop, Serve]


def test_an_old_copy_of_the_store_deletes_nothing() -> None:
    old = moving(Book("n1", "n2", shards=1))
    old.apply(changes.commit(old.topology, 1, CHANGE))
    assert [type(step) for step in steps(old, "n1", [b"1"])] == [Drop]
    since_then = [b"1@3", b"77", b"77@2", staging_label(1, "beef", 900)]
    found = steps(old, "n1", since_then)
    assert [type(step) for step in found] == [Keep] * 4
    assert duties("n1", 1, old.topology, since_then, [], revision_seen=900) is None


def test_tablets_of_a_dropped_shard_go_wherever_they_are() -> None:
    book = Book("n1", shards=1)
    book.put(**{"shards/1": msgspec.structs.replace(book.shard(1), dropped=True, epoch=2)})
    assert [type(step) for step in steps(book, "n1", [b"1"])] == [Drop]
    assert [type(step) for step in steps(book, "n2", [b"1"])] == [Drop]
    assert steps(book, "n1", []) == []


def test_an_old_copy_of_a_directory_is_found_out_however_often_it_is_started() -> None:
    known = NodeDocument("n1", "s", 5, "n1:1", 1, start_id="five")
    assert is_newest_directory(None, "s", [])
    assert is_newest_directory(known, "s", ["five", "six, never registered", "seven"])
    assert not is_newest_directory(known, "s", ["four", "a", "b", "c", "d"])
    assert not is_newest_directory(known, "another store", ["five"])
    assert (next_incarnation(None), next_incarnation(known)) == (1, 6)
