"""What tests of real programs have in common: find a program, dump and restore it at work, wait for its results."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from clients.protocols import Client
from harness import Runner, Target, wait_until

PATIENCE = 60.0
CLIENTS = Path(__file__).parent / "clients"
# The interpreter as its distribution has it: a module search path of its own, nothing from the environment.
PYTHON = ("-E", "-S")


def program(name: str) -> str:
    """The path of a program of this machine; skips the test where there is none."""
    folders = ["/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which(name, path=":".join(folders))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def as_user(name: str) -> list[str]:
    """The beginning of a command that another user is to run; skips where there is no such user."""
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        pytest.skip(f"there is no user {name}")
    return [program("setpriv"), f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


@contextmanager
def folder_of(user: str) -> Iterator[Path]:
    """A folder that the user can reach and owns; the test's own is closed to others."""
    with tempfile.TemporaryDirectory(prefix="firn-", dir="/tmp", ignore_cleanup_errors=True) as name:
        shutil.chown(name, user)
        yield Path(name)


@contextmanager
def postgresql_folder() -> Iterator[Path]:
    """A folder for the user postgres, with the database in ``data``. A server that did not end leaves shared memory."""
    with folder_of("postgres") as folder:
        try:
            yield folder
        finally:
            # The file is gone if it ended well; else its seventh line has key and id of the segment.
            note = folder / "data" / "postmaster.pid"
            lines = note.read_text().splitlines() if note.exists() else []
            if len(lines) > 6:
                subprocess.run(["ipcrm", "-m", lines[6].split()[1]], check=False)


def grows(path: Path) -> Callable[[], bool]:
    """True once *path* has grown since this call."""
    before = path.stat().st_size if path.exists() else 0
    return lambda: path.exists() and path.stat().st_size > before


def goes_on(target: Target, path: Path) -> None:
    """Wait until the program has written more to *path*."""
    has_grown = grows(path)
    wait_until("it works", lambda: has_grown() or target.ended(), PATIENCE)
    assert not target.ended(), f"it {target.fate()}: {tail(path)}"


def cycle(runner: Runner, target: Target, *options: str, restore: tuple[str, ...] = ()) -> Target:
    """Dump it and restore it, with options for both (``restore``: for that alone)."""
    return runner.restore(runner.dump(target, *options), target, *options, *restore)


def finish(target: Target) -> None:
    wait_until("it ends", target.ended, PATIENCE)
    assert target.status == 0, f"it {target.fate()}"


def tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def wait_for(path: Path, text: str, patience: float = PATIENCE) -> None:
    """Wait until *text* stands in the file."""
    try:
        wait_until(f"{text!r} in {path.name}", lambda: path.exists() and text in path.read_text(errors="replace"),
                   patience)  # fmt: skip
    except AssertionError as error:
        raise AssertionError(f"{error}: {tail(path)}") from None


def descendants(pid: int) -> dict[int, str]:
    """All processes below *pid*, with their names."""
    found: dict[int, str] = {}
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for word in (thread / "children").read_text().split():
                found[int(word)] = Path(f"/proc/{word}/comm").read_text().strip()
                found.update(descendants(int(word)))
    except OSError:
        # It has ended meanwhile.
        pass
    return found


def reap(pids: Iterable[int]) -> None:
    """Wait for processes that are our children, or become it when their parent ends."""
    for pid in pids:
        wait_until(f"{pid} is gone", partial(_is_gone, pid), PATIENCE)


def _is_gone(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return not Path(f"/proc/{pid}").exists()


class Load:
    """Clients outside the tree, each in a thread of its own, which exchange words with a server until they are ended.

    A client's ``step`` is one exchange, and raises if the answer is wrong. ``steps`` of each are counted.
    """

    def __init__(self, make: Callable[[], Client], count: int) -> None:
        self._errors: list[BaseException] = []
        self._ends = False
        self.clients = [make() for _ in range(count)]
        self._threads = [threading.Thread(target=self._work, args=(client,), daemon=True) for client in self.clients]
        for thread in self._threads:
            thread.start()

    def _work(self, client: Client) -> None:
        try:
            while not self._ends:
                client.step()
        except BaseException as error:
            self._errors.append(error)

    def go_on(self) -> None:
        """Wait until each client has had some answers more."""
        before = [client.steps for client in self.clients]

        def all_have() -> bool:
            assert not self._errors, f"a client's request failed: {self._errors[0]!r}"
            return all(client.steps > old + 2 for client, old in zip(self.clients, before, strict=True))

        wait_until("all clients get answers", all_have, PATIENCE)

    def end(self) -> None:
        self._ends = True
        for thread in self._threads:
            thread.join(PATIENCE)
        for client in self.clients:
            client.close()
        assert not self._errors, f"a client's request failed: {self._errors[0]!r}"


def under_load(runner: Runner, server: Target, load: Load, *options: str, times: int = 2) -> Target:
    """Dump and restore a server while clients outside work with it; they see no failed request. Ends the clients."""
    options = ("--tcp-established", *options)
    for _ in range(times):
        load.go_on()
        members = descendants(server.pid)
        server = cycle(runner, server, *options)
        assert not members.keys() - descendants(server.pid).keys()
    load.go_on()
    load.end()
    return server


def end(server: Target, number: int = signal.SIGTERM) -> None:
    """End a server as its users do, and wait for all of it."""
    members = descendants(server.pid)
    os.kill(server.pid, number)
    wait_until("the server ends", server.ended, PATIENCE)
    reap(members)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, server: Target) -> None:
    """Wait until somebody listens; without connecting, which would make a connection for the server to see."""
    def listens() -> bool:
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if local.endswith(f":{port:04X}") and state == "0A":
                    return True
        return False

    wait_until("it listens", lambda: server.ended() or listens(), PATIENCE)
    assert not server.ended(), f"it {server.fate()}"
