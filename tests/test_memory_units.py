"""The parts that decide what happens to memory, each by itself: /proc parsing, page lists, inheritance, the vdso."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import Runner, firn_command, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from workloads.forest import descendants
from workloads.table import Workload

from firn.abi import mman
from firn.abi.cpuid import xsave_layout
from firn.errors import RestoreError
from firn.host import features, procfs
from firn.images.pages import PagemapReader
from firn.images.store import ImageDir
from firn.resources.memory import areas, copyout, inherit, pagelist, rebuild, vdso

PAGE = mman.PAGE
libc = ctypes.CDLL(None, use_errno=True)
few = settings(max_examples=150, deadline=None, database=None, print_blob=True)

# ---- /proc

NAMES = [
    "two words", " leading", "trailing ", "line\nbreak", "gone (deleted)", "tab\there", "(", "a) R 1 (b", "[vdso]",
    "[heap]", "carriage\rreturn", "next\x85line", "separator\u2028", "VmFlags: rd", "1234-5678 r-xp", "é",
    "\udcff\udcfe",
]  # fmt: skip


@pytest.mark.parametrize("name", [*(name[:15] for name in NAMES), "123456789012345", ")", ") ) S 1", "("])
def test_any_name_of_a_process(name: str) -> None:
    """comm is read back as it is, and the fields behind it are not taken for it."""
    own, raw = Path("/proc/self/comm"), os.fsencode(name)[:15]
    before = own.read_bytes()
    try:
        own.write_bytes(raw)
        stat, status = procfs.stat(os.getpid()), procfs.status(os.getpid())
    finally:
        own.write_bytes(before.rstrip(b"\n"))
    assert (stat.comm, stat.pid, stat.ppid, stat.state) == (raw, os.getpid(), os.getppid(), "R")
    assert stat.num_threads == int(status["Threads"]) and status["PPid"] == str(os.getppid())


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_mapped_file(name: str, deleted: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(PAGE))
    inode = path.stat().st_ino
    with path.open("rb") as file:
        area = mmap.mmap(file.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    if deleted:
        path.unlink()
    shown = str(path).replace("\n", "\\012") + (" (deleted)" if deleted else "")
    for read in (procfs.maps, procfs.smaps):
        found = [m for m in read(os.getpid()) if m.name == shown]
        assert len(found) == 1, f"{read.__name__} has no {shown!r}"
        one = found[0]
        assert one.end - one.start == PAGE and one.prot == mman.PROT_READ and one.shared
        assert one.inode == inode
    assert one.flags is not None and {"rd", "mr", "ms"} <= one.flags
    area.close()
    found_vdso = procfs.named_map(os.getpid(), "[vdso]")
    assert found_vdso is not None and "x" in found_vdso.perms


def test_names_of_anonymous_memory() -> None:
    """PR_SET_VMA_ANON_NAME (Linux 5.17): blanks and brackets, and kinds that are no files."""
    area = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = ctypes.c_char.from_buffer(area)
    address = ctypes.c_ulong(ctypes.addressof(held))
    if libc.prctl(0x53564D41, ctypes.c_ulong(0), address, ctypes.c_ulong(PAGE), ctypes.c_char_p(b"a (b) c ")):
        pytest.skip("the kernel gives no names to anonymous memory")
    assert [m.start for m in procfs.maps(os.getpid()) if m.name == "[anon:a (b) c ]"] == [address.value]


# ---- page lists


class Room:
    """Pages of our own: anonymous ones and such of a file, both with holes, some read, some written, some guarded."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(range(256)) * (16 * PAGE // 256))
        self.areas = [mmap.mmap(-1, 16 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)]
        with path.open("rb") as file:
            self.areas.append(
                mmap.mmap(file.fileno(), 16 * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            )
        self.held = [ctypes.c_char.from_buffer(area) for area in self.areas]
        self.starts = [ctypes.addressof(held) for held in self.held]
        self.expected: list[tuple[int, int]] = []
        for area, start in zip(self.areas, self.starts, strict=True):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(16 * PAGE), mman.MADV_NOHUGEPAGE)
            for page in (1, 2, 5, 9):
                area[page * PAGE] = 7
            for page in (0, 3, 10):
                area[page * PAGE]
            self.expected += [(start + first * PAGE, start + end * PAGE) for first, end in ((1, 3), (5, 6), (9, 10))]
        self.guarded = self._guard(self.starts[0] + 12 * PAGE)
        self.ranges = sorted((start, start + 16 * PAGE) for start in self.starts)

    def _guard(self, at: int) -> list[tuple[int, int]]:
        failed = libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(2 * PAGE), mman.MADV_GUARD_INSTALL)
        return [] if failed else [(at, at + 2 * PAGE)]


