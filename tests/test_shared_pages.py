"""Pages that several processes share: found by the kernel's identity, stored once, and born again from one parent."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import addressof, c_char
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from firn.abi import mman
from firn.host import features
from firn.images.pages import PagemapReader, PagesFiles
from firn.images.store import ImageDir
from firn.resources.memory import copyout, frames, inherit, nursery, pagelist, shared
from firn.resources.memory.pages import ProcessPages
from firn.resources.memory.rebuild import Run

PAGE = mman.PAGE
BASE = 0x10000000
few = settings(
    max_examples=150, deadline=None, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

needs_frames = pytest.mark.skipif(not frames.are_visible(), reason="page frame numbers are hidden from us")


# ---- finding them

@contextmanager
def _forks(room: mmap.mmap, works: list[Callable[[], object]]) -> Iterator[list[int]]:
    """Children that have each done their work and wait."""
    pids = []
    try:
        for work in works:
            ready, done = os.pipe()
            pid = os.fork()
            if not pid:
                work()
                os.write(done, b"!")
                while True:
                    signal.pause()
            pids.append(pid)
            assert os.read(ready, 1) == b"!"
            os.close(ready)
            os.close(done)
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@needs_frames
def test_frames_of_a_family() -> None:
    """Parent and children share exactly what none of them has written since the fork."""
    pages = 1500
    room = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mman.MADV_NOHUGEPAGE)
    start = addressof(c_char.from_buffer(room))
    numbers = random.Random(1)
    gaps = {0, 63, 64, 65, 700, 701, pages - 1}
    for page in set(range(pages)) - gaps:
        room[page * PAGE] = page % 250 + 1
    written = [set(numbers.sample(range(pages), count)) | {5, 64} for count in (0, 3, 200)]

    def write(mine: set[int], value: int) -> Callable[[], object]:
        return lambda: [room.__setitem__(page * PAGE, value) for page in mine]

    with _forks(room, [write(mine, index) for index, mine in enumerate(written)]) as pids:
        for page in range(100, 120):
            room[page * PAGE] = 255  # by the parent, after the forks
        members = [
            (pid, pagelist.find(pid, [(start, start + pages * PAGE)], features.pagemap_scan()).runs)
            for pid in [os.getpid(), *pids]
        ]
        groups = frames.find(members)
    found = {page: bits for low, high, bits in groups for page in range((low - start) // PAGE, (high - start) // PAGE)}
    for page in range(pages):
        holders = 0b1111 if page not in gaps else 0
        for index, mine in enumerate(written, 1):
            if page in mine:
                holders &= ~(1 << index)
        if 100 <= page < 120:
            holders &= ~1
        assert found.get(page, 0) == (holders if holders.bit_count() > 1 else 0), page


@needs_frames
def test_what_changes_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is not where it was at the second look counts as unshared."""
    first = {1: _words([9, 9, 9]), 2: _words([9, 9, 9])}
    second = {1: _words([9, 9, 9]), 2: _words([9, 8, 9])}
    looks = [first[1], first[2], second[1], second[2]]
    monkeypatch.setattr(frames, "_blocks", lambda pid, runs: iter([(BASE, looks.pop(0))]))
    assert frames.find([(1, []), (2, [])]) == []


def _words(numbers: list[int]) -> bytes:
    """A block whose first pages are present, in frames *numbers*."""
    return b"".join((mman.PAGEMAP_PRESENT | number).to_bytes(8, "little") for number in numbers).ljust(64 * 8, b"\0")


@given(st.lists(st.lists(st.integers(0, 3), min_size=64, max_size=64), min_size=2, max_size=5))
def test_blocks_are_taken_apart(contents: list[list[int]]) -> None:
    """By pages, wherever processes differ; 0 is a page that is not there."""
    holders: dict[bytes, int] = {}
    for index, numbers in enumerate(contents):
        words = b"".join((number and mman.PAGEMAP_PRESENT | number).to_bytes(8, "little") for number in numbers)
        holders[words] = holders.get(words, 0) | 1 << index
    groups: list[tuple[int, int, int]] = []
    frames._refine(BASE, 64, holders, groups)
    found = {(at, bits) for low, high, bits in groups for at in range(low, high, PAGE)}
    wanted = set()
    for page in range(64):
        for number in (1, 2, 3):
            bits = sum(1 << index for index, numbers in enumerate(contents) if numbers[page] == number)
            if bits.bit_count() > 1:
                wanted.add((BASE + page * PAGE, bits))
    assert found == wanted and len(groups) <= len(wanted)


