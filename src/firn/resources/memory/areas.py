"""Mappings: what a line of /proc/PID/maps is, and its vma_entry.

State owned: the virtual memory areas with protection, kind and madvise(2) state. Kernel: /proc/PID/smaps (VmFlags) and
/proc/PID/map_files. It comes back by mmap(2), madvise(2), mlock2(2), mprotect(2) in the restored task
(:mod:`firn.resources.memory.rebuild`). What goes wrong: mappings of devices and of kernel objects that no mmap of a
file brings back are refused by name.
"""

from __future__ import annotations

import os

from firn.abi import mman
from firn.errors import Obstacle
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.host.procfs import Map

REGULAR, STACK, VSYSCALL, VDSO, HEAP = 1, 2, 4, 8, 0x20
FILE_PRIVATE, FILE_SHARED, ANON_SHARED, ANON_PRIVATE = 0x40, 0x80, 0x100, 0x200
SYSVIPC, SOCKET, VVAR, AIORING, MEMFD, SHSTK, GUARD, UPROBES = (1 << n for n in range(10, 18))
"""Status bits of vma_entry (image format)."""

LOCKED_ON_FAULT, LOCKED_WHOLE = 1, 2
"""Whether a restore may fill in all pages of a locked mapping."""

MADVICE = (
    ("rr", mman.MADV_RANDOM), ("sr", mman.MADV_SEQUENTIAL), ("dc", mman.MADV_DONTFORK), ("mg", mman.MADV_MERGEABLE),
    ("hg", mman.MADV_HUGEPAGE), ("nh", mman.MADV_NOHUGEPAGE), ("dd", mman.MADV_DONTDUMP), ("wf", mman.MADV_WIPEONFORK),
)  # fmt: skip
"""VmFlags of smaps and the advice that sets them (fs/proc/task_mmu.c, show_smap_vma_flags)."""


class Area:
    """A mapping and what it is.

    ``kind`` is one of anon, heap, file, shmem, sysv, aio, ring (of a socket), vdso, vvar, vsyscall; ``stat`` is that of
    the mapped object, ``mode`` its open mode (0 read, 2 read and write), ``shmid`` its file id (sysv: the segment's),
    where there is one; ``numa`` is (mode, nodes) of a NUMA policy of its own.
    """

    __slots__ = ("kind", "map", "mode", "numa", "shmid", "stat")

    def __init__(self, map: Map, kind: str) -> None:
        self.map = map
        self.kind = kind
        self.mode = 0
        self.stat: os.stat_result | None = None
        self.shmid = 0
        self.numa: tuple[int, bytes] | None = None

    @property
    def has_pages(self) -> bool:
        """Whether its private pages belong in the process's own page image."""
        m = self.map
        return not m.shared and self.kind not in ("vvar", "vsyscall") and "dp" not in (m.flags or ())

    def link(self, pid: int) -> str:
        """The magic link that leads to the mapped object."""
        return f"/proc/{pid}/map_files/{self.map.start:x}-{self.map.end:x}"


_LOCKS = frozenset(("lo", "lf"))
_MANY, _SPARE = 10000, 16
"""Mappings that may be more than the kernel allows, and what a restore needs besides for a while."""
_UFFD = {"um", "uw", "ui"}
"""VmFlags: missing pages, write protection, minor faults (Documentation/filesystems/proc.rst)."""
_WITH_OBJECT = ("file", "shmem", "sysv")
SPECIAL = {"[vdso]": "vdso", "[vvar]": "vvar", "[vvar_vclock]": "vvar", "[vsyscall]": "vsyscall", "[heap]": "heap"}


def _obstacle(pid: int, m: Map, reason: str, help: str = "") -> Obstacle:
    return Obstacle(f"process {pid}: mapping {m.start:x}-{m.end:x} of {m.name or 'anonymous memory'}", reason, help)


