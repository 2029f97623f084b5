"""TCP connections: the workloads, peers outside the tree, and what is refused."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import Runner, Target, firn_command, open_descriptors, wait_until
from namespaces import Pair
from test_inet import ENTRY
from test_workloads import test_workload as run_workload
from workloads.table import GONE_WAYS, PLAIN_WAYS, REFUSED_FIRST, REFUSED_WAY, Workload

from firn.abi import nr
from firn.abi.libc import syscall
from firn.abi.tcp import TCP_REPAIR
from firn.errors import FirnError, ImageError, UsageError
from firn.images.store import ImageDir
from firn.resources.base import INETSK, RestoreContext
from firn.resources.files.external import Inherited
from firn.resources.sockets import remap
from firn.resources.sockets.inet import InetSockets

# The link of a socket's descriptor is its new inode; the workloads check flags and identity themselves.
UNLIKE = (r"fd\.\d+",)
OPTION = ("--tcp-established",)
STREAM_ROUNDS = int(os.environ.get("FIRN_STREAM_ROUNDS", "3"))
"""How many checkpoints and restores happen to a server under streams."""
MIXED = (*PLAIN_WAYS, REFUSED_WAY, *GONE_WAYS)
TABLE = [
    Workload("tcp", mode, unlike=UNLIKE, dump=OPTION, restore=OPTION, refused=("is a TCP connection", *OPTION),
             once=mode != "quiet", ways=MIXED)
    for mode in ("quiet", "queues", "half")
]  # fmt: skip
TABLE += [
    Workload("inet_odd", mode, unlike=UNLIKE, dump=OPTION, restore=OPTION, once=mode not in ("outgoing", "segments"))
    for mode in ("half", "over", "ended", "queue", "outgoing", "segments")
]  # fmt: skip
TABLE += [
    Workload("tcp", "waiting", unlike=UNLIKE, dump=OPTION, restore=OPTION, once=True, ways=REFUSED_FIRST,
             refused=("is a TCP connection", "6 connections wait to be accepted", *OPTION)),
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


class Program:
    """A program of Python code, which is checkpointed; in the namespace that firn is run in."""

    def __init__(self, runner: Runner, code: str, *words: str) -> None:
        self.runner = runner
        command = [*runner.within, sys.executable, "-c", code, str(runner.folder), *words]
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
    runner.within = pair.command()
    far = Program(runner, STATES, pair.THERE[version], *ports)
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


ECHO = BEGIN + """
import random, selectors
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
server = socket.create_server((sys.argv[2], 0), backlog=200, family=family)
server.setblocking(False)
choose = selectors.DefaultSelector()
choose.register(server, selectors.EVENT_READ)
waiting = {}
tell("port", server.getsockname()[1])
while True:
    for key, _ in choose.select(0.002):
        if key.fileobj is server:
            sock = server.accept()[0]
            sock.setblocking(False)
            waiting[sock] = [bytearray(), 0.0]
            choose.register(sock, selectors.EVENT_READ)
        elif len(waiting[key.fileobj][0]) < 200000:
            data = key.fileobj.recv(30000)
            if not data:
                choose.unregister(key.fileobj)
                del waiting[key.fileobj]
            else:
                waiting[key.fileobj][0] += data
    now = time.monotonic()
    for sock, state in waiting.items():
        if state[0] and now >= state[1]:
            try:
                del state[0][:sock.send(state[0])]
            except BlockingIOError:
                pass
            state[1] = now + random.random() * 0.05
