"""prctl(2), arch_prctl(2), capabilities(7). Source: include/uapi/linux/prctl.h, arch/x86/include/uapi/asm/prctl.h."""

from __future__ import annotations

import struct

SET_PDEATHSIG, GET_PDEATHSIG = 1, 2
GET_DUMPABLE, SET_DUMPABLE = 3, 4
SET_NAME = 15
GET_TSC, SET_TSC = 25, 26
GET_SECUREBITS, SET_SECUREBITS = 27, 28
CAPBSET_READ, CAPBSET_DROP = 23, 24
SET_TIMERSLACK, GET_TIMERSLACK = 29, 30
MCE_KILL, MCE_KILL_GET = 33, 34
MCE_KILL_SET = 1
SET_MM = 35
SET_MM_MAP = 14
SET_CHILD_SUBREAPER, GET_CHILD_SUBREAPER = 36, 37
SET_NO_NEW_PRIVS, GET_NO_NEW_PRIVS = 38, 39
GET_TID_ADDRESS = 40
SET_THP_DISABLE, GET_THP_DISABLE = 41, 42
CAP_AMBIENT = 47
CAP_AMBIENT_RAISE, CAP_AMBIENT_CLEAR_ALL = 2, 4
SET_SPECULATION_CTRL = 53
SPEC_DISABLE, SPEC_FORCE_DISABLE = 4, 8
SCHED_CORE = 62
SCHED_CORE_GET = 0
SET_IO_FLUSHER, GET_IO_FLUSHER = 57, 58
SET_MDWE, GET_MDWE = 65, 66
SET_MEMORY_MERGE, GET_MEMORY_MERGE = 67, 68
TIMER_CREATE_RESTORE_IDS = 77
SET_SECCOMP = 22
SECCOMP_SET_MODE_STRICT, SECCOMP_SET_MODE_FILTER = 0, 1

ARCH_SET_GS, ARCH_SET_FS = 0x1001, 0x1002
ARCH_GET_CPUID, ARCH_SET_CPUID = 0x1011, 0x1012
ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM = 0x1022, 0x1023
ARCH_MAP_VDSO_64 = 0x2003
XFEATURE_XTILEDATA = 18  # Documentation/arch/x86/xstate.rst

SECBIT_KEEP_CAPS = 1 << 4
SECBIT_NO_SETUID_FIXUP = 1 << 2

MM_MAP = struct.Struct("<11QQII")
"""struct prctl_mm_map: start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
env_start, env_end, auxv pointer, auxv_size, exe_fd (104 bytes)."""

CAP_HEADER = struct.Struct("<Ii")
CAP_SYS_RESOURCE = 24  # include/uapi/linux/capability.h
CAP_VERSION_3 = 0x20080522
CAP_DATA = struct.Struct("<6I")
"""Two struct __user_cap_data_struct: effective, permitted, inheritable of capabilities 0-31, then of 32-63."""
