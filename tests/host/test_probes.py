"""Every probe of ``check``: it ends well, it notices a poorer kernel, and it agrees with what else is known."""

from __future__ import annotations

import errno

import pytest
from host.sandbox import FULL, alone, denied, kernel_config, traces

from firn.abi import nr
from firn.check import _missing
from firn.check.isolate import NO, PARTLY, YES, run
from firn.check.table import ABILITIES

ROWS = {ability.name: ability for ability in ABILITIES}

# Configuration options that an ability takes; all of them there means that it is there (if this process is root).
CONFIG = {
    "map_files": "CHECKPOINT_RESTORE",
    "socket_diag": "UNIX_DIAG INET_DIAG INET_TCP_DIAG INET_UDP_DIAG PACKET_DIAG NETLINK_DIAG",
    "ns_last_pid": "CHECKPOINT_RESTORE",
    "kcmp": "KCMP",
    "mm_map": "CHECKPOINT_RESTORE",
    "fdinfo": "EVENTFD EPOLL SIGNALFD INOTIFY_USER",
    "locked_pty": "UNIX98_PTYS",
    "sem_next_id": "SYSVIPC CHECKPOINT_RESTORE",
    "seccomp_suspend": "SECCOMP_FILTER CHECKPOINT_RESTORE",
    "seccomp_filters": "SECCOMP_FILTER CHECKPOINT_RESTORE",
    "mem_dirty_track": "MEM_SOFT_DIRTY",
    "proc_timers": "POSIX_TIMERS",
    "tun": "TUN",
    "timerfd": "TIMERFD CHECKPOINT_RESTORE",
    "aio_remap": "AIO",
    "cgroupns": "CGROUPS",
    "userns": "USER_NS",
    "loginuid": "AUDIT",
    "can_map_vdso": "CHECKPOINT_RESTORE",
    "uffd": "USERFAULTFD",
    "uffd-noncoop": "USERFAULTFD",
    "kcmp_epoll": "KCMP EPOLL",
    "net_diag_raw": "INET_RAW_DIAG",
    "timens": "TIME_NS",
    "network_lock_nftables": "NF_TABLES NF_TABLES_INET",
    "memfd_hugetlb": "HUGETLBFS",
    "get_rseq_conf": "RSEQ",
    "autofs": "AUTOFS_FS",
    "tun_ns": "TUN",
    "link_nsid": "NET_NS VETH",
    "process_vm": "CROSS_MEMORY_ATTACH",
    "pagemap": "PROC_PAGE_MONITOR",
    "proc_children": "PROC_CHILDREN",
    "membarrier": "MEMBARRIER",
    "huge_pages": "HUGETLBFS",
    "inotify_numbers": "INOTIFY_USER CHECKPOINT_RESTORE",
    "executable_memfd": "MEMFD_CREATE",
    "unix_queues": "BPF_SYSCALL DEBUG_INFO_BTF",
    "kernel_view": "AIO BPF_SYSCALL DEBUG_INFO_BTF",
    "undo_lists": "SYSVIPC BPF_SYSCALL DEBUG_INFO_BTF",
}

# The system calls without which an ability cannot be: each alone must turn the answer.
WITHOUT: dict[str, tuple[int, ...]] = {
    "map_files": (nr.openat,),
    "socket_diag": (nr.socket, nr.sendto),
    "ns_last_pid": (nr.newfstatat,),
    "peek_offset": (nr.getsockopt,),
    "kcmp": (nr.kcmp,),
    "mm_map": (nr.prctl,),
    "file_owner": (nr.fcntl,),
    "proc_stat": (nr.openat,),
    "tcp_repair": (nr.setsockopt,),
    "fdinfo": (nr.eventfd2, nr.epoll_ctl, nr.signalfd4, nr.inotify_init1),
    "vmsplice": (nr.vmsplice,),
    "locked_pty": (nr.ioctl,),
    "socket_filter": (nr.getsockopt,),
    "sem_next_id": (nr.newfstatat,),
    "sigqueueinfo": (nr.rt_sigqueueinfo,),
    "ptrace_signals": (nr.ptrace,),
    "vdso_remap": (nr.mremap,),
    "seccomp_suspend": (nr.ptrace,),
    "seccomp_filters": (nr.ptrace, nr.seccomp),
    "mem_dirty_track": (nr.openat,),
    "proc_timers": (nr.timer_create,),
    "tun": (nr.ioctl,),
    "timerfd": (nr.timerfd_create, nr.ioctl),
    "mnt_id": (nr.openat,),
    "aio_remap": (nr.io_setup, nr.mremap, nr.io_submit),
    "fdinfo_lock": (nr.flock,),
    "clone_parent_newpid": (nr.clone,),
    "cgroupns": (nr.newfstatat,),
    "tcp_repair_window": (nr.setsockopt, nr.getsockopt),
    "tcp_half_closed": (nr.setsockopt, nr.connect, nr.shutdown),
    "userns": (nr.newfstatat,),
    "loginuid": (nr.openat,),
    "can_map_vdso": (nr.arch_prctl,),
    "uffd": (nr.userfaultfd, nr.ioctl),
    "uffd-noncoop": (nr.userfaultfd,),
    "sk_ns": (nr.ioctl,),
    "kcmp_epoll": (nr.kcmp,),
    "net_diag_raw": (nr.socket,),
    "clone3_set_tid": (nr.clone3,),
    "timens": (nr.newfstatat,),
    "newifindex": (nr.sendto,),
    "pidfd_store": (nr.pidfd_open, nr.pidfd_getfd),
    "ns_pid": (nr.openat,),
    "network_lock_nftables": (nr.unshare, nr.sendto),
    "sockopt_buf_lock": (nr.getsockopt,),
    "memfd_hugetlb": (nr.memfd_create,),
    "move_mount_set_group": (nr.unshare, nr.mount, nr.move_mount),
    "openat2": (nr.openat2,),
    "get_rseq_conf": (nr.ptrace,),
    "ipv6_freebind": (nr.setsockopt,),
    "pagemap_scan": (nr.ioctl,),
    "timer_cr_ids": (nr.prctl,),
    "pagemap_scan_guard_pages": (nr.ioctl,),
    "autofs": (nr.mount,),
    "compat_cr": (nr.writev,),  # 20 is getpid for 32-bit tasks.
    "breakpoints": (nr.ptrace,),
    "tun_ns": (nr.ioctl,),
    "sk_unix_file": (nr.ioctl,),
    "nsid": (nr.sendto,),
    "link_nsid": (nr.unshare, nr.sendto),
    "capabilities": (nr.capget,),
    "ptrace_seize": (nr.ptrace,),
    "ptrace_xstate": (nr.ptrace,),
    "syscall_info": (nr.ptrace,),
    "process_vm": (nr.process_vm_readv, nr.process_vm_writev),
    "proc_mem": (nr.ptrace, nr.pwrite64),
    "pagemap": (nr.openat,),
    "proc_children": (nr.openat,),
    "executable_memfd": (nr.memfd_create, nr.execve),
    "madvise_guard": (nr.madvise,),
    "membarrier": (nr.membarrier,),
    "write_protect_tracking": (nr.userfaultfd, nr.ioctl),
    "descriptor_table_copy": (nr.close_range,),
    "huge_pages": (nr.openat, nr.mmap),
    "tcp_backlog": (nr.bpf,),
    "inotify_numbers": (nr.inotify_init1, nr.ioctl),
    "unix_queues": (nr.bpf, nr.connect),
    "kernel_view": (nr.bpf, nr.openat),
    "undo_lists": (nr.bpf, nr.openat),
}
# What is made by no system call of its own.
_UNDENIABLE = {"overlayfs_maps", "apparmor_stacking", "has_ipt_legacy", "nftables", "external_net_ns"}


