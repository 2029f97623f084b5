"""What keeps a wait for another process from lasting for ever, by SIGALRM: a limit (``--timeout``), and a watch for
traced threads that somebody else has killed."""

from __future__ import annotations

import _signal
import os

from firn.abi import ptrace as pt
from firn.errors import TargetError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ITIMER_REAL = 0
_SIGALRM = 14
_ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
_EVERY = 1.0
"""Seconds."""
_PATIENCE = 5
"""How often something is missed before it is an error."""


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


class DeathWatch:
    """Takes, every now and then, the ends of threads that we trace and somebody has killed (the OOM killer, say).

    The kernel tells a tracer of a leader's end only after it was told of those of all other threads (ptrace(2)), so a
    wait for a leader would never return. Nothing is watched outside of the main thread, which alone gets signals.
    """

    def __init__(self, others: Callable[[], Iterable[int]], missed: Callable[[], int] = lambda: 0) -> None:
        """*others*: the ids of the traced threads that are not leaders, now. *missed*: a process without which nothing
        can go on (0: none); if it is told of several times, the wait, whatever it is, ends with :class:`TargetError`.
        """
        self._others = others
        self._missed = missed
        self._patience = _PATIENCE
        self._old: object = None
        self._on = False

    def start(self) -> None:
        """From now on."""
        try:
            self._old = _signal.signal(_SIGALRM, self._look)
        except ValueError:
            return
        self._on = True
        _signal.setitimer(_ITIMER_REAL, _EVERY, _EVERY)

    def _look(self, _number: int, _frame: object) -> None:
        for tid in self._others():
            try:
                # Only a look at first: a tracer is given stops too, whatever it asks for (wait_task_stopped in
                # kernel/exit.c), and one that was taken here would be waited for elsewhere for ever.
                seen = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | pt.WALL)
                if seen is not None and seen.si_code in _ENDS:
                    os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | pt.WALL)
            except ChildProcessError:
                continue
        pid = self._missed()
        if pid:
            self._patience -= 1
        if pid and not self._patience:
            raise TargetError(f"process {pid} ended meanwhile")

    def stop(self) -> None:
        """No longer."""
        if self._on:
            _signal.setitimer(_ITIMER_REAL, 0)
            _signal.signal(_SIGALRM, self._old)
            self._on = False
