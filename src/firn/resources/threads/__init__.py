"""Threads: registers and everything the kernel keeps per thread (images: core-TID.img).

State owned: general and extended registers, robust list, rseq registration, clear_child_tid, alternate stack, name,
scheduling (policy, nice, priority, flags, affinity, io priority, timer slack), parent-death signal. Kernel: ptrace for
registers, get_robust_list(2), sched_getattr(2), ioprio_get(2) from outside; sigaltstack(2), prctl(2) inside the thread.
It comes back by clone3(2) with the wanted id and the thread's own calls; registers last, by ptrace.
"""

from __future__ import annotations

import os
import struct

from firn.abi import nr, prctl, sched
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError
from firn.resources.threads import xstate
from firn.tracee import memory, ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program
    from firn.tracee.seize import Thread

X86_64 = 1
_GPREGS = tuple(name for name in cpu.REG_NAMES)
_TLS_EMPTY = {
    "base_addr": 0, "limit": 0, "seg_32bit": False, "contents_h": False, "contents_l": False, "read_exec_only": True,
    "limit_in_pages": False, "seg_not_present": True, "usable": False,
}  # fmt: skip
_WORDS = struct.Struct("<i4xQQQQ")
"""Parent-death signal, tid address, robust list and its length, pending signals."""
_CPUS = 1024
_ANSWER = sig.STACK_T.size + _WORDS.size + sched.SCHED_ATTR.size + _CPUS // 8
SIZE = 9 * 64 + _ANSWER + 128
"""Bytes that :func:`ask` takes of a program."""
_DEFAULT_SLACK = 50_000


class Asked:
    """Where the answers of one thread lie."""

    __slots__ = ("affinity", "at", "io_priority", "securebits", "slack")

    def __init__(self, at: int, securebits: int, slack: int, io_priority: int, affinity: int) -> None:
        self.at = at
        self.securebits = securebits
        self.slack = slack
        self.io_priority = io_priority
        self.affinity = affinity


