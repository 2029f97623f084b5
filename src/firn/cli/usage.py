"""The texts of ``--help``. Every option of the table has one; options that are not built yet are marked."""

from __future__ import annotations

from firn.api import TABLE, Option
from firn.cli.parse import takes

COMMANDS = (
    ("dump", "save a process tree to images and end it"),
    ("pre-dump", "save the memory of a tree and let it run on"),
    ("restore", "bring a process tree back from images"),
    ("check", "say what this kernel offers"),
    ("page-server", "receive memory pages over the network"),
    ("lazy-pages", "serve pages to a restore when they are touched"),
    ("service", "answer requests on a socket"),
    ("dedup", "free what older images hold in duplicate"),
    ("cpuinfo dump", "save what this processor can do"),
    ("cpuinfo check", "compare this processor with what was saved"),
)

_OWN_COMMANDS = (
    ("inspect", "show what is in a checkpoint"),
    ("unlock", "remove network locks that a killed firn has left"),
)

# section -> option -> (name of its value, what it does)
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Generic": {
        "tree": ("PID", "root of the tree to save"),
        "images-dir": ("DIR", "directory of the images (default: the current one)"),
        "work-dir": ("DIR", "directory of log, pidfile and statistics (default: that of the images)"),
        "restore-detached": ("", "end once the tree is restored instead of waiting for it"),
        "restore-sibling": ("", "make the restored root a child of the caller; needs -d"),
        "leave-running": ("", "let the tree run on after a dump"),
        "leave-stopped": ("", "leave the tree stopped (SIGSTOP)"),
        "fork-snapshot": ("", "save a copy-on-write copy, the original goes on at once; needs -R"),
        "plan": ("", "print what a restore would do, do nothing"),
        "json": ("", "have inspect print JSON"),
        "exec-cmd": ("", "after a restore become the command that follows the options"),
        "pidfile": ("FILE", "write the restored root's pid (or a daemon's) to FILE"),
        "status-fd": ("FD", "write a zero byte to FD when a server is ready"),
        "timeout": ("SECONDS", "longest time for stopping the tree (default 10)"),
        "action-script": ("PATH", "run PATH at each stage; may be repeated"),
        "libdir": ("DIR", "load plugins from DIR"),
        "unprivileged": ("", "do what can be done without being root"),
        "close": ("FD", "close FD first"),
        "deprecated": ("", "allow what is deprecated"),
        "stream": ("", "send or take the images through an image streamer"),
        "cpu-cap": ("LIST", "what the processor must offer: fpu, cpu, ins, all, none"),
        "file-validation": ("METHOD", "how files are told to be the same: filesize, buildid (default)"),
        "skip-file-rwx-check": ("", "ignore changed permission bits of files"),
        "allow-uprobes": ("", "accept user-space probes"),
    },
    "External resources": {
        "external": ("RESOURCE", "a resource that is not saved but given again: TYPE[ID]:VALUE"),
        "inherit-fd": ("fd[N]:KEY", "use the open descriptor N for the file KEY"),
        "ext-mount-map": ("KEY:VALUE", "old form of --external mnt[KEY]:VALUE; or auto"),
        "enable-external-sharing": ("", "let auto find shared mounts"),
        "enable-external-masters": ("", "let auto find slave mounts"),
        "veth-pair": ("IN=OUT", "old form of --external veth[IN]:OUT"),
        "ext-unix-sk": ("INODE,...", "accept Unix sockets connected to the outside"),
        "join-ns": ("NS:PID|FILE", "restore into an existing namespace"),
        "empty-ns": ("net", "make the namespace but leave it empty"),
    },
    "Special resources": {
        "shell-job": ("", "the tree belongs to a shell's session and terminal"),
        "file-locks": ("", "save file locks"),
        "tcp-established": ("", "save established TCP connections"),
        "tcp-close": ("", "save TCP connections as closed ones"),
        "remap-ip": ("OLD=NEW", "restore sockets of address OLD on NEW; may be repeated"),
        "skip-in-flight": ("", "drop connections that nobody has accepted yet"),
        "network-lock": ("METHOD", "how connections are held: iptables (default), nftables, skip"),
        "link-remap": ("", "give unlinked files that have other names a temporary one"),
        "ghost-limit": ("SIZE", "largest unlinked file that is saved (default 1M)"),
        "ghost-fiemap": ("", "find holes of unlinked files by FIEMAP (default)"),
        "evasive-devices": ("", "accept another path to the same device"),
        "force-irmap": ("", "search for the paths of watched files"),
        "irmap-scan-path": ("PATH", "search there too; may be repeated"),
        "manage-cgroups": ("MODE", "ignore, none, props, soft (default), full, strict"),
        "cgroup-root": ("[CTRL:]PATH", "other root of the control groups; may be repeated"),
        "cgroup-props": ("TEXT", "properties of control groups to save"),
        "cgroup-props-file": ("FILE", "the same from a file"),
        "cgroup-dump-controller": ("NAME", "save only this controller; may be repeated"),
        "cgroup-yard": ("DIR", "where the control groups are mounted"),
        "freeze-cgroup": ("PATH", "stop the tree by this control group's freezer"),
        "root": ("PATH", "root of the restored mount namespace"),
        "skip-mnt": ("PATH", "leave this mount out; may be repeated"),
        "enable-fs": ("NAMES", "file system types that can simply be mounted; or all"),
        "mntns-compat-mode": ("", "restore mounts the way old kernels need it"),
        "lsm-profile": ("TYPE:NAME", "use this security profile"),
        "lsm-mount-context": ("CONTEXT", "use this mount context"),
        "weak-sysctls": ("", "skip sysctls that this kernel lacks"),
    },
    "Check options": {
        "feature": ("NAME", "check one feature, see below"),
        "extra": ("", "check what some trees need"),
        "experimental": ("", "check what few trees need"),
        "all": ("", "both; have unlock remove locks that wait for a restore too"),
    },
    "Logging": {
        "log-file": ("FILE", "write the log to FILE; - is stdout"),
        "log-pid": ("", "each restored task logs to FILE.PID"),
        "verbosity": ("N", "0 nothing, 1 errors, 2 warnings (default), 3 more, 4 all; -v is one more"),
        "display-stats": ("", "print counters and times at the end"),
    },
    "Memory": {
        "track-mem": ("", "note which pages are written after this dump"),
        "prev-images-dir": ("DIR", "images of the dump before, seen from this one's directory"),
        "pre-dump-mode": ("MODE", "splice (default), read"),
        "page-server": ("", "send pages to a page server"),
        "auto-dedup": ("", "free pages in older images as they are replaced"),
        "lazy-pages": ("", "move pages when they are touched"),
    },
    "Servers": {
        "address": ("ADDRESS", "address of the server; a socket's path for the service"),
        "port": ("N", "port of the page server"),
        "ps-socket": ("FD", "connected socket to the page server"),
        "daemon": ("", "run the server in the background"),
        "tls": ("", "encrypt the connection"),
        "tls-cacert": ("FILE", "certificate of the authority"),
        "tls-cacrl": ("FILE", "revoked certificates"),
        "tls-cert": ("FILE", "own certificate"),
        "tls-key": ("FILE", "own key"),
        "tls-no-cn-verify": ("", "accept a certificate for another host"),
    },
    "Configuration files": {
        "config": ("FILE", "read options from FILE; the default files are not read"),
        "no-default-config": ("", "do not read the default files"),
    },
    "Other": {
        "help": ("", "print this"),
        "version": ("", "print the version"),
    },
}


