"""Birth: the first restored task, with the pid it had, as a stub under our trace.

The stub is a static executable of a few bytes that waits in pause(2). It is born of us by clone3(2) with set_tid, so
its pid is the wanted one and nobody else ever had it in between; the clone is a plain fork that does nothing but
execute the stub from a memfd. Before that it is seized with PTRACE_O_EXITKILL: if we die before the end, so does
everything that we made. It waits for that at a pipe, which tells it if we die even before.
"""

from __future__ import annotations

import _signal
import _thread
import errno
import os
import struct
import time

from firn.abi import nr, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi.libc import address_of, forking_syscall
from firn.errors import KernelError, RestoreError
from firn.host import procfs
from firn.tracee import memory, ptrace
from firn.tracee.program import Runner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_BASE = 0x10000
_REAPING_TRIES = 50
_CODE = bytes.fromhex("b8220000000f05ebf7")  # again: mov eax, 34 (pause); syscall; jmp again
_HEADERS = 64 + 56
SYSCALL_SITE = _BASE + _HEADERS + 5
"""The stub's system-call instruction."""


def stub_image() -> bytes:
    """The stub: an ELF executable with one read-and-execute segment (elf(5))."""
    size = _HEADERS + len(_CODE)
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + _CODE


def check_pids(pids: list[int]) -> None:
    """Refuse, before anything is made, pids that are in use or that this kernel cannot give."""
    maximum = pid_max()
    for pid in pids:
        if pid >= maximum:
            raise RestoreError(
                f"pid {pid} is above this machine's limit of {maximum}", f"sysctl -w kernel.pid_max={pid + 1}"
            )
        if is_used(pid) or is_used(-pid):
            _await_reaping(pid)
            if is_used(pid) or is_used(-pid):
                raise taken(pid)


def pid_max() -> int:
    """The number that all pids of this machine are below."""
    return int(procfs.read("/proc/sys/kernel/pid_max"))


