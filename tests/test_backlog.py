"""Connections that wait to be accepted while their server is dumped: clients outside, who are served in their order."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness import Runner, firn_command, wait_until
from namespaces import Hosts, Pair
from test_inet import ENTRY
from test_network_lock import locks
from test_tcp import BEGIN, OPTION, Program

from firn.errors import ImageError, KernelError, RestoreError, UsageError
from firn.resources.base import INETSK, RestoreContext
from firn.resources.files.external import Inherited
from firn.resources.sockets import admission, remap
from firn.resources.sockets.inet import InetSockets

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


def _able() -> bool:
    try:
        admission.Admission().close()
    except KernelError:
        return False
    return True


needs_ability = pytest.mark.skipif(not _able(), reason="this kernel puts nothing into a backlog")

# Accepts nobody before it is told so; then one after the other, each of whom says words until the end of a line, or of
# what it has to say, and gets them back with its number.
SLOW = BEGIN + """
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
dual = sys.argv[2] == "::"
server = socket.create_server((sys.argv[2], 0), family=family, backlog=int(sys.argv[4]), dualstack_ipv6=dual)
if sys.argv[5] != "0":
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(sys.argv[5]))
tell("port", server.getsockname()[1])
await_("go")
number = 0
while True:
    sock, _ = server.accept()
    time.sleep(float(sys.argv[3]))
    words = b""
    while not words.endswith(b"\\n"):
        more = sock.recv(65536)
        if not more:
            break
        words += more
    sock.sendall(b"%d %s" % (number, words))
    sock.close()
    number += 1
"""


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    made.close()


class Slow(Program):
    """The server, and clients who wait for it."""

    def __init__(self, runner: Runner, bound: str, pause: float = 0, backlog: int = 1000, defer: int = 0) -> None:
        super().__init__(runner, SLOW, bound, str(pause), str(backlog), str(defer))
        self.port = int(self.wait_for("port"))


def answer(sock: socket.socket) -> bytes:
    sock.settimeout(20)
    words = b""
    while more := sock.recv(65536):
        words += more
    return words


MUCH = b"m" * 40000


def five(connect: Any, address: tuple[str, int]) -> list[socket.socket]:
    """Clients in various states: quiet, little said, much said and shut, all said, quiet."""
    made = [connect(address) for _ in range(5)]
    made[1].sendall(b"little")
    made[2].sendall(MUCH)
    made[2].shutdown(socket.SHUT_WR)
    made[3].sendall(b"all\n")
    time.sleep(0.05)  # the network takes it
    return cast("list[socket.socket]", made)


def finish(made: list[socket.socket], first: int = 0) -> None:
    """They say the rest, and are answered as if nothing had been; *first* is the number of the first one."""
    made[0].sendall(b"late\n")
    made[1].sendall(b" more\n")
    made[4].sendall(b"last\n")
    wanted = [b"late\n", b"little more\n", MUCH, b"all\n", b"last\n"]
    for number, (sock, words) in enumerate(zip(made, wanted, strict=True), first):
        assert answer(sock) == b"%d %s" % (number, words), number
        sock.close()


@needs_firn
@needs_ability
@pytest.mark.parametrize(
    ("bound", "reached"),
    [("0.0.0.0", Pair.HERE[0]), (Pair.HERE[1], Pair.HERE[1]), ("::", Pair.HERE[0])],
    ids=["IPv4", "IPv6", "mapped"],
)
def test_clients_outside_wait_for_a_server_that_is_away(runner: Runner, pair: Pair, bound: str, reached: str) -> None:
    """Away twice. They speak meanwhile, which is heard afterwards; nothing is left of the lock."""
    runner.within = pair.command()
    server = Slow(runner, bound)
    made = five(pair.connect, (reached, server.port))
    for _ in range(2):
        images = server.dump()
        made[0].sendall(b"")
        server.restore(images)
        assert locks(pair.here) == []
    images = server.dump()
    made[0].sendall(b"while it is away: ")
    made[1].sendall(b"!")
    time.sleep(0.3)
    server.restore(images)
    server.tell("go")
    made[0].sendall(b"late\n")
    made[1].sendall(b" more\n")
    made[4].sendall(b"last\n")
    wanted = [b"while it is away: late\n", b"little! more\n", MUCH, b"all\n", b"last\n"]
    for number, (sock, words) in enumerate(zip(made, wanted, strict=True)):
        assert answer(sock) == b"%d %s" % (number, words), number
    runner.kill(server.target)


@needs_firn
@needs_ability
@pytest.mark.parametrize("fault", ["fail:dump.clients", "fail:dump.commit", "fail:dump.commit.done", ""])
def test_they_are_put_back_if_the_server_stays(
    runner: Runner, pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """After a dump that fails when they have been taken, or one that leaves the server running or stopped."""
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0")
    made = five(pair.connect, (Pair.HERE[0], server.port))
    if fault:
        monkeypatch.setenv("FIRN_FAULT", fault)
        code, text, images = runner.try_dump(server.target, *OPTION)
        assert code and "is lost" not in text, text
        monkeypatch.delenv("FIRN_FAULT")
        assert not (images / "inventory.img").exists()
    else:
        server.dump("--leave-running")
        server.dump("--leave-stopped")
        assert runner.firn("unlock")[0] == 0
        os.kill(server.target.pid, 18)
        wait_until("it runs on", lambda: server.target.state() != "T")
    assert locks(pair.here) == []
    server.tell("go")
    finish(made)
    runner.kill(server.target)


@needs_firn
@needs_ability
def test_a_dump_that_is_killed_harms_no_others(
    runner: Runner, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it had in its hands are closed, which is told; whoever comes then is served."""
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0")
    waiting = pair.connect((Pair.HERE[0], server.port))
    monkeypatch.setenv("FIRN_FAULT", "kill:dump.clients")
    assert runner.try_dump(server.target, *OPTION)[0]
    monkeypatch.delenv("FIRN_FAULT")
    assert runner.firn("unlock")[0] == 0 and locks(pair.here) == []
    assert answer(waiting) == b""
    made = five(pair.connect, (Pair.HERE[0], server.port))
    server.tell("go")
    finish(made)
    runner.kill(server.target)


