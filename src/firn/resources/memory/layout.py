"""The address space as a whole (images: mm-PID.img): limits of code, data, heap, stack, arguments; auxv; executable.

Kernel: /proc/PID/stat and auxv, brk(2) inside the task, PR_GET_DUMPABLE. It comes back by PR_SET_MM_MAP (prctl(2)),
which needs no capability beyond CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN for the executable, and refuses (EBUSY) as long
as the old executable is mapped.
"""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import mman, nr, prctl
from firn.errors import ImageError
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.process import Answers
    from firn.tracee.program import Program, Scratch

AUXV_WORDS = 44
"""CRIU refuses more (image format); what is beyond are zeros in practice."""
MM_FIELDS = (
    "mm_start_code", "mm_end_code", "mm_start_data", "mm_end_data", "mm_start_brk", "mm_brk", "mm_start_stack",
    "mm_arg_start", "mm_arg_end", "mm_env_start", "mm_env_end",
)  # fmt: skip
"""In the order of struct prctl_mm_map."""


def save(pid: int, stat: procfs.Stat, answers: Answers, exe_id: int) -> dict[str, Any]:
    """The mm_entry, still without its mappings."""
    auxv = memoryview(procfs.read_record(f"/proc/{pid}/auxv")).cast("Q")
    return {
        "mm_start_code": stat.start_code, "mm_end_code": stat.end_code, "mm_start_data": stat.start_data,
        "mm_end_data": stat.end_data, "mm_start_stack": stat.start_stack, "mm_start_brk": stat.start_brk,
        "mm_brk": answers.brk, "mm_arg_start": stat.arg_start, "mm_arg_end": stat.arg_end,
        "mm_env_start": stat.env_start, "mm_env_end": stat.env_end, "exe_file_id": exe_id,
        "mm_saved_auxv": list(auxv[:AUXV_WORDS]), "vmas": [], "dumpable": answers.switches["dumpable"],
        "thp_disabled": bool(answers.switches["thp_disable"]),
    }  # fmt: skip


def ask(program: Program) -> int:
    """Add the call that tells whether future mappings are locked, for :func:`locks_future`. No file tells it; but the
    scratch area is such a mapping, and msync(2) refuses to invalidate one that is locked."""
    unused = _unused(program.scratch)
    return program.call("msync", nr.msync, unused, mman.PAGE, mman.MS_INVALIDATE, flags=1)


def _unused(scratch: Scratch) -> int:
    return scratch.data + scratch.size - mman.PAGE


def locks_future(pid: int, program: Program, asked: int) -> int:
    """The MCL_* flags of mlockall(2) that hold for future mappings. A page of the scratch area that was never touched
    is there all the same, unless MCL_ONFAULT."""
    if program.results[asked] != -errno.EBUSY:
        return 0
    unused = _unused(program.scratch)
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        word = int.from_bytes(os.pread(fd, 8, unused // mman.PAGE * 8), "little")
    finally:
        os.close(fd)
    return mman.MCL_FUTURE | (0 if word & mman.PAGEMAP_PRESENT else mman.MCL_ONFAULT)


def plan(program: Program, mm: dict[str, Any], exe_fd: int) -> None:
    """Set the layout; *exe_fd* is the task's descriptor of its executable."""
    auxv = mm.get("mm_saved_auxv", [])
    if len(auxv) > 64 or len(auxv) % 2:
        raise ImageError(f"mm image: an auxiliary vector of {len(auxv)} words")
    raw = struct.pack(f"<{len(auxv)}Q", *auxv)
    program.reserve(1, len(raw) + prctl.MM_MAP.size + 16)
    at = program.data(raw) if raw else 0
    fields = [mm[name] for name in MM_FIELDS]
    entry = program.data(prctl.MM_MAP.pack(*fields, at, len(raw), exe_fd & 0xFFFFFFFF))
    program.call("prctl PR_SET_MM_MAP", nr.prctl, prctl.SET_MM, prctl.SET_MM_MAP, entry, prctl.MM_MAP.size, 0)


def holes(vmas: list[tuple[int, int]], size: int, top: int = (1 << 47) - mman.PAGE) -> int:
    """The start of a gap of *size* bytes between *vmas* (ascending (start, end) pairs), away from a growing stack."""
    margin = 1 << 24
    end = top
    for start, stop in reversed(vmas):
        if end - stop >= size + 2 * margin:
            return (end - size - margin) & ~(mman.PAGE - 1)
        end = min(end, start)
    if end >= size + 2 * margin + (1 << 16):
        return (end - size - margin) & ~(mman.PAGE - 1)
    raise ImageError("mm image: the address space has no room left for the restore")
