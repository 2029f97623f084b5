"""Rare settings of single threads: saved where the kernel can tell and set them, an obstacle where it can only tell.

Saved (images: firn_thread): NUMA policy of the thread (get_mempolicy(2), set_mempolicy(2)) and speculation control
(/proc/PID/status, PR_SET_SPECULATION_CTRL). Obstacles: syscall user dispatch (ptrace(2)
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: a call of ours inside the task would be sent to its handler), rights to I/O
ports (regset NT_386_IOPERM), address tagging (untag_mask in status), core-scheduling cookies (PR_SCHED_CORE), thread
and process keyrings that exist (keyctl(2)), rings that only the thread knows (io_uring_register(2)), Landlock domains.

A Landlock domain is shown nowhere. But a restricted thread may trace only what is in its own domain, and kcmp(2) asks
just that: so every thread compares itself with a process that it might trace otherwise: us, if it has CAP_SYS_PTRACE,
else a child of ours with its ids and no capabilities.

What goes wrong: iopl(2) and L1D flushing are not seen. A NUMA policy of nodes that this machine does not have is left
out.
"""

from __future__ import annotations

import errno
import os
import time

from firn.abi import nr, prctl
from firn.abi import policies as pol
from firn.abi import ptrace as pt
from firn.abi.libc import address_of, syscall
from firn.errors import Obstacle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

_NODES = 1024
_MASK = _NODES // 8
_SPECULATION = (("Speculation_Store_Bypass", 0), ("SpeculationIndirectBranch", 1))
"""Line of status, PR_SPEC_* number."""
_CONTROLS = {
    "thread mitigated": prctl.SPEC_DISABLE, "thread force mitigated": prctl.SPEC_FORCE_DISABLE,
    "conditional disabled": prctl.SPEC_DISABLE, "conditional force disabled": prctl.SPEC_FORCE_DISABLE,
}  # fmt: skip
"""What status says (fs/proc/array.c) and the control that a thread has set."""
_CAP_SYS_PTRACE = 19


class Partners:
    """Processes that a thread with certain ids and without Landlock may trace."""

    def __init__(self) -> None:
        self._pids: dict[tuple[int, int], int] = {}
        try:
            version = syscall("landlock version", nr.landlock_create_ruleset, 0, 0, pol.LANDLOCK_CREATE_RULESET_VERSION)
        except OSError:
            version = 0
        self.exists = version > 0

    def of(self, status: dict[str, str]) -> int:
        """The partner for a thread with *status* (/proc/PID/status); 0: there is no Landlock."""
        if not self.exists:
            return 0
        if int(status["CapEff"], 16) >> _CAP_SYS_PTRACE & 1:
            return os.getpid()
        ids = int(status["Uid"].split()[0]), int(status["Gid"].split()[0])
        if ids not in self._pids:
            self._pids[ids] = _partner(*ids)
        return self._pids[ids]

    def close(self) -> None:
        """End them."""
        while self._pids:
            pid = self._pids.popitem()[1]
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _partner(uid: int, gid: int) -> int:
    """A child with these ids and no capabilities. A program that only sleeps is cheaper than a fork of ours, after
    which each page that we touch would have to be copied while the target stands still."""
    real = os.getresuid()[0], os.getresgid()[0]
    if uid:
        try:
            os.setresgid(gid, -1, -1)
            os.setresuid(uid, -1, -1)
            return os.posix_spawn(_SLEEPER[0], _SLEEPER[1:], {}, resetids=True)
        except OSError:
            pass  # there is no such program, or it is not for everybody
        finally:
            os.setresuid(real[0], -1, -1)
            os.setresgid(real[1], -1, -1)
    return _forked(uid, gid)


_SLEEPER = ("/bin/sleep", "sleep", "600")


def _forked(uid: int, gid: int) -> int:
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        _be_partner(uid, gid, done)
    os.close(done)
    os.read(ready, 1)
    os.close(ready)
    return pid


def _be_partner(uid: int, gid: int, done: int) -> None:
    try:
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        none = bytearray(prctl.CAP_DATA.size)
        header = bytearray(prctl.CAP_HEADER.pack(prctl.CAP_VERSION_3, 0))
        syscall("capset", nr.capset, address_of(header), address_of(none))
        syscall("prctl", nr.prctl, prctl.SET_DUMPABLE, 1, 0, 0, 0)
        syscall("prctl", nr.prctl, prctl.SET_PDEATHSIG, 9, 0, 0, 0)
        os.close(done)
        while True:
            time.sleep(3600)
    finally:
        os._exit(1)


def look(pid: int, statuses: dict[int, dict[str, str]], obstacles: list[Obstacle]) -> None:
    """Note what nobody can set again; *statuses* are those of the threads of frozen process *pid*. Nothing of ours has
    run in it yet."""
    for tid, status in statuses.items():
        for reason, help in _obstacles(tid, status):
            obstacles.append(Obstacle(f"process {pid}: thread {tid}", reason, help))


