"""The measures. Each takes the bench, runs its rounds and answers rows.

A round does the same with every tool and with the reference, one right after the other, so that what else happens on
the machine meets all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from machine import Failed, Machine, Run, Target, Tool, bare_python, wait_until
from table import Row

PAUSE_LIMIT = 6.0
CROWD_PROCESSES, CROWD_MOUNTS = 300, 200
SCALE_LIMIT = 2000.0
CONNECTIONS_LIMIT = 1500.0
PAUSE_PER_CONNECTION = 0.5
SCALE_RATIO = 2.5
"""Twice the things may take 2.5 times the time: half again as steep as a line through zero would still be noise."""
EACH_LIMIT = 3.0
PEAK_LIMIT = 100.0
FAMILY = 50
FAMILY_SIZE_RATIO = 1.5


class Bench:
    """What a measure needs: the machine, our tool, and the other one if there is one."""

    def __init__(self, machine: Machine, own: Tool, other: Tool | None) -> None:
        self.machine = machine
        self.own = own
        self.other = other

    def tools(self) -> list[Tool]:
        """All tools to be compared."""
        return [self.own, *([self.other] if self.other else [])]

    @contextmanager
    def target(self, wait: str, kind: str = "none", count: int = 0, prefix: Sequence[str] = ()) -> Iterator[Target]:
        """A target that is gone at the end."""
        made = Target(self.machine, wait, kind, count, prefix)
        try:
            yield made
        finally:
            made.end()

    @contextmanager
    def images(self) -> Iterator[Path]:
        """An image folder. At its end the contents go, before they reach the disk, but the files stay to the bench's.

        A file system without journal does not use the number of a removed file again for minutes (ext4:
        fs/ext4/ialloc.c), and making a file has to pass over them all: 0.4 ms instead of 0.04 after some thousands.
        """
        folder = self.machine.new_folder()
        try:
            yield folder
        finally:
            for path in folder.rglob("*.img"):
                os.truncate(path, 0)

    def attempt(self, tool: Tool, rows: Sequence[Row], work: Callable[[], Sequence[float]]) -> None:
        """Add what *work* measures with *tool* to *rows*, or the reason why it cannot."""
        if any((row.failure if tool is self.own else row.other_failure) for row in rows):
            return
        try:
            measured = work()
        except Failed as failed:
            for row in rows:
                if tool is self.own:
                    row.failure = str(failed)
                else:
                    row.other_failure = str(failed)
            return
        for row, value in zip(rows, measured, strict=True):
            (row.values if tool is self.own else row.others).append(value)


# -- the pause that the target sees ------------------------------------------------------------------------------------


def _pause(bench: Bench, tool: Tool, target: Target, *options: str, prefix: Sequence[str] = ()) -> float:
    with bench.images() as folder:
        target.reset_gap()
        tool.dump(target, folder, "--leave-running", *options, prefix=prefix)
        return target.gap_ms()


def _pausing(
    bench: Bench, tool: Tool, target: Target, *options: str, prefix: Sequence[str] = ()
) -> Callable[[], list[float]]:
    return lambda: [_pause(bench, tool, target, *options, prefix=prefix)]


@contextmanager
def _stopped(target: Target) -> Iterator[None]:
    """Keep *target* from using a processor for a while."""
    os.kill(target.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(target.pid, signal.SIGCONT)


def _noise(target: Target, seconds: float = 0.05) -> float:
    """The largest gap while nothing is done to the target."""
    target.reset_gap()
    time.sleep(seconds)
    return target.gap_ms()


def pause(bench: Bench) -> list[Row]:
    """A small process, dumped again and again."""
    row = Row("pause, small process", "ms", PAUSE_LIMIT, "no dump")
    with bench.target("spin") as target:
        for _ in range(15):
            for tool in bench.tools():
                bench.attempt(tool, [row], _pausing(bench, tool, target))
            row.references.append(_noise(target))
    return [row]


def crowd(bench: Bench) -> list[Row]:
    """The same on a machine full of other things, each run paired with one on the machine as it is."""
    name = f"pause, {CROWD_PROCESSES} other processes, {CROWD_MOUNTS} mounts"
    row = Row(name, "ms", PAUSE_LIMIT, "without", 1.3)
    try:
        with _crowd(bench) as prefix, bench.target("spin", prefix=prefix) as target, bench.target("spin") as alone:
            for _ in range(11):
                for tool in bench.tools():
                    with _stopped(alone):
                        bench.attempt(tool, [row], _pausing(bench, tool, target, prefix=prefix))
                with _stopped(target):
                    row.references.append(_pause(bench, bench.own, alone))
    except Failed as failed:
        row.failure = row.failure or str(failed)
    return [row]


@contextmanager
def _crowd(bench: Bench) -> Iterator[list[str]]:
    """A full machine; the words that start a command in its mount namespace."""
    folder = bench.machine.new_folder()
    reader, writer = os.pipe()
    words = [str(bench.machine.program("crowd")), str(CROWD_PROCESSES), str(CROWD_MOUNTS), str(folder)]
    pid = bench.machine.spawn(words, stdout=writer)
    os.close(writer)
    try:
        if os.read(reader, 1) != b"!":
            raise Failed("a mount namespace, mounts or processes cannot be made here")
        nsenter = shutil.which("nsenter")
        if nsenter is None:
            raise Failed("nsenter is not installed")
        yield [nsenter, "-t", str(pid), "-m", "--"]
    finally:
        os.close(reader)
        if not bench.machine.reap(pid):
            os.kill(pid, signal.SIGKILL)
            wait_until("the crowd ends", lambda: bench.machine.reap(pid))


def snapshot(bench: Bench) -> list[Row]:
    """Fork snapshot: the pause must not depend on how long writing takes."""
    rows = []
    for kind, megabytes, limit in (("memory", 256, 10.0), ("memory", 2048, 60.0), ("huge", 2048, None)):
        pages = " of huge pages" if kind == "huge" else ""
        row = Row(f"pause, fork snapshot, {megabytes} MB{pages}", "ms", limit, "no dump")
        with bench.target("spin", kind, megabytes) as target:
            for _ in range(5 if megabytes < 1000 else 3):
                bench.attempt(bench.own, [row], _pausing(bench, bench.own, target, "--fork-snapshot"))
                if row.failure:
                    break
                row.references.append(_noise(target))
        rows.append(row)
    return rows


# -- wall time ---------------------------------------------------------------------------------------------------------


def _there_and_back(bench: Bench, tool: Tool, kind: str, count: int) -> tuple[Run, Run]:
    options = ("--tcp-established",) if kind == "connections" else ()
    with bench.target("idle", kind, count) as target, bench.images() as folder:
        return tool.dump(target, folder, *options), tool.restore(target, folder, *options)


def cold(bench: Bench) -> list[Row]:
    """A new command each time, for a small process."""
    reference = "python3 -I -S"
    rows = [Row("dump, small process", "ms", 40.0, reference), Row("restore, small process", "ms", 50.0, reference)]
    for _ in range(15):
        for tool in bench.tools():

            def work(tool: Tool = tool) -> list[float]:
                return [run.wall_ms for run in _there_and_back(bench, tool, "none", 0)]

            bench.attempt(tool, rows, work)
        python = bench.machine.timed(bare_python()).wall_ms
        for row in rows:
            row.references.append(python)
    return rows


def _memory(bench: Bench, kind: str, rounds: int, megabytes: int = 1024) -> list[Row]:
    what = f"{megabytes} MB" + (" of huge pages" if kind == "huge" else "")
    times = [Row(f"{way}, {what}", "ms", None, "cp") for way in ("dump", "restore")]
    peaks = [Row(f"peak memory, {way}, {what}", "MB", PEAK_LIMIT) for way in ("dump", "restore")]
    copier = shutil.which("cp") or "/bin/cp"
    for _ in range(rounds):
        copied: list[float] = []
        for tool in bench.tools():

            def work(tool: Tool = tool, copied: list[float] = copied) -> list[float]:
                with bench.target("idle", kind, megabytes) as target, bench.images() as folder:
                    runs = [tool.dump(target, folder), tool.restore(target, folder)]
                    if tool is bench.own:
                        copy = [copier, str(folder / "pages-1.img"), str(folder / "copy")]
                        copied.append(bench.machine.timed(copy).wall_ms)
                    return [run.wall_ms for run in runs] + [run.peak_mb for run in runs]

            bench.attempt(tool, times + peaks, work)
        for row in times:
            row.references += copied
    return times + peaks


def memory(bench: Bench) -> list[Row]:
    """1 GB of touched memory in pages of 4 KB."""
    return _memory(bench, "memory", 5)


def huge(bench: Bench) -> list[Row]:
    """1 GB of touched memory in huge pages."""
    return _memory(bench, "huge", 5)


def _scale(bench: Bench, kind: str, count: int, rounds: int = 3, limit: float = SCALE_LIMIT) -> list[Row]:
    half = f"{count // 2:,} {kind}"
    rows = [Row(f"{what}, {count:,} {kind}", "ms", limit, half, SCALE_RATIO) for what in ("dump", "restore")]
    for _ in range(rounds):
        for tool in bench.tools():

            def work(tool: Tool = tool) -> list[float]:
                return [run.wall_ms for run in _there_and_back(bench, tool, kind, count)]

            bench.attempt(tool, rows, work)
        try:
            for row, run in zip(rows, _there_and_back(bench, bench.own, kind, count // 2), strict=True):
                row.references.append(run.wall_ms)
        except Failed as failed:
            for row in rows:
                row.failure = row.failure or str(failed)
    return rows


def _family(bench: Bench, tool: Tool, kind: str, count: int) -> list[float]:
    """Times of a dump and a restore in ms, size of the images in MB."""
    with bench.target("idle", kind, count) as target, bench.images() as folder:
        dump = tool.dump(target, folder)
        bench.machine.reap_orphans()
        size = sum(path.stat().st_size for path in folder.rglob("*.img"))
        restore = tool.restore(target, folder)
        target.end()
        bench.machine.reap_orphans()
        return [dump.wall_ms, restore.wall_ms, size / 1e6]


def family(bench: Bench) -> list[Row]:
    """Fifty children that share 64 MB with their parent, against one process with 64 MB."""
    what = f"{FAMILY} children, 64 MB shared"
    rows = [Row(f"{way}, {what}", "ms", None, "one process") for way in ("dump", "restore")]
    rows.append(Row(f"images, {what}", "MB", None, "one process", FAMILY_SIZE_RATIO))
    for _ in range(3):
        for tool in bench.tools():

            def work(tool: Tool = tool) -> list[float]:
                return _family(bench, tool, "family", FAMILY)

            bench.attempt(tool, rows, work)
        for row, value in zip(rows, _family(bench, bench.own, "memory", 64), strict=True):
            row.references.append(value)
    return rows


def threads(bench: Bench) -> list[Row]:
    """Many threads."""
    return _scale(bench, "threads", 1000)


def vmas(bench: Bench) -> list[Row]:
    """Many mappings."""
    return _scale(bench, "vmas", 10000)


def files(bench: Bench) -> list[Row]:
    """Many open files."""
    return _scale(bench, "files", 1000)


def processes(bench: Bench) -> list[Row]:
    """A tree of many processes, and how long it stands still, divided by their number."""
    count = 200
    row = Row(f"pause per process, {count} processes", "ms", EACH_LIMIT, f"{count // 2}", 1.5)
    kind = "processes"
    with bench.target("spin", kind, count) as target, bench.target("spin", kind, count // 2) as half:
        for _ in range(5):
            for tool in bench.tools():

                def work(tool: Tool = tool) -> list[float]:
                    return [_pause(bench, tool, target) / count]

                with _stopped(half):
                    bench.attempt(tool, [row], work)
            with _stopped(target):
                row.references.append(_pause(bench, bench.own, half) / (count // 2))
    return [row, *_scale(bench, "processes", count)]


def connections(bench: Bench) -> list[Row]:
    """Many TCP connections, and what each adds to the pause."""
    count = 1000
    row = Row("pause, for each of 1,000 connections", "ms", PAUSE_PER_CONNECTION)
    with bench.target("spin", "connections", count) as target, bench.target("spin") as bare:
        for _ in range(5):
            for tool in bench.tools():

                def work(tool: Tool = tool) -> list[float]:
                    with _stopped(target):
                        without = _pause(bench, tool, bare)
                    with _stopped(bare):
                        return [(_pause(bench, tool, target, "--tcp-established") - without) / count]

                bench.attempt(tool, [row], work)
    return [row, *_scale(bench, "connections", count, limit=CONNECTIONS_LIMIT)]


MEASURES: dict[str, Callable[[Bench], list[Row]]] = {
    measure.__name__: measure for measure in (
        pause, crowd, snapshot, cold, memory, huge, family, threads, vmas, files, processes, connections,
    )
}
