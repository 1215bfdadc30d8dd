"""Is a recorded history linearizable? Decided exactly, key by key.

An operation took effect at one moment between its call and its end. One whose outcome is not known may take effect
at any moment after its call, or never; one that was refused took no effect and is not in the history. A history is
linearizable when moments can be chosen so that every result is what the model gives in that order.

The search is that of Wing and Gong with the memory of Lowe ("Testing for linearizability", 2017): take any operation
that no other one precedes, go back where nothing fits, never visit a configuration twice. What keeps it short, each
without changing the verdict:

- a read is taken as soon as it fits;
- of operations that do and tell the same, the one that must end first is taken first;
- a configuration that has used more of the unknown outcomes than a visited one, and is otherwise equal, is not
  visited;
- a state that cannot come back (values are unique) is not left while a known read of it is to come, nor by another
  than a known write that is possible in it alone;
- `Register.prepare`: a write of unknown outcome that was read had taken effect when the read ended; a value that
  nobody read stands for any other such value.

What a model says of an operation is all the search knows of it: for counters, say, write another model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

FOREVER = math.inf
STEPS_MAX = 1_000_000
"""Configurations of one key that are visited before the search gives up."""


class _Impossible(Enum):
    IMPOSSIBLE = "impossible"


IMPOSSIBLE = _Impossible.IMPOSSIBLE
UNKNOWN = "unknown"
"""The result of an operation whose outcome nobody told; its `end` is FOREVER."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on one key. `call` and `end` are readings of one clock; `action` and `result` are the model's."""

    key: Hashable
    action: Hashable
    result: Hashable
    call: float
    end: float = FOREVER
    who: str = ""

    @property
    def known(self) -> bool:
        return self.end < FOREVER

    def __str__(self) -> str:
        end = f"{self.end:.6f}" if self.known else "?"
        return f"[{self.call:.6f} .. {end}] {self.who} {self.action} -> {self.result}"


class Model(Protocol):
    """What an operation does to a state and tells of it."""

    initial: Hashable

    def prepare(self, operations: Sequence[Operation]) -> list[Operation]:
        """The same operations in the same order, easier to search. Raises NotLinearizable when no search is needed."""

    def step(self, state: Hashable, action: Hashable, result: Hashable) -> Hashable:
        """The state after an operation, or IMPOSSIBLE when it cannot have told this result."""

    def is_read(self, action: Hashable, result: Hashable) -> bool:
        """Whether it changes nothing in any state in which it is possible."""

    def only_in(self, action: Hashable, result: Hashable) -> Hashable:
        """The one state in which it is possible, when that never comes back once left; else IMPOSSIBLE."""


class NotLinearizable(AssertionError):
    """No order of the operations explains their results."""


class Undecided(AssertionError):
    """The search was given up after too many steps."""


