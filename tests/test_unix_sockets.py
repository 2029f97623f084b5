"""Unix sockets: the workloads, peers outside the tree, and how queues are read without taking anything."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import Runner, Target, firn_command, open_descriptors, wait_until
from test_workloads import test_workload as run_workload
from workloads.table import Workload

from firn.errors import FirnError, KernelError
from firn.host import sockdiag
from firn.host.kernelmemory import KernelMemory
from firn.resources.base import UNIXSK, DumpContext, RestoreContext
from firn.resources.sockets import options, queues
from firn.resources.sockets.rebuild import Rebuild
from firn.resources.sockets.standins import Identity, StandIns
from firn.resources.sockets.waiting import Unseen, Waiting

# The link of a socket's descriptor is its new inode; the workloads check flags and identity themselves.
UNLIKE = (r"fd\.\d+",)
MODES = ("pairs", "listen", "waiting", "half", "datagrams", "rights", "options")
TABLE = [Workload("unix_sockets", mode, once=mode not in ("listen", "options"), unlike=UNLIKE) for mode in MODES]
TABLE += [Workload("unix_identity", mode, once=True, unlike=UNLIKE) for mode in ("peers", "letters", "relative")]
QUEUES = ("early", "parted", "strangers", "urgent", "signed", "circles")
TABLE += [Workload("unix_queues", mode, once=True, unlike=UNLIKE) for mode in QUEUES]
TREES = ("pipes", "sockets")
TABLE += [Workload("ipc_tree", mode, once=mode == "sockets", unlike=UNLIKE) for mode in TREES]


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)


def sleeper(runner: Runner, stdin: int) -> Target:
    process = subprocess.Popen(
        ["/bin/sleep", "1000"], cwd=runner.folder, start_new_session=True, stdin=stdin, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process.returncode = 0
    wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    return Target(process.pid, None)


needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


@needs_firn
def test_a_peer_outside_is_refused_or_dropped(runner: Runner) -> None:
    mine, theirs = socket.socketpair()
    target = sleeper(runner, theirs.fileno())
    inode = os.fstat(theirs.fileno()).st_ino
    theirs.close()
    code, text, _ = runner.try_dump(target)
    assert code and f"process {os.getpid()} (" in text and f"descriptor {mine.fileno()};" in text, text
    assert f"--external unix[{inode}]" in text
    code, text, _ = runner.try_dump(target, "--ext-unix-sk")
    assert code, "only datagram sockets may lose their peer so"
    code, text, images = runner.try_dump(target, "--external", f"unix[{inode}]")
    if code and "not built yet" in text:
        runner.kill(target)
        pytest.skip("needs --external")
    assert code == 0, text
    wait_until("it ends", target.ended)
    back = runner.restore(images, target)
    assert os.readlink(f"/proc/{back.pid}/fd/0").startswith("socket:[")
    assert mine.recv(1) == b""
    runner.kill(back)


@needs_firn
def test_a_service_outside_is_found_again_by_its_name(runner: Runner) -> None:
    name = str(runner.folder / "service")
    service = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    service.bind(name)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.connect(name)
    target = sleeper(runner, client.fileno())
    client.close()
    code, text, _ = runner.try_dump(target)
    assert code and f"process {os.getpid()} (" in text and "--ext-unix-sk" in text, text
    images = runner.dump(target, "--ext-unix-sk")
    code, text = runner.try_restore(images)
    assert code and "--ext-unix-sk" in text
    back = runner.restore(images, target, "--ext-unix-sk")
    with open(f"/proc/{back.pid}/comm") as file:
        assert file.read() == "sleep\n"
    pidfd = os.pidfd_open(back.pid)
    inode = os.stat(f"/proc/{back.pid}/fd/0").st_ino
    assert sockdiag.unix_sockets()[inode].peer == os.fstat(service.fileno()).st_ino
    os.close(pidfd)
    runner.kill(back)


@needs_firn
def test_a_client_outside_that_waits_is_refused(runner: Runner) -> None:
    server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    server.bind(str(runner.folder / "server"))
    server.listen()
    client.connect(str(runner.folder / "server"))
    target = sleeper(runner, server.fileno())
    server.close()
    code, text, _ = runner.try_dump(target)
    assert code and f"process {os.getpid()} (" in text and f"descriptor {client.fileno()};" in text, text
    runner.kill(target)


def waits(runner: Runner, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """A listening socket, and a client that it has not accepted."""
    server, client = socket.socket(socket.AF_UNIX, kind), socket.socket(socket.AF_UNIX, kind)
    server.bind(str(runner.folder / "server"))
    server.listen()
    client.connect(str(runner.folder / "server"))
    return server, client


@needs_firn
def test_a_descriptor_that_nobody_has_is_refused(runner: Runner) -> None:
    server, client = waits(runner)
    fd = os.open("/etc/passwd", os.O_RDONLY)
    client.sendmsg([b"file"], rights(fd))
    os.close(fd)
    client.close()
    target = sleeper(runner, server.fileno())
    server.close()
    code, text, _ = runner.try_dump(target)
    assert code and "no process of the tree has open" in text and "let it be accepted" in text, text
    runner.kill(target)


@pytest.mark.parametrize("sends", [True, False])
def test_without_a_look_at_the_kernel_what_was_sent_is_refused(
    runner: Runner, sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: object) -> None:
        raise KernelError("no BPF here")

    monkeypatch.setattr("firn.host.kernelmemory.KernelMemory.__init__", never)
    server, client = waits(runner)
    if sends:
        client.send(b"early")
    seen = sockdiag.unix_sockets()
    waiting = Waiting()
    found = seen[os.fstat(server.fileno()).st_ino]
    context = DumpContext([], None, [os.getpid()], lambda _: {}, lambda *_: 0, lambda _: None)
    if sends:
        with pytest.raises(Unseen, match="no BPF here"):
            waiting.look(server.fileno(), found, seen, context)
    else:
        assert waiting.look(server.fileno(), found, seen, context) == []
    waiting.close()
    server.close()
    client.close()


def test_the_kernels_memory_is_read_by_names() -> None:
    try:
        memory = KernelMemory()
    except KernelError as error:
        pytest.skip(str(error))
    twin = os.dup(0)
    try:
        assert memory.field(memory.task, "task_struct", "pid", size=4) == threading.get_native_id()
        assert memory.file(0) == memory.file(twin) != memory.file(2)
        assert memory.types.offset("sk_buff", "next") == 0  # in a member without a name
        for name, member in (("task_struct", "no_such_member"), ("no_such_struct", "pid")):
            with pytest.raises(KernelError, match="no_such"):
                memory.types.offset(name, member)
        with pytest.raises(OSError, match="leads nowhere"):
            memory.read(8, 8)
    finally:
        os.close(twin)
        memory.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_what_waits_before_it_is_accepted_is_seen_and_stays(runner: Runner, kind: int) -> None:
    server, client = waits(runner, kind)
    large = os.urandom(100_000)
    client.send(b"small")
    client.sendmsg([b"file"], rights(0))
    client.send(large)
    before = len(os.listdir("/proc/self/fd"))
    seen = sockdiag.unix_sockets()
    waiting = Waiting()
    context = DumpContext([], None, [os.getpid()], lambda _: {}, lambda *_: 0, lambda _: None)
    try:
        (found,) = waiting.look(server.fileno(), seen[os.fstat(server.fileno()).st_ino], seen, context)
    except Unseen as error:
        pytest.skip(str(error))
    finally:
        waiting.close()
    assert (found.place, found.name, found.connector["pid"]) == (0, b"", os.getpid())
    assert b"".join(record.data for record in found.records) == b"smallfile" + large
    (fd,) = (fd for record in found.records for fd in record.fds)
    assert os.path.samestat(os.fstat(fd), os.fstat(0))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    for record in found.records:
        record.close()
    accepted, _ = server.accept()
    assert accepted.recv(9 if kind == socket.SOCK_STREAM else 5).startswith(b"small")
    for each in (server, client, accepted):
        each.close()


STANDIN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from firn.resources.sockets.standins import Identity, StandIns
helpers = StandIns()
helpers.pair(Identity({"pid": int(sys.argv[2]), "uid": 1234, "gid": 1}), 1)
print("made", flush=True)
time.sleep(1000)
"""


