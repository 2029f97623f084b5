"""What each command does between the parsed words and the work, in CRIU's order of events."""

from __future__ import annotations

import os

from firn import api
from firn.cli.values import ShortUsage
from firn.errors import FirnError, NotBuilt, UsageError
from firn.log import INFO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.cli.values import Values
    from firn.log import Log

_RECORDS: dict[str, type[api.Options]] = {
    "dump": api.DumpOptions,
    "restore": api.RestoreOptions,
    "check": api.CheckOptions,
    "cpuinfo": api.CpuinfoOptions,
}

_FIRN_ONLY = ("inspect", "unlock")

# The last line of a command's log: all went well, it failed.
_CLOSING = {
    "dump": ("Dumping finished successfully", "Dumping FAILED."),
    "restore": ("Restore finished successfully. Tasks resumed.", "Restoring FAILED."),
}

_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE = 21, 40  # linux/capability.h


class Request:
    """One call of the program: ``words`` are the command and what follows it, ``values`` the options by attribute.

    ``closing`` is set once the work has begun: what the log ends with.
    """

    __slots__ = ("closing", "log", "program", "values", "words")

    def __init__(self, program: str, log: Log) -> None:
        self.program = program
        self.log = log
        self.words: list[str] = []
        self.values: Values = {}
        self.closing: tuple[str, str] | None = None


def out(text: str) -> None:
    """Write *text* to stdout, whole."""
    raw = os.fsencode(text)
    while raw:
        raw = raw[os.write(1, raw) :]


def run(request: Request) -> int:
    """Do what the words ask for; the exit status."""
    command = _command(request)
    if command == "inspect":
        from firn.cli import inspect

        return inspect.run(request)
    if command == "unlock":
        from firn.cli import unlock

        return unlock.run(request)
    _positional(request, command)
    _warn(request, command)
    # firn's own check is of use to anybody: it says what is missing.
    if not (command == "check" and request.program == "firn") and not _privileged(request):
        return 1
    if command not in _RECORDS and command not in ("exec", "show"):
        raise NotBuilt(f"command {command} is not built yet")
    options = _options(request, command)
    os.chdir(options.work_dir)
    request.log.open(options.log_file or None)
    _consistent(request, command)
    request.closing = _CLOSING.get(command)
    if isinstance(options, api.DumpOptions):
        return _dump(request, options)
    if isinstance(options, api.RestoreOptions):
        return _restore(request, options)
    if command == "check" and isinstance(options, api.CheckOptions):
        return api.check(options, lambda line: out(f"{line}\n"), request.log)
    if isinstance(options, api.CpuinfoOptions):
        return _cpuinfo(request, options)
    return _retired(request, command)


def _options(request: Request, command: str) -> api.Options:
    """The record for *command*: what has no effect on it stays out. The image directory is open then."""
    names = api.defaults(api.COMMANDS[command])
    given = {name: value for name, value in request.values.items() if name in names}
    given["images_dir"] = os.path.abspath(given.get("images_dir", "."))
    given["images_dir_fd"] = _open_directory(given["images_dir"])
    if command == "restore":
        given["foreground_status"] = request.program != "criu"
    if command == "check":
        given["criu_style"] = request.program == "criu"
    return _RECORDS.get(command, api.CheckOptions)(**given)


def _command(request: Request) -> str:
    if not request.words:
        raise ShortUsage("command is required")
    command = request.words[0]
    if command not in api.COMMANDS or (command in _FIRN_ONLY and request.program == "criu"):
        raise ShortUsage(f"unknown command: {command}")
    return command


def _positional(request: Request, command: str) -> None:
    """The words after the command: a command to run, what to do about the processor, or a mistake."""
    values, more = request.values, request.words[1:]
    if command == "swrk":
        if len(more) != 1:
            raise ShortUsage(f"Usage: {request.program} swrk <fd>", raw=True)
    elif values.get("exec_cmd"):
        if not more:
            raise ShortUsage("--exec-cmd requires a command")
        if command != "restore":
            raise ShortUsage("--exec-cmd is for restore only")
        if values.get("restore_detached"):
            raise ShortUsage("--restore-detached and --exec-cmd exclude each other")
        values["exec_cmd"] = more
    elif command == "cpuinfo":
        if not more or more[0] not in ("dump", "check"):
            raise ShortUsage("cpuinfo requires an action: dump or check")
        more = more[1:]
    if more and command != "swrk" and not values.get("exec_cmd"):
        raise ShortUsage(f"excessive parameter{'s' if len(more) > 1 else ''} for command {command}")
    if values.get("stream") and command not in ("dump", "pre-dump", "restore", "cpuinfo"):
        raise ShortUsage(f"--stream cannot be used with the {command} command")


def _warn(request: Request, command: str) -> None:
    """Options that this command accepts and does not follow, where CRIU says so."""
    if command == "restore" and "tree" in request.values:
        request.log.warn("restore takes the pid from the images; -t is not needed")
    if command == "restore" and "network_lock" in request.values:
        request.log.warn("restore takes the way of network locking from the images; --network-lock is not needed")
    if command == "restore" and all(map(request.values.get, ("leave_stopped", "restore_detached", "shell_job"))):
        request.log.warn("a shell job that is left stopped gets SIGHUP when this command ends (-s -d -j)")
    if os.environ.get("CRIU_LIBS_DIR"):
        request.log.warn("CRIU_LIBS_DIR is set, but plugins are not built yet")