def check(operations: Iterable[Operation], model: Model, *, steps_max: int = STEPS_MAX) -> int:
    """Check each key by itself; returns the number of configurations visited. Raises NotLinearizable, Undecided."""
    by_key: dict[Hashable, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_key[operation.key].append(operation)
    return sum(_Search(found, model, steps_max).run() for found in by_key.values())


class _Search:
    """Of one key. Events (calls, and ends of known operations) are a doubly linked list in order of time; an
    operation that was taken is unlinked, and linked again on the way back."""

    def __init__(self, operations: Sequence[Operation], model: Model, steps_max: int) -> None:
        self._told = sorted(operations, key=lambda operation: operation.call)
        self._ops = ops = model.prepare(self._told)
        self._model = model
        self._steps_max = steps_max
        self._classes = [(operation.action, operation.result) for operation in ops]
        self._is_read = [model.is_read(*kind) for kind in self._classes]
        self._only_in = [model.only_in(*kind) for kind in self._classes]
        self._link_events()
        self._state = model.initial
        self._known_taken = 0
        self._unknown_taken = 0
        self._known_left = sum(operation.known for operation in ops)
        bound = [number for number, op in enumerate(ops) if op.known and self._only_in[number] is not IMPOSSIBLE]
        self._reads_left = Counter(self._only_in[number] for number in bound if self._is_read[number])
        self._leaving = {self._only_in[number]: number for number in bound if not self._is_read[number]}
        self._taken: list[int] = []
        self._visited: dict[tuple[int, int, Hashable], list[int]] = {}
        self._best = (self._known_left + 1, "")

    def _link_events(self) -> None:
        ends = [(op.end, 1, number) for number, op in enumerate(self._ops) if op.known]
        events = sorted([(op.call, 0, number) for number, op in enumerate(self._ops)] + ends)
        self._event_op = [-1] + [number for _, _, number in events] + [-1]
        self._event_is_end = [False] + [bool(kind) for _, kind, _ in events] + [True]
        self._next = [event + 1 for event in range(len(events) + 2)]
        self._before = [event - 1 for event in range(len(events) + 2)]
        self._call_event = [0] * len(self._ops)
        self._end_event = [0] * len(self._ops)
        for event, (_, kind, number) in enumerate(events, 1):
            (self._end_event if kind else self._call_event)[number] = event

    def run(self) -> int:
        """The number of configurations visited."""
        stack: list[tuple[int, Hashable, list[int]]] = []
        steps = 0
        candidates = self._open()
        while self._known_left:
            steps += 1
            if steps > self._steps_max:
                raise Undecided(f"Not decided in {self._steps_max} steps. So far:\n{self._best[1]}")
            if candidates:
                stack.append((len(self._taken), self._state, candidates))
            if not stack:
                raise NotLinearizable(self._best[1])
            mark, state, left = stack[-1]
            self._undo_to(mark, state)
            number = left.pop()
            if not left:
                stack.pop()
            self._state = self._model.step(state, *self._classes[number])
            self._take(number)
            candidates = self._open()
        return steps

    def _open(self) -> list[int]:
        """Take what changes nothing; then what may be taken next, most urgent last. Empty: nothing, or seen before."""
        step, state = self._model.step, self._state
        first: dict[Hashable, int] = {}
        event = self._next[0]
        while not self._event_is_end[event]:
            number = self._event_op[event]
            event = self._next[event]
            kind = self._classes[number]
            after = step(state, *kind)
            if after is IMPOSSIBLE:
                continue
            if self._is_read[number]:
                self._take(number)
                if event == self._end_event[number]:
                    event = self._next[event]
                continue
            other = first.get(kind)
            if other is None or self._ops[number].end < self._ops[other].end:
                first[kind] = number
        if self._reads_left[state] > 0:
            first.clear()
        elif state in self._leaving:
            first = {kind: number for kind, number in first.items() if number == self._leaving[state]}
        if not first or self._seen():
            self._note_stuck()
            return []
        return sorted(first.values(), key=self._urgency, reverse=True)

    def _urgency(self, number: int) -> tuple[float, float]:
        return self._ops[number].end, self._ops[number].call

    def _seen(self) -> bool:
        """Whether this configuration, or a better one, was visited; from now on this one was."""
        taken = self._known_taken
        low = (~taken & (taken + 1)).bit_length() - 1
        visited = self._visited.setdefault((low, taken >> low, self._state), [])
        if any(before & ~self._unknown_taken == 0 for before in visited):
            return True
        visited.append(self._unknown_taken)
        return False

    def _take(self, number: int) -> None:
        self._taken.append(number)
        self._unlink(self._call_event[number])
        if self._ops[number].known:
            self._unlink(self._end_event[number])
            self._known_taken |= 1 << number
            self._known_left -= 1
        else:
            self._unknown_taken |= 1 << number
        if self._is_read[number]:
            self._reads_left[self._only_in[number]] -= 1

    def _undo_to(self, mark: int, state: Hashable) -> None:
        while len(self._taken) > mark:
            number = self._taken.pop()
            if self._ops[number].known:
                self._relink(self._end_event[number])
                self._known_taken ^= 1 << number
                self._known_left += 1
            else:
                self._unknown_taken ^= 1 << number
            self._relink(self._call_event[number])
            if self._is_read[number]:
                self._reads_left[self._only_in[number]] += 1
        self._state = state

    def _unlink(self, event: int) -> None:
        before, after = self._before[event], self._next[event]
        self._next[before], self._before[after] = after, before

    def _relink(self, event: int) -> None:
        self._next[self._before[event]] = self._before[self._next[event]] = event

    def _note_stuck(self) -> None:
        """Keep a description of the configuration that explained most."""
        if self._known_left >= self._best[0] or not self._known_left:
            return
        left = sorted(set(range(len(self._ops))) - set(self._taken))
        stuck = min(left, key=lambda number: self._ops[number].end)
        waiting = [number for number in left if self._only_in[number] == self._state]
        beside = [number for number in left if self._ops[number].call < self._ops[stuck].end and number != stuck]
        text = [f"Key {self._told[0].key!r} is not linearizable. Taken last:", *self._lines(self._taken[-8:])]
        text += [f"Then the state is {self._state!r}, and this has no place:", *self._lines([stuck])]
        text += ["Reads of this state still to come:", *self._lines(waiting[:4])] if waiting else []
        text += ["Beside:", *self._lines(beside[:12])] if beside else []
        self._best = (self._known_left, "\n".join(text))

    def _lines(self, numbers: Iterable[int]) -> list[str]:
        return [f"  {self._told[number]}" for number in numbers]


# The register


@dataclass(frozen=True, slots=True)
class Put:
    value: Hashable


@dataclass(frozen=True, slots=True)
class Get:
    """Its result is the value, None when there is none."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Its result says whether the key existed."""


@dataclass(frozen=True, slots=True)
class PutIf:
    """A put on condition that the key holds `expected`; its result says whether it did."""

    value: Hashable
    expected: Hashable


@dataclass(frozen=True, slots=True)
class DeleteIf:
    """A delete on condition that the key holds `expected`, which is not None; its result says whether it did."""

    expected: Hashable


UNSEEN = "a value nobody read"


class Register:
    """One key: a value or None, put, got, deleted and compared. Requires: no value is put twice."""

    initial: Hashable = None

    def prepare(self, operations: Sequence[Operation]) -> list[Operation]:
        puts = _puts_by_value(operations)
        compared = {op.action.expected for op in operations if isinstance(op.action, (PutIf, DeleteIf))}
        first_seen: dict[Hashable, Operation] = {}
        for operation in operations:
            value = _seen_by(operation)
            if value is None:
                continue
            if value not in puts:
                raise NotLinearizable(f"Key {operation.key!r}: nobody wrote what was read:\n  {operation}")
            if operation.end < puts[value].call:
                raise NotLinearizable(f"Key {operation.key!r}: read before written:\n  {operation}\n  {puts[value]}")
            if value not in first_seen or operation.end < first_seen[value].end:
                first_seen[value] = operation
        return [_as_known_later(operation, first_seen, compared) for operation in operations]

    def step(self, state: Hashable, action: Hashable, result: Hashable) -> Hashable:
        match action:
            case Put(value):
                return value
            case Get():
                return state if result == state else IMPOSSIBLE
            case Delete():
                return None if result == UNKNOWN or result == (state is not None) else IMPOSSIBLE
            case PutIf(_, expected) | DeleteIf(expected):
                if (state == expected) != (result is not False):
                    return IMPOSSIBLE
                return state if result is False else action.value if isinstance(action, PutIf) else None
        raise TypeError(f"A register knows no {action!r}.")

    def is_read(self, action: Hashable, result: Hashable) -> bool:
        return isinstance(action, Get) or (isinstance(action, (Delete, PutIf, DeleteIf)) and result is False)

    def only_in(self, action: Hashable, result: Hashable) -> Hashable:
        if isinstance(action, Get):
            return IMPOSSIBLE if result is None else result
        if isinstance(action, (PutIf, DeleteIf)) and result is not False and action.expected is not None:
            return action.expected
        return IMPOSSIBLE


def _puts_by_value(operations: Sequence[Operation]) -> dict[Hashable, Operation]:
    """The writes that happened or may have."""
    puts: dict[Hashable, Operation] = {}
    for operation in operations:
        if isinstance(operation.action, (Put, PutIf)) and operation.result is not False:
            if operation.action.value in puts:
                raise ValueError("A value was put twice; this check needs values that are put once.")
            puts[operation.action.value] = operation
    return puts


def _seen_by(operation: Operation) -> Hashable:
    """The value that an operation is known to have found; None when there is none."""
    if isinstance(operation.action, Get):
        return operation.result
    if isinstance(operation.action, (PutIf, DeleteIf)) and operation.result is True:
        return operation.action.expected
    return None


def _as_known_later(operation: Operation, first_seen: dict[Hashable, Operation], compared: set[Hashable]) -> Operation:
    """A put with what others tell of it: that it took effect before the first who saw it ended, or that nobody did."""
    action, result = operation.action, operation.result
    if not isinstance(action, (Put, PutIf)) or result is False:
        return operation
    seen = first_seen.get(action.value)
    if seen is not None:
        return replace(operation, result=True, end=min(operation.end, seen.end))
    value = action.value if action.value in compared else UNSEEN
    return replace(operation, action=replace(action, value=value), result=True)
