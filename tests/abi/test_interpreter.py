"""The machine code of :mod:`firn.abi.x86_64` and :mod:`firn.restore.birth`, run in a traced process of its own."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from firn.abi import fcntl as fc
from firn.abi import mman, nr, sched
from firn.abi import ptrace as pt
from firn.abi import signal as sig
from firn.abi import x86_64 as cpu
from firn.errors import RestoreError
from firn.restore import birth
from firn.tracee import memory, ptrace
from firn.tracee.program import Program, Runner, Scratch

SIZE = 1 << 16
CODE = 0x10000000
ANYWHERE = (1 << 64) - 1
FLAGS = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE


def _spawn() -> int:
    """A stub with a pid that nobody has."""
    number = int(Path("/proc/sys/kernel/ns_last_pid").read_text())
    for pid in range(number + 200, number + 300):
        try:
            birth.check_pids([pid])
            birth.spawn(pid, False)
        except RestoreError:
            continue
        return pid
    raise AssertionError("a hundred pids are taken")


def _settle(pid: int) -> tuple[Runner, Scratch]:
    runner = Runner(pid, pid, ptrace.get_regs(pid))
    ptrace.set_sigmask(pid, runner.mask())
    rx, rw = mman.PROT_READ | mman.PROT_EXEC, mman.PROT_READ | mman.PROT_WRITE
    assert runner.single(birth.SYSCALL_SITE, nr.mmap, CODE, mman.PAGE, rx, FLAGS, ANYWHERE, 0) == CODE
    assert runner.single(birth.SYSCALL_SITE, nr.mmap, CODE + mman.PAGE, SIZE, rw, FLAGS, ANYWHERE, 0)
    memory.force_write(pid, CODE, cpu.INTERPRETER)
    return runner, Scratch(pid, CODE, CODE + mman.PAGE, SIZE)


@pytest.fixture(autouse=True)
def reaped() -> Iterator[None]:
    """What a stub has made is left to us when it ends, if an earlier test has made us a reaper."""
    yield
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@pytest.fixture
def stub() -> Iterator[tuple[Runner, Scratch]]:
    """A traced process that does nothing of its own."""
    pid = _spawn()
    try:
        yield _settle(pid)
    finally:
        birth.kill([[pid]])


@pytest.fixture
def program(stub: tuple[Runner, Scratch]) -> Program:
    runner, scratch = stub
    return Program(runner, scratch, scratch.data, SIZE // 2)


# ---- the stub


def test_the_stub_has_its_pid(stub: tuple[Runner, Scratch]) -> None:
    pid = stub[0].pid
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "memfd:stub" in maps and "libc" not in maps


def test_the_stub_is_an_elf_file(tmp_path: Path) -> None:
    path = tmp_path / "stub"
    path.write_bytes(birth.stub_image())
    shown = subprocess.run(["readelf", "-hlW", path], capture_output=True, text=True, check=False)
    if shown.returncode == 0:
        assert "EXEC" in shown.stdout and "X86-64" in shown.stdout and not shown.stderr
    assert birth.stub_image()[birth.SYSCALL_SITE - 0x10000 :].startswith(cpu.SYSCALL_INSTRUCTION)


def test_a_taken_pid_is_named() -> None:
    with pytest.raises(RestoreError, match=str(os.getpid())):
        birth.spawn(os.getpid(), False)
    with pytest.raises(RestoreError, match=str(os.getpid())):
        birth.check_pids([os.getpid()])
    maximum = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(RestoreError, match="limit"):
        birth.check_pids([maximum])


def test_the_stub_dies_with_its_tracer() -> None:
    """PTRACE_O_EXITKILL: what a killed restore has made is gone."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, struct.pack("<i", _spawn()))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    pid: int = struct.unpack("<i", os.read(reader, 4))[0]
    os.close(reader)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        signal.sigtimedwait([], 0.005)
    raise AssertionError(f"stub {pid} lives")


# ---- the interpreter


