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
Once the first process is killed the checkpoint is all there is of the tree, and nothing takes it away again.
"""

from __future__ import annotations

import _signal
import os
import time

from firn import faults
from firn.abi import nr
from firn.abi import signal as sig
from firn.abi.cpuid import xsave_layout
from firn.abi.libc import syscall
from firn.dump.collect import Collected, Sharing, collect, look_at_sharing
from firn.dump.early import EarlyMaps
from firn.dump.save import save_contents, save_files, save_records
from firn.dump.tree import FrozenTree, await_vforks, find_vforks, freeze, vfork_error, walk
from firn.errors import FirnError, Obstacle, Refused, TargetError, UsageError
from firn.host import features, procfs
from firn.images.store import ImageDir
from firn.resources import base, cgroups, cpu, keyrings, policies, process, restart, semaphores
from firn.resources.memory import aio, areas
from firn.resources.memory.pages import ProcessPages
from firn.tracee import seize
from firn.tracee.timelimit import DeathWatch, TimeLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.api import CpuinfoOptions, DumpOptions
    from firn.dump.snapshot import Snapshot
    from firn.dump.task import CollectedTask
    from firn.host.undolists import UndoLists
    from firn.log import Log
    from firn.resources.memory.shared import SharedPages
    from firn.resources.network.lock import Lock
    from firn.resources.sockets.backlog import Backlogs
    from firn.resources.sockets.rings import Places
    from firn.tracee.freezer import Freezer
    from firn.tracee.guard import Guard


_PAGES = "pages-{}.img"
_MOST_EARLY_FILES = 256
_CPU_IMAGE = 8
"""The bit of --cpu-cap that asks for cpuinfo.img."""
_END = b"end"
"""What the guard is told when the tree is about to end."""
_VFORK_PATIENCE = 3.0
"""Seconds that a process gets to execute a program after vfork(2)."""
_MOMENTS = (0.002, 0.01, 0.03, 0.1, 0.2, 0.0)
"""Seconds that the target gets to do away with what passes by itself, one after the other; 0 ends it."""
_ENDING = (sig.SIGHUP, sig.SIGINT, sig.SIGTERM)
"""What ends a command. It has to wait while the tree is killed."""


class Dump:
    """One dump in progress; the attributes are filled phase by phase."""

    def __init__(self, options: DumpOptions, log: Log) -> None:
        self.options = options
        self.log = log
        self.pid: int = options.tree
        self.images = ImageDir.open(options.images_dir, create_files=True)
        self.obstacles: list[Obstacle] = []
        self.waiting: dict[int, restart.Waiting] = {}
        self.partners = policies.Partners()
        self.early_maps: dict[int, EarlyMaps] = {}
        self.early_sharing: Sharing = {}
        self.thread_groups: dict[int, cgroups.Cgroups] = {}
        self.tree = FrozenTree()
        self.watch = DeathWatch(lambda: self.tree.followers())
        self.collected: Collected | None = None
        self.take_snapshots: Callable[[list[tuple[seize.Task, int]]], list[Snapshot]] | None = None
        self.snapshots: list[Snapshot] = []
        self.find_shared: Callable[[list[tuple[ProcessPages, int]]], SharedPages] | None = None
        self.shared: SharedPages | None = None
        self.stats: dict[str, int] = {"memdump_time": 0, "memwrite_time": 0}
        self.pages_files: dict[int, int] = {}
        """Pages images that are open and still empty, by number."""
        self.freezer: Freezer | None = None
        self.pidfd = -1
        self.frozen_at = 0
        self.run_id = _run_id()
        self.with_requests = False
        self.requests: aio.Watch | None = None
        self.undo_lists: UndoLists | None = None
        self.ring_places: Places | None = None
        self.with_keyrings = keyrings.can_exist()
        self.lock: Lock | None = None
        self.backlogs: Backlogs | None = None
        self.guard: Guard | None = None
        self.doomed = False
        """The tree is being killed: there is no way back."""

    def phase(self, name: str) -> None:
        """Go through the phase called *name*."""
        with self.log.step(name):
            faults.point(f"dump.{name}")
            getattr(self, name)()
            faults.point(f"dump.{name}.done")

    def look(self) -> None:
        """The phases up to *collect*; once more, a moment later, if nothing stands against the dump but what passes by
        itself, as a connection does that waits to be accepted."""
        for moment in _MOMENTS:
            try:
                for name in ("observe", "freeze", "collect"):
                    self.phase(name)
                return
            except Refused as refused:
                if not moment or self.freezer is not None or not all(one.passing for one in refused.obstacles):
                    raise
                self.log.info(f"the tree runs on for {moment * 1000:g} ms: {refused.obstacles[0]}")
                self._start_over()
                if self.backlogs is None or not self.backlogs.relent(self._make_lock()):
                    time.sleep(moment)

    def _start_over(self) -> None:
        """Back to before *observe*; the target runs."""
        try:
            self._unlock()
        finally:
            self.tree.release()
        self.watch.stop()
        if self.collected is not None:
            self.collected.finder.undo()
            self.collected.close()
            self.collected = None
        if self.lock is not None:
            self.lock.close()
            self.lock = None
        os.close(self.pidfd)
        self.pidfd = -1
        self.obstacles.clear()
        self.waiting, self.early_maps, self.thread_groups = {}, {}, {}

    # -- phases ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that can be done before the target is disturbed."""
        seize.check_target(self.pid)
        if self.options.freeze_cgroup:
            from firn.tracee.freezer import Freezer

            self.freezer = Freezer(self.options.freeze_cgroup)
            if self.freezer.was_frozen and self.options.fork_snapshot:
                raise UsageError("--fork-snapshot needs a control group that is not frozen: the copies are in it")
        features.pagemap_scan()
        xsave_layout()
        self.images.clear_old()
        process.raise_own_limit()
        if self.options.fork_snapshot:
            from firn.dump.snapshot import take_all

            self.take_snapshots = take_all
        if self.options.tcp_established and not self.options.tcp_close:
            from firn.resources.sockets.backlog import Backlogs

            self.backlogs = Backlogs(self._make_lock(), self.log.warn)
            if self.freezer is not None:  # then there is only one look
                self.backlogs.prepare()

    def _make_lock(self) -> Lock:
        from firn.resources.network import lock

        self.lock = lock.for_dump(self.options.network_lock, self.run_id, self.pid, self.options.images_dir)
        return self.lock

    def _make_pages_files(self, count: int) -> None:
        """Some file systems take long to make a file, so it is not done while the target stands still."""
        for number in range(len(self.pages_files) + 1, min(count, _MOST_EARLY_FILES) + 1):
            self.pages_files[number] = self._pages_file(number)

    def _keep_pages_files(self, wanted: set[int]) -> None:
        """The tree may have become smaller, and images of other things have the next numbers."""
        for number in sorted(self.pages_files.keys() - wanted):
            os.close(self.pages_files.pop(number))
            self.images.remove(_PAGES.format(number))

    def _pages_file(self, number: int) -> int:
        return self.images.open_raw(_PAGES.format(number), os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def observe(self) -> None:
        """Look at the running tree: which kinds of files it has open, where its threads wait, and its mappings if it
        shall not be stopped for that."""
        self.pidfd = syscall(f"pidfd_open {self.pid}", nr.pidfd_open, self.pid, 0)
        tree = list(walk(self.pid))
        self._make_pages_files(len(tree))
        if len(tree) > 1:
            self._look_for_shared()
            await_vforks(self.pid, min(self.options.timeout or _VFORK_PATIENCE, _VFORK_PATIENCE))
        speakers, tids = [], list[int]()
        kinds: set[int] = set()
        for pid in tree:
            try:
                speaker = procfs.speaker(pid)
                kinds |= base.preload(speaker)
                self.waiting |= restart.observe(pid)
                self.thread_groups |= cgroups.observe(pid)
                self.partners.of(procfs.status(speaker))
                if not self.with_requests and aio.is_used(speaker):
                    self.with_requests, self.requests = True, aio.Watch.make(self.log.warn)
                if self.options.leave_running:
                    self.early_maps[pid] = EarlyMaps(pid, speaker)
                tids += procfs.threads(pid)
                speakers.append(speaker)
            except (FileNotFoundError, ProcessLookupError):
                continue
        self.early_sharing = look_at_sharing(speakers)
        if self.undo_lists is None:
            self.undo_lists = semaphores.sight(tids)
        if base.PACKETSK in kinds and self.ring_places is None:
            from firn.resources.sockets import rings

            self.ring_places = rings.sight()
        if base.INETSK in kinds and self.lock is not None and self.guard is None:
            self._set_guard()

    def _set_guard(self) -> None:
        from firn.tracee.guard import Guard

        self.guard = Guard(self._stand_in)
        if not self.guard.start():
            self.log.warn("nobody can guard us: killed while it reads a connection, firn would leave that dumb")

    def _stand_in(self, text: bytes, pidfd: int) -> None:
        """The duty of the guard: we were killed. The tree runs on as it was, unless its end was decided."""
        if text.startswith(_END):
            return
        from firn.resources.sockets.repair import mend

        try:
            mend(text, pidfd)
        finally:
            assert self.lock is not None
            self.lock.forget()

    def _look_for_shared(self) -> None:
        from firn.resources.memory import frames, shared

        if frames.are_visible():
            self.find_shared = shared.SharedPages
        else:
            self.log.warn("page frame numbers are hidden from us: shared memory is stored once for each process")

    def freeze(self) -> None:
        """Stop every thread of every process."""
        self.log.info(f"freezing the tree of process {self.pid}")
        started = time.monotonic_ns()
        try:
            with TimeLimit(self.options.timeout, f"freezing the tree of process {self.pid}"):
                held = self.freezer.hold(self.options.timeout) if self.freezer is not None else set()
                self.tree = freeze(self.pid, held)
                if self.freezer is not None:
                    for pid in self.freezer.take_strangers(self.tree.pids(), held):
                        self.log.warn(f"Unexpected process {pid} in the freezer cgroup: it is stopped during the dump")
        except TargetError as error:
            raise vfork_error(find_vforks(self.pid)) or error from None
        self.watch.start()
        self.frozen_at = time.monotonic_ns()
        self.stats["freezing_time"] = (self.frozen_at - started) // 1000
        if not seize.same_process(self.pid, self.pidfd):
            raise TargetError(f"process {self.pid} ended and its pid was taken by another one")
        self.log.info(f"froze {len(self.tree.tasks)} processes, {self.tree.threads()} threads")

    def collect(self) -> None:
        """Read all state; raise :class:`Refused` with everything that cannot be saved."""
        self.collected = collect(self)
        if self.obstacles:
            raise Refused(self.obstacles)

    def contents(self) -> None:
        """Copy pages and file contents, or make copy-on-write clones to copy the pages from later."""
        assert self.collected is not None
        self._keep_pages_files({number for number, mine in enumerate(self.collected.tasks, 1) if mine.sharer is None})
        save_contents(self.images, self.collected)
        for number, mine in enumerate(self.collected.tasks, 1):
            mine.memory.pages_id = number
            if mine.sharer is not None:
                mine.memory.pages_id = mine.sharer.memory.pages_id
                continue
            mine.memory.find(mine.task.voice, early=True)
            if self.take_snapshots is not None:
                mine.memory.hold_early(mine.task.voice)
        if self.take_snapshots is not None:
            self.snapshots = self.take_snapshots([(mine.task, mine.trace_options()) for mine in self._owners()])
        else:
            self._copy_pages([(mine.memory, mine.task.voice) for mine in self._owners()])

    def _owners(self) -> list[CollectedTask]:
        """The processes with a memory of their own; of those who share one, the first."""
        assert self.collected is not None
        return [mine for mine in self.collected.tasks if mine.sharer is None]

    def _copy_pages(self, members: list[tuple[ProcessPages, int]]) -> None:
        """Copy the pages of processes out of themselves or their clones."""
        started = time.monotonic_ns()
        for pages, pid in members:
            pages.find(pid, early=False)
        if self.find_shared is not None:
            self.shared = self.find_shared(members)
            self.shared.copy(self.images)
        for pages, pid in members:
            target = self.pages_files.pop(pages.pages_id, -1)
            if target < 0:
                target = self._pages_file(pages.pages_id)
            try:
                pages.copy_pages(pid, target)
            finally:
                os.close(target)
        self.stats["memdump_time"] += (time.monotonic_ns() - started) // 1000
        self.stats["memwrite_time"] = self.stats["memdump_time"]

    def release(self) -> None:
        """Let the target run on."""
        self._take_clients(stays=True)
        self._unlock()
        self._release_tree()
        self._thawed()

    def _take_clients(self, stays: bool) -> None:
        """Save the connections that wait to be accepted, once. The last thing that is done to a target that ends: what
        follows takes no time, for firn must not be killed before it is decided."""
        if self.backlogs is not None:
            self.backlogs.take(stays)
            faults.point("dump.clients")

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.open()

    def _release_tree(self) -> None:
        """Let the tree go, and what its control group holds besides."""
        if self.freezer is None:
            self.tree.release()
            return
        try:
            if self.freezer.was_frozen and self._can_freeze():
                self.freezer.freeze_again()
            self.tree.release()
        finally:
            self.freezer.let_go()
            self.freezer.freeze_again()

    def _can_freeze(self) -> bool:
        """Whether no task needs to run for us any more."""
        try:
            for task in self.tree.tasks:
                task.restore_state()
        except (OSError, FirnError):
            return False  # what it was is told when it is released
        return True

    def _thawed(self) -> None:
        self.stats["frozen_time"] = (time.monotonic_ns() - self.frozen_at) // 1000

    def save(self) -> None:
        """Write all records."""
        assert self.collected is not None
        pairs = list(zip(self._owners(), self.snapshots, strict=False))
        if pairs:
            self._copy_pages([(mine.memory, snapshot.pid) for mine, snapshot in pairs])
        for mine, snapshot in pairs:
            areas.refresh_flags(mine.areas, procfs.smaps(snapshot.pid))
            snapshot.end()
        if self.shared is not None:
            self.shared.save()
            if self.shared.complete:
                self.collected.inventory["firn"]["cow_known"] = True
        save_records(self.images, self.collected, self.log)
        if self.options.cpu_cap & _CPU_IMAGE:
            cpu.save(self.images)
        self._take_clients(self.options.leave_running or self.options.leave_stopped)
        save_files(self.images, self.collected)

    def commit(self) -> None:
        """Make the directory a checkpoint."""
        assert self.collected is not None
        self.collected.inventory["firn"]["images"] = self.images.created()
        self.images.commit(self.collected.inventory)

    def end(self) -> None:
        """Put a target that was still frozen into its final state."""
        if not self.tree.tasks:
            return
        if self.options.leave_running and not self.options.leave_stopped:
            self.release()
            return
        if self.lock is not None:
            self._keep_lock(self.lock)
        if self.options.leave_stopped:
            self._leave_stopped()
            return
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _ENDING)
        try:
            self._kill()
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)

    def _kill(self) -> None:
        """End the tree. What goes wrong then is told and passed over: the checkpoint is there, and good."""
        assert self.collected is not None
        self.doomed = True
        steps = [self.tree.kill]
        if self.backlogs is not None:
            steps.append(self.backlogs.vanish)
        steps.append(self.collected.collector.killed)
        if self.freezer is not None:
            steps.append(self.freezer.let_go)
        for step in steps:
            try:
                step()
                faults.point(f"dump.end.{step.__name__}")
            except (OSError, FirnError) as error:
                self.log.warn(f"the checkpoint is complete, but at the end of the tree: {error}")
        self._thawed()

    def _keep_lock(self, lock: Lock) -> None:
        """What is locked stays so. Killed before the tree is, we would leave one that nobody hears, but for the guard,
        who is told last."""
        lock.keep()
        faults.point("dump.end.locked")
        if self.guard is not None:
            self.guard.note(_END)

    def _leave_stopped(self) -> None:
        """The connections stay locked, as CRIU's do: else their peers would get on with what is in no image."""
        self.tree.stop()
        self._release_tree()
        self._thawed()
        if self.lock is not None and self.lock.used:
            self.log.warn("connections stay locked; if the tree shall go on instead of being restored: firn unlock")

    def undo(self) -> None:
        """After a failure: the target runs on as it was, and what was written is gone."""
        try:
            if self.backlogs is not None:
                self.backlogs.put_back()
            self._unlock()
        finally:
            self._undo_rest()

    def _undo_rest(self) -> None:
        try:
            self._release_tree()
        finally:
            for snapshot in self.snapshots:
                snapshot.end()
            if self.collected is not None:
                self.collected.finder.undo()
            self.images.revoke()

    def close(self) -> None:
        """Let go of what the dump held open."""
        if self.guard is not None:
            self.guard.end()
        self.watch.stop()
        self.partners.close()
        for view in self.requests, self.undo_lists, self.ring_places:
            if view is not None:
                view.close()
        if self.collected is not None:
            if self.options.leave_running:
                self.collected.finder.undo()
            self.collected.close()
        if self.backlogs is not None:
            self.backlogs.close()
        if self.lock is not None:
            self.lock.close()
        for fd in self.pages_files.values():
            os.close(fd)
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.images.close()


