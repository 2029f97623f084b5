"""Runs the programs that get checkpointed: builds them, starts them, asks them, dumps and restores them.

Every process that is started here, or that firn restores, becomes a child of the test runner (it is a child subreaper,
prctl(2)) and is reaped here: clone3 with set_tid answers EEXIST as long as a zombie holds the number.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import mmap
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from images.rules import complaints
from workloads.likeness import Portrait, differences, lasting_differences, portrait, speaker
from workloads.table import Workload

__all__ = ["Beat", "Portrait", "Runner", "Target", "build", "descendants", "differences", "firn_command",
           "lasting_differences",
           "low_numbers_in_use", "open_descriptors", "portrait"]  # fmt: skip

SOURCES = Path(__file__).parent / "workloads"
CACHE = Path(os.environ.get("FIRN_TEST_CACHE", SOURCES.parent.parent / "build" / "workloads"))
COMPILER = ["gcc", "-std=gnu11", "-O1", "-g", "-pthread", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror",
            "-Wno-sign-compare"]  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36
POLL = 0.002
PATIENCE = 20.0
COMMAND_PATIENCE = 60.0
LOG_TAIL = 40
BUSY_TERMINALS = 12
TIME_LIMIT = int(os.environ.get("FIRN_TEST_SECONDS", "90"))
"""Seconds that a test may take."""


def become_subreaper() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def firn_command() -> str | None:
    """The firn under test: environment variable FIRN, or the checkout's own; None if there is none."""
    told = os.environ.get("FIRN")
    if told:
        return told
    own = SOURCES.parent.parent / ".venv" / "bin" / "firn"
    return str(own) if own.exists() else None


def _firn() -> str:
    command = firn_command()
    assert command, "no firn to test"
    return command


def build(program: str, dynamic: bool = False) -> Path:
    """The compiled workload *program*, compiled once per content of its sources; AssertionError has gcc's text."""
    source = SOURCES / f"{program}.c"
    command = [*COMPILER, *([] if dynamic else ["-static"])]
    digest = hashlib.sha256(" ".join(command).encode())
    for part in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(part.read_bytes())
    made = CACHE / f"{program}-{digest.hexdigest()[:16]}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        draft = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", draft, source], capture_output=True, text=True, timeout=COMMAND_PATIENCE)
        assert done.returncode == 0, f"{program} does not compile:\n{done.stderr}"
        try:
            made.hardlink_to(draft)
        except FileExistsError:
            pass  # by a test that runs beside this one; its program may be running already
        draft.unlink()
    return made


def wait_until(what: str, happened: Callable[[], bool], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {patience:g} s"
        time.sleep(POLL)


class Beat:
    """The runner's view of a beat file; the layout is that of ``struct beat`` in workload.h."""

    READY, SETUP_FAILED, CANNOT_RUN = 1, 2, 3
    _FIELDS = ("beats", "ready", "request", "verdict", "pid", "checks", "phase", "away_ns")
    TOKENS = 8

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)

    def get(self, field: str) -> int:
        return int(struct.unpack_from("<Q", self._map, 8 * self._FIELDS.index(field))[0])

    def put(self, field: str, value: int) -> None:
        struct.pack_into("<Q", self._map, 8 * self._FIELDS.index(field), value)

    def set_token(self, index: int, value: int) -> None:
        struct.pack_into("<Q", self._map, 8 * (self.TOKENS + index), value)

    def token(self, index: int) -> int:
        return int(struct.unpack_from("<Q", self._map, 8 * (self.TOKENS + index))[0])

    @property
    def text(self) -> str:
        return self._map[1024:2048].split(b"\0", 1)[0].decode(errors="replace")