@needs_firn
@needs_ability
@pytest.mark.parametrize("version", [0, 1], ids=["IPv4", "IPv6"])
def test_they_wait_for_a_server_that_moves(runner: Runner, hosts: Hosts, version: int) -> None:
    """To another host, with its address; the clients speak before they can be heard."""
    runner.within = hosts.command()
    address = Hosts.ADDRESSES[version]
    server = Slow(runner, address)
    made = five(hosts.connect, (address, server.port))
    images = server.dump()
    left = hosts.hosts[hosts.active]
    hosts.move()
    assert runner.firn("unlock", "-D", str(images))[0] == 0 and locks(left) == []
    runner.within = hosts.command()
    server.restore(images)
    assert locks(hosts.hosts[hosts.active]) == []
    hosts.plug()
    server.tell("go")
    finish(made)
    runner.kill(server.target)


class Crowd(threading.Thread):
    """Clients who come every 20 ms, each with a word of its own."""

    def __init__(self, pair: Pair, port: int) -> None:
        super().__init__(daemon=True)
        self._pair, self._port = pair, port
        self._clients: list[threading.Thread] = []
        self.served = 0
        self.problems: list[str] = []
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        number = 0
        while not self._over.wait(0.02):
            number += 1
            client = threading.Thread(target=self._one, args=(b"client %d\n" % number,), daemon=True)
            client.start()
            self._clients.append(client)

    def _one(self, words: bytes) -> None:
        try:
            with self._pair.connect((Pair.HERE[0], self._port)) as sock:
                sock.sendall(words)
                got = answer(sock)
            if got.partition(b" ")[2] == words:
                self.served += 1
            else:
                self.problems.append(f"{words!r} was answered {got!r}")
        except OSError as error:
            self.problems.append(f"{words!r}: {error!r}")

    def finish(self) -> None:
        self._over.set()
        self.join()
        for client in self._clients:
            client.join(20)
        assert not self.problems, self.problems
        assert self.served == len(self._clients)


@needs_firn
@needs_ability
def test_clients_come_without_end_to_a_slow_server(runner: Runner, pair: Pair) -> None:
    """No dump is refused, and no client left out: not by those that leave it running, nor while it is away."""
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0", 0.015)
    server.tell("go")
    crowd = Crowd(pair, server.port)
    waited = 0
    for turn in range(6):
        time.sleep(0.2)
        images = server.dump(*["--leave-running"] if turn % 2 else [])
        waited += "to be accepted" in (images / "dump.log").read_text()
        if not turn % 2:
            server.restore(images)
    crowd.finish()
    assert waited, "nobody ever waited"
    runner.kill(server.target)


