"""Probes of what can be learnt about memory and done with it. For the rules of a probe see :mod:`probes_tracing`."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct

from firn.abi import mman, nr, prctl
from firn.abi import probe_consts as pc
from firn.abi.libc import address_of, syscall
from firn.errors import KernelError
from firn.host import features, procfs
from firn.host.aiorequests import AioRequests
from firn.host.undolists import UndoLists

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def _pages(count: int) -> tuple[mmap.mmap, int]:
    """Private memory of *count* untouched pages, and its address."""
    area = mmap.mmap(-1, count * mman.PAGE, _ANONYMOUS)
    return area, ctypes.addressof(ctypes.c_char.from_buffer(area))


def _pagemap_word(address: int) -> int:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int.from_bytes(os.pread(fd, 8, address // mman.PAGE * 8), "little")
    finally:
        os.close(fd)


def pagemap() -> str | None:
    """/proc/PID/pagemap, with the frame numbers that need CAP_SYS_ADMIN."""
    area, address = _pages(1)
    if _pagemap_word(address) & mman.PAGEMAP_PRESENT:
        raise KernelError("/proc/self/pagemap shows a page that nobody has touched")
    area[0] = 1
    word = _pagemap_word(address)
    if not word & (mman.PAGEMAP_PRESENT | mman.PAGEMAP_SWAPPED):
        raise KernelError("/proc/self/pagemap does not show a page that was written")
    if word & mman.PAGEMAP_PRESENT and not word & mman.PAGEMAP_PFN:
        return "page frame numbers are hidden: zero pages cannot be told from it"
    return None


def soft_dirty() -> None:
    """The soft-dirty bit of pagemap words (CONFIG_MEM_SOFT_DIRTY)."""
    area, address = _pages(1)
    area[0] = 1
    fd = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"4")
    finally:
        os.close(fd)
    if _pagemap_word(address) & pc.PAGEMAP_SOFT_DIRTY:
        raise KernelError("the soft-dirty bit does not go away")
    area[0] = 2
    if not _pagemap_word(address) & pc.PAGEMAP_SOFT_DIRTY:
        raise KernelError("a written page is not marked soft-dirty")


def write_protect_tracking() -> None:
    """Which pages were written, from userfaultfd(2) with WP_ASYNC and PAGEMAP_SCAN (Linux 6.7)."""
    if not features.userfaultfd_features() & pc.UFFD_FEATURE_WP_ASYNC:
        raise KernelError("userfaultfd has no WP_ASYNC", features.refusals.get("userfaultfd_features", ""))
    area, start = _pages(4)
    end = start + len(area)
    area[:] = b"x" * len(area)
    fd = syscall("userfaultfd", nr.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
    wanted = pc.UFFD_FEATURE_WP_ASYNC | pc.UFFD_FEATURE_WP_UNPOPULATED
    fcntl.ioctl(fd, pc.UFFDIO_API, pc.UFFDIO_API_ARG.pack(pc.UFFD_API, wanted, 0))
    fcntl.ioctl(fd, pc.UFFDIO_REGISTER, pc.UFFDIO_REGISTER_ARG.pack(start, len(area), pc.UFFDIO_REGISTER_MODE_WP, 0))
    _written(start, end)
    area[mman.PAGE] = 1
    found = _written(start, end)
    if found != [(start + mman.PAGE, start + 2 * mman.PAGE)]:
        raise KernelError("write-protect tracking shows other pages than the written one")


def _written(start: int, end: int) -> list[tuple[int, int]]:
    """The ranges written since the last call."""
    regions = bytearray(mman.PAGE_REGION.size * 4)
    flags = pc.PM_SCAN_WP_MATCHING | pc.PM_SCAN_CHECK_WPASYNC
    written = mman.PAGE_IS_WRITTEN
    arg = bytearray(
        mman.PM_SCAN_ARG.pack(
            mman.PM_SCAN_ARG.size, flags, start, end, 0, address_of(regions), 4, 0, 0, written, 0, written
        )
    )
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = fcntl.ioctl(fd, mman.PAGEMAP_SCAN, arg)
    finally:
        os.close(fd)
    return [mman.PAGE_REGION.unpack_from(regions, i * mman.PAGE_REGION.size)[:2] for i in range(count)]


def userfaultfd() -> None:
    """userfaultfd(2) that also gets the faults of the kernel (CAP_SYS_PTRACE or vm.unprivileged_userfaultfd)."""
    if not features.userfaultfd_features():
        raise KernelError(features.refusals.get("userfaultfd_features", "userfaultfd has no features"))


def userfaultfd_events() -> None:
    """userfaultfd's reports of fork, remap, unmap and remove."""
    userfaultfd()
    have = features.userfaultfd_features()
    names = {
        "fork": pc.UFFD_FEATURE_EVENT_FORK,
        "remap": pc.UFFD_FEATURE_EVENT_REMAP,
        "unmap": pc.UFFD_FEATURE_EVENT_UNMAP,
        "remove": pc.UFFD_FEATURE_EVENT_REMOVE,
    }
    missing = [name for name, bit in names.items() if not have & bit]
    if missing:
        raise KernelError(f"userfaultfd does not report: {', '.join(missing)}")