@pytest.mark.parametrize("use_scan", [False, True])
def test_pages_of_a_process(use_scan: bool, tmp_path: Path) -> None:
    """Written pages are saved; zero pages, pages of the page cache and holes are not; guard pages are told apart."""
    if use_scan and not features.pagemap_scan():
        pytest.skip("no PAGEMAP_SCAN")
    room = Room(tmp_path / "file")
    found = pagelist.find(os.getpid(), room.ranges, use_scan)
    assert found.runs == sorted(room.expected)
    assert found.guards == room.guarded
    assert found.huge == []
    assert found.total() == 8 * PAGE


@pytest.mark.parametrize("use_scan", [False, True])
def test_pages_are_cut_to_the_ranges(use_scan: bool, tmp_path: Path) -> None:
    if use_scan and not features.pagemap_scan():
        pytest.skip("no PAGEMAP_SCAN")
    room = Room(tmp_path / "file")
    start = room.starts[0]
    ranges = [(start + 2 * PAGE, start + 4 * PAGE), (start + 9 * PAGE, start + 13 * PAGE)]
    found = pagelist.find(os.getpid(), ranges, use_scan)
    assert found.runs == [(start + 2 * PAGE, start + 3 * PAGE), (start + 9 * PAGE, start + 10 * PAGE)]
    assert found.guards == ([(start + 12 * PAGE, start + 13 * PAGE)] if room.guarded else [])
    assert pagelist.find(os.getpid(), [], use_scan).runs == []


def test_both_ways_agree_on_a_whole_process() -> None:
    """... that stands still: a sleeping program, every private mapping of it."""
    if not features.pagemap_scan():
        pytest.skip("no PAGEMAP_SCAN")
    process = subprocess.Popen(["/bin/sleep", "100"])
    try:
        wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/syscall").read_text().split()[0] in ("35", "230"))
        mapped = [m for m in procfs.maps(process.pid) if not m.shared and m.name[:3] not in ("[vv", "[vs")]
        ranges = [(m.start, m.end) for m in mapped]
        one, other = (pagelist.find(process.pid, ranges, use_scan) for use_scan in (False, True))
        assert one.runs == other.runs and one.runs and one.guards == other.guards
    finally:
        process.kill()
        process.wait()


# ---- ranges of pages, against a model that looks at every page

LIMIT = 40


