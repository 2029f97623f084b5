"""The kinds of image files: their names, magics and messages, and which bytes follow an entry.

Source: CRIU's image format, version 4.2.
"""

from __future__ import annotations

from firn.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEAD_IMAGE = 0x54564319
"""First word of an image file."""
HEAD_SERVICE = 0x55105940
"""First word of a file of the work directory."""

SINGLE, ARRAY, RAW = "single", "array", "raw"

_KINDS = {
    "INVENTORY": "inventory.img single inventory_entry 58313116",
    "PSTREE": "pstree.img array pstree_entry 50273030",
    "SECCOMP": "seccomp.img single seccomp_entry 64413049",
    "CGROUP": "cgroup.img single cgroup_entry 59383330",
    "CPUINFO": "cpuinfo.img single cpuinfo_entry 61404013",
    "APPARMOR": "apparmor.img single apparmor_entry 59423047",
    "FILES": "files.img array file_entry 56303138",
    "REMAP_FPATH": "remap-fpath.img array remap_file_path_entry 59133954",
    "GHOST_FILE": "ghost-file-%x.img single ghost_file_entry 52583605",
    "FILE_LOCKS": "filelocks.img array file_lock_entry 54323616",
    "PIPES_DATA": "pipes-data.img array pipe_data_entry 56453709",
    "FIFO_DATA": "fifo-data.img array pipe_data_entry 59333054",
    "SK_QUEUES": "sk-queues.img array sk_packet_entry 56264026",
    "MEMFD_INODE": "memfd.img array memfd_inode_entry 48453499",
    "TTY_INFO": "tty-info.img array tty_info_entry 59453036",
    "TTY_DATA": "tty-data.img array tty_data_entry 59413026",
    "TCP_STREAM": "tcp-stream-%x.img single tcp_stream_entry 51465506",
    "BPFMAP_FILE": "bpfmap-file.img array bpfmap_file_entry 57506142",
    "BPFMAP_DATA": "bpfmap-data.img array bpfmap_data_entry 64324033",
    "BINFMT_MISC": "binfmt-misc.img array binfmt_misc_entry 67343323",
    "AUTOFS": "autofs-%u.img single autofs_entry 49353943",
    "CORE": "core-%u.img single core_entry 55053847",
    "IDS": "ids-%u.img single task_kobj_ids_entry 54432030",
    "MM": "mm-%u.img single mm_entry 57492820",
    "FS": "fs-%u.img single fs_entry 51403912",
    "FDINFO": "fdinfo-%u.img array fdinfo_entry 56213732",
    "PAGEMAP": "pagemap-%u.img array pagemap_head 56084025",
    "PAGEMAP_SHMEM": "pagemap-shmem-%u.img array pagemap_head 56084025",
    "PAGES": "pages-%u.img raw",
    "UTSNS": "utsns-%u.img single utsns_entry 54473203",
    "IPC_VAR": "ipcns-var-%u.img single ipc_var_entry 53115007",
    "IPCNS_SHM": "ipcns-shm-%u.img array ipc_shm_entry 46283044",
    "IPCNS_MSG": "ipcns-msg-%u.img array ipc_msg_entry 55453737",
    "IPCNS_SEM": "ipcns-sem-%u.img array ipc_sem_entry 59573019",
    "MNTS": "mountpoints-%u.img array mnt_entry 55563928",
    "NETDEV": "netdev-%u.img array net_device_entry 57373951",
    "NETNS": "netns-%u.img single netns_entry 55933752",
    "IFADDR": "ifaddr-%u.img raw",
    "ROUTE": "route-%u.img raw",
    "ROUTE6": "route6-%u.img raw",
    "RULE": "rule-%u.img raw",
    "IPTABLES": "iptables-%u.img raw",
    "IP6TABLES": "ip6tables-%u.img raw",
    "NFTABLES": "nftables-%u.img raw",
    "NETNF_CT": "netns-ct-%u.img raw",
    "NETNF_EXP": "netns-exp-%u.img raw",
    "TMPFS_DEV": "tmpfs-dev-%u.tar.gz.img raw",
    "TMPFS_IMG": "tmpfs-%u.tar.gz.img raw",
    "USERNS": "userns-%u.img single userns_entry 55474906",
    "TIMENS": "timens-%u.img single timens_entry 43114433",
    "PIDNS": "pidns-%u.img single pidns_entry 61157326",
    "STATS_DUMP": "stats-dump single stats_entry 57093306",
    "STATS_RESTORE": "stats-restore single stats_entry 57093306",
    "IRMAP_CACHE": "irmap-cache array irmap_cache_entry 57004059",
    # What older versions wrote; read, never written.
    "REG_FILES": "reg-files.img array reg_file_entry 50363636",
    "EXT_FILES": "ext-files.img array ext_file_entry 59255641",
    "NS_FILES": "ns-files.img array ns_file_entry 61394011",
    "EVENTFD_FILE": "eventfd.img array eventfd_file_entry 44523722",
    "EVENTPOLL_FILE": "eventpoll.img array eventpoll_file_entry 45023858",
    "EVENTPOLL_TFD": "eventpoll-tfd.img array eventpoll_tfd_entry 44433746",
    "SIGNALFD": "signalfd.img array signalfd_entry 57323820",
    "INOTIFY_FILE": "inotify.img array inotify_file_entry 48424431",
    "INOTIFY_WD": "inotify-wd.img array inotify_wd_entry 54562009",
    "FANOTIFY_FILE": "fanotify.img array fanotify_file_entry 55096122",
    "FANOTIFY_MARK": "fanotify-mark.img array fanotify_mark_entry 56506035",
    "PIPES": "pipes.img array pipe_entry 56513555",
    "FIFO": "fifo.img array fifo_entry 58364939",
    "UNIXSK": "unixsk.img array unix_sk_entry 54373943",
    "INETSK": "inetsk.img array inet_sk_entry 56443851",
    "PACKETSK": "packetsk.img array packet_sock_entry 60454618",
    "NETLINK_SK": "netlinksk.img array netlink_sk_entry 58005614",
    "TTY_FILES": "tty.img array tty_file_entry 59433025",
    "TUNFILE": "tunfile.img array tunfile_entry 57143751",
    "TIMERFD": "timerfd.img array timerfd_entry 50493712",
    "PIDFD": "pidfd.img array pidfd_entry 54435556",
    "VMAS": "vmas-%u.img array vma_entry 54123737",
    "SIGACT": "sigacts-%u.img array sa_entry 55344201",
    "ITIMERS": "itimers-%u.img array itimer_entry 57464056",
    "POSIX_TIMERS": "posix-timers-%u.img array posix_timer_entry 52603957",
    "CREDS": "creds-%u.img single creds_entry 54023547",
    "RLIMIT": "rlimit-%u.img array rlimit_entry 57113925",
    "SIGNAL": "signal-s-%u.img array siginfo_entry 59255647",
    "PSIGNAL": "signal-p-%u.img array siginfo_entry 59255647",
    "BINFMT_MISC_OLD": "binfmt-misc-%u.img array binfmt_misc_entry 67343323",
}
"""``NAME: FILE SHAPE [MESSAGE MAGIC]``; the index in a file name is decimal (%u) or lower-case hexadecimal (%x)."""

