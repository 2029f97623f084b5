"""The one way in: option records and the three things that firn does with them.

:data:`TABLE` has one row for every option of CRIU 4.2 and of firn's own; the command line, the configuration files and
the RPC messages are read by it. An option whose work is not built yet is refused by name (:class:`NotBuilt`); building
it means flipping the last cell of its row.

The records (:class:`DumpOptions`, ...) are frozen by convention: nobody changes one after it was made. Attributes are
CRIU's long option names with underscores. They start at CRIU's defaults.
"""

from __future__ import annotations

import os

from firn.errors import NotBuilt, UsageError
from firn.scripts import run_scripts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, Protocol

    from firn.log import Log

    class RestoreResult(Protocol):
        """What a restore hands back."""

        root_pid: int
        """The restored root task, as firn sees it."""
        exit_status: int | None
        """How the root task ended, the shell's way (0..255, 128 + signal); None if nobody waited for it."""
        stats: dict[str, int]
        """Counters and times (microseconds), named as in the ``stats-restore`` image."""


CPU_FPU, CPU_CPU, CPU_INS, CPU_IMAGE = 1, 2, 4, 8
CPU_ALL = CPU_FPU | CPU_CPU | CPU_INS

# The letters of the `commands` column.
COMMANDS = {
    "dump": "D",
    "pre-dump": "P",
    "restore": "R",
    "page-server": "S",
    "lazy-pages": "L",
    "check": "C",
    "service": "V",
    "swrk": "W",
    "dedup": "U",
    "cpuinfo": "I",
    "inspect": "N",
    "unlock": "K",
    "exec": "X",
    "show": "X",
}
_ALL = "DPRSLCVWUIX"


class Option:
    """One option.

    *kind* names the way its value is read (:mod:`firn.cli.values`). *commands* are the letters of the commands that it
    has an effect on; any other command accepts and ignores it. *built* is True, False, a tuple of the values that
    work, or a function which tells that of a value. *no*: a ``--no-`` form exists. *attribute* is the record's
    attribute, None if the option acts while parsing.
    """

    __slots__ = ("attribute", "built", "commands", "default", "firn_only", "kind", "long", "no", "short")

    def __init__(
        self,
        long: str,
        short: str,
        kind: str,
        commands: str,
        default: object,
        built: bool | tuple[object, ...] | Callable[[Any], bool],
        *,
        no: bool = False,
        attribute: str | None = "",
        firn_only: bool = False,
    ) -> None:
        self.long = long
        self.short = short
        self.kind = kind
        self.commands = commands
        self.default = default
        self.built = built
        self.no = no
        self.attribute = long.replace("-", "_") if attribute == "" else attribute
        self.firn_only = firn_only

    def works(self, value: object) -> bool:
        """Whether *value* asks for nothing that is not built."""
        if isinstance(self.built, bool):
            return self.built or value == self.default
        return self.built(value) if callable(self.built) else value in self.built


_OF_CONTAINERS = tuple(f"{name}[" for name in ("mnt", "dev", "net", "pid", "veth", "macvlan", "netdev"))


def _on_one_host(external: tuple[str, ...]) -> bool:
    """Whether no entry of ``--external`` is about a container. Types that nobody knows have no effect, as in CRIU."""
    return not any(text.startswith(_OF_CONTAINERS) for text in external)


