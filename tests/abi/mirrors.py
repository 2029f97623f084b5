"""What the kernel's headers call the constants and structures of :mod:`firn.abi`, one :class:`Mirror` per module."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mirror:
    """How the names of one module read in C.

    ``headers``: what the C program includes. ``prefixes``: what may have to be put before a name; the longest that is
    given for the beginning of the name counts. ``expressions``: names that read differently. ``structs``: the C
    structure and its members, in the order of the format's fields ("-" for padding). ``types``: what the program has to
    define for them. ``newer``: names that Debian's headers may be too
    old for, with the kernel header and version (or the document) that has them, and the value there. ``own``: names
    that are not the kernel's.
    """

    headers: tuple[str, ...]
    prefixes: dict[str, str] = field(default_factory=dict)
    expressions: dict[str, str] = field(default_factory=dict)
    structs: dict[str, tuple[str, str]] = field(default_factory=dict)
    types: str = ""
    newer: dict[str, tuple[str, int]] = field(default_factory=dict)
    own: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FS = "include/uapi/linux/fs.h, Linux"
_PAGEMAP = "Documentation/admin-guide/mm/pagemap.rst"
_PRCTL = "include/uapi/linux/prctl.h, Linux"
_DEVICES = "Documentation/admin-guide/devices.txt"

EVENTS = Mirror(
    headers=(
        "sys/eventfd.h", "sys/timerfd.h", "sys/epoll.h", "sys/inotify.h", "linux/fanotify.h", "linux/kcmp.h",
        "sys/ioctl.h", "fcntl.h", "linux/time_types.h",
    ),
    expressions={
        "EPOLL_READINESS": "EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP",
        "EPOLL_PRIVATE": "(uint32_t)(EPOLLEXCLUSIVE | EPOLLWAKEUP | EPOLLONESHOT | EPOLLET)",
        "IN_USER_MASK": "(uint32_t)(IN_ALL_EVENTS | IN_EXCL_UNLINK | IN_ONESHOT)",
        "FAN_PERMISSION": "FAN_OPEN_PERM | FAN_ACCESS_PERM | FAN_OPEN_EXEC_PERM | FAN_PRE_ACCESS",
        # The kernel's own headers of these cannot be read together with the C library's <fcntl.h>.
        "TFD_IOC_SET_TICKS": "_IOW('T', 0, uint64_t)",
        "INOTIFY_IOC_SETNEXTWD": "_IOW('I', 0, int32_t)",
        "PIDFD_THREAD": "O_EXCL",
        "MAX_HANDLE": "MAX_HANDLE_SZ",
        "COUNTER_LIMIT": "~(uint64_t)0",
    },
    structs={
        "ITIMERSPEC": (
            "struct __kernel_itimerspec", "it_interval.tv_sec it_interval.tv_nsec it_value.tv_sec it_value.tv_nsec"
        ),
        "EPOLL_EVENT": ("struct epoll_event", "events data"),
        "EPOLL_SLOT": ("struct kcmp_epoll_slot", "efd tfd toff"),
        "EPOLL_PARAMS": ("struct epoll_params", "busy_poll_usecs busy_poll_budget prefer_busy_poll -"),
        "FANOTIFY_EVENT": (
            "struct fanotify_event_metadata", "event_len vers reserved metadata_len mask fd pid"
        ),
        "FILE_HANDLE": ("struct file_handle", "handle_bytes handle_type"),
    },
    newer={
        "FAN_PERMISSION": ("include/uapi/linux/fanotify.h, Linux 6.14 (FAN_PRE_ACCESS)", 0x170000),
        "TFD_IOC_SET_TICKS": ("include/uapi/linux/timerfd.h, Linux 3.17", 1 << 30 | 8 << 16 | ord("T") << 8),
        "INOTIFY_IOC_SETNEXTWD": ("include/uapi/linux/inotify.h, Linux 4.16", 1 << 30 | 4 << 16 | ord("I") << 8),
        "PIDFD_THREAD": ("include/uapi/linux/pidfd.h, Linux 6.9: O_EXCL", 0o200),
        "EPOLL_PARAMS": ("include/uapi/linux/eventpoll.h, Linux 6.9: __u32, __u16, two __u8", 8),
        "EPIOCSPARAMS": ("include/uapi/linux/eventpoll.h, Linux 6.9", 1 << 30 | 8 << 16 | 0x8A << 8 | 1),
        "EPIOCGPARAMS": ("include/uapi/linux/eventpoll.h, Linux 6.9", 2 << 30 | 8 << 16 | 0x8A << 8 | 2),
    },
    own=_names("CLOCK_OF_ALARM MAX_FANOTIFY_EVENT"),
)  # fmt: skip

FCNTL = Mirror(headers=("linux/fcntl.h", "linux/kcmp.h"))

MMAN = Mirror(
    headers=("linux/mman.h", "linux/memfd.h", "linux/fs.h"),
    expressions={"PAGE": "sysconf(_SC_PAGESIZE)", "PROT_SHADOW": "PROT_READ | PROT_WRITE"},
    structs={
        "PM_SCAN_ARG": (
            "struct pm_scan_arg",
            "size flags start end walk_end vec vec_len max_pages category_inverted category_mask category_anyof_mask "
            "return_mask",
        ),
        "PAGE_REGION": ("struct page_region", "start end categories"),
    },
    newer={
        "MAP_DROPPABLE": ("include/uapi/linux/mman.h, Linux 6.11", 0x08),
        "MADV_GUARD_INSTALL": ("include/uapi/asm-generic/mman-common.h, Linux 6.13", 102),
        "PAGEMAP_SCAN": (f"{_FS} 6.7: _IOWR('f', 16, struct pm_scan_arg)", 3 << 30 | 96 << 16 | ord("f") << 8 | 16),
        "PM_SCAN_ARG": (f"{_FS} 6.7: twelve __u64", 96),
        "PAGE_REGION": (f"{_FS} 6.7: three __u64", 24),
        "PAGE_IS_WPALLOWED": (f"{_FS} 6.7", 1),
        "PAGE_IS_WRITTEN": (f"{_FS} 6.7", 2),
        "PAGE_IS_FILE": (f"{_FS} 6.7", 4),
        "PAGE_IS_PRESENT": (f"{_FS} 6.7", 8),
        "PAGE_IS_SWAPPED": (f"{_FS} 6.7", 16),
        "PAGE_IS_PFNZERO": (f"{_FS} 6.7", 32),
        "PAGE_IS_HUGE": (f"{_FS} 6.7", 64),
        "PAGE_IS_GUARD": (f"{_FS} 6.15", 256),
        "PAGEMAP_PRESENT": (_PAGEMAP, 1 << 63),
        "PAGEMAP_SWAPPED": (_PAGEMAP, 1 << 62),
        "PAGEMAP_FILE": (_PAGEMAP, 1 << 61),
        "PAGEMAP_GUARD": (f"{_PAGEMAP}, Linux 6.15", 1 << 58),
        "PAGEMAP_PFN": (_PAGEMAP, (1 << 55) - 1),
    },
)

POLL = Mirror(headers=("asm/poll.h",))

PRCTL = Mirror(
    headers=("linux/prctl.h", "asm/prctl.h", "linux/securebits.h", "linux/capability.h", "linux/seccomp.h"),
    prefixes={
        "": "PR_", "SECCOMP_": "", "ARCH_": "", "SECBIT_": "", "CAP_SYS_": "",
    },
    expressions={"CAP_VERSION_3": "_LINUX_CAPABILITY_VERSION_3"},
    structs={
        "MM_MAP": (
            "struct prctl_mm_map",
            "start_code end_code start_data end_data start_brk brk start_stack arg_start arg_end env_start env_end "
            "auxv auxv_size exe_fd",
        ),
        "CAP_HEADER": ("struct __user_cap_header_struct", "version pid"),
        "CAP_DATA": (
            "capabilities",
            "low.effective low.permitted low.inheritable high.effective high.permitted high.inheritable",
        ),
    },
    types="typedef struct { struct __user_cap_data_struct low, high; } capabilities;",
    newer={
        "SET_MEMORY_MERGE": (f"{_PRCTL} 6.4", 67),
        "GET_MEMORY_MERGE": (f"{_PRCTL} 6.4", 68),
        "SET_MDWE": (f"{_PRCTL} 6.3", 65),
        "GET_MDWE": (f"{_PRCTL} 6.3", 66),
        "TIMER_CREATE_RESTORE_IDS": (f"{_PRCTL} 6.15", 77),
        "XFEATURE_XTILEDATA": ("Documentation/arch/x86/xstate.rst", 18),
    },
)  # fmt: skip

PTRACE = Mirror(
    headers=("linux/ptrace.h", "linux/elf.h", "linux/wait.h"),
    prefixes={"": "PTRACE_", "NT_": ""},
    expressions={"WALL": "__WALL", "SYSCALL_INFO_SIZE": "sizeof(struct ptrace_syscall_info)"},
    newer={
        "GET_SYSCALL_USER_DISPATCH_CONFIG": ("include/uapi/linux/ptrace.h, Linux 6.4", 0x4211),
        "NT_X86_SHSTK": ("include/uapi/linux/elf.h, Linux 6.6", 0x204),
    },
)

SCHED = Mirror(
    headers=("linux/sched.h", "linux/sched/types.h", "linux/ioprio.h"),
    expressions={"SCHED_OTHER": "SCHED_NORMAL"},
    structs={
        "CLONE_ARGS": (
            "struct clone_args",
            "flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup",
        ),
        "SCHED_ATTR": (
            "struct sched_attr",
            "size sched_policy sched_flags sched_nice sched_priority sched_runtime sched_deadline sched_period "
            "sched_util_min sched_util_max",
        ),
    },
)

SIGNAL = Mirror(
    headers=("linux/signal.h",),
    expressions={
        "LAST": "8 * sizeof(sigset_t)",
        "ALL": "~(sigset_t)0",
        "SIG_DFL": "(uintptr_t)SIG_DFL",
        "SIG_IGN": "(uintptr_t)SIG_IGN",
        "SIGINFO_SIZE": "sizeof(siginfo_t)",
        "SS_AUTODISARM": "(uint32_t)SS_AUTODISARM",
    },
    structs={
        "SIGACTION": ("struct sigaction", "sa_handler sa_flags sa_restorer sa_mask"),
        "STACK_T": ("stack_t", "ss_sp ss_flags - ss_size"),
        "SIGEVENT": ("struct sigevent", "sigev_value sigev_signo sigev_notify _sigev_un._tid - -"),
    },
    own=_names("STOP_SIGNALS"),
)

TTY = Mirror(
    headers=("linux/termios.h", "linux/tty.h", "asm/poll.h", "linux/major.h"),
    expressions={
        "TERMIOS_SIZE": "sizeof(struct termios)",
        "CHARACTERS": "NCCS",
        "VT_MAJOR": "TTY_MAJOR",
        "SLAVE_MAJOR": "UNIX98_PTY_SLAVE_MAJOR",
    },
    structs={
        "TERMIOS": ("struct termios2", "c_iflag c_oflag c_cflag c_lflag c_line c_cc c_ispeed c_ospeed"),
        "WINSIZE": ("struct winsize", "ws_row ws_col ws_xpixel ws_ypixel"),
    },
    newer={
        "N_TTY_BUFFER": ("drivers/tty/n_tty.c: N_TTY_BUF_SIZE - 1", 4095),
        "FIRST_SERIAL": (_DEVICES, 64),
    },
    own=_names("PTMX DEV_TTY DEV_CONSOLE"),
)

TUN = Mirror(
    headers=("sys/ioctl.h", "linux/if.h", "linux/if_tun.h", "linux/sockios.h", "linux/ethtool.h", "linux/rtnetlink.h"),
    prefixes={"NETLINK": ""},
    expressions={
        "TUN_F_USO": "TUN_F_USO4 | TUN_F_USO6",
        "IFF_SETTABLE": (
            "IFF_UP | IFF_DEBUG | IFF_NOTRAILERS | IFF_NOARP | IFF_PROMISC | IFF_ALLMULTI | IFF_MULTICAST | IFF_PORTSEL"
            " | IFF_AUTOMEDIA"
        ),
    },
    structs={
        "IFREQ_NUMBER": ("struct ifreq", "ifr_name ifr_ifindex -"),
        "IFREQ_FLAGS": ("struct ifreq", "ifr_name ifr_flags -"),
        "IFREQ_ADDRESS": ("struct ifreq", "ifr_name ifr_hwaddr.sa_family ifr_hwaddr.sa_data -"),
        "IFREQ_POINTER": ("struct ifreq", "ifr_name ifr_data -"),
        "FEATURES_BLOCK": ("struct ethtool_get_features_block", "available requested active never_changed"),
        "IFADDRMSG": ("struct ifaddrmsg", "ifa_family ifa_prefixlen ifa_flags ifa_scope ifa_index"),
        "RTMSG": (
            "struct rtmsg",
            "rtm_family rtm_dst_len rtm_src_len rtm_tos rtm_table rtm_protocol rtm_scope rtm_type rtm_flags",
        ),
    },
    newer={
        "TUN_F_USO": ("include/uapi/linux/if_tun.h, Linux 6.2", 0x60),
        "TUNSETCARRIER": ("include/uapi/linux/if_tun.h, Linux 5.0", 0x400454E2),
        "TUNGETDEVNETNS": ("include/uapi/linux/if_tun.h, Linux 5.2", 0x54E3),
    },
)

_REGISTERS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs "
    "gs"
)
_OURS = "R15 R14 R13 R12 BP BX R11 R10 R9 R8 AX CX DX SI DI ORIG_AX IP CS FLAGS SP SS FS_BASE GS_BASE DS ES FS GS"
X86_64 = Mirror(
    headers=("sys/user.h", "asm/sigcontext.h", "asm/processor-flags.h", "stdint.h"),
    expressions={
        "TRAP_FLAG": "X86_EFLAGS_TF",
        "XSAVE_HEADER": "sizeof(struct _fpstate)",
        "XSAVE_MIN": "offsetof(struct _xstate, ymmh)",
        "SW_RESERVED": "offsetof(struct _fpstate, sw_reserved)",
        "NO_SYSCALL": "~(uint64_t)0",
        **{
            name: f"offsetof(struct user_regs_struct, {member}) / 8"
            for name, member in zip(_OURS.split(), _REGISTERS.split(), strict=True)
        },
    },
    structs={"REGS": ("struct user_regs_struct", _REGISTERS)},
    newer={
        "USER_CS": ("arch/x86/include/asm/segment.h: GDT_ENTRY_DEFAULT_USER_CS * 8 + 3", 6 * 8 + 3),
        "USER_SS": ("arch/x86/include/asm/segment.h: GDT_ENTRY_DEFAULT_USER_DS * 8 + 3", 5 * 8 + 3),
    },
    # The interpreter's own; tests/abi/test_interpreter.py runs it.
    own=_names(
        "REG_NAMES SYSCALL_INSTRUCTION RECORD RECORD_SIZE RESULT_OFFSET F_IGNORE F_CHILD F_COPY F_END INTERPRETER "
        "STOPPED_AT EXIT_AT SYSCALL_AT HOME_SIZE"
    ),
)

IPC = Mirror(
    headers=("sys/ipc.h", "sys/shm.h", "sys/sem.h"),
    newer={"SEMAEM": ("include/uapi/linux/sem.h", 32767)},
    structs={
        "SHMID64_DS": (
            "struct shmid_ds",
            "shm_perm.__key shm_perm.uid shm_perm.gid shm_perm.cuid shm_perm.cgid shm_perm.mode - shm_segsz shm_atime "
            "shm_dtime shm_ctime shm_cpid shm_lpid shm_nattch -",
        ),
        "SEMBUF": ("struct sembuf", "sem_num sem_op sem_flg"),
    },
)
POLICIES = Mirror(
    headers=("linux/mempolicy.h", "linux/keyctl.h", "linux/landlock.h", "linux/ptrace.h", "linux/io_uring.h"),
    newer={
        "SYSCALL_USER_DISPATCH_CONFIG": ("include/uapi/linux/ptrace.h, Linux 6.4: four __u64", 32),
        "MPOL_WEIGHTED_INTERLEAVE": ("include/uapi/linux/mempolicy.h, Linux 6.9", 6),
        "IORING_ENTER_REGISTERED_RING": ("include/uapi/linux/io_uring.h, Linux 5.18", 16),
        "IO_RINGFD_REG_MAX": ("io_uring/tctx.h, Linux 5.18", 16),
    },
    structs={"SYSCALL_USER_DISPATCH_CONFIG": ("struct ptrace_sud_config", "mode selector offset len")},
)
BPF = Mirror(
    headers=("linux/bpf.h", "linux/btf.h"),
    expressions={
        "GET_CURRENT_TASK": "BPF_FUNC_get_current_task", "PROBE_READ_KERNEL": "BPF_FUNC_probe_read_kernel",
        "MAP_LOOKUP_PERCPU_ELEM": "BPF_FUNC_map_lookup_percpu_elem", "PSEUDO_MAP_FD": "BPF_PSEUDO_MAP_FD",
        "MOV": "BPF_ALU64 | BPF_MOV | BPF_X", "MOV_IMM": "BPF_ALU64 | BPF_MOV | BPF_K",
        "ADD_IMM": "BPF_ALU64 | BPF_ADD | BPF_K", "JUMP_GREATER_IMM": "BPF_JMP | BPF_JGT | BPF_K",
        "LOAD": "BPF_LDX | BPF_MEM | BPF_DW", "STORE": "BPF_STX | BPF_MEM | BPF_DW",
        "STORE_IMM_32": "BPF_ST | BPF_MEM | BPF_W",
        "LOAD_32": "BPF_LDX | BPF_MEM | BPF_W", "STORE_32": "BPF_STX | BPF_MEM | BPF_W",
        "JUMP_EQUAL_IMM": "BPF_JMP | BPF_JEQ | BPF_K", "JUMP_UNEQUAL_IMM": "BPF_JMP | BPF_JNE | BPF_K",
        "JUMP_UNEQUAL": "BPF_JMP | BPF_JNE | BPF_X", "PSEUDO_MAP_VALUE": "BPF_PSEUDO_MAP_VALUE",
        "PSEUDO_KFUNC_CALL": "BPF_PSEUDO_KFUNC_CALL", "MAP_LOOKUP_ELEM": "BPF_FUNC_map_lookup_elem",
        "SKB_LOAD_BYTES": "BPF_FUNC_skb_load_bytes", "SK_RELEASE": "BPF_FUNC_sk_release",
        "SKC_TO_TCP_SOCK": "BPF_FUNC_skc_to_tcp_sock", "SKB_MARK": "offsetof(struct __sk_buff, mark)",
        "LOAD_IMM_64": "BPF_LD | BPF_IMM | BPF_DW", "CALL": "BPF_JMP | BPF_CALL", "EXIT": "BPF_JMP | BPF_EXIT",
    },
    structs={
        "BTF_HEADER": ("struct btf_header", "magic version flags hdr_len type_off type_len str_off str_len"),
        "BTF_TYPE": ("struct btf_type", "name_off info size"),
        "BTF_MEMBER": ("struct btf_member", "name_off type offset"),
    },
    newer={
        "MAP_LOOKUP_PERCPU_ELEM": ("include/uapi/linux/bpf.h, Linux 5.19", 195),
        "BPF_TCX_INGRESS": ("include/uapi/linux/bpf.h, Linux 6.6", 46),
        "BPF_F_BEFORE": ("include/uapi/linux/bpf.h, Linux 6.6", 8),
        "TCX_NEXT": ("include/uapi/linux/bpf.h, Linux 6.6", -1),
    },
    # The members of bpf_attr are checked by their use, and half of bpf_insn are bits; the last is in no such header.
    own=_names(
        "ATTR_SIZE MAP_CREATE MAP_ELEM PROG_LOAD PROG_LOAD_REST LINK_CREATE TEST_RUN INSTRUCTION BTF_EXTRA BTF_EACH "
        "TCP_REQ_ATTRS"
    ),
)  # fmt: skip
WAIT = Mirror(headers=("linux/wait.h", "linux/signal.h"), expressions={"SI_PID": "offsetof(siginfo_t, si_pid)"})

NFTABLES = Mirror(
    headers=(
        "linux/netlink.h", "netinet/in.h", "linux/netfilter/nfnetlink.h", "linux/netfilter.h", "limits.h",
        "linux/netfilter_ipv4.h", "linux/netfilter/nf_tables.h",
    ),
    structs={
        "NLMSGHDR": ("struct nlmsghdr", "nlmsg_len nlmsg_type nlmsg_flags nlmsg_seq nlmsg_pid"),
        "NLATTR": ("struct nlattr", "nla_len nla_type"),
        "NFGENMSG": ("struct nfgenmsg", "nfgen_family version res_id"),
    },
)  # fmt: skip

TCP = Mirror(
    headers=("netinet/tcp.h", "sys/ioctl.h", "linux/sockios.h", "asm/ioctls.h"),
    expressions={
        "TCPOPT_MSS": "TCPOPT_MAXSEG",
        "TCPOPT_SACK_PERM": "TCPOPT_SACK_PERMITTED",
        "SIOCINQ": "FIONREAD",
        "SIOCOUTQ": "TIOCOUTQ",
        "INFO_SSTHRESH": "offsetof(struct tcp_info, tcpi_rcv_ssthresh)",
    },
    structs={
        "REPAIR_OPT": ("struct tcp_repair_opt", "opt_code opt_val"),
        "WINDOW": ("struct tcp_repair_window", "snd_wl1 snd_wnd max_window rcv_wnd rcv_wup"),
    },
    newer={
        "INFO_DELIVERED": ("include/uapi/linux/tcp.h, Linux 4.18: tcpi_delivered", 192),
        "TCP_AO_INFO": ("include/uapi/linux/tcp.h, Linux 6.7", 40),
        "TCP_REPAIR_ON": ("include/uapi/linux/tcp.h", 1),
        "TCP_REPAIR_OFF": ("include/uapi/linux/tcp.h", 0),
        "TCP_REPAIR_OFF_NO_WP": ("include/uapi/linux/tcp.h", -1),
    },
    own=frozenset({"INFO", "TCP_MAX_WSCALE"}),
)

MIRRORS = {
    "bpf": BPF,
    "events": EVENTS, "fcntl": FCNTL, "ipc": IPC, "mman": MMAN, "nftables": NFTABLES, "policies": POLICIES,
    "poll": POLL, "prctl": PRCTL, "ptrace": PTRACE, "sched": SCHED, "signal": SIGNAL, "tcp": TCP, "tty": TTY,
    "tun": TUN, "wait": WAIT, "x86_64": X86_64,
}  # fmt: skip
# No constants of the kernel's, or (probe_consts) compared by tests/host, or (nr) by a test of its own.
OTHERS = {"__init__", "cpuid", "libc", "nr", "probe_consts"}

# Linux versions of system calls that Debian's asm/unistd_64.h may not have; the numbers are those of
# arch/x86/entry/syscalls/syscall_64.tbl of Linux 6.18.
NEWER_CALLS = {
    "cachestat": ("6.5", 451), "fchmodat2": ("6.6", 452), "map_shadow_stack": ("6.6", 453), "futex_wake": ("6.7", 454),
    "futex_wait": ("6.7", 455), "futex_requeue": ("6.7", 456), "statmount": ("6.8", 457), "listmount": ("6.8", 458),
    "lsm_get_self_attr": ("6.8", 459), "lsm_set_self_attr": ("6.8", 460), "lsm_list_modules": ("6.8", 461),
    "mseal": ("6.10", 462), "setxattrat": ("6.13", 463), "getxattrat": ("6.13", 464), "listxattrat": ("6.13", 465),
    "removexattrat": ("6.13", 466), "open_tree_attr": ("6.15", 467), "file_getattr": ("6.17", 468),
    "file_setattr": ("6.17", 469), "uretprobe": ("6.11", 335), "uprobe": ("6.18", 336),
}  # fmt: skip
