"""Whether a parent knows that its child has stopped, or goes on (images: stop_told and continued, fields of firn's own
in task_core_entry).

State owned: the report of a stop, which waits until the parent takes it with waitid(2), and is then gone. Kernel: the
parent itself can look at it without taking it (WNOWAIT); who traces the child does not matter (wait_task_stopped in
kernel/exit.c). It comes back by stopping the child while it is still traced: its real parent is told then (ptrace_stop
in kernel/signal.c), and takes the report at once if it had been taken. Later, when the child is let go, it stops
without being noticed. What goes wrong: a stop brings a SIGCHLD, which the parent must not see again; it is taken as
well, but for one that was pending.

That a child goes on is reported likewise, to whoever asks (WCONTINUED). It comes back by stopping the child and sending
it SIGCONT, long before it is itself again.
"""

from __future__ import annotations

import os

from firn.abi import nr, wait
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.tracee import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.tracee.program import Program

SIZE = sig.SIGINFO_SIZE + 128
"""Room that the question about one child needs in a program."""
_EAGAIN = 11


def ask(program: Program, children: dict[int, bool]) -> dict[int, int]:
    """Add calls of the parent that look for the reports of *children*, pid -> whether it is stopped; where the answers
    will be."""
    program.reserve(len(children), len(children) * sig.SIGINFO_SIZE)
    places = {child: program.buffer(sig.SIGINFO_SIZE) for child in children}
    for child, at in places.items():
        how = wait.WSTOPPED if children[child] else wait.WCONTINUED
        how |= wait.WNOHANG | wait.WNOWAIT | pt.WALL
        program.call(f"waitid of {child}", nr.waitid, wait.P_PID, child, at, how, 0)
    return places


def answer(program: Program, asked: dict[int, int]) -> set[int]:
    """The children of whom there is a report."""
    return {child for child, at in asked.items() if program.read(at + wait.SI_PID, 4) != bytes(4)}


def stop_and_continue(tid: int) -> None:
    """Have traced process *tid*, of one thread, stop and go on, and be where it is now, between two programs. Its
    parent sees a SIGCHLD for either."""
    blocked = ptrace.get_sigmask(tid)
    ptrace.set_sigmask(tid, sig.ALL & ~sig.bit(sig.SIGCONT))
    for number in (sig.SIGSTOP, sig.SIGCONT):
        os.kill(tid, number)
        ptrace.request("continue", pt.CONT, tid)
        while (stop := ptrace.wait_stop(tid)).event or stop.signal != number:
            ptrace.request("continue", pt.CONT, tid)
        # It stops again before it is back in its own code.
        ptrace.request("interrupt", pt.INTERRUPT, tid)
        ptrace.request("continue", pt.CONT, tid, 0, sig.SIGSTOP if number == sig.SIGSTOP else 0)
        while ptrace.wait_stop(tid).event != pt.EVENT_STOP:
            ptrace.request("continue", pt.CONT, tid)
    ptrace.set_sigmask(tid, blocked)


def plan(program: Program, known: list[int], pending: bool) -> None:
    """The parent of children that have just stopped: take the reports of those that are *known*, and the SIGCHLD,
    unless there was one *pending* before."""
    for child in known:
        program.call(f"waitid of {child}", nr.waitid, wait.P_PID, child, 0, wait.WSTOPPED | wait.WNOHANG | pt.WALL, 0)
    if not pending:
        plan_no_sigchld(program)


def plan_no_sigchld(program: Program) -> None:
    """Take a SIGCHLD that came from the restore's own doing."""
    program.reserve(1, 64)
    wanted, none = program.data(sig.bit(sig.SIGCHLD).to_bytes(8, "little")), program.data(bytes(16))
    program.call("take SIGCHLD", nr.rt_sigtimedwait, wanted, 0, none, 8, allow=_EAGAIN)
