"""The network lock: what it drops and what not, that nothing is left of it, and a dump or restore cut off under it."""

from __future__ import annotations

import functools
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command, wait_until
from namespaces import Pair

from firn.errors import KernelError
from firn.host import iptables, nftables
from firn.host.nftables import Connection
from firn.images.store import ImageDir
from firn.resources.network import lock

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="locking needs root")
needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")
RUN_ID = "01234567-89ab-cdef-0123-{:012x}"
TCP_REPAIR = 19
QUIET = 0.4  # seconds in which a packet, and its first repetition, would have come
OPTION = "--tcp-established"


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def locks(namespace: int) -> list[str]:
    channel = nftables.open_channel(namespace)
    try:
        return sorted(table.name for table in nftables.tables(channel) if table.name.startswith(("firn-", "CRIU-")))
    finally:
        channel.close()


def _lock(number: int, namespace: int, tree: int) -> lock.NftLock:
    note = lock.Note(lock.Process(os.getpid()), lock.Process(tree), "/some/images")
    return lock.NftLock(RUN_ID.format(number), note, namespace)


def _of(sock: socket.socket) -> Connection:
    """The connection as its socket sees it."""
    (near, sport, *_), (far, dport, *_) = sock.getsockname(), sock.getpeername()
    source, destination = (socket.inet_pton(sock.family, text) for text in (near, far))
    return Connection(sock.family, source, sport, destination, dport)


def _silent(sock: socket.socket) -> bool:
    """Whether nothing arrives, not even the end."""
    sock.settimeout(QUIET)
    try:
        sock.recv(100)
    except TimeoutError:
        return True
    return False


def _gets(sock: socket.socket, data: bytes) -> bool:
    sock.settimeout(20)
    return sock.recv(100) == data


# -- the lock itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["IPv4", "IPv6", "mapped"])
def test_a_locked_connection_is_silent_and_no_other_is(pair: Pair, version: str) -> None:
    """Two connections to one port, from outside: one is locked, in both directions, also when its socket is gone."""
    address = Pair.HERE[version == "IPv6"]
    family = socket.AF_INET if version == "IPv4" else socket.AF_INET6
    dual = version != "IPv4"
    with pair._inside(pair.here), socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
        port = server.getsockname()[1]
        locked, other = pair.connect((address, port)), pair.connect((address, port))
        far = {sock.getpeername()[1]: sock for sock in (server.accept()[0], server.accept()[0])}
    near, free = (far[sock.getsockname()[1]] for sock in (locked, other))
    namespace = pair.here
    held = _lock(1, namespace, os.getpid())
    try:
        held.add([_of(near)])
        for sock in (near, locked, free, other):
            sock.sendall(b"word")
        assert _gets(free, b"word") and _gets(other, b"word")
        assert _silent(near) and _silent(locked)
        held.open()
        assert _gets(near, b"word") and _gets(locked, b"word"), "what was sent meanwhile comes after all"
        assert locks(namespace) == []
    finally:
        held.close()
    held = _lock(2, namespace, os.getpid())
    try:
        held.add([_of(near)])
        near.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)  # so that it goes without a word
        near.close()
        locked.sendall(b"is anybody there?")
        assert _silent(locked), "a reset has come through"
        held.open()
        locked.settimeout(20)
        with pytest.raises(ConnectionResetError):  # so that it was the lock
            locked.recv(100)
    finally:
        held.close()
        for sock in (locked, other, free):
            sock.close()


def _loopback(count: int) -> list[Connection]:
    here, there = socket.inet_aton("127.0.0.1"), socket.inet_pton(socket.AF_INET6, "fd91::2")
    return [Connection(socket.AF_INET, here, port, here, 1) for port in range(1, count + 1)] + [
        Connection(socket.AF_INET6, there, port, there, 1) for port in range(1, count + 1)
    ]


def test_many_connections_at_once(pair: Pair) -> None:
    """More than fits into one message; a kept lock stays, a restore finds and removes it."""
    namespace = pair.here
    held = _lock(3, namespace, os.getpid())
    held.add(_loopback(2500))
    held.add(_loopback(1))  # what is locked already does no harm
    held.keep()
    held.close()
    assert locks(namespace) == ["CRIU-" + RUN_ID.format(3)]
    if subprocess.run(["which", "nft"], capture_output=True, check=False).returncode == 0:
        command = pair.command("nft", "list", "ruleset")
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "fd91::2 . 2500 . fd91::2 . 1" in shown and "/some/images" in shown
    failed = _lock(3, namespace, 0)  # a restore
    failed.add(_loopback(10))
    failed.close()
    assert locks(namespace) == ["CRIU-" + RUN_ID.format(3)]
    restored = _lock(3, namespace, 0)
    restored.add(_loopback(10))
    restored.open()
    restored.close()
    assert locks(namespace) == []


