"""How the value of each kind of option is read; :data:`READERS` maps a row's *kind* to its function.

A reader is called as ``reader(row, spelled, text, values)``: *spelled* is the option as the user wrote it (``-t``,
``--tree``), *text* its value (None if none was given), *values* what was collected so far, by attribute. It stores what
it read; an impossible value raises :class:`UsageError`.
"""

from __future__ import annotations

import os

from firn.api import CPU_ALL, CPU_CPU, CPU_FPU, CPU_IMAGE, CPU_INS, Option
from firn.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Values = dict[str, Any]
    Reader = Callable[[Option, str, str, Values], None]

_CAPS = {"fpu": CPU_FPU, "cpu": CPU_CPU, "ins": CPU_INS, "all": CPU_ALL}
_NAMESPACES = ("net", "uts", "time", "ipc", "user", "mnt")
_DIGITS = "0123456789"


class ShortUsage(UsageError):
    """A usage error after which the short usage text is shown; *raw* messages are shown without a log prefix."""

    def __init__(self, message: str, raw: bool = False) -> None:
        super().__init__(message)
        self.raw = raw


class ShowVersion(Exception):
    """``--version`` was met: it acts where it stands."""


class ShowHelp(Exception):
    """``--help`` was met."""


def atol(text: str) -> int:
    """The number at the start of *text* as atol(3) reads it: blanks, a sign, digits; 0 for anything else."""
    text = text.lstrip(" \t\n\v\f\r")
    sign = -1 if text[:1] == "-" else 1
    text = text[1:] if text[:1] in ("-", "+") else text
    count = 0
    while count < len(text) and text[count] in _DIGITS:
        count += 1
    # 25 digits saturate a 64-bit long, as strtol(3) does.
    magnitude = int(text[:count].lstrip("0")[:25] or "0")
    return min(magnitude, (1 << 63) - 1) if sign > 0 else -min(magnitude, 1 << 63)


def atoi(text: str) -> int:
    """atoi(3): :func:`atol` cut to a 32-bit int."""
    value = atol(text) & 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _bad(spelled: str, text: str) -> UsageError:
    return UsageError(f"invalid argument for {spelled}: {text}")


def _number(text: str) -> bool:
    """Whether *text* is nothing but a few decimal digits."""
    return 0 < len(text) < 20 and not text.strip(_DIGITS)


def _store(row: Option, spelled: str, text: str, values: Values) -> None:
    values[row.attribute or ""] = text


def _append(row: Option, spelled: str, text: str, values: Values) -> None:
    values.setdefault(row.attribute or "", []).append(text)


def _atoi(row: Option, spelled: str, text: str, values: Values) -> None:
    values[row.attribute or ""] = atoi(text)


def _pid(row: Option, spelled: str, text: str, values: Values) -> None:
    values["tree"] = atoi(text)
    if values["tree"] <= 0:
        raise _bad(spelled, text)


def _port(row: Option, spelled: str, text: str, values: Values) -> None:
    values["port"] = atoi(text)
    if not values["port"]:
        raise _bad(spelled, text)


def _fd(row: Option, spelled: str, text: str, values: Values) -> None:
    if not _number(text):
        raise UsageError(f"the value of {spelled} is not a descriptor's number: {text}")
    values[row.attribute or ""] = atoi(text)


def _close(row: Option, spelled: str, text: str, values: Values) -> None:
    try:
        os.close(max(atoi(text), -1))
    except OSError:
        pass  # it is closed, which is what was asked for


def _verbosity(row: Option, spelled: str, text: str | None, values: Values) -> None:
    if text is None:
        values["verbosity"] = values.get("verbosity", row.default) + 1
    elif text[:1] == "v":
        values["verbosity"] = values.get("verbosity", row.default) + 1 + text.count("v")
    else:
        values["verbosity"] = atoi(text)


def _final(row: Option, spelled: str, text: str, values: Values) -> None:
    values["leave_running"] = values["leave_stopped"] = False
    values[row.attribute or ""] = True


def _exec(row: Option, spelled: str, text: str, values: Values) -> None:
    values["exec_cmd"] = True  # the words are known when all of them have been read


def _size(row: Option, spelled: str, text: str, values: Values) -> None:
    shift = 30 if "G" in text else 20 if "M" in text else 10 if "K" in text else 0
    values[row.attribute or ""] = max(atol(text), 0) << shift


def _choice(what: str, *allowed: str) -> Reader:
    def read(row: Option, spelled: str, text: str, values: Values) -> None:
        if text not in allowed:
            raise ShortUsage(f"{spelled}: unknown {what}: {text}")
        values[row.attribute or ""] = text

    return read


def _pre_dump_mode(row: Option, spelled: str, text: str, values: Values) -> None:
    if text not in ("splice", "read"):
        raise UsageError(f"{spelled}: unknown pre-dump mode: {text}")
    if text == "read":  # CRIU cannot be switched back
        values["pre_dump_mode"] = text


def _network_lock(row: Option, spelled: str, text: str, values: Values) -> None:
    if text not in ("iptables", "nftables", "skip", "none"):
        raise UsageError(f"Invalid value for --network-lock: {text}")
    values["network_lock"] = "skip" if text == "none" else text


def _cpu_cap(row: Option, spelled: str, text: str | None, values: Values) -> None:
    """CRIU's little language: words that may be run together; ``^`` toggles removal, ``,`` ends it."""
    mask = values.get("cpu_cap", row.default)
    if text is None:
        mask |= CPU_ALL
    remove, rest = False, text or ""
    while rest:
        if rest[0] in "^,":
            remove = not remove if rest[0] == "^" else False
            rest = rest[1:]
        elif rest.startswith("none"):
            mask = CPU_ALL if remove else 0
            rest = rest[4:]
        elif rest[:3] in _CAPS:
            mask = mask & ~_CAPS[rest[:3]] if remove else mask | _CAPS[rest[:3]]
            rest = rest[3:]
        else:
            raise ShortUsage(f"{spelled}: unknown processor capability: {rest}")
    mask &= ~CPU_IMAGE
    values["cpu_cap"] = mask | CPU_IMAGE if mask else 0


