"""kcmp(2): which tasks lead to one kernel object. Needs the right to trace them (PTRACE_MODE_READ_REALCREDS).

The kernel puts all objects of a kind into one order, so n of them are told apart with n log n questions.
"""

from __future__ import annotations

from firn.abi import nr
from firn.abi.libc import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypeVar

    T = TypeVar("T")


def search(known: Sequence[tuple[int, int, T]], what: int, pid: int, index: int = 0) -> tuple[T | None, int]:
    """Look for the object of kind *what* (KCMP_*) that *pid* has (KCMP_FILE: as descriptor *index*) among *known*:
    (pid, index, value) in the kernel's order. Returns (its value, 0) or (None, the place to insert it)."""
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        other, other_index, value = known[middle]
        order = _order(pid, other, what, index, other_index)
        if order == 0:
            return value, 0
        if order == _LESS:
            high = middle
        else:
            low = middle + 1
    return None, low


def same(pid: int, other: int, what: int) -> bool:
    """Whether two tasks share an object of kind *what*."""
    return _order(pid, other, what) == 0


def _order(pid: int, other: int, what: int, index: int = 0, other_index: int = 0) -> int:
    return syscall(f"kcmp of processes {pid} and {other}", nr.kcmp, pid, other, what, index, other_index)


_LESS = 1


def groups(pids: Iterable[int], what: int, known: Iterable[list[int]] = ()) -> list[list[int]]:
    """Those that have the same object of kind *what*, in the kernel's order of the objects; *known* groups are taken
    for such already."""
    found = [(group[0], 0, group) for group in known]
    for pid in pids:
        group, place = search(found, what, pid)
        if group is None:
            found.insert(place, (pid, 0, [pid]))
        else:
            group.append(pid)
    return [group for _, _, group in found]


def are_still(grouped: list[list[int]], what: int) -> bool:
    """Whether :func:`groups` would answer *grouped* now: one question for each pid, where to find it out takes many."""
    last = 0
    for group in grouped:
        if last and _order(last, group[0], what) != _LESS:
            return False
        if not all(same(group[0], other, what) for other in group[1:]):
            return False
        last = group[0]
    return True