_absent: set[int] = set()
"""What this kernel or machine has not; nobody is asked about it twice."""


def _obstacles(tid: int, status: dict[str, str]) -> list[tuple[str, str]]:
    found = []
    config = bytearray(pol.SYSCALL_USER_DISPATCH_CONFIG.size)
    get_dispatch = pt.GET_SYSCALL_USER_DISPATCH_CONFIG
    if _told(nr.ptrace, get_dispatch, tid, len(config), address_of(config)) and any(config[:8]):
        found.append(("has syscall user dispatch, which a dump would run into", "turn it off for the dump (prctl)"))
    ports = bytearray(8)
    vector = bytearray(address_of(ports).to_bytes(8, "little") + len(ports).to_bytes(8, "little"))
    if _told(nr.ptrace, pt.GETREGSET, tid, pt.NT_386_IOPERM, address_of(vector)):
        found.append(("has rights to I/O ports (ioperm), which images cannot hold", "give them back for the dump"))
    if int(status.get("untag_mask", "0xffffffffffffffff"), 16) != 0xFFFFFFFFFFFFFFFF:
        found.append(("uses tagged addresses (LAM), which images cannot hold", "run it without"))
    cookie = bytearray(8)
    if _told(nr.prctl, prctl.SCHED_CORE, prctl.SCHED_CORE_GET, tid, 0, address_of(cookie)) and any(cookie):
        found.append(("has a core-scheduling cookie, which images cannot hold", "start it without (coresched)"))
    return found


def _told(number: int, code: int, *args: int) -> bool:
    """Whether the call tells anything; *code* is its first argument."""
    if code in _absent:
        return False
    try:
        syscall("look", number, code, *args)
    except OSError as error:
        if error.errno != errno.ENXIO:  # that it is off
            _absent.add(code)
        return False
    return True


class Asked:
    """Where the answers of one thread lie."""

    __slots__ = ("at", "keyrings", "landlock", "policy", "ring", "switches")

    def __init__(
        self, at: int, policy: int, keyrings: list[int], landlock: int, ring: int, switches: tuple[int, ...]
    ) -> None:
        self.at = at
        self.policy = policy
        self.keyrings = keyrings
        self.landlock = landlock
        self.ring = ring
        self.switches = switches


SIZE = 12 * 64 + _MASK + 64
"""Bytes that :func:`ask` takes of a program."""


def ask(program: Program, partner: int) -> Asked:
    """Add the calls that only the thread itself can make; *partner*: see :class:`Partners`."""
    program.reserve(11, _MASK + 16)
    at = program.buffer(_MASK + 16)
    policy = program.call("get_mempolicy", nr.get_mempolicy, at, at + 8, _NODES + 1, 0, 0, flags=1)
    keyrings = [
        program.call("keyctl", nr.keyctl, pol.KEYCTL_GET_KEYRING_ID, ring, 0, 0, 0, flags=1)
        for ring in (pol.KEY_SPEC_THREAD_KEYRING, pol.KEY_SPEC_PROCESS_KEYRING)
    ]
    landlock = -1
    if partner:
        own = program.call("gettid", nr.gettid)
        program.pass_on(own, 0)
        landlock = program.call("kcmp", nr.kcmp, 0, partner, 1, 0, 0, flags=1)
    ring = program.call("io_uring_enter", nr.io_uring_enter, 0, 0, 0, pol.IORING_ENTER_REGISTERED_RING, 0, 0, flags=1)
    program.call("prctl TSC", nr.prctl, prctl.GET_TSC, at + _MASK + 8, 0, 0, 0, flags=1)
    switches = (
        program.call("arch_prctl", nr.arch_prctl, prctl.ARCH_GET_CPUID, 0, flags=1),
        program.call("prctl mce kill", nr.prctl, prctl.MCE_KILL_GET, 0, 0, 0, 0, flags=1),
        program.call("prctl io flusher", nr.prctl, prctl.GET_IO_FLUSHER, 0, 0, 0, 0, flags=1),
    )
    return Asked(at, policy, keyrings, landlock, ring, switches)


