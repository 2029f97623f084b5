"""Checkpoints that CRIU 4.2 made, restored by firn: the programs in them check themselves. And checkpoints of the same
programs that firn makes, compared with these."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, Beat, Runner, Target, firn_command, wait_until
from images.likeness import unlike
from images.shared import shared

pytestmark = pytest.mark.xdist_group("terminals")  # one of them wants the lowest number

PLACE = Path("/opt/firn-golden")  # the images name files there
PIDS = {
    "small": 31000, "memory": 31100, "ghost": 31200, "threads": 31300, "tree": 31400, "pipes": 31500, "events": 31600,
    "unix": 31700, "pty": 31800, "tcp": 31900, "signals": 32000,
}  # fmt: skip
RIGHT = 1
TOO_EARLY = 184
"""Of ``pty``: it reads what was queued and what it has just written in one go, if the kernel's worker was quick enough
to bring the latter; or else the former alone."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    if not firn_command() or os.geteuid():
        pytest.skip("needs firn, and root")
    archive = shared("criu-golden", "images.tar.xz")
    if PLACE.exists():
        pytest.skip(f"{PLACE} is there already")
    PLACE.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):  # from 3.11.4
                tar.extraction_filter = tarfile.tar_filter
            tar.extractall(PLACE)
        (PLACE / "run").mkdir(exist_ok=True)
        if not (PLACE / "run" / "fifo").exists():
            os.mkfifo(PLACE / "run" / "fifo", 0o600)
        yield PLACE
    finally:
        shutil.rmtree(PLACE)


@pytest.mark.parametrize("mode", PIDS)
def test_verdict(mode: str, place: Path, runner: Runner) -> None:
    images = place / "images" / mode
    beat = Beat(place / "run" / f"{mode}.beat")
    beat.path.write_bytes((images / "beat").read_bytes())
    options = ("--tcp-established",) if mode == "tcp" else ()
    code, text = runner.try_restore(images, *options)
    deadline = time.monotonic() + PATIENCE
    while code and "is taken" in text and time.monotonic() < deadline:
        time.sleep(0.1)  # the pid or terminal, by something that runs beside this
        code, text = runner.try_restore(images, *options)
    assert code == 0, text[-3000:]
    target = Target(PIDS[mode], beat)
    beat.put("request", 1)
    wait_until("it answers", lambda: bool(beat.get("verdict")) or target.ended())
    if "instructions that need it" in text and target.ended() and target.status == signal.SIGILL:
        pytest.skip("the program was made on a processor with more instructions")
    assert beat.get("verdict") in ((RIGHT, TOO_EARLY) if mode == "pty" else (RIGHT,)), target.fate()
    runner.wait_beats(target)
    runner.kill(target)
    if mode == "tree":
        runner.kill(Target(31405, None))  # its parent was ended by the check


@pytest.mark.parametrize("mode", PIDS)
def test_dumped_as_by_criu(mode: str, place: Path, runner: Runner) -> None:
    """The same fields with the same values, but for those that differ in each run, and some that are explained."""
    beat = Beat(place / "run" / f"{mode}.beat")
    (place / "run" / "fifo").unlink(missing_ok=True)
    null = subprocess.DEVNULL
    process = subprocess.Popen([place / "golden", mode, beat.path], cwd=place, stdin=null, stdout=null, stderr=null)
    process.returncode = 0  # reaped by Target
    target = Target(process.pid, beat)
    wait_until("it gets ready", lambda: bool(beat.get("ready")) or target.ended())
    if target.ended():
        pytest.skip(f"it {target.fate()}: the program was made on a processor with more instructions")
    images = runner.dump(target, *(["--tcp-established"] if mode == "tcp" else []))
    runner.firn("unlock", "-D", str(images))
    found = unlike(place / "images" / mode, images)
    assert not found, "\n".join(found)
