"""What is checked: one row for every ability of the kernel that CRIU's check knows or that firn itself uses."""

from __future__ import annotations

import errno

from firn.errors import KernelError, NotBuilt
from firn.host import features
from firn.host import probes_files as files
from firn.host import probes_memory as memory
from firn.host import probes_namespaces as namespaces
from firn.host import probes_network as network
from firn.host import probes_processes as processes
from firn.host import probes_tracing as tracing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from firn.check.isolate import Probe

NEEDED = "needed"
"""firn cannot do without it."""
USED = "used"
"""firn does more, or does it faster, with it."""
UNUSED = "unused"
"""firn does not use it, or not yet."""

REQUIRED, EXTRA, EXPERIMENTAL, ALONE = 1, 2, 3, 0
"""CRIU's categories; what is ALONE counts for no verdict, it is only answered by name."""


class Ability:
    """One row. *name* is CRIU's ``--feature`` name where it has one (*feature*).

    *criu* is CRIU's category, *firn* what it means to firn. With *strict* an ability that is there only partly counts
    as missing. *tolerated* is an errno of the probe that does not count as missing in a verdict.
    """

    __slots__ = ("criu", "feature", "firn", "loss", "name", "probe", "purpose", "strict", "tolerated")

    def __init__(
        self,
        name: str,
        probe: Probe,
        criu: int,
        firn: str,
        purpose: str,
        loss: str,
        *,
        feature: bool = True,
        strict: bool = False,
        tolerated: int = 0,
    ) -> None:
        self.name = name
        self.probe = probe
        self.criu = criu
        self.firn = firn
        self.purpose = purpose
        self.loss = loss
        self.feature = feature
        self.strict = strict
        self.tolerated = tolerated


def _asked(question: Callable[[], bool]) -> Probe:
    """A probe out of a question of :mod:`firn.host.features`."""

    def probe() -> None:
        if not question():
            raise KernelError(features.refusals[question.__name__])

    return probe


def _copied_descriptors() -> None:
    """pidfd_open(2) and pidfd_getfd(2)."""
    _asked(features.pidfd_getfd)()


def _not_built(what: str) -> Probe:
    """A probe for what CRIU's check answers about the program, not about the kernel."""

    def probe() -> None:
        raise NotBuilt(f"firn {what} yet")

    return probe


def _base(name: str, probe: Probe, criu: int, firn: str, purpose: str, loss: str) -> Ability:
    """A row whose name is firn's own: CRIU has no ``--feature`` for it."""
    return Ability(name, probe, criu, firn, purpose, loss, feature=False)


