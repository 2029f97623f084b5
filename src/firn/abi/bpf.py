"""BPF programs and the type information of the kernel. Source: include/uapi/linux/{bpf,btf}.h, bpf(2)."""

from __future__ import annotations

import struct

BPF_MAP_CREATE, BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM, BPF_MAP_DELETE_ELEM = 0, 1, 2, 3
BPF_PROG_LOAD, BPF_PROG_TEST_RUN, BPF_LINK_CREATE = 5, 10, 28
BPF_PROG_TYPE_SCHED_CLS, BPF_PROG_TYPE_RAW_TRACEPOINT = 3, 17
BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_SOCKMAP = 2, 6, 15
BPF_TCX_INGRESS, BPF_F_BEFORE = 46, 1 << 3
TCX_NEXT = -1
ATTR_SIZE = 128
"""Bytes given to bpf(2): what the kernel does not know of it must be zero."""
MAP_CREATE = struct.Struct("<4I")
"""map_type, key_size, value_size, max_entries."""
MAP_ELEM = struct.Struct("<I4xQQQ")
"""map_fd, key, value, flags."""
PROG_LOAD = struct.Struct("<IIQQ")
"""prog_type, insn_cnt, insns, license."""
PROG_LOAD_REST = struct.Struct("<IIQII16sII")
"""What follows: log_level, log_size, log_buf, kern_version, prog_flags, prog_name, prog_ifindex,
expected_attach_type."""
LINK_CREATE = struct.Struct("<4IIxxxxQ")
"""prog_fd, target_ifindex, attach_type, flags, relative_fd, expected_revision."""
TEST_RUN = struct.Struct("<IIIIQQIIIIQ")
"""prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration, ctx_size_in, ctx_size_out,
ctx_in."""
INSTRUCTION = struct.Struct("<BBhi")
"""Code, registers (source << 4 | destination), offset, immediate."""
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE, PSEUDO_KFUNC_CALL = 1, 2, 2
"""The source register of LOAD_IMM_64 or CALL tells what the immediate is."""

MAP_LOOKUP_ELEM, SKB_LOAD_BYTES, GET_CURRENT_TASK, SK_RELEASE, PROBE_READ_KERNEL = 1, 26, 35, 86, 113
SKC_TO_TCP_SOCK, MAP_LOOKUP_PERCPU_ELEM = 137, 195
"""Helpers (bpf-helpers(7)); the last since Linux 5.19."""
MOV, MOV_IMM, ADD_IMM, LOAD, STORE = 0xBF, 0xB7, 0x07, 0x79, 0x7B
LOAD_32, STORE_32, STORE_IMM_32, LOAD_IMM_64, CALL, EXIT = 0x61, 0x63, 0x62, 0x18, 0x85, 0x95
JUMP_EQUAL_IMM, JUMP_GREATER_IMM, JUMP_UNEQUAL_IMM, JUMP_UNEQUAL = 0x15, 0x25, 0x55, 0x5D
SKB_MARK = 8
"""Where struct __sk_buff has its mark."""
TCP_REQ_ATTRS = struct.Struct("<IIHBBBBBBB3x")
"""struct bpf_tcp_req_attrs (include/net/tcp.h): the peer's timestamp and ours, segment size, window scales of ours and
of the peer, and whether there are ECN, window scales, SACK, timestamps, timestamps in microseconds."""

BTF_HEADER = struct.Struct("<HBBIIIII")
"""magic, version, flags, header's length, types' offset and length, strings' offset and length."""
BTF_MAGIC = 0xEB9F
BTF_TYPE = struct.Struct("<III")
"""name's offset; kind (bits 24-28), number of members (bits 0-15), flag (bit 31); size or type."""
BTF_MEMBER = struct.Struct("<III")
"""name's offset, type, offset in bits (with the flag: the low 24 bits of it)."""
BTF_KIND_STRUCT, BTF_KIND_UNION, BTF_KIND_FUNC = 4, 5, 12
BTF_EXTRA = {1: 4, 3: 12, 14: 4, 17: 4}
"""Kind -> bytes behind a type: of an integer, an array, a variable, a tag of a declaration."""
BTF_EACH = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""Kind -> bytes behind a type for each member: of structs, unions, enums, functions, sections, wide enums."""