def test_a_lock_that_was_not_kept_leaves_nothing(pair: Pair) -> None:
    namespace = pair.here
    for connections in ([], _loopback(1)):
        held = _lock(4, namespace, os.getpid())
        held.add(connections)
        assert len(locks(namespace)) == 2
        held.close()
        held.close()
        assert locks(namespace) == []
    held = _lock(4, namespace, os.getpid())
    held.keep()  # of nothing
    held.close()
    assert locks(namespace) == []


def test_what_cannot_be_locked_is_said_when_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(namespace: int = -1) -> None:
        raise OSError(93, "no nf_tables")

    monkeypatch.setattr(nftables, "open_channel", missing)
    held = lock.for_dump("nftables", RUN_ID.format(5), os.getpid(), "/images")
    held.keep()
    held.close()
    with pytest.raises(KernelError, match=r"no nf_tables.*--network-lock skip"):
        held.add(_loopback(1))
    skipped = lock.for_dump("skip", RUN_ID.format(5), os.getpid(), "/images")
    skipped.add(_loopback(1))
    assert skipped.method == lock.SKIP and not skipped.used


@pytest.mark.parametrize("name", ["", "short", "x" * 36, "-" * 36, "../../0123456789abcdef0123456789abcdef"])
def test_no_name_is_made_of_what_is_no_run_id(pair: Pair, name: str) -> None:
    namespace = pair.here
    made = lock.NftLock(name, lock.Note(lock.Process(os.getpid()), lock.Process(0, 0), "/images"), namespace)
    assert locks(namespace) == [f"firn-{os.getpid()}"]
    made.close()


def test_notes_come_back() -> None:
    note = lock.Note(lock.Process(7, 70), lock.Process(8, 80), "/a directory\n/ä" + "x" * 300)
    read = lock.Note.read(str(note))
    assert read is not None and (str(read.maker), str(read.tree), read.here) == ("7/70", "8/80", True)
    assert read.directory.startswith("...") and len(os.fsencode(str(note))) < 240
    for text in ("", "firn", "firn 7 tree 8/80 pidns 1 in /", "firn 7/x tree 8/80 pidns 1 in /", "somebody's table"):
        assert lock.Note.read(text) is None


# -- dumps and restores ------------------------------------------------------------------------------------------------

ECHO = """
import socket, sys
server = socket.create_server(("", 0))
with open(sys.argv[1] + "/port", "w") as file:
    file.write(f"{server.getsockname()[1]}\\n")
peer = server.accept()[0]
while data := peer.recv(65536):
    peer.sendall(data)
"""


