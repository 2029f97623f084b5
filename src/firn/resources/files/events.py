"""Counters, signals and timers as descriptors: eventfd, signalfd, timerfd (images: EVENTFD, SIGNALFD, TIMERFD entries).

State owned: an eventfd's counter and mode; a signalfd's mask; a timerfd's clock, remaining time, interval, unread
expirations and the flags it was set with. Kernel: /proc/PID/fdinfo shows all of it (proc_pid_fdinfo(5)). Everything
comes back in the controller. What goes wrong: an interval timer that has expired shows neither when it expires next
nor how often it has expired until somebody asks for its time; and a timer must not fire early by the clock that its
owner sees, which starts again with the restored tasks, so timers are set only then.
"""

from __future__ import annotations

import fcntl
import os
import time

from firn.abi import events as ev
from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, KernelError
from firn.host import procfs
from firn.resources.base import Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.host.kernelmemory import KernelMemory
    from firn.resources.base import DumpContext, Open, RestoreContext

_CHANGEABLE = fc.O_APPEND | fc.O_NONBLOCK | 0o1000000
"""The status flags that fcntl(2) F_SETFL changes on any file: with O_NOATIME; O_ASYNC is set by its owner."""

_SECOND = 10**9
_FARTHEST = 1 << 33
"""Seconds; the kernel's own times end at 2**63 ns."""


def set_status(fd: int, flags: int) -> None:
    """Set the status flags of a new description that its making could not, from recorded *flags*."""
    if flags & _CHANGEABLE:
        fcntl.fcntl(fd, fc.F_SETFL, flags & _CHANGEABLE)


class EventFd(Kind):
    """eventfd(2). Older kernels do not show whether one is a semaphore (before Linux 6.5): it is looked up in their
    memory."""

    def __init__(self) -> None:
        self._memory: KernelMemory | None = None
        self._looked = False

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The counter and the mode."""
        counter = int(open.info["eventfd-count"], 16)
        if counter == ev.COUNTER_LIMIT:
            context.refuse(open, "is an eventfd whose counter the kernel has overflowed", "read it before the dump")
            return None
        shown = open.info.get("eventfd-semaphore")
        is_semaphore = shown != "0" if shown else self.is_semaphore(open.copy(), context.warn)
        semaphore = ev.EFD_SEMAPHORE if is_semaphore else 0
        return {"flags": open.flags | semaphore, "fown": context.owner(open), "counter": counter}

    def is_semaphore(self, fd: int, warn: Callable[[str], object]) -> bool:
        """Whether the eventfd *fd* of ours is a semaphore; if nobody may know, *warn* is told, once."""
        try:
            if not self._looked:
                self._looked = True
                from firn.host.kernelmemory import KernelMemory

                self._memory = KernelMemory()
            memory = self._memory
            return memory is not None and bool(
                memory.field(memory.object(fd), "eventfd_ctx", "flags", size=4) & ev.EFD_SEMAPHORE
            )
        except (KernelError, OSError) as error:
            self.close()
            why = error.message if isinstance(error, KernelError) else error.strerror
            warn(f"eventfds that are semaphores come back as plain counters, for this kernel does not show them: {why}")
            return False

    def close(self) -> None:
        """Let go of the kernel's memory."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """An eventfd with the counter."""
        counter, flags = message["counter"], message["flags"]
        if counter == ev.COUNTER_LIMIT:
            raise ImageError(f"files image: eventfd {number} has an impossible counter")
        fd = syscall(f"eventfd {number}", nr.eventfd2, 0, flags & ev.EFD_SEMAPHORE | fc.O_CLOEXEC)
        if counter:
            os.write(fd, counter.to_bytes(8, "little"))
        set_status(fd, flags)
        return fd


class SignalFd(Kind):
    """signalfd(2). The signals themselves wait in the processes that may read them."""

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """The mask."""
        return {"flags": open.flags, "fown": context.owner(open), "sigmask": int(open.info["sigmask"], 16)}

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """A signalfd with the mask."""
        mask = bytearray(message["sigmask"].to_bytes(8, "little"))
        fd = syscall(f"signalfd {number}", nr.signalfd4, -1, address_of(mask), 8, fc.O_CLOEXEC)
        set_status(fd, message["flags"])
        return fd


