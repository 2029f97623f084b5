"""Fork snapshot: a copy-on-write clone of the target, so that the target runs on while its pages are written.

All inside the freeze: the target clones C1, which shares everything with it (CLONE_VM), C1 clones C2, a real copy, and
exits; the target reaps C1, so it has no new child; C2, orphaned, belongs to init or a subreaper, and lets go of all
files. Subreapers in the tree stop being ones for that moment. What a fork does not copy (shared memory,
MADV_DONTFORK, MADV_WIPEONFORK) is taken from the target before it goes on. C1 and C2 send no signal when they end, and
are traced from birth, so none of them runs anything but its program.
"""

from __future__ import annotations

import os

from firn.abi import nr, prctl, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import TargetError
from firn.tracee import ptrace
from firn.tracee.program import Program, Runner, Scratch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.tracee.seize import Task

_CLOSE_RANGE_UNSHARE = 2
_AREA = 1024


class Snapshot:
    """The clone ``pid``, stopped under our trace (0 after :meth:`end`)."""

    __slots__ = ("pid",)

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @staticmethod
    def take(task: Task, options: int) -> Snapshot:
        """Make the clone of the frozen *task*, traced with *options*; OSError if the target may not fork (limits,
        memory)."""
        scratch = task.prepare()
        target = task.program(size=_AREA)
        first, snapshot = 0, Snapshot(0)
        ptrace.request("options", pt.SETOPTIONS, task.voice, 0, options | pt.O_TRACECLONE)
        try:
            first = _clone(task, target, sched.CLONE_VM | sched.CLONE_FS | sched.CLONE_FILES)
            middle = Program(_runner(task, first), scratch, scratch.area(_AREA), _AREA)
            snapshot.pid = _clone(task, middle, sched.CLONE_FS | sched.CLONE_FILES)
            _close_files(task, snapshot.pid)
        except BaseException:
            snapshot.end()
            raise
        finally:
            if first:
                Snapshot(first).end()
                target.call("wait4", nr.wait4, first, 0, pt.WALL, 0)
                target.run()
            ptrace.request("options", pt.SETOPTIONS, task.voice, 0, options)
        return snapshot

    def end(self) -> None:
        """Kill the clone and take our notice of its death; whoever adopted it reaps it."""
        if self.pid:
            pid, self.pid = self.pid, 0
            os.kill(pid, sig.SIGKILL)
            while True:
                try:
                    ptrace.wait_stop(pid)
                except TargetError:
                    return


class NoReapers:
    """While clones are made, no process of the tree is a subreaper: it would get them as children when they are
    orphaned."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.reapers: list[Task] = []

    def __enter__(self) -> None:
        for task in self.tasks:
            program = task.program(size=_AREA)
            at = program.buffer(8)
            program.call("prctl subreaper", nr.prctl, prctl.GET_CHILD_SUBREAPER, at, 0, 0, 0)
            program.run()
            if program.read(at, 4) != bytes(4):
                self.reapers.append(task)
                self._set(task, 0)

    def _set(self, task: Task, value: int) -> None:
        program = task.program(size=_AREA)
        program.call("prctl subreaper", nr.prctl, prctl.SET_CHILD_SUBREAPER, value, 0, 0, 0)
        program.run()

    def __exit__(self, *_: object) -> None:
        while self.reapers:
            self._set(self.reapers.pop(), 1)


def _runner(task: Task, pid: int) -> Runner:
    leader = task.runner(task.leader)
    return Runner(pid, pid, leader.base, leader.stop_signal)


def _clone(task: Task, program: Program, flags: int) -> int:
    """Run *program*, ending with a clone(2); the pid of the child, which waits at the end of the interpreter."""
    call = program.call("clone", nr.clone, flags, 0, 0, 0, 0, flags=cpu.F_CHILD)
    program.run()
    child = program.results[call]
    runner = _runner(task, child)
    while ptrace.wait_stop(child).event != pt.EVENT_STOP:
        ptrace.request("continue", pt.CONT, child)
    ptrace.request("continue", pt.CONT, child)
    assert task.scratch is not None
    runner.finish(task.scratch.code)
    return child


def _close_files(task: Task, pid: int) -> None:
    """The copy holds no file open: the ends of pipes and sockets must not live longer than they would without it."""
    assert task.scratch is not None
    own = Scratch(pid, task.scratch.code, task.scratch.data, task.scratch.size)
    program = Program(_runner(task, pid), own, own.data, _AREA)
    program.call("close_range", nr.close_range, 0, 0xFFFFFFFF, _CLOSE_RANGE_UNSHARE)
    program.run()


def take_all(targets: list[tuple[Task, int]]) -> list[Snapshot]:
    """Clones of all *targets* (task, PTRACE_O_* it is traced with); all or none."""
    snapshots: list[Snapshot] = []
    try:
        with NoReapers([task for task, _ in targets]):
            for task, options in targets:
                snapshots.append(Snapshot.take(task, options))
    except BaseException:
        for snapshot in snapshots:
            snapshot.end()
        raise
    return snapshots