@pytest.mark.parametrize("name", ROWS)
def test_ends_well(name: str) -> None:
    finding = run(ROWS[name].probe)
    assert finding.state in (YES, PARTLY, NO)
    assert bool(finding.reason) is (finding.state != YES)
    for sign_of_a_mistake in ("the probe failed", "killed by signal", "without an answer", "longer than"):
        assert sign_of_a_mistake not in finding.reason


def test_every_row_can_be_denied() -> None:
    assert set(WITHOUT) | _UNDENIABLE == set(ROWS)


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in WITHOUT.items() for call in calls], ids=lambda value: str(value)
)
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_notices_what_is_missing(name: str, call: int, code: int) -> None:
    finding = run(denied(ROWS[name].probe, [call], code))
    assert _missing(ROWS[name], finding)
    assert finding.reason


@pytest.mark.parametrize("name", ["userns", "timens", "overlayfs_maps"])
def test_refused_namespaces_are_only_partly(name: str) -> None:
    finding = run(denied(ROWS[name].probe, [nr.unshare], errno.EPERM))
    assert finding.state == PARTLY
    assert "unshare" in finding.reason


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.skipif(not kernel_config(), reason="this kernel does not tell its configuration")
@pytest.mark.skipif(not FULL, reason="needs root")
def test_agrees_with_the_configuration(name: str) -> None:
    values = [kernel_config().get(option) for option in CONFIG[name].split()]
    if "m" in values:
        pytest.skip("built as a module, which may be missing")
    finding = run(ROWS[name].probe)
    if finding.error == ROWS[name].tolerated != 0:
        pytest.skip(finding.reason)
    assert (finding.state != NO) is all(values), finding.reason


@pytest.mark.skipif(not FULL, reason="needs root")
def test_clone_with_a_taken_pid_but_without_the_right() -> None:
    def probe() -> str | None:
        import os

        os.setresuid(65534, 65534, 65534)
        return ROWS["clone3_set_tid"].probe()

    finding = run(probe)
    assert finding.state == PARTLY
    assert "not permitted" in finding.reason


@pytest.mark.skipif(not FULL, reason="needs root")
@pytest.mark.parametrize("name", ROWS)
def test_leaves_nothing_behind(name: str) -> None:
    def probe() -> None:
        alone()
        before = traces()
        run(ROWS[name].probe)
        after = traces()
        for what, value in before.items():
            assert after[what] == value, f"{what} was {value}, is {after[what]}"

    finding = run(probe)
    assert finding.state == YES, finding.reason


@pytest.mark.skipif(not FULL, reason="needs root")
def test_traces_are_seen() -> None:
    """The test above is able to fail: each of these leaves one thing behind."""

    def probe() -> None:
        import os
        import socket
        import subprocess

        alone()
        before = traces()
        os.open("/", os.O_RDONLY)
        if not os.fork():
            os.execvp("sleep", ["sleep", "60"])
        subprocess.run(["ip", "link", "add", "left", "type", "veth"], check=False)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("/tmp/left")
        after = traces()
        seen = {what for what in before if before[what] != after[what]}
        assert {"children", "descriptors", "/tmp", "net/unix"} <= seen, seen

    finding = run(probe)
    assert finding.state == YES, finding.reason
