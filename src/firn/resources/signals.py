"""Signals: actions and queues (images: task_core_entry.sigactions, signals_s, thread_core_entry.signals_p).

State owned: the 62 changeable actions with flags, restorer and mask; queued signals with their siginfo, per process and per
thread. Kernel: only the task can ask for its actions (rt_sigaction(2)); queues are read by PTRACE_PEEKSIGINFO. They come
back by rt_sigaction(2) and, from inside the task because only the receiver may use any si_code, by rt_sigqueueinfo(2) and
rt_tgsigqueueinfo(2) while everything is blocked.
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
_TABLE_SIZE = sig.SIGACTION.size * len(CHANGEABLE)


def ask(program: Program) -> int:
    """Add the calls that read all actions; pass the returned address to :func:`answer`."""
    program.reserve(len(CHANGEABLE), _TABLE_SIZE)
    table = program.buffer(_TABLE_SIZE)
    for index, number in enumerate(CHANGEABLE):
        program.call("rt_sigaction", nr.rt_sigaction, number, 0, table + index * sig.SIGACTION.size, 8)
    return table


def answer(program: Program, table: int) -> list[dict[str, Any]]:
    """The sa_entry list, signals ascending."""
    raw = program.read(table, _TABLE_SIZE)
    return [
        {"sigaction": handler, "flags": flags, "restorer": restorer, "mask": mask}
        for handler, flags, restorer, mask in sig.SIGACTION.iter_unpack(raw)
    ]


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
        if len(info) != sig.SIGINFO_SIZE or not 1 <= int.from_bytes(info[:4], "little") <= sig.LAST:
            raise ImageError("core image: a pending signal is no siginfo of 128 bytes")
    return found


def plan_queue(program: Program, pid: int, tid: int | None, entry: dict[str, Any] | None) -> None:
    """Queue pending signals again: for the process, or for thread *tid*."""
    for info in infos(entry):
        number = int.from_bytes(info[:4], "little")
        at = program.data(info)
        if tid is None:
            program.call(f"rt_sigqueueinfo {number}", nr.rt_sigqueueinfo, pid, number, at)
        else:
            program.call(f"rt_tgsigqueueinfo {number}", nr.rt_tgsigqueueinfo, pid, tid, number, at)


def free_stop_signal(queues: list[dict[str, Any] | None]) -> int:
    """A signal with which programs can end because none of *queues* holds it."""
    taken = {int.from_bytes(info[:4], "little") for entry in queues for info in infos(entry)}
    for number in (sig.SIGWINCH, sig.SIGURG, sig.SIGCHLD):
        if number not in taken:
            return number
    raise RestoreError("SIGWINCH, SIGURG and SIGCHLD are all pending in the checkpoint")
