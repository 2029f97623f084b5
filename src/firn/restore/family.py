"""The tree of restored processes on its way back: births, sessions, process groups, zombies.

Who is born of whom is planned by :mod:`firn.resources.births`. A process is cloned when its forker's memory is
complete, so it takes over the pages that both have. Groups are joined when everybody lives: leaders first. A group
whose leader is gone is made by a helper with that pid, a session likewise; both end when the members of the groups have
joined. A zombie is a process that ends as it did, when everybody has joined.
"""

from __future__ import annotations

import errno
import os

from firn.abi import mman, nr, prctl, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import RestoreError
from firn.host import procfs
from firn.images.pages import PagesFiles
from firn.resources import births, keyrings, signals, stops
from firn.resources.memory import areas, layout
from firn.resources.memory.vdso import Own
from firn.resources.process import set_core_filter
from firn.restore import birth
from firn.restore.memory import SPARE, TaskMemory, plan_sharing
from firn.restore.tasks import LEADER_AREA, RestoredTask, Stub, await_birth, plan_clone
from firn.tracee import memory, ptrace
from firn.tracee.program import Runner, Scratch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.api import RestoreOptions
    from firn.log import Log
    from firn.resources.births import Birth, Member
    from firn.resources.files.reopen import Opener
    from firn.restore.load import Checkpoint, Process

_NONE = (1 << 64) - 1
_CORE = 0x80
"""The bit of a wait status that says that a core was written (WCOREFLAG)."""
_RLIMIT_CORE = 4
_CORE_LIMIT = 1 << 20


