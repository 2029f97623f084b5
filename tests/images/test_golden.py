"""Checkpoints that CRIU 4.2 made: read, written again byte for byte."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from images.shared import shared

from firn.images import catalog
from firn.images.pages import PAGE, PE_PRESENT, PagemapReader, write_pagemap
from firn.images.store import ImageDir, read_files

MODES = ("events", "ghost", "memory", "pipes", "pty", "signals", "small", "tcp", "threads", "tree", "unix")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = shared("criu-golden", "images.tar.xz")
    target = tmp_path_factory.mktemp("golden")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # from 3.11.4
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(target)
    return target / "images"


@pytest.mark.parametrize("mode", MODES)
def test_again_byte_for_byte(mode: str, golden: Path, tmp_path: Path) -> None:
    count = 0
    with ImageDir.open(str(golden / mode)) as source, ImageDir.open(str(tmp_path), create_files=True) as target:
        for name in sorted(os.listdir(golden / mode)):
            found = catalog.identify(name)
            if found is None:
                assert name == "beat"
                continue
            kind, index = found
            if kind.message:
                _copy(source, target, kind, index)
                assert (tmp_path / name).read_bytes() == (golden / mode / name).read_bytes(), name
                count += 1
    assert count > 10


def _copy(source: ImageDir, target: ImageDir, kind: catalog.Kind, index: int | None) -> None:
    entries = source.read_with_payload(kind.name, index)
    if kind.name == "INVENTORY":
        target.commit(entries[0][0])
        return
    fd = source.open_raw(kind.file(index), os.O_RDONLY)
    with target.writer(kind.name, index) as writer:
        for number, (entry, payload) in enumerate(entries):
            chunk = kind.name == "GHOST_FILE" and number > 0
            writer.add(entry, "ghost_chunk_entry" if chunk else "")
            writer.payload((fd, payload.offset, payload.length))
    os.close(fd)


@pytest.mark.parametrize("mode", MODES)
def test_page_lists(mode: str, golden: Path, tmp_path: Path) -> None:
    with ImageDir.open(str(golden / mode)) as images, ImageDir.open(str(tmp_path), create_files=True) as target:
        for name in os.listdir(golden / mode):
            kind, index = catalog.identify(name) or (catalog.kind("FILES"), None)
            if not kind.name.startswith("PAGEMAP") or index is None:
                continue
            with PagemapReader(images, kind.name, index) as reader:
                runs = list(reader)
            stored = sum(run.nr_pages for run in runs) * PAGE
            head = images.read_one(kind.name, index)
            assert stored == (golden / mode / f"pages-{head['pages_id']}.img").stat().st_size
            assert all(run.flags & PE_PRESENT for run in runs)
            listed = [(run.vaddr, run.nr_pages, run.flags) for run in runs]
            write_pagemap(target, kind.name, index, head["pages_id"], listed)
            assert (tmp_path / name).read_bytes() == (golden / mode / name).read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_file_table(mode: str, golden: Path) -> None:
    with ImageDir.open(str(golden / mode)) as images:
        files = read_files(images)
        assert len(files) == len(images.read_all("FILES"))
        tasks = [task["pid"] for task in images.read_all("PSTREE") if images.exists("MM", task["pid"])]
        assert tasks
        for pid in tasks:
            assert (1, images.read_one("MM", pid)["exe_file_id"]) in files