@needs_firn
@needs_ability
@pytest.mark.parametrize(("bound", "option"), [("0.0.0.0", "--leave-running"), ("0.0.0.0", ""), ("::", "")])
def test_more_than_a_backlog_holds(runner: Runner, pair: Pair, bound: str, option: str) -> None:
    """Two for whom it has no room take themselves for connected: their handshakes had begun when there was some."""
    runner.within = pair.command()
    server = Slow(runner, bound, 0, 4)
    made = [pair.connect((Pair.HERE[0], server.port)) for _ in range(3)]
    pair.mute(True)
    for _ in range(4):
        with pair._inside(pair.there):
            made.append(socket.socket())
        made[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            made[-1].connect((Pair.HERE[0], server.port))
    time.sleep(0.1)
    pair.mute(False)
    for sock in made:
        sock.settimeout(20)
        while sock.connect_ex((Pair.HERE[0], server.port)) != errno.EISCONN:
            time.sleep(0.02)
        sock.sendall(b"word\n")
    images = server.dump(*[option] if option else [])
    if not option:
        server.restore(images)
    server.tell("go")
    assert sorted(answer(sock) for sock in made) == [b"%d word\n" % number for number in range(7)]
    runner.kill(server.target)


@needs_firn
@needs_ability
@pytest.mark.parametrize("fault", ["fail:dump.commit", ""])
def test_who_counts_as_connected_when_it_speaks(
    runner: Runner, pair: Pair, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """TCP_DEFER_ACCEPT: to the server, those who have said nothing are not there yet; and the option stays."""
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0", 0, 5, 30)
    made = [pair.connect((Pair.HERE[0], server.port)) for _ in range(3)]
    if not fault:
        server.restore(server.dump())
    made[0].sendall(b"word\n")
    time.sleep(0.05)
    if fault:
        monkeypatch.setenv("FIRN_FAULT", fault)
        assert runner.try_dump(server.target, *OPTION)[0]
        monkeypatch.delenv("FIRN_FAULT")
    else:
        server.restore(server.dump())
    made.append(pair.connect((Pair.HERE[0], server.port)))
    time.sleep(0.05)
    server.tell("go")
    for sock in made[1:]:
        sock.sendall(b"word\n")
    assert sorted(answer(sock) for sock in made) == [b"%d word\n" % number for number in range(4)]
    runner.kill(server.target)


@needs_firn
def test_without_the_ability_they_are_refused(runner: Runner, pair: Pair) -> None:
    """Here because the loopback device is down. They wait as before; a program that accepts them gets the time."""
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0", 0.04)
    made = five(pair.connect, (Pair.HERE[0], server.port))
    pair._in(pair.here, "ip", "link", "set", "lo", "down")
    code, text, _ = runner.try_dump(server.target, *OPTION)
    assert code and "5 connections wait to be accepted" in text and "--skip-in-flight" in text, text
    server.tell("go")
    finish(made)
    late = [pair.connect((Pair.HERE[0], server.port)) for _ in range(12)]
    for sock in late:
        sock.sendall(b"word\n")
    images = server.dump()
    assert [answer(sock) for sock in late] == [b"%d word\n" % number for number in range(5, 17)]
    server.restore(images)
    runner.kill(server.target)


@needs_firn
@needs_ability
@pytest.mark.skipif(not shutil.which("iptables"), reason="iptables is not installed")
def test_a_firewall_in_the_way_is_noticed_before(runner: Runner, pair: Pair) -> None:
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0")
    made = five(pair.connect, (Pair.HERE[0], server.port))
    rule = ["iptables", "-w", "-A", "INPUT", "-i", "lo", "-s", Pair.THERE[0], "-j", "DROP"]
    done = subprocess.run(pair.command(*rule), capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"no rules of iptables here: {done.stderr}")
    for options in ((), ("--leave-running",)):
        code, text, _ = runner.try_dump(server.target, *OPTION, *options)
        assert code and "a firewall would not let one be put back" in text, text
    server.tell("go")
    finish(made)
    runner.kill(server.target)


@needs_firn
@needs_ability
def test_what_a_restore_needs(runner: Runner, pair: Pair) -> None:
    """The option, or one that leaves them out; and the address. The same images can be restored afterwards."""
    runner.within = pair.command()
    server = Slow(runner, "0.0.0.0")
    made = five(pair.connect, (Pair.HERE[0], server.port))
    images = server.dump()
    assert "5 waiting to be accepted" in runner.firn("inspect", str(images))[1]
    code, text = runner.try_restore(images)
    assert code and "connections that wait to be accepted" in text and "--tcp-close" in text, text
    pair._in(pair.here, "ip", "address", "del", f"{Pair.HERE[0]}/24", "dev", "veth")
    code, text = runner.try_restore(images, *OPTION)
    assert code and f"backlog of {Pair.HERE[0]}:{server.port}" in text and "give this machine the address" in text, text
    pair._in(pair.here, "ip", "address", "add", f"{Pair.HERE[0]}/24", "dev", "veth")
    server.restore(images)
    server.tell("go")
    finish(made)
    runner.kill(server.target)


@needs_firn
@needs_ability
def test_a_socket_that_others_have_too_is_refused(runner: Runner) -> None:
    """They would get the clients as well, and stay."""
    server = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen(["/bin/sleep", "1000"], stdin=server.fileno(), cwd=runner.folder, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    client = socket.create_connection(server.getsockname())
    wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    code, text = runner.firn("dump", "-t", str(process.pid), "-D", str(runner.folder), *OPTION)
    assert code and f"process {os.getpid()}" in text and "has the socket too" in text, text
    served = server.accept()[0]
    client.sendall(b"word")
    assert served.recv(100) == b"word"
    process.kill()
    process.wait()


# -- the images --------------------------------------------------------------------------------------------------------

STREAM = {
    "inq_len": 3, "inq_seq": 2, "outq_len": 0, "outq_seq": 9, "opt_mask": 7, "snd_wscale": 7, "rcv_wscale": 7,
    "mss_clamp": 1460, "timestamp": 5,
}  # fmt: skip
CLIENT = {
    "state": 1, "src_addr": [0x0100007F], "src_port": 5, "dst_addr": [0x0200007F], "dst_port": 6, "stream": STREAM,
    "data": b"abc",
}  # fmt: skip


def _open(client: dict[str, Any], **options: bool) -> None:
    """Restore a listening socket for which *client* waits."""
    message = ENTRY | {"state": 10, "src_port": 5, "firn": {"clients": [client]}}
    entry = {"type": INETSK, "id": 1, "isk": message}
    chosen = SimpleNamespace(**{"tcp_established": True, "tcp_close": False} | options)
    context = SimpleNamespace(files={(INETSK, 1): entry}, images=None, options=chosen, inherited=Inherited([]))
    kind = InetSockets()
    try:
        kind.open(1, message, cast(RestoreContext, context))
    finally:
        kind.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": 3}, {"src_addr": [1, 2]}, {"dst_addr": []}, {"dst_port": 1 << 16}, {"src_port": 0}, {"data": b"ab"},
        {"urgent": 3}, {"stream": STREAM | {"mss_clamp": 1 << 16}}, {"stream": STREAM | {"rcv_wscale": 15}},
        {"stream": {}},
    ],
)  # fmt: skip
def test_damaged_clients_are_one_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="impossible connections"):
        _open(CLIENT | wrong)
    for name in CLIENT.keys() - {"stream"}:
        with pytest.raises(ImageError, match="impossible connections"):
            _open({key: value for key, value in CLIENT.items() if key != name})


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(RestoreError, match=r"192\.0\.2\.77"):
        _open(CLIENT | {"src_addr": [0x4D0200C0]})
    with pytest.raises(RestoreError, match="--tcp-established"):
        _open(CLIENT, tcp_established=False)


def test_other_addresses() -> None:
    """The server's is changed, and that of a client in the checkpoint, but not others."""
    other = CLIENT | {"dst_addr": [0x0300007F]}
    listening = ENTRY | {"state": 10, "src_port": 5, "firn": {"clients": [dict(CLIENT), dict(other)]}}
    calling = ENTRY | {"state": 1, "src_addr": [0x0200007F], "src_port": 6, "dst_addr": [0x0100007F], "dst_port": 5}
    files = {(INETSK, number): {"isk": message} for number, message in enumerate((listening, calling))}
    remap.apply(files, ["127.0.0.1=127.9.0.1", "127.0.0.2=127.9.0.2", "127.0.0.3=127.9.0.3"])
    first, second = listening["firn"]["clients"]
    assert [struct.pack("<I", *each) for each in (first["src_addr"], first["dst_addr"], second["dst_addr"])] == [
        b"\x7f\x09\0\x01", b"\x7f\x09\0\x02", b"\x7f\0\0\x03",
    ]  # fmt: skip
    with pytest.raises(UsageError):
        remap.apply(files, ["x"])
