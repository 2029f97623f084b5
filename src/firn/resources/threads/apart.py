"""Threads that left their process's directories or descriptor table (unshare(2) with CLONE_FS or CLONE_FILES).

State owned: working directory, root and umask of such a thread (images: firn's own field of thread_core_entry). Kernel:
kcmp(2) tells that it has its own, /proc/TID what they are. The thread comes back by unshare(2), and then goes there.
Refused: a descriptor table of its own, and directories shared with anybody else but the process.
"""

from __future__ import annotations

import os

from firn.abi import fcntl as fc
from firn.abi import nr, sched
from firn.errors import Obstacle
from firn.host import kcmp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from firn.tracee.program import Program


def find(tree: Sequence[Any], mine: Any, obstacles: list[Obstacle]) -> list[int]:
    """The threads of *mine* (a collected process of *tree*) that have directories of their own; what cannot be saved of
    such threads is added to *obstacles*."""
    voice = mine.task.voice
    found: list[int] = []
    for thread in mine.task.threads:
        tid = thread.tid
        if tid == voice:
            continue
        who = f"process {mine.pid}: thread {tid}"
        if not kcmp.same(tid, voice, fc.KCMP_FILES):
            reason = "has a descriptor table of its own (unshare(2) with CLONE_FILES), which is not supported yet"
            obstacles.append(Obstacle(who, reason, "end the thread before the dump"))
        if kcmp.same(tid, voice, fc.KCMP_FS):
            continue
        others = [*found, *(other.task.voice for other in tree if other is not mine)]
        for other in others:
            if kcmp.same(tid, other, fc.KCMP_FS):
                reason = f"shares its directories (CLONE_FS) with task {other}, but not with its process"
                obstacles.append(Obstacle(who, reason, "end one of them before the dump"))
        found.append(tid)
    return found


def plan(program: Program, fs: dict[str, Any], root: int, cwd: int, changes_root: bool) -> None:
    """Have the thread take directories of its own, *fs* (an fs_entry); *root* and *cwd* are our descriptors of them.

    The thread's table may hold anything: numbers of what it takes for a moment are handed on inside the program.
    """
    program.reserve(12, 64)
    program.call("unshare directories", nr.unshare, sched.CLONE_FS)
    firn = program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)

    def use(source: int, label: str, number: int, *args: int) -> int:
        """Add call *number*, whose first argument is the result of call *source*."""
        program.copy(program.result_address(source), program.argument_address(program.next_call() + 1, 0))
        return program.call(label, number, 0, *args)

    taken = [firn]
    for ours, name in ((root, "root"), (cwd, "directory")):
        taken.append(use(firn, f"take {name}", nr.pidfd_getfd, ours, 0))
        use(taken[-1], f"fchdir to {name}", nr.fchdir)
        if name == "root" and changes_root:
            program.call("chroot", nr.chroot, program.text("."))
    for call in taken:
        use(call, "close", nr.close)
    program.call("umask", nr.umask, fs.get("umask", 0o22))