_SERVICE = ("STATS_DUMP", "STATS_RESTORE", "IRMAP_CACHE")

REST = {"pagemap_head": "pagemap_entry"}
"""The message of the entries behind the first one, where it is another."""

INNER = {"ghost_file_entry": "ghost_chunk_entry", "ipc_msg_entry": "ipc_msg"}
"""The message of framed entries that belong to an entry and come behind it."""

_LENGTHS = {
    "pipe_data_entry": ("bytes", 1, 1),
    "sk_packet_entry": ("length", 1, 1),
    "tcp_stream_entry": ("inq_len outq_len", 1, 1),
    "bpfmap_data_entry": ("keys_bytes values_bytes", 1, 1),
    "ghost_chunk_entry": ("len", 1, 1),
    "ipc_msg": ("msize", 1, 8),
    "ipc_sem_entry": ("nsems", 2, 8),
    "ipc_shm_entry": ("size", 1, 4),
}
"""Payload of a message: the fields that are added up, the bytes each counts for, what the sum is padded to."""


class Kind:
    """One kind of image file.

    *message* is that of the first entry, *rest* that of the others; *magic* and *message* are 0 and empty for raw
    files, which have no framing. *payload*: entries may have bytes behind them.
    """

    __slots__ = ("_base", "head", "magic", "message", "name", "payload", "prefix", "rest", "shape", "suffix")

    def __init__(self, name: str) -> None:
        file, self.shape, *typed = _KINDS[name].split()
        self.name = name
        self.message, self.magic = (typed[0], int(typed[1], 16)) if typed else ("", 0)
        self.rest = REST.get(self.message, self.message)
        self.payload = self.message in _LENGTHS or self.message in INNER
        self.head = HEAD_SERVICE if name in _SERVICE else HEAD_IMAGE
        self.prefix, percent, after = file.partition("%")
        self.suffix = after[1:]
        self._base = {"": 0, "u": 10, "x": 16}[after[:1] if percent else ""]

    def file(self, index: int | None = None) -> str:
        """The name of the file with *index*.

        Raises :class:`ImageError` if this kind needs an index and none is given, or the reverse.
        """
        if (index is None) != (not self._base):
            raise ImageError(f"image kind {self.name}: {'no index given' if index is None else 'it has no index'}")
        if index is None:
            return self.prefix
        if index < 0:
            raise ImageError(f"image kind {self.name}: the index {index} is negative")
        return f"{self.prefix}{index:x}{self.suffix}" if self._base == 16 else f"{self.prefix}{index}{self.suffix}"

    def index(self, text: str) -> int | None:
        """The number that *text* stands for in a file name, None if it is not written as :meth:`file` writes it."""
        if not text.isascii() or not text.isalnum() or len(text) > 20:
            return None
        try:
            number = int(text, self._base)
        except ValueError:
            return None
        return number if self.file(number) == f"{self.prefix}{text}{self.suffix}" else None


