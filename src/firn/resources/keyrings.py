"""The session keyring (images: firn_keyring, in firn's own part of the inventory).

State owned: the keyring that keyctl(2) calls KEY_SPEC_SESSION_KEYRING, and the keys in it. Kernel: a thread is asked
for its number, name, owner, rights and contents. Asking makes the user's session keyring the session keyring of a
thread that has none, which for all its searches it was before; so nobody is asked on a machine where no other keyring
can be one. It comes back as a new keyring with the same name, made by the root of the tree before it has children, who
inherit it; as the old one, if the restore is in the same session. A tree without one of its own gets that of the
restore.

What goes wrong: processes or threads with different ones, and keys of which not everything can be read (of other types
than "user", that expire, or other keyrings than the users' own): all refused. Who else had the keyring has another one
than the tree afterwards.
"""

from __future__ import annotations

import struct

from firn.abi import nr
from firn.abi import policies as pol
from firn.abi.libc import address_of, syscall
from firn.errors import ImageError, Obstacle
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.tracee.program import Program

SIZE = 2 * 64
"""Bytes that :func:`ask` takes of a program."""
_ANONYMOUS = "_ses"
_TEXT = 4200
_MOST = 64
"""Keys of one keyring."""
_LARGEST = 32767
"""Bytes of a key of type "user"."""
_HELP = "take it away for the dump (keyctl unlink), or have the tree join a keyring without"


def can_exist() -> bool:
    """Whether there is a keyring on this machine that a session may have for itself."""
    try:
        lines = procfs.read("/proc/keys").decode("utf-8", "surrogateescape").splitlines()
        users = procfs.read("/proc/key-users").decode().splitlines()
    except OSError:
        return False  # a kernel without keys
    for line in lines:
        words = line.split(None, 8)
        if words[7:8] == ["keyring"] and not words[-1].startswith((".", "_uid.", "_uid_ses.")):
            return True
    # Of other users we may see no keys, but how many there are: more than the two that each of them has?
    return any(int(line.split()[2].partition("/")[0]) > 2 for line in users if not line.strip().startswith("0:"))


def ask(program: Program) -> tuple[int, int]:
    """Add calls of a thread that tell its session keyring, and that of its user."""
    session, user = (
        program.call("keyctl", nr.keyctl, pol.KEYCTL_GET_KEYRING_ID, ring, 0, 0, 0, flags=1)
        for ring in (pol.KEY_SPEC_SESSION_KEYRING, pol.KEY_SPEC_USER_SESSION_KEYRING)
    )
    return session, user


def answer(program: Program, asked: tuple[int, int]) -> int:
    """The number of the thread's session keyring; 0 if that is its user's."""
    session, user = (program.results[call] for call in asked)
    return session if session > 0 and session != user else 0


def read(program: Program, number: int, what: str, obstacles: list[Obstacle]) -> dict[str, Any]:
    """The firn_keyring *number*, read by a thread that has it; *what* names the thread in obstacles."""
    try:
        return _read(program, number, what, obstacles)
    except OSError as error:
        obstacles.append(Obstacle(what, f"has a session keyring that it may not read ({error.strerror})", _HELP))
        return {}


def _read(program: Program, number: int, what: str, obstacles: list[Obstacle]) -> dict[str, Any]:
    at = program.buffer(4 * _MOST)
    size = program.call("keyctl read", nr.keyctl, pol.KEYCTL_READ, number, at, 4 * _MOST, 0)
    program.run()
    if program.results[size] > 4 * _MOST:
        obstacles.append(Obstacle(what, f"has a session keyring with more than {_MOST} keys", _HELP))
        return {}
    numbers = struct.unpack(f"<{program.results[size] // 4}i", program.read(at, program.results[size]))
    _, entry = _describe(program, number)
    entry |= {"number": number, "keys": []}
    for key in numbers:
        try:
            kind, one = _describe(program, key)
            if kind == "user" and not _expires(key):
                one["payload"] = _payload(program, key)
            elif kind != "keyring" or not one["name"].startswith("_uid."):
                obstacles.append(Obstacle(what, f"has the {kind} key {one['name']!r} in its session keyring", _HELP))
            entry["keys"].append(one)
        except OSError as error:
            reason = f"has a key in its session keyring that cannot be read ({error.strerror})"
            obstacles.append(Obstacle(what, reason, _HELP))
    return entry


