"""Memory objects: memfds and shared anonymous memory (images: memfd.img, MEMFD entries, pagemap-shmem-*).

State owned: name, owner, mode, size, seals and contents of a shmem inode, and which pages exist. Kernel:
memfd_create(2); the inode is reached through /proc/PID/fd or /proc/PID/map_files, its pages by SEEK_DATA. It comes back
as a memfd, or, for anonymous shared memory, as a mapping of the controller's own that is opened through its map_files
link, so that the restored mapping is called ``/dev/zero (deleted)`` again. What goes wrong: seals forbid what the
restore itself has to do, so they are set last.
"""

from __future__ import annotations

import errno
import fcntl
import os

from firn.abi import fcntl as fc
from firn.abi import mman, nr
from firn.abi.libc import address_of, syscall
from firn.errors import RestoreError
from firn.images.pages import PE_PRESENT, PagemapReader, write_pagemap
from firn.resources.files.paths import DELETED, extents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir

_HUGE_STEP = 2 << 20
ANONYMOUS = ("/dev/zero", "/anon_hugepage")
"""Names of memory that was mapped without a memfd: shared, and in huge pages."""
F_SEAL_SEAL = 1


class MemoryObjects:
    """The shmem inodes of a dump: each saved once, however many descriptors and mappings it has."""

    def __init__(self) -> None:
        self.inodes: dict[tuple[int, int], dict[str, Any]] = {}
        self.fds: dict[int, int] = {}
        self.pages = 0
        self.numbers: set[int] = set()
        """The numbers of page lists that are taken: an inode number is unique in its file system only."""

    def inode(self, link: str, st: os.stat_result) -> int:
        """The inode_id of the object behind *link*, which is kept open until :meth:`close`."""
        key = (st.st_dev, st.st_ino)
        entry = self.inodes.get(key)
        if entry is None:
            number = len(self.inodes) + 1
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
            self.fds[number] = fd
            name = os.readlink(link).removesuffix(DELETED)
            anonymous = name in ANONYMOUS
            shmid = st.st_ino
            while shmid in self.numbers:
                shmid += 1
            self.numbers.add(shmid)
            entry = self.inodes[key] = {
                "name": name.removeprefix("/memfd:"),
                "uid": st.st_uid, "gid": st.st_gid, "size": st.st_size, "shmid": shmid,
                "seals": F_SEAL_SEAL if anonymous else fcntl.fcntl(fd, fc.F_GET_SEALS), "inode_id": number,
                "mode": st.st_mode,
            }  # fmt: skip
            if st.st_blksize != mman.PAGE:
                entry["hugetlb_flag"] = (st.st_blksize.bit_length() - 1) << mman.MAP_HUGE_SHIFT
        number = entry["inode_id"]
        return int(number)

    def save(self, images: ImageDir, next_pages_id: int) -> int:
        """Write memfd.img and the contents, the pages into images from number *next_pages_id* on; the next one after
        them."""
        if not self.inodes:
            return next_pages_id
        images.write_all("MEMFD_INODE", list(self.inodes.values()))
        for entry in self.inodes.values():
            if entry["size"]:
                self.pages += save_pages(images, self.fds[entry["inode_id"]], entry, entry["shmid"], next_pages_id)
                next_pages_id += 1
        return next_pages_id

    def close(self) -> None:
        """Let go of the objects."""
        while self.fds:
            os.close(self.fds.popitem()[1])