"""


class Stream:
    """One client of the echo server, which checks every byte. Its n-th byte is that of a block repeated for ever."""

    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.sock = sock
        self.block = random.Random(seed).randbytes(65521)
        self.sent = self.received = 0
        sock.setblocking(False)

    def work(self, may_send: bool) -> None:
        if may_send and self.sent - self.received < 300000:
            at = self.sent % len(self.block)
            try:
                self.sent += self.sock.send(self.block[at : at + 20000])
            except BlockingIOError:
                pass
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        assert data, "the connection has ended"
        at = self.received % len(self.block)
        assert data == (self.block[at:] + self.block + self.block)[: len(data)], f"other bytes at {self.received}"
        self.received += len(data)


class Clients:
    """Many streams in a thread; ``finish`` lets them end and answers how much went through."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self.streams = [Stream(sock, seed) for seed, sock in enumerate(socks)]
        self.last = False
        self.trouble: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.trouble and (not self.last or any(stream.received < stream.sent for stream in self.streams)):
                for stream in self.streams:
                    stream.work(not self.last)
                time.sleep(0.002)
        except BaseException as error:
            self.trouble = error

    def wait_for(self, size: int) -> None:
        """All have received so much more."""
        marks = [stream.received + size for stream in self.streams]
        wait_until(
            "all streams go on",
            lambda: bool(self.trouble)
            or all(stream.received >= mark for stream, mark in zip(self.streams, marks, strict=True)),
            60,
        )
        assert not self.trouble, self.trouble

    def stop(self) -> None:
        """Whatever has become of the server: the thread ends."""
        self.trouble = self.trouble or AssertionError("stopped")
        self.thread.join(60)
        for stream in self.streams:
            stream.sock.close()

    def finish(self) -> int:
        self.last = True
        self.thread.join(60)
        assert not self.thread.is_alive(), "a stream has stopped"
        assert not self.trouble, self.trouble
        for stream in self.streams:
            stream.sock.close()
        return sum(stream.received for stream in self.streams)


@needs_firn
def test_streams_of_clients_outside_go_on(runner: Runner) -> None:
    """A hundred clients over loopback, who see nothing of any number of checkpoints but a pause."""
    far = Program(runner, ECHO, "127.0.0.1")
    port = int(far.wait_for("port"))
    clients = Clients([socket.create_connection(("127.0.0.1", port)) for _ in range(100)])
    try:
        for _ in range(STREAM_ROUNDS):
            clients.wait_for(20000)
            far.restore(far.dump())
        clients.wait_for(20000)
    finally:
        total = clients.finish()
    assert total > 100 * 40000
    runner.kill(far.target)


REMAPPED = BEGIN + """
here = "127.0.0.1"
server = socket.create_server((here, 0))
both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
far = socket.create_connection(server.getsockname())
near = server.accept()[0]
mapped_far = socket.create_connection((here, both.getsockname()[1]))
mapped_near = both.accept()[0]
one, two = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
one.bind((here, 0))
two.bind((here, 0))
two.connect(one.getsockname())
two.send(b"waits")
tell("ready")
await_("restored")
here = "127.0.0.5"
for sock in (server, far, near, one, two, mapped_far):
    assert sock.getsockname()[0] == here, sock
for sock in (far, near, two, mapped_far):
    assert sock.getpeername()[0] == here, sock
assert mapped_near.getsockname()[0] == mapped_near.getpeername()[0] == "::ffff:127.0.0.5", mapped_near
for sock, other in ((far, near), (mapped_near, mapped_far)):
    sock.sendall(b"go on")
    assert other.recv(9) == b"go on"
assert one.recvfrom(9) == (b"waits", two.getsockname())
two.send(b"more")
assert one.recvfrom(9) == (b"more", two.getsockname())
socket.create_connection(server.getsockname()).close()
tell("right")
await_("never")
"""


@needs_firn
def test_sockets_come_back_on_another_address(runner: Runner) -> None:
    program = Program(runner, REMAPPED)
    program.wait_for("ready")
    program.restore(program.dump(), "--remap-ip", "127.0.0.1=127.0.0.5")
    program.tell("restored")
    program.wait_for("right")
    runner.kill(program.target)


@pytest.mark.parametrize("word", ["127.0.0.1", "127.0.0.1=", "1=2", "127.0.0.1=::1", "x\0=y", "=127.0.0.1"])
def test_what_no_address_is_mapped_to(word: str) -> None:
    with pytest.raises(UsageError, match="--remap-ip"):
        remap.parse([word])
    with pytest.raises(UsageError, match="once"):
        remap.parse(["::1=::2", "::1=::3"])