def _describe(program: Program, key: int) -> tuple[str, dict[str, Any]]:
    """(type, name and rights) of a key."""
    program.reserve(1, _TEXT)
    at = program.buffer(_TEXT)
    size = program.call("keyctl describe", nr.keyctl, pol.KEYCTL_DESCRIBE, key, at, _TEXT, 0)
    program.run()
    text = program.read(at, min(program.results[size], _TEXT)).rstrip(b"\0").decode("utf-8", "surrogateescape")
    kind, uid, gid, rights, name = text.split(";", 4)
    return kind, {"name": name, "uid": int(uid), "gid": int(gid), "rights": int(rights, 16)}


def _payload(program: Program, key: int) -> bytes:
    program.reserve(1, _LARGEST)
    at = program.buffer(_LARGEST)
    size = program.call("keyctl read", nr.keyctl, pol.KEYCTL_READ, key, at, _LARGEST, 0)
    program.run()
    return program.read(at, program.results[size])


def _expires(key: int) -> bool:
    """Whether a key has a time to live, as far as we may see."""
    for line in procfs.read("/proc/keys").splitlines():
        words = line.split(None, 4)
        if int(words[0], 16) == key:
            return words[3] != b"perm"
    return False


def own() -> tuple[int, str]:
    """(number, name) of our own session keyring; (0, "") if there are no keys here."""
    text = bytearray(_TEXT)
    try:
        number = syscall("keyctl", nr.keyctl, pol.KEYCTL_GET_KEYRING_ID, pol.KEY_SPEC_SESSION_KEYRING, 0)
        size = syscall("keyctl describe", nr.keyctl, pol.KEYCTL_DESCRIBE, number, address_of(text), _TEXT)
    except OSError:
        return 0, ""
    return number, text[:size].rstrip(b"\0").decode("utf-8", "surrogateescape").split(";", 4)[4]


def plan(program: Program, entry: dict[str, Any]) -> None:
    """The calls of the root, not yet anybody else than we are, that make its session keyring."""
    if not entry or (entry.get("number"), entry["name"]) == own():
        return
    name: str = entry["name"]
    if "\0" in name:
        raise ImageError(f"inventory.img: no keyring is called {name!r}")
    text = 0 if name in ("", _ANONYMOUS) else program.text(name)
    program.call(f"join session keyring {name}", nr.keyctl, pol.KEYCTL_JOIN_SESSION_KEYRING, text)
    session = pol.KEY_SPEC_SESSION_KEYRING
    for key in entry.get("keys", []):
        if "\0" in key["name"] or len(key.get("payload", b"")) > _LARGEST:
            raise ImageError("inventory.img: the session keyring has an impossible key")
        if "payload" in key:
            program.reserve(6, len(key["payload"]) + len(key["name"]) + 64)
            kind, label, payload = program.text("user"), program.text(key["name"]), program.data(key["payload"])
            made = program.call("add_key", nr.add_key, kind, label, payload, len(key["payload"]), session)
            for call, *values in _owned(key):
                program.pass_on(made, 1)
                program.call("keyctl", nr.keyctl, call, 0, *values)
        else:
            number = key["name"].removeprefix("_uid.")
            if not number.isdecimal() or int(number) >> 32:
                raise ImageError(f"inventory.img: {key['name']!r} is no user's keyring")
            uid = int(number)
            # The user's keyring is that of the real user, and only its owner may make links to it.
            program.call("setresuid", nr.setresuid, uid, uid, 0)
            program.call("link", nr.keyctl, pol.KEYCTL_LINK, pol.KEY_SPEC_USER_KEYRING, session)
            program.call("setresuid", nr.setresuid, 0, 0, 0)
    for call, *values in _owned(entry):
        program.call("keyctl", nr.keyctl, call, session, *values)
    program.run()


def _owned(key: dict[str, Any]) -> list[tuple[int, ...]]:
    """The calls that give a key its owner and rights; rights last, which may forbid more."""
    return [
        (pol.KEYCTL_CHOWN, key.get("uid", 0), key.get("gid", 0)), (pol.KEYCTL_SETPERM, key.get("rights", 0)),
    ]  # fmt: skip
