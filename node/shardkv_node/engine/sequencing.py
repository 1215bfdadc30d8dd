"""Sequencing: gives the writes of a group their sequence numbers, judges their conditions, answers `want_existed`,
counts (`Write.add`), tells by their tokens those that were made before, and makes the log entries of the others.

Pure: nothing is changed but `Write.existed` and what a write with `add` comes to, so a group that cannot be logged
leaves no trace. All is judged against what is applied and what stands earlier in the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from shardkv.errors import ConditionFailed, InvalidArgument, ShardKVError, ShardUnavailable, StorageError
from shardkv_node.engine.columns import DELETE, PUT_EXPIRING, SEQNO_MAX, expand_kinds, expand_u64, make_version
from shardkv_node.engine.counting import Latest, add_up
from shardkv_node.engine.dedupe import Record, Records, all_new, judge, record_of, refusal_of, with_part, write_of
from shardkv_node.engine.entries import Token, WriteEntry
from shardkv_node.engine.puts import Puts, all_take, sequence_puts
from shardkv_node.engine.tablet import Tablet
from shardkv_node.engine.write import Write

Accepted = list[tuple[Write, Tablet] | Puts]
Refused = list[tuple[Write, ShardKVError]]
Repeated = list[Write]
_Pending = dict[bytes, int]
"""The version each key has after what stands earlier in the group; 0: it does not exist."""


def taken_apart(writes: Sequence[Write | Puts], tablets: Mapping[int, Tablet]) -> Sequence[Write | Puts]:
    """The same writes in order. Puts stay together unless a write of the group is judged, by what stands before it, or
    a tablet does not take them, or some with tokens may have been made before."""
    together = [write for write in writes if isinstance(write, Puts)]
    if not together:
        return writes
    judging = any(not isinstance(write, Puts) and (write.want_existed or write.conditions) for write in writes)
    takes = not judging and all(all_take(puts, tablets) for puts in together)
    if takes and (all(puts.tokens is None for puts in together) or all_new(_tokens_of(writes), tablets)):
        return writes
    return [one for write in writes for one in (write.apart() if isinstance(write, Puts) else (write,))]


def _tokens_of(writes: Sequence[Write | Puts]) -> Iterator[tuple[int, Token]]:
    """The tablet and token of each that has one."""
    for write in writes:
        if not isinstance(write, Puts):
            if write.token is not None:
                yield write.tablet, write.token
        elif write.tokens is not None:
            for number, token in zip(write.numbers, write.tokens, strict=True):
                if token is not None:
                    yield number, token


def sequence(
    writes: Sequence[Write | Puts],
    tablets: Mapping[int, Tablet],
    term: int,
    clock: Callable[[], int],
    make_records: Callable[[set[int]], None],
) -> tuple[Accepted, Refused, Repeated, list[WriteEntry | tuple[object, ...]]]:
    """The writes that are taken, each with its tablet; those that are not, and why; those made before, which have their
    outcome now; the log entries of the first.

    All in order; what is taken ends with the writes of records. Sequence numbers of a tablet follow its `last_seqno`
    without a gap. `clock`: milliseconds since 1970. `make_records`: called first, with the tablets of writes that have
    tokens. Requires: `writes` as `taken_apart` leaves them.
    """
    accepted: Accepted = []
    refused: Refused = []
    repeated: Repeated = []
    entries: list[WriteEntry | tuple[object, ...]] = []
    next_seqnos: dict[int, int] = {}
    tokens = judging = counting = False
    if any(
        one.tokens if isinstance(one, Puts) else (one.want_existed or one.conditions or one.token) for one in writes
    ):
        alone = [write for write in writes if not isinstance(write, Puts)]
        judging = any(write.want_existed or write.conditions for write in alone)
        counting = judging and any(write.add is not None for write in alone)
        tablets_with_tokens = {number for number, _ in _tokens_of(writes)}
        if tokens := bool(tablets_with_tokens):
            make_records(tablets_with_tokens)
    pending: dict[int, _Pending] = {}
    latest: dict[int, Latest] = {}
    records: dict[int, Records] = {}
    for write in writes:
        if isinstance(write, Puts):
            entries += sequence_puts(write, tablets, next_seqnos, term)
            accepted.append(write)
            if write.tokens is not None:
                for number, token, version, keys in zip(
                    write.numbers, write.tokens, write.versions, write.keys, strict=True
                ):
                    if token is not None:
                        records.setdefault(number, {})[token[0]] = Record(token[1], version, len(keys))
            continue
        number = write.tablet
        tablet = tablets.get(number)
        if tablet is None or tablet.fenced:
            refused.append((write, _refusal(number, tablet)))
            continue
        seqno = next_seqnos.get(number, tablet.last_seqno) + 1
        if seqno > SEQNO_MAX:
            refused.append((write, StorageError(f"Tablet {number} has used up its {SEQNO_MAX} sequence numbers.")))
            continue
        before_part: Record | None = None
        if tokens and write.token is not None:
            made = records.setdefault(number, {})
            told = judge(write, write.token, tablet, made)
            if told is True:
                repeated.append(write)
                continue
            if isinstance(told, Record):
                before_part = told
            elif told:
                refused.append((write, told))
                continue
        if judging:
            known = pending.setdefault(number, {})
            failure: ShardKVError | None = _failed_condition(write, tablet, known) if write.conditions else None
            if counting and failure is None:
                before = latest.setdefault(number, {})
                failure = None if write.add is None else add_up(write, tablet, before, clock)
            if failure is not None:
                refused.append((write, failure))
                if write.token is not None and write.again:
                    made[write.token[0]] = _with(before_part, refusal_of(write, write.token[1], failure), write)
                continue
            if counting:
                before.update(dict.fromkeys(write.keys, write))
            _note_outcome(write, tablet, known, make_version(term, seqno), clock)
        if tokens and write.token is not None:
            record = record_of(write, write.token[1], make_version(term, seqno))
            made[write.token[0]] = _with(before_part, record, write)
        next_seqnos[number] = seqno
        entries.append(WriteEntry(number, term, seqno, None, write.keys, write.kinds, write.expiries, write.values))
        accepted.append((write, tablet))
    now_ms = clock() if records else 0
    for number, made in records.items():
        where = tablets[number].records
        if made and where is not None:
            noted = write_of(made, where, now_ms)
            seqno = where.last_seqno + 1
            entries.append(
                WriteEntry(where.number, term, seqno, None, noted.keys, noted.kinds, noted.expiries, noted.values)
            )
            accepted.append((noted, where))
    return accepted, refused, repeated, entries


def _with(before: Record | None, record: Record, write: Write) -> Record:
    return record if before is None else with_part(before, record, write.keys)


def _refusal(number: int, tablet: Tablet | None) -> ShardKVError:
    if tablet is None:
        return InvalidArgument(f"This store has no tablet {number}.", detail={"tablet": number})
    return ShardUnavailable(
        f"Tablet {number} takes no writes now: it is being split or moved. Nothing was written.",
        detail={"tablet": number},
        hint="Retry after a moment.",
    )


def _failed_condition(write: Write, tablet: Tablet, pending: _Pending) -> ConditionFailed | None:
    """The first condition that does not hold."""
    for key, expected in write.conditions:
        found = pending.get(key)
        if found is None:
            found = tablet.version_of(key)
        if found != expected:
            return ConditionFailed(
                f"The key {key[:40]!r} {_has(found)}; the write asked that it {_has(expected)}. Nothing was written.",
                detail={"key": key, "expected": expected, "found": found},
                hint="Read it again and decide anew.",
            )
    return None


def _has(version: int) -> str:
    return f"has version {version}" if version else "does not exist"


def _note_outcome(write: Write, tablet: Tablet, pending: _Pending, version: int, clock: Callable[[], int]) -> None:
    """Fill in `existed` if wanted, and note in `pending` what the write leaves behind."""
    n = len(write.keys)
    kinds = expand_kinds(write.kinds, n)
    versions = [0 if kind == DELETE else version for kind in kinds]
    if PUT_EXPIRING in kinds:
        now_ms = clock()
        expiries = expand_u64(write.expiries, n)
        versions = [
            0 if kind == PUT_EXPIRING and expiry <= now_ms else outcome
            for kind, expiry, outcome in zip(kinds, expiries, versions, strict=True)
        ]
    if not write.want_existed:
        pending.update(zip(write.keys, versions, strict=True))
        return
    existed = []
    for key, after in zip(write.keys, versions, strict=True):
        before = pending.get(key)
        existed.append(tablet.get(key) is not None if before is None else before > 0)
        pending[key] = after
    write.existed = existed
