"""Undo lists of System V semaphores (semop(2) SEM_UNDO): read, so that a dump can refuse what they hold.

State: what the kernel gives back to semaphores when the process ends: an amount for each semaphore, kept apart from its
value. It is refused: the end of the dumped tree gives it back, and somebody else may have taken it by the restore.

Kernel (ipc/sem.c): kcmp(2) tells whether two tasks share a list, and every process that ever made a thread has one
(CLONE_SYSVSEM), mostly an empty one. No interface shows what it holds. It is read in the kernel's memory
(:mod:`firn.host.undolists`), which touches nothing; but not every kernel lets us look.

Where it does not, semop(2) has to tell, which takes account of the list: an operation with SEM_UNDO that would bring
the amount out of -32768..32767 fails with ERANGE. And it is all or nothing: operations of which the last one cannot
succeed change neither values, amounts, times nor pids, and with IPC_NOWAIT nobody waits. So the frozen task itself asks
(:func:`within`): it moves the amount by as much as it may be moved if it lies in a certain range, while operations
without SEM_UNDO keep the value within a small stride, and then adds 1 and waits for zero. That fails in any case: with
EAGAIN only if the amount lies in the range, whatever others do to the value.

What can go wrong then: a value closer to its limit (32767) than the stride gives ERANGE as well; the stride is made
smaller as far as the number of operations in one call allows. A set that the process may not use (any more) cannot be
asked about. Left behind is an empty entry of the list for each set, until the process ends or the set goes; and the end
of a process notes the time (sem_otime) in each set that it has an entry of. So only sets that have been used are asked
about: to some programs the time 0 means that a set is not ready yet.
"""

from __future__ import annotations

import errno
import os

from firn.abi import fcntl as fc
from firn.abi import ipc, nr
from firn.abi import x86_64 as cpu
from firn.abi.libc import syscall
from firn.errors import KernelError, Obstacle
from firn.host import kcmp, procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from firn.host.undolists import UndoLists
    from firn.tracee.program import Program

LOWEST, HIGHEST = -ipc.SEMAEM - 1, ipc.SEMAEM
_STRIDE = 16384
_NAMED = 8
"""So many semaphores of a set are named at most."""
_SLACK = 2
"""Seconds: start times come from another clock than the sets' times."""
_OWNER, _GROUP, _OTHERS = 0o200, 0o020, 0o002
"""The right to alter a set."""
_CAP_IPC_OWNER = 15


class SemaphoreSet:
    """A line of /proc/sysvipc/sem; ``used`` is the time of the last operation, in seconds (0: never)."""

    __slots__ = ("count", "groups", "id", "mode", "owners", "used")

    def __init__(self, line: str) -> None:
        # Key, id, permissions, number of semaphores, uid, gid, cuid, cgid, last operation, last change.
        words = line.split()
        self.id = int(words[1])
        self.mode = int(words[2], 8)
        self.count = int(words[3])
        self.owners = {words[4], words[6]}
        self.groups = {words[5], words[7]}
        self.used = int(words[8])

    def could_let(self, status: dict[str, str]) -> bool:
        """Whether a process with *status* (/proc/PID/status) that may not operate on the set has ids or capabilities
        which it could take on again, and then might."""
        rights = _OTHERS
        if self.owners.intersection(status["Uid"].split()):
            rights |= _OWNER
        if self.groups.intersection([*status["Gid"].split(), *status["Groups"].split()]):
            rights |= _GROUP
        return bool(self.mode & rights or int(status["CapPrm"], 16) >> _CAP_IPC_OWNER & 1)

    def last_users(self) -> set[int]:
        """The processes that operated last on each semaphore."""
        try:
            return {syscall(f"semctl of {self.id}", nr.semctl, self.id, at, ipc.GETPID, 0) for at in range(self.count)}
        except OSError:
            return set()  # it was just removed, and with it what there was to give back


def all_sets() -> list[SemaphoreSet]:
    """The sets of our IPC namespace."""
    try:
        lines = procfs.read("/proc/sysvipc/sem").decode().splitlines()[1:]
    except FileNotFoundError:  # a kernel without such semaphores
        return []
    return [SemaphoreSet(line) for line in lines]


def used_sets() -> list[SemaphoreSet]:
    """The sets that somebody has used; of the others there is nothing to give back."""
    return [each for each in all_sets() if each.used]


def sight(tids: list[int]) -> UndoLists | None:
    """What sees undo lists, if threads *tids* seem to have some and the kernel lets us. Takes 20 ms."""
    try:
        if not used_sets() or not holders(tids):
            return None
    except OSError:
        pass  # one of them has just ended
    from firn.host.undolists import UndoLists

    try:
        return UndoLists()
    except (KernelError, OSError):
        return None