class Target:
    """A process under test; *beat* is None for programs that know nothing of the protocol."""

    def __init__(self, pid: int, beat: Beat | None) -> None:
        self.pid = pid
        self.beat = beat
        self.status: int | None = None

    def ended(self) -> bool:
        """Reaps the process if it has ended; its wait status is then in ``status``."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is not None

    def state(self) -> str:
        """The state letter of /proc/PID/stat; that of a thread that lives, if the first one has exited."""
        return Path(f"/proc/{speaker(self.pid)}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]

    def fate(self) -> str:
        return "runs" if self.status is None else str(_fate(self.status))


def _fate(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


class Runner:
    """One test's processes; everything lives in *folder*. ``close`` must be called, and complains about leftovers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What firn is run by: a command that takes it and its arguments.
        self.within: list[str] = []
        self.environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"}
        self._images = 0
        self._first_dump = 0.0
        self._tunables: list[tuple[Path, str]] = []
        become_subreaper()

    # ---- starting and asking

    def spawn(self, command: Sequence[str | Path], beat: Beat | None = None, **files: Path) -> Target:
        """Starts *command* in the folder; its stdio is /dev/null, or the regular *files* stdin, stdout, stderr."""
        handles = {name: files[name].open("rb" if name == "stdin" else "wb") for name in files}
        streams = {name: handles.get(name, subprocess.DEVNULL) for name in ("stdin", "stdout", "stderr")}
        try:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env=self.environment,
                start_new_session=beat is None,
                stdin=streams["stdin"],
                stdout=streams["stdout"],
                stderr=streams["stderr"],
            )
        finally:
            for handle in handles.values():
                handle.close()
        # Reaped by Target, whichever incarnation of the pid it is.
        process.returncode = 0
        return Target(process.pid, beat)

    def start(self, workload: Workload, broken: bool = False) -> Target:
        """Starts a workload and waits until it is ready. Skips the test if this machine cannot run it."""
        program = build(workload.program, workload.dynamic)
        beat = Beat(self.folder / "beat")
        target = self.spawn([program, beat.path, workload.mode, *(["--break"] if broken else [])], beat)
        wait_until(f"{workload.name} gets ready", lambda: bool(beat.get("ready")) or target.ended())
        if beat.get("ready") == Beat.CANNOT_RUN:
            wait_until("it ends", target.ended)
            pytest.skip(f"{workload.name}: {beat.text}")
        assert beat.get("ready") == Beat.READY, f"{workload.name}: setup failed ({target.fate()}): {beat.text}"
        assert not target.ended(), f"{workload.name} {target.fate()}"
        return target

    def wait_beats(self, target: Target, count: int = 2) -> None:
        assert target.beat
        beat, start = target.beat, target.beat.get("beats")
        wait_until("it beats", lambda: beat.get("beats") >= start + count or target.ended())
        assert not target.ended(), f"it {target.fate()}"

    def ask(self, target: Target) -> int:
        """Asks for the check and answers the verdict: 1 right, else 100 + line."""
        assert target.beat
        beat, before = target.beat, target.beat.get("checks")
        beat.put("verdict", 0)
        beat.put("request", 1)
        wait_until("it answers", lambda: beat.get("checks") > before or target.ended())
        verdict = beat.get("verdict")
        assert verdict, f"it {target.fate()} instead of answering"
        return verdict

    def assert_right(self, target: Target, when: str) -> None:
        verdict = self.ask(target)
        assert target.beat
        assert verdict == 1, f"{when}: verdict {verdict}: {target.beat.text}"

    def kill(self, target: Target) -> None:
        """Ends the process and the descendants that it has now; orphans become ours and are reaped."""
        if target.status is None:
            below = [Target(pid, None) for pid in descendants(target.pid)]
            for process in (target, *below):
                os.kill(process.pid, signal.SIGKILL)
            for process in (target, *below):
                wait_until(f"{process.pid} ends", process.ended)

    # ---- firn

    def interrupt(self, seconds: float, number: signal.Signals, *words: str) -> None:
        """Runs firn and sends it a signal after *seconds* (unless it has ended by then)."""
        process = self.spawn([*self.within, _firn(), *words])
        time.sleep(seconds)
        if not process.ended():
            os.kill(process.pid, number)
            wait_until("firn ends", process.ended)

    def firn(self, *words: str) -> tuple[int, str]:
        """Runs the firn under test; answers its exit status and what it printed (both streams)."""
        output = self.folder / "firn.output"
        # A file, not a pipe: a restored task that wrongly kept firn's output must not keep the test waiting.
        with output.open("wb") as stream:
            done = subprocess.run(
                [*self.within, _firn(), *words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=COMMAND_PATIENCE,
                check=False,
            )
        return done.returncode, output.read_text(errors="replace")

    def try_dump(self, target: Target, *options: str) -> tuple[int, str, Path]:
        """A dump that may fail: exit status, output and log as one text, and the image folder."""
        self._images += 1
        images = self.folder / f"images-{self._images}"
        images.mkdir()
        if not self._first_dump:
            self._first_dump = time.monotonic()
        code, output = self.firn(
            "dump", "-t", str(target.pid), "-D", str(images), "-v4", "-o", "dump.log", *options
        )
        return code, output + _log(images / "dump.log"), images

    def dump(self, target: Target, *options: str) -> Path:
        """A dump that must work; answers the image folder. A tree's other tasks end (and are reaped) with it."""
        ours = set(children())
        code, output, images = self.try_dump(target, *options)
        assert code == 0, f"dump: exit status {code}\n{_tail(output)}"
        found = complaints(images)
        assert not found, "CRIU would not restore this:\n" + "\n".join(found)
        if not {"--leave-running", "--leave-stopped"} & set(options):
            wait_until("the dumped task ends", target.ended)
            assert target.status is not None
            assert os.WIFSIGNALED(target.status), f"the dumped task {target.fate()}"
            # Its descendants, also those born just before, become ours one generation after the other.
            while orphans := set(children()) - ours:
                for pid in orphans:
                    wait_until(f"the dumped task {pid} ends", Target(pid, None).ended)
        return images

    def try_restore(self, images: Path, *options: str) -> tuple[int, str]:
        code, output = self.firn("restore", "-d", "-D", str(images), "-v4", "-o", "restore.log", *options)
        return code, output + _log(images / "restore.log")

    def restore(self, images: Path, target: Target, *options: str) -> Target:
        """A restore that must work; answers the restored process, which has the old one's pid and is our child."""
        code, output = self.try_restore(images, *options)
        assert code == 0, f"restore: exit status {code}\n{_tail(output)}"
        back = Target(target.pid, target.beat)
        try:
            assert not back.ended(), f"the restored task {back.fate()}\n{_tail(output)}"
        except ChildProcessError:
            raise AssertionError(f"no restored task {target.pid}\n{_tail(output)}") from None
        if back.beat:
            back.beat.put("phase", back.beat.get("phase") + 1)
            back.beat.put("away_ns", int((time.monotonic() - self._first_dump) * 1e9))
        return back

    # ---- the machine

    def set_tunable(self, path: Path, value: str) -> None:
        """Writes a kernel setting; ``close`` puts the old value back."""
        self._tunables.append((path, path.read_text()))
        path.write_text(value)

    def close(self) -> list[str]:
        """Ends what is left (only our own children), puts settings back; answers what should not have been left."""
        _reap_guards()
        left = []
        for pid in children():
            left.append(f"{pid} {Path(f'/proc/{pid}/comm').read_text().strip()}")
        while living := children():
            for pid in living:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for path, value in reversed(self._tunables):
            path.write_text(value)
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def open_descriptors() -> int:
    """How many descriptors this process has, without those that only wait to be collected as garbage."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def low_numbers_in_use() -> Iterator[None]:
    """A terminal gets the lowest free number. One that is made while lower ones are in use has its number for itself:
    what runs beside the test takes the lower ones while the target is away."""
    taken = [os.openpty() for _ in range(BUSY_TERMINALS)]
    try:
        yield
    finally:
        for pair in taken:
            os.close(pair[0])
            os.close(pair[1])


def children(pid: int | str = "self") -> list[int]:
    """The children (ours by default), zombies among them, whichever thread started them."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(word) for word in (thread / "children").read_text().split()]
        except OSError:
            # The thread has ended meanwhile.
            continue
    return found


def _reap_guards() -> None:
    """A killed firn leaves its guard (firn.tracee.guard), which ends at once: orphans are ours to reap."""
    for pid in children():
        if Path(f"/proc/{pid}/comm").read_text() == "net-guard\n":
            wait_until("the guard ends", Target(pid, None).ended)


def descendants(pid: int) -> list[int]:
    """The children of *pid*, and theirs, and so on."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def _log(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_TAIL:])


def machine_state() -> set[str]:
    """The mounts, and the cgroup folders that firn could make: at the top, and below our own.

    Others (service managers) make cgroups elsewhere at any time.
    """
    state = set(Path("/proc/self/mountinfo").read_text().splitlines())
    own = [line.rpartition(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for controller in Path("/sys/fs/cgroup").iterdir():
        for place in {"", *own}:
            folder = controller / place
            if folder.is_dir():
                state.update(str(entry) for entry in folder.iterdir() if entry.is_dir())
    return state
