"""One probe in a process of its own: whatever it does, there is an answer in time and nothing is left."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from firn.check import isolate
from firn.check.isolate import NO, PARTLY, YES, run
from firn.errors import KernelError, NotBuilt


def _raise(error: Exception) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


def _gone(pid: int) -> bool:
    """Whether *pid* ends soon; a zombie of another parent's has ended too."""
    for _ in range(500):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def no_child_left() -> object:
    before = set(os.listdir("/proc/self/fd"))
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert set(os.listdir("/proc/self/fd")) == before


def test_yes() -> None:
    finding = run(lambda: None)
    assert (finding.state, finding.reason, finding.error) == (YES, "", 0)


def test_partly() -> None:
    finding = run(lambda: "only on Sundays")
    assert (finding.state, finding.reason) == (PARTLY, "only on Sundays")


@pytest.mark.parametrize(
    ("error", "number", "reason"),
    [
        (OSError(errno.EPERM, "seize: Operation not permitted"), errno.EPERM, "seize: Operation not permitted"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/dev/x"), errno.ENOENT, "/dev/x: No such file"),
        (OSError("odd"), 0, "odd"),
        (KernelError("too old", "get a new one"), 0, "too old (get a new one)"),
        (NotBuilt("firn does not do this yet"), 0, "firn does not do this yet"),
        (ValueError("oops \ud800 ü\n"), 0, "the probe failed: ValueError: oops \\ud800 \\xfc\n"),
    ],
)
def test_no(error: Exception, number: int, reason: str) -> None:
    finding = run(_raise(error))
    assert (finding.state, finding.reason, finding.error) == (NO, reason, number)


def test_crash() -> None:
    def probe() -> None:
        faulthandler.disable()  # pytest's would fill the screen.
        ctypes.string_at(0)

    finding = run(probe)
    assert finding.state == NO
    assert finding.reason == f"the process that tried it was killed by signal {signal.SIGSEGV:d}"


def test_silent_end() -> None:
    assert run(lambda: os._exit(0)).reason.endswith("ended without an answer")


def test_system_exit_is_no_answer() -> None:
    assert run(lambda: sys.exit(0)).state == NO


def test_hang_with_a_family() -> None:
    reader, writer = os.pipe()

    def probe() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = os.fork()
        if child:
            os.write(writer, f"{child}\n".encode())
        time.sleep(60)

    start = time.monotonic()
    finding = run(probe, seconds=0.3)
    assert time.monotonic() - start < 5
    assert finding.state == NO
    assert "longer than 0.3 s" in finding.reason
    assert _gone(int(os.read(reader, 20)))
    os.close(reader)
    os.close(writer)


def test_family_is_ended_after_an_answer() -> None:
    reader, writer = os.pipe()

    def probe() -> str:
        child = os.fork()
        if not child:
            time.sleep(60)
        os.write(writer, f"{child}\n".encode())
        return "left a child"

    assert run(probe).state == PARTLY
    assert _gone(int(os.read(reader, 20)))
    os.close(reader)
    os.close(writer)


def test_changes_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIRN_PROBE", raising=False)

    def probe() -> None:
        os.environ["FIRN_PROBE"] = "1"
        os.chdir("/")
        os.umask(0o777)
        os.closerange(0, 3)

    before = os.getcwd()
    assert run(probe).state == YES
    assert os.getcwd() == before
    assert "FIRN_PROBE" not in os.environ
    assert os.umask(0o22) != 0o777


def test_long_words_are_cut() -> None:
    finding = run(lambda: "x" * 100_000)
    assert finding.state == PARTLY
    assert 1000 < len(finding.reason) < isolate._LIMIT


def test_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def probe() -> None:
        os.write(1, b"talk")
        os.write(2, b"chatter")
        subprocess.run(["echo", "more"], check=True)

    assert run(probe).state == YES
    assert capfd.readouterr() == ("", "")


def test_starts_with_clean_signals() -> None:
    def probe() -> None:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL

    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        finding = run(probe)
    finally:
        signal.signal(signal.SIGCHLD, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert finding.state == YES, finding.reason


def test_works_without_standard_files() -> None:
    code = (
        "import os; os.closerange(0, 3)\nfrom firn.check.isolate import run\n"
        "os._exit({'yes': 7}.get(run(lambda: None).state, 1))"
    )
    source = os.path.dirname(os.path.dirname(os.path.dirname(isolate.__file__)))
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, timeout=60, check=False)
    assert done.returncode == 7


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    finding = run(lambda: None)
    assert (finding.state, finding.error) == (NO, errno.EAGAIN)


def test_interrupted_wait_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_reader: int, _seconds: float) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(isolate, "_read_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(lambda: time.sleep(60))