def run(options: DumpOptions, log: Log, post_dump: Any = None) -> dict[str, int]:
    """Dump the process tree ``options.tree``; the statistics (stats_entry.dump). *post_dump* is called with the pid
    when all images are written and the target still stands; it raises to call the dump off."""
    work = Dump(options, log)
    try:
        work.phase("prepare")
        work.look()
        work.phase("contents")
        if options.leave_running and not options.leave_stopped and post_dump is None:
            work.phase("release")
        work.phase("save")
        work.phase("commit")
        if post_dump is not None:
            post_dump(work.pid)
        work.phase("end")
    except BaseException:
        if not work.doomed:
            work.undo()
        raise
    finally:
        work.close()
    work.stats |= work.collected.statistics() if work.collected else {}
    _save_stats(work)
    return work.stats


def _save_stats(work: Dump) -> None:
    """Write stats-dump to the work directory; a failure is only reported, the checkpoint is there."""
    try:
        target = ImageDir.open(work.options.work_dir, create_files=True)
        limit = (1 << 32) - 1
        entry = {name: min(value, limit) if name.endswith("_time") else value for name, value in work.stats.items()}
        target.write_one("STATS_DUMP", {"dump": entry})
        target.close()
    except (OSError, FirnError) as error:
        work.log.warn(f"stats-dump cannot be written: {error}")


def dump(options: DumpOptions, log: Log, post_dump: Any = None) -> dict[str, int]:
    """The entry for :mod:`firn.api`."""
    return run(options, log, post_dump)


def save_processor(options: CpuinfoOptions) -> None:
    """Write cpuinfo.img and nothing else."""
    images = ImageDir.open(options.images_dir, create_files=True)
    try:
        cpu.save(images)
    finally:
        images.close()


def _run_id() -> str:
    """A name for this dump, of the form of a UUID: the restore finds the network lock by it."""
    raw = os.urandom(16).hex()
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"