def classify(pid: int, maps: list[Map], obstacles: list[Obstacle]) -> list[Area]:
    """What every mapping is; what cannot be saved is added to *obstacles*. vvar parts are merged into one."""
    areas: list[Area] = []
    if len(maps) > _MANY and len(maps) + _SPARE > (limit := int(procfs.read("/proc/sys/vm/max_map_count"))):
        reason = f"has {len(maps)} mappings, which leaves none of {limit} for a restore to work with"
        obstacles.append(Obstacle(f"process {pid}", reason, f"sysctl -w vm.max_map_count={limit + _SPARE}"))
    for m in maps:
        kind = _kind(pid, m, obstacles)
        if kind is None:
            continue
        if kind == "vvar" and areas and areas[-1].kind == "vvar" and areas[-1].map.end == m.start:
            areas[-1].map.end = m.end
            continue
        areas.append(Area(m, kind))
    return areas


def _kind(pid: int, m: Map, obstacles: list[Obstacle]) -> str | None:
    name = m.name
    flags = m.flags or frozenset()
    if name in SPECIAL:
        return SPECIAL[name]
    if flags & _UFFD:
        # In the tree or outside: also if no descriptor of it is here any more.
        reason = "has its faults served by a userfaultfd, which images cannot hold"
        obstacles.append(_obstacle(pid, m, reason, "have its holder close it"))
        return None
    if "ss" in flags:
        obstacles.append(_obstacle(pid, m, "is a shadow stack", "run the program without shadow stacks"))
        return None
    if name == "[uprobes]":
        obstacles.append(_obstacle(pid, m, "holds uprobes trampolines", "remove the probes"))
        return None
    if name.startswith("/[aio]"):
        return "aio"
    if name.startswith("/SYSV") and name.endswith(" (deleted)") and m.device[0] == 0 and m.shared:
        return "sysv"
    if name.startswith("socket:") and m.shared:
        return "ring"
    if name.startswith(("socket:", "anon_inode:", "/anon_inode", "/dmabuf")):
        reason = "is memory of a kernel object that cannot be mapped again"
        obstacles.append(_obstacle(pid, m, reason, "unmap it first"))
        return None
    if name.startswith("/secretmem"):
        obstacles.append(_obstacle(pid, m, "is secret memory (memfd_secret), which nobody may read", "unmap it first"))
        return None
    if name.startswith(("/memfd:", "/dev/zero (deleted)", "/anon_hugepage", "[anon_shmem:")):
        return "shmem"
    if m.inode == 0 and (name == "" or name.startswith(("[stack", "[anon:"))):
        return "anon"
    if m.inode == 0 and name.startswith("["):
        obstacles.append(_obstacle(pid, m, "is a special mapping that firn does not know"))
        return None
    if "io" in flags or "pf" in flags:
        obstacles.append(_obstacle(pid, m, "is device memory", "unmap it first"))
        return None
    return "file"


def find_backing(
    pid: int, areas: list[Area], obstacles: list[Obstacle], seen: dict[tuple[object, ...], os.stat_result]
) -> None:
    """Fill in ``stat`` and ``mode`` of the mappings that have an object behind them. *seen* has the objects of other
    processes that stand still; while one of them maps a file, its number is no other file's."""
    for area in areas:
        if area.kind not in _WITH_OBJECT:
            continue
        link = area.link(pid)
        m = area.map
        key = (m.device, m.inode, m.name)
        try:
            if m.shared:
                # The link's permission bits are the mode in which the file was opened (fs/proc/base.c).
                area.mode = 2 if os.lstat(link).st_mode & 0o200 else 0
            if key not in seen:
                seen[key] = os.stat(link)
        except OSError as error:
            reason = f"its file cannot be reached: {os.strerror(error.errno or 0)}"
            obstacles.append(_obstacle(pid, m, reason))
            continue
        area.stat = seen[key]


def whole_rings(areas: list[Area]) -> list[list[Area]]:
    """The mappings of packet rings, those together that follow each other and are parts of one (mprotect(2))."""
    found: list[list[Area]] = []
    for area in areas:
        if area.kind != "ring":
            continue
        last = found[-1][-1].map if found else None
        m = area.map
        if last and (last.end, last.inode, last.offset + last.end - last.start) == (m.start, m.inode, m.offset):
            found[-1].append(area)
        else:
            found.append([area])
    return found


