"""The launcher with the real work behind it: who waits for the restored program, and what becomes of its status."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from firn.cli import launcher

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a dump needs root")

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PROGRAM = """
import os, sys, time
while not os.path.exists(sys.argv[1]): time.sleep(0.05)
time.sleep(0.4)
sys.exit(7)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[int, Callable[..., subprocess.CompletedProcess[str]]]:
    """The pid of a dumped program that ends with status 7 soon after it is restored, and a way to run the commands."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    launcher.write(str(tmp_path))
    images = tmp_path / "images"
    images.mkdir()

    def call(program: str, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / program, command, "-D", images, *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    dumped = tmp_path / "dumped"
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(dumped)]
    with open("/dev/null", "r+b") as null:
        target = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    time.sleep(0.2)
    done = call("firn", "dump", "-t", str(target.pid))
    assert (target.wait(10), done.returncode, done.stdout, done.stderr) == (-9, 0, "", "")
    dumped.touch()
    return target.pid, call


@pytest.mark.parametrize(("program", "status"), [("firn", 7), ("criu", 0)])
def test_in_the_foreground(
    checkpoint: tuple[int, Callable[..., subprocess.CompletedProcess[str]]], program: str, status: int, tmp_path: Path
) -> None:
    pid, call = checkpoint
    done = call(program, "restore", "--pidfile", "pid", "-o", "log", "-v4")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert (tmp_path / "images" / "pid").read_text() == str(pid)
    assert (tmp_path / "images" / "log").read_text().endswith("Restore finished successfully. Tasks resumed.\n")


def test_criu_waits_whatever_signals_come(
    checkpoint: tuple[int, Callable[..., subprocess.CompletedProcess[str]]], tmp_path: Path
) -> None:
    """It says that all is well before it waits, and only the end of its children ends it."""
    pid, _ = checkpoint
    images = tmp_path / "images"
    command = [str(tmp_path / "criu"), "restore", "-D", str(images), "-o", "log", "-v4"]
    with open("/dev/null", "r+b") as null, subprocess.Popen(command, stdin=null, stdout=null, stderr=null) as criu:
        deadline = time.monotonic() + 60
        while not ((images / "log").exists() and "Tasks resumed." in (images / "log").read_text()):
            assert criu.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            criu.send_signal(number)
        assert criu.wait(60) == 0
    assert not os.path.exists(f"/proc/{pid}")


def test_detached_as_our_child(
    checkpoint: tuple[int, Callable[..., subprocess.CompletedProcess[str]]],
) -> None:
    pid, call = checkpoint
    done = call("criu", "restore", "-d", "-S")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_command_takes_over(
    checkpoint: tuple[int, Callable[..., subprocess.CompletedProcess[str]]],
) -> None:
    pid, call = checkpoint
    words = ("--exec-cmd", "--", "sh", "-c", f"grep PPid /proc/{pid}/status; echo PPid: $$; exit 9")
    done = call("firn", "restore", *words)
    first, second = (line.split()[1] for line in done.stdout.splitlines())
    assert first == second and (done.returncode, done.stderr) == (9, "")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_failing_script_calls_a_dump_off(tmp_path: Path) -> None:
    """The program runs on, and criu says 255 if it was the last script."""
    launcher.write(str(tmp_path))
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != "$(cat when)" ]\n')
    script.chmod(0o755)
    for when, status in (("pre-dump", 1), ("post-dump", 255)):
        (tmp_path / "when").write_text(when)
        with open("/dev/null", "r+b") as null, subprocess.Popen(
            ["/bin/sleep", "100"], stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
        ) as target:  # fmt: skip
            try:
                done = subprocess.run(
                    [tmp_path / "criu", "dump", "-t", str(target.pid), "-D", tmp_path, "--action-script", script],
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                )  # fmt: skip
                assert done.returncode == status and f"{when} script failed" in done.stderr
                assert target.poll() is None
            finally:
                target.kill()
