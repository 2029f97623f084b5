"""Page lists, incremental chains and what may be wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firn.errors import ImageError
from firn.images.pages import PAGE, PE_LAZY, PE_PARENT, PE_PRESENT, PagemapReader, normalise, write_pagemap
from firn.images.store import ImageDir

Runs = list[tuple[int, int, int]]


def _level(path: Path, runs: Runs, parent: str = "", mark: int = 0) -> Path:
    """A directory with a page list; each page begins with its address and the *mark* of its directory."""
    path.mkdir(exist_ok=True)
    with ImageDir.open(str(path), create_files=True) as images:
        write_pagemap(images, "PAGEMAP", 5, 9, runs)
        fd = images.open_raw("pages-9.img", os.O_WRONLY | os.O_CREAT)
        for vaddr, count, flags in runs:
            if flags & PE_PRESENT:
                for number in range(count):
                    os.write(fd, f"{vaddr + number * PAGE:x} {mark}".encode().ljust(PAGE, b"\0"))
        os.close(fd)
    if parent:
        (path / "parent").unlink(missing_ok=True)
        (path / "parent").symlink_to(parent)
    return path


def _contents(path: Path) -> dict[int, int]:
    """address -> mark of the directory that its contents come from."""
    found: dict[int, int] = {}
    with ImageDir.open(str(path)) as images, PagemapReader(images, "PAGEMAP", 5) as reader:
        for run in reader:
            assert not found or run.vaddr > max(found)
            data = os.pread(run.fd, run.nr_pages * PAGE, run.offset)
            assert len(data) == run.nr_pages * PAGE
            for number in range(run.nr_pages):
                address, mark = data[number * PAGE :].split(b"\0", 1)[0].split()
                assert int(address, 16) == run.vaddr + number * PAGE
                found[int(address, 16)] = int(mark)
        assert len(reader) == len(list(reader))
    return found


def test_chain(tmp_path: Path) -> None:
    here, there, own = PE_PRESENT, PE_PARENT, PE_PRESENT | PE_LAZY
    _level(tmp_path / "1", [(0, 4, here), (5 * PAGE, 5, own)], mark=1)
    _level(tmp_path / "2", [(0, 1, there), (PAGE, 2, here), (3 * PAGE, 1, there), (6 * PAGE, 3, there)], "../1", mark=2)
    last = [(0, 4, there), (6 * PAGE, 1, here), (7 * PAGE, 2, there), (1 << 46, 1, own)]
    _level(tmp_path / "3", last, "../2", mark=3)
    assert _contents(tmp_path / "3") == {
        0: 1, PAGE: 2, 2 * PAGE: 2, 3 * PAGE: 1, 6 * PAGE: 3, 7 * PAGE: 1, 8 * PAGE: 1, 1 << 46: 3,
    }  # fmt: skip


LEVEL = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=12, max_size=12)
"""(listed, stored) of each page"""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(levels=st.lists(LEVEL, min_size=1, max_size=4))
def test_random_chains(levels: list[list[tuple[bool, bool]]], tmp_path: Path) -> None:
    """Each level stores some pages, refers to the parent for some of those that exist there, and lists no others."""
    content: dict[int, int] = {}
    for number, level in enumerate(levels):
        new: dict[int, int] = {}
        runs: Runs = []
        for page, (listed, stored) in enumerate(level):
            vaddr = page * PAGE
            if not listed or not (stored or vaddr in content):
                continue
            flags = PE_PRESENT if stored else PE_PARENT
            new[vaddr] = number if stored else content[vaddr]
            if runs and runs[-1][2] == flags and runs[-1][0] + runs[-1][1] * PAGE == vaddr:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, flags)
            else:
                runs.append((vaddr, 1, flags))
        _level(tmp_path / str(number), runs, f"../{number - 1}" if number else "", mark=number)
        content = new
    assert _contents(tmp_path / str(len(levels) - 1)) == content


def test_long_chain(tmp_path: Path) -> None:
    _level(tmp_path / "0", [(0, 1, PE_PRESENT)], mark=7)
    for number in range(1, 300):
        _level(tmp_path / str(number), [(0, 1, PE_PARENT)], f"../{number - 1}")
    assert _contents(tmp_path / "299") == {0: 7}


def test_no_chain_without_need(tmp_path: Path) -> None:
    """A dangling parent link is looked at only for pages that are there."""
    _level(tmp_path / "1", [(0, 1, PE_PRESENT)], "nowhere", mark=1)
    assert _contents(tmp_path / "1") == {0: 1}


@pytest.mark.parametrize("runs", [[(0, 3, PE_PRESENT)], [(PAGE, 1, PE_PRESENT), (3 * PAGE, 1, PE_PRESENT)], []])
def test_page_missing_in_parent(runs: Runs, tmp_path: Path) -> None:
    _level(tmp_path / "1", runs)
    _level(tmp_path / "2", [(PAGE, 3, PE_PARENT)], "../1")
    with pytest.raises(ImageError, match=r"pagemap-5\.img: the page at 0x[123]000 is missing"):
        _contents(tmp_path / "2")


def test_parents_that_are_not_there(tmp_path: Path) -> None:
    _level(tmp_path / "2", [(0, 1, PE_PARENT)])
    with pytest.raises(ImageError, match="there is none"):
        _contents(tmp_path / "2")
    (tmp_path / "2" / "parent").symlink_to("nowhere")
    with pytest.raises(ImageError, match="parent"):
        _contents(tmp_path / "2")
    (tmp_path / "2" / "parent").unlink()
    (tmp_path / "1").mkdir()
    (tmp_path / "2" / "parent").symlink_to("../1")
    with pytest.raises(ImageError, match=r"pagemap-5\.img: missing"):
        _contents(tmp_path / "2")


@pytest.mark.parametrize("target", [".", "../1"])
def test_chain_in_a_circle(target: str, tmp_path: Path) -> None:
    _level(tmp_path / "1", [(0, 1, PE_PARENT)], "../2")
    _level(tmp_path / "2", [(0, 1, PE_PARENT)], target)
    with pytest.raises(ImageError, match="leads back into itself"):
        _contents(tmp_path / "2")


def test_short_pages_image(tmp_path: Path) -> None:
    path = _level(tmp_path / "1", [(0, 4, PE_PRESENT)])
    os.truncate(path / "pages-9.img", 4 * PAGE - 1)
    with pytest.raises(ImageError, match=r"pages-9\.img has 16383 bytes of 16384"):
        _contents(path)
    (path / "pages-9.img").unlink()
    with pytest.raises(ImageError, match=r"pages-9\.img: missing"):
        _contents(path)


def test_no_list_or_no_head(tmp_path: Path) -> None:
    path = _level(tmp_path / "1", [])
    assert _contents(path) == {}
    (path / "pagemap-5.img").write_bytes((path / "pagemap-5.img").read_bytes()[:8])
    with pytest.raises(ImageError, match="head"):
        _contents(path)
    (path / "pagemap-5.img").unlink()
    with pytest.raises(ImageError, match="missing"):
        _contents(path)


BAD: list[Runs] = [
    [(0, 0, PE_PRESENT)],
    [(1, 1, PE_PRESENT)],
    [(PAGE, 1, PE_PRESENT), (0, 1, PE_PRESENT)],
    [(0, 2, PE_PRESENT), (PAGE, 1, PE_PRESENT)],
    [(0, 1, PE_PRESENT), (0, 1, PE_PRESENT)],
    [(2**64 - PAGE, 2, PE_PRESENT)],
    [(0, 2**64 - 1, PE_PRESENT)],
]


@pytest.mark.parametrize("runs", BAD)
def test_impossible_runs(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pagemap-5\.img: the run"):
        _level(tmp_path / "1", runs)
    with ImageDir.open(str(tmp_path / "1"), create_files=True) as images:
        entries = [{"vaddr": v, "compat_nr_pages": 0, "nr_pages": n, "flags": f} for v, n, f in runs]
        images.write_all("PAGEMAP", [{"pages_id": 9}, *entries], 5)
    with pytest.raises(ImageError, match=r"pagemap-5\.img: the run"):
        _contents(tmp_path / "1")


def test_contents_elsewhere(tmp_path: Path) -> None:
    path = _level(tmp_path / "1", [(0, 1, PE_LAZY)])
    with pytest.raises(ImageError, match="not in the images"):
        _contents(path)


def test_old_entries() -> None:
    old = {"vaddr": PAGE, "compat_nr_pages": 3}
    assert normalise(old) == (PAGE, 3, PE_PRESENT)
    assert normalise({**old, "in_parent": True}) == (PAGE, 3, PE_PARENT)
    assert normalise({**old, "in_parent": False}) == (PAGE, 3, PE_PRESENT)
    assert normalise({**old, "compat_nr_pages": 0, "nr_pages": 5, "flags": 6}) == (PAGE, 5, 6)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    _level(tmp_path / "1", [(0, 1, PE_PRESENT)])
    _level(tmp_path / "2", [(0, 1, PE_PARENT), (PAGE, 1, PE_PRESENT)], "../1")
    _level(tmp_path / "3", [(0, 3, PE_PARENT)], "../2")
    before = os.listdir("/proc/self/fd")
    _contents(tmp_path / "2")
    with pytest.raises(ImageError):
        _contents(tmp_path / "3")
    os.truncate(tmp_path / "1" / "pages-9.img", 0)
    with pytest.raises(ImageError):
        _contents(tmp_path / "2")
    assert os.listdir("/proc/self/fd") == before