def ask(program: Program) -> Asked:
    """Add the calls of the thread about itself. Some of it could be seen from outside, but in a program it costs less.

    Pending signals are asked for last: a timer that has been read as run out before has sent its signal.
    """
    program.reserve(9, _ANSWER)
    at = program.buffer(_ANSWER)
    words = at + sig.STACK_T.size
    attr = words + _WORDS.size
    program.call("sigaltstack", nr.sigaltstack, 0, at)
    program.call("prctl parent-death signal", nr.prctl, prctl.GET_PDEATHSIG, words, 0, 0, 0)
    program.call("prctl tid address", nr.prctl, prctl.GET_TID_ADDRESS, words + 8, 0, 0, 0)
    program.call("get_robust_list", nr.get_robust_list, 0, words + 16, words + 24)
    program.call("sched_getattr", nr.sched_getattr, 0, attr, sched.SCHED_ATTR.size, 0)
    securebits = program.call("prctl securebits", nr.prctl, prctl.GET_SECUREBITS, 0, 0, 0, 0)
    slack = program.call("prctl timer slack", nr.prctl, prctl.GET_TIMERSLACK, 0, 0, 0, 0)
    io_priority = program.call("ioprio_get", nr.ioprio_get, sched.IOPRIO_WHO_PROCESS, 0)
    where = attr + sched.SCHED_ATTR.size
    affinity = program.call("sched_getaffinity", nr.sched_getaffinity, 0, _CPUS // 8, where, flags=1)
    program.call("rt_sigpending", nr.rt_sigpending, words + 32, 8)
    return Asked(at, securebits, slack, io_priority, affinity)


class Answers:
    """What the thread said about itself; ``pending``: the signals (a mask), own and the process's, that wait for it.

    While programs run, all are blocked but the one that ends them, and that one is not pending.
    """

    __slots__ = (
        "affinity", "io_priority", "pdeath_signal", "pending", "robust", "scheduling", "securebits", "slack", "stack",
        "tid_address",
    )  # fmt: skip

    def __init__(self, program: Program, asked: Asked) -> None:
        raw = program.read(asked.at, _ANSWER)
        pointer, flags, _, size = sig.STACK_T.unpack_from(raw)
        self.stack = {"ss_sp": pointer, "ss_size": size, "ss_flags": flags & ~sig.SS_ONSTACK & 0xFFFFFFFF}
        words = _WORDS.unpack_from(raw, sig.STACK_T.size)
        self.pdeath_signal: int = words[0]
        self.tid_address: int = words[1]
        self.robust: tuple[int, int] = words[2:4]
        self.pending: int = words[4]
        at = sig.STACK_T.size + _WORDS.size
        self.scheduling = _named(sched.SCHED_ATTR.unpack_from(raw, at))
        self.securebits = program.results[asked.securebits]
        self.slack = program.results[asked.slack]
        self.io_priority = program.results[asked.io_priority]
        # A machine may have more processors than fit.
        known = program.results[asked.affinity] > 0
        self.affinity = raw[at + sched.SCHED_ATTR.size :].rstrip(b"\0") if known else _affinity(program.runner.tid)


def _named(attr: tuple[int, ...]) -> dict[str, int]:
    names = ("size", "policy", "flags", "nice", "priority", "runtime", "deadline", "period", "util_min", "util_max")
    return dict(zip(names, attr, strict=True))


def scheduling(tid: int) -> dict[str, int]:
    """The struct sched_attr of a task by field name."""
    buffer = bytearray(sched.SCHED_ATTR.size)
    syscall(f"sched_getattr of task {tid}", nr.sched_getattr, tid, address_of(buffer), len(buffer), 0)
    return _named(sched.SCHED_ATTR.unpack(buffer))


def save_core(thread: Thread, answers: Answers, creds: dict[str, Any], comm: str) -> dict[str, Any]:
    """The thread_core_entry, with firn's own fields, but without seccomp, signals and restart."""
    head, length = answers.robust
    attr = answers.scheduling
    core: dict[str, Any] = {
        "futex_rla": head, "futex_rla_len": length, "sched_nice": attr["nice"], "sched_policy": attr["policy"],
        "sched_prio": attr["priority"], "sas": answers.stack, "pdeath_sig": answers.pdeath_signal, "creds": creds,
        "comm": comm, "cg_set": 1,
    }  # fmt: skip
    address, size, signature = thread.rseq
    if address:
        core["rseq_entry"] = {"rseq_abi_pointer": address, "rseq_abi_size": size, "signature": signature}
    own: dict[str, Any] = {
        "affinity": answers.affinity, "timer_slack_ns": answers.slack, "ioprio": answers.io_priority,
    }  # fmt: skip
    if attr["flags"]:
        own["sched_flags"] = attr["flags"]
    if attr["policy"] == sched.SCHED_DEADLINE:
        own |= {f"sched_{name}": attr[name] for name in ("runtime", "deadline", "period")}
    if attr["util_max"]:
        own |= {"util_min": attr["util_min"], "util_max": attr["util_max"]}
    core["firn"] = own
    return core


def _affinity(tid: int) -> bytes:
    mask = 0
    for number in os.sched_getaffinity(tid):
        mask |= 1 << number
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def leave_critical_section(pid: int, thread: Thread) -> tuple[int, ...]:
    """The registers with which a thread goes on, here and in the image: one inside an rseq critical section, which our
    stop has interrupted, goes on at its abort address, as after any preemption (rseq(2)).

    struct rseq: cpu_id_start, cpu_id, rseq_cs (offset 8); struct rseq_cs: version, flags, start, length, abort
    (include/uapi/linux/rseq.h). Such a section makes no system calls, so one that is in a call is in none.
    """
    regs = thread.regs
    thread.rseq = ptrace.rseq_configuration(thread.tid)
    address = thread.rseq[0]
    if not address or regs[cpu.ORIG_AX] >> 63 == 0:
        return regs
    try:
        section: int = struct.unpack("<Q", memory.read(pid, address + 8, 8))[0]
        if not section:
            return regs
        _, _, start, length, abort = struct.unpack("<IIQQQ", memory.read(pid, section, 32))
    except OSError:
        return regs
    if not start <= regs[cpu.IP] < start + length:
        return regs
    changed = list(regs)
    changed[cpu.IP] = abort
    return tuple(changed)


def save_info(regs: tuple[int, ...], area: bytes, tid_address: int) -> tuple[dict[str, Any], bytes]:
    """(thread_info_x86, raw XSAVE area for firn's own field or b"")."""
    fpregs, raw = xstate.save(area)
    gpregs = dict(zip(_GPREGS, regs, strict=True))
    gpregs["mode"] = 1
    info = {
        "clear_tid_addr": tid_address, "gpregs": gpregs, "fpregs": fpregs,
        "tls": [{"entry_number": 12 + n, **_TLS_EMPTY} for n in range(3)],
    }  # fmt: skip
    return info, raw


# -- coming back ---------------------------------------------------------------------------------------------------


def load_registers(info: dict[str, Any]) -> tuple[int, ...]:
    """The registers to set, from thread_info_x86; segments are those of 64-bit user code whatever the image says."""
    gpregs = info["gpregs"]
    if gpregs.get("mode", 1) != 1:
        raise ImageError("core image: a 32-bit task, which is not supported yet")
    regs = [gpregs[name] for name in _GPREGS]
    if regs[cpu.CS] != cpu.USER_CS:
        raise ImageError(f"core image: code segment {regs[cpu.CS]:#x} is not that of 64-bit user code")
    regs[cpu.SS] = cpu.USER_SS
    regs[cpu.DS] = regs[cpu.ES] = regs[cpu.FS] = regs[cpu.GS] = 0
    regs[cpu.ORIG_AX] = cpu.NO_SYSCALL
    return tuple(regs)


def plan_own(program: Program, core: dict[str, Any], comm: str) -> None:
    """The calls that a restored thread makes for itself before its credentials change."""
    program.reserve(6, 128)
    head = core["futex_rla"]
    program.call("set_robust_list", nr.set_robust_list, head, core["futex_rla_len"], flags=0 if head else 1)
    name = os.fsencode(comm)[:15] + b"\0"
    program.call("prctl name", nr.prctl, prctl.SET_NAME, program.data(name), 0, 0, 0)
    stack = core.get("sas")
    if stack:
        flags = stack["ss_flags"] & 0xFFFFFFFF
        pack = sig.STACK_T.pack(stack["ss_sp"], flags - (flags >> 31 << 32), 0, stack["ss_size"])
        program.call("sigaltstack", nr.sigaltstack, program.data(pack), 0)
    slack = core.get("firn", {}).get("timer_slack_ns", _DEFAULT_SLACK)
    if slack:
        program.call("prctl timer slack", nr.prctl, prctl.SET_TIMERSLACK, slack, 0, 0, 0)
    rseq = core.get("rseq_entry")
    if rseq and rseq["rseq_abi_pointer"]:
        program.call("rseq", nr.rseq, rseq["rseq_abi_pointer"], rseq["rseq_abi_size"], 0, rseq["signature"])


def plan_last(program: Program, core: dict[str, Any]) -> None:
    """What a change of credentials would reset."""
    if core.get("pdeath_sig"):
        program.call("prctl parent-death signal", nr.prctl, prctl.SET_PDEATHSIG, core["pdeath_sig"], 0, 0, 0)


def set_scheduling(tid: int, core: dict[str, Any]) -> None:
    """Scheduling, affinity and io priority, set from outside."""
    own = core.get("firn", {})
    policy, nice = core.get("sched_policy", 0), core.get("sched_nice", 0)
    now = scheduling(tid)
    flags = own.get("sched_flags", 0)
    wanted = (policy, flags, nice, core.get("sched_prio", 0))
    if (now["policy"], now["flags"], now["nice"], now["priority"]) != wanted:
        attr = bytearray(
            sched.SCHED_ATTR.pack(
                sched.SCHED_ATTR.size, policy, flags & 1, nice, core.get("sched_prio", 0), own.get("sched_runtime", 0),
                own.get("sched_deadline", 0), own.get("sched_period", 0), 0, 0,
            )
        )  # fmt: skip
        syscall(f"sched_setattr of task {tid}", nr.sched_setattr, tid, address_of(attr), 0)
    clamps = own.get("util_min", 0), own.get("util_max", 0)
    if clamps[1] and now["util_max"] and clamps != (now["util_min"], now["util_max"]):
        keep = sched.SCHED_FLAG_KEEP_ALL | sched.SCHED_FLAG_UTIL_CLAMP
        clamp = bytearray(sched.SCHED_ATTR.pack(sched.SCHED_ATTR.size, policy, keep, 0, 0, 0, 0, 0, *clamps))
        syscall(f"sched_setattr of task {tid}", nr.sched_setattr, tid, address_of(clamp), 0)
    if own.get("affinity"):
        mask = int.from_bytes(own["affinity"], "little")
        wanted_cpus = {n for n in range(mask.bit_length()) if mask >> n & 1}
        here = os.sched_getaffinity(0)
        if wanted_cpus & here and wanted_cpus != os.sched_getaffinity(tid):
            os.sched_setaffinity(tid, wanted_cpus)
    if own.get("ioprio"):
        syscall(f"ioprio_set of task {tid}", nr.ioprio_set, sched.IOPRIO_WHO_PROCESS, tid, own["ioprio"])
