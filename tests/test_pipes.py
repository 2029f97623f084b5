"""Pipes and FIFOs: the workloads, ends that are held outside, and how contents are read without taking them."""

from __future__ import annotations

import fcntl
import os

import pytest
from harness import Runner
from test_workloads import test_workload as run_workload
from workloads.table import Workload

from firn.resources.files.pipes import Contents, Part

# The link of a pipe's descriptor is its new inode; the workloads check flags and identity themselves.
UNLIKE = (r"fd\.\d+",)
ONCE = ("mixed", "halves", "pages")
MODES = ("stream", "full", "pages", "capacity", "packets", "mixed", "flags", "halves", "owner", "fifo", "nameless",
         "many")  # fmt: skip
TABLE = [Workload("pipes", mode, once=mode in ONCE, unlike=UNLIKE) for mode in MODES]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def shown(parts: list[Part]) -> list[tuple[bytes, bool]]:
    assert all(sum(part.pages) == len(part.data) for part in parts)
    return [(part.data, part.packet) for part in parts]


def take(end: int) -> list[tuple[bytes, bool]]:
    contents = Contents()
    try:
        return shown(contents.read(end))
    finally:
        contents.close()


def test_contents_are_read_and_stay() -> None:
    reader, writer = os.pipe()
    assert take(reader) == []
    os.write(writer, b"x" * 70000 if fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20) else b"")
    assert take(reader) == [(b"x" * 70000, False)]
    assert take(reader) == [(b"x" * 70000, False)]
    assert os.read(reader, 1 << 20) == b"x" * 70000
    os.close(writer)
    assert take(reader) == []
    os.close(reader)


@pytest.mark.parametrize("size", [4096, 65536, 1 << 20])
def test_a_full_pipe_is_read(size: int) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    assert fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size) == size
    data = os.urandom(size)
    assert os.write(writer, data) == size
    assert take(reader) == [(data, False)]
    os.close(reader)
    os.close(writer)


def test_bytes_are_told_by_page() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    contents = Contents()
    for size in (3000, 3000, 1096, 5, 4096):  # the third fills up the page of the second, the fifth gets its own
        os.write(writer, bytes(size))
    os.read(reader, 1)
    for _ in range(2):
        (part,) = contents.read(reader)
        assert part.pages == [2999, 4096, 5, 4096] and not part.is_dense()
    os.read(reader, 1 << 16)
    os.write(writer, bytes(10000))
    (part,) = contents.read(reader)
    assert part.pages == [4096, 4096, 1808] and part.is_dense()
    contents.close()
    os.close(reader)
    os.close(writer)


def test_packets_are_told_from_bytes() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    contents = Contents()
    wanted = [(b"ab", False), (b"c", True), (b"de", True), (b"fghi", False), (b"jkl", True)]
    for data, packet in wanted:
        # Spliced in: what is written would join the bytes before it.
        from_here, into = os.pipe2(os.O_NONBLOCK | (os.O_DIRECT if packet else 0))
        os.write(into, data)
        os.splice(from_here, writer, 100)
        os.close(from_here)
        os.close(into)
    for _ in range(2):
        assert shown(contents.read(reader)) == wanted
    for data in (b"abc", b"de", b"fghijkl"):
        assert os.read(reader, 100) == data
    assert contents.read(reader) == []
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_DIRECT)
    for count in range(16):
        os.write(writer, bytes(count + 1))
    assert shown(contents.read(reader)) == [(bytes(count + 1), True) for count in range(16)]
    contents.close()
    os.close(reader)
    os.close(writer)