class TimerFd(Kind):
    """timerfd_create(2)."""

    def collect(self, open: Open, context: DumpContext) -> dict[str, Any] | None:
        """Clock, flags, unread expirations, interval and remaining time."""
        copy = open.copy()
        isec, insec, vsec, vnsec = _remaining(copy)
        if (isec or insec) and not (vsec or vnsec):
            # Due at this very moment, or off: the second look tells.
            isec, insec, vsec, vnsec = _remaining(copy)
        now = time.time_ns()
        info = procfs.fdinfo(open.tid, open.fd)
        ticks = int(info["ticks"])
        if (vsec or vnsec) and info["it_value"] == "(0, 0)":
            # It expired between the two looks; restored with the time of the first one, it does so once more.
            ticks -= 1
        message: dict[str, Any] = {
            "flags": open.flags, "fown": context.owner(open), "clockid": int(info["clockid"]), "ticks": ticks,
            "settime_flags": int(info["settime flags"], 8), "vsec": vsec, "vnsec": vnsec, "isec": isec, "insec": insec,
        }  # fmt: skip
        if _goes_by_the_wall(message) and (vsec or vnsec):
            message["firn"] = {"deadline_ns": now + vsec * _SECOND + vnsec}
        return message

    def is_late(self, message: dict[str, Any], context: RestoreContext) -> bool:
        """Whether it runs: the clocks of the restored tasks go on from when the first of them is made."""
        return any(_to_set(message))

    def open(self, number: int, message: dict[str, Any], context: RestoreContext) -> int:
        """A timer that goes on."""
        clock = message["clockid"]
        fd = syscall(f"timerfd_create {number} of clock {clock}", nr.timerfd_create, clock, fc.O_CLOEXEC)
        set_status(fd, message["flags"])
        vsec, vnsec = _to_set(message)
        if max(vsec, message["isec"]) > _FARTHEST or max(vnsec, message["insec"]) >= _SECOND:
            raise ImageError(f"files image: timerfd {number} has an impossible time")
        if (vsec or vnsec) and message["settime_flags"] & ev.TFD_TIMER_ABSTIME:
            now = time.clock_gettime_ns(ev.CLOCK_OF_ALARM.get(clock, clock))
            due = now + vsec * _SECOND + vnsec
            if _goes_by_the_wall(message):
                due = min(message.get("firn", {}).get("deadline_ns", due), _FARTHEST * _SECOND)
            vsec, vnsec = divmod(due, _SECOND)
        value = bytearray(ev.ITIMERSPEC.pack(message["isec"], message["insec"], vsec, vnsec))
        syscall(f"timerfd_settime {number}", nr.timerfd_settime, fd, message["settime_flags"], address_of(value), 0)
        if message["ticks"]:
            ticks = bytearray(message["ticks"].to_bytes(8, "little"))
            syscall(f"set ticks of timerfd {number}", nr.ioctl, fd, ev.TFD_IOC_SET_TICKS, address_of(ticks))
        return fd


def _remaining(copy: int) -> tuple[int, ...]:
    """timerfd_gettime(2). It also has the kernel count expirations and set an interval timer on, as a read would."""
    value = bytearray(ev.ITIMERSPEC.size)
    syscall("timerfd_gettime", nr.timerfd_gettime, copy, address_of(value))
    return ev.ITIMERSPEC.unpack(value)


def _goes_by_the_wall(message: dict[str, Any]) -> bool:
    """Whether the timer is due at a time of the wall clock, which goes on while the program is away."""
    clock: int = message["clockid"]
    return bool(message["settime_flags"] & ev.TFD_TIMER_ABSTIME) and ev.CLOCK_OF_ALARM.get(clock, clock) == 0


def _to_set(message: dict[str, Any]) -> tuple[int, int]:
    """Seconds and nanoseconds until the next expiration, (0, 0) if there is none.

    An interval timer that had expired when CRIU saw it has expirations and no time: its phase is lost, its period not.
    """
    value = message["vsec"], message["vnsec"]
    if message["ticks"] and not any(value):
        return message["isec"], message["insec"]
    return value