@needs_firn
def test_a_standin_does_not_outlive_firn() -> None:
    with subprocess.Popen(["/bin/true"]) as gone:
        pid = gone.pid  # free now, and not soon used again
    source = str(Path(__file__).parents[1] / "src")
    with subprocess.Popen([sys.executable, "-c", STANDIN, source, str(pid)], stdout=subprocess.PIPE) as firn:
        assert firn.stdout is not None and firn.stdout.readline() == b"made\n"
        assert "1234" in Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split("\n")[0]
        firn.kill()
    # It is a child of ours now, if we are a reaper, or of init.
    wait_until("it ends", lambda: _has_ended(pid))


def _has_ended(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "peer", [{"pid": 1 << 31}, {"uid": 1 << 31, "pid": 3}, {"groups": b"abcd" * 70000}, {"gid": 0xFFFFFFFE}], ids=str
)
def test_impossible_peers_are_one_error_or_nobody(peer: dict[str, Any]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    helpers = StandIns()
    try:
        for made in helpers.pair(Identity({"uid": 0, "gid": 0} | peer), socket.SOCK_STREAM):
            made.close()
    except FirnError as error:
        assert "process" in str(error)
    finally:
        helpers.close()
    assert len(os.listdir("/proc/self/fd")) == before


NO_OWNER = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
PLAIN = {"so_sndbuf": 0, "so_rcvbuf": 0} | {
    f"so_{way}_tmo_{unit}": 0 for way in ("snd", "rcv") for unit in ("sec", "usec")
}  # fmt: skip


def entry(number: int, **fields: Any) -> dict[str, Any]:
    """A unix_sk_entry of a socket by itself."""
    usual = {"ino": number, "type": 1, "state": 7, "flags": os.O_RDWR, "uflags": 0, "backlog": 0, "peer": 0}
    return {"usk": usual | {"fown": NO_OWNER, "name": b"", "opts": PLAIN} | fields}


class Images:
    """An image directory without queues."""

    def read_with_payload(self, kind: str) -> list[Any]:
        return []


class Nothing:
    """No file is supplied."""

    def supplies(self, kind: int, message: dict[str, Any]) -> bool:
        return False


@pytest.mark.parametrize(
    "entries",
    [
        [entry(1, state=1, firn={"lost": {"name": b"/" + b"x" * 200}})],
        [entry(1, state=10, name=b"\0impossible", firn={"gone": [{"sent": [{"data": b"x", "rights": [7]}]}]})],
        [entry(1, state=1, firn={"lost": {}, "sent": [{"data": b"", "rights": [99]}]})],
        [entry(1, peer=2, state=1, type=2), entry(2, peer=3, state=1, type=2), entry(3, peer=2, state=1, type=2)],
        [entry(1, peer=2, state=1), entry(2, peer=1, state=1, type=5)],
        [entry(1, peer=2, state=1, type=2), entry(2, type=2), entry(3, peer=2, state=1, type=2)],
    ],
    ids=range(6),
)  # fmt: skip
def test_impossible_images_are_one_error(entries: list[dict[str, Any]]) -> None:
    files = {(UNIXSK, number): each for number, each in enumerate(entries, 1)}
    context = RestoreContext(Images(), None, [], files, lambda *_: {}, lambda *_: -1, Nothing())  # type: ignore[arg-type]
    before = open_descriptors()
    try:
        rebuild = Rebuild(context)
    except FirnError:
        return
    try:
        with pytest.raises(FirnError):
            rebuild.run()
    finally:
        rebuild.close()
    del rebuild
    assert open_descriptors() == before


def shown(records: list[queues.Record]) -> list[tuple[bytes, int]]:
    found = [(record.data, len(record.fds)) for record in records]
    for record in records:
        record.close()
    return found


def rights(fd: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]


def test_a_stream_is_cut_where_descriptors_hang() -> None:
    one, other = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    one.send(b"a" * 1000)
    one.send(b"b" * 500)
    one.sendmsg([b"with"], rights(0))
    one.sendmsg([b"x"], rights(0))
    one.send(b"end")
    count = sockdiag.unix_sockets()[os.fstat(other.fileno()).st_ino].received
    assert count == 1508
    wanted = [(b"a" * 1000 + b"b" * 500, 0), (b"with", 1), (b"x", 1), (b"end", 0)]
    for _ in range(2):
        assert shown(queues.peek_stream(other, count)) == wanted
        assert len(os.listdir("/proc/self/fd")) == before
    assert other.getsockopt(socket.SOL_SOCKET, options.SO_PEEK_OFF) == -1
    assert other.recv(5000) == b"a" * 1000 + b"b" * 500 + b"with"


def marked(sock: socket.socket) -> list[tuple[bytes, int]]:
    count = sockdiag.unix_sockets()[os.fstat(sock.fileno()).st_ino].received
    return [(record.data, record.mark) for record in queues.peek_stream(sock, count)]


@pytest.mark.parametrize("inline", [0, 1])
@pytest.mark.parametrize(("first", "last"), [(b"ab", b"cd"), (b"", b"cd"), (b"ab", b""), (b"", b"")])
def test_an_out_of_band_byte_is_found_and_stays(first: bytes, last: bytes, inline: int) -> None:
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, inline)
    for data, flags in ((first, 0), (b"!", socket.MSG_OOB), (last, 0)):
        if data:
            one.send(data, flags)
    wanted = [(data, mark) for data, mark in ((first, 0), (b"!", queues.URGENT), (last, 0)) if data]
    for _ in range(2):
        assert marked(other) == wanted
    if not inline:
        assert other.recv(1, socket.MSG_OOB) == b"!"
        place = [(b"", queues.WAS_URGENT)] if last or not first else []  # at the end nothing shows it
        assert marked(other) == [(first, 0)] * bool(first) + place + [(last, 0)] * bool(last)
    one.close()
    other.close()