def answer(
    program: Program, asked: Asked, pid: int, tid: int, status: dict[str, str], obstacles: list[Obstacle]
) -> dict[str, Any]:
    """firn's own fields of the thread; adds to *obstacles*."""
    what, results = f"process {pid}: thread {tid}", program.results
    for name, call in zip(("thread", "process"), asked.keyrings, strict=True):
        if results[call] > 0:
            reason = f"has a {name} keyring of its own (keyctl), which images cannot hold"
            obstacles.append(Obstacle(what, reason, "use the session's or the user's keyring"))
    if asked.landlock >= 0 and results[asked.landlock] == -errno.EPERM:
        reason = "may not see processes of its own user: Landlock restricts it, which nobody can read or set again"
        obstacles.append(Obstacle(what, reason, "start it without Landlock"))
    if _has_ring(program, asked.ring):
        reason = "has an io_uring for itself (IORING_REGISTER_RING_FDS), whose requests live in the kernel"
        obstacles.append(Obstacle(what, reason, "have it give that up before the dump"))
    fields: dict[str, Any] = {}
    raw = program.read(asked.at, _MASK + 16)
    mode = int.from_bytes(raw[:4], "little")
    if results[asked.policy] == 0 and mode != pol.MPOL_DEFAULT:
        fields |= {"numa_mode": mode, "numa_nodes": raw[8 : _MASK + 8].rstrip(b"\0")}
    speculation = [which << 16 | _CONTROLS[status[name]] for name, which in _SPECULATION
                   if status.get(name) in _CONTROLS]  # fmt: skip
    cpuid, mce, flusher = (results[call] for call in asked.switches)
    # The kernel that does not know a switch, or does not tell us, has it as it is from the start.
    switches = Switches(raw[_MASK + 8] or 1, cpuid == 0, mce if mce >= 0 else 2, flusher == 1).word()
    if switches != Switches().word():
        fields["switches"] = switches
    return fields | ({"speculation": speculation} if speculation else {})


class Switches:
    """Settings that every thread has for itself: whether it may read the time-stamp counter (PR_SET_TSC: 1, or 2 for
    no), not use CPUID, its machine-check policy (PR_MCE_KILL_*: 2 is none), whether it is an I/O flusher."""

    __slots__ = ("flusher", "mce", "no_cpuid", "tsc")

    def __init__(self, tsc: int = 1, no_cpuid: bool = False, mce: int = 2, flusher: bool = False) -> None:
        self.tsc = tsc
        self.no_cpuid = no_cpuid
        self.mce = mce
        self.flusher = flusher

    def word(self) -> int:
        """All of them as the images have it."""
        return self.tsc | self.no_cpuid << 2 | self.mce << 3 | self.flusher << 5

    @classmethod
    def of(cls, core: dict[str, Any]) -> Switches:
        """Those of a thread_core_entry."""
        word = core.get("firn", {}).get("switches") or cls().word()
        return cls(word & 3, bool(word >> 2 & 1), word >> 3 & 3, bool(word >> 5 & 1))


def plan_switches(program: Program, core: dict[str, Any], leader: dict[str, Any]) -> None:
    """The calls of a thread other than *leader*, from whose it has the policy and whether it flushes so far."""
    own, theirs = Switches.of(core), Switches.of(leader)
    if own.tsc != 1:
        program.call("prctl TSC", nr.prctl, prctl.SET_TSC, own.tsc, 0, 0, 0)
    if own.no_cpuid:
        program.call("arch_prctl CPUID", nr.arch_prctl, prctl.ARCH_SET_CPUID, 0)
    if own.mce != theirs.mce:
        program.call("prctl mce kill", nr.prctl, prctl.MCE_KILL, prctl.MCE_KILL_SET, own.mce, 0, 0)
    if own.flusher != theirs.flusher:
        program.call("prctl io flusher", nr.prctl, prctl.SET_IO_FLUSHER, own.flusher, 0, 0, 0)


def _has_ring(program: Program, first: int) -> bool:
    """Whether the thread has a ring registered, at the place that call *first* has tried or at another one. That may
    be a ring which no descriptor or mapping leads to. To enter it without anything to do has no effect."""
    if program.results[first] in (-errno.EINVAL, -errno.ENOSYS, -errno.EPERM, -errno.EACCES):
        return False  # it has never used a ring, or the kernel (before 5.18) has no such registrations
    program.reserve(pol.IO_RINGFD_REG_MAX, 0)
    tried = [first]
    for place in range(1, pol.IO_RINGFD_REG_MAX):
        flag = pol.IORING_ENTER_REGISTERED_RING
        tried.append(program.call("io_uring_enter", nr.io_uring_enter, place, 0, 0, flag, 0, 0, flags=1))
    program.run()
    return any(program.results[call] != -errno.EBADF for call in tried)


def plan(program: Program, core: dict[str, Any]) -> None:
    """The calls of the restored thread."""
    own = core.get("firn", {})
    if own.get("numa_mode"):
        program.reserve(1, _MASK)
        nodes = own.get("numa_nodes", b"")[:_MASK]
        at = program.data(nodes.ljust(_MASK, b"\0")) if nodes else 0
        call = "set_mempolicy"
        program.call(call, nr.set_mempolicy, own["numa_mode"], at, _NODES + 1 if nodes else 0, allow=errno.EINVAL)
    for word in own.get("speculation", []):
        # ENXIO, ENODEV: this processor has nothing to control; EPERM: it is forced for everybody.
        which, control = word >> 16, word & 0xFFFF
        program.call("prctl speculation", nr.prctl, prctl.SET_SPECULATION_CTRL, which, control, 0, 0, flags=1)
