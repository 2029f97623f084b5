"""Unix sockets: the workloads, peers outside the tree, and how queues are read without taking anything."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import Runner, Target, firn_command, wait_until
from test_workloads import test_workload as run_workload
from workloads.table import Workload

from firn.errors import FirnError
from firn.host import sockdiag
from firn.resources.sockets import options, queues
from firn.resources.sockets.standins import Identity, StandIns

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


@needs_firn
@pytest.mark.parametrize("reason", ["error", "urgent"])
def test_what_images_cannot_hold_is_refused(runner: Runner, reason: str) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if reason == "error":
        one.send(b"x")
    else:
        other.send(b"x", socket.MSG_OOB)
    other.close()
    target = sleeper(runner, one.fileno())
    one.close()
    code, text, _ = runner.try_dump(target)
    word = {"urgent": "out-of-band"}.get(reason, reason)
    assert code and word in text and "Traceback" not in text, text
    runner.kill(target)


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
