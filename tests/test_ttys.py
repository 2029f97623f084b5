"""Terminals: the workloads, sides that are held outside, shell jobs, and queues that are looked at without loss."""

from __future__ import annotations

import base64
import copy
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import termios
import tty as modes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Runner, Target, firn_command, low_numbers_in_use, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_workloads import test_workload as run_workload
from workloads.table import Workload

from firn.abi import nr, tty
from firn.abi.libc import syscall
from firn.images.store import ImageDir
from firn.resources.ttys.queues import Contents, Queues, open_peer

MODES = [
    "settings", "lines", "plain", "raw", "full", "packet", "hung", "closed", "closed-typed", "unopened", "many",
    "session", "session-dev-tty",
]  # fmt: skip
TABLE = [
    *(Workload("ttys", mode) for mode in MODES),
    *(Workload("ttys_tree", mode) for mode in ("forkpty", "job")),
]
pytestmark = pytest.mark.xdist_group("terminals")  # each takes the lowest free number, and wants it again
needs_firn = pytest.mark.skipif(not firn_command(), reason="no firn command")


@pytest.fixture(autouse=True)
def high_numbers(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminals of a workload have high numbers."""
    start = runner.start

    def wrapped(workload: Workload, broken: bool = False) -> Target:
        with low_numbers_in_use():
            return start(workload, broken)

    monkeypatch.setattr(runner, "start", wrapped)


@pytest.mark.parametrize(
    ("workload", "way"),
    [pytest.param(workload, way, id=f"{workload.name}-{way}") for workload in TABLE for way in workload.ways],
)
def test_workload(workload: Workload, way: str, runner: Runner) -> None:
    run_workload(workload, way, runner)
    if workload.program == "ttys_tree":
        _reap()


def _reap() -> None:
    """Wait for the processes that have become our children and are dying."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# ---- programs on somebody else's terminal


class Terminal:
    """A user's terminal; what is printed on it is collected."""

    def __init__(self) -> None:
        with low_numbers_in_use():
            self.master, self.slave = os.openpty()
        self.printed = b""

    @property
    def path(self) -> str:
        return os.ttyname(self.slave)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program as the leader of a session on this terminal."""
        return subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )

    def group(self) -> int:
        """The foreground group."""
        return int(struct.unpack("<i", fcntl.ioctl(self.master, termios.TIOCGPGRP, bytes(4)))[0])

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, text: bytes) -> None:
        """Wait until *text* was printed, and forget everything up to it."""

        def seen() -> bool:
            if select.select([self.master], [], [], 0.01)[0]:
                self.printed += os.read(self.master, 65536)
            return text in self.printed

        try:
            wait_until(f"{text!r} is printed", seen)
        except AssertionError:
            raise AssertionError(f"{text!r} was not printed, but {self.printed!r}") from None
        self.printed = self.printed.partition(text)[2]

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


def _child(pid: int, name: str) -> int:
    """The child of *pid* called *name*, once it is there and sleeps."""
    found: list[int] = []

    def there() -> bool:
        for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            stat = Path(f"/proc/{word}/stat").read_text()
            if f"({name}) S" in stat:
                found.append(int(word))
        return bool(found)

    wait_until(f"{name} runs", there)
    return found[0]


@needs_firn
@pytest.mark.parametrize("shell", ["sh -c", "bash -mc"])
@pytest.mark.parametrize("detached", [True, False])
def test_a_shell_job_goes_on_in_another_terminal(runner: Runner, shell: str, detached: bool) -> None:
    """cat, in the group of its shell or in one of its own, is typed to before and after."""
    first, second = Terminal(), Terminal()
    parent = first.start(*shell.split(), "cat; true")
    target = Target(_child(parent.pid, "cat"), None)
    first.type(b"before\n")
    first.expect(b"before\r\nbefore\r\n")
    code, text, _ = runner.try_dump(target)
    assert code and "--shell-job" in text, text
    # The dumped task is no child of ours, so its parent sees its end.
    settings = termios.tcgetattr(first.slave)
    settings[6][termios.VEOF] = b"\x05"
    termios.tcsetattr(first.slave, termios.TCSANOW, settings)
    code, text, images = runner.try_dump(target, "-j")
    assert not code, text
    assert parent.wait(PATIENCE) == 0
    first.close()
    code, text = runner.try_restore(images, "-j")
    assert code and "terminal" in text and "Traceback" not in text, text
    firn = firn_command()
    assert firn
    words = [firn, "restore", "-j", "-D", str(images), "-v4", "-o", "again.log", *(["-d"] if detached else [])]
    restored = second.start("sh", "-c", f"{' '.join(words)}; echo status $?; sleep {600 if detached else 0}")
    try:
        if detached:
            second.expect(b"status 0\r\n")
        else:
            wait_until("it is restored", lambda: Path(f"/proc/{target.pid}/wchan").exists())
        wait_until("it can be typed to", lambda: termios.tcgetattr(second.slave)[6][termios.VEOF] == b"\x05")
        assert termios.tcgetattr(second.slave)[6][termios.VEOF] == b"\x05", "settings"
        wait_until("it has the terminal", lambda: second.group() in (target.pid, restored.pid))
        assert second.group() == (target.pid if shell == "bash -mc" else restored.pid)
        assert os.readlink(f"/proc/{target.pid}/fd/1") == second.path
        second.type(b"after\n")
        second.expect(b"after\r\nafter\r\n")
        second.type(b"\x05")
        if not detached:
            second.expect(b"status 0\r\n")
        wait_until("cat ends", lambda: _gone(target.pid))
    finally:
        for pid in (restored.pid, target.pid):
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        restored.wait()
        second.close()
        _reap()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def sleeper(runner: Runner, **streams: int) -> Target:
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL) | streams
    process = subprocess.Popen(["/bin/sleep", "1000"], cwd=runner.folder, start_new_session=True, **streams)  # type: ignore[call-overload]
    process.returncode = 0
    wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
    return Target(process.pid, None)


@needs_firn
def test_a_slave_whose_master_is_outside(runner: Runner) -> None:
    """Refused; or external, and then inherited at the restore."""
    first, second = Terminal(), Terminal()
    target = sleeper(runner, stdout=first.slave)
    code, text, _ = runner.try_dump(target)
    assert code and first.path in text and "--shell-job" in text, text
    at = os.stat(first.slave)
    key = f"tty[{at.st_rdev:x}:{at.st_dev:x}]"
    assert f"--external {key}" in text, text
    code, text, images = runner.try_dump(target, "--external", key)
    if "not built yet" in text:
        runner.kill(target)
        first.close()
        second.close()
        pytest.skip("the option --external is not built")
    assert not code, text
    wait_until("it ends", target.ended)
    first.close()
    code, text = runner.try_restore(images)
    assert code and f"--inherit-fd fd[N]:{key}" in text and "Traceback" not in text, text
    firn = firn_command()
    assert firn
    os.set_inheritable(second.slave, True)
    words = [firn, "restore", "-d", "-D", str(images), "--inherit-fd", f"fd[{second.slave}]:{key}"]
    subprocess.run(words, check=True, close_fds=False)
    assert os.readlink(f"/proc/{target.pid}/fd/1") == second.path
    runner.kill(Target(target.pid, None))
    second.close()


@needs_firn
def test_a_master_whose_slave_is_outside_is_refused(runner: Runner) -> None:
    terminal = Terminal()
    target = sleeper(runner, stdin=terminal.master)
    path = terminal.path
    os.close(terminal.master)
    code, text, _ = runner.try_dump(target)
    assert code and f"process {os.getpid()} (" in text and path in text, text
    os.close(terminal.slave)
    back = runner.restore(runner.dump(target), target)
    assert os.readlink(f"/proc/{back.pid}/fd/0") == "/dev/ptmx"
    runner.kill(back)


@needs_firn
@pytest.mark.parametrize("by_key", [False, True])
def test_stopped_output_stays_stopped(runner: Runner, by_key: bool) -> None:
    """... in the original and in the restored terminal, and is started only by what has to start it."""
    terminal = Terminal()
    modes.setraw(terminal.slave)
    settings = termios.tcgetattr(terminal.slave)
    settings[0] |= termios.IXON
    termios.tcsetattr(terminal.slave, termios.TCSANOW, settings)
    target = sleeper(runner, stdin=terminal.master, stdout=terminal.slave)
    os.write(terminal.slave, b"before")
    if by_key:
        os.write(terminal.master, b"typed\x13")
    else:
        os.write(terminal.master, b"typed")
        termios.tcflow(terminal.slave, termios.TCOOFF)
    os.set_blocking(terminal.slave, False)
    wait_until("it stops", lambda: not _flows(terminal.slave))
    code, text, _ = runner.try_dump(target, "-R")
    assert code == 0, text
    _check_stopped(terminal.master, terminal.slave, by_key)
    images = runner.dump(target)
    terminal.close()
    back = runner.restore(images, target)
    pidfd = os.pidfd_open(back.pid)
    master, slave = (syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, number, 0) for number in (0, 1))
    os.set_blocking(slave, False)
    _check_stopped(master, slave, by_key)
    assert os.read(slave, 100) == b"typed"
    os.write(master, b"\x11") if by_key else termios.tcflow(slave, termios.TCOON)
    wait_until("it starts", lambda: _flows(slave))
    assert os.read(master, 100) == b"before"
    for fd in (master, slave, pidfd):
        os.close(fd)
    runner.kill(back)


def _flows(slave: int) -> bool:
    return bool(select.select([], [slave], [], 0)[1])


def _check_stopped(master: int, slave: int, by_key: bool) -> None:
    with pytest.raises(BlockingIOError):
        os.write(slave, b"more")
    if by_key:
        termios.tcflow(slave, termios.TCOON)
    else:
        os.write(master, b"\x11")
        assert not select.select([], [slave], [], 0.05)[1]
    assert not _flows(slave)


@needs_firn
def test_a_taken_number_is_named(runner: Runner) -> None:
    terminal = Terminal()
    target = sleeper(runner, stdin=terminal.master, stdout=terminal.slave)
    path = terminal.path
    terminal.close()
    images = runner.dump(target)
    taken: list[Terminal] = []
    while not taken or taken[-1].path != path:
        taken.append(Terminal())
    code, text = runner.try_restore(images)
    assert code and path in text and "Traceback" not in text, text
    for each in taken:
        each.close()
    runner.kill(runner.restore(images, target))


# ---- images


def _short(info: dict[str, Any]) -> None:
    info["termios"]["c_cc"] = info["termios"]["c_cc"][:5]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "index": (lambda info: info["pty"].update(index=1 << 31), "terminal 2147483648: this machine has"),
    "no index": (lambda info: info.pop("pty"), "no pty part"),
    "no settings": (lambda info: info.pop("winsize"), "no settings"),
    "characters": (_short, "c_cc"),
    "discipline": (lambda info: info["termios"].update(c_line=3), "line discipline 3"),
    "type": (lambda info: info.update(type=9), "type 9"),
    "id": (lambda info: info.update(id=77), "tty_info_id"),
}


@needs_firn
def test_images_are_read_by_others_and_damage_is_named(runner: Runner) -> None:
    terminal = Terminal()
    target = sleeper(runner, stdin=terminal.master, stdout=terminal.slave)
    os.write(terminal.master, b"one\ntwo")
    terminal.close()
    path = runner.dump(target)
    images = ImageDir.open(str(path), create_files=True)
    if crit := shutil.which("crit"):
        shown = subprocess.run(
            [crit, "decode", "-i", path / "tty-data.img"], capture_output=True, text=True, check=True
        )
        found = [base64.b64decode(entry["data"]) for entry in json.loads(shown.stdout)["entries"]]
        assert found == [b"one\ntwo", b"one\r\ntwo"]
    good = images.read_all("TTY_INFO")
    for damage, complaint in DAMAGE.values():
        bad = copy.deepcopy(good)
        damage(next(info for info in bad if info["id"] & 1))
        images.write_all("TTY_INFO", bad)
        code, text = runner.try_restore(path)
        assert code and complaint in text and "Traceback" not in text, text
    images.write_all("TTY_INFO", good)
    images.close()
    runner.kill(runner.restore(path, target))


NAMES = [name for name in vars(tty) if name.startswith(("T", "F")) and isinstance(getattr(tty, name), int)]


@pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler")
def test_the_constants_are_the_kernels(tmp_path: Path) -> None:
    """And so are sizes and places of struct termios2."""
    ours = {"TERMIOS_SIZE": "sizeof(struct termios)", "FIRST_SERIAL": "64"}
    lines = [f'printf("%s %llu\\n", "{name}", (unsigned long long)({ours.get(name, name)}));' for name in NAMES]
    lines += [
        f'printf("%s %llu\\n", "{name}", (unsigned long long){name});'
        for name in ("VMIN", "VEOF", "VEOL", "VLNEXT", "VEOL2")
    ]
    lines += [
        f'printf("%s %llu\\n", "{name}", (unsigned long long){name});'
        for name in ("ICANON", "IEXTEN", "EXTPROC", "CBAUD", "BOTHER")
    ]
    lines += ['printf("size %zu\\n", sizeof(struct termios2)); printf("cc %zu\\n", offsetof(struct termios2, c_cc));']
    source = tmp_path / "constants.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <asm/ioctls.h>\n#include <asm/termbits.h>\n"
        "#include <linux/ioctl.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "constants", source], check=True)
    shown = subprocess.run([tmp_path / "constants"], capture_output=True, text=True, check=True).stdout
    values = {name: int(value) for name, value in (line.split() for line in shown.splitlines())}
    assert values.pop("size") == tty.TERMIOS.size and values.pop("cc") == 17
    assert values == {name: getattr(tty, name) for name in values}


# ---- queues


def _pair() -> tuple[int, int, int]:
    master, slave = os.openpty()
    return master, slave, open_peer(master, os.O_RDWR | os.O_NONBLOCK)


def _settings(slave: int, lflag: int, ends: dict[int, bytes] | None = None) -> None:
    now = termios.tcgetattr(slave)
    now[0] = now[1] = 0
    now[3] = lflag
    for index, value in (ends or {}).items():
        now[6][index] = value
    termios.tcsetattr(slave, termios.TCSANOW, now)


def _read_all(fd: int) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return found
        found.append(data)


@settings(max_examples=60, deadline=None)
@example([b"\n\x04\x16;"], b"\x04", b"\x04\x13\xff")
@given(st.lists(st.binary(max_size=300), max_size=9), st.binary(max_size=50), st.binary(max_size=5000))
def test_lines_of_any_bytes_are_seen_and_stay(bodies: list[bytes], rest: bytes, printed: bytes) -> None:
    """Each line ends in another way; whatever is put in is what is looked at, twice, and what is read in the end."""
    master, slave, peer = _pair()
    try:
        _settings(slave, termios.ICANON, {termios.VEOL: b";", termios.VEOL2: b"\x04"})
        ends = [b"\n", b";", b""]
        lines = [body + ends[number % 3] for number, body in enumerate(bodies)]
        # An end-of-file character behind a byte that could end the line itself would be two ends.
        lines = [
            line + b"." if number % 3 == 2 and line and line[-1] in b"\n;\x04" else line
            for number, line in enumerate(lines)
        ]
        typed = [*lines, rest] if lines or rest else []
        queues = Queues(master, peer)
        queues.fill(Contents(typed, printed))
        termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(slave))
        _settings(slave, termios.ICANON, {termios.VEOL: b";", termios.VEOL2: b"\x04", termios.VEOF: b"\x01"})
        for _ in range(2):
            found = Queues(master, peer).look()
            assert found.typed == typed
            assert found.printed == printed
        assert _read_all(peer) == lines
        os.set_blocking(master, False)
        assert b"".join(_read_all(master)) == printed
    finally:
        for fd in (master, slave, peer):
            os.close(fd)


@pytest.mark.parametrize("lflag", [0, termios.ICANON, termios.ICANON | termios.ECHO | termios.ISIG])
def test_looking_changes_no_settings(lflag: int) -> None:
    master, slave, peer = _pair()
    _settings(slave, lflag)
    fcntl.ioctl(master, tty.TIOCSLCKTRMIOS, b"\x01" + bytes(35))
    fcntl.ioctl(master, tty.TIOCPKT, b"\1\0\0\0")
    os.write(master, b"a\nb")
    before = termios.tcgetattr(slave)
    queues = Queues(master, peer)
    found = queues.look()
    assert queues.compact(found.typed) == [b"a\nb"] and queues.expand([b"a\nb"]) == found.typed
    assert termios.tcgetattr(slave) == before
    assert fcntl.ioctl(master, tty.TIOCGLCKTRMIOS, bytes(36)) == b"\x01" + bytes(35)
    assert fcntl.ioctl(master, tty.TIOCGPKT, bytes(4)) == b"\1\0\0\0"
    for fd in (master, slave, peer):
        os.close(fd)


def test_what_does_not_fit_is_an_error() -> None:
    master, slave, peer = _pair()
    modes.setraw(slave)
    with pytest.raises(OSError, match="do not fit") as caught:
        Queues(master, peer).fill(Contents([], bytes(100_000)))
    assert caught.value.errno == errno.ENOSPC
    for fd in (master, slave, peer):
        os.close(fd)
