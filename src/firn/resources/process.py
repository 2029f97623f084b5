"""What belongs to a process as a whole (images: task_core_entry).

State owned: resource limits, personality, dumpable, child-subreaper, OOM adjustment, core-dump filter, login uid,
umask, membarrier registrations, and the process-wide switches of prctl(2): THP, KSM, MDWE, TSC, machine-check policy,
io flusher. Kernel: /proc/PID files from outside, the rest by calls of the task itself (prlimit(2) on another user's
process needs CAP_SYS_RESOURCE, getrlimit(2) of one's own does not). It comes back by the task's own calls and writes to
/proc/PID. What goes wrong: hard limits above ours cannot be set without CAP_SYS_RESOURCE. Some of them depend on the
machine (of processes and of pending signals, on its memory), so they become what is possible here, with a warning.
"""

from __future__ import annotations

import os
import struct

from firn.abi import nr, prctl
from firn.abi import x86_64 as cpu
from firn.abi.libc import address_of, syscall
from firn.errors import Obstacle
from firn.host import features, procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.log import Log
    from firn.tracee.program import Program

ALIVE, DEAD, STOPPED = 1, 2, 3
"""task_state of task_core_entry."""
LIMITS = 16
_RLIMIT_NOFILE = 7  # include/uapi/asm-generic/resource.h
LIMIT_NAMES = (
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING",
    "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
)  # fmt: skip
"""RLIMIT_* by number (include/uapi/asm-generic/resource.h)."""
_LIMIT = struct.Struct("<QQ")
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9
_NO_LOGINUID = 0xFFFFFFFF
_LDT_ENTRY = 8

PRCTLS = (
    ("dumpable", prctl.GET_DUMPABLE), ("thp_disable", prctl.GET_THP_DISABLE), ("io_flusher", prctl.GET_IO_FLUSHER),
    ("mce_kill", prctl.MCE_KILL_GET), ("mdwe", prctl.GET_MDWE), ("ksm_merge", prctl.GET_MEMORY_MERGE),
)  # fmt: skip
"""Switches whose value is the call's result."""


class Asked:
    """Where the answers lie."""

    __slots__ = ("brk", "cpuid", "ldt", "limits", "membarrier", "personality", "switches", "words")

    def __init__(
        self,
        limits: int,
        words: int,
        switches: dict[str, int],
        membarrier: int,
        brk: int,
        personality: int,
        cpuid: int,
        ldt: int,
    ) -> None:
        self.ldt = ldt
        self.cpuid = cpuid
        self.limits = limits
        self.words = words
        self.switches = switches
        self.membarrier = membarrier
        self.brk = brk
        self.personality = personality


def ask(program: Program) -> Asked:
    """Add the calls that read what only the task can ask for."""
    program.reserve(LIMITS + 20, LIMITS * _LIMIT.size + 24 + _LDT_ENTRY)
    limits = program.buffer(LIMITS * _LIMIT.size)
    words = program.buffer(24)
    for which in range(LIMITS):
        program.call("prlimit", nr.prlimit64, 0, which, 0, limits + which * _LIMIT.size)
    program.call("prctl child subreaper", nr.prctl, prctl.GET_CHILD_SUBREAPER, words, 0, 0, 0)
    program.call("prctl TSC", nr.prctl, prctl.GET_TSC, words + 8, 0, 0, 0, flags=1)
    switches = {name: program.call(f"prctl {name}", nr.prctl, code, 0, 0, 0, 0, flags=1) for name, code in PRCTLS}
    membarrier = program.call("membarrier", nr.membarrier, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0, flags=1)
    brk = program.call("brk", nr.brk, 0)
    personality = program.call("personality", nr.personality, _ONLY_TELL)
    cpuid = program.call("arch_prctl", nr.arch_prctl, prctl.ARCH_GET_CPUID, 0, flags=1)
    program.call("arch_prctl", nr.arch_prctl, prctl.ARCH_GET_XCOMP_PERM, words + 16, flags=1)
    ldt = program.call("modify_ldt", nr.modify_ldt, 0, program.buffer(_LDT_ENTRY), _LDT_ENTRY, flags=1)
    return Asked(limits, words, switches, membarrier, brk, personality, cpuid, ldt)


_ONLY_TELL = 0xFFFFFFFF
"""The argument of personality(2) that changes nothing."""


class Answers:
    """What the task said about itself. A switch that the kernel does not know is 0."""

    __slots__ = (
        "brk", "components", "ldt", "limits", "membarrier", "no_cpuid", "personality", "subreaper", "switches", "tsc",
    )  # fmt: skip

    def __init__(self, program: Program, asked: Asked) -> None:
        raw = program.read(asked.limits, LIMITS * _LIMIT.size)
        self.limits = [{"cur": cur, "max": hard} for cur, hard in _LIMIT.iter_unpack(raw)]
        self.subreaper, self.tsc, self.components = struct.unpack("<i4xi4xQ", program.read(asked.words, 24))
        self.no_cpuid = program.results[asked.cpuid] == 0
        self.switches = {name: max(program.results[call], 0) for name, call in asked.switches.items()}
        self.membarrier = max(program.results[asked.membarrier], 0)
        self.brk = program.results[asked.brk]
        self.ldt = program.results[asked.ldt]
        self.personality = program.results[asked.personality]