class Client(threading.Thread):
    """Sends numbers without end, and checks that they come back; ``seen`` counts the right ones."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.seen = 0
        self.problem = ""
        self.over = False
        self.sender = threading.Thread(target=self._send, daemon=True)

    def run(self) -> None:
        self.sock.settimeout(30)
        self.sender.start()
        data = b""
        try:
            while not self.over:
                more = self.sock.recv(65536)
                assert more, "the end"
                data += more
                whole = len(data) & ~7
                for (number,) in struct.iter_unpack("<Q", data[:whole]):
                    assert number == self.seen, f"{number} instead of {self.seen}"
                    self.seen += 1
                data = data[whole:]
        except (OSError, AssertionError) as error:
            self.problem = self.problem or ("" if self.over else repr(error))

    def _send(self) -> None:
        number = 0
        chance = random.Random(1)
        while not self.over:
            count = chance.randrange(1, 2000)
            try:
                self.sock.sendall(struct.pack(f"<{count}Q", *range(number, number + count)))
            except OSError as error:
                self.problem = repr(error)
                return
            number += count
            time.sleep(0.002)

    def goes_on(self, what: str) -> None:
        before = self.seen
        wait_until(f"{what}: the client goes on", lambda: self.seen > before + 20000 or bool(self.problem))
        assert not self.problem, f"{what}: {self.problem}"

    def stands_still(self) -> bool:
        time.sleep(0.3)  # what had arrived before
        before = self.seen
        time.sleep(QUIET)
        return before == self.seen and not self.problem

    def end(self) -> None:
        self.over = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was reset
        self.join(30)
        self.sender.join(30)
        self.sock.close()


class Story:
    """An echo server in one namespace, whose client in the other never stops."""

    def __init__(self, runner: Runner, pair: Pair) -> None:
        self.runner = runner
        runner.within = pair.command()
        self.target = runner.spawn(pair.command(sys.executable, "-c", ECHO, str(runner.folder)))
        port = runner.folder / "port"
        wait_until("the server listens", lambda: port.exists() and port.read_text().endswith("\n"))
        self.client = Client(pair.connect((Pair.HERE[0], int(port.read_text()))))
        self.client.start()
        self.client.goes_on("at first")
        self.namespace = pair.here
        self.images = runner.folder

    def tables(self) -> list[str]:
        return [name[:5] for name in locks(self.namespace)]

    def unlock(self, *options: str) -> str:
        code, output = self.runner.firn("unlock", *options)
        assert code == 0, output
        return output

    def dump(self, *options: str) -> int:
        code, _, self.images = self.runner.try_dump(self.target, OPTION, *options)
        return code

    def restore(self) -> None:
        self.target = self.runner.restore(self.images, self.target, OPTION)
        self.client.goes_on("restored")
        assert self.tables() == []

    def end(self) -> None:
        self.client.end()
        self.runner.kill(self.target)


@pytest.fixture
def story(runner: Runner, pair: Pair) -> Iterator[Story]:
    made = Story(runner, pair)
    yield made
    made.end()


@needs_firn
@pytest.mark.parametrize("method", ["iptables", "nftables"])
def test_a_client_notices_nothing(story: Story, method: str) -> None:
    assert story.dump("--network-lock", method) == 0
    wait_until("the server is dead", story.target.ended)
    assert story.tables() == ["CRIU-"]
    assert story.client.stands_still()
    assert "waits for the restore" in story.unlock() and story.tables() == ["CRIU-"]
    story.restore()
    assert story.dump("--leave-running", "--network-lock", method) == 0
    assert story.tables() == []
    story.client.goes_on("left running")


@needs_firn
def test_stopped_trees_stay_locked(story: Story) -> None:
    assert story.dump("--leave-stopped") == 0
    assert story.tables() == ["CRIU-"] and story.client.stands_still()
    assert "removed" in story.unlock()
    os.kill(story.target.pid, 18)
    story.client.goes_on("continued")


POINTS = ("freeze.done", "collect.done", "contents.done", "commit.done", "end.locked", "end.killed")
DEAD = POINTS[-1]


@needs_firn
@pytest.mark.parametrize("how", ["kill", "kill-all", "fail"])
def test_a_dump_cut_off(story: Story, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is locked afterwards, or firn unlock says what to do: at the last point, where the tree is dead, and if
    the guard is killed too, so that a table is left."""
    for point in POINTS[: -1 if how == "fail" else None]:
        monkeypatch.setenv("FIRN_FAULT", f"{how}:dump.{point}")
        assert story.dump() != 0
        monkeypatch.delenv("FIRN_FAULT")
        if point != DEAD and how != "kill-all":
            assert story.tables() == [], point
        elif point != DEAD:
            assert story.tables() == ["CRIU-"], point
            assert "removed" in story.unlock(), point
            assert story.tables() == [], point
        if point == DEAD:
            wait_until("the server is dead", story.target.ended)
            assert "waits for the restore" in story.unlock() and story.tables() == ["CRIU-"]
            story.restore()
        story.client.goes_on(point)


