"""The checker of histories itself: it must see what is wrong, must not see what is not, and must end in time."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import count, permutations

import pytest

from tests.worlds.linearizability import (
    FOREVER,
    IMPOSSIBLE,
    UNKNOWN,
    Delete,
    DeleteIf,
    Get,
    NotLinearizable,
    Operation,
    Put,
    PutIf,
    Register,
    Undecided,
    check,
)


def put(value: str, call: float, end: float = FOREVER) -> Operation:
    return Operation("k", Put(value), None, call, end)


def get(value: str | None, call: float, end: float) -> Operation:
    return Operation("k", Get(), value, call, end)


def delete(existed: bool | str, call: float, end: float = FOREVER) -> Operation:
    return Operation("k", Delete(), existed, call, end)


def put_if(value: str, expected: str | None, held: bool | str, call: float, end: float = FOREVER) -> Operation:
    return Operation("k", PutIf(value, expected), held, call, end)


def delete_if(expected: str, held: bool | str, call: float, end: float = FOREVER) -> Operation:
    return Operation("k", DeleteIf(expected), held, call, end)


def verdict(*operations: Operation) -> bool:
    try:
        check(operations, Register())
    except NotLinearizable:
        return False
    return True


GOOD = {
    "nothing": [],
    "one after the other": [put("a", 0, 1), get("a", 2, 3), delete(True, 4, 5), get(None, 6, 7), delete(False, 8, 9)],
    "a read beside a write sees either": [put("a", 0, 1), put("b", 2, 9), get("a", 3, 4), get("b", 5, 6)],
    "two writes in either order": [put("a", 0, 5), put("b", 1, 5), get("b", 6, 7), get("b", 8, 9)],
    "two writes in the other order": [put("a", 0, 5), put("b", 1, 5), get("a", 6, 7), get("a", 8, 9)],
    "an unknown write that happened": [put("a", 0, 1), put("b", 2), get("a", 3, 4), get("b", 50, 60)],
    "an unknown write that never happened": [put("a", 0, 1), put("b", 2), get("a", 3, 4), get("a", 50, 60)],
    "an unknown delete that happened late": [put("a", 0, 1), delete(UNKNOWN, 2), get("a", 5, 6), get(None, 7, 8)],
    "an unknown write explains a delete": [put("a", 0), delete(True, 5, 6)],
    "an unknown delete explains a delete": [put("a", 0, 1), delete(UNKNOWN, 2), delete(False, 5, 6)],
    "compare and set": [put("a", 0, 1), put_if("b", "a", True, 2, 3), put_if("c", "a", False, 4, 5), get("b", 6, 7)],
    "one of two wins": [put("a", 0, 1), put_if("b", "a", True, 2, 9), put_if("c", "a", False, 2, 9), get("b", 10, 11)],
    "put if absent": [put_if("a", None, True, 0, 1), put_if("b", None, False, 2, 3), delete_if("a", True, 4, 5)],
    "an unknown comparison that held": [put("a", 0, 1), put_if("b", "a", UNKNOWN, 2), get("a", 3, 4), get("b", 5, 6)],
    "a delete beside a write": [put("a", 0, 5), delete(False, 1, 4), get("a", 6, 7)],
}

BAD = {
    "lost write": [put("a", 0, 1), get(None, 2, 3)],
    "both of two win": [put("a", 0, 1), put_if("b", "a", True, 2, 9), put_if("c", "a", True, 2, 9)],
    "a comparison that wrongly failed": [put("a", 0, 1), put_if("b", "a", False, 2, 3)],
    "a failed comparison that was applied": [put("a", 0, 1), put_if("b", "x", False, 2, 3), get("b", 4, 5)],
    "an unknown comparison that cannot hold": [put("a", 0, 1), put_if("b", "x", UNKNOWN, 2), get("b", 4, 5)],
    "put if absent over a value": [put("a", 0, 1), put_if("b", None, True, 2, 3)],
    "deleted on a condition that did not hold": [put("a", 0, 1), put("b", 2, 3), delete_if("a", True, 4, 5)],
    "lost overwrite": [put("a", 0, 1), put("b", 2, 3), get("a", 4, 5)],
    "lost write that nobody read": [put("a", 0, 1), get("a", 2, 3), put("b", 4, 5), get("a", 6, 7)],
    "stale read": [put("a", 0, 1), put("b", 2, 9), get("b", 3, 4), get("a", 5, 6)],
    "resurrected delete": [put("a", 0, 1), delete(True, 2, 3), get("a", 4, 5)],
    "delete that was undone": [put("a", 0, 1), delete(True, 2, 3), get(None, 4, 5), get("a", 6, 7)],
    "write applied twice out of order": [put("a", 0), put("b", 1, 2), get("a", 3, 4), get("b", 5, 6), get("a", 7, 8)],
    "unknown delete applied twice": [
        put("a", 0, 1),
        delete(UNKNOWN, 2),
        get(None, 3, 4),
        put("b", 5, 6),
        get("b", 7, 8),
        get(None, 9, 10),
    ],
    "write read before it was called": [get("a", 0, 1), put("a", 2, 3)],
    "value nobody wrote": [put("a", 0, 1), get("x", 2, 3)],
    "refused write that was applied": [put("a", 0, 1), get("refused", 2, 3)],
    "two readers disagree about the order": [
        put("a", 0, 9),
        put("b", 0, 9),
        get("a", 1, 2),
        get("b", 3, 4),
        get("a", 5, 6),
    ],
    "a delete that found what was not there": [put("a", 0, 1), delete(True, 2, 3), delete(True, 4, 5)],
    "a delete that missed what was there": [put("a", 0, 1), delete(False, 2, 3)],
    "one unknown write explains two deletes": [put("a", 0), delete(True, 5, 6), delete(True, 7, 8)],
}


@pytest.mark.parametrize("name", GOOD)
def test_good_histories_pass(name: str) -> None:
    assert verdict(*GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_histories_are_caught(name: str) -> None:
    assert not verdict(*BAD[name])


def test_keys_are_judged_by_themselves() -> None:
    other = [replace(operation, key="other") for operation in BAD["lost write"]]
    with pytest.raises(NotLinearizable, match="'other'"):
        check([*GOOD["one after the other"], *other], Register())


def test_a_failure_shows_what_has_no_place() -> None:
    with pytest.raises(NotLinearizable) as caught:
        check(BAD["lost overwrite"], Register())
    assert str(BAD["lost overwrite"][-1]) in str(caught.value)


def brute_force(operations: Sequence[Operation]) -> bool:
    """Every subset of the unknown ones, in every order that time allows."""
    known = [number for number, operation in enumerate(operations) if operation.known]
    register = Register()
    for size in range(len(known), len(operations) + 1):
        for order in permutations(range(len(operations)), size):
            if set(known) <= set(order) and _explains(operations, order, register):
                return True
    return False


def _explains(operations: Sequence[Operation], order: Sequence[int], register: Register) -> bool:
    state: Hashable = None
    latest_call = -1.0
    for number in order:
        operation = operations[number]
        latest_call = max(latest_call, operation.call)
        if operation.end < latest_call:
            return False
        state = register.step(state, operation.action, operation.result)
        if state is IMPOSSIBLE:
            return False
    return True


def random_history(rng: random.Random, size: int, *, reach: float, unknown: float) -> list[Operation]:
    """A linearizable history: operations take effect at 0, 1, 2, ... and last up to `reach` to both sides."""
    values = count()
    state: str | None = None
    history = []
    for moment in range(size):
        call, end = moment - rng.random() * reach, moment + rng.random() * reach
        is_unknown = rng.random() < unknown
        happens = not is_unknown or rng.random() < 0.5
        match rng.choice("pppcggggd"):
            case "c":
                value, expected = f"v{next(values)}", rng.choice([state, None, "v0"])
                held: bool | str = UNKNOWN if is_unknown else state == expected
                state = value if happens and state == expected else state
                history.append(put_if(value, expected, held, call, FOREVER if is_unknown else end))
            case "p":
                value = f"v{next(values)}"
                state = value if happens else state
                history.append(put(value, call, FOREVER if is_unknown else end))
            case "d":
                existed = UNKNOWN if is_unknown else state is not None
                state = None if happens else state
                history.append(delete(existed, call, FOREVER if is_unknown else end))
            case _:
                history.append(get(state, call, end))
    return history


def corrupt_one(rng: random.Random, history: list[Operation]) -> None:
    """Let one operation tell something else; that may be as possible as before."""
    values = [found.action.value for found in history if isinstance(found.action, (Put, PutIf))]
    number = rng.randrange(len(history))
    match history[number].action:
        case Get():
            history[number] = replace(history[number], result=rng.choice([None, *values]))
        case Delete() | PutIf():
            if history[number].known:
                history[number] = replace(history[number], result=rng.choice([True, False]))


def test_it_agrees_with_trying_everything() -> None:
    verdicts = [0, 0]
    for seed in range(1500):
        rng = random.Random(seed)
        history = random_history(rng, 6, reach=rng.choice([0.6, 2, 4]), unknown=0.3)
        if rng.random() < 0.8:
            corrupt_one(rng, history)
        expected = brute_force(history)
        assert verdict(*history) == expected, (seed, list(map(str, history)))
        verdicts[expected] += 1
    assert min(verdicts) > 150, verdicts


@pytest.mark.parametrize("reach", [1, 12, 30])
def test_thousands_of_operations_with_many_unknown_ones_are_decided(reach: int) -> None:
    for seed in range(2):
        history = random_history(random.Random(seed), 4000, reach=reach, unknown=0.1)
        assert check(history, Register()) < 100_000


@pytest.mark.parametrize("fault", ["lost", "stale", "resurrected"])
def test_one_fault_among_thousands_is_found(fault: str) -> None:
    for seed in range(4):
        history = random_history(random.Random(seed), 1200, reach=4, unknown=0.05)
        middle = history[600].call
        if fault == "lost":
            history += [put("x", middle, middle + 0.1), get(None, middle + 0.2, middle + 0.3)]
            history += [get("x", middle + 0.4, middle + 0.5)]
        elif fault == "stale":
            history += [put("x", middle, middle + 0.1), put("y", middle + 0.2, middle + 0.3)]
            history += [get("y", middle + 0.4, middle + 0.5), get("x", middle + 0.6, middle + 0.7)]
        else:
            history += [put("x", middle - 300, middle - 299), get("x", middle - 298, middle - 297)]
            history += [get("x", middle, middle + 0.1)]
        with pytest.raises((NotLinearizable, Undecided)) as caught:
            check(history, Register())
        assert caught.type is NotLinearizable, (fault, seed)


class Counter:
    """Another model: a number that is increased by one and answers with the result."""

    initial: Hashable = 0

    def prepare(self, operations: Sequence[Operation]) -> list[Operation]:
        return list(operations)

    def step(self, state: Hashable, action: Hashable, result: Hashable) -> Hashable:
        assert isinstance(state, int)
        return state + 1 if result in (UNKNOWN, state + 1) else IMPOSSIBLE

    def is_read(self, action: Hashable, result: Hashable) -> bool:
        return False

    def only_in(self, action: Hashable, result: Hashable) -> Hashable:
        return IMPOSSIBLE


def increments(results: Sequence[object]) -> list[Operation]:
    """One after the other; the end of an unknown one is not known."""
    return [
        Operation("k", "incr", result, 2 * number, FOREVER if result == UNKNOWN else 2 * number + 1)
        for number, result in enumerate(results)
    ]


def test_another_model() -> None:
    check(increments([1, 2, UNKNOWN, 3, UNKNOWN, 5]), Counter())
    for wrong in ([1, 2, 2], [1, 3], [1, UNKNOWN, 4], [1, 3, UNKNOWN]):
        with pytest.raises(NotLinearizable):
            check(increments(wrong), Counter())