def _proc_number(pid: int, name: str, base: int = 10) -> int | None:
    try:
        return int(procfs.read_record(f"/proc/{pid}/{name}") or b"0", base)
    except (OSError, ValueError):
        return None


def check_segments(pid: int, threads: list[tuple[int, ...]], answers: Answers, obstacles: list[Obstacle]) -> None:
    """Refuse segments of its own, which images cannot hold: a local descriptor table, or selectors in the registers of
    *threads*. (The kernel's own flat data segment, as some programs load it, is as good as none.)"""
    if answers.ldt > 0:
        reason = "has a local descriptor table (modify_ldt(2))"
        obstacles.append(Obstacle(f"process {pid}", reason, "not supported yet"))
    elif any(regs[which] not in (0, cpu.USER_SS) for regs in threads for which in (cpu.DS, cpu.ES, cpu.FS, cpu.GS)):
        obstacles.append(Obstacle(f"process {pid}", "uses segments of its own", "not supported yet"))


def session_nice(pid: int) -> int:
    """The nice value of the whole session of *pid* (/proc/PID/autogroup, sched(7)); 0 where there is no such thing."""
    try:
        return int(procfs.read(f"/proc/{pid}/autogroup").split()[-1])
    except (OSError, ValueError, IndexError):
        return 0


def save(pid: int, stat: procfs.Stat, answers: Answers) -> dict[str, Any]:
    """The task_core_entry without state, timers and signals."""
    # CRIU reads the hexadecimal number as a decimal one, up to its first letter.
    shown = f"{answers.personality:08x}"
    digits = shown[: next((i for i, c in enumerate(shown) if not c.isdigit()), len(shown))]
    entry: dict[str, Any] = {
        "exit_code": 0, "personality": int(digits or "0"), "flags": stat.flags,
        "comm": stat.comm.decode("utf-8", "surrogateescape"), "rlimits": {"rlimits": answers.limits},
        "child_subreaper": bool(answers.subreaper),
    }  # fmt: skip
    for field in ("loginuid", "oom_score_adj"):
        value = _proc_number(pid, field)
        if value is not None:
            entry[field] = value
    if answers.membarrier:
        entry["membarrier_registration_mask"] = answers.membarrier
    own: dict[str, Any] = {"personality": answers.personality}
    dump_filter = _proc_number(pid, "coredump_filter", 16)
    if dump_filter is not None:
        own["coredump_filter"] = dump_filter
    for name in ("mdwe", "mce_kill"):
        if answers.switches[name]:
            own[name] = answers.switches[name]
    for name in ("io_flusher", "ksm_merge"):
        if answers.switches[name]:
            own[name] = True
    if answers.switches["thp_disable"] > 1:
        own["thp_flags"] = answers.switches["thp_disable"] & ~1
    if answers.tsc > 1:
        own["tsc"] = answers.tsc
    if answers.no_cpuid:
        own["no_cpuid"] = True
    if answers.components >> prctl.XFEATURE_XTILEDATA & 1:
        own["amx"] = True
    entry["firn"] = own
    return entry


# -- coming back ---------------------------------------------------------------------------------------------------