LEFT_RUNNING = BEGIN + """
import select
server = socket.create_server(("127.0.0.1", 0))
tell("port", server.getsockname()[1])
sock = server.accept()[0]
bare = server.accept()[0]
bare.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
tell("connected")
while data := sock.recv(65536):
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
    assert bare.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
    sock.sendall(data)
"""


@needs_firn
@pytest.mark.parametrize("how", ["leave", "stopped", "fail", "refused", "term"])
def test_a_connection_of_a_program_that_runs_on(
    runner: Runner, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer notices nothing; SO_REUSEADDR, which repair mode uses for itself, is as it was."""
    program = Program(runner, LEFT_RUNNING)
    where = ("127.0.0.1", int(program.wait_for("port")))
    target = program.target
    with socket.create_connection(where, 20) as peer, socket.create_connection(where, 20):
        program.wait_for("connected")
        if how == "leave":
            program.dump("--leave-running")
        elif how == "stopped":
            images = program.dump("--leave-stopped")
            assert runner.firn("unlock", "-D", str(images))[0] == 0
            os.kill(target.pid, signal.SIGCONT)
        elif how == "fail":
            monkeypatch.setenv("FIRN_FAULT", "fail:dump.commit")
            assert runner.try_dump(target, *OPTION)[0]
        elif how == "term":
            for seconds in (0.03, 0.06, 0.1):
                (runner.folder / f"images-{seconds}").mkdir()
                words = ("dump", "-t", str(target.pid), "-D", f"images-{seconds}", "-R", *OPTION)
                runner.interrupt(seconds, signal.SIGTERM, *words)
        else:
            assert "--tcp-established" in runner.try_dump(target)[1]
        for _ in range(20):
            peer.sendall(b"echo")
            assert peer.recv(9) == b"echo", program.trouble()
        assert not target.ended(), program.trouble()
    wait_until("it ends", target.ended)
    assert target.status == 0, program.trouble()


@needs_firn
def test_unread_urgent_data_is_refused(runner: Runner) -> None:
    program = Program(runner, LEFT_RUNNING)
    where = ("127.0.0.1", int(program.wait_for("port")))
    with socket.create_connection(where, 20) as peer, socket.create_connection(where, 20):
        program.wait_for("connected")
        os.kill(program.target.pid, signal.SIGSTOP)
        peer.send(b"!", socket.MSG_OOB)
        code, text, _ = runner.try_dump(program.target, *OPTION)
        assert code and "urgent data" in text and "Traceback" not in text, text
        os.kill(program.target.pid, signal.SIGCONT)
        peer.sendall(b"echo")
        assert peer.recv(9) == b"echo", program.trouble()
    runner.kill(program.target)


@needs_firn
def test_a_connection_that_somebody_outside_has_too_is_refused(runner: Runner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        served = server.accept()[0]
        process = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True, stdin=client.fileno(), cwd="/",
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        process.returncode = 0
        target = Target(process.pid, None)
        wait_until("it sleeps", lambda: Path(f"/proc/{target.pid}/comm").read_text() == "sleep\n")
        code, text, _ = runner.try_dump(target, *OPTION)
        assert code and f"that process {os.getpid()}" in text and "close it there" in text, text
        runner.dump(target, *OPTION, "--leave-running")
        client.sendall(b"still")
        assert served.recv(9) == b"still"
        served.close()
        runner.kill(target)


PATIENT = BEGIN + """
server = socket.create_server(("127.0.0.1", 0))
tell("port", server.getsockname()[1])
sock = server.accept()[0]
tell("connected", sock.fileno())
while True:
    time.sleep(0.01)
    try:
        sock.sendall(sock.recv(65536) or b"end")
    except PermissionError:
        tell("silenced")
"""


@needs_firn
@pytest.mark.parametrize("how", ["dump", "unlock"])
def test_what_a_killed_dump_leaves_is_mended(runner: Runner, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Killed before the end of the tree, or, what hardly happens by itself, while it was reading a connection."""
    program = Program(runner, PATIENT)
    with socket.create_connection(("127.0.0.1", int(program.wait_for("port"))), 20) as peer:
        number = int(program.wait_for("connected"))
        monkeypatch.setenv("FIRN_FAULT", "kill-all:dump.end.locked")
        code, _, images = runner.try_dump(program.target, *OPTION)
        monkeypatch.delenv("FIRN_FAULT")
        assert code == -signal.SIGKILL
        pidfd = os.pidfd_open(program.target.pid)
        with socket.socket(fileno=syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, number, 0)) as copy:
            copy.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        os.close(pidfd)
        for number in (signal.SIGSTOP, signal.SIGCONT):  # it calls recv(2) again
            os.kill(program.target.pid, number)
        program.wait_for("silenced")
        if how == "dump":
            program.dump("--leave-running")
        assert runner.firn("unlock", "-D", str(images))[0] == 0
        peer.sendall(b"echo")
        assert peer.recv(9) == b"echo"
    runner.kill(program.target)


