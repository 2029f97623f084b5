"""Two checkpoints of one program, field by field: what is written differently, but for what is another in each run."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firn.images import catalog
from firn.images.store import ImageDir

Entry = dict[str, Any]

VARIES = re.compile(
    r"(TIMENS|PAGEMAP).*"  # times, and which pages were written
    r"|.*\.(id|ino|peer|pid|ppid|pgid|threads|sid|pgrp|files_id|vm_id|fs_id|sighand_id|\w+_ns_id|ns_id|inode_id|shmid"
    r"|regf_id|tty_info_id|tty_id|orig_id|remap_id|id_for|rights|pipe_id|mnt_id|exe_file_id|cwd_id|root_id|i_ino"
    r"|inode|s_dev|dev|handle|bytes|index|build_id|dump_criu_run_id|root_cg_set|cg_set)"
    r"|CORE.*\.(gpregs|fpregs|tls|clear_tid_addr|futex_rla|rseq_abi_pointer|flags|rlimits|cap_\w+|groups|siginfo|loginuid"
    r"|oom_score_adj|v\w*sec|vnsec)\b.*"
    r"|MM\.(mm_\w+|vmas\.(start|end))"
    r"|FILES\.(isk\.(src|dst)_port|isk\.opts\.so_\w+buf|tfd\.v\w*sec|usk\.name|ify\.wd\.f_handle\.path)"
    r"|TCP_STREAM\.(\w+_seq|timestamp|snd_wl1|rcv_wup|snd_wnd|max_window|rcv_wnd)"
    r"|GHOST_FILE\.(atim|mtim|dev|ino)\..*|TTY_INFO\.(uid|gid)|FS\.umask|INVENTORY\.lsmtype"
)
"""Addresses, numbers, times, and what depends on the machine."""

EXPLAINED = re.compile(
    r".*\.firn\b.*"  # firn's own fields, which CRIU skips
    r"|CORE\.tc\.sigactions\.compat_sigaction"  # false: left out by firn
    r"|CORE\.thread_core\.(sched_prio|blk_sigset|pdeath_sig)"  # 0, or what tc says too: left out by CRIU
    r"|CORE\.tc\.(timers|rlimits)\b.*"  # zeros in a zombie: left out by CRIU
    r"|INVENTORY\.(network_lock_method|plugins_entry\..*)"  # iptables, none: nf_tables, left out
    r"|FILES\.reg\.pos"  # of devices and directories, which have none: CRIU writes 0, firn that there is none
    r"|FILES\.isk\.(ip_opts\.ttl|tcp_opts\.keep\w+|opts\.so_pass\w+)"  # their defaults
    r"|FILES\.usk\.shutdown"  # 0: left out by CRIU
    r"|TTY_INFO\.termios(_locked)?\.(c_cc|c_.speed)"  # garbage behind the first 32 bytes; not looked at
)
"""What firn writes otherwise than CRIU, without any difference to a restore."""


def contents(folder: Path) -> dict[str, list[Entry]]:
    """Kind of image -> the entries of all images of that kind."""
    found: dict[str, list[Entry]] = {}
    with ImageDir.open(str(folder)) as images:
        for name in sorted(os.listdir(folder)):
            kind, index = catalog.identify(name) or (None, None)
            if kind is not None and kind.message and kind.head == catalog.HEAD_IMAGE:
                entries = found.setdefault(kind.name, [])
                entries += [entry for entry, _ in images.read_with_payload(kind.name, index)]
    opened = {(entry["type"], entry["id"]) for entry in found["FDINFO"]}
    for entry in found["FILES"]:
        if (entry["type"], entry["id"]) not in opened:
            # How what is only mapped is opened, its mappings say (fdflags).
            entry.get("reg", {}).pop("flags", None)
            entry.get("memfd", {}).pop("flags", None)
    return found


def unlike(criu: Path, firn: Path) -> list[str]:
    """Fields whose values differ between the checkpoints, and images that only one has."""
    theirs, ours = contents(criu), contents(firn)
    lines = [f"{kind}: only {'CRIU' if kind in theirs else 'firn'} has it" for kind in theirs.keys() ^ ours.keys()]
    for kind in theirs.keys() & ours.keys():
        first, second = _values(kind, theirs[kind]), _values(kind, ours[kind])
        for path in sorted(first.keys() | second.keys()):
            if not EXPLAINED.fullmatch(path) and first[path] != second[path]:
                gone, come = first[path] - second[path], second[path] - first[path]
                lines.append(f"{path}: CRIU {_shown(gone)}, firn {_shown(come)}")
    return lines


def _values(kind: str, entries: list[Entry]) -> dict[str, Counter[str]]:
    """Path of a field -> how often each value is there. Two entries of a table that say the same count as one: firn
    stores a directory once for all tasks."""
    found: dict[str, Counter[str]] = {}
    seen = set()
    for entry in entries:
        fields = [(path, repr(value)) for path, value in _fields(kind, entry) if not VARIES.fullmatch(path)]
        key = tuple(fields)
        if kind == "FILES" and key in seen:
            continue
        seen.add(key)
        for path, value in fields:
            found.setdefault(path, Counter())[value] += 1
    return _Default(found)


class _Default(dict[str, "Counter[str]"]):
    def __missing__(self, key: str) -> Counter[str]:
        return Counter()


def _fields(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _fields(f"{path}.{name}", item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            yield from _fields(path, item)
    elif value != []:
        yield path, value


def _shown(values: Counter[str]) -> str:
    return ", ".join(f"{count} times {value[:60]}" for value, count in values.items()) or "nothing"
