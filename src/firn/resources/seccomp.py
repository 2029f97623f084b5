"""Seccomp (images: seccomp.img, thread_core_entry.seccomp_mode and seccomp_filter).

State owned: the mode of each thread and its chain of filters. Kernel: PTRACE_SECCOMP_GET_FILTER and _GET_METADATA
(index 0 is the oldest filter). It comes back by seccomp(2) in the thread itself, oldest filter first, while the tracer
suspends filtering (PTRACE_O_SUSPEND_SECCOMP), because the restore's own calls would not pass. Chains with equal
contents are stored once.

What goes wrong: a filter that asks a listener (SECCOMP_RET_USER_NOTIF). In the tree that is refused as an open
descriptor; and if such a filter is there, and any process outside has a listener, then that may be this filter's: the
kernel tells nobody which one it is. A listener that nobody has any more is no loss: without one, the calls fail alike.
"""

from __future__ import annotations

import struct

from firn.abi import nr, prctl
from firn.errors import ImageError
from firn.tracee import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

DISABLED, STRICT, FILTER = 0, 1, 2
_MAX_FILTER = 4096 * 8


class Filters:
    """seccomp.img under construction."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._chains: dict[tuple[tuple[bytes, int], ...], int] = {}

    def asks(self) -> bool:
        """Whether any of the filters may ask a listener."""
        return any(_may_ask(entry["filter"]) for entry in self.entries)

    def collect(self, tid: int, mode: int) -> dict[str, Any]:
        """The seccomp fields of a thread's thread_core_entry."""
        if mode == DISABLED:
            return {}
        if mode == STRICT:
            return {"seccomp_mode": STRICT}
        chain: list[tuple[bytes, int]] = []
        while (code := ptrace.seccomp_filter(tid, len(chain))) is not None:
            chain.append((code, ptrace.seccomp_flags(tid, len(chain))))
        key = tuple(chain)
        if key not in self._chains:
            # Stored newest first; every older one names its newer neighbour, the thread names the oldest.
            for index, (code, flags) in enumerate(reversed(chain)):
                entry: dict[str, Any] = {"filter": code, "flags": flags}
                if index:
                    entry["prev"] = len(self.entries) - 1
                self.entries.append(entry)
            self._chains[key] = len(self.entries) - 1
        return {"seccomp_mode": FILTER, "seccomp_filter": self._chains[key]}


_RETURN, _RETURN_A = 0x06, 0x16
_USER_NOTIF = 0x7FC00000


def _may_ask(code: bytes) -> bool:
    """Whether a BPF filter may return SECCOMP_RET_USER_NOTIF: it does so, or returns what it computes."""
    return any(
        operation == _RETURN_A or (operation == _RETURN and value & 0xFFFF0000 == _USER_NOTIF)
        for operation, _, _, value in struct.iter_unpack("<HBBI", code)
    )


def chain(filters: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """The filters to install, oldest first, for a thread that names *index*."""
    found: list[dict[str, Any]] = []
    at: int | None = index
    while at is not None:
        if not 0 <= at < len(filters) or len(found) > len(filters):
            raise ImageError(f"seccomp image: filter {at} is not there, or filters name each other in a ring")
        entry = filters[at]
        if len(entry["filter"]) % 8 or not 0 < len(entry["filter"]) <= _MAX_FILTER:
            raise ImageError(f"seccomp image: filter {at} is no list of BPF instructions")
        found.append(entry)
        at = entry.get("prev")
    return found


def plan(program: Program, thread_core: dict[str, Any], filters: list[dict[str, Any]]) -> None:
    """Put the thread under seccomp again."""
    mode = thread_core.get("seccomp_mode", DISABLED)
    if mode == STRICT:
        program.call("seccomp strict", nr.seccomp, prctl.SECCOMP_SET_MODE_STRICT, 0, 0)
    elif mode == FILTER:
        for entry in chain(filters, thread_core.get("seccomp_filter", 0)):
            code = entry["filter"]
            program.reserve(2, len(code) + 64)
            at = program.data(code)
            fprog = program.data(struct.pack("<H6xQ", len(code) // 8, at))
            flags = entry.get("flags", 0)
            program.call("seccomp filter", nr.seccomp, prctl.SECCOMP_SET_MODE_FILTER, flags, fprog)
