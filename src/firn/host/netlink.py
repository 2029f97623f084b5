"""Messages and attributes of netlink(7), and a channel that asks for several changes at once.

The kernel works on a request while it is being sent, so an answer is there when ``send`` returns: nothing here waits.
"""

from __future__ import annotations

import os

from firn.abi import nftables as nf
from firn.abi import nr
from firn.abi.libc import syscall
from firn.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_AF_NETLINK, _SOCK_RAW, _SOCK_CLOEXEC = 16, 3, 0o2000000
_SOL_SOCKET, _SO_SNDBUFFORCE = 1, 32
_CLONE_NEWNET = 0x40000000
_RECEIVE = 1 << 17
_TRIES = 5
_OWN_NETWORK = "/proc/thread-self/ns/net"


def attribute(kind: int, payload: bytes, nested: bool = False) -> bytes:
    """One attribute, padded to four bytes; *nested* ones are marked so. *payload* has less than 64 KiB."""
    kind |= nf.NLA_F_NESTED if nested else 0
    return padded(nf.NLATTR.pack(nf.NLATTR.size + len(payload), kind) + payload)


def attributes(payload: bytes) -> dict[int, bytes]:
    """The attributes in *payload*, by their kind."""
    found = {}
    while len(payload) >= nf.NLATTR.size:
        size, kind = nf.NLATTR.unpack_from(payload)
        if size < nf.NLATTR.size:
            break
        found[kind & ~nf.NLA_F_NESTED] = payload[nf.NLATTR.size : size]
        payload = payload[size + 3 & ~3 :]
    return found


def message(kind: int, flags: int, payload: bytes, number: int = 1) -> bytes:
    """One request; *number* comes back with the answers to it."""
    size = nf.NLMSGHDR.size + len(payload)
    return padded(nf.NLMSGHDR.pack(size, kind, nf.NLM_F_REQUEST | flags, number, 0) + payload)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(Kind, flags, number, payload) of each message in *data*."""
    while len(data) >= nf.NLMSGHDR.size:
        size, kind, flags, number, _ = nf.NLMSGHDR.unpack_from(data)
        if size < nf.NLMSGHDR.size:
            return
        yield kind, flags, number, data[nf.NLMSGHDR.size : size]
        data = data[size + 3 & ~3 :]


def padded(data: bytes) -> bytes:
    """*data* filled up to whole words."""
    return data + bytes(-len(data) % 4)


class Channel:
    """A netlink socket of *protocol* in the network namespace that the descriptor *namespace* leads to (-1: ours)."""

    def __init__(self, protocol: int, namespace: int = -1) -> None:
        import _socket

        if namespace < 0:
            self._socket = _socket.socket(_AF_NETLINK, _SOCK_RAW | _SOCK_CLOEXEC, protocol)
        else:
            # A socket stays in the namespace that its maker was in; the namespace is this thread's alone.
            before = os.open(_OWN_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscall("entering a network namespace", nr.setns, namespace, _CLONE_NEWNET)
                try:
                    self._socket = _socket.socket(_AF_NETLINK, _SOCK_RAW | _SOCK_CLOEXEC, protocol)
                finally:
                    syscall("leaving a network namespace", nr.setns, before, _CLONE_NEWNET)
            finally:
                os.close(before)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close the socket; what the kernel keeps only as long as it is open is gone then."""
        self._socket.close()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def change(self, what: str, requests: list[bytes]) -> None:
        """Send *requests* together. The last one asks for an acknowledgement (NLM_F_ACK) and has the number 0.

        Raises :class:`OSError` (*what* leads its text) for the first error that the kernel reports.
        """
        data = b"".join(requests)
        self._socket.setsockopt(_SOL_SOCKET, _SO_SNDBUFFORCE, max(2 * len(data), 1 << 17))
        self._socket.send(data)
        problem, done = 0, False
        while not done:
            for kind, _, number, payload in self._receive(what):
                if kind == nf.NLMSG_ERROR:
                    problem = problem or _code(payload)
                    done = done or number == 0 or bool(problem)
        self.drain()
        if problem:
            raise OSError(problem, f"{what}: {os.strerror(problem)}")

    def ask(self, what: str, request: bytes) -> list[bytes]:
        """The answers to *request*, which asks for a dump; again while changes disturb it. Raises :class:`OSError`."""
        for _ in range(_TRIES):
            self._socket.send(request)
            found: list[bytes] = []
            disturbed = done = False
            while not done:
                for kind, flags, _, payload in self._receive(what):
                    disturbed |= bool(flags & nf.NLM_F_DUMP_INTR)
                    if kind in (nf.NLMSG_ERROR, nf.NLMSG_DONE):
                        code = _code(payload)
                        if code:
                            raise OSError(code, f"{what}: {os.strerror(code)}")
                        done = True
                    else:
                        found.append(payload)
            if not disturbed:
                break
        return found

    def _receive(self, what: str) -> list[tuple[int, int, int, bytes]]:
        try:
            return list(messages(self._socket.recv(_RECEIVE)))
        except BlockingIOError:
            raise KernelError(f"{what}: no answer from the kernel") from None

    def drain(self) -> None:
        """Throw away what is still there: further errors of the same change, or the answers to a process that had this
        socket too, and died."""
        try:
            while True:
                self._socket.recv(_RECEIVE)
        except BlockingIOError:
            return


def _code(payload: bytes) -> int:
    return -int.from_bytes(payload[:4], "little", signed=True) if len(payload) >= 4 else 0