@needs_firn
def test_sockets_that_say_goodbye_are_no_hindrance(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without unread data, a socket whose last owner was a killed firn goes on to send its FIN, which is dropped."""
    client = story.client
    client.over = True
    client.sender.join(30)
    assert client.stands_still()
    monkeypatch.setenv("FIRN_FAULT", f"kill:dump.{DEAD}")
    assert story.dump() != 0
    monkeypatch.delenv("FIRN_FAULT")
    wait_until("the server is dead", story.target.ended)
    code, output = story.runner.try_restore(story.images, OPTION)
    if "the same connection exists" in output:
        pytest.skip("this kernel does not remove such sockets on demand")
    assert code == 0, output
    story.target = Target(story.target.pid, None)
    for text in (b"for the other thread", b"still there?"):
        client.sock.sendall(text)
        client.join(30)
    client.sock.settimeout(20)
    received = b""  # numbers may come first, if the other thread was over before it had all of them
    while not received.endswith(text):
        more = client.sock.recv(65536)
        assert more, received[-100:]
        received += more


@needs_firn
def test_a_restore_cut_off(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dump's lock stays, and a further restore brings all back."""
    assert story.dump() == 0
    wait_until("the server is dead", story.target.ended)
    for how in ("fail", "kill"):
        for point in ("open", "join.done", "state.done", "resume"):
            monkeypatch.setenv("FIRN_FAULT", f"{how}:restore.{point}")
            code, _ = story.runner.try_restore(story.images, OPTION)
            assert code != 0
            back = Target(story.target.pid, None)
            wait_until("nothing is left", functools.partial(_ended, back))
            assert story.tables() == ["CRIU-"], (how, point)
    monkeypatch.delenv("FIRN_FAULT")
    assert story.client.stands_still()
    story.restore()


def _ended(process: Target) -> bool:
    try:
        return process.ended()
    except ChildProcessError:
        return True


@needs_firn
def test_a_restore_where_the_dump_was_not(story: Story) -> None:
    """As on another machine: the lock of the dump is not there. Given up, a checkpoint lets its clients go."""
    assert story.dump() == 0
    wait_until("the server is dead", story.target.ended)
    with_table = story.unlock("-D", str(story.images))
    assert "removed" in with_table and "nothing is locked" in story.unlock("-D", str(story.images))
    wait_until("the client has noticed", lambda: bool(story.client.problem))
    code, output = story.runner.try_restore(story.images, OPTION)
    assert code == 0 and story.tables() == [], output
    story.target = Target(story.target.pid, None)
    wait_until("the server learns that its client is gone", story.target.ended)


@needs_firn
def test_unlock_is_careful(runner: Runner, pair: Pair, tmp_path: Path) -> None:
    runner.within = pair.command()
    namespace = pair.here
    busy = _lock(6, namespace, os.getpid())
    busy.add(_loopback(1))
    channel = nftables.open_channel(namespace)
    foreign = "CRIU-" + RUN_ID.format(7)
    nftables.make(channel, foreign)
    nftables.make(channel, "other")
    _, text = runner.firn("unlock", "--all")
    assert text.count("firn is at work") == 2 and f"{foreign}: made by CRIU; removed" in text
    assert locks(namespace) == ["CRIU-" + RUN_ID.format(6), "firn-" + RUN_ID.format(6)]
    nftables.make(channel, foreign)
    _, text = runner.firn("unlock")
    assert "made by CRIU; kept" in text and foreign in locks(namespace)
    code, text = runner.firn("unlock", "--all", "-D", str(tmp_path))
    assert code == 1 and "exclude" in text
    code, text = runner.firn("unlock", "-D", str(tmp_path / "none"))
    assert code == 1
    nftables.remove(channel, [foreign, "other"])
    busy.close()
    channel.close()


# -- iptables ----------------------------------------------------------------------------------------------------------


@contextmanager
def _within(pair: Pair) -> Iterator[None]:
    """In the namespace, with iptables that works there; skips where there is none."""
    with pair._inside(pair.here):
        if not iptables.available() or subprocess.run(["iptables-save"], capture_output=True, check=False).returncode:
            pytest.skip("iptables is not installed, or not in this kernel")
        yield


def test_rules_of_iptables(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no nf_tables: a lock by rules, and its end. Other rules stay."""
    with _within(pair):
        other = "-A INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m tcp --sport 1 --dport 2 -j DROP"
        subprocess.run(["iptables", *other.split()], check=True)
        saved = [line for line in _saved() if line[:1] == "-"]

        def missing(namespace: int = -1) -> None:
            raise OSError(93, "no nf_tables")

        monkeypatch.setattr(nftables, "open_channel", missing)
        held = lock.for_dump("iptables", RUN_ID.format(8), os.getpid(), "/images")
        held.add(_loopback(2))
        assert held.method == lock.IPTABLES and held.used
        assert {each.key() for each in iptables.locked()} == {each.key() for each in _loopback(2)}
        held.keep()
        held.close()
        restored = lock.for_restore(RUN_ID.format(8), "/images", lock.IPTABLES)
        restored.add(_loopback(3))
        restored.close()  # it has failed
        assert len(iptables.locked()) == 4
        restored = lock.for_restore(RUN_ID.format(8), "/images", lock.IPTABLES)
        restored.add(_loopback(3))
        restored.open()
        restored.close()
        assert [line for line in _saved() if line[:1] == "-"] == saved


def _saved() -> list[str]:
    return subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout.splitlines()


@needs_firn
def test_a_restore_deletes_the_rules_of_another_tool(story: Story, pair: Pair) -> None:
    """CRIU locks with iptables by default. The image then says so."""
    with _within(pair):
        pass
    assert story.dump() == 0
    wait_until("the server is dead", story.target.ended)
    with _within(pair):
        near = Connection(2, *_end(pair.HERE[0], story.client.sock.getpeername()[1]),
                          *_end(pair.THERE[0], story.client.sock.getsockname()[1]))  # fmt: skip
        iptables.add([near])
    channel = nftables.open_channel(story.namespace)
    nftables.remove(channel, [name for name in locks(story.namespace) if name.startswith("CRIU-")])
    channel.close()
    assert "kept" in story.unlock() and story.client.stands_still()
    images = ImageDir.open(str(story.images), create_files=True)
    inventory = images.read_one("INVENTORY")
    inventory["network_lock_method"] = lock.IPTABLES
    images.commit(inventory)
    images.close()
    story.restore()
    with _within(pair):
        assert iptables.locked() == []


def _end(address: str, port: int) -> tuple[bytes, int]:
    return socket.inet_aton(address), port