def _ranges(gap: int = 1) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ascending, disjoint page ranges below LIMIT with at least *gap* pages between them."""

    def build(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
        found, at = [], 0
        for skip, length in steps:
            start = at + skip
            if start + length > LIMIT:
                break
            found.append((start, start + length))
            at = start + length + gap
        return found

    return st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8)), max_size=8).map(build)


def _pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for start, end in ranges for page in range(start, end)}


def _bytes(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start * PAGE, end * PAGE) for start, end in ranges]


@given(_ranges(), _ranges(0), st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 3))
@few
def test_pieces_cover_the_runs(
    runs: list[tuple[int, int]], marked: list[tuple[int, int]], bits: list[int], offset: int
) -> None:
    """Every page once, in order, one after the other in the file, with the marks of where it lies."""
    marks = {page: bit for (start, end), bit in zip(marked, bits, strict=False) for page in range(start, end)}
    with_bits = [(low, high, bit) for (low, high), bit in zip(_bytes(marked), bits, strict=False)]
    at = offset * PAGE
    seen = []
    for piece in copyout.plan(_bytes(runs), with_bits, offset * PAGE):
        assert piece.offset == at and 0 < piece.size <= copyout.CHUNK
        assert piece.size == sum(size for _, size in piece.parts)
        at += piece.size
        for address, size in piece.parts:
            for page in range(address // PAGE, (address + size) // PAGE):
                seen.append(page)
                assert marks.get(page, 0) == piece.marks
    assert seen == sorted(_pages(runs))


def test_large_pieces_are_cut() -> None:
    run = (1 << 30, (1 << 30) + 3 * copyout.CHUNK + PAGE)
    assert [piece.size for piece in copyout.plan([run], [])] == [copyout.CHUNK] * 3 + [PAGE]
    many = [(index * 2 * PAGE, (index * 2 + 1) * PAGE) for index in range(2000)]
    pieces = copyout.plan(many, [])
    assert sum(piece.size for piece in pieces) == 2000 * PAGE
    assert max(len(piece.parts) for piece in pieces) <= 1024, "more than IOV_MAX"


@given(_ranges(), _ranges(0))
@few
def test_split(runs: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> None:
    given_runs = [rebuild.Run(low, high - low, 3, 100 + low) for low, high in _bytes(runs)]
    inside = _pages(ranges)
    seen = []
    for part, is_inside in inherit.split(given_runs, _bytes(ranges)):
        assert part.size > 0 and part.offset == 100 + part.address and part.fd == 3
        for page in range(part.address // PAGE, (part.address + part.size) // PAGE):
            seen.append(page)
            assert is_inside == (page in inside)
    assert seen == sorted(_pages(runs))


@given(st.integers(0, LIMIT - 1), st.integers(1, LIMIT), _ranges(0))
@few
def test_pieces_of_a_mapping(start: int, length: int, kept: list[tuple[int, int]]) -> None:
    inside = _pages(kept)
    seen = []
    for low, high, is_kept in rebuild.pieces(start * PAGE, (start + length) * PAGE, _bytes(kept)):
        assert low < high
        for page in range(low // PAGE, high // PAGE):
            seen.append(page)
            assert is_kept == (page in inside)
    assert seen == list(range(start, start + length))


# ---- what a child takes over from its parent

Contents = dict[int, int]
"""Page -> what is in it (a small number)."""


class Side:
    """One process: its mappings (with the kind of each), and what is in which of their pages."""

    def __init__(self, mappings: list[tuple[int, int, int]], contents: Contents) -> None:
        covered = _pages([(start, end) for start, end, _ in mappings])
        self.contents = {page: value for page, value in contents.items() if page in covered}
        self.vmas = [self._vma(*mapping) for mapping in mappings]

    @staticmethod
    def _vma(start: int, end: int, kind: int) -> dict[str, Any]:
        vma: dict[str, Any] = {
            "start": start * PAGE, "end": end * PAGE, "pgoff": 0, "shmid": 0, "prot": 3, "status": 0, "fd": -1,
            "flags": mman.MAP_PRIVATE | mman.MAP_ANONYMOUS,
        }  # fmt: skip
        if kind == 1:
            vma["prot"] = 1
        elif kind == 2:
            vma["madv"] = 1 << mman.MADV_DONTFORK
        elif kind == 3:
            vma |= {"flags": mman.MAP_PRIVATE, "status": areas.FILE_PRIVATE, "shmid": 5, "pgoff": start * PAGE}
        return vma

    def runs(self, fd: int) -> list[rebuild.Run]:
        """The pages as a page image in *fd*."""
        found: list[rebuild.Run] = []
        for page in sorted(self.contents):
            offset = os.lseek(fd, 0, os.SEEK_END)
            os.pwrite(fd, bytes([self.contents[page]]) * PAGE, offset)
            if found and found[-1].address + found[-1].size == page * PAGE:
                found[-1].size += PAGE
            else:
                found.append(rebuild.Run(page * PAGE, PAGE, fd, offset))
        return found


def _read(run: rebuild.Run) -> Contents:
    first = run.address // PAGE
    return {first + index: os.pread(run.fd, 1, run.offset + index * PAGE)[0] for index in range(run.size // PAGE)}


def _sides() -> st.SearchStrategy[tuple[Side, Side]]:
    """A parent and a child whose mappings and contents are often, but not always, the same."""
    mappings = st.tuples(_ranges(0), st.lists(st.integers(0, 3), min_size=8, max_size=8)).map(
        lambda both: [(start, end, kind) for (start, end), kind in zip(both[0], both[1], strict=False)]
    )
    contents = st.dictionaries(st.integers(0, LIMIT - 1), st.integers(1, 3), max_size=LIMIT)

    def pair(
        one: list[tuple[int, int, int]], other: list[tuple[int, int, int]] | None, has: Contents, changed: Contents,
        lost: set[int],
    ) -> tuple[Side, Side]:  # fmt: skip
        child = {page: value for page, value in (has | changed).items() if page not in lost}
        return Side(one, has), Side(one if other is None else other, child)

    changes = st.dictionaries(st.integers(0, LIMIT - 1), st.integers(1, 3), max_size=6)
    lost = st.sets(st.integers(0, LIMIT - 1), max_size=6)
    return st.builds(pair, mappings, st.one_of(st.none(), mappings), contents, changes, lost)


def _with_images(check: Callable[[int, int], None]) -> None:
    one, other = os.memfd_create("parent", os.MFD_CLOEXEC), os.memfd_create("child", os.MFD_CLOEXEC)
    try:
        check(one, other)
    finally:
        os.close(one)
        os.close(other)


def _compare(parent: Side, child: Side, one: int, other: int) -> None:
    got = inherit.compare(parent.vmas, parent.runs(one), child.vmas, child.runs(other), True)
    kept = _pages([(start // PAGE, end // PAGE) for start, end in got.kept])
    memory = {page: value for page, value in parent.contents.items() if page in kept}
    dropped = _pages([(start // PAGE, end // PAGE) for start, end in got.dropped])
    assert dropped <= kept
    for page in dropped:
        memory.pop(page)
    read: Contents = {}
    for run in got.runs:
        read |= _read(run)
    assert not {page for page, value in read.items() if memory.get(page) == value}, "read what was there"
    assert memory | read == child.contents
    for start, end in got.kept:
        mine = next(vma for vma in child.vmas if vma["start"] == start)
        theirs = next(vma for vma in parent.vmas if vma["start"] <= start and vma["end"] >= end)
        assert (mine["prot"], mine["status"]) == (theirs["prot"], theirs["status"]) and "madv" not in mine
        assert end <= mine["end"] == got.ends[start]
    assert sorted(got.ends) == [start for start, _ in got.kept]


@given(_sides())
@few
def test_a_child_gets_its_own_memory(sides: tuple[Side, Side]) -> None:
    """What is kept, what is dropped and what is read in make together exactly the child's pages, and nothing twice."""
    _with_images(lambda one, other: _compare(*sides, one, other))


