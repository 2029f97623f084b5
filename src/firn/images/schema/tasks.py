"""Processes and threads: the tree, identifiers, core state, credentials, signals, timers, memory maps.

The syntax is described in :mod:`firn.images.schema`. Source: CRIU's image format, version 4.2.
"""

from __future__ import annotations

MESSAGES = {
    "plugins_entry": """
        12 plugins str*
    """,
    "inventory_entry": """
        1 img_version u32
        2 fdinfo_per_id bool?
        3 root_ids task_kobj_ids_entry?
        4 ns_per_id bool?
        5 root_cg_set u32?
        6 lsmtype enum:lsmtype?
        8 dump_uptime u64?
        9 pre_dump_mode u32?
        10 tcp_close bool?
        11 network_lock_method u32?
        12 plugins_entry plugins_entry?
        13 dump_criu_run_id str?
        14 allow_uprobes bool?
    """,
    "pstree_entry": """
        1 pid u32
        2 ppid u32
        3 pgid u32
        4 sid u32
        5 threads u32*
    """,
    "task_core_entry": """
        1 task_state u32 dict:gen
        2 exit_code u32
        3 personality u32
        4 flags u32
        5 blk_sigset u64 hex
        6 comm str
        7 timers task_timers_entry?
        8 rlimits task_rlimits_entry?
        9 cg_set u32?
        10 signals_s signal_queue_entry?
        11 old_seccomp_mode enum:seccomp_mode?
        12 old_seccomp_filter u32?
        13 loginuid u32?
        14 oom_score_adj i32?
        15 sigactions sa_entry*
        18 child_subreaper bool?
        20 blk_sigset_extended u64? hex
        21 stop_signo u32?
        22 membarrier_registration_mask u32? hex
    """,
    "task_kobj_ids_entry": """
        1 vm_id u32
        2 files_id u32
        3 fs_id u32
        4 sighand_id u32
        5 pid_ns_id u32?
        6 net_ns_id u32?
        7 ipc_ns_id u32?
        8 uts_ns_id u32?
        9 mnt_ns_id u32?
        10 user_ns_id u32?
        11 cgroup_ns_id u32?
        12 time_ns_id u32?
    """,
    "thread_sas_entry": """
        1 ss_sp u64
        2 ss_size u64
        3 ss_flags u32
    """,
    "thread_core_entry": """
        1 futex_rla u64
        2 futex_rla_len u32
        3 sched_nice s32?
        4 sched_policy u32?
        5 sched_prio u32?
        6 blk_sigset u64?
        7 sas thread_sas_entry?
        8 pdeath_sig u32?
        9 signals_p signal_queue_entry?
        10 creds creds_entry?
        11 seccomp_mode enum:seccomp_mode?
        12 seccomp_filter u32?
        13 comm str?
        14 blk_sigset_extended u64?
        15 rseq_entry rseq_entry?
        16 cg_set u32?
    """,
    "task_rlimits_entry": """
        1 rlimits rlimit_entry*
    """,
    "core_entry": """
        1 mtype enum:core_entry.march
        2 thread_info thread_info_x86?
        3 tc task_core_entry?
        4 ids task_kobj_ids_entry?
        5 thread_core thread_core_entry?
        6 ti_arm thread_info_arm?
        8 ti_aarch64 thread_info_aarch64?
        9 ti_ppc64 thread_info_ppc64?
        10 ti_s390 thread_info_s390?
        11 ti_mips thread_info_mips?
        12 ti_loongarch64 thread_info_loongarch64?
        13 ti_riscv64 thread_info_riscv64?
    """,
    "creds_entry": """
        1 uid u32
        2 gid u32
        3 euid u32
        4 egid u32
        5 suid u32
        6 sgid u32
        7 fsuid u32
        8 fsgid u32
        9 cap_inh u32*
        10 cap_prm u32*
        11 cap_eff u32*
        12 cap_bnd u32*
        13 secbits u32
        14 groups u32*
        15 lsm_profile str?
        16 lsm_sockcreate str?
        17 apparmor_data bytes?
        18 no_new_privs u32?
        19 cap_amb u32*
    """,
    "sa_entry": """
        1 sigaction u64 hex
        2 flags u64 hex
        3 restorer u64 hex
        4 mask u64 hex
        5 compat_sigaction bool?
        6 mask_extended u64? hex
    """,
    "siginfo_entry": """
        1 siginfo bytes
    """,
    "signal_queue_entry": """
        1 signals siginfo_entry*
    """,
    "itimer_entry": """
        1 isec u64
        2 iusec u64
        3 vsec u64
        4 vusec u64
    """,
    "posix_timer_entry": """
        1 it_id u32
        2 clock_id u32
        3 si_signo u32
        4 it_sigev_notify u32
        5 sival_ptr u64
        6 overrun u32
        7 isec u64
        8 insec u64
        9 vsec u64
        10 vnsec u64
        11 notify_thread_id i32?
    """,
    "task_timers_entry": """
        1 real itimer_entry
        2 virt itimer_entry
        3 prof itimer_entry
        4 posix posix_timer_entry*
    """,
    "rlimit_entry": """
        1 cur u64
        2 max u64
    """,
    "rseq_entry": """
        1 rseq_abi_pointer u64
        2 rseq_abi_size u32
        3 signature u32
        4 rseq_cs_pointer u64?
    """,
    "seccomp_filter": """
        1 filter bytes
        2 prev u32?
        3 flags u32?
    """,
    "seccomp_entry": """
        1 seccomp_filters seccomp_filter*
    """,
    "fs_entry": """
        1 cwd_id u32
        2 root_id u32
        3 umask u32?
    """,
    "aio_ring_entry": """
        1 id u64
        2 nr_req u32
        3 ring_len u32
    """,
    "mm_entry": """
        1 mm_start_code u64 hex
        2 mm_end_code u64 hex
        3 mm_start_data u64 hex
        4 mm_end_data u64 hex
        5 mm_start_stack u64 hex
        6 mm_start_brk u64 hex
        7 mm_brk u64 hex
        8 mm_arg_start u64 hex
        9 mm_arg_end u64 hex
        10 mm_env_start u64 hex
        11 mm_env_end u64 hex
        12 exe_file_id u32
        13 mm_saved_auxv u64*
        14 vmas vma_entry*
        15 dumpable i32?
        16 aios aio_ring_entry*
        17 thp_disabled bool?
    """,
    "vma_entry": """
        1 start u64 hex
        2 end u64 hex
        3 pgoff u64
        4 shmid u64
        5 prot u32 flags:mmap.prot
        6 flags u32 flags:mmap.flags
        7 status u32 flags:mmap.status
        8 fd s64
        9 madv u64? hex
        10 fdflags u32? hex
    """,
    "pagemap_head": """
        1 pages_id u32
    """,
    "pagemap_entry": """
        1 vaddr u64 hex
        2 compat_nr_pages u32
        3 in_parent bool?
        4 flags u32? flags:pmap.flags
        5 nr_pages u64?
    """,
    "timeval": """
        1 tv_sec u64
        2 tv_usec u64
    """,
}

ENUMS = {
    "lsmtype": "NO_LSM 0, SELINUX 1, APPARMOR 2",
    "core_entry.march": (
        "UNKNOWN 0, X86_64 1, ARM 2, AARCH64 3, PPC64 4, S390 5, MIPS 6, LOONGARCH64 7, RISCV64 8"
    ),
    "seccomp_mode": "disabled 0, strict 1, filter 2",
}
