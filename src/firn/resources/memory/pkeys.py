"""Memory protection keys (pkeys(7)): which are allocated, and which mapping has which.

State owned: the allocation map of the process, the key of every mapping, and the key that the kernel itself takes for
mappings which can only be executed. What a thread may do with the keys, its PKRU register, is in its extended state.
Kernel: ``ProtectionKey`` of /proc/PID/smaps tells a mapping's key. Nothing shows the map; but pkey_mprotect(2) checks
the key before it looks for the mapping, so a call for an address that no mapping can have answers EINVAL for a key that
is not allocated, and ENOMEM for one that is (do_mprotect_pkey in mm/mprotect.c). The kernel's own key for executable
memory counts as not allocated there.

They come back by pkey_alloc(2), which gives the lowest free key, and pkey_mprotect(2). The kernel takes its own key
when the first such mapping is made, so the keys below it must be taken by then. Pages are read in before a mapping gets
its key: the restored task's calls obey its PKRU too. For the same reason a child inherits no mapping that has a key.

What goes wrong: a processor without keys, or with fewer, gives one error. A child that has another key for executable
memory than its parent (it called execve(2) since) keeps its parent's.
"""

from __future__ import annotations

import errno

from firn.abi import mman, nr
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

KEYS = 16
"""Keys of an x86 processor; key 0 is everybody's (arch/x86/include/asm/pkeys.h)."""
_NOWHERE = (1 << 64) - 2 * mman.PAGE


def ask(program: Program) -> int:
    """Ask for every key whether it is allocated; answers the first call."""
    calls = [
        program.call(f"pkey_mprotect {key}", nr.pkey_mprotect, _NOWHERE, mman.PAGE, 0, key, flags=1)
        for key in range(1, KEYS)
    ]
    return calls[0]


def answer(program: Program, first: int) -> int:
    """The allocated keys; bit n is key n."""
    return sum(1 << key for key in range(1, KEYS) if program.results[first + key - 1] == -errno.ENOMEM)


class Keys:
    """The keys of one restored process, from its mm_entry."""

    __slots__ = ("_asked", "allocated", "own", "vmas")

    def __init__(self, mm: dict[str, Any], number: int) -> None:
        self.allocated: int = mm.get("firn", {}).get("pkeys", 0)
        self.vmas = [vma for vma in mm["vmas"] if vma.get("firn", {}).get("pkey")]
        self._asked: list[tuple[int, int]] = []
        self.own = 0
        """The key of memory that can only be executed, 0 if it has none."""
        if self.allocated & ~(((1 << KEYS) - 1) & ~1) or any(vma["firn"]["pkey"] >= KEYS for vma in self.vmas):
            raise ImageError(f"mm-{number}.img: a protection key that no processor has")
        for vma in self.vmas:
            key = vma["firn"]["pkey"]
            if vma["prot"] == mman.PROT_EXEC and not self.allocated >> key & 1:
                self.own = key

    def __bool__(self) -> bool:
        return bool(self.allocated or self.vmas)

    def plan_before(self, program: Program) -> None:
        """Before any mapping is made: what was inherited is free, and the kernel's own key will be the right one."""
        for key in range(1, KEYS):
            program.call(f"pkey_free {key}", nr.pkey_free, key, flags=1)
        for key in range(1, self.own):
            self._allocate(program, key)

    def _allocate(self, program: Program, key: int) -> None:
        self._asked.append((program.call(f"pkey_alloc {key}", nr.pkey_alloc, 0, 0, flags=1), key))

    def plan_after(self, program: Program) -> None:
        """When all pages are in: the mappings get their keys; those that nobody owns any more are freed again."""
        mine = [vma for vma in self.vmas if vma["firn"]["pkey"] != self.own]
        top = max([self.allocated.bit_length() - 1, *(vma["firn"]["pkey"] for vma in mine)], default=0)
        for key in range(self.own + 1, top + 1):
            self._allocate(program, key)
        for vma in mine:
            start, length = vma["start"], vma["end"] - vma["start"]
            label, key = f"pkey_mprotect {start:#x}-{vma['end']:#x}", vma["firn"]["pkey"]
            program.call(label, nr.pkey_mprotect, start, length, vma["prot"], key)
        for key in range(1, max(top, self.own) + 1):
            if key != self.own and not self.allocated >> key & 1:
                program.call(f"pkey_free {key}", nr.pkey_free, key, flags=1)

    def check(self, program: Program) -> None:
        """Raise if the kernel gave other keys than were asked for."""
        for call, key in self._asked:
            if program.results[call] != key:
                raise RestoreError(
                    f"memory protection key {key} cannot be had", "restore on a processor that has as many keys"
                )
