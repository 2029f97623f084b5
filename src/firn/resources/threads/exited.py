"""A first thread (thread-group leader) that has exited while others live, as pthread_exit(3) in main does.

State owned: that it has exited, its exit code, and what such a thread still shows: name, credentials (kill(2) checks
those of the first thread), scheduling. Kernel: the thread is a zombie that nobody can reap or trace before the last
thread ends; its parent then sees the code of that one, or before Linux 5.19 that of the first (synchronize_group_exit
in kernel/exit.c). The code is in /proc/PID/task/PID/stat; /proc/PID/stat shows a stopped process's stop signal there.
The thread has no memory, files or directories any more, so the process is looked at through another thread
(:func:`firn.host.procfs.speaker`).

It comes back by being born as any leader, and by exiting once it has made the other threads and all descriptors. That
is before children get parent-death signals: they would be sent one (reparent_leader in kernel/exit.c). Images: its core
is that of a thread which is about to call exit(2) with all signals blocked, at a system-call instruction of the vdso,
so that whoever does not know firn's mark brings back a leader that exits at once. What goes wrong: a dump needs pidfds
of threads (Linux 6.9) to copy descriptors; the seccomp mode that such a thread still shows does not come back.
"""

from __future__ import annotations

import time

from firn.abi import nr, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import ImageError, RestoreError
from firn.host import procfs
from firn.resources.threads import X86_64, scheduling
from firn.tracee import memory, ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Runner
    from firn.tracee.seize import Task

_SYSCALL = b"\x0f\x05"
_SS_DISABLE = 2
_POLL_S = 0.0005
_PATIENCE_S = 5.0


def save_core(task: Task, tc: dict[str, Any], creds: dict[str, Any], cgroup_set: int) -> dict[str, Any]:
    """The core_entry of the first thread of *task*; sets in *tc* (task_core_entry) what tells of it."""
    stat, voice = procfs.stat(task.pid, task.pid), task.leader
    name = stat.comm.decode("utf-8", "surrogateescape")
    tc |= {"comm": name, "exit_code": stat.exit_code, "blk_sigset": sig.ALL}
    tc["firn"] |= {"leader_exited": True, "leader_mask": int(procfs.status(task.pid, task.pid)["SigBlk"], 16)}
    attr = scheduling(task.pid)
    regs = list(voice.regs)
    for register, value in (("ip", _call_site(task.voice)), ("ax", nr.exit), ("di", stat.exit_code >> 8)):
        regs[cpu.REG_NAMES.index(register)] = value
    regs[cpu.ORIG_AX] = cpu.NO_SYSCALL
    core = {
        "futex_rla": 0, "futex_rla_len": 0, "sched_nice": attr["nice"], "sched_policy": attr["policy"],
        "sched_prio": attr["priority"], "sas": {"ss_sp": 0, "ss_size": 0, "ss_flags": _SS_DISABLE}, "pdeath_sig": 0,
        "creds": creds, "comm": name, "cg_set": cgroup_set, "blk_sigset": sig.ALL, "firn": {},
    }  # fmt: skip
    if attr["policy"] == sched.SCHED_DEADLINE:
        core["sched_policy"] = 0  # its bandwidth went with it
    return {"mtype": X86_64, "thread_info": (tuple(regs), voice.xstate, 0), "thread_core": core}


def _call_site(tid: int) -> int:
    """The address of a system-call instruction in the vdso; 0 if there is none."""
    vdso = procfs.named_map(tid, "[vdso]")
    if vdso is None:
        return 0
    at = memory.read(tid, vdso.start, vdso.end - vdso.start).find(_SYSCALL)
    return vdso.start + at if at >= 0 else 0


def load(pid: int, tc: dict[str, Any], tids: list[int]) -> bool:
    """Whether the first thread of *pid* has exited, from its task_core_entry. ImageError if that makes no sense."""
    exited = bool(tc.get("firn", {}).get("leader_exited"))
    if exited and (len(tids) < 2 or tc["exit_code"] & ~0xFF00):
        raise ImageError(f"core-{pid}.img: a first thread that left no other one, or by {tc['exit_code']:#x}")
    return exited


def leave(runner: Runner, site: int, tc: dict[str, Any]) -> None:
    """Have the first thread, stopped under our trace, exit as it did; *site* is a system-call instruction.

    It is let go inside the call, where no signal can reach it any more: as its tracer we would be told of the process's
    end instead of its parent.
    """
    pid = runner.pid
    runner.enter(site, nr.exit, tc["exit_code"] >> 8)
    ptrace.set_sigmask(pid, tc["firn"].get("leader_mask", 0))
    ptrace.request("detach", pt.DETACH, pid)
    limit = time.monotonic() + _PATIENCE_S
    while procfs.stat(pid, pid).state not in "ZX":
        if time.monotonic() > limit:
            raise RestoreError(f"the first thread of process {pid} does not exit")
        time.sleep(_POLL_S)
