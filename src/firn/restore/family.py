"""The tree of restored processes: who is born of whom, sessions, process groups, zombies.

Parenthood comes out right by construction: every process is cloned by its parent. So do sessions: a process inherits
its parent's, so children that stayed in the session that their parent left by setsid(2) are cloned before that call,
all others after it. Groups are joined when everybody lives: leaders first. A group whose leader is gone is made by a
helper with that pid, which ends when its members have joined. A zombie is a child that ends as it did, when everybody
has joined.
"""

from __future__ import annotations

import errno

from firn.abi import mman, nr, prctl, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import NotBuilt, RestoreError
from firn.host import procfs
from firn.images.pages import PagesFiles
from firn.resources import signals
from firn.resources.memory import areas, layout
from firn.resources.memory.vdso import Own
from firn.restore import birth
from firn.restore.memory import SPARE, TaskMemory, plan_sharing
from firn.restore.tasks import LEADER_AREA, THREAD_AREA, RestoredTask, Stub, await_birth, plan_clone
from firn.tracee import memory, ptrace
from firn.tracee.program import Runner, Scratch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.api import RestoreOptions
    from firn.resources.files.reopen import Opener
    from firn.restore.load import Checkpoint, Process

_NONE = (1 << 64) - 1


class Family:
    """All processes of a checkpoint on their way back; ``tasks`` are the living ones, parents first."""

    def __init__(self, checkpoint: Checkpoint, opener: Opener, options: RestoreOptions) -> None:
        self.checkpoint = checkpoint
        self.opener = opener
        self.options = options
        self.tasks: list[RestoredTask] = []
        self.stubs: dict[int, Stub] = {}
        self.sessions: dict[int, int] = {}
        self._helpers: dict[int, Stub] = {}
        self._pages_files = PagesFiles()
        memories: dict[int, TaskMemory] = {}
        for process in checkpoint.processes:
            if process.zombie:
                continue
            parent = memories[process.parent.pid] if process.parent else None
            memories[process.pid] = TaskMemory(process, checkpoint.images, parent, self._pages_files)
            self.tasks.append(RestoredTask(process, memories[process.pid], opener))
        plan_sharing(list(memories.values()), checkpoint.knows_sharing())
        self.by_pid = {task.pid: task for task in self.tasks}

    def open_files(self) -> None:
        """Open everything that does not have to wait for the tasks."""
        for task in self.tasks:
            for key in task.wanted():
                if not self.opener.is_late(*key[:2]):
                    self.opener.open(*key)

    def pages(self) -> int:
        """How many pages the images hold."""
        return sum(task.memory.pages for task in self.tasks)

    def close(self) -> None:
        """Close the page images."""
        self._pages_files.close()

    # -- birth and memory ----------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Rebuild the root's memory, then clone and rebuild its children, and so on."""
        root = self.checkpoint.root
        self._adopt_root(root)
        own = Own()
        self.sessions[root.pid] = 0
        waiting = [root]
        while waiting:
            process = waiting.pop()
            stub = self.stubs[process.pid]
            task = self.by_pid[process.pid]
            task.memory.replace(stub.program, stub.scratch, self.opener, own)
            waiting += self._bear(process)
        for task in self.tasks:
            task.memory.settle(self.stubs[task.pid].program)
        self.opener.seal()

    def _adopt_root(self, root: Process) -> None:
        """Map the scratch area, at a place where no process of the tree has anything, and take over the root."""
        count = max(len(task.threads) for task in self.tasks)
        data = LEADER_AREA + THREAD_AREA * count
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
        self._settle(root, Stub(root.pid, runner, scratch))

    def _settle(self, process: Process, stub: Stub) -> None:
        self.stubs[process.pid] = stub
        if not process.zombie:
            self.by_pid[process.pid].adopt(stub)

    def _bear(self, parent: Process) -> list[Process]:
        """Clone the children of *parent*, those of its old session first; the living ones."""
        inherited = self.sessions[parent.pid]
        program = self.stubs[parent.pid].program
        early = [child for child in parent.children if child.sid not in (parent.sid, child.pid)]
        for child in early:
            if inherited != child.sid and not self._is_outer(child.sid):
                raise NotBuilt(
                    f"process {child.pid} belongs to session {child.sid}, whose leader is gone: not supported yet"
                )
            self._clone(parent, child)
        if parent.sid == parent.pid:
            program.call("setsid", nr.setsid)
            self.opener.plan_session(program, parent.pid)
            program.run()
            self.sessions[parent.pid] = parent.pid
        for child in parent.children:
            if child not in early:
                self._clone(parent, child)
        return [child for child in parent.children if not child.zombie]

    def _is_outer(self, sid: int) -> bool:
        """Whether *sid* is the session outside of the tree that a shell job belongs to; ours takes its place."""
        return self.options.shell_job and sid == self.checkpoint.root.sid != self.checkpoint.root.pid

    def _clone(self, parent: Process, child: Process) -> None:
        born_of = self.stubs[parent.pid]
        flags = sched.CLONE_FILES if not child.zombie and child.shares_files else 0
        self._give_birth(born_of, child.pid, flags, sig.SIGCHLD)
        self.sessions[child.pid] = self.sessions[parent.pid]
        self._settle(child, self._newborn(child.pid, born_of))

    def _give_birth(self, parent: Stub, pid: int, flags: int, exit_signal: int) -> None:
        plan_clone(parent.program, pid, flags, exit_signal)
        try:
            parent.program.run()
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise birth.taken(pid) from None
            raise

    def _newborn(self, pid: int, born_of: Stub) -> Stub:
        scratch = Scratch(pid, born_of.scratch.code, born_of.scratch.data, born_of.scratch.size)
        return Stub(pid, await_birth(pid, pid, born_of.runner, scratch), scratch)

    # -- groups --------------------------------------------------------------------------------------------------------

    def join_groups(self) -> None:
        """Sessions of those who lead one and have no children, then process groups, leaders first."""
        for process in self.checkpoint.processes:
            stub = self.stubs[process.pid]
            if process.sid == process.pid and process.zombie:
                stub.program.call("setsid", nr.setsid)
            elif process.pgid == process.pid != process.sid:
                stub.program.call("setpgid", nr.setpgid, 0, 0)
            stub.program.run()
        for process in self.checkpoint.processes:
            if process.pgid in (process.pid, 0) or self._is_outer_group(process.pgid):
                continue
            if process.pgid not in self.stubs:
                self._make_group(process)
            program = self.stubs[process.pid].program
            program.call(f"setpgid to {process.pgid}", nr.setpgid, 0, process.pgid)
            program.run()
        for helper, stub in self._helpers.items():
            self._end_helper(helper, stub)

    def _is_outer_group(self, pgid: int) -> bool:
        root = self.checkpoint.root
        return (
            self.options.shell_job and root.sid != root.pid and pgid not in self.stubs and pgid in (root.pgid, root.sid)
        )

    def _make_group(self, member: Process) -> None:
        """A helper in *member*'s session with the pid of its group, a child of *member* for as long as it is needed."""
        if member.pgid in self._helpers:
            return
        stub = self.stubs[member.pid]
        self._give_birth(stub, member.pgid, 0, 0)
        helper = self._newborn(member.pgid, stub)
        helper.program.call("setpgid", nr.setpgid, 0, 0)
        helper.program.run()
        self._helpers[member.pgid] = helper

    def _end_helper(self, pid: int, helper: Stub) -> None:
        _end(helper, 0)
        parent = int(procfs.status(pid)["PPid"])
        program = self.stubs[parent].program
        program.call("wait4", nr.wait4, pid, 0, pt.WALL, 0)
        program.run()

    def end_zombies(self) -> None:
        """Those who ended before the dump end again."""
        for process in self.checkpoint.processes:
            if process.zombie:
                stub = self.stubs[process.pid]
                name = process.tc["comm"].encode("utf-8", "surrogateescape")[:15] + b"\0"
                stub.program.call("prctl name", nr.prctl, prctl.SET_NAME, stub.program.data(name), 0, 0, 0)
                _end(stub, process.tc["exit_code"])


def _end(stub: Stub, status: int) -> None:
    """Have a process end with wait status *status*: by a signal (no core is written) or an exit code."""
    program = stub.program
    signal = status & 0x7F
    if signal:
        program.call("prctl dumpable", nr.prctl, prctl.SET_DUMPABLE, 0, 0, 0, 0)
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
