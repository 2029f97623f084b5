"""Action scripts and the pidfile."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from firn.api import DumpOptions
from firn.errors import FirnError
from firn.log import Log
from firn.scripts import ScriptFailed, run_scripts, write_pidfile


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def options(tmp_path: Path, *paths: str) -> DumpOptions:
    (tmp_path / "images").mkdir(exist_ok=True)
    return DumpOptions(images_dir=str(tmp_path / "images"), work_dir=str(tmp_path), action_script=list(paths))


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CLI.md section 11 says: three variables, one argument, stdin closed, output to the log, the work directory."""
    monkeypatch.setenv("OF_THE_CALLER", "kept")
    path = script(
        tmp_path / "script",
        """echo "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID $OF_THE_CALLER $# $0 $PWD"
        echo to stderr >&2
        ls "$CRTOOLS_IMAGE_DIR"
        [ ! -e /proc/self/fd/0 ] || echo stdin is open
        """,
    )
    wanted = options(tmp_path, path)
    (tmp_path / "images" / "inventory.img").touch()
    directory = os.open(wanted.images_dir, os.O_RDONLY)
    log = Log(2, "criu")
    log.open(str(tmp_path / "log"))
    run_scripts(wanted, "pre-dump", 4711, directory, log)
    log.close()
    os.close(directory)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"pre-dump 4711 kept 0 {path} {tmp_path}",
        "to stderr",
        "inventory.img",
    ]


def test_before_there_is_a_root_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path / "script", 'echo "${CRTOOLS_INIT_PID-none} $CRTOOLS_IMAGE_DIR" >told')
    run_scripts(options(tmp_path, path), "pre-restore", 0, -1)
    assert (tmp_path / "told").read_text() == f"none {tmp_path / 'images'}\n"


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/ls /proc/self/fd\n")
    (tmp_path / "script").chmod(0o755)
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    log = Log(2, "criu")
    log.open(str(tmp_path / "log"))
    run_scripts(options(tmp_path, str(tmp_path / "script")), "post-dump", 1, -1, log)
    log.close()
    os.close(leak)
    # ls itself has opened the directory, as 0
    assert {word for word in (tmp_path / "log").read_text().split() if word.isdigit()} == {"0", "1", "2"}


def test_signals(tmp_path: Path) -> None:
    path = script(tmp_path / "script", "grep -E '^Sig(Blk|Ign)' /proc/self/status >told")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        run_scripts(options(tmp_path, path), "post-dump", 1, -1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    blocked, ignored = (int(line.split()[1], 16) for line in (tmp_path / "told").read_text().splitlines())
    assert blocked == 0
    assert not ignored & 1 << (signal.SIGXFSZ - 1)


def test_all_run_the_last_first_and_one_failure_is_enough(tmp_path: Path) -> None:
    first = script(tmp_path / "a", "echo a >>told; exit 3")
    second = script(tmp_path / "b", "echo b >>told")
    third = script(tmp_path / "c", "echo c >>told; kill -9 $$")
    with pytest.raises(ScriptFailed) as caught:
        run_scripts(options(tmp_path, first, second, third), "post-dump", 1, -1)
    assert (tmp_path / "told").read_text().split() == ["c", "b", "a"]
    assert caught.value.action == "post-dump"
    assert f"{first} (exit status 3)" in str(caught.value) and f"{third} (killed by signal 9)" in str(caught.value)


def test_a_script_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ScriptFailed, match="nothing-here \\(cannot be run: No such file"):
        run_scripts(options(tmp_path, str(tmp_path / "nothing-here")), "pre-dump", 1, -1)


@pytest.mark.parametrize("action", ["network-unlock", "pre-resume", "post-resume"])
def test_too_late_to_fail(tmp_path: Path, action: str) -> None:
    log = Log(2, "criu")
    log.open(str(tmp_path / "log"))
    run_scripts(options(tmp_path, script(tmp_path / "a", "exit 1")), action, 1, -1, log)
    log.close()
    assert f"{action} script failed" in (tmp_path / "log").read_text()


def test_the_directory_stays(tmp_path: Path) -> None:
    before = os.getcwd(), len(os.listdir("/proc/self/fd"))
    run_scripts(options(tmp_path, script(tmp_path / "a", "pwd >told")), "pre-dump", 1, -1)
    assert (os.getcwd(), len(os.listdir("/proc/self/fd"))) == before
    assert (tmp_path / "told").read_text() == f"{tmp_path}\n"


def test_pidfile(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    write_pidfile(str(path), 4711)
    assert path.read_bytes() == b"4711"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FirnError, match=r"pidfile .*: File exists"):
        write_pidfile(str(path), 1)
    assert path.read_bytes() == b"4711"
