"""Rarely used interfaces. Source: include/uapi/linux/{mempolicy,keyctl,landlock,ptrace,io_uring}.h."""

from __future__ import annotations

import struct

MPOL_DEFAULT = 0
MPOL_PREFERRED = 1
MPOL_BIND = 2
MPOL_INTERLEAVE = 3
MPOL_LOCAL = 4
MPOL_PREFERRED_MANY = 5
MPOL_WEIGHTED_INTERLEAVE = 6
MPOL_F_STATIC_NODES = 1 << 15
MPOL_F_RELATIVE_NODES = 1 << 14
MPOL_F_NUMA_BALANCING = 1 << 13
KEYCTL_GET_KEYRING_ID = 0
KEY_SPEC_THREAD_KEYRING = -1
KEY_SPEC_PROCESS_KEYRING = -2
LANDLOCK_CREATE_RULESET_VERSION = 1
IORING_ENTER_REGISTERED_RING = 1 << 4
IO_RINGFD_REG_MAX = 16
SYSCALL_USER_DISPATCH_CONFIG = struct.Struct("<4Q")
"""struct ptrace_sud_config: mode, selector, offset, len (Linux 6.4)."""
