"""firn is killed while it is at work on live TCP connections, and others kill what it restores.

With FIRN_EVERY_CALL in the environment before every single call; FIRN_KILL_ROUNDS has as many kills at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_helpers import Steady, cut_off, reap_orphans
from harness import TIME_LIMIT, Runner, Target, descendants, firn_command, wait_until
from namespaces import Pair
from test_network_lock import locks
from test_tcp import BEGIN, OPTION, Clients, Program

from firn import api
from firn.abi import nr
from firn.abi.libc import syscall
from firn.abi.tcp import TCP_REPAIR
from firn.dump import orchestrator as dump
from firn.errors import FirnError
from firn.host import procfs
from firn.log import Log
from firn.restore import orchestrator as restore

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not firn_command(), reason="needs root and the firn command")
CONNECTIONS = 4
PF_EXITING = 0x4
EVERY_CALL = "FIRN_EVERY_CALL" in os.environ

SERVER = BEGIN + """
import threading, traceback
def serve(sock):
    try:
        while data := sock.recv(65536):
            sock.sendall(data)
        sock.close()
    except ConnectionResetError:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
server = socket.create_server(("", 0))
tell("port", server.getsockname()[1])
number = 0
while True:
    sock = server.accept()[0]
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, number % 2)
    threading.Thread(target=serve, args=(sock,)).start()
    number += 1
    tell(f"served-{number}")
"""


class Served:
    """A server in one namespace, whose clients in the other never stop and check every byte."""

    def __init__(self, runner: Runner, pair: Pair) -> None:
        self.runner, self.pair = runner, pair
        runner.within = pair.command()
        self.program = Program(runner, SERVER)
        self.address = Pair.HERE[0], int(self.program.wait_for("port"))
        self.clients = Clients([pair.connect(self.address) for _ in range(CONNECTIONS)])
        self.program.wait_for(f"served-{CONNECTIONS}")
        self.options = sorted(self._options())
        self.images = runner.folder / "killed"

    def _options(self) -> Iterator[tuple[int, int]]:
        """TCP_REPAIR and SO_REUSEADDR of all its sockets."""
        pid = self.program.target.pid
        pidfd = os.pidfd_open(pid)
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link).startswith("socket:"):
                with socket.socket(fileno=syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, int(link.name), 0)) as copy:
                    repair = copy.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR)
                    yield repair, copy.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        os.close(pidfd)

    def inside(self, job: Callable[[], object]) -> Callable[[], None]:
        """*job*, in the namespace of the server."""

        def go() -> None:
            with self.pair._inside(self.pair.here):
                job()

        return go

    def assert_well(self, when: str) -> None:
        """It runs, and serves its clients."""
        assert not self.program.target.ended(), f"{when}: {self.program.target.fate()}: {self.program.trouble()}"
        assert sorted(self._options()) == self.options, when
        self.clients.wait_for(2000)
        assert not self.program.trouble(), f"{when}: {self.program.trouble()}"

    def is_back(self, when: str) -> bool:
        """What a killed restore has left: everything, or nothing but the lock of the dump."""
        pid = self.program.target.pid
        wait_until(f"{when}: it runs or is gone", lambda: _reaped(pid) or self._runs())
        back = self._runs()
        assert not self.program.trouble(), f"{when}: {self.program.trouble()}"
        if back:
            self.program.target = Target(pid, None)
            self.assert_well(when)
        wait_until(f"{when}: the locks are right", lambda: self.tables() == ([] if back else ["CRIU-"]))
        return back

    def _runs(self) -> bool:
        """Whether it is there, let go, and not about to die."""
        try:
            stat, status = procfs.stat(self.program.target.pid), procfs.status(self.program.target.pid)
            dying = stat.flags & PF_EXITING or int(status["SigPnd"], 16) >> (signal.SIGKILL - 1) & 1
            return not dying and stat.state in "RS" and len(list(self._options())) == len(self.options)
        except OSError:
            return False

    def tables(self) -> list[str]:
        return [name[:5] for name in locks(self.pair.here)]

    def end(self) -> None:
        if self._runs():
            self.runner.kill(self.program.target)
        self.clients.stop()


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def served(runner: Runner) -> Iterator[Served]:
    pair = Pair()
    made = Served(runner, pair)
    yield made
    made.end()
    pair.close()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def moments(calls: int, chosen: int) -> Iterator[int]:
    """Which of so many calls are tried: *chosen* of them, or all. The test's time limit is for each of them then."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    every = range(1, calls + 1)
    for at in every if EVERY_CALL else sorted(random.Random(seed).sample(every, chosen)):
        if EVERY_CALL:
            signal.alarm(TIME_LIMIT)
        yield at


def test_a_dump_is_killed_while_it_reads_connections(served: Served) -> None:
    """Before any call on a socket: no connection is left in repair mode, in which the program's calls would fail."""

    def job() -> None:
        served.images.mkdir(exist_ok=True)
        options = api.DumpOptions(
            tree=served.program.target.pid, images_dir=str(served.images), leave_running=True, tcp_established=True
        )
        dump.dump(options, Log(0))

    status, calls = cut_off(served.inside(job), 0, kill, "/tcp.py")
    assert not status and calls > 15 * CONNECTIONS
    for at in moments(calls, 30):
        status, _ = cut_off(served.inside(job), at, kill, "/tcp.py")
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)  # empty queues need fewer calls
        served.assert_well(f"call {at} of {calls}")
    reap_orphans(served.program.target.pid)


