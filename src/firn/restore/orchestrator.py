"""The stages of a restore, one after the other.

load      the images are read and agree with each other
check     pids are free, capabilities suffice, cgroups are there; nothing has been made
open      every file that can be opened by name is open; nothing else has been made
birth     the root task exists as a stub with its old pid, under our trace, and dies with us
rebuild   its memory is as it was, around a scratch area of ours
join      its descriptors, directories, session are as they were
threads   all threads exist and are stopped inside the scratch area
state     signals, timers, limits, scheduling, credentials, seccomp are as they were
resume    the scratch area is gone, registers and masks are set; everything is let go at once

Until the end of *state* one failure block kills what was made; afterwards nothing can fail that could be undone.
"""

from __future__ import annotations

import _thread
import os
import time

from firn import faults
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.errors import FirnError, KernelError, RestoreError
from firn.host import features
from firn.images.store import ImageDir
from firn.resources import base, cgroups, cpu, creds
from firn.resources.files.reopen import Opener
from firn.resources.process import fit_limits, raise_own_limit
from firn.resources.threads import xstate
from firn.restore import birth
from firn.restore.clocks import TimeNamespace
from firn.restore.family import Family
from firn.restore.load import Checkpoint
from firn.scripts import run_scripts, write_pidfile
from firn.tracee.timelimit import DeathWatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any

    from firn.api import CpuinfoOptions, RestoreOptions
    from firn.log import Log
    from firn.resources.files.segments import RestoredSegments
    from firn.resources.network.lock import Lock
    from firn.restore.tasks import RestoredTask
    from firn.tracee.guard import Guard


_CPU_IMAGE = 8
"""The bit of --cpu-cap that asks for cpuinfo.img."""
_DYING_S = 0.2
_FINISH = b"finish"
"""What a guard is told when it is decided that the tree shall live."""


class Result:
    """What a restore hands back: see :class:`firn.api.RestoreResult`."""

    __slots__ = ("exit_status", "root_pid", "stats")

    def __init__(self, root_pid: int, exit_status: int | None, stats: dict[str, int]) -> None:
        self.root_pid = root_pid
        self.exit_status = exit_status
        self.stats = stats