ABILITIES: tuple[Ability, ...] = (
    # What CRIU requires, in the order in which it looks.
    _base("map_files", files.map_files, REQUIRED, NEEDED,
          "opens mapped files, deleted ones too", "no process can be dumped"),
    _base("socket_diag", network.socket_lists, REQUIRED, USED,
          "lists sockets and their state", "sockets cannot be dumped"),
    _base("ns_last_pid", processes.last_pid, REQUIRED, UNUSED,
          "an older way to choose pids", "pids are chosen by clone3 alone"),
    _base("peek_offset", network.peek_offset, REQUIRED, USED,
          "reads what is queued in a socket", "sockets with unread data cannot be dumped"),
    _base("kcmp", files.same_file, REQUIRED, NEEDED,
          "tells which files are shared", "no process can be dumped"),
    _base("mm_map", memory.memory_map, REQUIRED, NEEDED,
          "sets where a process has its code, heap and arguments", "nothing can be restored"),
    _base("file_owner", files.file_owner, REQUIRED, NEEDED,
          "saves who is signalled by a file", "no process with open files can be dumped"),
    _base("proc_stat", processes.process_stat, REQUIRED, NEEDED,
          "tells where a process has its code, heap and arguments", "no process can be dumped"),
    _base("tcp_repair", network.tcp_repair, REQUIRED, UNUSED,
          "reads and sets the state of TCP connections", "TCP connections cannot be kept"),
    _base("fdinfo", files.special_files, REQUIRED, USED,
          "tells the state of eventfd, epoll, signalfd and inotify files", "such files cannot be dumped"),
    _base("vmsplice", memory.unaligned_vmsplice, REQUIRED, UNUSED,
          "moves pages through pipes", "pages are moved in other ways"),
    _base("locked_pty", files.locked_terminal, REQUIRED, USED,
          "finds pseudoterminals and their locks", "terminals cannot be dumped"),
    _base("socket_filter", network.filter_and_device, REQUIRED, USED,
          "reads filter and device of a socket", "sockets that have these cannot be dumped"),
    _base("sem_next_id", processes.next_semaphore_id, REQUIRED, UNUSED,
          "chooses the ids of System V objects", "System V objects cannot be restored"),
    _base("sigqueueinfo", processes.queued_signals, REQUIRED, NEEDED,
          "brings pending signals back as they were", "processes with pending signals cannot be restored"),
    _base("ptrace_signals", tracing.signals, REQUIRED, NEEDED,
          "reads pending and blocked signals", "no process can be dumped"),
    _base("vdso_remap", memory.vdso_remap, REQUIRED, UNUSED,
          "moves the vdso to where it was", "can_map_vdso does the same"),
    # CRIU's extra category.
    Ability("seccomp_suspend", _asked(features.suspend_seccomp), EXTRA, USED,
            "drives processes that run under seccomp", "such processes cannot be dumped"),
    Ability("seccomp_filters", tracing.seccomp_filters, EXTRA, USED,
            "reads seccomp filters", "processes with filters cannot be dumped"),
    Ability("mem_dirty_track", memory.soft_dirty, EXTRA, UNUSED,
            "tells CRIU which pages were written", "firn uses write_protect_tracking instead"),
    _base("proc_timers", processes.process_timers, EXTRA, USED,
          "tells the POSIX timers of a process", "processes with such timers cannot be dumped"),
    Ability("tun", files.tun, EXTRA, UNUSED,
            "gives tun devices their numbers", "tun devices cannot be dumped", tolerated=errno.ENOENT),
    Ability("timerfd", files.timerfd, EXTRA, USED,
            "saves and sets the ticks of a timerfd", "timerfds cannot be restored"),
    Ability("mnt_id", files.mount_id, EXTRA, UNUSED,
            "tells on which mount an open file is", "the mounts of a container cannot be dumped"),
    Ability("aio_remap", memory.aio_remap, EXTRA, USED,
            "moves an aio ring to where it was", "processes that use aio cannot be restored"),
    Ability("fdinfo_lock", files.file_locks, EXTRA, USED,
            "tells which file locks are whose", "locks are looked for in /proc/locks, less exactly"),
    _base("clone_parent_newpid", processes.sibling_namespace, EXTRA, UNUSED,
          "restores a pid namespace as a sibling", "--restore-sibling fails for containers"),
    Ability("cgroupns", namespaces.cgroup_namespace, EXTRA, UNUSED,
            "cgroup namespaces", "trees with cgroup namespaces cannot be restored"),
    _base("tcp_repair_window", network.tcp_repair_window, EXTRA, UNUSED,
          "saves the windows of TCP connections", "restored connections may stall at first"),
    Ability("tcp_half_closed", network.tcp_half_closed, EXTRA, UNUSED,
            "saves TCP connections that one side has closed", "such connections cannot be kept"),
    Ability("userns", namespaces.user_namespace, EXTRA, UNUSED,
            "user namespaces", "trees with user namespaces cannot be restored"),
    Ability("loginuid", processes.login_uid, EXTRA, USED,
            "saves and sets the audit user of a process", "restored processes have that of firn", strict=True),
    Ability("can_map_vdso", _asked(features.map_vdso), EXTRA, NEEDED,
            "puts the vdso where it was", "nothing can be restored"),
    Ability("uffd", memory.userfaultfd, EXTRA, UNUSED,
            "brings pages in when they are touched", "no lazy restore"),
    Ability("uffd-noncoop", memory.userfaultfd_events, EXTRA, UNUSED,
            "follows processes that fork or unmap while their pages come", "no lazy restore of such processes"),
    Ability("sk_ns", network.socket_namespace, EXTRA, UNUSED,
            "tells in which network namespace a socket is", "sockets of several namespaces cannot be told apart"),
    Ability("kcmp_epoll", files.same_epoll_target, EXTRA, USED,
            "tells which file an epoll watches", "epolls that watch duplicated or closed files cannot be dumped"),
    Ability("net_diag_raw", network.raw_socket_lists, EXTRA, UNUSED,
            "lists raw sockets", "raw sockets cannot be dumped"),
    Ability("clone3_set_tid", processes.chosen_pid, EXTRA, NEEDED,
            "gives restored tasks their pids", "nothing can be restored", strict=True),
    Ability("timens", namespaces.time_namespace, EXTRA, USED,
            "lets clocks go on from where they were", "monotonic clocks jump at a restore"),
    Ability("newifindex", network.new_index, EXTRA, UNUSED,
            "moves interfaces into a namespace with chosen numbers", "no --external netdev[]"),
    Ability("pidfd_store", _copied_descriptors, EXTRA, NEEDED,
            "takes copies of a task's open files, names tasks without races", "no process can be dumped"),
    Ability("ns_pid", processes.nested_pids, EXTRA, UNUSED,
            "tells the pids in nested namespaces", "pid namespaces cannot be dumped"),
    Ability("network_lock_nftables", network.nft_concatenated_sets, EXTRA, UNUSED,
            "locks connections by nftables", "connections are locked by iptables, or not"),
    Ability("sockopt_buf_lock", network.buffer_lock, EXTRA, USED,
            "saves that a program has set its socket buffers", "the kernel may resize them after a restore"),
    Ability("memfd_hugetlb", memory.memfd_hugetlb, EXTRA, USED,
            "memfds of huge pages", "shared huge pages cannot be restored"),
    Ability("move_mount_set_group", namespaces.set_group, EXTRA, UNUSED,
            "rebuilds mount propagation", "complicated mount trees cannot be restored"),
    Ability("openat2", files.openat2, EXTRA, UNUSED,
            "opens files without leaving a directory", "other checks are made"),
    Ability("get_rseq_conf", _asked(features.rseq_configuration), EXTRA, NEEDED,
            "saves restartable sequences, which nearly every program registers", "such programs cannot be dumped"),
    Ability("ipv6_freebind", network.ipv6_freebind, EXTRA, UNUSED,
            "saves that option of a socket", "the option of IPv4 is used"),
    Ability("pagemap_scan", _asked(features.pagemap_scan), EXTRA, USED,
            "finds the pages to save", "they are found by /proc/PID/pagemap, slowly"),
    Ability("overlayfs_maps", namespaces.overlay_maps, EXTRA, USED,
            "names mapped files on overlayfs correctly", "such files may be mistaken for others"),
    Ability("timer_cr_ids", _asked(features.timer_restore_ids), EXTRA, USED,
            "gives POSIX timers their ids", "ids are reached in a loop, slowly when they are large"),
    Ability("pagemap_scan_guard_pages", _asked(features.pagemap_scan_guard), EXTRA, USED,
            "finds guard pages", "processes with guard pages lose them"),
    Ability("apparmor_stacking", namespaces.apparmor_stacking, EXTRA, UNUSED,
            "stacked AppArmor profiles", "processes under stacked profiles cannot be dumped", tolerated=errno.ENOENT),
    # CRIU's experimental category.
    Ability("autofs", namespaces.autofs_pipe, EXPERIMENTAL, UNUSED,
            "finds the pipe of an autofs mount", "autofs mounts cannot be dumped"),
    Ability("compat_cr", tracing.compat_tasks, EXPERIMENTAL, UNUSED,
            "32-bit tasks", "32-bit tasks cannot be dumped", strict=True),
    # What CRIU only answers by name.
    Ability("breakpoints", tracing.breakpoints, ALONE, UNUSED,
            "stops tasks at an address", "tasks are stepped"),
    Ability("tun_ns", files.tun_namespace, ALONE, UNUSED,
            "tells in which network namespace a tun device is", "it is taken to be in that of the tree"),
    Ability("sk_unix_file", network.unix_file, ALONE, UNUSED,
            "finds the file of a bound unix socket", "it is looked for by its name"),
    Ability("nsid", network.namespace_id, ALONE, UNUSED,
            "tells network namespaces apart", "trees with several of them cannot be dumped"),
    Ability("link_nsid", network.link_namespace_id, ALONE, UNUSED,
            "tells where the peer of a veth device is", "peers in other namespaces of the tree are not found"),
    Ability("has_ipt_legacy", network.legacy_iptables, ALONE, UNUSED,
            "iptables rules of the legacy kind", "such rules are not carried"),
    Ability("nftables", _not_built("does not carry nftables rules"), ALONE, UNUSED,
            "nftables rules", "such rules are not carried"),
    Ability("external_net_ns", _not_built("does not take --external net[]"), ALONE, UNUSED,
            "network namespaces from outside", "the network namespace of the restore is used"),
    # What firn uses and CRIU's check does not ask for.
    _base("capabilities", processes.capabilities, ALONE, NEEDED,
          "the right to trace, to choose pids, to raise limits", "what they allow cannot be done"),
    _base("ptrace_seize", tracing.seize, ALONE, NEEDED,
          "stops tasks without traces", "no process can be dumped"),
    _base("ptrace_xstate", tracing.extended_state, ALONE, NEEDED,
          "reads and sets vector registers", "no process can be dumped"),
    _base("syscall_info", tracing.syscall_info, ALONE, UNUSED,
          "tells the system call that a task is in", "it is read from the registers"),
    _base("process_vm", tracing.process_vm, ALONE, NEEDED,
          "reads and writes the memory of tasks", "no process can be dumped"),
    _base("proc_mem", tracing.proc_mem, ALONE, NEEDED,
          "writes memory that the task may only read", "no process can be dumped"),
    _base("pagemap", memory.pagemap, ALONE, NEEDED,
          "finds the pages to save", "no process can be dumped"),
    _base("proc_children", processes.child_list, ALONE, NEEDED,
          "finds the children of a task", "process trees cannot be dumped"),
    _base("executable_memfd", memory.executable_memfd, ALONE, NEEDED,
          "starts the tasks of a restore", "nothing can be restored"),
    _base("madvise_guard", _asked(features.madvise_guard), ALONE, USED,
          "guard pages", "processes with guard pages cannot be restored"),
    _base("membarrier", _asked(features.membarrier_registrations), ALONE, USED,
          "saves what a process has registered for", "registrations are lost"),
    _base("write_protect_tracking", memory.write_protect_tracking, ALONE, UNUSED,
          "tells which pages were written", "every dump is a full one"),
    _base("descriptor_table_copy", files.descriptor_table_copy, ALONE, USED,
          "lets the copy of a task hold no files", "no --fork-snapshot"),
    _base("huge_pages", memory.huge_pages, ALONE, USED,
          "mappings of huge pages", "processes that have them cannot be restored"),
    _base("tcp_backlog", network.tcp_backlog, ALONE, USED,
          "puts TCP connections back that wait to be accepted", "dumps wait until they are, or are refused"),
    _base("inotify_numbers", files.inotify_numbers, ALONE, USED,
          "gives inotify watches their numbers", "they are reached in a loop"),
    _base("unix_queues", network.unix_queues, ALONE, USED,
          "sees what clients have sent to a unix socket before it accepted them", "a dump waits for it to accept them"),
    _base("kernel_view", memory.kernel_view, ALONE, USED,
          "sees AIO requests in flight", "they are lost, with a warning"),
    _base("undo_lists", memory.undo_lists, ALONE, USED,
          "sees what processes give back to semaphores", "all used sets are asked about, which tells less"),
)  # fmt: skip
