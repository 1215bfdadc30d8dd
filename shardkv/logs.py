"""The log of a process: one line for each event, `time level process event key=value ...`, to a file that rotates.

The file also takes what is written to the raw standard output and error (a traceback at exit, a message of a C
library), because the file is put in their place, again at every rotation.

Invariant: a log holds at most `files_kept` + 1 files of about `bytes_max` each. A full disk never stops the process:
lines are then lost.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from shardkv.errors import StorageError

LOG_BYTES_MAX = 8 * 1024 * 1024
LOG_FILES_KEPT = 3

_LINE_FORMAT = "{asctime} {levelname} {process_name} {message}"
_STDOUT, _STDERR = 1, 2


def configure_logging(
    process_name: str,
    *,
    log_file: Path | None,
    level: str = "info",
    bytes_max: int = LOG_BYTES_MAX,
    files_kept: int = LOG_FILES_KEPT,
) -> None:
    """Send all logging of this process to `log_file`, standard output and error too; without one, to standard error.

    `files_kept`: older files beside the current one (`name.1` is the newest of them). The last three arguments are
    what `[logs]` in a configuration holds. Raises StorageError when the file cannot be opened.
    """
    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler()
    else:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handler = RotatingLog(log_file, bytes_max=bytes_max, files_kept=files_kept)
        except OSError as error:
            raise StorageError(f"The log {log_file} cannot be written: {error.strerror}.") from error
    handler.setFormatter(_EventFormatter(process_name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def event(name: str, /, **fields: object) -> str:
    """A log message: the event's name and its facts as key=value, quoted where they hold spaces."""
    return " ".join([name, *(f"{key}={_quoted(value)}" for key, value in fields.items())])


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and not any(character.isspace() or character in "\"'=" for character in text)
    return text if plain else repr(text)


class _EventFormatter(logging.Formatter):
    """Times in UTC with milliseconds, as sortable text."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, process_name: str) -> None:
        super().__init__(_LINE_FORMAT, style="{", defaults={"process_name": process_name})


class RotatingLog(logging.Handler):
    """Appends to `path`; past `bytes_max` the file becomes `path`.1, that one `path`.2 and so on."""

    def __init__(self, path: Path, *, bytes_max: int, files_kept: int) -> None:
        super().__init__()
        self._path = path
        self._bytes_max = bytes_max
        self._files_kept = files_kept
        self._take_the_place_of_output()

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode(errors="backslashreplace")
        with suppress(OSError):
            if os.fstat(_STDERR).st_size + len(line) > self._bytes_max:
                self._rotate()
            os.write(_STDERR, line)

    def _rotate(self) -> None:
        for number in range(self._files_kept, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                os.replace(older, self._numbered(number))
        if self._files_kept == 0:
            self._path.unlink(missing_ok=True)
        self._take_the_place_of_output()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _take_the_place_of_output(self) -> None:
        opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(opened, _STDOUT)
        os.dup2(opened, _STDERR)
        os.close(opened)