class Restore:
    """One restore in progress."""

    def __init__(self, options: RestoreOptions, log: Log) -> None:
        self.options = options
        self.log = log
        self.opener: Opener | None = None
        self.family: Family | None = None
        self.segments: RestoredSegments | None = None
        self.born = False
        self.first = 0
        self.lock: Lock | None = None
        self.guard: Guard | None = None
        self.watch = DeathWatch(self._followers, self._missed)
        self.frail = False
        """The tree needs every process of it to come back."""
        self.stats = {"pages_compared": 0, "pages_skipped_cow": 0}

    def stage(self, name: str) -> None:
        """Go through the stage called *name*."""
        with self.log.step(name):
            faults.point(f"restore.{name}")
            getattr(self, name)()
            faults.point(f"restore.{name}.done")

    def _followers(self) -> list[int]:
        """The ids of all threads that are no leaders."""
        return [tid for process in self.checkpoint.processes for tid in process.tids[1:]]

    def _family(self) -> Family:
        assert self.family is not None
        return self.family

    # -- stages ------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the images."""
        self.images = ImageDir.open(self.options.images_dir)
        self.checkpoint = Checkpoint(self.images)

    def check(self) -> None:
        """Refuse what cannot come back here."""
        checkpoint, root = self.checkpoint, self.checkpoint.root
        if self.options.cpu_cap & _CPU_IMAGE:
            cpu.check(self.images, self.options.cpu_cap)
        if checkpoint.inventory.get("tcp_close") and not self.options.tcp_close:
            raise RestoreError("connections were dumped to come back closed", "Need to set the --tcp-close options.")
        if self.options.remap_ip:
            from firn.resources.sockets import remap

            remap.apply(checkpoint.files, self.options.remap_ip)
        birth.check_pids([*checkpoint.tids(), *checkpoint.helpers()])
        last, own = features.cap_last_cap(), features.effective_caps()
        living = [process for process in checkpoint.processes if not process.zombie]
        for process in living:
            fit_limits(process.pid, process.tc, self.log)
            for tid, core in zip(process.tids, process.cores, strict=True):
                creds.check(core["thread_core"]["creds"], own, last)
                xstate.check(tid, core["thread_info"], not self.options.cpu_cap & cpu.FPU, self.log)
        if root.sid != root.pid and root.sid and not self.options.shell_job:
            raise RestoreError(
                f"process {root.pid} belongs to session {root.sid} of another process", "use --shell-job (-j)"
            )
        mode = self.options.manage_cgroups
        self.moves = {
            process.pid: cgroups.plan(self.images, _cgroups_of(process.cores[0]), mode) for process in living
        }
        self.thread_moves = {
            tid: cgroups.plan(
                self.images, _cgroups_of(core, process.cores[0]), mode, _cgroups_of(process.cores[0])
            )
            for process in living
            for tid, core in zip(process.tids[1:], process.cores[1:], strict=True)
        }

    def open(self) -> None:
        """Lock connections, open all files."""
        checkpoint = self.checkpoint
        if not self.options.exec_cmd:  # which would inherit it
            raise_own_limit()
        self._lock()
        self.opener = Opener(
            self.images, checkpoint.files, checkpoint.remaps, checkpoint.memfds,
            [process.pid for process in checkpoint.processes], self.options, self.log.warn,
            birth.stand_in,
        )  # fmt: skip
        self.family = Family(checkpoint, self.opener, self.options)
        try:
            self.family.open_files()
            self.opener.remove_temporary()
        finally:
            self._end_stand_ins(self.family.dead_processes())
        if checkpoint.segments:
            from firn.resources.files.segments import RestoredSegments

            self.segments = RestoredSegments(self.images)
            self.segments.prepare(list(checkpoint.segments.values()))

    def _end_stand_ins(self, kept: Collection[int] = ()) -> None:
        """End those who stand in for dead processes, but those that are *kept*."""
        assert self.opener is not None
        ended = [self.opener.stand_ins.pop(pid) for pid in list(self.opener.stand_ins) if pid not in kept]
        birth.kill(ended)

    def _lock(self) -> None:
        """Where the dump's lock is not, on another machine, peers must not learn either that the sockets are new."""
        inventory, files = self.checkpoint.inventory, self.checkpoint.files
        if not any(kind == base.INETSK for kind, _ in files):
            return
        from firn.host.sockdiag import destroy_orphans
        from firn.resources.network import lock
        from firn.resources.sockets.connections import connections, listens

        found = connections(files) if self.options.tcp_established and not self.options.tcp_close else []
        method = inventory.get("network_lock_method", lock.IPTABLES)
        # The dump's lock is also one against refusing new clients, and goes with whatever is restored.
        if (found or listens(files)) and method != lock.SKIP:
            self.lock = lock.for_restore(inventory.get("dump_criu_run_id", ""), self.options.images_dir, method)
            try:
                self.lock.add(found)
                # A dump that was killed when the tree was just dead leaves sockets that want to say goodbye.
                destroy_orphans(found)
            except (KernelError, OSError) as error:
                why = error.message if isinstance(error, KernelError) else error
                self.log.warn(f"{why}; the peers of connections may see the restore")

    def birth(self) -> None:
        """Make the root task."""
        started = time.monotonic_ns()
        with TimeNamespace(self.checkpoint.clocks(), self.log):
            self.born = self.frail = True
            self.watch.start()
            birth.spawn(self.checkpoint.root.pid, self.options.restore_sibling, self._must_be_orphan())
        self.first = self.checkpoint.root.pid
        self.stats["forking_time"] = (time.monotonic_ns() - started) // 1000

    def _must_be_orphan(self) -> bool:
        """Whether the root shall be told of its parent's death: not of ours, if we end at once."""
        if not self.options.restore_detached or self.options.restore_sibling:
            return False
        return any(core["thread_core"].get("pdeath_sig") for core in self.checkpoint.root.cores)

    def rebuild(self) -> None:
        """Memory, and with it all other processes, which are cloned by their parents."""
        self._family().grow()
        for pid, moves in self.moves.items():
            cgroups.move(pid, moves, self.log)
        self.stats["pages_restored"] = self._family().pages()

    def join(self) -> None:
        """Process groups, zombies, directories, descriptors."""
        family = self._family()
        family.join_groups()
        family.end_zombies(self.log)
        family.report_continued()
        for task in family.tasks:
            task.enter(self.log)
        self._end_stand_ins(family.dead_processes(threads_only=True))
        for task in family.tasks:
            task.join()

    def threads(self) -> None:
        """All other threads; what needs them or all descriptors."""
        for task in self._family().tasks:
            task.make_threads()
        self._end_stand_ins()
        for tid, moves in self.thread_moves.items():
            cgroups.move(tid, moves, self.log, thread=True)
        for task in self._family().tasks:
            task.install_late()
        for task in self._family().tasks:
            task.finish_descriptors()
        assert self.opener is not None
        self.opener.complete()
        if self.images.exists("FILE_LOCKS"):
            from firn.resources.files import locks

            tasks = {task.pid: (task.leader.program, task.descriptors) for task in self._family().tasks}
            locks.restore(self.images, self.opener, tasks)
        for task in self._family().tasks:
            if task.process.leader_exited:
                task.end_leader()

    def state(self) -> None:
        """The rest."""
        for task in self._family().tasks:
            task.set_state(self.checkpoint.filters)

    def finish(self) -> None:
        """What has to succeed before the tree runs."""
        assert self.opener is not None
        if self.options.pidfile:
            write_pidfile(os.path.join(self.options.work_dir, self.options.pidfile), self.checkpoint.root.pid)
        if self.options.log_pid and self.options.log_file not in ("", "-"):
            for task in self._family().tasks:
                self._log_task(task)
        self.opener.succeeded()
        if self.segments is not None:
            self.segments.finish()

    def _log_task(self, task: RestoredTask) -> None:
        """One file for each task, as callers of CRIU expect. The tasks themselves have nothing to say."""
        path = os.path.join(self.options.work_dir, f"{self.options.log_file}.{task.pid}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            text = f"{task.pid:6}: restored with {len(task.threads)} threads, {len(task.descriptors)} descriptors\n"
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def resume(self) -> None:
        """Let the tree go, children first: a parent that runs finds all of them."""
        tasks = self._family().tasks
        self._family().make_ready()
        self.frail = False
        self._set_guard()
        faults.point("restore.resume.ready")
        for task in tasks:
            task.outlive_us()
        faults.point("restore.resume.outlived")
        if self.guard is not None:
            self.guard.note(_FINISH)
        faults.point("restore.resume.decided")
        if self.lock is not None:
            self.lock.open()
        faults.point("restore.resume.unlocked")
        if self.segments is not None:
            self.segments.succeeded()
            self.segments.close()
        assert self.opener is not None
        self.opener.resume()
        faults.point("restore.resume.living")
        self._dismiss_guard()
        # Ours go first: else a task could miss that the other end of a pipe or socket is closed.
        self.opener.close()
        self.opener.inherited.done()
        for task in reversed(tasks):
            task.let_go(self.options.leave_stopped)
        self.born = False

    def _set_guard(self) -> None:
        """From here on connections begin to live: if we are killed before all do and the tree has them, a guard sees to
        that; or until this is decided, that nothing is left of the tree."""
        assert self.opener is not None
        quiet = self.opener.quiet()
        if not quiet:
            return
        from firn.tracee.guard import Guard

        tracer = _thread.get_native_id()
        keep = [*quiet, *(self.lock.descriptors() if self.lock is not None else ())]
        self.guard = Guard(lambda text, _: self._stand_in(text, tracer), keep)
        if not self.guard.start():
            self.log.warn("nobody can guard us: killed in the next moment, firn would lose the connections")

    def _stand_in(self, text: bytes, tracer: int) -> None:
        """The duty of a guard: *tracer* was killed; finish, or undo, what it has begun. The tree was made ready to run
        on by itself, which it does as soon as we return."""
        if not text.startswith(_FINISH):
            birth.strike((process.pid for process in self.checkpoint.processes), tracer)
            return
        if self.options.leave_stopped:
            for task in self._family().tasks:
                os.kill(task.pid, sig.SIGSTOP)
        if self.lock is not None:
            self.lock.open()
        assert self.opener is not None
        self.opener.resume(again=True)

    def _dismiss_guard(self) -> None:
        if self.guard is not None:
            self.guard.end()
            self.guard = None

    def ended(self) -> int:
        """A process that was born and has ended already; 0 if there is none. One that was killed takes a moment to end,
        in which it is in no stop."""
        limit = time.monotonic() + _DYING_S
        while True:
            states = self._states()
            ended = [pid for pid, state in states.items() if state in "ZX"]
            if ended or time.monotonic() > limit or all(state == "t" for state in states.values()):
                return ended[0] if ended else 0
            time.sleep(0.001)

    def _missed(self) -> int:
        return next((pid for pid, state in self._states().items() if state in "ZX"), 0) if self.frail else 0

    def _states(self) -> dict[int, str]:
        """The states (as in proc(5)) of all processes that were born and shall live."""
        there = {self.first, *self.family.stubs} if self.family is not None else set()
        tasks = self.family.tasks if self.family is not None else []
        return {task.pid: task.process_state() for task in tasks if task.pid in there}

    def undo(self) -> None:
        """Kill what was made."""
        if self.born:
            helpers = self.family.helpers() if self.family is not None else []
            birth.kill([*(process.tids for process in self.checkpoint.processes), *([pid] for pid in helpers)])

    def close(self) -> None:
        """Close what was opened."""
        self.watch.stop()
        self._dismiss_guard()
        if self.family is not None:
            self.family.close()
        if self.opener is not None:
            self._end_stand_ins()
            self.opener.close()
        if self.segments is not None:
            self.segments.close()
        if self.lock is not None:
            self.lock.close()


def _cgroups_of(core: dict[str, Any], leader: dict[str, Any] | None = None) -> int:
    """The number of the set of control groups that a thread is in: the *leader*'s, if the image does not tell."""
    number: int = core["thread_core"].get("cg_set", 0)
    return _cgroups_of(leader) if not number and leader is not None else max(number, cgroups.ROOT_SET)


def restore(options: RestoreOptions, log: Log, done: Callable[[Result], None] | None = None) -> Result:
    """Restore the checkpoint in ``options.images_dir``. Raises FirnError or OSError; then nothing is left of it.

    *done* is called when the tree runs, before a restore that is not detached waits for it.
    """
    started = time.monotonic_ns()
    work = Restore(options, log)
    try:
        _scripts(work, "pre-restore", 0)
        for name in ("load", "check", "open", "birth", "rebuild", "join", "threads", "state"):
            work.stage(name)
        pid = work.checkpoint.root.pid
        _scripts(work, "post-restore", pid)
        work.stage("finish")
        _scripts(work, "pre-resume", pid)
        work.stage("resume")
    except BaseException as error:
        work.frail = False
        ended = work.ended()
        work.undo()
        if ended and isinstance(error, FirnError | OSError):
            raise RestoreError(f"process {ended} was killed by somebody else while it was being restored") from error
        raise
    finally:
        work.close()
    _scripts(work, "post-resume", pid)
    work.stats["restore_time"] = (time.monotonic_ns() - started) // 1000
    _save_stats(work)
    result = Result(pid, None, work.stats)
    if done is not None:
        done(result)
    if not options.restore_detached and not options.exec_cmd:
        if options.foreground_status:
            result.exit_status = wait(pid)
        else:
            wait_for_all()
    return result


def _scripts(work: Restore, action: str, pid: int) -> None:
    if work.options.action_script:
        run_scripts(work.options, action, pid, work.options.images_dir_fd, work.log)


def _save_stats(work: Restore) -> None:
    try:
        target = ImageDir.open(work.options.work_dir, create_files=True)
        target.write_one(
            "STATS_RESTORE", {"restore": {key: min(value, 0xFFFFFFFF) for key, value in work.stats.items()}}
        )
    except (OSError, FirnError) as error:
        work.log.warn(f"stats-restore cannot be written: {error}")


def check_processor(options: CpuinfoOptions) -> None:
    """Compare cpuinfo.img with this processor; nothing to compare means everything."""
    images = ImageDir.open(options.images_dir)
    try:
        cpu.check(images, options.cpu_cap & ~_CPU_IMAGE or cpu.FPU | cpu.CPU | cpu.INS)
    finally:
        images.close()


def wait(pid: int) -> int:
    """Wait for the restored task; its exit status the shell's way. SIGTERM, SIGINT and SIGHUP are passed on to it."""
    import _signal

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in (sig.SIGTERM, sig.SIGINT, sig.SIGHUP):
        _signal.signal(number, forward)
    _, status = os.waitpid(pid, 0)
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8


def wait_for_all() -> None:
    """Wait as CRIU does: until no child is left, and whatever signals come; only SIGKILL ends it."""
    import _signal

    _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals() - {sig.SIGCHLD})
    while True:
        try:
            os.waitpid(-1, pt.WALL)
        except ChildProcessError:
            return
