"""bpf(2): commands, attributes, instructions; and what is needed of BTF, the kernel's own types.

Source: linux/bpf.h, linux/btf.h, linux/pkt_cls.h; Documentation/bpf/standardization/instruction-set.rst and btf.rst of
the kernel.
"""

from __future__ import annotations

import struct

MAP_CREATE, MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM, MAP_DELETE_ELEM, PROG_LOAD, LINK_CREATE = 0, 1, 2, 3, 5, 28
MAP_TYPE_ARRAY, MAP_TYPE_SOCKMAP = 2, 15
PROG_TYPE_SCHED_CLS, TCX_INGRESS, F_BEFORE = 3, 46, 1 << 3
TCX_NEXT = -1

MAP_CREATE_ATTR = struct.Struct("<4I")
"""Kind, size of a key and of a value, entries."""
MAP_ELEM_ATTR = struct.Struct("<I4xQQQ")
"""Map, addresses of key and value, flags."""
PROG_LOAD_ATTR = struct.Struct("<IIQQIIQI4x16sII")
"""Kind, instructions (number, address), licence, log (level, size, address), version, name, device, attach type."""
LINK_CREATE_ATTR = struct.Struct("<4IIxxxxQ")
"""Program, device, attach type, flags, another program, revision."""

INSTRUCTION = struct.Struct("<BBhi")
"""struct bpf_insn: operation, registers (the target's number in the lower half), jump or offset, constant."""
LOAD_64, LOAD_W, STORE_W, STORE_CONSTANT_W = 0x18, 0x61, 0x63, 0x62
MOVE, MOVE_CONSTANT, ADD_CONSTANT = 0xBF, 0xB7, 0x07
JUMP_EQUAL, JUMP_UNEQUAL, JUMP_UNEQUAL_REGISTER, CALL, EXIT = 0x15, 0x55, 0x5D, 0x85, 0x95
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE, PSEUDO_KFUNC_CALL = 1, 2, 2
"""The source register of LOAD_64 or CALL tells what the constant is."""
FUNC_MAP_LOOKUP_ELEM, FUNC_SKB_LOAD_BYTES, FUNC_SK_RELEASE, FUNC_SKC_TO_TCP_SOCK = 1, 26, 86, 137
SKB_MARK = 8
"""Where struct __sk_buff has its mark."""

TCP_REQ_ATTRS = struct.Struct("<IIHBBBBBBB3x")
"""struct bpf_tcp_req_attrs (include/net/tcp.h): the peer's timestamp and ours, segment size, window scales of ours and
of the peer, and whether there are ECN, window scales, SACK, timestamps, timestamps in microseconds."""

BTF_HEADER = struct.Struct("<HBBIIIII")
"""Magic, version, flags, size of the header, offset and size of the types, offset and size of the names."""
BTF_MAGIC, BTF_FUNC = 0xEB9F, 12
BTF_TYPE_WORDS = 3
BTF_MORE_WORDS = {1: 1, 3: 3, 14: 1, 17: 1}
"""By kind, words after the three that each type has: INT, ARRAY, VAR, DECL_TAG."""
BTF_WORDS_EACH = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}
"""Words for each member: STRUCT, UNION, ENUM, FUNC_PROTO, DATASEC, ENUM64."""
