"""bpf(2): what it takes to run a few instructions that read an address. Source: include/uapi/linux/bpf.h."""

from __future__ import annotations

import struct

BPF_MAP_CREATE, BPF_MAP_LOOKUP_ELEM, BPF_PROG_LOAD, BPF_PROG_TEST_RUN = 0, 1, 5, 10
BPF_MAP_TYPE_ARRAY = 2
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
BPF_FUNC_get_current_task, BPF_FUNC_probe_read_kernel = 35, 113
BPF_PSEUDO_MAP_VALUE = 2
ATTRIBUTE_SIZE = 120
"""Of the part of union bpf_attr that Linux 5.15 knows of all commands used here."""

_MAP_CREATE = struct.Struct("<4I")
_MAP_LOOKUP = struct.Struct("<I4xQQQ")
_PROG_LOAD = struct.Struct("<IIQQIIQII16s")
_PROG_TEST_RUN = struct.Struct("<IIIIQQIIIIQQ")
_INSTRUCTION = struct.Struct("<BBhi")


def map_create(kind: int, key: int, value: int, entries: int) -> bytes:
    """union bpf_attr of BPF_MAP_CREATE: type, sizes of key and value, number of entries."""
    return _MAP_CREATE.pack(kind, key, value, entries)


def map_lookup(fd: int, key: int, value: int) -> bytes:
    """... of BPF_MAP_LOOKUP_ELEM: descriptor, addresses of key and value."""
    return _MAP_LOOKUP.pack(fd, key, value, 0)


def prog_load(kind: int, count: int, code: int, licence: int, name: bytes) -> bytes:
    """... of BPF_PROG_LOAD: type, number of instructions, their address, that of the licence, a name."""
    return _PROG_LOAD.pack(kind, count, code, licence, 0, 0, 0, 0, 0, name)


def prog_test_run(fd: int, size: int, context: int) -> bytes:
    """... of BPF_PROG_TEST_RUN: descriptor, size and address of the context."""
    return _PROG_TEST_RUN.pack(fd, 0, 0, 0, 0, 0, 0, 0, size, 0, context, 0)


RESULT = slice(4, 8)
"""Where BPF_PROG_TEST_RUN puts what the program returned."""


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One struct bpf_insn: operation, the numbers of both registers, offset, immediate value."""
    return _INSTRUCTION.pack(code, to | source << 4, offset, value)


# BPF_ALU64|BPF_MOV|BPF_X, BPF_ALU64|BPF_MOV|BPF_K, BPF_LDX|BPF_MEM|BPF_DW, BPF_STX|BPF_MEM|BPF_DW,
# BPF_LD|BPF_IMM|BPF_DW, BPF_JMP|BPF_JNE|BPF_K, BPF_JMP|BPF_JGT|BPF_K, BPF_JMP|BPF_CALL, BPF_JMP|BPF_EXIT
MOVE, SET, LOAD, STORE, LOAD_WIDE, IF_NOT, IF_GREATER, CALL, EXIT = 0xBF, 0xB7, 0x79, 0x7B, 0x18, 0x55, 0x25, 0x85, 0x95
