"""Attachments of System V segments in a restored task (the segments: :mod:`firn.resources.files.segments`).

State owned: mappings that shmat(2) has made. Kernel: their inode number is the segment's id, their offset tells where
the attachment began. What was attached at once belongs together: one shmdt(2) takes away all its pieces, because they
are of one file (ipc/shm.c). So an attachment of which nothing is missing is made in its place; else it is made whole
somewhere free, its pieces are moved into place by mremap(2), and the rest is detached.
"""

from __future__ import annotations

from firn.abi import ipc, mman, nr
from firn.errors import ImageError
from firn.resources.memory import areas, layout
from firn.resources.memory.rebuild import pieces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

_ALIGN = 1 << 30
"""Of the largest huge pages."""


def wanted(vmas: list[dict[str, Any]]) -> set[int]:
    """The ids of the segments that are attached."""
    return {vma["shmid"] for vma in vmas if vma["status"] & areas.SYSVIPC}


def plan(
    program: Program,
    vmas: list[dict[str, Any]],
    sizes: dict[int, int],
    kept: list[tuple[int, int]],
    taken: list[tuple[int, int]],
) -> None:
    """Attach what *vmas* want, except for *kept* ranges. *sizes*: id -> bytes that an attachment covers. *taken* are
    ranges besides the mappings that are in use. Everything else has been mapped already."""
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for vma in vmas:
        if vma["status"] & areas.SYSVIPC and not _is_kept(vma, kept):
            start, offset = vma["start"], vma["pgoff"]
            if offset + vma["end"] - start > sizes[vma["shmid"]]:
                raise ImageError(f"mm image: mapping {start:#x} reaches beyond the end of its System V segment")
            groups.setdefault((vma["shmid"], start - offset, vma.get("fdflags", 2)), []).append(vma)
    used = [(vma["start"], vma["end"]) for vma in vmas if not vma["status"] & areas.VSYSCALL] + taken
    for (shmid, base, mode), parts in groups.items():
        size = sizes[shmid]
        flags = 0 if mode & 3 else ipc.SHM_RDONLY
        whole = base > 0 and sum(part["end"] - part["start"] for part in parts) == size
        at = base if whole else -(-layout.holes(sorted(used), size + _ALIGN) // _ALIGN) * _ALIGN
        program.call(f"shmat of segment {shmid} at {at:#x}", nr.shmat, shmid, at, flags)
        normal = mman.PROT_READ if flags else mman.PROT_READ | mman.PROT_WRITE
        for part in parts:
            start, length = part["start"], part["end"] - part["start"]
            if not whole:
                how = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
                program.call(f"mremap to {start:#x}", nr.mremap, at + part["pgoff"], length, length, how, start)
            if part["prot"] != normal:
                program.call(f"mprotect {start:#x}", nr.mprotect, start, length, part["prot"])
        if not whole:
            program.call("munmap the rest", nr.munmap, at, size)


def _is_kept(vma: dict[str, Any], kept: list[tuple[int, int]]) -> bool:
    return any(is_kept for _, _, is_kept in pieces(vma["start"], vma["end"], kept))
