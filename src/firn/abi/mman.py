"""mmap(2), madvise(2), mlock(2), pagemap ioctls. Source: include/uapi/asm-generic/mman*.h, include/uapi/linux/fs.h."""

from __future__ import annotations

import struct

PAGE = 4096

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
PROT_SHADOW = PROT_READ | PROT_WRITE

MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_DROPPABLE = 0x08
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_GROWSDOWN = 0x100
MAP_LOCKED = 0x2000
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_HUGETLB = 0x40000
MAP_FIXED_NOREPLACE = 0x100000
MAP_HUGE_SHIFT = 26

MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_DONTNEED = 4
MADV_DONTFORK = 10
MADV_MERGEABLE = 12
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_WIPEONFORK = 18
MADV_POPULATE_WRITE = 23
MADV_GUARD_INSTALL = 102

MS_INVALIDATE = 2

MLOCK_ONFAULT = 1
MCL_CURRENT = 1
MCL_FUTURE = 2
MCL_ONFAULT = 4

MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2

MFD_CLOEXEC = 1
MFD_ALLOW_SEALING = 2
MFD_HUGETLB = 4

PAGEMAP_SCAN = 0xC0606610
"""_IOWR('f', 16, struct pm_scan_arg), Linux 6.7."""
PM_SCAN_ARG = struct.Struct("<12Q")
"""struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
category_anyof_mask, return_mask."""
PAGE_REGION = struct.Struct("<3Q")
"""struct page_region: start, end, categories."""
PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_GUARD = 1 << 8

PAGEMAP_PRESENT = 1 << 63
PAGEMAP_SWAPPED = 1 << 62
PAGEMAP_FILE = 1 << 61
PAGEMAP_GUARD = 1 << 58
PAGEMAP_PFN = (1 << 55) - 1
"""Bits of a /proc/PID/pagemap word (Documentation/admin-guide/mm/pagemap.rst)."""