def is_used(pid: int) -> bool:
    """Whether there is a process *pid*, or for a negative number a process group."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _await_reaping(pid: int) -> None:
    """Give the parents of zombies a moment to take notice of them: a restore often follows its dump at once. A group is
    there as long as a zombie is in it."""
    for _ in range(_REAPING_TRIES):
        try:
            if procfs.stat(pid).state not in "ZX":
                return
        except OSError:
            if not is_used(-pid):
                return
        time.sleep(0.02)


def taken(pid: int) -> RestoreError:
    """The error for a pid that is in use: by a process, or as the id of a group or session of others."""
    try:
        stat = procfs.stat(pid)
        ended = ", which has ended and was not reaped by its parent" if stat.state in "ZX" else ""
        who = f" by {stat.comm.decode(errors='replace')!r}{ended}"
    except OSError:
        who = " as the id of a process group or session"
    return RestoreError(f"pid {pid} is taken{who}", "end that process, or restore in another pid namespace")


def spawn(pid: int, sibling: bool, orphan: bool = False) -> None:
    """Make the stub with *pid*, seized and stopped; our child, or with *sibling* our parent's, or if *orphan* that of
    whoever adopts the orphans here."""
    memfd = os.memfd_create("stub", os.MFD_CLOEXEC)
    alive, child_end = os.pipe2(os.O_CLOEXEC)
    wait, go = os.pipe2(os.O_CLOEXEC)
    old_mask = _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
    try:
        os.write(memfd, stub_image())
        if orphan:
            _clone_orphan(pid, memfd, wait, go)
        else:
            _clone(pid, sibling, memfd, wait, go)
        options = pt.O_TRACESYSGOOD | pt.O_TRACECLONE | pt.O_TRACEFORK | pt.O_EXITKILL
        ptrace.request("seize", pt.SEIZE, pid, 0, options)
        os.close(child_end)
        child_end = -1
        os.write(go, b"+")
        # The pipe closes at the execve(2); what comes before is an errno.
        failure = os.read(alive, 4)
        if failure:
            raise RestoreError(f"the stub cannot be executed: {os.strerror(int.from_bytes(failure, 'little'))}")
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, old_mask)
        for fd in (memfd, alive, child_end, wait, go):
            if fd >= 0:
                os.close(fd)
    ptrace.request("interrupt", pt.INTERRUPT, pid)
    while ptrace.wait_stop(pid).event != pt.EVENT_STOP:
        ptrace.request("continue", pt.CONT, pid)


def _clone_orphan(pid: int, memfd: int, wait: int, go: int) -> None:
    """The same by a child of ours that ends at once."""
    for _ in range(_REAPING_TRIES):
        args = bytearray(sched.CLONE_ARGS.pack(0, 0, 0, 0, sig.SIGCHLD, 0, 0, 0, 0, 0, 0))
        parent = forking_syscall("clone3", nr.clone3, address_of(args), len(args))
        if parent == 0:
            failed = True
            try:
                if os.getpid() != pid:
                    _clone(pid, False, memfd, wait, go)
                    failed = False
            finally:
                os._exit(failed)
        status = os.waitpid(parent, 0)[1]
        if parent == pid:
            continue  # the number was free, so this child was given it
        if status:
            raise taken(pid) if is_used(pid) else RestoreError(f"pid {pid} cannot be given to a new process")
        return


def _clone(pid: int, sibling: bool, memfd: int, wait: int, go: int) -> None:
    """clone3 with set_tid; the child executes *memfd*, when it is told to, and never returns from here."""
    wanted = bytearray(struct.pack("<i", pid))
    flags, signal = (sched.CLONE_PARENT, 0) if sibling else (0, sig.SIGCHLD)
    args = bytearray(sched.CLONE_ARGS.pack(flags, 0, 0, 0, signal, 0, 0, 0, address_of(wanted), 1, 0))
    arguments, environment, word = ["firn"], dict[str, str](), bytearray(1)
    try:
        child = forking_syscall(f"clone3 with pid {pid}", nr.clone3, address_of(args), len(args))
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise taken(pid) from None
        if error.errno in (errno.ENOSYS, errno.E2BIG, errno.EINVAL):
            raise KernelError("this kernel cannot give a chosen pid (clone3 set_tid)", "Linux 5.5 or later") from None
        if error.errno == errno.EPERM:
            raise RestoreError(
                f"pid {pid} may not be chosen: CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE is missing"
            ) from None
        raise
    if child == 0:
        try:
            os.close(go)
            # Not os.read, which gives the interpreter's lock away, perhaps to a thread that is not here.
            if forking_syscall("read", nr.read, wait, address_of(word), 1) != 1:
                os._exit(1)
            os.execve(memfd, arguments, environment)
        except OSError as error:
            os.write(2, f"firn: stub: {error}\n".encode())
        finally:
            os._exit(127)


def stand_in(pid: int, threads: list[int]) -> None:
    """Make a stub with *pid* and further *threads* that does nothing: what is in /proc of them can be opened."""
    spawn(pid, False)
    if not threads:
        return
    runner = Runner(pid, pid, ptrace.get_regs(pid))
    ptrace.set_sigmask(pid, runner.mask())
    flags = sched.CLONE_VM | sched.CLONE_SIGHAND | sched.CLONE_THREAD
    for tid in threads:
        # Behind the code there is the rest of its page, which nobody uses.
        wanted, args = SYSCALL_SITE + 64, SYSCALL_SITE + 72
        packed = sched.CLONE_ARGS.pack(flags, 0, 0, 0, 0, 0, 0, 0, wanted, 1, 0)
        memory.force_write(pid, wanted, tid.to_bytes(8, "little") + packed)
        try:
            runner.single(SYSCALL_SITE, nr.clone3, args, len(packed))
        except OSError as error:
            raise taken(tid) if error.errno == errno.EEXIST else error from None


def strike(pids: Iterable[int], tracer: int) -> None:
    """Kill those of the processes that thread *tracer* traces: of the others, somebody else may have the pid."""
    for pid in pids:
        try:
            if procfs.status(procfs.speaker(pid))["TracerPid"] == str(tracer):
                os.kill(pid, sig.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def kill(families: list[list[int]]) -> None:
    """End the processes whose thread ids are *families* (leaders first), as far as they exist, and see them dead.

    As their tracer we are told of every thread's end, a leader's after those of its other threads.
    """
    strike((tids[0] for tids in families), _thread.get_native_id())
    for tids in families:
        for tid in [*tids[1:], tids[0]]:
            try:
                while os.waitpid(tid, pt.WALL)[1] & 0xFF == 0x7F:
                    pass
            except ChildProcessError:
                continue
