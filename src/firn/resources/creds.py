"""Credentials of a thread (images: creds_entry).

State owned: user and group ids, groups, the five capability sets, securebits, no_new_privs. Kernel:
/proc/PID/task/TID/status and prctl(2) inside the thread. They come back by calls of the thread itself, in an order in
which no step takes away what the next one needs: identities under SECBIT_NO_SETUID_FIXUP (so that they do not touch
capabilities), inheritable set, bounding set, ambient set, securebits, then the final capset(2) (capabilities(7)). What
goes wrong: capabilities that the restoring user does not have itself; found before anything is created.
"""

from __future__ import annotations

import struct

from firn.abi import nr, prctl
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

_SETS = (
    ("cap_inh", "CapInh"), ("cap_prm", "CapPrm"), ("cap_eff", "CapEff"), ("cap_bnd", "CapBnd"), ("cap_amb", "CapAmb"),
)  # fmt: skip


def collect(status: dict[str, str], securebits: int) -> dict[str, Any]:
    """The creds_entry from a thread's status file and its securebits."""
    uid, euid, suid, fsuid = (int(word) for word in status["Uid"].split())
    gid, egid, sgid, fsgid = (int(word) for word in status["Gid"].split())
    entry: dict[str, Any] = {
        "uid": uid, "gid": gid, "euid": euid, "egid": egid, "suid": suid, "sgid": sgid, "fsuid": fsuid, "fsgid": fsgid,
        "secbits": securebits, "groups": [int(word) for word in status["Groups"].split()],
    }  # fmt: skip
    for field, key in _SETS:
        value = int(status[key], 16)
        entry[field] = [value & 0xFFFFFFFF, value >> 32]
    if status.get("NoNewPrivs", "0") != "0":
        entry["no_new_privs"] = 1
    return entry


def capability_set(entry: dict[str, Any], field: str) -> int:
    """One capability set as a number."""
    words = entry.get(field, [])
    if len(words) > 2:
        raise ImageError(f"core image: {field} has {len(words)} words")
    return sum(word << 32 * index for index, word in enumerate(words))


def check(entry: dict[str, Any], own: int, last: int) -> None:
    """Refuse a creds_entry that asks for capabilities beyond *own* (ours); *last*: the kernel's highest one."""
    missing = capability_set(entry, "cap_prm") & ~own & (2 << last) - 1
    if missing:
        numbers = [n for n in range(last + 1) if missing >> n & 1]
        raise RestoreError(
            f"the checkpoint holds capabilities that this restore does not have (numbers {numbers})",
            "restore with these capabilities",
        )


def plan(program: Program, entry: dict[str, Any], last: int, before_final: Any = None) -> None:
    """Add the calls that give the thread these credentials; *before_final* adds what needs the capabilities too.

    What the thread has now is asked at once, not when the program runs.
    """
    limit = (2 << last) - 1
    inheritable, permitted, effective, bounding, ambient = (
        capability_set(entry, field) & limit for field, _ in _SETS
    )
    own_eff, own_prm = _present(program.runner.tid)
    fixed = prctl.SECBIT_NO_SETUID_FIXUP | prctl.SECBIT_KEEP_CAPS
    program.call("prctl securebits", nr.prctl, prctl.SET_SECUREBITS, fixed, 0, 0, 0)
    groups = entry.get("groups", [])
    program.reserve(8, 4 * len(groups) + 64)
    program.call("setgroups", nr.setgroups, len(groups), program.data(struct.pack(f"<{len(groups)}I", *groups)))
    program.call("setresgid", nr.setresgid, entry["gid"], entry["egid"], entry["sgid"])
    program.call("setfsgid", nr.setfsgid, entry["fsgid"], flags=1)
    program.call("setresuid", nr.setresuid, entry["uid"], entry["euid"], entry["suid"])
    program.call("setfsuid", nr.setfsuid, entry["fsuid"], flags=1)
    _capset(program, own_eff, own_prm, inheritable)
    for number in range(last + 1):
        if not bounding >> number & 1:
            label = f"drop capability {number} from the bounding set"
            program.call(label, nr.prctl, prctl.CAPBSET_DROP, number, 0, 0, 0)
    program.call("clear ambient", nr.prctl, prctl.CAP_AMBIENT, prctl.CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(last + 1):
        if ambient >> number & 1:
            program.call(
                f"raise ambient capability {number}", nr.prctl, prctl.CAP_AMBIENT, prctl.CAP_AMBIENT_RAISE, number, 0, 0
            )
    program.call("prctl securebits", nr.prctl, prctl.SET_SECUREBITS, entry["secbits"], 0, 0, 0)
    if entry.get("no_new_privs"):
        program.call("no_new_privs", nr.prctl, prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if before_final is not None:
        before_final(program)
    _capset(program, effective, permitted, inheritable)


def _present(tid: int) -> tuple[int, int]:
    """The (effective, permitted) capabilities that thread *tid* has now: capget(2), from outside."""
    header = bytearray(prctl.CAP_HEADER.pack(prctl.CAP_VERSION_3, tid))
    found = bytearray(prctl.CAP_DATA.size)
    syscall(f"capget of task {tid}", nr.capget, address_of(header), address_of(found))
    effective, permitted, _, effective_high, permitted_high, _ = prctl.CAP_DATA.unpack(found)
    return effective | effective_high << 32, permitted | permitted_high << 32


def _capset(program: Program, effective: int, permitted: int, inheritable: int) -> None:
    low, high = 0xFFFFFFFF, 32
    program.reserve(2, 64)
    header = program.data(prctl.CAP_HEADER.pack(prctl.CAP_VERSION_3, 0))
    data = program.data(
        prctl.CAP_DATA.pack(
            effective & low, permitted & low, inheritable & low,
            effective >> high, permitted >> high, inheritable >> high,
        )
    )  # fmt: skip
    program.call("capset", nr.capset, header, data)