def test_results_are_stored(program: Program) -> None:
    pid = program.call("getpid", nr.getpid)
    size = program.buffer(8)
    pipe = program.call("pipe2", nr.pipe2, size, 0)
    program.run()
    assert program.results[pid] == program.runner.pid and program.results[pipe] == 0
    ends = struct.unpack("<ii", program.read(size, 8))
    text = program.text("through")
    program.call("write", nr.write, ends[1], text, 8)
    there = program.buffer(8)
    read = program.call("read", nr.read, ends[0], there, 100)
    program.run()
    assert program.results[read] == 8 and program.read(there, 8) == b"through\0"


def test_all_six_arguments_arrive(program: Program) -> None:
    """mmap(2) with everything set, of a memfd at an offset."""
    name = program.text("six")
    file = program.call("memfd_create", nr.memfd_create, name, 0)
    program.run()
    fd, at, flags = program.results[file], CODE + (64 << 20), mman.MAP_SHARED | mman.MAP_FIXED
    program.call("ftruncate", nr.ftruncate, fd, 3 * mman.PAGE)
    word = program.data(b"sixth argument")
    program.call("pwrite64", nr.pwrite64, fd, word, 14, 2 * mman.PAGE)
    mapped = program.call("mmap", nr.mmap, at, mman.PAGE, mman.PROT_READ, flags, fd, 2 * mman.PAGE)
    program.run()
    assert program.results[mapped] == at and memory.read(program.runner.pid, at, 14) == b"sixth argument"


def test_large_results_are_no_errors(program: Program) -> None:
    name = program.text("far")
    file = program.call("memfd_create", nr.memfd_create, name, 0)
    program.run()
    far = program.call("lseek", nr.lseek, program.results[file], 1 << 40, os.SEEK_SET)
    program.run()
    assert program.results[far] == 1 << 40


def test_a_failing_call_ends_the_program(program: Program) -> None:
    """The error has the label and the task; calls before it were made, none after it."""
    mark = program.buffer(8)
    source = program.data(b"12345678")
    program.call("close of nothing", nr.close, 12345)
    program.copy(source, mark)
    with pytest.raises(OSError, match=rf"close of nothing in task {program.runner.tid}.*Bad file descriptor") as caught:
        program.run()
    assert caught.value.errno == errno.EBADF
    assert program.read(mark, 8) == bytes(8)
    assert program.results[-1] == -errno.EBADF


def test_a_program_goes_on_after_a_failed_one(program: Program) -> None:
    program.call("close", nr.close, 12345)
    with pytest.raises(OSError):
        program.run()
    pid = program.call("getpid", nr.getpid)
    program.run()
    assert program.results[pid] == program.runner.pid


def test_an_allowed_errno(program: Program) -> None:
    first = program.call("close", nr.close, 12345, allow=errno.EBADF)
    last = program.call("getpid", nr.getpid)
    program.run()
    assert program.results[first] == -errno.EBADF and program.results[last] == program.runner.pid
    program.call("close", nr.close, 12345, allow=errno.EPERM)
    with pytest.raises(OSError):
        program.run()


def test_ignored_errors(program: Program) -> None:
    calls = [program.call("close", nr.close, 12345, flags=cpu.F_IGNORE) for _ in range(3)]
    program.call("getpid", nr.getpid)
    program.run()
    assert [program.results[call] for call in calls] == [-errno.EBADF] * 3


def test_copying_a_result_into_an_argument(program: Program) -> None:
    """dup(2) twice: the second call's argument is the first one's result."""
    program.reserve(8, 256)
    name = program.text("copied")
    file = program.call("memfd_create", nr.memfd_create, name, 0)
    program.pass_on(file, 0)
    found = program.call("fcntl", nr.fcntl, 9999, fc.F_GETFL)
    program.run()
    assert program.results[found] & fc.O_RDWR
    assert os.readlink(f"/proc/{program.runner.pid}/fd/{program.results[file]}").startswith("/memfd:copied")


def test_a_full_area_runs_by_itself(stub: tuple[Runner, Scratch]) -> None:
    runner, scratch = stub
    small = Program(runner, scratch, scratch.data, 1024)
    calls = [small.call("getpid", nr.getpid) for _ in range(100)]
    small.run()
    assert [small.results[call] for call in calls] == [runner.pid] * 100
    with pytest.raises(MemoryError):
        small.data(bytes(2000))