@given(st.sets(st.integers(0, 3000), max_size=60), st.integers(1, 700))
def test_stretches_cover_the_runs(starts: set[int], most: int) -> None:
    runs: list[tuple[int, int]] = []
    for page in sorted(starts):
        low = max(page, runs[-1][1] // PAGE if runs else 0)
        runs.append((low * PAGE, (low + 1 + page % most) * PAGE))
    seen: list[tuple[int, int]] = []
    last = 0
    for low, high, inside in frames._stretches(runs):
        assert last <= low < high and low % (64 * PAGE) == high % (64 * PAGE) == 0
        assert all(low <= start < end <= high for start, end in inside)
        seen += inside
        last = high
    assert [at for low, high in seen for at in range(low, high, PAGE)] == [
        at for low, high in runs for at in range(low, high, PAGE)
    ]


# ---- storing them: at each of some addresses, every process has a page (a number) or none

MEMORY = st.integers(2, 6).flatmap(
    lambda processes: st.lists(
        st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=processes, max_size=processes),
        min_size=1, max_size=12,
    )
)  # fmt: skip


class _Fake(ProcessPages):
    """A process whose memory is made up."""

    def __init__(self, pid: int, memory: dict[int, bytes]) -> None:
        super().__init__(pid, [], False)
        self.memory = memory
        self.runs = self.shareable = [(at, at + PAGE) for at in memory]
        self.pages_id = pid


def _content(address: int, number: int) -> bytes:
    return f"{address:#x} {number}".encode().ljust(PAGE, b".")


