"""What happens when something goes wrong: the target of a dump is never harmed, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from fault_helpers import Steady, dump_cut_off, reap_orphans
from harness import Runner, firn_command


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _fail() -> None:
    raise OSError(errno.EIO, "on purpose")


CUTS = {"SIGKILL": _kill, "SIGTERM": _terminate, "error": _fail}


def _cut_everywhere(
    runner: Runner, cut: Callable[[], None], left: bool, processes: int, options: dict[str, bool]
) -> list[str]:
    """Cut off a dump before one call after the other; what was wrong afterwards. *left*: a mapping may be left behind.

    Each run of the suite takes every fifth call, from another one on; with FIRN_EVERY_CALL in the environment all.
    """
    found = []
    images = Path(runner.folder) / "cut"
    target = Steady(runner.folder, processes)
    try:
        status, calls = dump_cut_off(target.pid, images, 0, cut, options)
        assert not status and not target.trouble()
        assert calls > 50
        step = 1 if os.environ.get("FIRN_EVERY_CALL") else 5
        first = random.randint(1, step)
        print(f"from call {first} of {calls} on")
        for at in range(first, calls + 1, step):
            areas = target.areas()
            status, _ = dump_cut_off(target.pid, images, at, cut, options)
            trouble = target.trouble()
            reap_orphans(target.pid)
            if trouble:
                found.append(f"call {at} of {calls}: {trouble}")
                target.end()
                target = Steady(runner.folder, processes)
            elif not left and target.areas() != areas:
                found.append(f"call {at} of {calls}: a mapping is left")
            if status and not left and os.listdir(images):
                found.append(f"call {at} of {calls}: files are left: {os.listdir(images)}")
    finally:
        target.end()
    return found


@pytest.mark.parametrize(
    ("processes", "options"), [(1, {}), (3, {}), (1, {"fork_snapshot": True})], ids=["threads", "tree", "snapshot"]
)
@pytest.mark.parametrize("how", list(CUTS))
def test_dump_ends_before_any_call(runner: Runner, how: str, processes: int, options: dict[str, bool]) -> None:
    """Nobody can clean up after SIGKILL: a mapping may be left then."""
    found = _cut_everywhere(runner, CUTS[how], how == "SIGKILL", processes, options)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("processes", [1, 3])
def test_the_target_is_killed_by_somebody(runner: Runner, processes: int) -> None:
    """The dump fails, and does not wait for ever for a leader whose other threads nobody has taken."""
    calls = 0
    for part in range(6):
        target = Steady(runner.folder, processes)
        try:
            if not calls:
                _, calls = dump_cut_off(target.pid, Path(runner.folder) / "cut", 0, _fail, {})
            killed = partial(os.killpg, target.pid, signal.SIGKILL)
            status, _ = dump_cut_off(target.pid, Path(runner.folder) / "cut", calls * (part + 1) // 8, killed, {})
            assert os.waitstatus_to_exitcode(status) == 1
        finally:
            target.end()
            reap_orphans(target.pid)


# -- through the command ---------------------------------------------------------------------------------------------


def _dump(pid: int, images: Path, *options: str, **environment: str) -> tuple[int, str]:
    """(exit status, what it said); the dump must not take longer than half a minute, nor show a traceback."""
    images.mkdir(exist_ok=True)
    firn = firn_command()
    if firn is None:
        pytest.skip("no firn command (set FIRN or make the venv)")
    command = [firn, "dump", "-t", str(pid), "-D", str(images), "-j", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, **environment})
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@contextmanager
def _python(code: str) -> Iterator[tuple[int, str]]:
    """A python that runs *code*, prints a line, and is killed in the end: its pid, the line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_no_such_process(runner: Runner) -> None:
    code, text = _dump(1 << 22, Path(runner.folder) / "images")
    assert code == 1 and f"no process with pid {1 << 22}" in text


def test_an_ancestor_is_refused(runner: Runner) -> None:
    code, text = _dump(os.getpid(), Path(runner.folder) / "images")
    assert code == 1 and f"process {os.getpid()} is an ancestor of firn" in text


def test_a_zombie_is_refused(runner: Runner) -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    code, text = _dump(process.pid, Path(runner.folder) / "images")
    process.wait()
    assert code == 1 and f"process {process.pid} has ended already" in text


def test_a_thread_is_refused(runner: Runner) -> None:
    code = (
        "import threading, time; t = threading.Thread(target=time.sleep, args=(60,)); t.start();"
        " print(t.native_id, flush=True); time.sleep(60)"
    )
    with _python(code) as (_, tid):
        status, text = _dump(int(tid), Path(runner.folder) / "images")
    assert status == 1 and f"{tid} is a thread, not a process" in text


def test_a_traced_process_is_refused(runner: Runner) -> None:
    target = Steady(runner.folder, 1)
    code = (
        "import ctypes, time; seize = 0x4206;"
        f" print(ctypes.CDLL(None).ptrace(seize, {target.pid}, None, None), flush=True); time.sleep(60)"
    )
    try:
        with _python(code) as (tracer, answer):
            assert answer == "0"
            status, text = _dump(target.pid, Path(runner.folder) / "images")
        assert status == 1 and f"process {target.pid} is traced by process {tracer}" in text
        assert not target.trouble()
    finally:
        target.end()


@pytest.mark.parametrize("kind", ["fail", "kill"])
def test_faults_at_every_phase(kind: str, runner: Runner) -> None:
    target = Steady(runner.folder, 2)
    try:
        for phase in ("prepare", "observe", "freeze", "collect", "contents", "release", "save", "commit"):
            for end in ("", ".done"):
                name = f"dump.{phase}{end}"
                images = Path(runner.folder) / name
                code, text = _dump(target.pid, images, "-R", FIRN_FAULT=f"{kind}:{name}")
                assert code == (1 if kind == "fail" else -signal.SIGKILL), text
                assert not target.trouble(), name
                if name != "dump.commit.done":
                    assert not (images / "inventory.img").exists(), name
                    assert kind == "kill" or not os.listdir(images), name
    finally:
        target.end()


@pytest.mark.parametrize("phase", ["kill", "killed"])
def test_a_fault_while_the_tree_is_killed(runner: Runner, phase: str) -> None:
    """Then the checkpoint is all there is of the tree: it stays, and is good."""
    target = Steady(runner.folder, 3)
    images = Path(runner.folder) / "images"
    try:
        code, text = _dump(target.pid, images, FIRN_FAULT=f"fail:dump.end.{phase}")
        assert code == 0, text
        assert "the checkpoint is complete, but" in text
        assert target.process.wait() == -signal.SIGKILL
        reap_orphans(target.pid)
        firn = firn_command()
        assert firn is not None
        subprocess.run([firn, "restore", "-d", "-D", str(images)], check=True, timeout=30)
        target.is_back()
        assert not target.trouble()
    finally:
        target.end()


def test_a_full_disk(runner: Runner) -> None:
    target = Steady(runner.folder, 2)
    images = Path(runner.folder) / "small"
    images.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", images], check=True)
    try:
        code, text = _dump(target.pid, images)
        assert code == 1 and "No space left on device" in text
        assert not os.listdir(images)
        assert not target.trouble()
    finally:
        subprocess.run(["umount", images], check=True)
        target.end()