def test_an_out_of_band_byte_behind_descriptors_is_found_or_unclear() -> None:
    one, other = socket.socketpair()
    one.sendmsg([b"a"], rights(0))
    one.send(b"!", socket.MSG_OOB)
    one.send(b"b")
    assert marked(other) == [(b"a", 0), (b"!", queues.URGENT), (b"b", 0)]
    one.close()
    other.close()
    one, other = socket.socketpair()
    for _ in range(2):
        one.sendmsg([b"a"], rights(0))
        one.send(b"!!")
    one.sendmsg([b"c"], rights(0))
    one.send(b"!", socket.MSG_OOB)
    with pytest.raises(queues.Unclear):
        marked(other)
    one.close()
    other.close()


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_messages_are_read_and_stay(kind: int, ended: bool) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    for size in (3, 0, 100000, 0, 0, 1):
        one.send(b"z" * size)
    one.sendmsg([b"fd"], rights(0))
    if ended:
        one.shutdown(socket.SHUT_WR)
    ended = ended and kind == socket.SOCK_SEQPACKET
    found = shown(queues.peek_messages(other, ended))
    assert [len(data) for data, _ in found] == [3, 0, 100000, 0, 0, 1, 2]
    assert [fds for _, fds in found] == [0, 0, 0, 0, 0, 0, 1]
    assert [len(other.recv(1 << 20)) for _ in range(7)] == [3, 0, 100000, 0, 0, 1, 2]
    assert shown(queues.peek_messages(other, ended)) == []