def _manage_cgroups(row: Option, spelled: str, text: str | None, values: Values) -> None:
    _CGROUP_MODES(row, spelled, text if text is not None else "soft", values)


def _ext_unix_sk(row: Option, spelled: str, text: str | None, values: Values) -> None:
    if text is None:
        values["ext_unix_sk"] = True
        return
    for part in text.split(","):
        if not _number(part) or not int(part):
            raise UsageError(f"{spelled}: not a socket's inode number: {part or text}")
        values.setdefault("external", []).append(f"unix[{int(part)}]")


def _empty_ns(row: Option, spelled: str, text: str, values: Values) -> None:
    if text != "net":
        raise UsageError(f"Unsupported empty namespace: {text}")
    values["empty_ns"] = True


def _join_ns(row: Option, spelled: str, text: str, values: Values) -> None:
    kind, _, rest = text.partition(":")
    where, _, extra = rest.partition(",")
    if kind not in _NAMESPACES or not where:
        raise _bad(spelled, text)
    path = f"/proc/{where}/ns/{kind}" if _number(where) and int(where) <= 65535 else where
    if not os.path.exists(path):
        raise _bad(spelled, text)
    if extra:
        ids = extra.split(",")
        if kind != "user" or len(ids) != 2 or not all(_number(part) and int(part) <= 65535 for part in ids):
            raise _bad(spelled, text)
    _append(row, spelled, text, values)


def _veth_pair(row: Option, spelled: str, text: str, values: Values) -> None:
    inside, equals, outside = text.partition("=")
    if not equals:
        raise _bad(spelled, text)
    _append(row, spelled, f"veth[{inside}]:{outside}", values)


def _ext_mount_map(row: Option, spelled: str, text: str, values: Values) -> None:
    key, colon, value = text.partition(":")
    if text != "auto" and not colon:
        raise _bad(spelled, text)
    _append(row, spelled, "mnt[]" if text == "auto" else f"mnt[{key}]:{value}", values)


def _external(row: Option, spelled: str, text: str, values: Values) -> None:
    if text.startswith("mnt[]:") and text[6:7] not in ("m", "s", ""):
        raise UsageError(f"{spelled}: unknown way to find external mounts: {text}")
    if text.startswith("macvlan["):
        link = text.partition("]:")[2]
        # A name with a slash or dots would leave the directory; no interface is named so.
        if "/" in link or link in ("", ".", "..") or not os.path.exists(f"/sys/class/net/{link}"):
            raise UsageError(f"{spelled}: no such network device: {text}")
    _append(row, spelled, text, values)


def _inherit_fd(row: Option, spelled: str, text: str, values: Values) -> None:
    head, _, key = text.partition("]:")
    kind, _, number = head.partition("[")
    if kind not in ("fd", "debug") or not _number(number) or not key:
        raise UsageError(f"Invalid inherit fd argument: {text}")
    try:
        os.fstat(atoi(number))
    except OSError as error:
        raise UsageError(f"{spelled}: descriptor {number} is not open: {text}") from error
    if kind == "fd":
        _append(row, spelled, text, values)
    else:
        os.write(atoi(number), os.fsencode(key))


def _lsm_profile(row: Option, spelled: str, text: str, values: Values) -> None:
    if ":" not in text:
        raise _bad(spelled, text)
    _store(row, spelled, text, values)


def _version(row: Option, spelled: str, text: str, values: Values) -> None:
    raise ShowVersion


def _help(row: Option, spelled: str, text: str, values: Values) -> None:
    raise ShowHelp


def _retired(row: Option, spelled: str, text: str, values: Values) -> None:
    raise UsageError(f"{spelled} is no longer an option; see the check options of --help")


def _ignored(row: Option, spelled: str, text: str, values: Values) -> None:
    """Read before everything else, see :func:`firn.cli.parse.prescan`."""


_CGROUP_MODES = _choice("mode of cgroup handling", "ignore", "none", "props", "soft", "full", "strict")

# kind -> (what the option takes: "" no value, ":" a value, "::" perhaps a value glued to it; its reader)
READERS: dict[str, tuple[str, Any]] = {
    "text": (":", _store),
    "list": (":", _append),
    "number": (":", _atoi),
    "pid": (":", _pid),
    "port": (":", _port),
    "fd": (":", _fd),
    "close": (":", _close),
    "size": (":", _size),
    "verbosity": ("::", _verbosity),
    "final": ("", _final),
    "exec": ("", _exec),
    "file-validation": (":", _choice("method of file validation", "filesize", "buildid")),
    "pre-dump-mode": (":", _pre_dump_mode),
    "network-lock": (":", _network_lock),
    "cpu-cap": ("::", _cpu_cap),
    "manage-cgroups": ("::", _manage_cgroups),
    "ext-unix-sk": ("::", _ext_unix_sk),
    "empty-ns": (":", _empty_ns),
    "join-ns": (":", _join_ns),
    "veth-pair": (":", _veth_pair),
    "ext-mount-map": (":", _ext_mount_map),
    "external": (":", _external),
    "inherit-fd": (":", _inherit_fd),
    "lsm-profile": (":", _lsm_profile),
    "version": ("", _version),
    "help": ("", _help),
    "retired": ("", _retired),
    "ignored": (":", _ignored),
    "ignored flag": ("", _ignored),
}
