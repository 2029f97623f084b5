"""A guard: a process of ours that, if we are killed, still does what must come before anything that our tracees do.

Kernel: a killed task stops once more, right at the beginning of its end, if its tracer has asked for that
(PTRACE_O_TRACEEXIT, also for SIGKILL: get_signal in kernel/signal.c takes that away first). It still has its
descriptors then, and what it traces stands still: do_exit (kernel/exit.c) closes files after this stop, and lets go of
tracees after that. No further signal wakes it. So the guard is our tracer, and does its duty in that stop.

What goes wrong: a guard that is killed too, before or at the same moment (by cgroup.kill, say), does nothing. Who is
traced already (strace) gets none. So it is in a session of its own, with another name, and blocks all signals.
"""

from __future__ import annotations

import _signal
import _thread
import os

from firn.abi import nr, prctl
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi.libc import address_of, syscall
from firn.tracee import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_NAME = b"net-guard\0"
_OVER = b"\1"
_SIZE = 63
"""Bytes of a note."""


class Guard:
    """Watches the calling thread, which must be the one that traces, from :meth:`start` to :meth:`end`.

    *duty* is called in the guard, which is a copy of this process as of its start, when the thread dies: with what was
    noted last (63 bytes, zeros at first), and a pidfd through which copies of our descriptors can be had. The guard
    keeps open only the descriptors *keep*.
    """

    def __init__(self, duty: Callable[[bytes, int], None], keep: Iterable[int] = ()) -> None:
        self._duty = duty
        self._keep = keep
        self._page = self._pid = -1
        self._works = False

    def start(self) -> bool:
        """Whether there is a guard from now on."""
        self._page = os.memfd_create("guard", os.MFD_CLOEXEC)
        heard, said = os.pipe2(os.O_CLOEXEC)
        tid, pid = _thread.get_native_id(), os.getpid()
        mask = _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
        try:
            self._pid = os.fork()
            if not self._pid:
                _stand_guard(pid, tid, self._duty, (self._page, said, *self._keep), said)
            os.close(said)
            said = -1
            self._works = bool(os.read(heard, 1))
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
            for fd in (heard, said):
                if fd >= 0:
                    os.close(fd)
        return self._works

    def note(self, text: bytes) -> None:
        """Tell the guard, in one step, what its duty is about."""
        if self._works:
            os.pwrite(self._page, text.ljust(_SIZE, b"\0"), 1)

    def end(self) -> None:
        """The guard goes. To leave us without swallowing a signal it must find us in a stop, which a signal makes that
        means nothing to us."""
        if self._works:
            self._works = False
            os.pwrite(self._page, _OVER, 0)
            mask = _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (sig.SIGURG,))
            syscall("tgkill", nr.tgkill, os.getpid(), _thread.get_native_id(), sig.SIGURG)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        if self._pid > 0:
            pid, self._pid = self._pid, -1
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass  # who uses us as a library takes the ends of all children
        if self._page >= 0:
            os.close(self._page)
            self._page = -1


def _stand_guard(pid: int, tid: int, duty: Callable[[bytes, int], None], keep: tuple[int, ...], said: int) -> None:
    """The guard's whole life; all signals are blocked."""
    try:
        os.setsid()
        name = bytearray(_NAME)
        syscall("prctl", nr.prctl, prctl.SET_NAME, address_of(name), 0, 0, 0)
        _close_others(keep)
        ptrace.request("seize", pt.SEIZE, tid, 0, pt.O_TRACEEXIT)
        pidfd = syscall("pidfd_open", nr.pidfd_open, pid, 0)
        os.write(said, b"+")
        os.close(said)
        _watch(tid, keep[0], lambda text: duty(text, pidfd))
    finally:
        os._exit(0)  # which lets go of whom we trace


def _close_others(keep: tuple[int, ...]) -> None:
    last = -1
    for fd in sorted(keep):
        if fd > last + 1:
            syscall("close_range", nr.close_range, last + 1, fd - 1, 0)
        last = fd
    syscall("close_range", nr.close_range, last + 1, 0xFFFFFFFF, 0)


def _watch(tid: int, page: int, duty: Callable[[bytes], None]) -> None:
    """Until thread *tid* dies or has no more need of us; signals reach it, and stop signals stop it, as ever."""
    while True:
        stop = ptrace.wait_stop(tid)
        said = os.pread(page, 1 + _SIZE, 0)
        if stop.event == pt.EVENT_EXIT:
            duty(said[1:])
            return
        number = 0 if stop.event else stop.signal
        if said[:1] == _OVER:
            ptrace.request("detach", pt.DETACH, tid, 0, 0 if number == sig.SIGURG else number)
            return
        stopped = stop.event and stop.signal in sig.STOP_SIGNALS
        ptrace.request("go on", pt.LISTEN if stopped else pt.CONT, tid, 0, number)
