"""The log: steps with their context, in the line shapes that readers of CRIU's logs rely on.

Two shapes. A *record* is a line as CRIU writes it: with ``verbosity`` 3 or more a ``(00.001234) `` prefix (seconds
since the log was opened), then ``Error (firn/dump/x.py:12): text``, ``Warn  (place): text`` or the bare text. A
*friendly* line is for a person at a terminal: ``firn: error: text``. The command ``criu`` writes records only; ``firn``
writes friendly lines to stderr, and records to the file named by ``-o``.

Before :meth:`Log.open` messages are kept (:data:`EARLY_LIMIT` bytes of them); the final level filters them.
"""

from __future__ import annotations

import os
import sys
import time

from firn import __version__

SILENT, ERROR, WARNING, INFO, DEBUG = range(5)

# CRIU's limits: bytes kept before the log is open, and bytes in one line, its newline included.
EARLY_LIMIT = 1024
LINE_LIMIT = 8192

_TAGS = {ERROR: "Error ", WARNING: "Warn  "}
_FRIENDLY = {ERROR: "error: ", WARNING: "warning: "}
_SOURCES = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Log:
    """Where all parts of firn say what they do.

    *level* is CRIU's verbosity: 0 silent, 1 errors, 2 warnings, 3 information and timestamps, 4 debugging.
    *program* is ``"firn"`` or ``"criu"``. A new log keeps what it is told until :meth:`open`.
    ``run_id`` (a UUID's text) names this run, in the log and in the inventory. ``fd`` is where action scripts write.
    """

    __slots__ = ("_early", "_early_bytes", "_friendly", "_records", "_started", "_step", "level", "program", "run_id")

    def __init__(self, level: int = WARNING, program: str = "firn") -> None:
        self.level = level
        self.program = program
        self.run_id = _uuid4()
        self._step = ""
        self._started = 0.0
        self._records = -1
        self._friendly = -1
        self._early: list[tuple[int, str, str]] | None = []
        self._early_bytes = 0

    @property
    def fd(self) -> int:
        """The descriptor behind this log: the file's, else stderr."""
        return self._records if self._records >= 0 else 2

    def open(self, path: str | None = None) -> None:
        """Begin to write: to the new file *path* (mode 0600, old content dropped), to stdout for ``"-"``, or to stderr.

        Relative paths are relative to the current directory. Raises :class:`OSError` if the file cannot be made.
        """
        if path == "-":
            self._records = 1
        elif path is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            self._records = os.open(path, flags, 0o600)
        self._begin()
        if self.level >= INFO:
            name = "CRIU" if self.program == "criu" else self.program
            version = "4.2" if self.program == "criu" else __version__
            host = os.uname()
            self.info(f"{name} run id = {self.run_id}")
            self.info(f"Version: {version} (gitid 0)")
            self.info(f"Running on {host.nodename} {host.sysname} {host.release} {host.version} {host.machine}")

    def close(self) -> None:
        """Write what was kept if the log was never opened, and let go of the file."""
        if self._early is not None:
            self._begin()
        if self._records > 2:
            os.close(self._records)
        self._records = -1

    def _begin(self) -> None:
        if self.program == "criu":
            self._records = self._records if self._records >= 0 else 2
        else:
            self._friendly = 2
        kept, self._early = self._early or [], None
        for level, text, place in kept:
            if level <= self.level:
                self._write(level, "", text, place, "(00.000000) " if level >= INFO else "")
        if self._early_bytes > EARLY_LIMIT and self.level >= WARNING:
            self._write(WARNING, "", "some messages from before the log was open are lost", _place(2), "")
        self._started = time.monotonic()

    def step(self, name: str, pid: int = 0) -> _Step:
        """Say that stage *name* (of task *pid*) begins; all lines carry it until the next step.

        As a context manager (``with log.step(...)``) the step before comes back at its end.
        """
        before = self._step
        self._step = f"{name}: {pid}: " if pid else f"{name}: "
        if self.level >= DEBUG:
            self.debug("begins")
        return _Step(self, before)

    def error(self, text: str, place: str = "") -> None:
        """Say what failed. *place* (``file:line``) is the caller's unless given."""
        if self.level >= ERROR or self._early is not None:
            self._say(ERROR, text, place or _place(2))

    def warn(self, text: str) -> None:
        """Say what is odd but was dealt with."""
        if self.level >= WARNING or self._early is not None:
            self._say(WARNING, text, _place(2))

    def info(self, text: str) -> None:
        """Say what was done."""
        if self.level >= INFO or self._early is not None:
            self._say(INFO, text, "")

    def debug(self, text: str) -> None:
        """Say a detail. Costly texts deserve an ``if log.level >= DEBUG`` of their own."""
        if self.level >= DEBUG or self._early is not None:
            self._say(DEBUG, text, "")

    def record(self, level: int, text: str) -> None:
        """Write a line that only readers of the file want, such as the closing line of a command."""
        if self._records >= 0 and level <= self.level:
            self._put(level, text, _place(2), self._stamp())

    def _say(self, level: int, text: str, place: str) -> None:
        if self._early is None:
            self._write(level, self._step, text, place, self._stamp())
            return
        self._early_bytes += len(text) + 1
        if self._early_bytes <= EARLY_LIMIT:
            self._early.append((level, text, place))

    def _stamp(self) -> str:
        if self.level < INFO:
            return ""
        seconds, micros = divmod(int((time.monotonic() - self._started) * 1e6), 1_000_000)
        # The field is ten characters wide: from 100 s on it loses its last digits.
        return f"({seconds:02d}.{micros:06d}"[:10] + ") "

    def _write(self, level: int, step: str, text: str, place: str, stamp: str) -> None:
        if self._records >= 0:
            self._put(level, step + text, place, stamp)
        if self._friendly >= 0:
            if level <= WARNING:
                _send(self._friendly, f"{self.program}: {_FRIENDLY[level]}{_printable(text)}\n")
            elif self._records < 0:
                _send(self._friendly, f"{stamp}{_printable(step + text)}\n")

    def _put(self, level: int, text: str, place: str, stamp: str) -> None:
        """Write records, one for each line of *text*, so that a search for ``Error`` finds them all."""
        head = f"{stamp}{_TAGS[level]}({place}): " if level <= WARNING else stamp
        for line in text.split("\n"):
            _send(self._records, f"{head}{line}\n")


class _Step:
    """Ends a step: see :meth:`Log.step`."""

    __slots__ = ("_before", "_log")

    def __init__(self, log: Log, before: str) -> None:
        self._log = log
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._log._step = self._before


def place_of(filename: str, line: int) -> str:
    """The ``file:line`` of a source position, the file relative to where the package lies."""
    return f"{filename.removeprefix(_SOURCES)}:{line}"


def _place(depth: int) -> str:
    frame = sys._getframe(depth)
    return place_of(frame.f_code.co_filename, frame.f_lineno)


def _uuid4() -> str:
    """A random UUID (RFC 9562, version 4); the library's module costs more to import than this line."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _printable(text: str) -> str:
    """*text* without what would steer a terminal: names of files and programs are chosen by others."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _send(fd: int, line: str) -> None:
    """Write *line* in one call. A log that cannot be written must not end the work that it describes."""
    try:
        raw = line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = line.encode("utf-8", "backslashreplace")
    if len(raw) > LINE_LIMIT:
        raw = raw[: LINE_LIMIT - 4] + b"...\n"
    try:
        os.write(fd, raw)
    except OSError:
        pass
