"""x86-64: register sets, and the machine code that runs inside a task: an interpreter of system-call programs, and ways
back into the task's own work.

Sources: arch/x86/include/asm/user_64.h (user_regs_struct), Intel SDM vol. 1 chapter 13 (XSAVE area), vol. 2
(instructions).
"""

from __future__ import annotations

import struct

REGS = struct.Struct("<27Q")
"""struct user_regs_struct, 216 bytes, as NT_PRSTATUS gives it."""
REG_NAMES = (
    "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di", "orig_ax", "ip",
    "cs", "flags", "sp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
(R15, R14, R13, R12, BP, BX, R11, R10, R9, R8, AX, CX, DX, SI, DI, ORIG_AX, IP, CS, FLAGS, SP, SS, FS_BASE, GS_BASE,
 DS, ES, FS, GS) = range(27)  # fmt: skip
USER_CS = 0x33
USER_SS = 0x2B
NO_SYSCALL = (1 << 64) - 1
TRAP_FLAG = 0x100
"""TF of the flags register: a trap after every instruction (include/uapi/asm/processor-flags.h)."""

SYSCALL_INSTRUCTION = b"\x0f\x05"

# -- The interpreter ------------------------------------------------------------------------------------------------
# A program is an array of 64-byte records. rbx walks it; r15 holds the signal that ends it, r12 where to go if nobody
# traces the task any more: its way home (below), or EXIT_AT for a task that has no home.
#
# It ends by sending itself a signal whose default action is to be ignored, because a traced task stops for such a
# signal and an untraced one does not: when the controller dies in the middle, the task finishes the program, falls
# through the stop and returns to its own work. A breakpoint would kill it there, and would also reset the task's
# SIGTRAP handler where SIGTRAP is blocked or ignored (force_sig_info_to_task in kernel/signal.c). The stack is not
# used, and neither are rbp, rsp, r13, r14.
RECORD = struct.Struct("<IHH6QQ")
"""A record: number, flags, allowed errno, six arguments, result."""
RECORD_SIZE = 64
RESULT_OFFSET = 56
F_IGNORE = 1
"""Go on whatever the result is."""
F_CHILD = 2
"""The task that finds the result 0 stops without storing it: after clone(2) parent and child may share the record."""
F_COPY = 4
"""Not a call: copy 8 bytes from address args[0] to address args[1]."""
F_END = 8
"""Not a call: the program ends here."""

INTERPRETER = bytes.fromhex(
    "0fb74b04"  # loop:  movzx ecx, word [rbx+4]
    "f6c104"  #         test cl, F_COPY
    "757c"  #           jnz copy
    "f6c108"  #         test cl, F_END
    "754c"  #           jnz stop
    "8b03"  #           mov eax, [rbx]
    "488b7b08"  #       mov rdi, [rbx+8]
    "488b7310"  #       mov rsi, [rbx+16]
    "488b5318"  #       mov rdx, [rbx+24]
    "4c8b5320"  #       mov r10, [rbx+32]
    "4c8b4328"  #       mov r8, [rbx+40]
    "4c8b4b30"  #       mov r9, [rbx+48]
    "0f05"  #           syscall
    "f6430402"  #       test byte [rbx+4], F_CHILD
    "740e"  #           jz store
    "4885c0"  #         test rax, rax
    "7509"  #           jnz store
    "4c8d2534000000"  # lea r12, [rip+exit]; a child must not go its parent's way home
    "eb1c"  #           jmp stop
    "48894338"  # store: mov [rbx+56], rax
    "483d01f0ffff"  #   cmp rax, -4095
    "7232"  #           jb next
    "f6430401"  #       test byte [rbx+4], F_IGNORE
    "752c"  #           jnz next
    "0fb74b06"  #       movzx ecx, word [rbx+6]
    "f7d8"  #           neg eax
    "39c8"  #           cmp eax, ecx
    "7422"  #           je next
    "b8ba000000"  # stop: mov eax, 186 (gettid)
    "0f05"  #           syscall
    "89c7"  #           mov edi, eax
    "4489fe"  #         mov esi, r15d
    "b8c8000000"  #     mov eax, 200 (tkill)
    "0f05"  #           syscall; a traced task stops here
    "41ffe4"  #         jmp r12
    "b8e7000000"  # exit: mov eax, 231 (exit_group)
    "bf01000000"  #     mov edi, 1
    "0f05"  #           syscall
    "4883c340"  # next: add rbx, 64
    "e97bffffff"  #     jmp loop
    "488b7b08"  # copy: mov rdi, [rbx+8]
    "488b7310"  #       mov rsi, [rbx+16]
    "488b07"  #         mov rax, [rdi]
    "488906"  #         mov [rsi], rax
    "ebe7"  #           jmp next
)
STOPPED_AT = INTERPRETER.index(bytes.fromhex("41ffe4"))
"""Offset of the instruction at which a finished (or failed) program is seen stopped."""
EXIT_AT = STOPPED_AT + 3
"""Offset of the way out for a task that has no home."""
SYSCALL_AT = INTERPRETER.index(bytes.fromhex("0f05f64304"))
"""Offset of a system-call instruction, for single calls made by register changes alone."""

# -- The way home -----------------------------------------------------------------------------------------------------
# Code that gives a thread its own mask and registers and goes on with its own work. rt_sigreturn(2) would need a frame
# on a stack, the extended state, the alternate stack and, where the CPU keeps one, the shadow stack; and it throws away
# the kernel's restart block, so that an interrupted nanosleep(2) could not go on.
#
# Arithmetic flags come back without a stack: al is 1 if the overflow flag was set, and adding 0x7f sets it again; sahf
# brings the others and leaves that one alone. syscall, mov and jmp change no flags.
_HOME_FLAGS = bytes.fromhex(
    "b800000000"  #     mov eax, flags << 8 | overflow
    "047f"  #           add al, 0x7f
    "9e"  #             sahf
)
_HOME_DROP = bytes.fromhex(
    "b880000000"  #     mov eax, 128 (rt_sigtimedwait)
    "488d3dc0000000"  # lea rdi, [rip+unwanted]
    "be00000000"  #     mov esi, 0
    "488d15bc000000"  # lea rdx, [rip+zero]
    "41ba08000000"  #   mov r10d, 8
    "0f05"  #           syscall
)
_HOME_MASK = bytes.fromhex(
    "b80e000000"  #     mov eax, 14 (rt_sigprocmask)
    "bf02000000"  #     mov edi, SIG_SETMASK
    "488d358b000000"  # lea rsi, [rip+mask]
    "ba00000000"  #     mov edx, 0
    "41ba08000000"  #   mov r10d, 8
    "0f05"  #           syscall
)
_HOME_REGISTERS = (
    ("48b8", AX), ("48bb", BX), ("48b9", CX), ("48ba", DX), ("48be", SI), ("48bf", DI),
    ("49b8", R8), ("49b9", R9), ("49ba", R10), ("49bb", R11), ("49bc", R12), ("49bf", R15),
)  # fmt: skip
"""movabs of a 64-bit value into each register that the interpreter or a system call changes."""
_HOME_JUMP = bytes.fromhex("ff2508000000")
"""jmp [rip+8]: behind it lie mask and target, 8 bytes each, and if need be unwanted (8 bytes) and zero (16 bytes)."""
HOME_SIZE = 256
"""Room for one way home (236 bytes), with a system-call instruction before it if need be."""


def way_home(regs: tuple[int, ...], mask: int, unwanted: int = 0) -> bytes:
    """Code that goes on with *regs* and blocks the signals of *mask*. It fits :data:`HOME_SIZE`.

    rbp, rsp, r13, r14, segments and the extended state are expected to be the task's own already. The *unwanted*
    signals (a mask as well) are thrown away if they are pending.
    """
    flags = regs[FLAGS]
    code = bytearray(_HOME_FLAGS)
    code[1:3] = bytes((flags >> 11 & 1, flags & 0xFF))
    if unwanted:
        code += _HOME_DROP
    code += _HOME_MASK
    for instruction, register in _HOME_REGISTERS:
        code += bytes.fromhex(instruction) + regs[register].to_bytes(8, "little")
    return bytes(code) + _HOME_JUMP + struct.pack("<QQQ16x", mask, regs[IP], unwanted)


def one_call(regs: tuple[int, ...], mask: int) -> bytes:
    """A system-call instruction and then :func:`way_home`. It fits :data:`HOME_SIZE`."""
    return SYSCALL_INSTRUCTION + way_home(regs, mask)


def is_one_call(code: bytes) -> bool:
    """Whether *code* begins with what :func:`one_call` made for some thread."""
    constant = len(SYSCALL_INSTRUCTION) + 5
    return code.startswith(SYSCALL_INSTRUCTION) and code.startswith(_HOME_FLAGS[5:] + _HOME_MASK, constant)


# -- XSAVE ------------------------------------------------------------------------------------------------------------
XSAVE_HEADER = 512
XSAVE_MIN = 576
SW_RESERVED = 464
