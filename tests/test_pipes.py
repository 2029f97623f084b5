"""Pipes and FIFOs: the workloads, ends that are held outside, and how contents are read without taking them."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command, wait_until
from test_workloads import test_workload as run_workload
from workloads.table import Workload

from firn.resources.files.pipes import Contents

# The link of a pipe's descriptor is its new inode; the workloads check flags and identity themselves.
UNLIKE = (r"fd\.\d+",)
ONCE = ("mixed", "halves")
MODES = ["stream", "full", "capacity", "packets", "mixed", "flags", "halves", "owner", "fifo", "nameless", "many"]
TABLE = [Workload("pipes", mode, once=mode in ONCE, unlike=UNLIKE) for mode in MODES]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def sleeper(runner: Runner, **streams: int) -> Target:
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL) | streams
    process = subprocess.Popen(["/bin/sleep", "1000"], cwd=runner.folder, start_new_session=True, **streams)  # type: ignore[call-overload]
    process.returncode = 0
    wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    return Target(process.pid, None)


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.skipif(not firn_command(), reason="no firn command")
def test_an_end_whose_other_end_is_outside_is_refused(runner: Runner, side: str) -> None:
    """... with the name of the process that holds it, which is this test."""
    reader, writer = os.pipe()
    try:
        target = sleeper(runner, stdin=reader) if side == "read" else sleeper(runner, stdout=writer)
        code, text, _ = runner.try_dump(target)
        assert code and f"process {os.getpid()} (" in text, text
        assert f"descriptor {writer if side == 'read' else reader};" in text, text
        assert f"is the {side} end" in text, text
    finally:
        os.close(reader)
        os.close(writer)
    # Now nobody has the other end any more.
    images = runner.dump(target)
    back = runner.restore(images, target)
    assert os.readlink(f"/proc/{back.pid}/fd/{'0' if side == 'read' else '1'}").startswith("pipe:[")
    runner.kill(back)


@pytest.mark.skipif(not firn_command(), reason="no firn command")
def test_a_fifo_with_its_writer_outside_is_refused(runner: Runner) -> None:
    path = runner.folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    try:
        target = sleeper(runner, stdin=reader)
        code, text, _ = runner.try_dump(target)
        assert code and f"process {os.getpid()} (" in text and f"descriptor {writer};" in text, text
    finally:
        os.close(reader)
        os.close(writer)
    images = runner.dump(target)
    path.rename(runner.folder / "elsewhere")
    code, text = runner.try_restore(images)
    assert code and str(path) in text and "Traceback" not in text, text


def take(end: int) -> list[tuple[bytes, bool]]:
    contents = Contents()
    try:
        return contents.read(end)
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
        assert contents.read(reader) == wanted
    for data in (b"abc", b"de", b"fghijkl"):
        assert os.read(reader, 100) == data
    assert contents.read(reader) == []
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_DIRECT)
    for count in range(16):
        os.write(writer, bytes(count + 1))
    assert contents.read(reader) == [(bytes(count + 1), True) for count in range(16)]
    contents.close()
    os.close(reader)
    os.close(writer)
