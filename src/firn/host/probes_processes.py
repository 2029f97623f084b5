"""Probes around pids, signals, timers and credentials. For the rules of a probe see :mod:`probes_tracing`."""

from __future__ import annotations

import errno
import os
import signal
import struct

from firn.abi import nr, sched
from firn.abi import probe_consts as pc
from firn.abi.libc import address_of, syscall
from firn.abi.signal import SIGEV_NONE, SIGEVENT, SIGINFO_SIZE
from firn.errors import KernelError
from firn.host import features, procfs


def chosen_pid() -> str | None:
    """clone3(2) with a chosen pid, tried with the pid that this process has: EEXIST where that is permitted."""
    if not features.clone3_set_tid():
        raise KernelError(features.refusals["clone3_set_tid"])
    wanted = bytearray(os.getpid().to_bytes(4, "little"))
    args = bytearray(sched.CLONE_ARGS.pack(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, address_of(wanted), 1, 0))
    try:
        if not syscall("clone3", nr.clone3, address_of(args), len(args)):
            os._exit(1)
    except OSError as error:
        if error.errno == errno.EPERM:
            return "not permitted: CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is missing"
        if error.errno != errno.EEXIST:
            raise
        return None
    raise KernelError("clone3 gives a pid that is in use")


def last_pid() -> None:
    """/proc/sys/kernel/ns_last_pid, writable."""
    _accessible("/proc/sys/kernel/ns_last_pid", os.W_OK)


def next_semaphore_id() -> None:
    """/proc/sys/kernel/sem_next_id, readable and writable; only root needs it."""
    if not os.geteuid():
        _accessible("/proc/sys/kernel/sem_next_id", os.R_OK | os.W_OK)


def _accessible(path: str, mode: int) -> None:
    os.stat(path)
    if not os.access(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def process_stat() -> None:
    """The addresses and the exit status in /proc/PID/stat (Linux 3.5)."""
    stat = procfs.stat(os.getpid())
    if len(stat.fields) < 50:
        raise KernelError(f"/proc/PID/stat has only {len(stat.fields) + 2} fields")
    if not (stat.start_code and stat.start_stack and stat.arg_start and stat.env_end):
        raise KernelError("/proc/PID/stat hides the addresses")


def child_list() -> None:
    """/proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)."""
    with features.StoppedChild() as pid:
        text = procfs.read(f"/proc/self/task/{os.getpid()}/children")
        if str(pid).encode() not in text.split():
            raise KernelError("/proc/PID/task/TID/children does not show a child")


def process_timers() -> None:
    """/proc/PID/timers (Linux 3.10, CONFIG_POSIX_TIMERS)."""
    event = bytearray(SIGEVENT.pack(0, 0, SIGEV_NONE, 0, 0))
    number = bytearray(4)
    realtime = 0
    syscall("timer_create", nr.timer_create, realtime, address_of(event), address_of(number))
    wanted = int.from_bytes(number, "little")
    if wanted not in [timer.id for timer in procfs.timers(os.getpid())]:
        raise KernelError("/proc/PID/timers does not show a timer")


def queued_signals() -> None:
    """rt_sigqueueinfo(2) to oneself with the si_code of a signal of the kernel."""
    number, code = int(signal.SIGUSR1), 5
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    info = bytearray(struct.pack("<iii", number, 0, code).ljust(SIGINFO_SIZE, b"\0"))
    syscall("rt_sigqueueinfo", nr.rt_sigqueueinfo, os.getpid(), number, address_of(info))
    if signal.sigwaitinfo({number}).si_code != code:
        raise KernelError("rt_sigqueueinfo changes the si_code")


def login_uid() -> str | None:
    """/proc/PID/loginuid (CONFIG_AUDIT): read, taken away and set again."""
    path = "/proc/self/loginuid"
    before = procfs.read(path)
    try:
        for text in (b"4294967295", before):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)
    except OSError as error:
        return f"it can be read, but not set: {error.strerror}"
    return None


def nested_pids() -> None:
    """The line NSpid of /proc/PID/status (Linux 4.1)."""
    if "NSpid" not in procfs.status(os.getpid()):
        raise KernelError("/proc/PID/status has no line NSpid")


def sibling_namespace() -> None:
    """clone(2) with CLONE_PARENT and CLONE_NEWPID together: a sibling of ours in a new pid namespace."""
    middle = os.fork()
    if not middle:
        try:
            flags = sched.CLONE_PARENT | pc.CLONE_NEWPID | signal.SIGCHLD
            syscall("clone", nr.clone, flags, 0, 0, 0, 0)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or errno.EIO)
    _, status = os.waitpid(middle, 0)
    failure = os.waitstatus_to_exitcode(status)
    if failure:
        raise OSError(failure, f"clone with CLONE_PARENT and CLONE_NEWPID: {os.strerror(failure)}")
    os.waitpid(-1, 0)


def capabilities() -> str | None:
    """The capabilities that this process has, against those that the work takes (capabilities(7))."""
    have = features.effective_caps()

    def lacking(**wanted: int) -> list[str]:
        return [name for name, number in wanted.items() if not have >> number & 1]

    if lacking(one=pc.CAP_CHECKPOINT_RESTORE) and lacking(other=pc.CAP_SYS_ADMIN):
        raise KernelError("CAP_CHECKPOINT_RESTORE and CAP_SYS_ADMIN are both missing")
    names = lacking(
        CAP_SYS_ADMIN=pc.CAP_SYS_ADMIN, CAP_SYS_PTRACE=pc.CAP_SYS_PTRACE, CAP_SYS_RESOURCE=pc.CAP_SYS_RESOURCE
    )
    if names:
        return f"missing: {', '.join(names)}"
    everybody = [0, 0, (1 << 32) - 1]
    if [int(word) for word in procfs.read("/proc/self/uid_map").split()] != everybody:
        return "those of a user namespace, which do not reach beyond it"
    return None
