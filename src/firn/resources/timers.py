"""Interval timers and POSIX timers (images: task_core_entry.timers).

State owned: ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF; every timer of timer_create(2) with its id, clock, notification
and overrun. Kernel: getitimer(2), timer_gettime(2), timer_getoverrun(2) inside the task; /proc/PID/timers for the list.
Times are kept as what remains. Ids come back by PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15), before that by creating and
deleting timers until the wanted id is reached.
"""

from __future__ import annotations

import struct

from firn.abi import nr, prctl
from firn.abi import signal as sig
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.host.procfs import PosixTimer
    from firn.tracee.program import Program

ITIMERS = ("real", "virt", "prof")
_SPEC = struct.Struct("<4q")
"""struct itimerval or itimerspec: interval seconds and fraction, value seconds and fraction."""
_MAX_OLD_ID = 4096


class Questions:
    """Addresses of the answers to :func:`ask`."""

    __slots__ = ("interval", "overruns", "posix", "timers")

    def __init__(self, interval: int, posix: int, overruns: list[int], timers: list[PosixTimer]) -> None:
        self.interval = interval
        self.posix = posix
        self.overruns = overruns
        self.timers = timers


def ask(program: Program, timers: list[PosixTimer]) -> Questions:
    """Add the calls that read all timers."""
    program.reserve(3 + 2 * len(timers), _SPEC.size * (3 + len(timers)))
    interval = program.buffer(3 * _SPEC.size)
    for which in range(3):
        program.call("getitimer", nr.getitimer, which, interval + which * _SPEC.size)
    posix = program.buffer(_SPEC.size * max(1, len(timers)))
    overruns = []
    for index, timer in enumerate(timers):
        program.call("timer_gettime", nr.timer_gettime, timer.id, posix + index * _SPEC.size)
        overruns.append(program.call("timer_getoverrun", nr.timer_getoverrun, timer.id))
    return Questions(interval, posix, overruns, timers)


def answer(program: Program, asked: Questions) -> dict[str, Any]:
    """The task_timers_entry."""
    entry: dict[str, Any] = {}
    raw = program.read(asked.interval, 3 * _SPEC.size)
    for name, (isec, iusec, vsec, vusec) in zip(ITIMERS, _SPEC.iter_unpack(raw), strict=True):
        if not vsec and not vusec:
            vsec, vusec = isec, iusec
        entry[name] = {"isec": isec, "iusec": iusec, "vsec": vsec, "vusec": vusec}
    posix = []
    raw = program.read(asked.posix, _SPEC.size * len(asked.timers))
    for timer, overrun, (isec, insec, vsec, vnsec) in zip(
        asked.timers, asked.overruns, _SPEC.iter_unpack(raw), strict=True
    ):
        item = {
            "it_id": timer.id, "clock_id": timer.clock & 0xFFFFFFFF, "si_signo": timer.signal,
            "it_sigev_notify": timer.notify, "sival_ptr": timer.value, "overrun": program.results[overrun] & 0xFFFFFFFF,
            "isec": isec, "insec": insec, "vsec": vsec, "vnsec": vnsec,
        }  # fmt: skip
        if timer.notify & sig.SIGEV_THREAD_ID:
            item["notify_thread_id"] = timer.target
        posix.append(item)
    entry["posix"] = posix
    return entry


def plan(program: Program, entry: dict[str, Any], exact_ids: bool) -> None:
    """Create and arm all timers; runs of the program happen where the old way of choosing ids needs an answer."""
    for which, name in enumerate(ITIMERS):
        timer = entry[name]
        if timer["isec"] or timer["iusec"] or timer["vsec"] or timer["vusec"]:
            at = program.data(_spec(timer["isec"], timer["iusec"], timer["vsec"], timer["vusec"]))
            program.call(f"setitimer {name}", nr.setitimer, which, at, 0)
    posix = sorted(entry.get("posix", []), key=lambda item: int(item["it_id"]))
    if posix and exact_ids:
        program.call("prctl restore timer ids", nr.prctl, prctl.TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0)
    for item in posix:
        _plan_one(program, item, exact_ids)
    if posix and exact_ids:
        program.call("prctl restore timer ids", nr.prctl, prctl.TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)


def _spec(*words: int) -> bytes:
    """Interval and time left, each in seconds and a fraction."""
    if any(word >> 63 for word in words):
        raise ImageError(f"core image: a timer with the impossible times {words}")
    return _SPEC.pack(*words)


def _plan_one(program: Program, item: dict[str, Any], exact_ids: bool) -> None:
    number, clock = item["it_id"], item["clock_id"]
    if number >> 31 or item["si_signo"] > sig.LAST or item["it_sigev_notify"] >> 31:
        raise ImageError(f"core image: POSIX timer {number} has an impossible id, signal or kind")
    clock -= (clock >> 31) << 32
    event = sig.SIGEVENT.pack(
        item["sival_ptr"], item["si_signo"], item["it_sigev_notify"], item.get("notify_thread_id", 0), 0
    )
    if exact_ids:
        program.reserve(2, len(event) + 64)
        at, wanted = program.data(event), program.data(struct.pack("<i", number))
        program.call(f"timer_create {number} of clock {clock}", nr.timer_create, clock, at, wanted)
    else:
        _reach(program, number, clock, event)
    if item["vsec"] or item["vnsec"]:
        spec = program.data(_spec(item["isec"], item["insec"], item["vsec"], item["vnsec"]))
        program.call(f"timer_settime {number}", nr.timer_settime, number, 0, spec, 0)
    elif item["isec"] or item["insec"]:
        spec = program.data(_spec(item["isec"], item["insec"], item["isec"], item["insec"]))
        program.call(f"timer_settime {number}", nr.timer_settime, number, 0, spec, 0)


def _reach(program: Program, number: int, clock: int, event: bytes) -> None:
    """Create timers, deleting those with other ids, until id *number* comes up."""
    for _ in range(_MAX_OLD_ID):
        program.reserve(2, len(event) + 64)
        at, out = program.data(event), program.buffer(8)
        program.call(f"timer_create of clock {clock}", nr.timer_create, clock, at, out)
        program.run()
        got: int = struct.unpack("<i", program.read(out, 4))[0]
        if got == number:
            return
        program.call(f"timer_delete {got}", nr.timer_delete, got)
    raise RestoreError(
        f"POSIX timer id {number} cannot be reached on this kernel", "kernels from 6.15 on can restore any id"
    )
