"""A server moves from one host to another with its address, while clients outside go on; new ones are not refused."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from harness import Runner, Target, firn_command
from namespaces import Hosts, Pair
from test_network_lock import locks
from test_tcp import ECHO, OPTION, STREAM_ROUNDS, Clients, Program

needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    made.close()


class Newcomer(threading.Thread):
    """A client who connects now, and sends a word, which shall come back."""

    def __init__(self, connect: Callable[[tuple[str, int]], socket.socket], address: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self._connect = connect
        self._address = address
        self.problem = "it hangs"
        self.start()

    def run(self) -> None:
        try:
            with self._connect(self._address) as sock:
                sock.sendall(b"hello")
                answer = sock.recv(9)
            self.problem = "" if answer == b"hello" else f"answer {answer!r}"
        except OSError as error:
            self.problem = repr(error)

    def waits(self) -> bool:
        """Whether it still has no answer at all after a while."""
        self.join(0.3)
        return self.is_alive()

    def is_served(self) -> bool:
        self.join(20)
        return not self.problem


@needs_firn
@pytest.mark.parametrize("version", [0, 1], ids=["IPv4", "IPv6"])
def test_a_server_moves_between_hosts(runner: Runner, hosts: Hosts, version: int) -> None:
    """Back and forth, under a hundred clients who check every byte, and one more who comes while it is away."""
    runner.within = hosts.command()
    server = Program(runner, ECHO, Hosts.ADDRESSES[version])
    address = Hosts.ADDRESSES[version], int(server.wait_for("port"))
    clients = Clients([hosts.connect(address) for _ in range(100)])
    try:
        for _ in range(STREAM_ROUNDS):
            clients.wait_for(50000)
            images = server.dump()
            newcomer = Newcomer(hosts.connect, address)
            assert newcomer.waits(), newcomer.problem
            left = hosts.hosts[hosts.active]
            hosts.move()
            assert [name[:5] for name in locks(left)] == ["CRIU-"]
            # Where it left, the lock is given up once the address is gone.
            code, text = runner.firn("unlock", "-D", str(images))
            assert code == 0 and "removed" in text and locks(left) == [], text
            runner.within = hosts.command()
            server.restore(images)
            assert locks(hosts.hosts[hosts.active]) == []
            hosts.plug()
            assert newcomer.is_served(), newcomer.problem
        clients.wait_for(50000)
    finally:
        clients.finish()
    runner.kill(server.target)


LISTENING = """
import os, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
server = socket.create_server((sys.argv[2], 0), family=family, dualstack_ipv6=sys.argv[2] == "::")
with open(f"{sys.argv[1]}/port.new", "w") as file:
    file.write(str(server.getsockname()[1]))
os.rename(f"{sys.argv[1]}/port.new", f"{sys.argv[1]}/port")
while True:
    sock = server.accept()[0]
    sock.sendall(sock.recv(100))
    sock.close()
"""


@contextmanager
def _listening(runner: Runner, bound: str) -> Iterator[tuple[Pair, Program, int]]:
    pair = Pair()
    try:
        runner.within = pair.command()
        server = Program(runner, LISTENING, bound)
        yield pair, server, int(server.wait_for("port"))
        runner.kill(server.target)
        assert locks(pair.here) == []
    finally:
        pair.close()


@needs_firn
@pytest.mark.parametrize("bound", ["0.0.0.0", "::", Pair.HERE[1]])
def test_new_clients_wait_for_a_server_that_is_away(runner: Runner, bound: str) -> None:
    """Without any connection, too. Whom nobody has promised anything is refused: at other ports."""
    with _listening(runner, bound) as (pair, server, port):
        images = server.dump()
        reached = [each for each in Pair.HERE if bound in ("::", each) or (bound == "0.0.0.0" and ":" not in each)]
        newcomers = [Newcomer(pair.connect, (each, port)) for each in reached]
        assert all(each.waits() for each in newcomers), [each.problem for each in newcomers]
        with pytest.raises(ConnectionRefusedError):
            pair.connect((reached[0], port + 1 if port < 65535 else port - 1))
        server.restore(images)
        assert all(each.is_served() for each in newcomers), [each.problem for each in newcomers]


@needs_firn
@pytest.mark.parametrize("option", ["", "--tcp-close"])
def test_whatever_is_restored_ends_the_wait(runner: Runner, option: str) -> None:
    """Another server in its place is reached; the restore then needs no option to remove the lock."""
    with _listening(runner, "0.0.0.0") as (pair, server, port):
        images = server.dump()
        with pair._inside(pair.here), socket.create_server(("", port)) as other:
            pair.connect((Pair.HERE[0], port)).close()
            other.accept()[0].close()
        code, text = runner.try_restore(images, *[option] if option else [])
        assert code == 0, text
        server.target = Target(server.target.pid, None)
        assert locks(pair.here) == []
        assert Newcomer(pair.connect, (Pair.HERE[0], port)).is_served()


@needs_firn
@pytest.mark.parametrize("how", ["kill", "kill-all"])
def test_a_dump_cut_off_keeps_no_client_away(runner: Runner, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where all is locked and the tree still alive."""
    with _listening(runner, "0.0.0.0") as (pair, server, port):
        monkeypatch.setenv("FIRN_FAULT", f"{how}:dump.end.locked")
        assert runner.try_dump(server.target, *OPTION)[0]
        monkeypatch.delenv("FIRN_FAULT")
        assert Newcomer(pair.connect, (Pair.HERE[0], port)).is_served()
        code, text = runner.firn("unlock")
        assert code == 0 and ("removed" in text) == (how == "kill-all")
