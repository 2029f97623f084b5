"""Signals: actions and queues (images: task_core_entry.sigactions, signals_s, thread_core_entry.signals_p).

State owned: the 62 changeable actions with flags, restorer and mask; queued signals with their siginfo, per process
and per thread. Kernel: only the task can ask for its actions (rt_sigaction(2)); queues are read by PTRACE_PEEKSIGINFO.
They come back by rt_sigaction(2) and, from inside the task because only the receiver may use any si_code, by
rt_sigqueueinfo(2) and rt_tgsigqueueinfo(2) while everything is blocked.
"""

from __future__ import annotations

from firn.abi import nr
from firn.abi import signal as sig
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

CHANGEABLE = tuple(n for n in range(1, sig.LAST + 1) if n not in (sig.SIGKILL, sig.SIGSTOP))
SI_TIMER = -2
_TABLE_SIZE = sig.SIGACTION.size * len(CHANGEABLE)


def ask(program: Program) -> int:
    """Add the calls that read all actions; pass the returned address to :func:`answer`."""
    program.reserve(len(CHANGEABLE), _TABLE_SIZE)
    table = program.buffer(_TABLE_SIZE)
    for index, number in enumerate(CHANGEABLE):
        program.call("rt_sigaction", nr.rt_sigaction, number, 0, table + index * sig.SIGACTION.size, 8)
    return table


def answer(program: Program, table: int) -> bytes:
    """The actions, still raw: see :func:`save_actions`."""
    return program.read(table, _TABLE_SIZE)


def save_actions(raw: bytes) -> list[dict[str, Any]]:
    """The sa_entry list, signals ascending."""
    return [
        {"sigaction": handler, "flags": flags, "restorer": restorer, "mask": mask}
        for handler, flags, restorer, mask in sig.SIGACTION.iter_unpack(raw)
    ]


def settle_timers(program: Program, pid: int, tid: int, shared: list[bytes], private: list[bytes]) -> None:
    """Give pending signals of POSIX timers their overrun counts.

    A timer's overrun is put into the siginfo only when the signal is taken, and a queued one does not show it
    (posixtimer_deliver_signal, kernel/time/posix-timers.c). So the thread takes the signals and queues them again at
    once, in their order: they are then plain signals with the count that they had, and the timer goes on counting from
    there. *shared* is empty for all threads but one.
    """
    for number in sorted({info_number(info) for info in shared + private if _code(info) == SI_TIMER}):
        own = sum(info_number(info) == number for info in private)
        count = own + sum(info_number(info) == number for info in shared)
        program.reserve(2 * count, count * sig.SIGINFO_SIZE + 32)
        wanted, none = program.data(sig.bit(number).to_bytes(8, "little")), program.data(bytes(16))
        table = program.buffer(count * sig.SIGINFO_SIZE)
        places = [table + index * sig.SIGINFO_SIZE for index in range(count)]
        for at in places:
            program.call(f"rt_sigtimedwait {number}", nr.rt_sigtimedwait, wanted, at, none, 8)
        # In the same program: a timer that fires in between would queue its next signal before this one.
        for at in places[:own]:
            program.call(f"rt_tgsigqueueinfo {number}", nr.rt_tgsigqueueinfo, pid, tid, number, at)
        for at in places[own:]:
            program.call(f"rt_sigqueueinfo {number}", nr.rt_sigqueueinfo, tid, number, at)
        program.run()


def info_number(info: bytes) -> int:
    """si_signo of a siginfo_t."""
    return int.from_bytes(info[:4], "little")


def _code(info: bytes) -> int:
    return int.from_bytes(info[8:12], "little", signed=True)


def queue(infos: list[bytes]) -> dict[str, Any]:
    """The signal_queue_entry of pending signals."""
    return {"signals": [{"siginfo": info} for info in infos]}


def plan_actions(program: Program, entries: list[dict[str, Any]]) -> None:
    """Set all actions. Defaults are set too: what the controller ignores was inherited."""
    if len(entries) != len(CHANGEABLE):
        raise ImageError(f"core image: {len(entries)} signal actions instead of {len(CHANGEABLE)}")
    program.reserve(len(CHANGEABLE), _TABLE_SIZE)
    table = program.data(
        b"".join(sig.SIGACTION.pack(e["sigaction"], e["flags"], e["restorer"], e["mask"]) for e in entries)
    )
    for index, number in enumerate(CHANGEABLE):
        program.call(f"rt_sigaction {number}", nr.rt_sigaction, number, table + index * sig.SIGACTION.size, 0, 8)


def infos(entry: dict[str, Any] | None) -> list[bytes]:
    """The siginfo records of a signal_queue_entry, checked."""
    found = [item["siginfo"] for item in (entry or {}).get("signals", [])]
    for info in found:
        if len(info) != sig.SIGINFO_SIZE or not 1 <= info_number(info) <= sig.LAST:
            raise ImageError("core image: a pending signal is no siginfo of 128 bytes")
    return found


def plan_queue(program: Program, pid: int, tid: int, shared: bool, entry: dict[str, Any] | None) -> None:
    """Have thread *tid* of process *pid* queue pending signals again: for the process if *shared*, or for itself.

    Any siginfo may only be sent to the id of the thread itself, and rt_sigqueueinfo(2) takes that of any thread for its
    process (do_rt_sigqueueinfo in kernel/signal.c).
    """
    for info in infos(entry):
        number = info_number(info)
        at = program.data(info)
        if shared:
            program.call(f"rt_sigqueueinfo {number}", nr.rt_sigqueueinfo, tid, number, at)
        else:
            program.call(f"rt_tgsigqueueinfo {number}", nr.rt_tgsigqueueinfo, pid, tid, number, at)


def free_stop_signal(queues: list[dict[str, Any] | None]) -> int:
    """A signal with which programs can end because none of *queues* holds it. Restored tasks are always traced, so it
    may be one that would end a program."""
    taken = {info_number(info) for entry in queues for info in infos(entry)} | sig.STOP_SIGNALS
    for number in (sig.SIGWINCH, sig.SIGURG, sig.SIGCHLD, *CHANGEABLE):
        if number not in taken and number != sig.SIGCONT:
            return number
    raise RestoreError("all signals are pending in the checkpoint")