def plan_early(program: Program, tc: dict[str, Any], umask: int) -> None:
    """What can be set before memory and credentials."""
    own = tc.get("firn", {})
    if "personality" in own:
        program.call("personality", nr.personality, own["personality"])
    program.call("umask", nr.umask, umask)
    if tc.get("child_subreaper"):
        program.call("prctl child subreaper", nr.prctl, prctl.SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if own.get("amx"):
        # Where the processor has none, this is said when registers are looked at.
        program.call("arch_prctl AMX", nr.arch_prctl, prctl.ARCH_REQ_XCOMP_PERM, prctl.XFEATURE_XTILEDATA, flags=1)
    if own.get("io_flusher"):
        program.call("prctl io flusher", nr.prctl, prctl.SET_IO_FLUSHER, 1, 0, 0, 0)
    if own.get("ksm_merge"):
        program.call("prctl memory merge", nr.prctl, prctl.SET_MEMORY_MERGE, 1, 0, 0, 0)
    if own.get("mce_kill", 2) != 2:
        program.call("prctl mce kill", nr.prctl, prctl.MCE_KILL, prctl.MCE_KILL_SET, own["mce_kill"], 0, 0)
    mask = tc.get("membarrier_registration_mask", 0)
    for bit in range(32):
        if mask >> bit & 1:
            program.call(f"membarrier {1 << bit:#x}", nr.membarrier, 1 << bit, 0, 0)


def fit_limits(pid: int, tc: dict[str, Any], log: Log) -> None:
    """Lower in *tc* the hard limits that we may not give, to our own."""
    if features.effective_caps() >> prctl.CAP_SYS_RESOURCE & 1:
        return
    raw = bytearray(_LIMIT.size)
    for which, limit in enumerate(tc.get("rlimits", {}).get("rlimits", [])[:LIMITS]):
        syscall(f"prlimit {which}", nr.prlimit64, 0, which, 0, address_of(raw))
        highest: int = _LIMIT.unpack(raw)[1]
        if limit["max"] > highest:
            log.warn(
                f"process {pid}: RLIMIT_{LIMIT_NAMES[which]} was {limit['cur']} of {limit['max']}; without"
                f" CAP_SYS_RESOURCE it can be {highest} at the most here, and is that"
            )
            limit |= {"max": highest, "cur": min(limit["cur"], highest)}


def plan_limits(program: Program, tc: dict[str, Any]) -> None:
    """Resource limits: after everything that they could stand in the way of."""
    for which, limit in enumerate(tc.get("rlimits", {}).get("rlimits", [])):
        at = program.data(_LIMIT.pack(limit["cur"], limit["max"]))
        program.call(f"setrlimit {which} to {limit['cur']}/{limit['max']}", nr.prlimit64, 0, which, at, 0)


def plan_late(program: Program, tc: dict[str, Any], mm: dict[str, Any]) -> None:
    """What must come after the credentials (they reset dumpable) and what restricts the task itself."""
    own = tc.get("firn", {})
    if mm.get("thp_disabled"):
        program.call("prctl THP disable", nr.prctl, prctl.SET_THP_DISABLE, 1, own.get("thp_flags", 0), 0, 0)
    if mm.get("dumpable", 1) in (0, 1):
        program.call("prctl dumpable", nr.prctl, prctl.SET_DUMPABLE, mm.get("dumpable", 1), 0, 0, 0)
    if own.get("tsc"):
        program.call("prctl TSC", nr.prctl, prctl.SET_TSC, own["tsc"], 0, 0, 0)
    if own.get("no_cpuid"):
        program.call("arch_prctl CPUID", nr.arch_prctl, prctl.ARCH_SET_CPUID, 0)
    if own.get("mdwe"):
        program.call("prctl MDWE", nr.prctl, prctl.SET_MDWE, own["mdwe"], 0, 0, 0)


def _write(pid: int, name: str, value: str) -> None:
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def set_core_filter(pid: int, value: int) -> None:
    """Choose which mappings go into a core of *pid* (core(5))."""
    _write(pid, "coredump_filter", f"{value:#x}")


def set_outside(pid: int, tc: dict[str, Any], log: Log) -> None:
    """What is written to /proc/PID by the controller. A kernel that refuses is reported; the task can live with it."""
    own = tc.get("firn", {})
    wanted = [("oom_score_adj", tc.get("oom_score_adj"), 10), ("coredump_filter", own.get("coredump_filter"), 16),
              ("autogroup", own.get("session_nice"), 10)]  # fmt: skip
    for name, value, base in wanted:
        if value is None or _proc_number(pid, name, base) == value:
            continue
        try:
            _write(pid, name, f"{value:#x}" if base == 16 else str(value))
        except OSError as error:
            log.warn(f"process {pid}: {name} cannot be set to {value}: {os.strerror(error.errno or 0)}")


def plan_loginuid(program: Program, tc: dict[str, Any]) -> None:
    """The login uid: only a task itself may write it. It cannot be changed back everywhere, so failure is no error."""
    value = tc.get("loginuid")
    if value is None or value == _proc_number(os.getpid(), "loginuid"):
        return
    program.reserve(4, 256)
    path = program.text("/proc/self/loginuid")
    text = str(value if value != _NO_LOGINUID else -1).encode()
    content = program.data(text)
    opened = program.call("open loginuid", nr.open, path, 1, flags=1)
    program.pass_on(opened, 0)
    program.call("write loginuid", nr.write, 0, content, len(text), flags=1)
    program.pass_on(opened, 0)
    program.call("close loginuid", nr.close, 0, flags=1)


def raise_own_limit() -> None:
    """Let firn itself have as many descriptors as it may: it opens, or copies, all those of a tree."""
    # Not by the resource module: to load its shared library costs more than all of this.
    limit = bytearray(16)
    syscall("prlimit of open files", nr.prlimit64, 0, _RLIMIT_NOFILE, 0, address_of(limit))
    if limit[:8] != limit[8:]:
        limit[:8] = limit[8:]
        syscall("prlimit of open files", nr.prlimit64, 0, _RLIMIT_NOFILE, address_of(limit), 0)
