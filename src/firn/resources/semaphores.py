"""Undo lists of System V semaphores (semop(2) SEM_UNDO): found, so that a dump can refuse them.

State: what the kernel gives back to semaphores when the process ends. Kernel: nothing shows an undo list but kcmp(2),
which tells whether two tasks share it; and every process that ever made a thread has one (CLONE_SYSVSEM), mostly an
empty one. What can be in it are the sets that somebody has used since the process began (/proc/sysvipc/sem): of these,
those that the process itself used last (semctl(2) GETPID), and those that it may use by their permissions.
"""

from __future__ import annotations

import errno
import os

from firn.abi import fcntl as fc
from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import Obstacle
from firn.host import procfs

GETPID = 11
"""include/uapi/linux/sem.h"""
_ALTER = 2
_SLACK = 2
"""Seconds: start times come from another clock than the sets' times."""


class SemaphoreSet:
    """A line of /proc/sysvipc/sem; ``used`` is the time of the last operation, in seconds (0: never)."""

    __slots__ = ("count", "groups", "id", "mode", "owners", "used")

    def __init__(self, line: str) -> None:
        # Key, id, permissions, number of semaphores, uid, gid, cuid, cgid, last operation, last change.
        words = line.split()
        self.id = int(words[1])
        self.mode = int(words[2], 8)
        self.count = int(words[3])
        self.owners = int(words[4]), int(words[6])
        self.groups = int(words[5]), int(words[7])
        self.used = int(words[8])

    def lets(self, status: dict[str, str]) -> bool:
        """Whether the process with *status* (/proc/PID/status) may operate on it, if it does without capabilities."""
        groups = {int(status["Gid"].split()[1]), *map(int, status["Groups"].split())}
        if int(status["Uid"].split()[1]) in self.owners:
            return bool(self.mode >> 6 & _ALTER)
        return bool((self.mode >> 3 if groups.intersection(self.groups) else self.mode) & _ALTER)

    def last_users(self) -> set[int]:
        """The processes that operated last on each semaphore."""
        try:
            return {syscall(f"semctl of {self.id}", nr.semctl, self.id, at, GETPID, 0) for at in range(self.count)}
        except OSError:
            return set()  # it was just removed, and with it what there was to give back


def find_undo(pid: int, tids: list[int], obstacles: list[Obstacle]) -> None:
    """Note an obstacle if the frozen process *pid* may have to give back semaphores; *tids* are its threads.

    We have no undo list as long as we have no threads; if our caller has some, the sets alone decide.
    Raises OSError if the process is gone.
    """
    try:
        if all(syscall(f"kcmp of {tid}", nr.kcmp, tid, os.getpid(), fc.KCMP_SYSVSEM, 0, 0) == 0 for tid in tids):
            return
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # a kernel without such semaphores
            raise
        return
    sets = [SemaphoreSet(line) for line in procfs.read("/proc/sysvipc/sem").decode().splitlines()[1:]]
    began = _began(pid) - _SLACK
    for each in sets:
        if each.used >= began and (each.lets(procfs.status(pid)) or pid in each.last_users()):
            reason = f"may have to give back semaphores of set {each.id} when it ends (SEM_UNDO), which cannot be saved"
            obstacles.append(Obstacle(f"process {pid}", reason, "remove the set (ipcrm -s)"))


def _began(pid: int) -> int:
    """When *pid* began, in seconds of the wall clock."""
    ticks: int = procfs.stat(pid).start_time
    for line in procfs.read("/proc/stat").decode().splitlines():
        if line.startswith("btime "):
            return int(line[6:]) + ticks // os.sysconf("SC_CLK_TCK")
    return 0
