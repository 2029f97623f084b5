"""A guard is there when its process is killed, and not noticed before."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_helpers import WALL
from harness import Runner, wait_until

from firn.abi import ptrace as pt
from firn.host import procfs
from firn.tracee import ptrace
from firn.tracee.guard import Guard


class Guarded:
    """A child of ours that has a guard. It notes in ``heard`` which signals reach it, and ends its guard at SIGUSR1;
    the guard notes in ``done`` what its duty was."""

    def __init__(self, folder: Path, traced: bool = False) -> None:
        """*traced* by us, from before it wants a guard."""
        self.heard, self.done = folder / "heard", folder / "done"
        self.heard.touch()
        wait, go = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.read(wait, 1)
                self._live()
            finally:
                os._exit(1)
        if traced:
            ptrace.request("seize", pt.SEIZE, self.pid)
        os.write(go, b"+")
        os.close(wait)
        os.close(go)
        wait_until("it is guarded", lambda: bool(self.heard.read_text()) or (traced and self._go_on()))

    def _go_on(self) -> bool:
        """Every signal stops it, the end of a child too; False."""
        pid, status = os.waitpid(self.pid, os.WNOHANG | WALL)
        if pid and os.WIFSTOPPED(status):
            ptrace.request("continue", pt.CONT, pid, 0, os.WSTOPSIG(status))
        return False

    def _live(self) -> None:
        guard = Guard(self._duty)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._say(f"signal {number}\n"))
        self._say(f"{guard.start()}\n")
        guard.note(b"not this")
        guard.note(b"this")
        while True:
            if f"signal {signal.SIGUSR1}" in self.heard.read_text():
                guard.end()
                self._say("over\n")
                time.sleep(100)
            time.sleep(0.001)

    def _duty(self, text: bytes, _: int) -> None:
        self.done.write_bytes(text.rstrip(b"\0"))

    def _say(self, text: str) -> None:
        with self.heard.open("a") as file:
            file.write(text)

    def hears(self, number: signal.Signals, text: str = "") -> None:
        text = text or f"signal {number}"
        count = self.heard.read_text().count(text)
        os.kill(self.pid, number)
        wait_until(f"it hears {number}", lambda: self.heard.read_text().count(text) > count)

    def tracer(self) -> int:
        return int(procfs.status(self.pid)["TracerPid"])

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
            os.waitpid(pid, WALL)


@pytest.fixture
def guarded(runner: Runner) -> Iterator[Guarded]:
    made = Guarded(runner.folder)
    yield made
    made.end()


def test_it_does_its_duty_when_its_process_is_killed(runner: Runner) -> None:
    guarded = Guarded(runner.folder)
    assert guarded.tracer()
    guarded.end()
    assert guarded.done.read_bytes() == b"this"


def test_signals_pass(guarded: Guarded) -> None:
    for number in range(3):
        guarded.hears(signal.SIGTERM)
        os.kill(guarded.pid, signal.SIGSTOP)
        wait_until("it stops", lambda: procfs.stat(guarded.pid).state in "tT")
        os.kill(guarded.pid, signal.SIGTERM)
        os.kill(guarded.pid, signal.SIGCONT)
        count = 2 * number + 2
        wait_until("it goes on", lambda count=count: guarded.heard.read_text().count("signal 15") == count)  # type: ignore[misc]


def test_it_goes_without_a_trace(guarded: Guarded) -> None:
    guarded.hears(signal.SIGUSR1, "over")
    assert not guarded.tracer() and not procfs.children(guarded.pid)
    guarded.hears(signal.SIGTERM)
    os.kill(guarded.pid, signal.SIGKILL)
    os.waitid(os.P_PID, guarded.pid, os.WEXITED | os.WNOWAIT)
    assert not guarded.done.exists()


def test_a_guard_that_is_killed_is_not_missed(guarded: Guarded) -> None:
    os.kill(guarded.tracer(), signal.SIGKILL)
    wait_until("it is not traced", lambda: not guarded.tracer())
    guarded.hears(signal.SIGTERM)
    guarded.hears(signal.SIGUSR1, "over")


def test_who_is_traced_already_has_none(runner: Runner) -> None:
    guarded = Guarded(runner.folder, traced=True)
    assert guarded.heard.read_text() == "False\n"
    guarded.end()
