"""kcmp(2): which tasks lead to one kernel object. Needs the right to trace them (PTRACE_MODE_READ_REALCREDS).

The kernel puts all objects of a kind into one order, so n of them are told apart with n log n questions.
"""

from __future__ import annotations

from firn.abi import nr
from firn.abi.libc import syscall


def search(known: list[tuple[int, int, int]], what: int, pid: int, index: int = 0) -> tuple[int | None, int]:
    """Look for the object of kind *what* (KCMP_*) that *pid* has (KCMP_FILE: as descriptor *index*) among *known*:
    (pid, index, value) in the kernel's order. Returns (its value, 0) or (None, the place to insert it)."""
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        other, other_index, value = known[middle]
        order = syscall(f"kcmp of processes {pid} and {other}", nr.kcmp, pid, other, what, index, other_index)
        if order == 0:
            return value, 0
        if order == 1:
            high = middle
        else:
            low = middle + 1
    return None, low


def same(pid: int, other: int, what: int) -> bool:
    """Whether two tasks share an object of kind *what*."""
    return syscall(f"kcmp of processes {pid} and {other}", nr.kcmp, pid, other, what, 0, 0) == 0