@few
@given(memory=MEMORY)
@example(memory=[[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [3, 3, 2, 2, 2]])
def test_every_process_gets_its_pages(
    memory: list[list[int | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is shared, the page lists of all processes lead to their own contents, and to each shared page once."""
    members = [
        _Fake(pid, {
            BASE + 2 * PAGE * index: _content(index, row[pid - 1] or 0)
            for index, row in enumerate(memory) if row[pid - 1] is not None
        })
        for pid in range(1, len(memory[0]) + 1)
    ]  # fmt: skip
    groups = []
    for index, row in enumerate(memory):
        for number in range(4):
            bits = sum(1 << at for at, have in enumerate(row) if have == number)
            if bits.bit_count() > 1:
                groups.append((BASE + 2 * PAGE * index, BASE + 2 * PAGE * index + PAGE, bits))

    def copy(pid: int, pieces: list[copyout.Piece], target: int) -> None:
        for piece in pieces:
            content = b"".join(members[pid - 1].memory[at] for start, size in piece.parts
                               for at in range(start, start + size, PAGE))  # fmt: skip
            os.pwrite(target, content, piece.offset)

    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch, ImageDir.open(str(folder), create_files=True) as images:
        patch.setattr(frames, "find", lambda processes: groups)
        patch.setattr(shared, "LEAST", PAGE)
        patch.setattr(copyout, "copy", copy)
        made = shared.SharedPages([(one, one.pid) for one in members])
        assert made.copy(images) == bool(groups)
        made.save()
        for one in members:
            target = images.open_raw(f"pages-{one.pages_id}.img", os.O_RDWR | os.O_CREAT)
            one.copy_pages(one.pid, target)
            os.close(target)
            one.save(images)
        _check(images, members, made)


def _check(images: ImageDir, members: list[_Fake], made: shared.SharedPages) -> None:
    files = PagesFiles()
    for index, one in enumerate(members):
        got = {}
        for run in PagemapReader(images, "PAGEMAP", one.pid, files):
            for page in range(run.nr_pages):
                got[run.vaddr + page * PAGE] = os.pread(run.fd, PAGE, run.offset + page * PAGE)
        assert got == one.memory, f"process {index}"
    files.close()
    stored = sum(path.stat().st_size for path in Path(images.path).rglob("pages-*.img"))
    apart = sum(len(one.memory) for one in members) * PAGE
    assert stored < apart or not made.levels


def test_little_is_not_worth_it(tmp_path: Path) -> None:
    """Below a megabyte, pages stay in each process's own images, and nothing is said about what was shared."""
    size = shared.LEAST
    assert shared.arrange([(BASE, BASE + size - PAGE, 0b11)]) == []
    assert len(shared.arrange([(BASE, BASE + size, 0b11)])) == 1
    assert len(shared.arrange([(BASE, BASE + size // 2, 0b111)])) == 1


def test_two_families_have_an_image_each() -> None:
    size = shared.LEAST
    [level] = shared.arrange([(BASE, BASE + size, 0b0011), (BASE, BASE + size, 0b1100)])
    assert sorted(layer.members for layer in level) == [0b0011, 0b1100]


# ---- the directory

def test_the_directory_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    with ImageDir.open(str(tmp_path), create_files=True) as images:
        for _ in range(2):  # what an earlier dump has left is no hindrance
            images.clear_old()
            below = images.make_parent()
            assert below is not None and images.make_parent() is None
            deepest = below.make_parent()
            assert deepest is not None
            for one in (below, deepest):
                one.write_all("PAGEMAP", [{"pages_id": 1}], 7)
        images.commit({"img_version": 2})
        assert (tmp_path / "parent" / "parent" / "pagemap-7.img").exists()
        assert (tmp_path / "parent").stat().st_mode & 0o777 == 0o700
        images.abort()
        assert (tmp_path / "parent").exists()
        images.revoke()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["link", "checkpoint"])
def test_a_parent_of_somebody_else_is_left_alone(other: str, tmp_path: Path) -> None:
    folder, name = tmp_path / "images", tmp_path / "images" / "parent"
    folder.mkdir()
    if other == "link":
        (tmp_path / "base").mkdir()
        name.symlink_to("../base")
    else:
        name.mkdir()
        (name / "inventory.img").write_bytes(b"x")
    with ImageDir.open(str(folder), create_files=True) as images:
        images.clear_old()
        assert images.make_parent() is None
    assert name.exists() and list(folder.iterdir()) == [name]


# ---- being born from one parent

ONE_FILE = 5
Place = tuple[int, int]
"""A pages image and the number of a page in it."""


def _runs(pages: dict[int, Place]) -> list[Run]:
    return [Run(BASE + page * PAGE, PAGE, fd, offset * PAGE) for page, (fd, offset) in sorted(pages.items())]


def _pages(runs: list[Run]) -> dict[int, Place]:
    return {
        (run.address - BASE) // PAGE + page: (run.fd, run.offset // PAGE + page)
        for run in runs
        for page in range(run.size // PAGE)
    }


def _vma(start: int, end: int) -> dict[str, Any]:
    return {
        "start": BASE + start * PAGE, "end": BASE + end * PAGE, "pgoff": 0, "shmid": 0, "prot": 3,
        "flags": mman.MAP_PRIVATE | mman.MAP_ANONYMOUS, "status": 0x201, "fd": -1,
    }  # fmt: skip


OWNED = st.dictionaries(
    st.integers(0, 15), st.tuples(st.sampled_from([ONE_FILE, 9]), st.integers(0, 20)), max_size=12
)


@few
@given(OWNED, st.lists(OWNED, min_size=1, max_size=5))
def test_the_parent_holds_what_most_have(own: dict[int, Place], below: list[dict[int, Place]]) -> None:
    """At each page; and from that it comes to its own pages again."""
    vmas = [_vma(0, 16)]
    children = [nursery.Nursery(vmas, _runs(pages), []) for pages in below]
    made = nursery.plan(vmas, _runs(own), children, {ONE_FILE})
    held = _pages(made.runs)
    for page in range(16):
        votes: dict[Place | None, int] = {}
        for pages in below:
            if page in pages and pages[page][0] == ONE_FILE:
                votes[pages[page]] = votes.get(pages[page], 0) + 1
        if page in own:
            votes[own[page]] = votes.get(own[page], 0) + 1
        most = max(votes.values(), default=0)
        got = held.get(page)
        if votes.get(own.get(page), 1 if page not in own else 0) >= most:
            assert got == own.get(page)
        else:
            assert votes[got] == most
    wanted, dropped = inherit.overlay(made.runs, _runs(own))
    for low, high in dropped:
        for page in range((low - BASE) // PAGE, (high - BASE) // PAGE):
            del held[page]
    assert {**held, **_pages(wanted)} == own
    assert not (_pages(wanted).items() & held.items())


def test_guests() -> None:
    """A mapping that only two children have is lent to them by the parent, if it has nothing in that place."""
    pages = {page: (ONE_FILE, page) for page in range(40, 80)}
    alike = nursery.Nursery([_vma(40, 80)], _runs(pages), [])
    made = nursery.plan([_vma(0, 16)], [], [alike, alike], {ONE_FILE})
    assert made.guests == [_vma(40, 80)] and made.vmas == [_vma(0, 16), _vma(40, 80)] and _pages(made.runs) == pages
    for vmas, children in (
        ([{**_vma(0, 41), "prot": 1}], [alike, alike]),
        ([_vma(0, 16)], [alike]),
        ([_vma(0, 16)], [alike, nursery.Nursery([_vma(40, 81)], _runs(pages), [])]),
    ):
        made = nursery.plan(vmas, [], children, {ONE_FILE})
        assert made.guests == [] and made.vmas == vmas and made.runs == []


@pytest.mark.skipif(not Path("/usr/bin/crit").exists(), reason="no crit")
def test_crit_decodes_the_lists(tmp_path: Path) -> None:
    """Flags and places in all directories are what another reader sees."""
    with pytest.MonkeyPatch.context() as patch, ImageDir.open(str(tmp_path), create_files=True) as images:
        patch.setattr(frames, "find", lambda processes: [(BASE, BASE + shared.LEAST, 0b11)])
        patch.setattr(copyout, "copy", lambda *_: None)
        members = [_Fake(pid, {BASE + at: b"" for at in range(0, shared.LEAST + PAGE, PAGE)}) for pid in (1, 2)]
        made = shared.SharedPages([(one, one.pid) for one in members])
        made.copy(images)
        made.save()
        for one in members:
            one.save(images)
    shown = [
        subprocess.check_output(["/usr/bin/crit", "decode", "--pretty", "-i", str(tmp_path / name)], text=True)
        for name in ("pagemap-2.img", "parent/pagemap-2.img")
    ]
    assert "PE_PARENT" in shown[0] and "PE_PRESENT" in shown[0]
    assert "PE_PRESENT" in shown[1] and "PE_PARENT" not in shown[1]
