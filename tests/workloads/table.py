"""Which workloads there are, and what is special about some.

A workload is a mode of one of the C programs beside this file. Unless its entry says otherwise it runs plainly, with
sabotage, and through every way of checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_WAYS = ("plain", "break")
GONE_WAYS = ("dump", "twice")
CHECKPOINT_WAYS = (*GONE_WAYS, "leave")
# A dump that leaves the program running, then one from which it is restored: what is interrupted, twice over.
AGAIN_WAY = "again"
# A dump without the options of the entry is refused.
REFUSED_WAY = "refused"
REFUSED_FIRST = (*PLAIN_WAYS, REFUSED_WAY, *CHECKPOINT_WAYS)


@dataclass(frozen=True)
class Workload:
    """One mode of one program, and how it has to be treated.

    ``needs``: abilities of firn that are not built yet; the checkpoint ways are skipped, with the name.
    ``dump``/``restore``: extra options. ``refused``: patterns which must all be in what a dump without these options
    says, which must be refused.
    ``ways``: the ways it is run in. ``once``: its check cannot be asked twice of one process.
    ``stop``: the runner stops the program before the dump and continues it after the restore.
    ``unlike``: portrait fields that may differ for this workload (regular expressions).
    ``dynamic``: linked against the shared C library. ``huge``: needs that many huge pages in the machine's pool.
    """

    program: str
    mode: str
    needs: str = ""
    dump: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    ways: tuple[str, ...] = PLAIN_WAYS + CHECKPOINT_WAYS
    once: bool = False
    stop: bool = False
    unlike: tuple[str, ...] = ()
    dynamic: bool = False
    huge: int = 0

    @property
    def name(self) -> str:
        return f"{self.program}-{self.mode}"


def _all(program: str, modes: str, dynamic: bool = False, unlike: tuple[str, ...] = ()) -> list[Workload]:
    return [Workload(program, mode, dynamic=dynamic, unlike=unlike) for mode in modes.split()]


def _waits(modes: str, unlike: tuple[str, ...] = ()) -> list[Workload]:
    ways = (*PLAIN_WAYS, *CHECKPOINT_WAYS, AGAIN_WAY)
    # Their checks take as long as the wait, so asking them twice would only cost time.
    return [
        Workload("waits", mode, unlike=unlike, once=True, ways=ways) for mode in modes.split()
    ]


def _refused(program: str, mode: str, *refused: str) -> Workload:
    return Workload(program, mode, refused=refused, ways=(*PLAIN_WAYS, REFUSED_WAY))


def _obstacle(mode: str, *refused: str) -> Workload:
    return _refused("obstacles", mode, *refused)


TABLE: list[Workload] = [
    *_all("memory_basic", "anon file-private file-offset anon-shared file-shared dev-zero unlinked", dynamic=True),
    *_all("memory_layout", "growsdown brk protnone patchwork many reserve names"),
    *_all("memory_pages", "presence zero thp cow"),
    *_all("memory_advice", "dontfork dontdump wipeonfork hugepage nohugepage mergeable random sequential"),
    # The kernel may drop the pages whenever it likes.
    Workload("memory_advice", "droppable", unlike=(r"mapping\..*\.Anonymous",)),
    *_all("memory_advice", "mlock onfault future guard guard-shared"),
    # Pages of the object come back, but are mapped, and so locked, when they are touched.
    Workload("memory_advice", "onfault-shared", unlike=(r"mapping\..*\.Locked",)),
    Workload("memory_advice", "hugetlb-private", huge=2),
    Workload("memory_advice", "hugetlb-shared", huge=2),
    *_all("pkeys", "keys child"),
    *_all("memfd", "mapped closed sealed positions"),
    *_all("aio", "ring unreaped"),
    *_all("vdso", "vdso auxv overwritten title", dynamic=True),
    *_all("attributes", "thp-disable dumpable subreaper pdeathsig slack oom coredump-filter comm session-nice"),
    *_all("attributes", "no-randomize read-implies-exec mdwe membarrier"),
    *_all("threads", "tls tids robust rseq join", dynamic=True),
    *_all("thread_state", "masks altstack on-altstack names"),
    *_all("scheduling", "fifo rr batch idle deadline nice affinity ioprio slack"),
    *_all("registers", "integer bases x87 sse avx avx512 masks pkru all"),
    Workload("leader", "gone"),
    Workload("leader", "child", once=True, ways=(*PLAIN_WAYS, "twice")),
    Workload("leader", "halted", stop=True, ways=(*PLAIN_WAYS, "leave")),
    Workload("leader", "whole", dump=("--file-locks",)),
    *_waits("nanosleep nanosleep-rest clock-relative clock-monotonic clock-realtime clock-boottime"),
    *_waits("poll poll-file select futex futex-until condition sigtimedwait"),
    # They have another mask while they wait, and the time may be over.
    *_waits("ppoll pselect", unlike=(r".*status\.SigBlk",)),
    *_waits("futex-forever pause sigsuspend sigwaitinfo epoll pipe child"),
    *_all("signals", "handlers ignored blocked pending-private pending-shared deliver"),
    *_all("signals", "crowded"),
    # Its thread may be in the handler.
    Workload("signals", "trapping", unlike=(r".*status\.(SigBlk|SigPnd)",)),
    Workload("signals", "stopped", stop=True),
    *_all("timers", "real virtual prof clocks absolute notify sparse crowd overrun overrun-kept"),
    # Their signals come at any moment.
    *_all("timers", "ticking firing", unlike=(r".*status\.(ShdPnd|SigPnd)",)),
    *_all("identity", "ordinary four-ids ambient bounding securebits no-new-privs thread-creds"),
    *_all("identity", "limits tight umask cwd cwd-deleted chroot session loginuid"),
    *_all("seccomp", "strict one stacked tsync long threads"),
    *_all("files", "positions append path path-link directory dup cloexec devices log proc owner"),
    *_all("procfiles", "dead shown"),
    *_all("ghosts", "ghost sparse two folder"),
    # The name has to be another one.
    Workload("ghosts", "misplaced", unlike=(r"fd\.\d+",)),
    # It is called by its inode number.
    Workload("ghosts", "nameless", once=True, unlike=(r"fd\.\d+",)),
    Workload("ghosts", "large", refused=("--ghost-limit",), dump=("--ghost-limit", "4M"), ways=REFUSED_FIRST),
    # A dump that leaves the program running takes its helper link away again, so only the live file is left of it.
    Workload(
        "ghosts",
        "relinked",
        refused=("--link-remap",),
        dump=("--link-remap",),
        ways=(*PLAIN_WAYS, REFUSED_WAY, *GONE_WAYS),
    ),
    *_all("descriptors", "thousand high"),
    *_all("obstacles", "pipe events socketpair terminal child listener"),
    # What nobody can save: each of them has to be named at once.
    *_all("policies", "set"),
    _refused("policies", "segment", "has a local descriptor table"),
    _refused("policies", "dispatch", "has syscall user dispatch"),
    _refused("policies", "keyring", "has a process keyring"),
    _refused("policies", "landlock", "Landlock restricts it"),
    _refused("policies", "landlock-user", "Landlock restricts it"),
    *_all("apart", "directories deleted chroot dead jailed shared"),
    *_all("keyrings", "named anonymous"),
    _refused("keyrings", "apart", "has another session keyring than the rest of the tree"),
    _refused("keyrings", "sealed", "has the logon key 'firn-test:sealed' in its session keyring"),
    _refused("aio", "waiting", "requests in flight: 1, which wait for something to happen"),
    _refused("hidden", "detached", "is on a mount that is not mounted anywhere"),
    _refused("hidden", "queue", "is a POSIX message queue"),
    _refused("hidden", "notify", "F_NOTIFY"),
    _refused("hidden", "ring", "has an io_uring for itself"),
    _refused("hidden", "worker", "is an io_uring", "is a worker of an io_uring"),
    _refused("hidden", "pager", "is a userfaultfd", "has its faults served by a userfaultfd"),
    _refused("hidden", "asked", "is a seccomp notifier"),
    _refused("apart", "files", "thread .* has descriptors of its own"),
    _refused("apart", "family", r"thread .* shares its directories \(CLONE_FS\) with process .*, but not with its own"),
    _refused("apart", "mounts", "thread .* is in another mnt namespace than its process"),
    _refused("apart", "namespace", "thread .* is in another uts namespace than its process"),
    _refused("apart", "children", "has its children born into another time namespace"),
    _obstacle("strange", "io_uring", "userfaultfd", "perf", "(?i)bpf"),
]
