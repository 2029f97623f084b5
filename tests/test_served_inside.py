"""Servers behind a unix socket, with their clients in the same tree, checkpointed while all of them work."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from harness import Runner, Target, firn_command
from programs import CLIENTS, PYTHON, as_user, cycle, descendants, finish, goes_on, postgresql_folder, program, tail

pytestmark = pytest.mark.skipif(firn_command() is None, reason="no firn command (set FIRN or make the venv)")

PREFORKED = """
import hashlib, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen(20)
for _ in range(3):
    if not os.fork():
        break
def serve(client):
    digest, rest = hashlib.sha256(), b""
    while data := client.recv(100):
        *lines, rest = (rest + data).split(b"\\r\\n")
        for line in lines:
            digest.update(line)
            client.sendall(f"{digest.hexdigest()} {os.getpid()}\\r\\n".encode())
while True:
    client, _ = server.accept()
    with client:
        serve(client)
"""


def _start(runner: Runner, kind: str, clients: int, *command: str | Path) -> tuple[Target, Path]:
    """The tree of clients and server, and the file that they write to; the socket is ``socket``."""
    runner.environment["PYTHONPATH"] = str(CLIENTS.parent)
    names = [runner.folder / name for name in ("socket", "output", "stop")]
    target = runner.spawn(
        [sys.executable, "-S", CLIENTS / "inside.py", kind, *names, str(clients), *command],
        stderr=runner.folder / "errors",
    )
    return target, names[1]


def _check(runner: Runner, kind: str, clients: int, *command: str | Path) -> None:
    target, output = _start(runner, kind, clients, *command)
    for _ in range(2):
        goes_on(target, output)
        members = descendants(target.pid)
        target = cycle(runner, target)
        assert descendants(target.pid) == members
    goes_on(target, output)
    (runner.folder / "stop").touch()
    finish(target)
    assert tail(output).splitlines()[-1] == "right", tail(runner.folder / "errors")


def test_redis(runner: Runner) -> None:
    command = [program("redis-server"), "--port", "0", "--unixsocket", str(runner.folder / "socket"), "--save", ""]
    _check(runner, "redis", 3, *command, "--appendonly", "yes", "--appendfsync", "no")


def test_memcached(runner: Runner) -> None:
    _check(runner, "memcached", 3, program("memcached"), "-u", "root", "-s", runner.folder / "socket")


def test_preforked_server(runner: Runner) -> None:
    """Three clients, each with a worker of its own that keeps a state for it."""
    script = runner.folder / "server.py"
    script.write_text(PREFORKED)
    _check(runner, "echo", 3, sys.executable, *PYTHON, script, runner.folder / "socket")


def test_postgresql_in_the_middle_of_a_transaction(runner: Runner) -> None:
    """A server of several processes with shared memory, as the user postgres; two psql are its clients."""
    programs = [program(name) for name in ("postgres", "initdb", "psql")]
    with postgresql_folder() as folder:
        output, stop = folder / "output", folder / "stop"
        client = shutil.copy(CLIENTS / "sql.py", folder)
        target = runner.spawn(
            [*as_user("postgres"), program("python3"), *PYTHON, client, folder, output, stop, *programs],
            stderr=runner.folder / "errors",
        )  # fmt: skip
        for _ in range(2):
            goes_on(target, output)
            members = descendants(target.pid)
            target = cycle(runner, target)
            assert descendants(target.pid).keys() == members.keys()
        goes_on(target, output)
        stop.touch()
        finish(target)
        assert tail(output).splitlines()[-1] == "right", tail(runner.folder / "errors")
