"""Threads with a working directory, root and umask of their own, or shared with some threads of the process only.

State owned: these, and which threads have them in common (the kernel's fs_struct; unshare(2) and clone(2), CLONE_FS).
Kernel: kcmp(2) with KCMP_FS tells who shares them, /proc/TID what they are. Images: a field of firn's own in
thread_core_entry, with an fs_entry and a number, the same in threads that share. They come back by birth: the first of
those who share is cloned without CLONE_FS, goes there by itself, and clones the others. What goes wrong: directories
that are also another process's are refused: a child would have to be born of that thread, but is before it exists.
"""

from __future__ import annotations

import os

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.errors import Obstacle
from firn.host import kcmp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

_CALLS = 16


def number(own: dict[int, dict[str, Any]], homes: dict[int, int], obstacles: list[Obstacle]) -> None:
    """Give the directories of single threads their numbers.

    *own* are their firn_directories by thread id, still without one. *homes* leads from every task whose directories
    these may be to its process. What is shared with another process is added to *obstacles*.
    """
    for group in kcmp.groups(homes, fc.KCMP_FS) if own else ():
        for tid in sorted(own.keys() & group):
            own[tid]["number"] = min(group)
            others = {homes[each] for each in group} - {homes[tid]}
            if others:
                refuse(homes[tid], tid, min(others), obstacles)


def refuse(pid: int, tid: int, other: int, obstacles: list[Obstacle]) -> None:
    """Note that the directories of thread *tid* of process *pid* are also those of process *other*."""
    reason = f"shares its directories (CLONE_FS) with process {other}, but not with its own process"
    obstacles.append(Obstacle(f"process {pid}: thread {tid}", reason, "end one of them before the dump"))


def plan(program: Program, root: int | None, cwd: int, umask: int) -> None:
    """Have a thread go to *root*, if that is another one than it has, and *cwd*: descriptors of ours.

    Its descriptor table may hold anything already, and is left as it is.
    """
    program.reserve(_CALLS, 16)
    firn = program.call("pidfd_open of firn", nr.pidfd_open, os.getpid(), 0)
    if root is not None:
        _enter(program, firn, root, "root")
        program.call("chroot", nr.chroot, program.text("."))
    _enter(program, firn, cwd, "working directory")
    program.pass_on(firn, 0)
    program.call("close", nr.close, 0)
    program.call("umask", nr.umask, umask)


def _enter(program: Program, firn: int, ours: int, name: str) -> None:
    program.pass_on(firn, 0)
    taken = program.call(f"take {name}", nr.pidfd_getfd, 0, ours, 0)
    program.pass_on(taken, 0)
    program.call(f"fchdir to {name}", nr.fchdir, 0)
    program.pass_on(taken, 0)
    program.call("close", nr.close, 0)