def build_entry(area: Area) -> dict[str, Any]:
    """The vma_entry of *area*."""
    m = area.map
    flags = m.flags or frozenset()
    status, mmap_flags = _status(area)
    for letter, bit in (("gd", mman.MAP_GROWSDOWN), ("lo", mman.MAP_LOCKED), ("nr", mman.MAP_NORESERVE)):
        if letter in flags:
            mmap_flags |= bit
    if "ht" in flags and area.kind == "anon":
        mmap_flags |= mman.MAP_HUGETLB | (m.page_size.bit_length() - 1) << mman.MAP_HUGE_SHIFT
    entry: dict[str, Any] = {
        "start": m.start, "end": m.end, "pgoff": m.offset if area.kind in (*_WITH_OBJECT, "aio", "ring") else 0,
        "shmid": area.shmid, "prot": m.prot, "flags": mmap_flags, "status": status, "fd": -1,
    }  # fmt: skip
    madvice = 0
    for letter, number in MADVICE:
        if letter in flags:
            madvice |= 1 << number
    if area.kind in ("vdso", "vsyscall"):
        madvice = 0
    if madvice:
        entry["madv"] = madvice
    if area.kind in _WITH_OBJECT:
        entry["fdflags"] = area.mode
    elif area.kind in ("aio", "ring"):
        entry["fdflags"] = 2
    extra: dict[str, Any] = {}
    if "ac" in flags and not m.shared and not m.prot & mman.PROT_WRITE:
        # It was writable once: its pages count against the commit limit.
        extra["account"] = True
    if m.key:
        extra["pkey"] = m.key
    if "lo" in flags:
        extra["locked"] = LOCKED_WHOLE if m.whole and "lf" not in flags else LOCKED_ON_FAULT
    if "sl" in flags:
        extra["sealed"] = True
    if m.name.startswith("[anon:") or m.name.startswith("[anon_shmem:"):
        extra["anon_name"] = m.name[m.name.index(":") + 1 : -1]
    if area.numa is not None:
        extra["numa_mode"], extra["numa_nodes"] = area.numa
    if extra:
        entry["firn"] = extra
    return entry


def _status(area: Area) -> tuple[int, int]:
    m = area.map
    sharing = mman.MAP_SHARED if m.shared else mman.MAP_PRIVATE
    if "dp" in (m.flags or ()):
        sharing = mman.MAP_DROPPABLE
    if area.kind == "file":
        return REGULAR | (FILE_SHARED if m.shared else FILE_PRIVATE), sharing
    if area.kind == "shmem":
        return REGULAR | MEMFD | (FILE_SHARED if m.shared else FILE_PRIVATE), sharing
    if area.kind == "sysv":
        return REGULAR | ANON_SHARED | SYSVIPC, mman.MAP_SHARED | mman.MAP_ANONYMOUS
    if area.kind == "aio":
        return AIORING, mman.MAP_SHARED
    if area.kind == "ring":
        return REGULAR | SOCKET, mman.MAP_SHARED
    bits = {"vdso": VDSO | REGULAR, "vvar": VVAR | REGULAR, "vsyscall": VSYSCALL, "heap": HEAP | REGULAR}
    return bits.get(area.kind, REGULAR) | ANON_PRIVATE, sharing | mman.MAP_ANONYMOUS


def refresh_flags(areas: list[Area], maps: list[Map]) -> None:
    """Take the VmFlags of *maps*, read from a clone of the process, for those of *areas* that the clone has. A clone
    has nothing locked (fork(2)): whether its original has is what was read before."""
    flags = {m.start: m.flags for m in maps}
    for area in areas:
        found = flags.get(area.map.start)
        if found is not None:
            area.map.flags = found - _LOCKS | (area.map.flags or frozenset()) & _LOCKS