POINTS = ("birth.done", "state.done", "resume", "resume.ready", "resume.outlived", "resume.decided", "resume.unlocked",
          "resume.living", "resume.done")  # fmt: skip
DECIDED = POINTS.index("resume.decided")


def test_a_restore_is_killed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to one moment nothing is left of it but the dump's lock, and after that the tree is back; nothing between."""
    images = served.program.dump()
    for number, point in enumerate(POINTS):
        monkeypatch.setenv("FIRN_FAULT", f"kill:restore.{point}")
        code, _ = served.runner.try_restore(images, *OPTION)
        monkeypatch.delenv("FIRN_FAULT")
        assert code == -signal.SIGKILL
        assert served.is_back(point) == (number >= DECIDED), point
        if number >= DECIDED:
            images = served.program.dump()
    served.program.restore(images)
    served.assert_well("in the end")


@pytest.mark.parametrize("sockets", [(), ("/tcp.py", "/tcp_rebuild.py", "/netlink.py")], ids=["calls", "sockets"])
def test_a_restore_is_killed_before_any_call(served: Served, sockets: tuple[str, ...]) -> None:
    images = served.program.dump()

    def job() -> None:
        options = api.RestoreOptions(images_dir=str(images), restore_detached=True, tcp_established=True)
        restore.restore(options, Log(0))

    status, calls = cut_off(served.inside(job), 0, kill, *sockets)
    assert not status and served.is_back("at first")
    images = served.program.dump()
    for at in moments(calls, 10):
        status, _ = cut_off(served.inside(job), at, kill, *sockets)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)  # as above
        if served.is_back(f"call {at} of {calls}"):
            images = served.program.dump()
    served.program.restore(images)
    served.assert_well("in the end")
    reap_orphans(served.program.target.pid)


def test_firn_is_killed_at_random_moments(served: Served) -> None:
    """Dumps, and restores of those that came through."""
    chance = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    folder, pid = served.runner.folder, served.program.target.pid
    for number in range(int(os.environ.get("FIRN_KILL_ROUNDS", "5"))):
        signal.alarm(TIME_LIMIT)
        (images := folder / f"random-{number}").mkdir()
        what = ("-D", str(images), *OPTION)
        served.runner.interrupt(chance.uniform(0.02, 0.12), signal.SIGKILL, "dump", "-t", str(pid), *what)
        wait_until("it runs or is gone", lambda: served.program.target.ended() or served._runs())
        if served.program.target.ended():
            assert (images / "inventory.img").exists()
            served.runner.interrupt(chance.uniform(0.02, 0.14), signal.SIGKILL, "restore", "-d", *what)
            if not served.is_back(f"round {number}"):
                served.program.restore(images)
        assert served.runner.firn("unlock")[0] == 0 and served.tables() == []
        served.assert_well(f"round {number}")
    reap_orphans(pid)


# -- others kill -------------------------------------------------------------------------------------------------------

FAILED = 3


@pytest.mark.parametrize("everybody", [False, True], ids=["one", "all"])
def test_somebody_kills_what_is_being_restored(runner: Runner, everybody: bool) -> None:
    """The restore does not wait for the dead, whose threads nobody has taken: it says so, and leaves nothing."""
    target, images, said = Steady(runner.folder, 3), runner.folder / "images", runner.folder / "said"
    images.mkdir()
    pids = target.pids()
    chance = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed} of the victims")

    def job() -> None:
        try:
            restore.restore(api.RestoreOptions(images_dir=str(images), restore_detached=True), Log(0))
        except (FirnError, OSError) as error:
            said.write_text(str(error))
            os._exit(FAILED)

    def cut() -> None:
        there = [pid for pid in pids if _tracer(pid) == os.getpid()]  # a free pid may be somebody else's by now
        for pid in there if everybody else chance.sample(there, min(len(there), 1)):
            os.kill(pid, signal.SIGKILL)

    try:
        options = api.DumpOptions(tree=target.pid, images_dir=str(images))
        assert not cut_off(lambda: dump.dump(options, Log(0)), 0, kill)[0]
        target.process.wait()
        reap_orphans(0)
        status, calls = cut_off(job, 0, cut)
        assert not status
        _end()
        failed = 0
        for at in moments(calls, 10):
            status, _ = cut_off(job, at, cut)
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, FAILED), f"call {at} of {calls}"
            if code == FAILED:
                failed += 1
                why = said.read_text()
                assert "killed by" in why or "is taken" in why, f"call {at} of {calls}: {why}"
                reap_orphans(0)
                assert not set(pids) & set(descendants(os.getpid())), f"call {at} of {calls}"
            _end()
        assert failed, "nobody was killed"
    finally:
        target.end()


def _tracer(pid: int) -> int:
    try:
        return int(procfs.status(pid)["TracerPid"])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _end() -> None:
    """End what was restored; orphans become ours when their parent is reaped."""
    while there := descendants(os.getpid()):
        for pid in there:
            os.kill(pid, signal.SIGKILL)
        reap_orphans(0)