def save_pages(images: ImageDir, fd: int, entry: dict[str, Any], shmid: int, pages_id: int) -> int:
    """Write the contents of the memory object *fd* with the size and page size of *entry*, as page list *shmid*; how
    many pages there are."""
    size = entry["size"]
    huge = bool(entry.get("hugetlb_flag"))
    runs = _huge_runs(fd, size) if huge else page_runs(fd, size)
    pages = images.open_raw(f"pages-{pages_id}.img", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        copy = _copy_huge if huge else copy_range
        for start, count in runs:
            copy(fd, start, pages, count * mman.PAGE, size)
    finally:
        os.close(pages)
    write_pagemap(images, "PAGEMAP_SHMEM", shmid, pages_id, [(at, n, PE_PRESENT) for at, n in runs])
    return sum(count for _, count in runs)


def page_runs(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, pages) of what is allocated in a memory object."""
    runs: list[tuple[int, int]] = []
    for start, length in extents(fd, size):
        first = start // mman.PAGE
        count = -(-(start + length) // mman.PAGE) - first
        runs.append((first * mman.PAGE, count))
    return runs


def copy_range(source: int, offset: int, target: int, length: int, size: int) -> None:
    """Append *length* bytes of *source* from *offset* to *target*; what is beyond *size* are zeros."""
    have = min(length, size - offset)
    end = offset + have
    while offset < end:
        sent = os.sendfile(target, source, offset, min(end - offset, 1 << 30))
        if not sent:
            raise OSError(errno.EIO, "a memory object shrank while it was read")
        offset += sent
    if length > have:
        os.write(target, bytes(length - have))


def _copy_huge(source: int, offset: int, target: int, length: int, size: int) -> None:
    """The same for huge pages, which cannot be spliced."""
    with memoryview(bytearray(_HUGE_STEP)) as buffer:
        end = min(offset + length, size)
        while offset < end:
            got = os.preadv(source, [buffer[: min(end - offset, _HUGE_STEP)]], offset)
            if not got:
                raise OSError(errno.EIO, "a memory object shrank while it was read")
            os.write(target, buffer[:got])
            offset += got


def _huge_runs(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, pages) of the huge pages that hold anything: hugetlbfs does not tell holes, but reading one allocates
    nothing (a mapping would)."""
    runs: list[tuple[int, int]] = []
    for offset in range(0, size, _HUGE_STEP):
        if os.pread(fd, _HUGE_STEP, offset).strip(b"\0"):
            runs.append((offset, min(_HUGE_STEP, size - offset) // mman.PAGE))
    return runs


class RestoredObject:
    """A memory object made for a restore: ``fd`` is open for reading and writing, seals are still to be set."""

    __slots__ = ("entry", "fd")

    def __init__(self, entry: dict[str, Any], fd: int) -> None:
        self.entry = entry
        self.fd = fd

    def seal(self) -> None:
        """Set the recorded seals (after all mappings have been made)."""
        seals = self.entry.get("seals", F_SEAL_SEAL)
        if self.entry["name"] in ANONYMOUS or seals == F_SEAL_SEAL or seals == 0:
            return
        fcntl.fcntl(self.fd, fc.F_ADD_SEALS, seals)


def restore(entry: dict[str, Any], images: ImageDir) -> RestoredObject:
    """Make the object of memfd_inode_entry *entry* and fill it from its pages image."""
    size = entry["size"]
    if entry["name"] in ANONYMOUS:
        fd = _anonymous(size, entry.get("hugetlb_flag", 0))
    else:
        flags = mman.MFD_CLOEXEC
        if entry.get("seals", F_SEAL_SEAL) != F_SEAL_SEAL:
            flags |= mman.MFD_ALLOW_SEALING
        if entry.get("hugetlb_flag"):
            flags |= mman.MFD_HUGETLB | entry["hugetlb_flag"]
        name = bytearray(os.fsencode(entry["name"]) + b"\0")
        fd = syscall(f"memfd_create {entry['name']}", nr.memfd_create, address_of(name), flags)
        try:
            os.ftruncate(fd, size)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise RestoreError(f"memory object {entry['name']!r} cannot have {size} bytes: {error}") from None
        os.fchown(fd, entry["uid"], entry["gid"])
        if "mode" in entry:
            os.fchmod(fd, entry["mode"] & 0o7777)
    if size:
        fill_pages(images, fd, entry, entry["shmid"], entry["name"])
    return RestoredObject(entry, fd)


def fill_pages(images: ImageDir, fd: int, entry: dict[str, Any], shmid: int, name: str) -> None:
    """Fill the memory object *fd* from page list *shmid*."""
    with PagemapReader(images, "PAGEMAP_SHMEM", shmid) as pagemap:
        for run in pagemap:
            length = min(run.nr_pages * mman.PAGE, entry["size"] - run.vaddr)
            fill = _fill_huge if entry.get("hugetlb_flag") else _fill
            fill(run.fd, run.offset, fd, run.vaddr, length, name)


def _anonymous(size: int, huge: int) -> int:
    """A descriptor of new shared anonymous memory of *size* bytes."""
    flags = mman.MAP_SHARED | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE
    if huge:
        flags |= mman.MAP_HUGETLB | huge
    address = syscall("mmap shared memory", nr.mmap, 0, size, mman.PROT_READ | mman.PROT_WRITE, flags, -1, 0)
    try:
        end = address + (size + mman.PAGE - 1 & ~(mman.PAGE - 1))
        return os.open(f"/proc/self/map_files/{address:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        syscall("munmap", nr.munmap, address, size)


def _fill(source: int, offset: int, target: int, at: int, length: int, name: str) -> None:
    """Copy image bytes into the object at offset *at*."""
    os.lseek(target, at, os.SEEK_SET)
    while length:
        sent = os.sendfile(target, source, offset, min(length, 1 << 30))
        if not sent:
            raise RestoreError(f"the pages image of memory object {name!r} is too short")
        offset += sent
        length -= sent


def _fill_huge(source: int, offset: int, target: int, at: int, length: int, name: str) -> None:
    """The same for huge pages, which cannot be written to (hugetlbfs has no write): through a mapping."""
    import mmap

    with mmap.mmap(target, at + length) as area, memoryview(area) as view:
        while length:
            got = os.preadv(source, [view[at : at + min(length, 1 << 30)]], offset)
            if not got:
                raise RestoreError(f"the pages image of memory object {name!r} is too short")
            at, offset, length = at + got, offset + got, length - got
