"""Rules of iptables that drop the packets of chosen TCP connections, as CRIU makes them, by iptables' own programs.

One rule in INPUT and one in OUTPUT of the table filter per connection, which spares packets with the mark of
:mod:`firn.host.nftables`. They are there until somebody deletes them, and nothing tells who made them. All rules go
through one run of ``iptables-restore --noflush`` for each IP version, which takes them all or none.
"""

from __future__ import annotations

import os

from firn.errors import KernelError
from firn.host.nftables import AF_INET, AF_INET6, MARK, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PROGRAMS = {AF_INET: "iptables", AF_INET6: "ip6tables"}
_WIDTHS = {AF_INET: 32, AF_INET6: 128}
_PLACES = ("/usr/sbin", "/sbin", "/usr/local/sbin")
_INPUT, _OUTPUT = "INPUT", "OUTPUT"
_SAVED = (
    "-s", "", "-d", "", "-p", "tcp", "-m", "tcp", "--sport", "", "--dport", "", "-m", "mark", "!", "--mark", "", "-j",
    "DROP",
)  # fmt: skip
"""A rule as iptables-save prints it, without the chain; empty is what differs."""


def available() -> bool:
    """Whether there are programs to do it with."""
    return _find("iptables-restore") is not None and _find("iptables-save") is not None


def locked() -> list[Connection]:
    """All connections that such a rule stops, each as the socket on this machine sees it. What is no such rule is
    none of ours. Raises :class:`KernelError` if a program fails."""
    found: dict[bytes, Connection] = {}
    for family in _PROGRAMS:
        for _, connection in _rules(family):
            found[connection.key()] = connection
    return list(found.values())


def add(connections: Iterable[Connection]) -> None:
    """Lock *connections*, none of which is. Raises :class:`KernelError`."""
    for family, few in _by_family(connections).items():
        lines = [f"-I {chain} {_rule(each, chain)}" for each in few for chain in (_INPUT, _OUTPUT)]
        _change(family, lines)


def remove(connections: Iterable[Connection]) -> None:
    """Delete the rules of *connections* that are there. Raises :class:`KernelError`."""
    for family, few in _by_family(connections).items():
        wanted = {each.key() for each in few}
        there = [(chain, each) for chain, each in _rules(family) if each.key() in wanted]
        _change(family, [f"-D {chain} {_rule(each, chain)}" for chain, each in there])


def _by_family(connections: Iterable[Connection]) -> dict[int, list[Connection]]:
    found: dict[int, list[Connection]] = {}
    for each in connections:
        found.setdefault(each.family, []).append(each)
    return found


def _rule(connection: Connection, chain: str) -> str:
    import _socket

    ends = [
        (_socket.inet_ntop(connection.family, raw), port)
        for raw, port in ((connection.source, connection.sport), (connection.destination, connection.dport))
    ]
    (near, sport), (far, dport) = reversed(ends) if chain == _INPUT else ends
    return f"-p tcp -s {near} --sport {sport} -d {far} --dport {dport} -m mark ! --mark {MARK:#x} -j DROP"


def _rules(family: int) -> list[tuple[str, Connection]]:
    """(Chain, connection) of every rule that locks one."""
    if _find(f"{_PROGRAMS[family]}-save") is None:
        return []
    lines = _run(f"{_PROGRAMS[family]}-save", ("-t", "filter"), b"").decode("utf-8", "replace").split("\n")
    return [rule for line in lines if (rule := _read(line.split(), family)) is not None]


def _read(words: list[str], family: int) -> tuple[str, Connection] | None:
    """What a line of iptables-save locks; None if it does something else."""
    import _socket

    if len(words) != 2 + len(_SAVED) or words[0] != "-A" or words[1] not in (_INPUT, _OUTPUT):
        return None
    values = []
    for wanted, word in zip(_SAVED, words[2:], strict=True):
        if not wanted:
            values.append(word)
        elif word != wanted:
            return None
    width = f"/{_WIDTHS[family]}"
    if values[4] not in (f"{MARK:#x}", f"{MARK:#x}/0xffffffff") or not all(text.endswith(width) for text in values[:2]):
        return None
    ends = [
        (_socket.inet_pton(family, text.removesuffix(width)), int(port))
        for text, port in zip(values[:2], values[2:4], strict=True)
    ]
    near, far = reversed(ends) if words[1] == _INPUT else ends
    return words[1], Connection(family, *near, *far)


def _change(family: int, lines: Sequence[str]) -> None:
    if lines:
        text = "\n".join(("*filter", *lines, "COMMIT", "")).encode()
        _run(f"{_PROGRAMS[family]}-restore", ("--noflush", "-w"), text)


def _find(name: str) -> str | None:
    for place in (*os.environ.get("PATH", "").split(":"), *_PLACES):
        path = os.path.join(place, name)
        if os.access(path, os.X_OK):
            return path
    return None


def _run(name: str, arguments: Sequence[str], text: bytes) -> bytes:
    """Run the program *name* with *text* as its input; what it printed. Raises :class:`KernelError` if it fails."""
    path = _find(name)
    if path is None:
        raise KernelError(f"there is no {name}", "install iptables")
    streams = [os.memfd_create("iptables", os.MFD_CLOEXEC) for _ in range(3)]
    try:
        os.write(streams[0], text)
        os.lseek(streams[0], 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, stream, number) for number, stream in enumerate(streams)]
        pid = os.posix_spawn(path, [path, *arguments], os.environ, file_actions=actions)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output, errors = (os.pread(stream, os.fstat(stream).st_size, 0) for stream in streams[1:])
    finally:
        for stream in streams:
            os.close(stream)
    if code:
        raise KernelError(f"{name} fails: {errors.decode('utf-8', 'replace').strip() or code}")
    return output
