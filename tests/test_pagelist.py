"""Page lists of processes with many mappings: PAGEMAP_SCAN's own batches must not make pages come twice."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from firn.abi import mman
from firn.host import features
from firn.resources.memory import pagelist

COUNT = 1000
"""More than the 512 regions that the kernel gathers before it hands them over (fs/proc/task_mmu.c)."""

Room = tuple[int, mmap.mmap]


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """COUNT private anonymous mappings of two pages each, with alternating protection so that none merge; each has
    one touched page. Their first address, and what keeps them alive."""
    size = 2 * mman.PAGE
    memory = mmap.mmap(-1, COUNT * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(held)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(COUNT * size), mman.MADV_NOHUGEPAGE)
    for index in range(COUNT):
        memory[index * size] = 1
        if index % 2:
            at = ctypes.c_void_p(address + index * size)
            assert libc.mprotect(at, ctypes.c_size_t(size), mman.PROT_READ) == 0
    with open("/proc/self/maps") as maps:
        inside = [line for line in maps if address <= int(line.split("-")[0], 16) < address + COUNT * size]
    assert len(inside) == COUNT
    yield address, memory
    del held
    memory.close()


def expected(address: int) -> list[tuple[int, int]]:
    starts = range(address, address + 2 * mman.PAGE * COUNT, 2 * mman.PAGE)
    return [(start, start + mman.PAGE) for start in starts]


def whole(address: int) -> list[tuple[int, int]]:
    return [(address, address + 2 * mman.PAGE * COUNT)]


@pytest.mark.skipif(not features.pagemap_scan(), reason="this kernel has no PAGEMAP_SCAN")
def test_the_scan_tells_every_page_once_and_in_order(room: Room) -> None:
    address, _ = room
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = [(start, end) for start, end, _ in pagelist.scan(fd, *whole(address)[0])]
    finally:
        os.close(fd)
    assert found == expected(address)


@pytest.mark.parametrize("use_scan", [True, False])
@pytest.mark.parametrize("split", [True, False], ids=["one range", "range per mapping"])
def test_the_page_list_has_every_page_once_and_in_order(room: Room, use_scan: bool, split: bool) -> None:
    if use_scan and not features.pagemap_scan():
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    address, _ = room
    step = 2 * mman.PAGE
    ranges = [(start, start + step) for start, _ in expected(address)] if split else whole(address)
    pages = pagelist.find(os.getpid(), ranges, use_scan)
    assert pages.runs == expected(address)
    assert pages.total() == COUNT * mman.PAGE
    assert not pages.guards
