"""Constants and structures that only the probes of kernel abilities use, under the names that the headers give them.

Source: the header named at each group, below include/uapi/linux unless another place is given.
"""

from __future__ import annotations

import struct

# membarrier.h
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9

# prctl.h and arch/x86/include/uapi/asm/prctl.h
PR_SET_MM_MAP_SIZE = 15
PR_TIMER_CREATE_RESTORE_IDS_GET = 2

# userfaultfd.h
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_API_ARG = struct.Struct("<3Q")
"""struct uffdio_api: api, features, ioctls (24 bytes)."""
UFFD_FEATURE_EVENT_FORK = 1 << 1
UFFD_FEATURE_EVENT_REMAP = 1 << 2
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_EVENT_UNMAP = 1 << 6
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_ARG = struct.Struct("<4Q")
"""struct uffdio_register: range.start, range.len, mode, ioctls (32 bytes)."""
UFFDIO_REGISTER_MODE_WP = 1 << 1

# fs.h (PAGEMAP_SCAN)
PM_SCAN_WP_MATCHING = 1
PM_SCAN_CHECK_WPASYNC = 2

# Documentation/admin-guide/mm/soft-dirty.rst: the bit of a pagemap word
PAGEMAP_SOFT_DIRTY = 1 << 55

# ptrace.h, arch/x86/include/asm/user_64.h, audit.h
PTRACE_POKEUSER = 6
PTRACE_GET_SYSCALL_INFO = 0x420E
SYSCALL_INFO_HEAD = struct.Struct("<B3xIQQ")
"""The head of struct ptrace_syscall_info: op, arch, instruction_pointer, stack_pointer."""
USER_DEBUGREG = 848
"""offsetof(struct user, u_debugreg)."""
AUDIT_ARCH_X86_64 = 0xC000003E

# filter.h, seccomp.h
BPF_RETURN = struct.Struct("<HBBI")
"""struct sock_filter: code, jt, jf, k."""
BPF_RET_K = 0x06
SECCOMP_RET_ALLOW = 0x7FFF0000
SOCK_FPROG = struct.Struct("<H6xQ")
"""struct sock_fprog: len, filter."""

# kcmp.h
KCMP_EPOLL_TFD = 7
KCMP_EPOLL_SLOT = struct.Struct("<3I")
"""struct kcmp_epoll_slot: efd, tfd, toff."""

# inotify.h, timerfd.h, sockios.h, un.h, if_tun.h, asm-generic/ioctls.h
TIOCGPTN = 0x80045430
TIOCSPTLCK = 0x40045431
INOTIFY_IOC_SETNEXTWD = 0x40044900
TFD_IOC_SET_TICKS = 0x40085400
SIOCGSKNS = 0x894C
SIOCUNIXFILE = 0x89E0
TUNSETIFINDEX = 0x400454DA

# openat2.h
OPEN_HOW = struct.Struct("<3Q")
"""struct open_how: flags, mode, resolve (24 bytes)."""
RESOLVE_IN_ROOT = 0x10

# aio_abi.h
IOCB = struct.Struct("<QIIHhIQQqQII")
"""struct iocb: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2, flags, resfd (64 B)."""
IOCB_CMD_PREAD = 0
IO_EVENT_SIZE = 32

# tcp.h, in6.h, asm-generic/socket.h
TCP_REPAIR = 19
TCP_TIMESTAMP = 24
TCP_REPAIR_WINDOW = 29
IPV6_FREEBIND = 78
SO_BINDTODEVICE = 25
SO_GET_FILTER = 26
SO_PEEK_OFF = 42
SO_BUF_LOCK = 72

# mount.h
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20
MOVE_MOUNT_SET_GROUP = 0x100

# sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# capability.h
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_CHECKPOINT_RESTORE = 40

# netlink.h
NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NLM_F_MULTI = 2

# sock_diag.h, inet_diag.h, unix_diag.h, packet_diag.h, netlink_diag.h
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_REQ = struct.Struct("<4BI48x")
"""struct inet_diag_req_v2: family, protocol, ext, pad, states, id (56 bytes)."""
INET_DIAG_INODE = 68
"""offsetof(struct inet_diag_msg, idiag_inode)."""
UNIX_DIAG_REQ = struct.Struct("<BBHIIIQ")
"""struct unix_diag_req: family, protocol, pad, states, ino, show, cookie (24 bytes)."""
NETLINK_DIAG_REQ = struct.Struct("<BBHIIQ")
"""struct netlink_diag_req and struct packet_diag_req: family, protocol, pad, ino, show, cookie (20 bytes)."""
NDIAG_PROTO_ALL = 0xFF

# rtnetlink.h, if_link.h, if.h, net_namespace.h, veth.h
RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_SETLINK = 19
RTM_GETNSID = 90
IFINFOMSG = struct.Struct("<BBHiII")
"""struct ifinfomsg: family, pad, type, index, flags, change."""
IFF_UP = 1
IFLA_IFNAME = 3
IFLA_LINKINFO = 18
IFLA_NET_NS_FD = 28
IFLA_LINK_NETNSID = 37
IFLA_NEW_IFINDEX = 49
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1
NETNSA_NSID = 1
NETNSA_PID = 2

# netfilter/nfnetlink.h, netfilter/nf_tables.h, netfilter.h
NFTA_SET_DESC = 9
NFTA_SET_DESC_CONCAT = 2
NFTA_SET_FIELD_LEN = 1
NFT_SET_CONCAT = 0x80
