"""x86-64: register sets, the signal frame, and the interpreter that runs system-call programs inside a task.

Sources: arch/x86/include/asm/user_64.h (user_regs_struct), arch/x86/include/uapi/asm/sigcontext.h, Intel SDM vol. 1
chapter 13 (XSAVE area), arch/x86/kernel/signal_64.c (rt_sigreturn).
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

SYSCALL_INSTRUCTION = b"\x0f\x05"

# -- The interpreter ------------------------------------------------------------------------------------------------
# A program is an array of 64-byte records. rbx walks it; r15 holds the signal that ends it, r12 the stack pointer of
# a signal frame to return through if nobody traces the task any more (0: none).
#
# It ends by sending itself a signal whose default action is to be ignored, because a traced task stops for such a
# signal and an untraced one does not: when the controller dies in the middle, the task finishes the program, falls
# through the stop and returns to its own work by rt_sigreturn. A breakpoint would kill it there, and would also reset
# the task's SIGTRAP handler where SIGTRAP is blocked or ignored (force_sig_info_to_task in kernel/signal.c).
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
    "756b"  #           jnz copy
    "f6c108"  #         test cl, F_END
    "7543"  #           jnz stop
    "8b03"  #           mov eax, [rbx]
    "488b7b08"  #       mov rdi, [rbx+8]
    "488b7310"  #       mov rsi, [rbx+16]
    "488b5318"  #       mov rdx, [rbx+24]
    "4c8b5320"  #       mov r10, [rbx+32]
    "4c8b4328"  #       mov r8, [rbx+40]
    "4c8b4b30"  #       mov r9, [rbx+48]
    "0f05"  #           syscall
    "f6430402"  #       test byte [rbx+4], F_CHILD
    "7405"  #           jz store
    "4885c0"  #         test rax, rax
    "741c"  #           jz stop
    "48894338"  # store: mov [rbx+56], rax
    "483d01f0ffff"  #   cmp rax, -4095
    "722d"  #           jb next
    "f6430401"  #       test byte [rbx+4], F_IGNORE
    "7527"  #           jnz next
    "0fb74b06"  #       movzx ecx, word [rbx+6]
    "f7d8"  #           neg eax
    "39c8"  #           cmp eax, ecx
    "741d"  #           je next
    "b8ba000000"  # stop: mov eax, 186 (gettid)
    "0f05"  #           syscall
    "89c7"  #           mov edi, eax
    "4489fe"  #         mov esi, r15d
    "b8c8000000"  #     mov eax, 200 (tkill)
    "0f05"  #           syscall; a traced task stops here
    "4c89e4"  #         mov rsp, r12
    "b80f000000"  #     mov eax, 15 (rt_sigreturn)
    "0f05"  #           syscall
    "4883c340"  # next: add rbx, 64
    "eb8c"  #           jmp loop
    "488b7b08"  # copy: mov rdi, [rbx+8]
    "488b7310"  #       mov rsi, [rbx+16]
    "488b07"  #         mov rax, [rdi]
    "488906"  #         mov [rsi], rax
    "ebea"  #           jmp next
)
STOPPED_AT = INTERPRETER.index(bytes.fromhex("4c89e4"))
"""Offset of the instruction at which a finished (or failed) program is seen stopped."""
SYSCALL_AT = INTERPRETER.index(bytes.fromhex("0f05f64304"))
"""Offset of a system-call instruction, for single calls made by register changes alone."""

# -- XSAVE ------------------------------------------------------------------------------------------------------------
XSAVE_HEADER = 512
XSAVE_MIN = 576
SW_RESERVED = 464
FP_XSTATE_MAGIC1 = 0x46505853
FP_XSTATE_MAGIC2 = 0x46505845

# -- rt_sigframe -------------------------------------------------------------------------------------------------------
FRAME_STACK_OFFSET = 8 + 16
"""Where uc_stack (24 bytes) lies in the frame that :func:`signal_frame` makes."""
FRAME_SIZE = 8 + 16 + 24 + 256 + 8 + 128


def signal_frame(regs: tuple[int, ...], mask: int, xstate_address: int) -> bytes:
    """A struct rt_sigframe (pretcode, ucontext, siginfo) that makes rt_sigreturn restore *regs* and *mask*.

    *xstate_address* is where the XSAVE image prepared by :func:`xstate_for_frame` lies in the task, 64-byte aligned.
    """
    r = regs
    context = struct.pack(
        "<18Q4H3Q2Q64x",
        r[R8], r[R9], r[R10], r[R11], r[R12], r[R13], r[R14], r[R15], r[DI], r[SI], r[BP], r[BX], r[DX], r[AX], r[CX],
        r[SP], r[IP], r[FLAGS], r[CS], 0, 0, r[SS], 0, 0, mask, 0, xstate_address,
    )  # fmt: skip
    # uc_flags: UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    return struct.pack("<QQQ24x", 0, 7, 0) + context + struct.pack("<Q128x", mask)


def xstate_for_frame(xstate: bytes) -> bytes:
    """The XSAVE area as a signal frame has it: software bytes and the closing magic word added."""
    area = bytearray(xstate)
    features = int.from_bytes(area[SW_RESERVED : SW_RESERVED + 8], "little")
    size = len(area)
    struct.pack_into("<IIQI28x", area, SW_RESERVED, FP_XSTATE_MAGIC1, size + 4, features, size)
    return bytes(area) + struct.pack("<I", FP_XSTATE_MAGIC2)