class Family:
    """All processes of a checkpoint on their way back; ``tasks`` are the living ones, parents first."""

    def __init__(self, checkpoint: Checkpoint, opener: Opener, options: RestoreOptions) -> None:
        self.checkpoint = checkpoint
        self.opener = opener
        self.options = options
        self.tasks: list[RestoredTask] = []
        self.stubs: dict[int, Stub] = {}
        self._helpers: dict[int, Stub] = {}
        self._pages_files = PagesFiles()
        self._memories: dict[int, TaskMemory] = {}
        self._plan_memories()
        longest = max((len(entry["filter"]) for entry in checkpoint.filters), default=0)
        for process in checkpoint.processes:
            if not process.zombie:
                self.tasks.append(RestoredTask(process, self._memories[process.ids["vm_id"]], opener, longest))
        self.by_pid = {task.pid: task for task in self.tasks}

    def _plan_memories(self) -> None:
        """One memory for each vm_id. Its images are those of the first process that has it, its source is the memory of
        who gives birth to the first of those who share it."""
        sizes = {}
        if self.checkpoint.segments:
            from firn.resources.files.segments import attached_size

            sizes = {shmid: attached_size(entry) for shmid, entry in self.checkpoint.segments.items()}
        first: dict[int, Process] = {}
        known = {process.pid: process for process in self.checkpoint.processes}
        for process in self.checkpoint.processes:
            if not process.zombie:
                first.setdefault(process.ids["vm_id"], process)
        for pid in self.checkpoint.plan.order():
            member = known.get(pid)
            if member is None or member.zombie or member.shared & sched.CLONE_VM:
                continue
            number, source = member.ids["vm_id"], self.checkpoint.plan.memory_of(pid)
            copied = self._memories[known[source].ids["vm_id"]] if source is not None else None
            self._memories[number] = TaskMemory(
                first[number], self.checkpoint.images, copied, sizes, self._pages_files
            )
        plan_sharing(list(self._memories.values()), self.checkpoint.knows_sharing())

    def open_files(self) -> None:
        """Open everything that does not have to wait for the tasks."""
        for task in self.tasks:
            for key in task.wanted():
                if not self.opener.is_late(*key[:2]):
                    self.opener.open(*key)

    def dead_processes(self, threads_only: bool = False) -> set[int]:
        """The pids of dead processes in whose folders of /proc there are processes or single threads of the checkpoint.
        Who stands in for them must be there until those have entered: it is asked for permission (proc_pid_permission).
        """
        places = [place for task in self.tasks for place in task.places()]
        if not threads_only:
            places += [place for task in self.tasks for place in (task.cwd, task.root)]
        found = {self.opener.dead_process(*place) for place in places} - {0}
        for pid in found.intersection([*self.checkpoint.tids(), *self.checkpoint.helpers()]):
            raise RestoreError(f"a process was in /proc/{pid} of a dead one, whose pid another one has now")
        return found

    def pages(self) -> int:
        """How many pages the images hold."""
        return sum(each.pages for each in self._memories.values())

    def close(self) -> None:
        """Close the page images."""
        self._pages_files.close()

    # -- birth and memory ----------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Rebuild the root's memory, have it clone whom it has to clone, and so on."""
        plan = self.checkpoint.plan
        self._adopt_root(self.checkpoint.root)
        keyrings.plan(self.stubs[self.checkpoint.root.pid].program, self.checkpoint.session_keyring())
        own = Own()
        for pid in plan.order():
            stub, task = self.stubs[pid], self.by_pid.get(pid)
            if task is not None and not task.process.shared & sched.CLONE_VM:
                task.memory.replace(stub.program, stub.scratch, self.opener, own)
            for each in plan.born_of(pid, late=False):
                self._bear(each)
            if plan.members[pid].leads:
                stub.program.call("setsid", nr.setsid)
                if task is not None:
                    self.opener.plan_session(stub.program, pid)
                stub.program.run()
            for each in plan.born_of(pid, late=True):
                self._bear(each)
        for mine in self._memories.values():
            mine.settle(self.stubs[mine.pid].program)
        self.opener.seal()

    def _adopt_root(self, root: Process) -> None:
        """Map the scratch area, at a place where no process of the tree has anything, and take over the root."""
        data = max(self._areas().values())
        taken = [
            (vma["start"], vma["end"])
            for task in self.tasks
            for vma in task.process.mm["vmas"]
            if not vma["status"] & areas.VSYSCALL
        ]
        taken += [(m.start, m.end) for m in procfs.maps(root.pid) if m.end < 1 << 47]
        code = layout.holes(sorted(taken), data + mman.PAGE + SPARE) + SPARE
        queues = [task.tc.get("signals_s") for task in self.tasks]
        queues += [thread.core.get("signals_p") for task in self.tasks for thread in task.threads]
        runner = Runner(root.pid, root.pid, ptrace.get_regs(root.pid), signals.free_stop_signal(queues))
        ptrace.set_sigmask(root.pid, runner.mask())
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE
        single = runner.single
        single(birth.SYSCALL_SITE, nr.mmap, code, mman.PAGE, mman.PROT_READ | mman.PROT_EXEC, flags, _NONE, 0)
        single(birth.SYSCALL_SITE, nr.mmap, code + mman.PAGE, data, mman.PROT_READ | mman.PROT_WRITE, flags, _NONE, 0)
        scratch = Scratch(root.pid, code, code + mman.PAGE, data)
        memory.force_write(root.pid, code, cpu.INTERPRETER)
        self._settle(root.pid, Stub(root.pid, runner, scratch))

    def _areas(self) -> dict[int, int]:
        """How many bytes the programs of all threads of a memory (vm_id) need."""
        sizes: dict[int, int] = {}
        for task in self.tasks:
            number = task.process.ids["vm_id"]
            sizes[number] = sizes.get(number, 0) + LEADER_AREA + sum(thread.area for thread in task.threads)
        for member in self.checkpoint.plan.members.values():
            if member.pid not in self.by_pid and "vm_id" in member.shares:
                sizes[member.shares["vm_id"]] += LEADER_AREA
        return sizes

    def _settle(self, pid: int, stub: Stub) -> None:
        self.stubs[pid] = stub
        if pid in self.by_pid:
            self.by_pid[pid].adopt(stub)

    def _bear(self, planned: Birth) -> None:
        """Have the forker clone a process so that it gets the right parent."""
        member, forker = planned.member, self.stubs[planned.forker]
        if planned.way == births.ORPHAN:
            child = self._bear_orphan(member, forker, planned.flags)
        else:
            sibling = planned.way == births.SIBLING
            flags, signal = (sched.CLONE_PARENT, 0) if sibling else (0, member.exit_signal)
            child = self._clone(forker, member.pid, planned.flags | flags, signal)
        self._settle(member.pid, child)
        if member.helper:
            self._helpers[member.pid] = child

    def _bear_orphan(self, member: Member, forker: Stub, flags: int) -> Stub:
        """By one in between, who shares the forker's memory and ends; the parent adopts the orphan."""
        program = self.stubs[member.parent].program
        program.call("prctl subreaper", nr.prctl, prctl.SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        program.run()
        between = self._clone(forker, self._spare_pid(), flags | sched.CLONE_VM, 0, forker.program.area)
        self._helpers[between.pid] = between
        child = self._clone(between, member.pid, flags, sig.SIGCHLD)
        self._end_helper(between)
        program.call("prctl subreaper", nr.prctl, prctl.SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        program.run()
        return child

    def _spare_pid(self) -> int:
        """A pid that nobody of the checkpoint needs."""
        wanted = {*self.checkpoint.tids(), *self.checkpoint.helpers(), *self._helpers}
        return next(pid for pid in range(birth.pid_max() - 1, 1, -1) if pid not in wanted and not birth.is_used(pid))

    def _clone(self, forker: Stub, pid: int, flags: int, exit_signal: int, area: int = 0) -> Stub:
        """A new process *pid*. Its program is in *area*, if it shares the forker's memory, or in an area of its own."""
        plan_clone(forker.program, pid, flags, exit_signal)
        try:
            forker.program.run()
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise birth.taken(pid) from None
            raise
        scratch = forker.scratch
        if not flags & sched.CLONE_VM:
            scratch = Scratch(pid, scratch.code, scratch.data, scratch.size)
        return Stub(pid, await_birth(pid, pid, forker.runner, scratch), scratch, area)

    def helpers(self) -> list[int]:
        """The pids of helpers that have not been ended."""
        return list(self._helpers)

    # -- groups --------------------------------------------------------------------------------------------------------

    def join_groups(self) -> None:
        """Process groups, leaders first."""
        members = [
            process for process in self.checkpoint.processes
            if process.pgid not in (process.pid, 0) and not self._is_outer_group(process.pgid)
        ]  # fmt: skip
        for process in self.checkpoint.processes:
            if process.pgid == process.pid != process.sid:
                self._found_group(self.stubs[process.pid])
        moved = {process.pid: process for process in members}
        for pgid in sorted({process.pgid for process in members}):
            if pgid in moved:
                # Its leader has gone to another group: somebody has to stay until all are in theirs.
                self._found_group(self.stubs[pgid])
                keeper = self._clone(self.stubs[pgid], self._spare_pid(), 0, 0)
                self._helpers[keeper.pid] = keeper
            elif pgid not in self.stubs:
                self._make_group(next(process for process in members if process.pgid == pgid))
        for process in members:
            program = self.stubs[process.pid].program
            program.call(f"setpgid to {process.pgid}", nr.setpgid, 0, process.pgid)
            program.run()
        for helper in list(self._helpers.values()):
            self._end_helper(helper)

    def _found_group(self, stub: Stub) -> None:
        stub.program.call("setpgid", nr.setpgid, 0, 0)
        stub.program.run()

    def _is_outer_group(self, pgid: int) -> bool:
        root = self.checkpoint.root
        return (
            self.options.shell_job and root.sid != root.pid and pgid not in self.stubs and pgid in (root.pgid, root.sid)
        )

    def _make_group(self, member: Process) -> None:
        """A helper in *member*'s session with the pid of its group, a child of *member* for as long as it is needed."""
        helper = self._clone(self.stubs[member.pid], member.pgid, 0, 0)
        self._helpers[helper.pid] = helper
        self._found_group(helper)

    def _end_helper(self, helper: Stub) -> None:
        """End a helper and have its parent reap it."""
        parent = int(procfs.status(helper.pid)["PPid"])
        _end(helper, 0)
        program = self.stubs[parent].program
        program.call("wait4", nr.wait4, helper.pid, 0, pt.WALL, 0)
        program.run()
        del self._helpers[helper.pid]
        if parent in self.by_pid:
            self.by_pid[parent].bereaved = True

    def make_ready(self) -> None:
        """Give everybody its registers. Children first: stopped ones stop now, and their parents take notice of it
        before they have their own again."""
        stopped: dict[int, list[RestoredTask]] = {}
        last = {task.process.ids["vm_id"]: task for task in reversed(self.tasks)}
        for task in reversed(self.tasks):
            if task.pid in stopped:
                task.notice_stops(stopped[task.pid])
            task.prime()
            task.make_ready(last[task.process.ids["vm_id"]] is task)
            if task.is_stopped():
                task.stop()
                if task.process.parent is not None:
                    stopped.setdefault(task.process.parent.pid, []).append(task)

    def report_continued(self) -> None:
        """Those whose parents have not taken notice yet that they go on after a stop."""
        for task in self.tasks:
            parent = task.process.parent
            if task.tc.get("firn", {}).get("continued") and parent is not None:
                stops.stop_and_continue(task.pid)
                self.by_pid[parent.pid].bereaved = True

    def end_zombies(self, log: Log) -> None:
        """Those who ended before the dump end again."""
        for process in self.checkpoint.processes:
            if process.zombie:
                stub = self.stubs[process.pid]
                name = process.tc["comm"].encode("utf-8", "surrogateescape")[:15] + b"\0"
                stub.program.call("prctl name", nr.prctl, prctl.SET_NAME, stub.program.data(name), 0, 0, 0)
                status = process.tc["exit_code"]
                if status & _CORE and not (status & 0x7F and _names_cores()):
                    log.warn(f"zombie {process.pid} comes back without the mark that it has left a core")
                    status &= ~_CORE
                if status & _CORE:
                    self._end_with_core(stub, status)
                else:
                    _end(stub, status)

    def _end_with_core(self, stub: Stub, status: int) -> None:
        """Only a core that was written sets the bit that says so: a small one, in a folder that goes with it."""
        folder = os.path.join(os.path.abspath(self.options.work_dir), f"core-of-{stub.pid}-{os.getpid()}")
        os.mkdir(folder, 0o700)
        try:
            stub.program.call("chdir", nr.chdir, stub.program.text(folder))
            stub.program.run()
            set_core_filter(stub.pid, 0)
            limit = stub.program.data(_CORE_LIMIT.to_bytes(8, "little") * 2)
            stub.program.call("prlimit", nr.prlimit64, 0, _RLIMIT_CORE, limit, 0, flags=1)
            _end(stub, status)
        finally:
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)


def _names_cores() -> bool:
    """Whether cores are files in the working directory (core(5)), and not given to a program or collected elsewhere."""
    pattern = procfs.read("/proc/sys/kernel/core_pattern")
    return pattern[:1] not in (b"|", b"@") and b"/" not in pattern


def _end(stub: Stub, status: int) -> None:
    """Have a process end with wait status *status*: by a signal (with a core, if its bit is set) or an exit code."""
    program = stub.program
    signal = status & 0x7F
    if signal:
        program.call("prctl dumpable", nr.prctl, prctl.SET_DUMPABLE, int(bool(status & _CORE)), 0, 0, 0)
        program.reserve(3, 64)
        action = program.data(bytes(sig.SIGACTION.size))
        if signal not in (sig.SIGKILL, sig.SIGSTOP):
            program.call("rt_sigaction", nr.rt_sigaction, signal, action, 0, 8)
        nothing = program.data(bytes(8))
        program.call("kill", nr.kill, stub.pid, signal)
        program.call("rt_sigprocmask", nr.rt_sigprocmask, 2, nothing, 0, 8)
    program.call("exit", nr.exit_group, status >> 8 & 0xFF)
    program.start()
    while True:
        try:
            stop = ptrace.wait_stop(stub.pid)
        except ptrace.Died as died:
            if died.status & 0x7F != signal:
                raise RestoreError(f"zombie {stub.pid} could not be ended by signal {signal}") from None
            return
        ptrace.request("continue", pt.CONT, stub.pid, 0, 0 if stop.event else stop.signal)
