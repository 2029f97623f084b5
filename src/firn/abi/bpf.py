"""BPF programs and the type information of the kernel. Source: include/uapi/linux/{bpf,btf}.h, bpf(2)."""

from __future__ import annotations

import struct

BPF_MAP_CREATE, BPF_PROG_LOAD, BPF_PROG_TEST_RUN = 0, 5, 10
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
BPF_MAP_TYPE_PERCPU_ARRAY = 6
ATTR_SIZE = 128
"""Bytes given to bpf(2): what the kernel does not know of it must be zero."""
MAP_CREATE = struct.Struct("<4I")
"""map_type, key_size, value_size, max_entries."""
PROG_LOAD = struct.Struct("<IIQQ")
"""prog_type, insn_cnt, insns, license."""
TEST_RUN = struct.Struct("<IIIIQQIIIIQ")
"""prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration, ctx_size_in, ctx_size_out,
ctx_in."""
INSTRUCTION = struct.Struct("<BBhi")
"""Code, registers (source << 4 | destination), offset, immediate."""
PSEUDO_MAP_FD = 1

GET_CURRENT_TASK, PROBE_READ_KERNEL, MAP_LOOKUP_PERCPU_ELEM = 35, 113, 195
"""Helpers (bpf-helpers(7)); the last since Linux 5.19."""
MOV, MOV_IMM, ADD_IMM, LOAD, STORE, STORE_IMM, SHIFT_RIGHT = 0xBF, 0xB7, 0x07, 0x79, 0x7B, 0x7A, 0x7F
STORE_IMM_32, LOAD_IMM_64, CALL, EXIT = 0x62, 0x18, 0x85, 0x95

BTF_HEADER = struct.Struct("<HBBIIIII")
"""magic, version, flags, header's length, types' offset and length, strings' offset and length."""
BTF_MAGIC = 0xEB9F
BTF_TYPE = struct.Struct("<III")
"""name's offset; kind (bits 24-28), number of members (bits 0-15), flag (bit 31); size or type."""
BTF_MEMBER = struct.Struct("<III")
"""name's offset, type, offset in bits (with the flag: the low 24 bits of it)."""
BTF_KIND_STRUCT, BTF_KIND_UNION = 4, 5
BTF_EXTRA = {1: 4, 3: 12, 14: 4, 17: 4}
"""Kind -> bytes behind a type: of an integer, an array, a variable, a tag of a declaration."""
BTF_EACH = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""Kind -> bytes behind a type for each member: of structs, unions, enums, functions, sections, wide enums."""