def short(program: str) -> str:
    """Usage and commands: what is shown after a usage error."""
    lines = [
        "",
        "Usage:",
        f"  {program} dump|pre-dump -t PID [options]",
        f"  {program} restore [options]",
        f"  {program} check [--feature NAME]",
        f"  {program} page-server | lazy-pages | service | dedup [options]",
        f"  {program} cpuinfo dump|check [options]",
        *([f"  {program} inspect DIR [--json]", f"  {program} unlock [-D DIR | --all]"] if program != "criu" else []),
        "",
        "Commands:",
        *(f"  {name:<15}{text}" for name, text in COMMANDS),
        *(f"  {name:<15}{text}" for name, text in _OWN_COMMANDS if program != "criu"),
        "",
        "Try -h|--help for more info",
        "",
    ]
    return "\n".join(lines)


def full(program: str) -> str:
    """All options with their values and meaning."""
    rows = {row.long: row for row in TABLE}
    lines = short(program).split("\n")[:-2]
    lines.append("Options marked * are known but not built yet; asking for them is an error.")
    for section, options in SECTIONS.items():
        lines += ["", f"{section}:"]
        for name, (value, text) in options.items():
            if not (rows[name].firn_only and program == "criu"):
                lines.append(_line(rows[name], value, text))
        if section == "Check options":
            lines += ["", "  features:", *_wrapped(_features())]
    return "\n".join([*lines, ""])


def _line(row: Option, value: str, text: str) -> str:
    left = f"-{row.short}|--{row.long}" if row.short else f"--{row.long}"
    if value:
        left += f"[={value}]" if takes(row) == "::" else f" {value}"
    mark = "  " if row.built else "* "
    gap = "\n" + " " * 36 if len(left) > 33 else ""
    return f"{mark}{left:<34}{gap}{text}" + (f" (--no-{row.long} undoes it)" if row.no else "")


def _features() -> list[str]:
    """The names that ``--feature`` takes from a caller of CRIU."""
    from firn.check.table import ABILITIES

    return sorted(row.name for row in ABILITIES if row.feature)


def _wrapped(names: list[str]) -> list[str]:
    lines, line = [], ""
    for name in names:
        if line and len(line) + len(name) > 50:
            lines.append(f"    {line}")
            line = ""
        line += f"{name}, "
    return [*lines, f"    {line.removesuffix(', ')}"]