STREAM: dict[str, Any] = {
    "inq_len": 3, "inq_seq": 1000, "outq_len": 4, "outq_seq": 2000, "opt_mask": 7, "snd_wscale": 7, "mss_clamp": 1460,
    "rcv_wscale": 7, "timestamp": 5, "unsq_len": 2, "snd_wl1": 1000, "snd_wnd": 65536, "max_window": 65536,
    "rcv_wnd": 65536, "rcv_wup": 1000,
}  # fmt: skip


def _stream(folder: Path, entry: dict[str, Any], image: dict[str, Any], lost: int = 0) -> None:
    """Make the only connection of a checkpoint again, and let go of it."""
    with ImageDir.open(str(folder), create_files=True) as images:
        with images.writer("TCP_STREAM", 9) as writer:
            writer.add(STREAM | image)
            writer.payload(b"inqoutq")
        os.truncate(folder / "tcp-stream-9.img", (folder / "tcp-stream-9.img").stat().st_size - lost)
        connection = ENTRY | {"state": 1, "src_port": 29001, "dst_port": 29002, "dst_addr": [0x0100007F]} | entry
        options = SimpleNamespace(tcp_close=False, tcp_established=True)
        files = {(INETSK, 5): {"isk": connection}}
        context = SimpleNamespace(files=files, options=options, images=images, inherited=Inherited([]))
        kind = InetSockets()
        try:
            kind.open(5, {}, cast(RestoreContext, context))
        finally:
            kind.close()


needs_admin = pytest.mark.skipif(os.geteuid() != 0, reason="TCP_REPAIR needs CAP_NET_ADMIN")


@needs_admin
def test_a_stream_without_its_program(tmp_path: Path) -> None:
    _stream(tmp_path, {}, {})


@needs_admin
@pytest.mark.parametrize(
    ("entry", "image"),
    [
        ({"state": 3}, {}), ({"state": 6}, {}), ({"ino": 8}, {}), ({"src_port": 0}, {}), ({"dst_port": 0}, {}),
        ({}, {"unsq_len": 5}), ({}, {"snd_wscale": 15}), ({}, {"rcv_wscale": 1 << 31}), ({}, {"mss_clamp": 0}),
        ({}, {"mss_clamp": 1 << 16}), ({}, {"rcv_wup": 5000}), ({}, {"snd_wl1": 1 << 31}), ({"state": 5}, {}),
        ({"state": 2}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_stream_is_one_error(tmp_path: Path, entry: dict[str, Any], image: dict[str, Any]) -> None:
    before = open_descriptors()
    with pytest.raises(FirnError):
        _stream(tmp_path, entry, image)
    assert open_descriptors() == before


@needs_admin
def test_a_cut_stream_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="tcp-stream-9"):
        _stream(tmp_path, {}, {}, lost=1)