def test_an_empty_program(program: Program) -> None:
    program.run()
    assert program.results == []


@pytest.mark.parametrize("shared", [sched.CLONE_VM, 0])
def test_the_child_flag(program: Program, shared: int) -> None:
    """A child that shares the record stops without storing its result; the parent's is the child's pid."""
    ptrace.request("options", pt.SETOPTIONS, program.runner.pid, 0, pt.O_TRACESYSGOOD | pt.O_TRACECLONE | pt.O_EXITKILL)
    call = program.call("clone", nr.clone, shared, 0, 0, 0, 0, flags=cpu.F_CHILD)
    own = program.call("getpid", nr.getpid)
    program.run()
    child = program.results[call]
    try:
        assert child > 0 and program.results[own] == program.runner.pid
        while ptrace.wait_stop(child).event != pt.EVENT_STOP:
            ptrace.request("continue", pt.CONT, child)
        ptrace.request("continue", pt.CONT, child)
        runner = Runner(child, child, program.runner.base, program.runner.stop_signal)
        at = runner.finish(program.scratch.code)
        assert at == program.area + call * cpu.RECORD_SIZE, "it stopped elsewhere than at its birth"
        assert ptrace.get_regs(child)[cpu.AX] != child
        again = Program(runner, program.scratch, program.scratch.data + SIZE // 2, 4096)
        if not shared:
            again.scratch = Scratch(child, program.scratch.code, program.scratch.data, SIZE)
        pid = again.call("getpid", nr.getpid)
        again.run()
        assert again.results[pid] == child
    finally:
        birth.kill([[child]])


def test_registers_that_are_the_task_s_own(program: Program) -> None:
    """The interpreter uses neither the stack nor rbp, r13, r14."""
    runner = program.runner
    regs = list(runner.base)
    for register, value in ((cpu.SP, 0x1234560), (cpu.BP, 0x777), (cpu.R13, 0x1313), (cpu.R14, 0x1414)):
        regs[register] = value
    runner.base = tuple(regs)
    program.call("getpid", nr.getpid)
    program.run()
    now = ptrace.get_regs(runner.tid)
    for register in (cpu.SP, cpu.BP, cpu.R13, cpu.R14):
        assert now[register] == regs[register], cpu.REG_NAMES[register]


def test_a_single_call(stub: tuple[Runner, Scratch]) -> None:
    runner, scratch = stub
    site = scratch.code + cpu.SYSCALL_AT
    assert runner.single(site, nr.getpid) == runner.pid
    with pytest.raises(OSError) as caught:
        runner.single(site, nr.close, 12345)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("number", [sig.SIGWINCH, sig.SIGURG, sig.SIGCHLD])
def test_other_signals_that_end_a_program(stub: tuple[Runner, Scratch], number: int) -> None:
    old, scratch = stub
    runner = Runner(old.pid, old.tid, old.base, number)
    ptrace.set_sigmask(runner.tid, runner.mask())
    program = Program(runner, scratch, scratch.data, 4096)
    pid = program.call("getpid", nr.getpid)
    program.run()
    assert program.results[pid] == runner.pid
    assert not runner.seen


def test_a_signal_action_of_the_own_process_takes_nothing(program: Program) -> None:
    """One's own end comes after one's own actions; those of another thread would discard the signal that ends it."""
    ignored = program.data(sig.SIGACTION.pack(sig.SIG_IGN, 0, 0, 0))
    for _ in range(50):
        program.call("rt_sigaction", nr.rt_sigaction, program.runner.stop_signal, ignored, 0, 8)
    pid = program.call("getpid", nr.getpid)
    program.run()
    assert program.results[pid] == program.runner.pid


def test_offsets() -> None:
    """What others derive from the code is where they think it is."""
    assert cpu.INTERPRETER[cpu.SYSCALL_AT :].startswith(cpu.SYSCALL_INSTRUCTION)
    assert cpu.INTERPRETER[cpu.STOPPED_AT - 2 :].startswith(cpu.SYSCALL_INSTRUCTION)
    assert cpu.RECORD.size == cpu.RECORD_SIZE and cpu.RESULT_OFFSET == cpu.RECORD_SIZE - 8
    assert len(cpu.INTERPRETER) > cpu.EXIT_AT
    assert cpu.INTERPRETER[cpu.EXIT_AT] == 0xB8, "the way out begins with a mov to eax"


# ---- the way home

STATUS_FLAGS = (0x001, 0x004, 0x010, 0x040, 0x080, 0x800)
"""Carry, parity, adjust, zero, sign, overflow (Intel SDM vol. 1, 3.4.3.1)."""


def _go_home(stub: tuple[Runner, Scratch], flags: int, pending: int) -> None:
    """Registers and mask are those that the code was made for when it arrives, and *pending* is thrown away."""
    runner, scratch = stub
    tid, at, mask = runner.tid, scratch.code + 1024, 0xFFFF0F0FFFF0FFFF & ~(1 << 8 | 1 << 18)
    breakpoint_ = scratch.code + 2048
    wanted = list(runner.base)
    for register in range(cpu.R15, cpu.DI + 1):
        wanted[register] = 0x8123456789ABCD00 + register
    wanted[cpu.BP], wanted[cpu.SP] = 0x1111, 0x2222
    wanted[cpu.FLAGS] = 0x202 | flags
    wanted[cpu.IP] = breakpoint_
    unwanted = sig.bit(pending) if pending else 0
    memory.force_write(tid, at, cpu.way_home(tuple(wanted), mask, unwanted))
    memory.force_write(tid, breakpoint_, b"\xcc")
    ptrace.set_sigmask(tid, sig.ALL)
    if pending:
        os.kill(tid, pending)
    regs = runner.registers(ip=at)
    for register in (cpu.BP, cpu.SP, cpu.R13, cpu.R14):
        regs[register] = wanted[register]
    ptrace.set_regs(tid, regs)
    ptrace.request("continue", pt.CONT, tid)
    stop = ptrace.wait_stop(tid)
    assert (stop.signal, stop.event) == (sig.SIGTRAP, 0)
    now = list(ptrace.get_regs(tid))
    assert ptrace.get_sigmask(tid) & ~sig.bit(sig.SIGTRAP) == mask & ~sig.bit(sig.SIGTRAP)
    wanted[cpu.IP] += 1
    wanted[cpu.FLAGS], now[cpu.FLAGS] = flags, now[cpu.FLAGS] & sum(STATUS_FLAGS)
    wanted[cpu.ORIG_AX] = now[cpu.ORIG_AX]
    differ = [cpu.REG_NAMES[i] for i in range(len(now)) if now[i] != wanted[i]]
    assert not differ, differ
    assert not ptrace.pending_signals(tid, shared=True)


@pytest.mark.parametrize("flags", [0, *STATUS_FLAGS, sum(STATUS_FLAGS), 0x841, 0x094])
def test_the_way_home(stub: tuple[Runner, Scratch], flags: int) -> None:
    _go_home(stub, flags, 0)


def test_the_way_home_throws_away_what_ended_the_program(stub: tuple[Runner, Scratch]) -> None:
    _go_home(stub, 0, sig.SIGWINCH)


def test_the_way_home_fits() -> None:
    regs = tuple(range(len(cpu.REG_NAMES)))
    assert len(cpu.way_home(regs, sig.ALL, sig.ALL)) <= cpu.HOME_SIZE
    code = cpu.one_call(regs, 5)
    assert len(code) <= cpu.HOME_SIZE and cpu.is_one_call(code)
    assert not cpu.is_one_call(cpu.way_home(regs, 5)) and not cpu.is_one_call(bytes(cpu.HOME_SIZE))


def test_a_stub_is_born_of_a_program_with_threads() -> None:
    """The newborn has only the thread that made it, and must neither wait for what another one held nor give it away
    to one that has asked for it."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            pass

    busy = [threading.Thread(target=work) for _ in range(3)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in busy:
        thread.start()
    try:
        for _ in range(20):
            birth.kill([[_spawn()]])
    finally:
        sys.setswitchinterval(usual)
        ended.set()
        for thread in busy:
            thread.join()