def memory_map() -> None:
    """PR_GET_TID_ADDRESS, and PR_SET_MM_MAP (Linux 3.18) by setting the values that this process has."""
    word = bytearray(8)
    syscall("PR_GET_TID_ADDRESS", nr.prctl, prctl.GET_TID_ADDRESS, address_of(word), 0, 0, 0)
    size = bytearray(4)
    syscall("PR_SET_MM_MAP_SIZE", nr.prctl, prctl.SET_MM, pc.PR_SET_MM_MAP_SIZE, address_of(size), 0, 0)
    if int.from_bytes(size, "little") != prctl.MM_MAP.size:
        raise KernelError(f"struct prctl_mm_map has {int.from_bytes(size, 'little')} bytes, not {prctl.MM_MAP.size}")
    stat = procfs.stat(os.getpid())
    image = prctl.MM_MAP.pack(
        stat.start_code, stat.end_code, stat.start_data, stat.end_data, stat.start_brk, syscall("brk", nr.brk, 0),
        stat.start_stack, stat.arg_start, stat.arg_end, stat.env_start, stat.env_end, 0, 0, 0xFFFFFFFF,
    )  # fmt: skip
    buffer = bytearray(image)
    syscall("PR_SET_MM_MAP", nr.prctl, prctl.SET_MM, prctl.SET_MM_MAP, address_of(buffer), len(buffer), 0)


def vdso_remap() -> None:
    """mremap(2) of vvar and vdso, after which a signal still comes through.

    Nothing here may ask for the time once the vdso has moved: the C library would look for it at the old place.
    """
    special = [m for m in procfs.maps(os.getpid()) if m.name.startswith("[vvar") or m.name == "[vdso]"]
    if not special:
        raise KernelError("this kernel gives no vdso")
    base, end = special[0].start, special[-1].end
    target = syscall("mmap", nr.mmap, 0, end - base, mman.PROT_READ, _ANONYMOUS, -1, 0)
    caught: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _frame: caught.append(number))
    how = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
    for m in special:
        size = m.end - m.start
        syscall(f"mremap of {m.name}", nr.mremap, m.start, size, size, how, target + m.start - base)
    os.kill(os.getpid(), signal.SIGUSR1)
    if caught != [signal.SIGUSR1]:
        raise KernelError("no signal comes through after the vdso was moved")
    where = {m.name: m.start for m in procfs.maps(os.getpid())}
    if where.get("[vdso]") != target + special[-1].start - base:
        raise KernelError("the moved vdso is not shown as [vdso] any more")