TABLE: tuple[Option, ...] = (
    # General and directories
    Option("tree", "t", "pid", "DPR", 0, True),
    Option("images-dir", "D", "text", "DPRSLCUWIK", ".", True),
    Option("work-dir", "W", "text", _ALL, "", True),
    Option("log-file", "o", "text", _ALL, "", True),
    Option("log-pid", "", "flag", "R", False, True, no=True),
    Option("verbosity", "v", "verbosity", _ALL, 2, True),
    Option("display-stats", "", "flag", "DPR", False, True, no=True),
    Option("pidfile", "", "text", "RSLV", "", True),
    Option("action-script", "", "list", "DRSL", (), True),
    Option("libdir", "L", "text", "DPR", "", False),
    Option("close", "", "close", _ALL, None, True, attribute=None),
    Option("unprivileged", "", "flag", _ALL, False, False, no=True),
    Option("deprecated", "", "flag", _ALL, False, True, no=True),
    Option("stream", "", "flag", "DPRI", False, False, no=True),
    Option("config", "", "ignored", _ALL, None, True, attribute=None),
    Option("no-default-config", "", "ignored flag", _ALL, None, True, attribute=None),
    Option("help", "h", "help", _ALL, None, True, attribute=None),
    Option("version", "V", "version", _ALL, None, True, attribute=None),
    Option("ms", "", "retired", _ALL, None, True, attribute=None),
    # Final state, parenthood, timing
    Option("leave-running", "R", "final", "D", False, True),
    Option("leave-stopped", "s", "final", "DPR", False, True),
    Option("restore-detached", "d", "flag", "RSLV", False, True, no=True),
    Option("daemon", "", "flag", "RSLV", False, True, no=True, attribute="restore_detached"),
    Option("restore-sibling", "S", "flag", "R", False, True, no=True),
    Option("exec-cmd", "", "exec", "R", (), True),
    Option("timeout", "", "number", "DP", 10, True),
    Option("freeze-cgroup", "", "text", "DP", "", True),
    Option("shell-job", "j", "flag", "DR", False, True, no=True),
    Option("weak-sysctls", "", "flag", "R", False, True, no=True),
    Option("mntns-compat-mode", "", "flag", "R", False, False, no=True),
    # Memory and images
    Option("track-mem", "", "flag", "DP", False, False, no=True),
    Option("prev-images-dir", "", "text", "DPS", "", False),
    Option("auto-dedup", "", "flag", "DPRSL", False, False, no=True),
    Option("pre-dump-mode", "", "pre-dump-mode", "P", "splice", False),
    Option("page-server", "", "flag", "DPL", False, False, no=True),
    Option("address", "", "text", "DPSLV", "", False),
    Option("port", "", "port", "DPSL", 0, False),
    Option("ps-socket", "", "number", "DPSL", -1, False),
    # Only a lazy dump or a server says that it is ready; any other dump never looks at it.
    Option("status-fd", "", "fd", "DSLV", -1, True),
    Option("lazy-pages", "", "flag", "DRS", False, False),
    Option("tls", "", "flag", "DPSL", False, False, no=True),
    Option("tls-cacert", "", "text", "DPSL", "", False),
    Option("tls-cacrl", "", "text", "DPSL", "", False),
    Option("tls-cert", "", "text", "DPSL", "", False),
    Option("tls-key", "", "text", "DPSL", "", False),
    Option("tls-no-cn-verify", "", "flag", "DPSL", False, False),
    Option("cpu-cap", "", "cpu-cap", "DRI", CPU_FPU | CPU_INS, True),
    Option("file-validation", "", "file-validation", "DR", "buildid", True),
    Option("skip-file-rwx-check", "", "flag", "R", False, True, no=True),
    Option("ghost-limit", "", "size", "D", 1 << 20, True),
    Option("ghost-fiemap", "", "flag", "D", True, True, no=True),
    Option("link-remap", "", "flag", "D", False, True, no=True),
    Option("force-irmap", "", "flag", "DP", False, True, no=True),
    Option("irmap-scan-path", "", "list", "DP", (), True),
    Option("evasive-devices", "", "flag", "D", False, True, no=True),
    Option("allow-uprobes", "", "flag", "DR", False, False, no=True),
    Option("file-locks", "l", "flag", "D", False, True, no=True),
    # Sockets, network, terminals
    Option("tcp-established", "", "flag", "DR", False, True, no=True),
    Option("tcp-close", "", "flag", "DR", False, True, no=True),
    Option("skip-in-flight", "", "flag", "D", False, True, no=True),
    Option("network-lock", "", "network-lock", "DR", "iptables", True),
    Option("ext-unix-sk", "x", "ext-unix-sk", "DR", False, True),
    Option("empty-ns", "", "empty-ns", "DR", False, False),
    Option("join-ns", "J", "join-ns", "R", (), False),
    Option("veth-pair", "", "veth-pair", "R", (), _on_one_host, attribute="external"),
    # Mounts, file systems, external resources
    Option("root", "r", "text", "R", "", False),
    Option("external", "", "external", "DR", (), _on_one_host),
    Option("inherit-fd", "", "inherit-fd", "R", (), True),
    Option("ext-mount-map", "M", "ext-mount-map", "DR", (), _on_one_host, attribute="external"),
    Option("enable-external-sharing", "", "flag", "D", False, False),
    Option("enable-external-masters", "", "flag", "D", False, False),
    Option("skip-mnt", "", "list", "D", (), False),
    Option("enable-fs", "", "list", "DR", (), False),
    Option("lsm-profile", "", "lsm-profile", "R", "", False),
    Option("lsm-mount-context", "", "text", "R", "", False),
    # Control groups
    Option("manage-cgroups", "", "manage-cgroups", "DR", "soft", True),
    Option("cgroup-root", "", "list", "DR", (), False),
    Option("cgroup-props", "", "text", "D", "", False),
    Option("cgroup-props-file", "", "text", "D", "", False),
    Option("cgroup-dump-controller", "", "list", "D", (), False),
    Option("cgroup-yard", "", "text", "DR", "", False),
    # Check
    Option("feature", "", "text", "C", None, True),
    Option("extra", "", "flag", "C", False, True, no=True),
    Option("experimental", "", "flag", "C", False, True, no=True),
    Option("all", "", "flag", "CK", False, True),
    # firn's own
    Option("fork-snapshot", "", "flag", "D", False, True, firn_only=True),
    Option("remap-ip", "", "list", "R", (), True, firn_only=True),
    Option("plan", "", "flag", "R", False, False, firn_only=True),
    Option("json", "", "flag", "N", False, True, firn_only=True),
)

