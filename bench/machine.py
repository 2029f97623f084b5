"""What the measures work with: targets, the tools that are compared, folders, an end to all that was started.

Every process started here, and every one that a tool restores, becomes a child of the runner (a child subreaper,
prctl(2)) and is ended and reaped by its pid.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
COMPILER = ["gcc", "-std=gnu11", "-O2", "-pthread", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 30.0
_POLL = 0.0005


class Failed(Exception):
    """A run that did not do what is to be measured; the text says what happened."""


def wait_until(what: str, happened: Callable[[], bool]) -> None:
    """Poll until *happened*; :class:`Failed` after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {PATIENCE:g} s")
        time.sleep(_POLL)


class Run:
    """One run of a command: wall time in ms, peak memory in MB (2**20 bytes)."""

    __slots__ = ("peak_mb", "wall_ms")

    def __init__(self, wall_ms: float, peak_mb: float) -> None:
        self.wall_ms = wall_ms
        self.peak_mb = peak_mb


class Target:
    """A running target.c; ``gap`` and the beats are read from the page it shares with us."""

    _FIELDS = ("ready", "gap_ns", "wanted", "done", "beats")

    def __init__(self, machine: Machine, wait: str, kind: str, count: int, prefix: Sequence[str] = ()) -> None:
        self.machine = machine
        self.beat = machine.new_path("beat")
        self.beat.write_bytes(bytes(mmap.PAGESIZE))
        with self.beat.open("r+b") as file:
            self.page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        command = [*prefix, str(machine.program("target")), str(self.beat), wait, kind, str(count)]
        self.pid = machine.spawn(command)
        wait_until(f"target {kind} {count} gets ready", lambda: bool(self._get("ready")) or self.ended())
        if self.ended():
            raise Failed(f"target {kind} {count} did not start")

    def _get(self, field: str) -> int:
        return int(struct.unpack_from("<Q", self.page, 8 * self._FIELDS.index(field))[0])

    def reset_gap(self) -> None:
        """Begin to measure: the largest gap so far is forgotten."""
        mark = self._get("wanted") + 1
        struct.pack_into("<Q", self.page, 8 * self._FIELDS.index("wanted"), mark)
        wait_until("target answers", lambda: self._get("done") == mark)

    def gap_ms(self) -> float:
        """The largest gap in the target's own clock since :meth:`reset_gap`, in ms, once it runs (again)."""
        self.assert_runs()
        return self._get("gap_ns") / 1e6

    def assert_runs(self) -> None:
        """Wait for some beats; :class:`Failed` if there are none."""
        start = self._get("beats")
        wait_until(f"process {self.pid} runs", lambda: self._get("beats") > start + 2)

    def ended(self) -> bool:
        """Reaps the process if it has ended."""
        return self.machine.reap(self.pid)

    def wait(self) -> None:
        """Wait for its end."""
        wait_until(f"process {self.pid} ends", self.ended)
        self.machine.end_orphans()

    def end(self) -> None:
        """Kill it, reap it, remove its files."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self.page.close()
        for path in self.beat.parent.glob(f"{self.beat.name}*"):
            path.unlink()


class Machine:
    """The runner's processes and folders. ``close`` ends and removes all of them."""

    def __init__(self, folder: str | None) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self.folder = Path(tempfile.mkdtemp(prefix="firn-bench-", dir=folder))
        self._count = 0
        self._ended: set[int] = set()
        self._spawned: set[int] = set()
        self._programs: dict[str, Path] = {}

    def program(self, name: str) -> Path:
        """The compiled bench/NAME.c. CalledProcessError has gcc's text."""
        if name not in self._programs:
            made = self.folder / name
            subprocess.run([*COMPILER, "-o", str(made), str(SOURCES / f"{name}.c")], check=True)
            self._programs[name] = made
        return self._programs[name]

    def new_path(self, kind: str) -> Path:
        """A path that is not in use."""
        self._count += 1
        return self.folder / f"{kind}-{self._count}"

    def new_folder(self) -> Path:
        """An empty folder."""
        path = self.new_path("images")
        path.mkdir()
        return path

    def spawn(self, command: Sequence[str], stdout: int = subprocess.DEVNULL) -> int:
        """Start *command* in a session of its own, without terminal; its pid."""
        process = subprocess.Popen(
            command, cwd=self.folder, start_new_session=True, stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=subprocess.DEVNULL, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
        process.returncode = 0  # reaped by pid here: a restored process has the same one
        self._ended.discard(process.pid)
        self._spawned.add(process.pid)
        return process.pid

    def end_orphans(self) -> None:
        """End and reap what targets that have ended left behind: their children are ours now."""
        for pid in _children():
            if pid not in self._spawned:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def reap(self, pid: int) -> bool:
        """Whether child *pid* has ended; then it is reaped."""
        if pid not in self._ended:
            try:
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    return False
            except ChildProcessError:
                pass
            self._ended.add(pid)
        return True

    def reap_orphans(self) -> None:
        """Reap all that ends and has become ours, until nobody is left."""
        while True:
            try:
                self._ended.add(os.waitpid(-1, 0)[0])
            except ChildProcessError:
                return

    def revived(self, pid: int) -> None:
        """*pid* exists again: it was restored."""
        self._ended.discard(pid)

    def timed(self, command: Sequence[str]) -> Run:
        """Run *command* to its end. :class:`Failed` with the end of its output if its exit status is not 0."""
        output = self.new_path("output")
        stopwatch = str(self.program("stopwatch"))
        done = subprocess.run(
            [stopwatch, str(output), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=2 * PATIENCE, check=True,
        )  # fmt: skip
        wall, peak, status = (int(word) for word in done.stdout.split())
        text = output.read_text(errors="replace")
        output.unlink()
        if status:
            raise Failed(f"{' '.join(command[:2])}: wait status {status:#x}: {' / '.join(text.splitlines()[-3:])}")
        return Run(wall / 1e6, peak / 1024)

    def close(self) -> None:
        """End all children, by pid, and remove the folder."""
        while children := _children():
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)


def _children() -> list[int]:
    found = []
    for thread in Path("/proc/self/task").iterdir():
        found += [int(word) for word in (thread / "children").read_text().split()]
    return found


class Tool:
    """A criu-compatible command."""

    def __init__(self, label: str, path: str, machine: Machine) -> None:
        self.label = label
        self.path = path
        self.machine = machine

    def dump(self, target: Target, images: Path, *options: str, prefix: Sequence[str] = ()) -> Run:
        """Dump *target*; unless it is told to run on it is dead and reaped afterwards."""
        run = self.machine.timed([*prefix, self.path, "dump", "-t", str(target.pid), "-D", str(images), *options])
        if "--leave-running" not in options:
            target.wait()
        return run

    def restore(self, target: Target, images: Path, *options: str) -> Run:
        """Restore *target* from *images*, and make sure that it runs."""
        run = self.machine.timed([self.path, "restore", "-d", "-D", str(images), *options])
        self.machine.revived(target.pid)
        target.assert_runs()
        return run


def bare_python() -> list[str]:
    """The interpreter that runs us, started without ``site`` and without any work."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", "pass"]
