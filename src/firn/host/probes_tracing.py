"""Probes of what a tracer can see and do: ptrace(2), process_vm_readv(2), /proc/PID/mem, seccomp(2).

Like all ``probes_*`` modules, for ``firn check`` alone. A probe returns nothing if the ability is there, a text if it
is there only partly, and raises :class:`OSError` or :class:`KernelError` if it is not. It is run in a child process
made for it, which it may change as it likes: only what outlives that process has to be undone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from firn.abi import mman, nr, prctl, ptrace, signal, x86_64
from firn.abi import probe_consts as pc
from firn.abi.libc import address_of, syscall
from firn.errors import KernelError
from firn.host.features import StoppedChild

_RESUME_FLAG = 1 << 16
"""RF in the flags register (Intel SDM vol. 3, 19.3.1.1)."""


def _request(name: str, code: int, pid: int, addr: int = 0, data: int = 0) -> int:
    return syscall(f"PTRACE_{name}", nr.ptrace, code, pid, addr, data)


def _regset(name: str, code: int, pid: int, note: int, buffer: bytearray) -> int:
    """Get or set a register set; its size in bytes."""
    iov = bytearray(struct.pack("<QQ", address_of(buffer), len(buffer)))
    _request(name, code, pid, note, address_of(iov))
    size: int = struct.unpack("<QQ", iov)[1]
    return size


def seize() -> None:
    """PTRACE_SEIZE and PTRACE_INTERRUPT of a child (Linux 3.4; the sysctl kernel.yama.ptrace_scope can forbid it)."""
    with StoppedChild():
        pass


def signals() -> None:
    """PTRACE_PEEKSIGINFO (Linux 3.10), PTRACE_GETSIGMASK and PTRACE_SETSIGMASK (3.11)."""
    with StoppedChild() as pid:
        mask = bytearray(signal.bit(signal.SIGUSR1).to_bytes(8, "little"))
        _request("SETSIGMASK", ptrace.SETSIGMASK, pid, len(mask), address_of(mask))
        found = bytearray(8)
        _request("GETSIGMASK", ptrace.GETSIGMASK, pid, len(found), address_of(found))
        if found != mask:
            raise KernelError("PTRACE_GETSIGMASK gives another mask than the one that was set")
        os.kill(pid, signal.SIGUSR1)
        args = bytearray(struct.pack("<QIi", 0, ptrace.PEEKSIGINFO_SHARED, 1))
        info = bytearray(signal.SIGINFO_SIZE)
        count = _request("PEEKSIGINFO", ptrace.PEEKSIGINFO, pid, address_of(args), address_of(info))
        if count != 1 or int.from_bytes(info[:4], "little") != signal.SIGUSR1:
            raise KernelError("PTRACE_PEEKSIGINFO does not show a pending signal")


def extended_state() -> None:
    """The vector registers, NT_X86_XSTATE, read and written back."""
    with StoppedChild() as pid:
        area = bytearray(16384)
        size = _regset("GETREGSET", ptrace.GETREGSET, pid, ptrace.NT_X86_XSTATE, area)
        if size < x86_64.XSAVE_MIN:
            raise KernelError(f"NT_X86_XSTATE has only {size} bytes")
        _regset("SETREGSET", ptrace.SETREGSET, pid, ptrace.NT_X86_XSTATE, area[:size])


def syscall_info() -> None:
    """PTRACE_GET_SYSCALL_INFO (Linux 5.3)."""
    with StoppedChild() as pid:
        info = bytearray(88)
        _request("GET_SYSCALL_INFO", pc.PTRACE_GET_SYSCALL_INFO, pid, len(info), address_of(info))
        arch = pc.SYSCALL_INFO_HEAD.unpack_from(info)[1]
        if arch != pc.AUDIT_ARCH_X86_64:
            raise KernelError(f"PTRACE_GET_SYSCALL_INFO says that a 64-bit task is of architecture {arch:#x}")


def _vector(call: int, name: str, pid: int, ours: bytearray, theirs: int) -> None:
    local = bytearray(struct.pack("<QQ", address_of(ours), len(ours)))
    remote = bytearray(struct.pack("<QQ", theirs, len(ours)))
    count = syscall(name, call, pid, address_of(local), 1, address_of(remote), 1, 0)
    if count != len(ours):
        raise KernelError(f"{name} moves {count} bytes of {len(ours)}")


def process_vm() -> None:
    """process_vm_readv(2) and process_vm_writev(2) (Linux 3.2, CONFIG_CROSS_MEMORY_ATTACH)."""
    place = bytearray(b"before it")
    with StoppedChild() as pid:
        _vector(nr.process_vm_writev, "process_vm_writev", pid, bytearray(b"afterward"), address_of(place))
        found = bytearray(len(place))
        _vector(nr.process_vm_readv, "process_vm_readv", pid, found, address_of(place))
    if found != b"afterward" or place != b"before it":
        raise KernelError("process_vm_readv gives other bytes than were written")


def proc_mem() -> None:
    """Writing through /proc/PID/mem, also where the task itself may only read (boot option proc_mem.force_override)."""
    page = mmap.mmap(-1, mman.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    syscall("mprotect", nr.mprotect, address, mman.PAGE, mman.PROT_READ)
    with StoppedChild() as pid:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, b"firn", address)
            found = os.pread(fd, 4, address)
        finally:
            os.close(fd)
    if found != b"firn":
        raise KernelError("/proc/PID/mem does not keep what is written")


def seccomp_filters() -> None:
    """PTRACE_SECCOMP_GET_FILTER (Linux 4.4): the filter of a child, which allows everything, read back."""
    allow = pc.BPF_RETURN.pack(pc.BPF_RET_K, 0, 0, pc.SECCOMP_RET_ALLOW)

    def restrict() -> None:
        code = bytearray(allow)
        program = bytearray(pc.SOCK_FPROG.pack(1, address_of(code)))
        syscall("PR_SET_NO_NEW_PRIVS", nr.prctl, prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        syscall("seccomp", nr.seccomp, prctl.SECCOMP_SET_MODE_FILTER, 0, address_of(program))

    with StoppedChild(before=restrict) as pid:
        found = bytearray(64)
        count = _request("SECCOMP_GET_FILTER", ptrace.SECCOMP_GET_FILTER, pid, 0, address_of(found))
    if count != 1 or found[: len(allow)] != allow:
        raise KernelError("PTRACE_SECCOMP_GET_FILTER gives another filter than the one that was set")


def _code(code: bytes) -> tuple[mmap.mmap, int]:
    """A page of memory that can be executed, and its address."""
    rights = mman.PROT_READ | mman.PROT_WRITE | mman.PROT_EXEC
    page = mmap.mmap(-1, mman.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, rights)
    page[: len(code)] = code
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))


def breakpoints() -> None:
    """Hardware breakpoints: a debug register of a child set on code that it then reaches (SIGTRAP, not SIGILL)."""
    _page, address = _code(b"\x0f\x0b")  # ud2
    with StoppedChild() as pid:
        _request("POKEUSER", pc.PTRACE_POKEUSER, pid, pc.USER_DEBUGREG, address)
        _request("POKEUSER", pc.PTRACE_POKEUSER, pid, pc.USER_DEBUGREG + 7 * 8, 1)
        regs = bytearray(x86_64.REGS.size)
        _regset("GETREGSET", ptrace.GETREGSET, pid, ptrace.NT_PRSTATUS, regs)
        values = list(x86_64.REGS.unpack(regs))
        values[x86_64.ORIG_AX] = x86_64.NO_SYSCALL
        values[x86_64.IP] = address
        # A child that was interrupted at a page fault has RF set, which lets one breakpoint pass.
        values[x86_64.FLAGS] &= ~_RESUME_FLAG
        regs[:] = x86_64.REGS.pack(*values)
        _regset("SETREGSET", ptrace.SETREGSET, pid, ptrace.NT_PRSTATUS, regs)
        _request("CONT", ptrace.CONT, pid)
        _, status = os.waitpid(pid, ptrace.WALL)
        stopped_by = status >> 8 & 0xFF
    if stopped_by != signal.SIGTRAP:
        raise KernelError(f"a hardware breakpoint is passed over (the child stops with signal {stopped_by})")


def compat_tasks() -> str:
    """Whether 32-bit system calls work (CONFIG_IA32_EMULATION); without them the probe dies of SIGSEGV."""
    _page, address = _code(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
    if ctypes.CFUNCTYPE(ctypes.c_int)(address)() != os.getpid():
        raise KernelError("32-bit system calls give wrong results")
    return "the kernel runs 32-bit tasks, but firn does not save them yet"
