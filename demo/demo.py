"""``make demo``: a running program is saved to files, is gone, comes back and goes on. Status 0 if all went so."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from worker import THREADS, advance

HERE = Path(__file__).parent
FIRN = Path(sys.executable).parent / "firn"
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PATIENCE = 20.0  # seconds


def fail(text: str) -> None:
    """End the demo: it did not go as shown."""
    sys.exit(f"FAILED: {text}")


def say(text: str) -> None:
    """Print one step of the story."""
    print(f"* {text}", flush=True)


def firn(*arguments: str) -> float:
    """Run firn; the seconds it took."""
    print(f"  $ firn {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    done = subprocess.run([FIRN, *arguments], stdin=subprocess.DEVNULL, timeout=PATIENCE)
    if done.returncode:
        fail(f"firn ended with status {done.returncode}")
    return time.monotonic() - started


def threads_of(pid: int) -> list[int]:
    """The thread ids of process *pid*; none if it does not exist."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return []


def results(path: Path) -> list[str]:
    """The whole lines of the results file."""
    return path.read_text(encoding="ascii").splitlines() if path.exists() else []


def grow(path: Path, more: int) -> int:
    """Wait until the file has *more* lines than now; how many it has."""
    wanted = len(results(path)) + more
    end = time.monotonic() + PATIENCE
    while len(results(path)) < wanted:
        if time.monotonic() > end:
            fail(f"{path} does not grow")
        time.sleep(0.05)
    return len(results(path))


def check(path: Path) -> int:
    """Compute every result again: nothing may be lost, doubled or wrong. The number of results."""
    values, steps = list(range(THREADS)), [0] * THREADS
    for line in results(path)[:-1]:  # the last one may be half written
        thread, step, value = map(int, line.split())
        steps[thread] += 1
        values[thread] = advance(values[thread])
        if (step, value) != (steps[thread], values[thread]):
            fail(f"{path}: wrong result: {line}")
    return sum(steps)


def tell(directory: Path, progress: Path) -> None:
    """The demo."""
    path, images = directory / "results.txt", directory / "images"
    images.mkdir()
    with progress.open("wb") as output:
        program = subprocess.Popen(
            [sys.executable, HERE / "worker.py", path],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    pid, there = program.pid, True
    try:
        count = grow(path, 30)
        threads = threads_of(pid)
        say(f"A Python program computes: pid {pid}, {len(threads)} threads {threads}, {count} results in its file.")

        took = firn("dump", "-t", str(pid), "-D", str(images))
        if program.wait(PATIENCE) != -signal.SIGKILL or threads_of(pid):
            fail(f"process {pid} is still there")
        there = False
        before = len(results(path))
        time.sleep(0.5)
        if len(results(path)) != before:
            fail(f"{path} still grows")
        size = sum(file.stat().st_size for file in images.iterdir())
        say(f"It is gone (took {took * 1000:.0f} ms). All that is left: {size >> 10} KiB in {images}.")

        took = firn("restore", "-d", "-D", str(images))
        there = True
        if threads_of(pid) != threads:
            fail(f"the threads are {threads_of(pid)} now")
        count = grow(path, 30)
        say(f"It is back (took {took * 1000:.0f} ms): the same pid {pid}, the same threads {threads_of(pid)}.")
        say(f"It has gone on: {before} results before, {count} now. Its own words:")
        print("".join(f"    {line}\n" for line in progress.read_text().splitlines()[-2:]), end="")
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        there = False
        say(f"Ended it. All {check(path)} results computed again: each is there once, and right.")
    finally:
        if there:
            os.kill(pid, signal.SIGKILL)  # ours, alive or not: nobody has waited for it


def main() -> None:
    """Set the stage."""
    if os.geteuid():
        fail("checkpoint and restore need root")
    # What is restored detached becomes our child, so that its pid is free again when we have waited for it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="firn-demo-") as name:
        tell(Path(name), Path(name) / "progress.txt")
    print("The demo went as shown.")


if __name__ == "__main__":
    main()