def test_everything_is_inherited_of_an_equal_parent() -> None:
    side = Side([(0, 20, 0), (22, 30, 3)], {page: page % 3 + 1 for page in range(0, 30, 2)})

    def check(one: int, other: int) -> None:
        got = inherit.compare(side.vmas, side.runs(one), side.vmas, side.runs(other), True)
        assert got.kept == [(0, 20 * PAGE), (22 * PAGE, 30 * PAGE)] and not got.runs and not got.dropped

    _with_images(check)


def test_a_longer_mapping_is_lengthened() -> None:
    """It must be one mapping to mremap(2); one that begins earlier cannot be, and is made anew."""
    parent = Side([(4, 8, 0), (20, 24, 0)], {})
    child = Side([(4, 12, 0), (18, 24, 0)], {})
    got = inherit.compare(parent.vmas, [], child.vmas, [], True)
    assert got.kept == [(4 * PAGE, 8 * PAGE)] and got.ends == {4 * PAGE: 12 * PAGE}


# ---- the vdso


@pytest.fixture(scope="module")
def own() -> vdso.Own:
    return vdso.Own()


def test_the_functions_of_our_vdso(own: vdso.Own) -> None:
    found = vdso.functions(own.code)
    assert {"__vdso_clock_gettime", "__vdso_gettimeofday", "__vdso_getcpu"} <= set(found)
    assert all(0 < offset < len(own.code) for offset in found.values())


def test_the_same_vdso_replaces_the_old_one(own: vdso.Own) -> None:
    at = 0x7FFF00000000
    placed = vdso.place(own, own.code, at, at + own.vvar_size, 0x10000000)
    assert placed.replaces and placed.map_at == at and not placed.patches


def test_another_vdso_jumps_to_ours(own: vdso.Own) -> None:
    at, spare = 0x7FFF00000000, 0x10000000
    other = bytearray(own.code)
    other[15] ^= 1
    placed = vdso.place(own, bytes(other), at, at + own.vvar_size, spare)
    assert not placed.replaces and placed.map_at == spare
    offsets = sorted(set(vdso.functions(own.code).values()))
    assert [address - at - own.vvar_size for address, _ in placed.patches] == offsets
    for offset, (_, code) in zip(offsets, placed.patches, strict=True):
        assert code[:2] == b"\x49\xbb" and code[10:] == b"\x41\xff\xe3", "movabs r11; jmp r11"
        assert int.from_bytes(code[2:10], "little") == spare + own.vvar_size + offset


