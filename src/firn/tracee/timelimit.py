"""A limit on how long something may take, by SIGALRM: waits for other processes end by it (``--timeout``)."""

from __future__ import annotations

import _signal

from firn.errors import TargetError

_ITIMER_REAL = 0
_SIGALRM = 14


class TimeLimit:
    """Raises :class:`TargetError` in the ``with`` block after *seconds* (0: never). *what* says what took too long."""

    def __init__(self, seconds: int, what: str) -> None:
        self.seconds = seconds
        self.what = what
        self._old: object = None

    def __enter__(self) -> None:
        if self.seconds > 0:
            self._old = _signal.signal(_SIGALRM, self._expired)
            _signal.setitimer(_ITIMER_REAL, self.seconds)

    def _expired(self, _number: int, _frame: object) -> None:
        raise TargetError(f"{self.what} took more than {self.seconds} s", "raise --timeout")

    def __exit__(self, *_: object) -> None:
        if self.seconds > 0:
            _signal.setitimer(_ITIMER_REAL, 0)
            _signal.signal(_SIGALRM, self._old)