def holders(tids: list[int]) -> list[int]:
    """One thread for each undo list that the threads *tids* have.

    We have no undo list as long as we have no threads. If our caller has some, a thread without a list is in the result
    too, which does no harm. Raises OSError if a thread is gone.
    """
    known = [(os.getpid(), 0, 0)]
    found = []
    for tid in tids:
        value, place = kcmp.search(known, fc.KCMP_SYSVSEM, tid)
        if value is None:
            known.insert(place, (tid, 0, 1))
            found.append(tid)
    return found


def see_undo(lists: UndoLists, tid: int, pid: int, sets: list[SemaphoreSet]) -> list[Obstacle] | None:
    """The obstacles that are in the undo list of thread *tid* of process *pid*, of all *sets*; None if that cannot be
    seen."""
    try:
        seen = lists.of(tid, {each.id: each.count for each in sets})
    except (KernelError, OSError):
        return None
    found = []
    for number, amounts in seen.items():
        named = _amounts({at: amount for at, amount in enumerate(amounts) if amount})
        found.append(Obstacle(f"process {pid}", f"has to {_give(number)}: {named}", f"{_BEFORE}, or {_REMOVE}"))
    return found


def ask_undo(program: Program, pid: int, status: dict[str, str], sets: list[SemaphoreSet]) -> list[Obstacle]:
    """As :func:`see_undo`, of the thread with *program* and *status* and the used *sets*, by asking it."""
    # SEMMSL, SEMMNS, SEMOPM, SEMMNI. And one call must fit into the program.
    limit = min(int(procfs.read("/proc/sys/kernel/sem").split()[2]), (program.size - 512) // ipc.SEMBUF.size)
    questions = [_Question(program, each, limit) for each in sets]
    for question in questions:
        question.ask()
    program.run()
    for question in questions:
        question.answer()
    denied = any(question.error == errno.EACCES for question in questions)
    began = _began(pid) - _SLACK if denied else 0
    found = []
    for question in questions:
        each = question.of
        if question.error in _GONE:
            continue
        given = f"may have to {_give(each.id)}"
        if not question.error:
            if question.amounts:
                sure = "has" if any(question.amounts.values()) else "may have"
                named = _amounts(question.amounts, question.more)
                found.append((f"{sure} to {_give(each.id)}: {named}", f"{_BEFORE}, or {_REMOVE}"))
        elif question.error == errno.E2BIG:
            few = "to find out takes more operations at once than kernel.sem allows"
            found.append((f"{given}: {few}", f"raise its third number to 32, or {_REMOVE}"))
        elif question.error != errno.EACCES:
            why = os.strerror(question.error)
            found.append((f"{given}: asking about it failed ({why})", _REMOVE))
        elif each.used >= began and (each.could_let(status) or pid in each.last_users()):
            found.append((f"{given}: it may not use the set now, so nothing can tell", _REMOVE))
    return [Obstacle(f"process {pid}", reason, help) for reason, help in found]


_BEFORE, _REMOVE = "have it do so before", "remove the set (ipcrm -s)"


def _give(number: int) -> str:
    return f"give back semaphores of set {number} when it ends (SEM_UNDO), which cannot be saved"


def _amounts(amounts: Mapping[int, int | None], more: bool = False) -> str:
    """Text of what is given back to each semaphore; None: that cannot be told. *more*: there may be others."""
    named = [
        f"{amount:+d} to semaphore {number}"
        if amount is not None
        else f"perhaps something to semaphore {number}, whose value is too high to tell"
        for number, amount in sorted(amounts.items())[:_NAMED]
    ]
    return ", ".join(named) + (", and others" if more or len(amounts) > _NAMED else "")


_GONE = (errno.EINVAL, errno.EIDRM, errno.EFBIG)
"""The set was removed meanwhile, and what there was to give back with it. (Its id may be a smaller set's now.)"""


def _began(pid: int) -> int:
    """When *pid* began, in seconds of the wall clock."""
    ticks: int = procfs.stat(pid).start_time
    for line in procfs.read("/proc/stat").decode().splitlines():
        if line.startswith("btime "):
            return int(line[6:]) + ticks // os.sysconf("SC_CLK_TCK")
    return 0


# -- asking ------------------------------------------------------------------------------------------------------------


class _Question:
    """What one thread has to give back to one set.

    ``amounts``: for each semaphore what is added to its value at the end; None if that cannot be told. ``error``: why
    the set could not be asked about, or 0. ``more``: not all semaphores were asked about.
    """

    def __init__(self, program: Program, of: SemaphoreSet, limit: int) -> None:
        """*limit*: how many operations one call can have."""
        self.program = program
        self.of = of
        self.amounts: dict[int, int | None] = {}
        self.error = 0
        self.more = False
        self.limit = limit - len(FAIL)
        self.groups: list[range] = []
        self.calls: list[int] = []

    def ask(self) -> None:
        """Add the calls for :meth:`answer`: most lists are empty, and one call tells that of many semaphores."""
        if not self._fits(_STRIDE):
            self.error = errno.E2BIG
            return
        none = within(0, 0, _STRIDE)
        each = self.limit // len(none)
        self.groups = [range(at, min(at + each, self.of.count)) for at in range(0, self.of.count, each)]
        self.calls = [self._add(group, none) for group in self.groups]

    def answer(self) -> None:
        """Take what these calls tell once they are run; find the amounts where the list is not empty."""
        for group, call in zip(self.groups, self.calls, strict=True):
            error = -self.program.results[call]
            if self.error or error == errno.EAGAIN:
                continue
            if error != errno.ERANGE:
                self._failed(error)
            elif len(self.amounts) < _NAMED:
                self._narrow(group)
            else:
                self.more = True

    def _fits(self, stride: int) -> bool:
        """Whether the longest question fits into a call: twice through the whole range with two operations for each
        stride, and up to four more at the ends of the two ways."""
        return stride * (self.limit - 4) >= 4 * (HIGHEST - LOWEST + 1)

    def _failed(self, error: int) -> None:
        self.error = error
        self.amounts.clear()

    def _narrow(self, numbers: range) -> None:
        """Find the amounts of semaphores *numbers*, all at once: one of the two halves of a range always says yes."""
        ranges = dict.fromkeys(numbers, (LOWEST, HIGHEST))
        strides = dict.fromkeys(numbers, _STRIDE)
        while ranges:
            halves = []
            for number, (low, high) in ranges.items():
                middle = (low + high) // 2
                halves += [(number, low, middle), (number, middle + 1, high)]
            calls = [self._add([number], within(low, high, strides[number])) for number, low, high in halves]
            self.program.run()
            lost = set(ranges)
            for (number, low, high), call in zip(halves, calls, strict=True):
                error = -self.program.results[call]
                if error == errno.EAGAIN:
                    lost.discard(number)
                    ranges[number] = low, high
                elif error != errno.ERANGE:
                    self._failed(error)
                    return
            for number in lost:
                # The value is too high for the stride, or somebody set it (SETVAL), which clears all amounts.
                ranges[number] = LOWEST, HIGHEST
                strides[number] //= 2
            for number, (low, high) in list(ranges.items()):
                known = low == high
                if known or not self._fits(strides[number]):
                    del ranges[number]
                    if not known or low:
                        self.amounts[number] = low if known else None

    def _add(self, numbers: Sequence[int], steps: list[tuple[int, int]]) -> int:
        """Add a call that does *steps* to each of the semaphores, and fails; its number."""
        ops = [(number, *step) for number in numbers for step in steps]
        ops += [(numbers[-1], *step) for step in FAIL]
        at = self.program.data(b"".join(ipc.SEMBUF.pack(*op) for op in ops))
        return self.program.call(f"semop on {self.of.id}", nr.semop, self.of.id, at, len(ops), flags=cpu.F_IGNORE)


FAIL = [(1, ipc.IPC_NOWAIT), (0, ipc.IPC_NOWAIT)]
"""Add 1, and do not wait for zero: EAGAIN, always."""


def within(low: int, high: int, stride: int) -> list[tuple[int, int]]:
    """Operations (change, flags) that give no ERANGE if the amount lies in *low*..*high* and the value is at most
    32767 - *stride*: they move the amount as far down, and then as far up, as such an amount can be moved."""
    down = low - LOWEST
    up = down + HIGHEST - high
    at = 0  # how much the value is above what it was
    steps = []
    keep, take_back = ipc.IPC_NOWAIT, ipc.IPC_NOWAIT | ipc.SEM_UNDO
    while down:
        if at == stride:
            steps.append((-at, keep))
            at = 0
        part = min(down, stride - at)
        steps.append((part, take_back))
        at, down = at + part, down - part
    while up:
        if not at:
            steps.append((stride, keep))
            at = stride
        part = min(up, at)
        steps.append((-part, take_back))
        at, up = at - part, up - part
    if at:
        # Room for the addition that follows.
        steps.append((-at, keep))
    return steps