def test_a_function_that_is_missing_here_is_named(own: vdso.Own) -> None:
    other = own.code.replace(b"__vdso_getcpu\0", b"__vdso_getCPU\0")
    with pytest.raises(RestoreError, match="__vdso_getCPU"):
        vdso.place(own, other, 0, own.vvar_size, 0x10000000)


@given(st.data())
@few
def test_a_damaged_vdso_is_an_error_or_read(own: vdso.Own, data: st.DataObject) -> None:
    image = bytearray(own.code)
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, 1200))] = data.draw(st.integers(0, 255))
    image = image[: data.draw(st.sampled_from([len(image), len(image), 64, 1000]))]
    try:
        vdso.functions(bytes(image))
    except RestoreError:
        pass


@given(st.binary(max_size=300))
@example(b"\x7fELF" + bytes(200))
@few
def test_no_vdso_is_an_error_or_read(image: bytes) -> None:
    try:
        assert not vdso.functions(image)
    except RestoreError:
        pass


def _spoil_vdso(images: Path, pid: int, own: vdso.Own) -> None:
    """Make the dumped vdso another one, whose functions would trap if anybody ran them."""
    directory = ImageDir.open(str(images))
    try:
        vmas = directory.read_one("MM", pid)["vmas"]
        area = next(vma for vma in vmas if vma["status"] & areas.VDSO)
        reader = PagemapReader(directory, "PAGEMAP", pid)
        run = next(run for run in reader if run.vaddr <= area["start"] < run.vaddr + run.nr_pages * PAGE)
        place = run.offset + area["start"] - run.vaddr
        pages = os.readlink(f"/proc/self/fd/{run.fd}")
        reader.close()
    finally:
        directory.close()
    offsets = sorted(set(vdso.functions(own.code).values()))
    with open(pages, "r+b") as file:
        file.seek(place)
        assert file.read(len(own.code)) == own.code
        for offset, following in zip(offsets, [*offsets[1:], len(own.code)], strict=True):
            file.seek(place + offset)
            file.write(b"\xcc" * min(following - offset, 32))
        file.seek(place + 15)
        file.write(b"\1")


@pytest.mark.skipif(not firn_command(), reason="no firn command")
@pytest.mark.parametrize("again", [False, True])
def test_the_vdso_of_another_kernel(runner: Runner, own: vdso.Own, again: bool) -> None:
    """A parent, a child and threads that have another kernel's vdso: the time goes on, also after a second dump."""
    target = runner.start(Workload("trees_clock", "vdso"))
    tree = [target.pid, *descendants(target.pid)]
    images = runner.dump(target)
    for pid in tree:
        _spoil_vdso(images, pid, own)
    back = runner.restore(images, target)
    runner.assert_right(back, "with another vdso")
    for pid in tree:
        assert "[vdso]" in Path(f"/proc/{pid}/maps").read_text()
    if again:
        back = runner.restore(runner.dump(back), back)
        runner.assert_right(back, "with another vdso, a second time")
    runner.kill(back)


# ---- cpuid

ASK = """
#include <cpuid.h>
#include <stdio.h>
int main(void) {
    unsigned a, b, c, d;
    for (unsigned i = 2; i < 63; i++)
        if (__get_cpuid_count(0xd, i, &a, &b, &c, &d) && a && !(c & 1))
            printf("%u %u %u\\n", i, b, a);
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
def test_the_xsave_layout(tmp_path: Path) -> None:
    program = tmp_path / "ask"
    subprocess.run(["gcc", "-x", "c", "-o", program, "-"], input=ASK, text=True, check=True, timeout=60)
    said = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    expected = {int(number): (int(at), int(size)) for number, at, size in map(str.split, said.splitlines())}
    layout = xsave_layout()
    assert {number: place for number, place in layout.items() if number >= 2} == expected
    parts = sorted(place for number, place in layout.items() if number >= 2)
    assert all(at >= 576 for at, _ in parts)
    assert all(at + size <= following for (at, size), (following, _) in pairwise(parts))
    if " avx " in Path("/proc/cpuinfo").read_text():
        assert layout[2] == (576, 256), "the upper halves of ymm (Intel SDM vol. 1, 13.4.3)"