_made: dict[str, Kind] = {}
_by_affixes: dict[tuple[str, str], str] = {}


def kind(name: str) -> Kind:
    """The kind called *name*; :class:`ImageError` if there is none."""
    found = _made.get(name)
    if found is None:
        if name not in _KINDS:
            raise ImageError(f"there is no image kind {name!r}")
        found = _made[name] = Kind(name)
    return found


def names() -> list[str]:
    """The names of all kinds."""
    return list(_KINDS)


def identify(file: str) -> tuple[Kind, int | None] | None:
    """The kind and index of a file name, None for a name that is no image's."""
    if not _by_affixes:
        for name, text in _KINDS.items():
            prefix, _, after = text.split()[0].partition("%")
            _by_affixes[prefix, after[1:]] = name
    plain = _by_affixes.get((file, ""))
    if plain:
        return kind(plain), None
    stem, dash, rest = file.rpartition("-")
    text, dot, suffix = rest.partition(".")
    indexed = _by_affixes.get((stem + dash, dot + suffix))
    if indexed is None:
        return None
    number = kind(indexed).index(text)
    return None if number is None else (kind(indexed), number)


def payload(message: str, entry: dict[str, Any]) -> tuple[int, int] | None:
    """(length of data, length with padding) of the bytes behind *entry*; None: all the rest of the file.

    What is framed itself, as :data:`INNER` says, does not count.
    """
    if message == "ghost_file_entry":
        whole = not entry.get("chunks") and entry["mode"] & 0o170000 == 0o100000
        return None if whole else (0, 0)
    rule = _LENGTHS.get(message)
    if rule is None or (message == "ipc_shm_entry" and entry.get("in_pagemaps")):
        return 0, 0
    fields, factor, align = rule
    length = sum([entry.get(field, 0) for field in fields.split()]) * factor
    return length, -(-length // align) * align


def inner(message: str, entry: dict[str, Any]) -> tuple[str, int | None]:
    """(message, count) of the framed entries that belong to *entry*; a count of None: to the end of the file."""
    if message == "ipc_msg_entry":
        return INNER[message], int(entry["qnum"])
    if message == "ghost_file_entry" and entry.get("chunks"):
        return INNER[message], None
    return "", 0
