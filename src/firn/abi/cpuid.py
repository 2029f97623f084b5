"""The CPUID instruction, and what it says about the XSAVE area (Intel SDM vol. 1, 13.2: leaf 0xD).

The offsets of the XSAVE components differ between processors, and no file of the kernel tells them; so the controller
asks the processor itself, by twenty bytes of machine code in a memfd.
"""

from __future__ import annotations

import ctypes
import os

from firn.abi import mman, nr
from firn.abi.libc import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CODE = bytes.fromhex("5389f089d10fa28907895f04894f0889570c5bc3")
# push rbx; mov eax, esi; mov ecx, edx; cpuid; mov [rdi], eax; mov [rdi+4], ebx; mov [rdi+8], ecx; mov [rdi+12], edx;
# pop rbx; ret

_layout: dict[int, tuple[int, int]] = {}


def _function() -> ctypes._CFunctionType:
    fd = os.memfd_create("cpuid", os.MFD_CLOEXEC)
    try:
        os.write(fd, _CODE)
        at = syscall(
            "mmap", nr.mmap, 0, mman.PAGE, mman.PROT_READ | mman.PROT_EXEC, mman.MAP_PRIVATE, fd, 0
        )
    finally:
        os.close(fd)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(at)


def ask() -> Callable[..., tuple[int, int, int, int]]:
    """A function that asks the processor: (leaf, subleaf = 0) -> (eax, ebx, ecx, edx)."""
    function, out = _function(), (ctypes.c_uint32 * 4)()

    def answer(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        function(out, leaf, subleaf)
        return out[0], out[1], out[2], out[3]

    return answer


def xsave_layout() -> dict[int, tuple[int, int]]:
    """Component number -> (offset, size) in the standard (not compacted) XSAVE area of this processor."""
    if not _layout:
        asked = ask()
        # Subleaf 0 says which there are. In a virtual machine every CPUID traps: asking for all 61 takes a millisecond.
        present, _, _, high = asked(0xD)
        present |= high << 32
        for number in range(2, 63):
            if not present >> number & 1:
                continue
            size, offset, kind, _ = asked(0xD, number)
            if size and not kind & 1:  # bit 0: a supervisor component, not in this area
                _layout[number] = (offset, size)
        _layout.setdefault(0, (0, 160))
    return _layout