def _consistent(request: Request, command: str) -> None:
    """Values that exclude each other, whatever else is built."""
    values = request.values
    if values.get("mntns_compat_mode") and command != "restore":
        raise UsageError("--mntns-compat-mode is for restore only")
    if values.get("inherit_fd") and command != "restore":
        raise UsageError("--inherit-fd is for restore only")
    if values.get("restore_sibling") and not values.get("restore_detached"):
        raise UsageError("--restore-sibling only makes sense with --restore-detached")
    if values.get("empty_ns") and any(text.startswith("net:") for text in values.get("join_ns", ())):
        raise UsageError("--join-ns and --empty-ns conflict: both are about the network namespace")
    if values.get("restore_detached") and 0 <= values.get("ps_socket", -1) <= 2:
        raise UsageError("--ps-socket needs a number above 2 with --daemon: it closes the standard descriptors")
    if values.get("log_pid") and not values.get("log_file"):
        raise UsageError("--log-pid needs --log-file")


def _privileged(request: Request) -> bool:
    """Whether this process may do the work at all. ``criu`` says it on stdout, whatever the verbosity."""
    from firn.host import features

    if not features.effective_caps() & (1 << _CAP_SYS_ADMIN | 1 << _CAP_CHECKPOINT_RESTORE):
        texts = (
            f"{request.program} needs the capability CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE",
            f"it can be given by: setcap cap_checkpoint_restore+eip {request.program}",
        )
    elif os.geteuid() and not request.values.get("unprivileged"):
        texts = (
            "not running as root: this needs the option --unprivileged",
            "which allows only part of what root can do",
        )
    else:
        return True
    if request.program == "criu":
        out("".join(f"{text}\n" for text in texts))
    else:
        request.log.error("; ".join(texts))
    return False


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FirnError(f"image directory {path}: {error.strerror}") from error


def _finish(request: Request) -> None:
    if request.closing:
        request.log.record(INFO, request.closing[0])


def _dump(request: Request, options: api.DumpOptions) -> int:
    stats = api.dump(options, request.log)
    if options.display_stats:
        out(dump_stats(stats))
    _finish(request)
    return 0


def _restore(request: Request, options: api.RestoreOptions) -> int:
    def finish(result: api.RestoreResult) -> None:
        """The closing words, which callers read while the program runs in the foreground."""
        if options.display_stats:
            out(restore_stats(result.stats))
        _finish(request)

    result = api.restore(options, request.log, finish)
    if options.exec_cmd:
        return _become(options.exec_cmd)
    if options.foreground_status and result.exit_status is not None:
        return result.exit_status
    return 0


def _cpuinfo(request: Request, options: api.CpuinfoOptions) -> int:
    if request.words[1] == "check":
        api.cpuinfo_check(options)
        return 0
    try:
        api.cpuinfo_dump(options)
    except (FirnError, OSError) as error:
        request.log.error(str(error))
        return 255
    return 0


def _become(command: list[str]) -> int:
    """Replace this process by *command*, now the parent of the restored root."""
    import _signal

    # Python ignores SIGXFSZ, and the command would inherit that. (CRIU ignores SIGPIPE, as Python does.)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise FirnError(f"cannot run {command[0]}: {error.strerror}", "the restored tasks go on") from error


def _retired(request: Request, command: str) -> int:
    if command == "exec":
        request.log.error("the command exec is retired")
    else:
        request.log.error("the command show is retired")
        request.log.error("crit show and crit decode print images")
    return 255


def _counter(name: str, value: int) -> str:
    return f"{name}: {value} ({value:#x})\n"


def _microseconds(name: str, value: int) -> str:
    return f"{name}: {value} us\n"


def dump_stats(stats: dict[str, int]) -> str:
    """CRIU's text for ``--display-stats`` of a dump; *stats* is named as in the ``stats-dump`` image."""
    times = (
        ("Freezing time", "freezing_time"),
        ("Frozen time", "frozen_time"),
        ("Memory dump time", "memdump_time"),
        ("Memory write time", "memwrite_time"),
        ("IRMAP resolve time", "irmap_resolve"),
    )
    counters = (
        ("Memory pages scanned", "pages_scanned"),
        ("Memory pages skipped from parent", "pages_skipped_parent"),
        ("Memory pages written", "pages_written"),
        ("Lazy memory pages", "pages_lazy"),
    )
    return (
        "Displaying dump stats:\n"
        + "".join(_microseconds(text, stats.get(name, 0)) for text, name in times)
        + "".join(_counter(text, stats.get(name, 0)) for text, name in counters)
    )


def restore_stats(stats: dict[str, int]) -> str:
    """CRIU's text for ``--display-stats`` of a restore; *stats* is named as in the ``stats-restore`` image."""
    return (
        "Displaying restore stats:\n"
        + _counter("Pages compared", stats.get("pages_compared", 0))
        + _counter("Pages skipped COW", stats.get("pages_skipped_cow", 0))
        + _counter("Pages restored", stats.get("pages_restored", 0))
        + _microseconds("Restore time", stats.get("restore_time", 0))
        + _microseconds("Forking time", stats.get("forking_time", 0))
    )
