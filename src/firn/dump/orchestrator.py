"""The phases of a dump, one after the other.

prepare   options checked, image directory open, kernel abilities known, everything imported; the target runs on
observe   what is dear to read, or is gone once the target stops, has been looked at
freeze    every thread is stopped
collect   all state is in records of ours, every obstacle known; the target's memory holds a scratch area of ours
contents  pages and file contents are in the images
release   (target that runs on) the target is as it was and runs
save      the records are in the images
commit    inventory.img is there: the directory is a checkpoint
end       (target that does not run on) the target is dead or stopped

One failure block undoes: whatever happens before the end, the target runs on as it was and no half checkpoint stays.
"""

from __future__ import annotations

import os
import time

from firn import faults
from firn.abi import nr
from firn.abi import signal as sig
from firn.abi.cpuid import xsave_layout
from firn.abi.libc import syscall
from firn.dump.collect import Collected, collect
from firn.dump.save import save_contents, save_records
from firn.dump.snapshot import Snapshot
from firn.errors import Obstacle, Refused, TargetError
from firn.host import features, procfs
from firn.images.store import ImageDir
from firn.resources import base, restart
from firn.resources.memory import areas
from firn.tracee import seize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.api import DumpOptions
    from firn.log import Log


class Dump:
    """One dump in progress; the attributes are filled phase by phase."""

    def __init__(self, options: DumpOptions, log: Log) -> None:
        self.options = options
        self.log = log
        self.pid: int = options.tree
        self.images = ImageDir.open(options.images_dir, create_files=True)
        self.task: seize.Task | None = None
        self.collected: Collected | None = None
        self.snapshot: Snapshot | None = None
        self.committed = False
        self.stats: dict[str, int] = {}
        self.pages_fd = -1
        self.held: list[tuple[int, bytes]] = []

    def phase(self, name: str) -> None:
        """Go through the phase called *name*."""
        with self.log.step(name):
            faults.point(f"dump.{name}")
            getattr(self, name)()
            faults.point(f"dump.{name}.done")

    # -- phases ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that can be done before the target is disturbed."""
        seize.check_target(self.pid)
        features.pagemap_scan()
        xsave_layout()
        self.images.clear_old()
        self.pages_fd = self.images.open_raw("pages-1.img", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        _raise_fd_limit()

    def observe(self) -> None:
        """Look at the running target: where its threads wait, and its mappings if it shall not be stopped for that."""
        base.preload(self.pid)
        self.waiting = restart.observe(self.pid)
        self.early_maps = procfs.smaps(self.pid) if self.options.leave_running else None
        self.pidfd = syscall(f"pidfd_open {self.pid}", nr.pidfd_open, self.pid, 0)

    def freeze(self) -> None:
        """Stop every thread."""
        self.log.info(f"freezing process {self.pid}")
        started = time.monotonic_ns()
        self.task = seize.freeze(self.pid)
        self.frozen_at = time.monotonic_ns()
        self.stats["freezing_time"] = (self.frozen_at - started) // 1000
        if not seize.same_process(self.pid, self.pidfd):
            raise TargetError(f"process {self.pid} ended and its pid was taken by another one")
        self.log.info(f"froze {len(self.task.threads)} threads of process {self.pid}")

    def collect(self) -> None:
        """Read all state; raise :class:`Refused` with everything that cannot be saved."""
        assert self.task is not None
        obstacles: list[Obstacle] = []
        self.collected = collect(self, obstacles)
        if obstacles:
            raise Refused(obstacles)

    def contents(self) -> None:
        """Copy pages and file contents, or make a copy-on-write clone to copy the pages from later."""
        assert self.task is not None and self.collected is not None
        save_contents(self.images, self.collected)
        pages = self.collected.memory
        pages.find(self.pid, early=True)
        if self.options.fork_snapshot:
            self.held = pages.hold_early()
            self.snapshot = Snapshot.take(self.task)
        else:
            self._copy_pages(self.pid)

    def _copy_pages(self, pid: int) -> None:
        assert self.collected is not None
        started = time.monotonic_ns()
        pages = self.collected.memory
        pages.find(pid, early=False)
        pages.copy_pages(pid, self.pages_fd, self.held)
        self.stats["memdump_time"] = self.stats["memwrite_time"] = (time.monotonic_ns() - started) // 1000

    def release(self) -> None:
        """Let the target run on."""
        assert self.task is not None
        task, self.task = self.task, None
        task.release()
        self._thawed()

    def _thawed(self) -> None:
        self.stats["frozen_time"] = (time.monotonic_ns() - self.frozen_at) // 1000

    def save(self) -> None:
        """Write all records."""
        assert self.collected is not None
        if self.snapshot is not None:
            self._copy_pages(self.snapshot.pid)
            areas.refresh_flags(self.collected.areas, procfs.smaps(self.snapshot.pid))
            self.snapshot.end()
        save_records(self.images, self.collected, self.log)

    def commit(self) -> None:
        """Make the directory a checkpoint."""
        assert self.collected is not None
        self.images.commit(self.collected.inventory)
        self.committed = True

    def end(self) -> None:
        """Put a target that was still frozen into its final state."""
        if self.task is None:
            return
        if self.options.leave_running or self.options.leave_stopped:
            if self.options.leave_stopped:
                os.kill(self.pid, sig.SIGSTOP)
            self.release()
            return
        task, self.task = self.task, None
        task.kill()
        self._thawed()

    def undo(self) -> None:
        """After a failure: the target runs on as it was, and what was written is gone."""
        if self.snapshot is not None:
            self.snapshot.end()
        try:
            if self.task is not None:
                self.release()
        finally:
            if self.collected is not None:
                self.collected.finder.undo()
            self.images.abort()

    def close(self) -> None:
        """Let go of what the dump held open."""
        if self.collected is not None:
            if self.options.leave_running:
                self.collected.finder.undo()
            self.collected.close()
        if self.pages_fd >= 0:
            os.close(self.pages_fd)
            self.pages_fd = -1


def run(options: DumpOptions, log: Log, post_dump: Any = None) -> dict[str, int]:
    """Dump the process tree ``options.tree``; the statistics (stats_entry.dump). *post_dump* is called with the pid when
    all images are written and the target still stands; it raises to call the dump off."""
    work = Dump(options, log)
    try:
        for name in ("prepare", "observe", "freeze", "collect", "contents"):
            work.phase(name)
        if options.leave_running and not options.leave_stopped and post_dump is None:
            work.phase("release")
        work.phase("save")
        work.phase("commit")
        if post_dump is not None:
            post_dump(work.pid)
        work.phase("end")
    except BaseException:
        work.undo()
        raise
    finally:
        work.close()
    work.stats |= work.collected.statistics() if work.collected else {}
    return work.stats


def dump(options: DumpOptions, log: Log, post_dump: Any = None) -> dict[str, int]:
    """The entry for :mod:`firn.api`."""
    return run(options, log, post_dump)


def _raise_fd_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
