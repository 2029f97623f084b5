"""The way into the kernel from the controller: one raw system call, errors as :class:`OSError`.

Everything goes through libc's ``syscall(2)``, because the calls that matter here (ptrace, clone3, pidfd_getfd,
process_vm_readv, ...) either have no wrapper or one that does more than the call.
"""

from __future__ import annotations

import ctypes
import os
from itertools import chain, starmap

# Pointers are what ctypes makes of a Python integer in the least time; they are 64-bit words like any other.
_WORDS = [ctypes.c_void_p] * 7
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes, _syscall.restype = _WORDS, ctypes.c_long
_forking = ctypes.PyDLL(None, use_errno=True).syscall
_forking.argtypes, _forking.restype = _WORDS, ctypes.c_long
ctypes.pythonapi.PyOS_AfterFork_Child.restype = None
get_errno = ctypes.get_errno


def syscall(what: str, number: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0) -> int:
    """Make system call *number*; *what* (the call and its object) leads the error's text.

    Integers are passed as 64-bit words (negative ones as two's complement); buffers by address.
    Raises :class:`OSError` with the kernel's errno.
    """
    result: int = _syscall(number, a, b, c, d, e, f)
    return result if result != -1 else _checked(what, result)


def forking_syscall(
    what: str, number: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0
) -> int:
    """:func:`syscall` for a call that copies this process and lets the copy run Python.

    The interpreter's lock is kept: the copy has only the calling thread, and would wait for ever for another one that
    had the lock. Nor may the copy run any Python before its interpreter is told: if another thread has just asked for
    the lock, it would give it away to nobody (drop_gil in CPython's Python/ceval_gil.h). So the telling is the next
    step of an iterator in C, which is taken only where the call has returned 0. The copy must execute a program or end
    soon, since nothing else of this process was made ready for it.
    """
    steps = chain(
        starmap(_forking, ((number, a, b, c, d, e, f),)), starmap(ctypes.pythonapi.PyOS_AfterFork_Child, ((),))
    )
    return _checked(what, next(filter(None, steps), 0))


def _checked(what: str, result: int) -> int:
    if result == -1:
        error = get_errno()
        if error:
            raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def address_of(buffer: bytearray | memoryview | ctypes.Array[ctypes.c_char]) -> int:
    """The address of a writable buffer; the caller keeps the buffer alive while the kernel uses it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