# What no command line says.
_MORE: dict[str, dict[str, object]] = {
    "D": {"images_dir_fd": -1},
    "R": {"images_dir_fd": -1, "foreground_status": True},
    "C": {"images_dir_fd": -1, "criu_style": False},
    "I": {"images_dir_fd": -1},
}


def defaults(letter: str) -> dict[str, object]:
    """The attributes of the record of command *letter*, and what they are when nobody says anything."""
    found = {row.attribute: row.default for row in TABLE if row.attribute and letter in row.commands}
    return {**found, **_MORE.get(letter, {})}


class Options:
    """What the records share. Unknown names are a :class:`TypeError`.

    Directories become absolute; ``work_dir`` is the image directory unless given. With ``images_dir_fd`` (an open
    directory, -1 for none) the path is only a name.
    """

    __slots__ = ()
    letter: ClassVar[str] = ""

    images_dir: str
    images_dir_fd: int
    work_dir: str
    log_file: str
    verbosity: int
    unprivileged: bool
    deprecated: bool

    def __init__(self, **values: Any) -> None:
        merged = defaults(self.letter)
        unknown = sorted(values.keys() - merged.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        merged.update(values)
        if values.get("images_dir_fd", -1) >= 0 and "images_dir" not in values:
            merged["images_dir"] = f"/proc/self/fd/{values['images_dir_fd']}"
        merged["images_dir"] = os.path.abspath(str(merged["images_dir"]))
        merged["work_dir"] = os.path.abspath(str(merged["work_dir"] or merged["images_dir"]))
        for name, value in merged.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def refuse_unbuilt(self) -> None:
        """Raise :class:`NotBuilt`, naming the first option whose work firn does not do yet."""
        for row in TABLE:
            if row.attribute and self.letter in row.commands and not row.works(_plain(getattr(self, row.attribute))):
                value = _plain(getattr(self, row.attribute))
                shown = "" if value is True else f" (given: {value})" if isinstance(value, str | int) else ""
                shown = f" (given: {' '.join(map(str, value))})" if isinstance(value, tuple) else shown
                raise NotBuilt(f"option --{row.long}{shown} is not built yet")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class _Transfer(Options):
    """What a dump and a restore share."""

    __slots__ = ()

    tree: int
    display_stats: bool
    action_script: list[str]
    libdir: str
    stream: bool
    leave_stopped: bool
    shell_job: bool
    auto_dedup: bool
    lazy_pages: bool
    cpu_cap: int
    file_validation: str
    allow_uprobes: bool
    tcp_established: bool
    tcp_close: bool
    network_lock: str
    ext_unix_sk: bool
    empty_ns: bool
    external: list[str]
    enable_fs: list[str]
    manage_cgroups: str
    cgroup_root: list[str]
    cgroup_yard: str


class DumpOptions(_Transfer):
    """How to dump: ``tree`` is the root's pid, ``ghost_limit`` is in bytes, ``timeout`` in seconds (0: none)."""

    letter = "D"
    __slots__ = tuple(defaults("D"))

    leave_running: bool
    timeout: int
    freeze_cgroup: str
    track_mem: bool
    prev_images_dir: str
    page_server: bool
    address: str
    port: int
    ps_socket: int
    status_fd: int
    tls: bool
    tls_cacert: str
    tls_cacrl: str
    tls_cert: str
    tls_key: str
    tls_no_cn_verify: bool
    ghost_limit: int
    ghost_fiemap: bool
    link_remap: bool
    force_irmap: bool
    irmap_scan_path: list[str]
    evasive_devices: bool
    file_locks: bool
    skip_in_flight: bool
    enable_external_sharing: bool
    enable_external_masters: bool
    skip_mnt: list[str]
    cgroup_props: str
    cgroup_props_file: str
    cgroup_dump_controller: list[str]
    fork_snapshot: bool


class RestoreOptions(_Transfer):
    """How to restore: with ``foreground_status`` an attached restore waits for the root task, passes signals on to it,
    and gives its status; without, it waits as CRIU does, for all children and whatever signals come.

    The descriptors of ``inherit_fd``, but for 0 to 2, are closed by a restore that succeeds.
    """

    letter = "R"
    __slots__ = tuple(defaults("R"))

    log_pid: bool
    pidfile: str
    restore_detached: bool
    restore_sibling: bool
    exec_cmd: list[str]
    weak_sysctls: bool
    mntns_compat_mode: bool
    skip_file_rwx_check: bool
    join_ns: list[str]
    root: str
    inherit_fd: list[str]
    lsm_profile: str
    lsm_mount_context: str
    remap_ip: list[str]
    plan: bool
    foreground_status: bool


class CheckOptions(Options):
    """What to check. With ``criu_style`` stdout has CRIU's verdict and nothing else."""

    letter = "C"
    __slots__ = tuple(defaults("C"))

    feature: str | None
    extra: bool
    experimental: bool
    all: bool
    criu_style: bool


class CpuinfoOptions(Options):
    """Where cpuinfo.img is, and what of it to compare."""

    letter = "I"
    __slots__ = tuple(defaults("I"))

    cpu_cap: int


def dump(options: DumpOptions, log: Log | None = None) -> dict[str, int]:
    """Checkpoint a process tree; the counters and times (microseconds) of the ``stats-dump`` image.

    Raises a :class:`firn.errors.FirnError` or :class:`OSError`; then the tree runs on as if nothing had happened.
    """
    options.refuse_unbuilt()
    if options.tree <= 0:
        raise UsageError("pid not specified")
    if options.fork_snapshot and not options.leave_running:
        raise UsageError("--fork-snapshot needs --leave-running: the original goes on while its copy is saved")
    from firn.dump import orchestrator

    log = log or _own_log(options)
    if not options.action_script:
        return orchestrator.dump(options, log)
    run_scripts(options, "pre-dump", options.tree, options.images_dir_fd, log)
    return orchestrator.dump(
        options, log, lambda pid: run_scripts(options, "post-dump", pid, options.images_dir_fd, log)
    )


def restore(
    options: RestoreOptions, log: Log | None = None, done: Callable[[RestoreResult], None] | None = None
) -> RestoreResult:
    """Bring a process tree back. Raises a :class:`firn.errors.FirnError` or :class:`OSError`; then no task is left.

    *done* is called when the tree runs, before a restore that is not detached waits for its end.
    """
    options.refuse_unbuilt()
    if options.restore_sibling and not options.restore_detached:
        raise UsageError("--restore-sibling only makes sense with --restore-detached")
    from firn.restore import orchestrator

    return orchestrator.restore(options, log or _own_log(options), done)


def cpuinfo_dump(options: CpuinfoOptions) -> None:
    """Write cpuinfo.img, which says what this processor can do."""
    options.refuse_unbuilt()
    from firn.dump.orchestrator import save_processor

    save_processor(options)


def cpuinfo_check(options: CpuinfoOptions) -> None:
    """Compare cpuinfo.img with this processor; a :class:`firn.errors.FirnError` says what does not match."""
    options.refuse_unbuilt()
    from firn.restore.orchestrator import check_processor

    check_processor(options)


def check(options: CheckOptions, out: Callable[[str], object] = print, log: Log | None = None) -> int:
    """Probe what this kernel offers; *out* gets the lines of the verdict. The result is the exit status."""
    options.refuse_unbuilt()
    from firn import check as module

    return module.check(options, out, log or _own_log(options))


def _own_log(options: Options) -> Log:
    """The log of a call from a program: its file lies in the work directory, without one only warnings are shown."""
    from firn.log import Log

    log = Log(options.verbosity)
    log.open(os.path.join(options.work_dir, options.log_file) if options.log_file else None)
    return log
