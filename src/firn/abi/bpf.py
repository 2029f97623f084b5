"""bpf(2): what it takes to run a few instructions. Source: include/uapi/linux/bpf.h."""

from __future__ import annotations

import struct

BPF_MAP_CREATE, BPF_MAP_LOOKUP_ELEM, BPF_PROG_LOAD, BPF_PROG_TEST_RUN = 0, 1, 5, 10
BPF_MAP_TYPE_ARRAY = 2
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
BPF_FUNC_get_current_task, BPF_FUNC_probe_read_kernel = 35, 113
BPF_PSEUDO_MAP_VALUE = 2
ATTRIBUTE_SIZE = 120
"""Of the part of union bpf_attr that Linux 5.15 knows of all commands used here."""

MAP_CREATE = struct.Struct("<4I")
"""Type, sizes of key and value, number of entries."""
MAP_ELEM = struct.Struct("<I4xQQQ")
"""Descriptor, addresses of key and value, flags."""
PROG_LOAD = struct.Struct("<IIQQIIQII16s")
"""Type, number of instructions, their address, that of the licence, log level, size and address, kernel version, flags,
name."""
PROG_TEST_RUN = struct.Struct("<IIIIQQIIIIQQ")
"""Descriptor, result; sizes and addresses of data in and out; repetitions, duration; sizes and addresses of the context
in and out."""
_INSTRUCTION = struct.Struct("<BBhi")


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One struct bpf_insn: operation, the numbers of both registers, offset, immediate value."""
    return _INSTRUCTION.pack(code, to | source << 4, offset, value)


# BPF_ALU64|BPF_MOV|BPF_X, BPF_ALU64|BPF_MOV|BPF_K, BPF_LDX|BPF_MEM|BPF_DW, BPF_STX|BPF_MEM|BPF_DW,
# BPF_LD|BPF_IMM|BPF_DW, BPF_JMP|BPF_JNE|BPF_K, BPF_JMP|BPF_JGT|BPF_K, BPF_JMP|BPF_CALL, BPF_JMP|BPF_EXIT
MOVE, SET, LOAD, STORE, LOAD_WIDE, IF_NOT, IF_GREATER, CALL, EXIT = 0xBF, 0xB7, 0x79, 0x7B, 0x18, 0x55, 0x25, 0x85, 0x95
