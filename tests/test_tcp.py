"""TCP connections: the workloads, peers outside the tree, and what is refused."""

from __future__ import annotations

import os
import random
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command, wait_until
from namespaces import Pair
from test_workloads import test_workload as run_workload
from workloads.table import GONE_WAYS, PLAIN_WAYS, REFUSED_WAY, Workload

# The link of a socket's descriptor is its new inode; the workloads check flags and identity themselves.
UNLIKE = (r"fd\.\d+",)
OPTION = ("--tcp-established",)
MIXED = (*PLAIN_WAYS, REFUSED_WAY, *GONE_WAYS)
TABLE = [
    Workload("tcp", mode, unlike=UNLIKE, dump=OPTION, restore=OPTION, refused=("is a TCP connection", *OPTION),
             once=mode != "quiet", ways=MIXED)
    for mode in ("quiet", "queues", "half")
]  # fmt: skip

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


class Far:
    """A checkpointed program in one namespace; firn runs in there too."""

    def __init__(self, runner: Runner, pair: Pair, code: str, *words: str) -> None:
        self.runner = runner
        self.pair = pair
        runner.within = pair.command()
        command = pair.command(sys.executable, "-c", code, str(runner.folder), *words)
        self.target = runner.spawn(command, stderr=runner.folder / "stderr")

    def wait_for(self, name: str) -> str:
        """What the program has written into a file of that name."""
        path = self.runner.folder / name
        wait_until(f"{name} is there: {self.trouble()}", lambda: path.exists() or self.target.ended())
        assert path.exists(), self.trouble()
        return path.read_text()

    def dump(self, *options: str) -> Path:
        return self.runner.dump(self.target, *OPTION, *options)

    def restore(self, images: Path, *options: str) -> None:
        self.target = self.runner.restore(images, self.target, *OPTION, *options)

    def trouble(self) -> str:
        return (self.runner.folder / "stderr").read_text()

    def tell(self, name: str) -> None:
        (self.runner.folder / name).touch()


BEGIN = """
import os, socket, sys, time
folder = sys.argv[1]
def await_(name):
    while not os.path.exists(f"{folder}/{name}"):
        time.sleep(0.005)
def tell(name, text=""):
    with open(f"{folder}/{name}.new", "w") as file:
        file.write(str(text))
    os.rename(f"{folder}/{name}.new", f"{folder}/{name}")
def state(sock):
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
def reaches(sock, wanted):
    end = time.monotonic() + 15
    while state(sock) != wanted:
        assert time.monotonic() < end, (state(sock), wanted)
        time.sleep(0.005)
"""

STATES = BEGIN + """
names = "sending closing last first".split()
peers = [socket.create_connection((sys.argv[2], int(port)), 20) for port in sys.argv[3:7]]
sending, closing, last, first = peers
reaches(last, 8)
tell("connected")
await_("muted")
sending.setblocking(False)
size = 0
try:
    while size < 4000000:
        size += sending.send(bytes(range(256)) * 256)
except BlockingIOError:
    pass
for sock in (closing, last, first):
    sock.send(b"last words")
    sock.shutdown(socket.SHUT_WR)
calling = socket.socket(sending.family)
calling.setblocking(False)
calling.connect_ex((sys.argv[2], int(sys.argv[7])))
tell("said", size)
reaches(closing, 11)
tell("ready", [state(sock) for sock in (*peers, calling)])
await_("restored")
found = [state(sock) for sock in (*peers, calling)]
tell("states", found)
calling.setblocking(True)
for sock in (sending, calling):
    sock.settimeout(20)
    reaches(sock, 1)
    sock.sendall(b"end")
    assert sock.recv(9) == b"hello", sock
for sock in (closing, last, first):
    sock.settimeout(20)
    assert sock.recv(9) == (b"" if sock is not first else b"hello"), sock
tell("right")
await_("never")
"""


def _all(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := sock.recv(1 << 20)):
        data += part
    return bytes(data)


@needs_firn
@pytest.mark.parametrize("version", [0, 1], ids=["IPv4", "IPv6"])
def test_every_state_of_a_connection(runner: Runner, pair: Pair, version: int) -> None:
    """Nothing that the tree sends arrives: data and FINs stay unacknowledged, until it is restored."""
    listeners = [pair.listener(pair.THERE[version]) for _ in range(5)]
    ports = [str(listener.getsockname()[1]) for listener in listeners]
    far = Far(runner, pair, STATES, pair.THERE[version], *ports)
    sending, closing, last, first = (listener.accept()[0] for listener in listeners[:4])
    last.shutdown(socket.SHUT_WR)
    far.wait_for("connected")
    pair.mute(True)
    far.tell("muted")
    size = int(far.wait_for("said"))
    closing.shutdown(socket.SHUT_WR)
    assert far.wait_for("ready") == "[1, 11, 9, 4, 2]"
    far.restore(far.dump())
    far.tell("restored")
    assert far.wait_for("states") == "[1, 11, 9, 4, 2]"
    pair.mute(False)
    for sock in (sending, first):
        sock.settimeout(20)
        sock.sendall(b"hello")
    assert _all(sending, size + 3) == bytes(range(256)) * (size // 256) + bytes(range(size % 256)) + b"end"
    called = listeners[4].accept()[0]
    called.settimeout(20)
    called.sendall(b"hello")
    assert _all(called, 3) == b"end"
    for sock in (closing, last, first):
        sock.settimeout(20)
        assert _all(sock, 1000) == b"last words"
    first.close()
    far.wait_for("right")
    runner.kill(far.target)
