"""What the lines of `shardkv shell` mean: words, verbs, and what each prints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardkv.cli.options import counted, printable
from shardkv.errors import InvalidArgument

if TYPE_CHECKING:
    from shardkv.client.sync import Client

RANGE_ROWS_MAX = 1_000
PUT_LINE = re.compile(
    r"""\w+(?P<options>(?:\s+(?:--if-absent|--(?:ttl|if-version)\s+[-+.\w]+))*)"""
    r"""\s+(?P<key>(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)\s+(?P<value>.+)""",
    re.DOTALL,
)
QUOTED = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'[^']*')(?:\s+#.*)?""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Verb:
    """`run` takes the words after the verb, of which there are `least` to `most`, and yields lines to print."""

    usage: str
    summary: str
    least: int
    most: int
    run: Callable[[Client[bytes], list[str]], Iterator[str]]


def run_line(db: Client[bytes], line: str) -> Iterator[str]:
    """Carry out one line; what to print. Raises EOFError for `quit`, InvalidArgument, and what the client raises."""
    words = split_line(line)
    if words[:1] == ["shardkv"]:
        raise InvalidArgument("This already is shardkv.", hint="Leave the first word out.")
    if not words:
        return
    verb = VERBS.get(words[0].lower())
    if verb is None:
        raise InvalidArgument(f"There is no command {words[0]!r}.", hint="`help` lists the commands.")
    if not verb.least <= len(words) - 1 <= verb.most:
        raise InvalidArgument(f"Write: {verb.usage}")
    yield from verb.run(db, words[1:])


def split_line(line: str) -> list[str]:
    """The words of a line, quoted as in a shell; of `put`, the value is the rest of the line as it is typed.

    Quotes around that whole rest are taken off, as they are around any word. Raises InvalidArgument.
    """
    line = line.strip()
    if line.lower().startswith("put "):
        found = PUT_LINE.fullmatch(line)
        if found is not None:
            if found["key"].startswith("--"):
                raise InvalidArgument(f"Write: {VERBS['put'].usage}", hint="Quote a KEY that begins with --.")
            value = found["value"]
            whole = _words(value) if QUOTED.fullmatch(value) else [value]
            return ["put", *_words(found["options"]), *_words(found["key"]), *whole]
    return _words(line)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise InvalidArgument(f"The line cannot be read: {error}.", hint='Quote as in "a b".') from None


def _options(verb: str, words: list[str], **kinds: type) -> tuple[list[str], dict[str, Any]]:
    """Words that are no options, and the options by name. `kinds`: bool for those that stand alone.

    Raises InvalidArgument.
    """
    plain: list[str] = []
    options: dict[str, Any] = {}
    left = iter(words)
    for word in left:
        name = word[2:].replace("-", "_")
        kind = kinds.get(name) if word.startswith("--") else None
        if kind is None:
            plain.append(word)
            continue
        try:
            options[name] = True if kind is bool else kind(next(left))
        except (StopIteration, ValueError):
            raise InvalidArgument(f"What follows {word} cannot be read. Write: {VERBS[verb].usage}") from None
    return plain, options


def _expect(verb: str, words: list[str], least: int, most: int) -> None:
    if not least <= len(words) <= most:
        raise InvalidArgument(f"Write: {VERBS[verb].usage}")


def _put(db: Client[bytes], words: list[str]) -> Iterator[str]:
    """Options come before the key: after it everything is the value."""
    _, options = _options("put", words[:-2], ttl=float, if_absent=bool, if_version=int)
    key, value = words[-2:]
    db.put(key, value, **options)
    yield "ok"


def _get(db: Client[bytes], words: list[str]) -> Iterator[str]:
    plain, options = _options("get", words, with_version=bool)
    _expect("get", plain, 1, 1)
    found = db.get(plain[0], with_version=True)
    if found is None:
        yield "(not found)"
    else:
        yield f"{found[1]}\t{printable(found[0])}" if options else printable(found[0])


def _incr(db: Client[bytes], words: list[str]) -> Iterator[str]:
    plain, options = _options("incr", words, by=int, ttl=float)
    _expect("incr", plain, 1, 1)
    yield str(db.incr(plain[0], **options))


def _count(db: Client[bytes], words: list[str]) -> Iterator[str]:
    plain, options = _options("count", words, prefix=str)
    _expect("count", plain, 0, 2)
    yield str(db.count(*plain, **options))


def _delete_range(db: Client[bytes], words: list[str]) -> Iterator[str]:
    plain, options = _options("delete-range", words, prefix=str, limit=int, yes=bool)
    _expect("delete-range", plain, 0 if options.get("prefix") else 1, 2)
    if not options.pop("yes", False):
        found = counted(db.count(*plain, prefix=options.get("prefix")), "key")
        raise InvalidArgument(f"Nothing was deleted: the range has {found}.", hint="Add --yes to delete.")
    yield f"{counted(db.delete_range(*plain, **options), 'key')} deleted"


def _delete(db: Client[bytes], words: list[str]) -> Iterator[str]:
    yield "deleted" if db.delete(words[0]) else "(not found)"


def _range(db: Client[bytes], words: list[str]) -> Iterator[str]:
    return _rows(db.get_range(words[0], words[1], limit=RANGE_ROWS_MAX + 1))


def _scan(db: Client[bytes], words: list[str]) -> Iterator[str]:
    if (words and words[0].startswith("--")) or len(words) > 2 or (len(words) == 2 and not words[1].isdecimal()):
        raise InvalidArgument(f"Write: {VERBS['scan'].usage}.", hint="`shardkv scan` outside the shell takes options.")
    limit = int(words[1]) if len(words) == 2 else RANGE_ROWS_MAX + 1
    return _rows(db.scan(prefix=words[0] if words else None, limit=limit))


def _rows(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[str]:
    count = 0
    for count, (key, value) in enumerate(rows, 1):
        if count > RANGE_ROWS_MAX:
            yield f"(more; the shell shows {RANGE_ROWS_MAX} rows, `shardkv scan` all)"
            return
        yield f"{printable(key)}\t{printable(value)}"
    yield "(1 row)" if count == 1 else f"({count} rows)"


def _batch(db: Client[bytes], words: list[str]) -> Iterator[str]:
    if len(words) % 2:
        raise InvalidArgument(f"Write: {VERBS['batch'].usage}")
    with db.batch() as batch:
        for key, value in zip(words[::2], words[1::2], strict=True):
            batch.put(key, value)
    yield f"ok, {len(words) // 2} written"


def _ping(db: Client[bytes], words: list[str]) -> Iterator[str]:
    yield f"{db.ping():.2f} ms"


def _help(db: Client[bytes], words: list[str]) -> Iterator[str]:
    width = max(len(verb.usage) for verb in VERBS.values())
    if words and words[0] not in VERBS:
        raise InvalidArgument(f"There is no command {words[0]!r}.", hint="`help` lists the commands.")
    for verb in [VERBS[words[0]]] if words else VERBS.values():
        yield f"{verb.usage:{width}}  {verb.summary}"


def _quit(db: Client[bytes], words: list[str]) -> Iterator[str]:
    raise EOFError


MANY = 10_000

VERBS = {
    "put": Verb(
        "put [--ttl S] [--if-absent] [--if-version V] KEY VALUE",
        "store the rest of the line; quote a KEY that has spaces",
        2,
        7,
        _put,
    ),
    "get": Verb("get KEY [--with-version]", "show a value", 1, 2, _get),
    "incr": Verb("incr KEY [--by N] [--ttl S]", "add to a number", 1, 5, _incr),
    "range": Verb("range START END", "show the keys from START to END, both included", 2, 2, _range),
    "scan": Verb("scan [PREFIX [LIMIT]]", "show the keys that begin with PREFIX", 0, 9, _scan),
    "count": Verb("count [START [STOP]] [--prefix P]", "count keys, up to, not including, STOP", 0, 4, _count),
    "batch": Verb("batch KEY VALUE [KEY VALUE ...]", "store several values, atomically per shard", 2, MANY, _batch),
    "delete": Verb("delete KEY", "delete a key", 1, 1, _delete),
    "delete-range": Verb(
        "delete-range [START [STOP]] [--prefix P] [--limit N] --yes",
        "delete the keys from START up to, not including, STOP",
        1,
        7,
        _delete_range,
    ),
    "ping": Verb("ping", "measure the round trip", 0, 0, _ping),
    "?": Verb("?", "this list", 0, 1, _help),
    "help": Verb("help [COMMAND]", "this list, or one line of it", 0, 1, _help),
    "quit": Verb("quit", "leave", 0, 0, _quit),
    "exit": Verb("exit", "leave", 0, 0, _quit),
}