def aio_remap() -> None:
    """A ring of io_setup(2) that still works after mremap(2)."""
    context = bytearray(8)
    syscall("io_setup", nr.io_setup, 4, address_of(context))
    old = int.from_bytes(context, "little")
    ring = next((m for m in procfs.maps(os.getpid()) if m.start == old), None)
    if ring is None:
        raise KernelError("the ring of io_setup is not among the mappings")
    size = ring.end - ring.start
    new = syscall("mmap", nr.mmap, 0, size, mman.PROT_READ, _ANONYMOUS, -1, 0)
    syscall("mremap", nr.mremap, old, size, size, mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED, new)
    fd = os.memfd_create("aio", os.MFD_CLOEXEC)
    os.write(fd, b"firn")
    found = bytearray(4)
    block = bytearray(pc.IOCB.pack(0, 0, 0, pc.IOCB_CMD_PREAD, 0, fd, address_of(found), len(found), 0, 0, 0, 0))
    blocks = bytearray(struct.pack("<Q", address_of(block)))
    syscall("io_submit", nr.io_submit, new, 1, address_of(blocks))
    event, limit = bytearray(pc.IO_EVENT_SIZE), bytearray(struct.pack("<qq", 1, 0))
    if syscall("io_getevents", nr.io_getevents, new, 1, 1, address_of(event), address_of(limit)) != 1:
        raise KernelError("a moved aio ring gives no events")
    syscall("io_destroy", nr.io_destroy, new)
    if found != b"firn":
        raise KernelError("a moved aio ring gives wrong data")


def unaligned_vmsplice() -> None:
    """vmsplice(2) of one byte that does not lie at the start of a page."""
    area, address = _pages(1)
    area[1:2] = b"f"
    reader, writer = os.pipe()
    vector = bytearray(struct.pack("<QQ", address + 1, 1))
    if syscall("vmsplice", nr.vmsplice, writer, address_of(vector), 1, 0) != 1 or os.read(reader, 1) != b"f":
        raise KernelError("vmsplice does not move a single byte")


def memfd_hugetlb() -> None:
    """memfd_create(2) with MFD_HUGETLB (Linux 4.14)."""
    os.close(os.memfd_create("firn", os.MFD_CLOEXEC | mman.MFD_HUGETLB))


def huge_pages() -> str | None:
    """MAP_HUGETLB mappings of every size that this machine has, and free pages to fill them."""
    directory = "/sys/kernel/mm/hugepages"
    free = 0
    for name in os.listdir(directory):
        kilobytes = int(name.removeprefix("hugepages-").removesuffix("kB"))
        flags = _ANONYMOUS | mman.MAP_HUGETLB | mman.MAP_NORESERVE | (kilobytes.bit_length() + 9) << mman.MAP_HUGE_SHIFT
        size = kilobytes * 1024
        what = f"mmap of a huge page of {kilobytes} kB"
        syscall("munmap", nr.munmap, syscall(what, nr.mmap, 0, size, mman.PROT_READ, flags, -1, 0), size)
        free += int(procfs.read(f"{directory}/{name}/free_hugepages"))
    return None if free else "no huge page is free (see the sysctl vm.nr_hugepages)"


def kernel_view() -> None:
    """Reading the kernel's own structures by BPF, with type information of the kernel."""
    AioRequests().close()


def undo_lists() -> None:
    """bpf(2) and BTF: what a process gives back to semaphores, in the kernel's memory."""
    UndoLists().close()


def executable_memfd() -> None:
    """Executing a memfd through /proc/self/fd (the sysctl vm.memfd_noexec can forbid it)."""
    header, segment, code = 64, 56, bytes.fromhex("b83c00000031ff0f05")  # mov eax, 60 (exit); xor edi, edi; syscall
    base, size = 0x10000, header + segment + len(code)
    image = b"\x7fELF\x02\x01\x01" + bytes(9)
    image += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + header + segment, header, 0, 0, header, segment, 1, 0, 0, 0)
    image += struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, mman.PAGE) + code
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    os.write(fd, image)
    pid = os.posix_spawn(f"/proc/self/fd/{fd}", ["probe"], {})
    _, status = os.waitpid(pid, 0)
    if status:
        raise KernelError(f"a program in a memfd ends with status {status:#x}")
