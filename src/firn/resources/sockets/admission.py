"""Connections get into the backlog of a listening socket, as if their peers had called just now.

The kernel puts a connection there when the last segment of a handshake arrives, and takes it for that if a BPF program
of the receiving device vouches for it, as for a SYN cookie: with any sequence numbers, and with what was negotiated
(bpf_sk_assign_tcp_reqsk in net/core/filter.c, Linux 6.8). So such a program is attached to the loopback device, the
segment is sent in the peer's name to ourselves (:mod:`packets`), and then what the peer had sent, and its FIN or reset.
The program and all that belongs to it end with firn.

- A packet that was routed to this machine itself keeps its route over the loopback device, so its source may be any.
- Without a timestamp of the peer's (which nothing tells) zero is given, which the kernel takes for none yet.
- The listening socket is found through a socket map: a search by addresses would miss one that is bound to a device,
  or find a more special one. In a group with SO_REUSEPORT the kernel chooses once more, behind the program
  (inet_steal_sock), and prefers the socket whose SO_INCOMING_CPU is the processor at work. So it is set meanwhile.
- A backlog that is full takes one more if listen(2) is called again meanwhile, up to net.core.somaxconn.
- A new connection has the buffer size of the listening socket, which is therefore made larger for one with more data.
- All runs on one processor, on which loopback packets are handled in the order in which they are sent.

What goes wrong: a firewall that drops the segments; TCP abilities (timestamps, scaling, SACK) that are switched off.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
import time

from firn.abi import bpf as b
from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.abi.tcp import (
    INFO,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_ESTABLISHED,
    TCP_INFO,
    TCP_MAX_WSCALE,
    TCP_REPAIR,
    TCP_REPAIR_ON,
    TCPI_OPT_ECN,
    TCPI_OPT_SACK,
    TCPI_OPT_TIMESTAMPS,
    TCPI_OPT_WSCALE,
    TH_ACK,
    TH_FIN,
    TH_PUSH,
    TH_RST,
    TH_URG,
)
from firn.errors import FirnError, ImageError, KernelError, RestoreError
from firn.host import bpf, procfs, sockdiag
from firn.host.btf import KernelTypes
from firn.resources.sockets import connections, options, packets
from firn.resources.sockets.inet_options import AF_INET, AF_INET6, TCP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.host.bpf import Line

SMALLEST = {4: 536, 16: 1220}
"""By the width of an address, the least segment size that the kernel takes (net/core/filter.c)."""
_ORDER = struct.Struct("<II12si20s")
"""What the program shall do: whether anything, where the packet has its TCP header, with what that begins; what came of
it; struct bpf_tcp_req_attrs."""
_UNTOUCHED = -1000
_ETHERNET = 14
_LOOPBACK = 1
"""The index of lo in every network namespace (LOOPBACK_IFINDEX)."""
_WORD = 1 << 32
_LARGEST_WINDOW = 0xFFFF
_PIECE = 15 << 10
"""Bytes in a segment: with headers and the kernel's own it just fits into 16 KiB, so the buffer it takes is full."""
_SMALL, _ROOM = 16 << 10, 64 << 10
"""Up to so many bytes fit into any buffer; for more, it has twice as much and this: for the window is half of it."""
_SO_REUSEPORT, _SO_INCOMING_CPU = 15, 49
_PATIENCE_S = 1.0
_AGAIN_S = 0.02
_SWITCHES = ("tcp_fwmark_accept", "tcp_l3mdev_accept")
_TIMESTAMP = bytes((1, 1, 8, 10)) + bytes(8)


def _program(function: int, orders: int, listeners: int) -> bytes:
    """The instructions: vouch for the segment that the order tells of, once; let all others pass.

    Registers: 6 the packet, 7 the order, 8 the listening socket.
    """
    lines: list[Line] = [
        (b.MOV, 6, 1, 0, 0),
        (b.LOAD_32, 1, 6, b.SKB_MARK, 0),
        (b.JUMP_UNEQUAL_IMM, 1, 0, "pass", packets.LOCK_MARK),
        (b.LOAD_IMM_64, 7, b.PSEUDO_MAP_VALUE, 0, orders),
        (b.LOAD_32, 1, 7, 0, 0),
        (b.JUMP_EQUAL_IMM, 1, 0, "pass", 0),
        # Twelve bytes of the TCP header onto the stack: ports, sequence number, what is acknowledged.
        (b.MOV, 1, 6, 0, 0),
        (b.LOAD_32, 2, 7, 4, 0),
        (b.MOV, 3, 10, 0, 0),
        (b.ADD_IMM, 3, 0, 0, -16),
        (b.MOV_IMM, 4, 0, 0, 12),
        (b.CALL, 0, 0, 0, b.SKB_LOAD_BYTES),
        (b.JUMP_UNEQUAL_IMM, 0, 0, "pass", 0),
    ]
    for at in range(0, 12, 4):
        lines += [
            (b.LOAD_32, 1, 10, at - 16, 0),
            (b.LOAD_32, 2, 7, at + 8, 0),
            (b.JUMP_UNEQUAL, 1, 2, "pass", 0),
        ]
    lines += [
        (b.STORE_IMM_32, 7, 0, 0, 0),
        (b.STORE_IMM_32, 10, 0, -4, 0),
        (b.LOAD_IMM_64, 1, b.PSEUDO_MAP_FD, 0, listeners),
        (b.MOV, 2, 10, 0, 0),
        (b.ADD_IMM, 2, 0, 0, -4),
        (b.CALL, 0, 0, 0, b.MAP_LOOKUP_ELEM),
        (b.JUMP_EQUAL_IMM, 0, 0, "pass", 0),
        (b.MOV, 8, 0, 0, 0),
        (b.MOV, 1, 8, 0, 0),
        (b.CALL, 0, 0, 0, b.SKC_TO_TCP_SOCK),
        (b.JUMP_EQUAL_IMM, 0, 0, "release", 0),
        (b.MOV, 1, 6, 0, 0),
        (b.MOV, 2, 0, 0, 0),
        (b.MOV, 3, 7, 0, 0),
        (b.ADD_IMM, 3, 0, 0, 24),
        (b.MOV_IMM, 4, 0, 0, b.TCP_REQ_ATTRS.size),
        (b.CALL, 0, b.PSEUDO_KFUNC_CALL, 0, function),
        (b.STORE_32, 7, 0, 20, 0),
        "release",
        (b.MOV, 1, 8, 0, 0),
        (b.CALL, 0, 0, 0, b.SK_RELEASE),
        "pass",
        (b.MOV_IMM, 0, 0, 0, b.TCX_NEXT),
        (b.EXIT, 0, 0, 0, 0),
    ]
    return bpf.assemble(lines)


def _setting(name: str) -> bytes:
    """A switch of our network namespace, off if the kernel has no such."""
    try:
        return procfs.read(f"/proc/sys/net/ipv4/{name}").strip()
    except FileNotFoundError:
        return b"0"


def _waiting(listener: _socket.socket) -> tuple[int, int]:
    """How many connections wait to be accepted, and how many may."""
    _, _, _, count, most = INFO.unpack(listener.getsockopt(TCP, TCP_INFO, INFO.size))
    return count, most


class _OneProcessor:
    """For a ``with`` block, this thread stays on the processor where it is: its number."""

    _LENGTH = 1024

    def __enter__(self) -> int:
        self._before = bytearray(self._LENGTH)
        size = syscall("sched_getaffinity", nr.sched_getaffinity, 0, self._LENGTH, address_of(self._before))
        del self._before[size:]
        number = bytearray(4)
        syscall("getcpu", nr.getcpu, address_of(number), 0, 0)
        here = int.from_bytes(number, "little")
        self._set(bytearray((1 << here).to_bytes(size, "little")))
        return here

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    @staticmethod
    def _set(mask: bytearray) -> None:
        syscall("sched_setaffinity", nr.sched_setaffinity, 0, len(mask), address_of(mask))


class _Facing:
    """For a ``with`` block, *listeners* leads the program to one listening socket. All runs on one processor, which
    the kernel prefers the socket for if it shares its port."""

    def __init__(self, listener: _socket.socket, listeners: bpf.Map) -> None:
        self._sock = listener
        self._listeners = listeners
        self._processor = _OneProcessor()
        self._cpu: int | None = None

    def __enter__(self) -> None:
        sock = self._sock
        here = self._processor.__enter__()
        try:
            self._listeners[0] = sock.fileno().to_bytes(8, "little")
            if sock.getsockopt(options.SOL_SOCKET, _SO_REUSEPORT):
                self._cpu = sock.getsockopt(options.SOL_SOCKET, _SO_INCOMING_CPU)
                sock.setsockopt(options.SOL_SOCKET, _SO_INCOMING_CPU, here)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._cpu is not None:
            self._sock.setsockopt(options.SOL_SOCKET, _SO_INCOMING_CPU, self._cpu)
        try:
            del self._listeners[0]
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # it is not there
                raise
        self._processor.__exit__()


class _Roomy:
    """For a ``with`` block, the backlog of a listening socket takes one more, also if it is full, and who gets into it
    has a buffer of *room* bytes, if that is not less than the socket's own."""

    def __init__(self, listener: _socket.socket, room: int) -> None:
        self._sock = sock = listener
        self._room: int | None = None
        count, most = _waiting(listener)
        self._most: int | None = most if count > most else None
        try:
            if self._most is not None:
                sock.listen(count)
            size = sock.getsockopt(options.SOL_SOCKET, options.SO_RCVBUF)
            if room > size:
                self._locked = sock.getsockopt(options.SOL_SOCKET, options.SO_BUF_LOCK)
                self._room = size
                options.set_buffer(sock, options.SO_RCVBUF, room)
                sock.setsockopt(options.SOL_SOCKET, options.SO_BUF_LOCK, self._locked)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._most is not None:
            self._sock.listen(self._most)
        if self._room is not None:
            options.set_buffer(self._sock, options.SO_RCVBUF, self._room)
            self._sock.setsockopt(options.SOL_SOCKET, options.SO_BUF_LOCK, self._locked)


class Client:
    """A connection that waits to be accepted, as the images have it (firn_client): its two ends as bytes and numbers,
    where its sequence numbers stood when it had just begun, and what has come since."""

    __slots__ = ("data", "dport", "entry", "far", "near", "ours", "sport", "state", "stream", "theirs")

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.near, self.far = (
            packets.unmapped(struct.pack(f"<{len(words)}I", *words)) for words in (entry["src_addr"], entry["dst_addr"])
        )
        self.sport: int = entry["src_port"]
        self.dport: int = entry["dst_port"]
        self.state: int = entry["state"]
        self.data: bytes = entry.get("data", b"")
        self.stream: dict[str, Any] = entry.get("stream", {})
        received = self.stream.get("inq_seq", len(self.data) + 1)
        self.theirs = (received - len(self.data) - (self.state == TCP_CLOSE_WAIT)) % _WORD
        self.ours = self.stream.get("outq_seq", 1) % _WORD

    def __str__(self) -> str:
        text = packets.text(self.far)
        return f"the connection of {f'[{text}]' if ':' in text else text}:{self.dport}"

    def find(self) -> sockdiag.Unaccepted | None:
        """What the kernel tells of it, if it waits."""
        family = AF_INET if len(self.near) == 4 else AF_INET6
        return sockdiag.find_unaccepted(family, self.near, self.sport, self.far, self.dport)

    def attributes(self) -> bytes:
        """What was negotiated, for the kernel."""
        stream = self.stream
        mask = stream.get("opt_mask", 0)
        stamps = bool(mask & TCPI_OPT_TIMESTAMPS)
        now = stream.get("timestamp", 0)
        scales = (stream.get("rcv_wscale", 0), stream.get("snd_wscale", 0)) if mask & TCPI_OPT_WSCALE else (0, 0)
        return b.TCP_REQ_ATTRS.pack(
            0, now if stamps else 0, stream.get("mss_clamp", SMALLEST[len(self.near)]), *scales,
            bool(mask & TCPI_OPT_ECN), bool(mask & TCPI_OPT_WSCALE), bool(mask & TCPI_OPT_SACK),
            # The kernel marks in the number itself that it counts microseconds (do_tcp_setsockopt, TCP_TIMESTAMP).
            stamps, stamps and now & 1,
        )  # fmt: skip

    def send(self, at: int, flags: int, data: bytes = b"") -> None:
        """A segment in the peer's name; *at* counts from the first byte that it ever sent."""
        stream = self.stream
        window = min(stream.get("snd_wnd", _LARGEST_WINDOW) >> stream.get("snd_wscale", 0), _LARGEST_WINDOW)
        stamps = _TIMESTAMP if stream.get("opt_mask", 0) & TCPI_OPT_TIMESTAMPS else b""
        # Up to and with the urgent byte (RFC 9293); Linux takes the pointer for one too far, as all do.
        urgent = self.entry.get("urgent", -1) - at + 1
        if not 0 < urgent <= len(data):
            urgent = 0
        flags |= TH_URG if urgent else 0
        packets.segment(self.ends(), (self.theirs + at, self.ours), flags, window, stamps, data, urgent)

    def check_address(self) -> None:
        """Raises :class:`RestoreError` if our end's address is not this machine's: segments would be sent away."""
        probe = _socket.socket(AF_INET if len(self.near) == 4 else AF_INET6, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            probe.bind((packets.text(self.near), 0))
        except OSError as error:
            what = f"{self} cannot be put back into the backlog of {packets.text(self.near)}:{self.sport}"
            raise RestoreError(f"{what}: {error.strerror}", "give this machine the address") from None
        finally:
            probe.close()

    def ends(self) -> tuple[bytes, int, bytes, int]:
        """From the peer to us."""
        return self.far, self.dport, self.near, self.sport


def load(name: str, message: dict[str, Any]) -> list[Client]:
    """Who waits to be accepted by the socket *name*, whose inet_sk_entry is *message*. Raises :class:`ImageError`;
    :class:`RestoreError` if this machine has not the address at which one arrived."""
    found = []
    for entry in connections.clients(message):
        size, stream = len(entry.get("data", b"")), entry.get("stream", {})
        sane = connections.is_sane(entry) and entry["src_port"] and entry["dst_port"]
        sane = sane and all(len(entry[side]) == len(message["src_addr"]) for side in ("src_addr", "dst_addr"))
        sane = sane and entry.get("state") in (TCP_ESTABLISHED, TCP_CLOSE_WAIT, TCP_CLOSE)
        sane = sane and (entry["state"] == TCP_CLOSE or stream.get("inq_len") == size)
        sane = sane and entry.get("urgent", -1) < size
        sane = sane and max(stream.get("snd_wscale", 0), stream.get("rcv_wscale", 0)) <= TCP_MAX_WSCALE
        if not sane or not stream.get("mss_clamp", _LARGEST_WINDOW) <= _LARGEST_WINDOW:
            raise ImageError(f"{name} has impossible connections that wait to be accepted")
        client = Client(entry)
        client.check_address()
        found.append(client)
    return found


class Admission:
    """The ability to put connections into backlogs, in our network namespace. Takes 30 ms."""

    def __init__(self) -> None:
        """Raises :class:`KernelError` if this kernel or its settings do not allow it: it is tried."""
        self._descriptors: list[int] = []
        for name in _SWITCHES:
            if _setting(name) != b"0":
                raise KernelError(f"{name} is set, by which connections differ in a way that is lost")
        try:
            function = KernelTypes().function("bpf_sk_assign_tcp_reqsk")
        except KernelError:
            raise KernelError("this kernel takes no connections into a backlog", "Linux 6.8 or later") from None
        try:
            self._prepare(function)
            self._try()
        except OSError as error:
            self.close()
            raise KernelError(f"no connections can be put into a backlog: {error}") from None
        except BaseException:
            self.close()
            raise

    def _prepare(self, function: int) -> None:
        self._orders = bpf.Map(b.BPF_MAP_TYPE_ARRAY, _ORDER.size)
        self._descriptors.append(self._orders.fd)
        self._listeners = bpf.Map(b.BPF_MAP_TYPE_SOCKMAP, 8)
        self._descriptors.append(self._listeners.fd)
        code = _program(function, self._orders.fd, self._listeners.fd)
        program = bpf.load(b.BPF_PROG_TYPE_SCHED_CLS, code, b"firn_backlog", b.BPF_TCX_INGRESS)
        self._descriptors.append(program)
        self._descriptors.append(bpf.attach(program, _LOOPBACK))

    def _try(self) -> None:
        """With a socket of our own."""
        listener = _socket.socket(AF_INET, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            raw = os.urandom(5)
            near, far = b"\x7f\0\0\1", b"\x7f" + raw[:2] + b"\x02"
            ends = {"src_addr": [int.from_bytes(near, "little")], "dst_addr": [int.from_bytes(far, "little")]}
            ports = {"src_port": listener.getsockname()[1], "dst_port": 1024 + int.from_bytes(raw[3:], "big") % 60000}
            with self.facing(listener):
                self.admit(listener, Client({"state": TCP_ESTABLISHED, **ends, **ports}))
            listener.setblocking(False)
            fd, _ = listener._accept()  # type: ignore[attr-defined]
            child = _socket.socket(fileno=fd)
            child.setsockopt(TCP, TCP_REPAIR, TCP_REPAIR_ON)  # so that it ends without a word
            child.close()
        except FirnError as error:
            raise KernelError(error.message, error.hint) from None
        finally:
            listener.close()

    def facing(self, listener: _socket.socket) -> _Facing:
        """For a ``with`` block in which :meth:`admit` is called. Raises :class:`OSError` on entry: EBUSY or EINVAL if
        somebody else has tied the socket to a program or protocol of its own."""
        return _Facing(listener, self._listeners)

    def admit(self, listener: _socket.socket, client: Client) -> None:
        """Put *client* at the end of the backlog of the *listener* that we face. Its end here must be an address of
        this machine. Raises :class:`KernelError`, :class:`OSError`."""
        size = len(client.data)
        room = max(client.entry.get("rcvbuf", 0), 2 * size + _ROOM if size > _SMALL else 0)
        before = _waiting(listener)[0]
        with _Roomy(listener, room):
            self._shake_hands(client)
            self._deliver(client)
        if _waiting(listener)[0] == before:
            help = "loopback packets must stay on the processor that sends them (rps_cpus)"
            raise KernelError(f"{client} got into the backlog of another socket that shares the port", help)

    def _shake_hands(self, client: Client) -> None:
        place = _ETHERNET + (20 if len(client.near) == 4 else 40)
        begin = struct.pack(">HHII", client.dport, client.sport, client.theirs, client.ours)
        try:
            self._orders[0] = _ORDER.pack(1, place, begin, _UNTOUCHED, client.attributes())
            client.send(0, TH_ACK)
            end = time.monotonic() + _PATIENCE_S
            while (answer := _ORDER.unpack(self._orders[0])[3]) == _UNTOUCHED and time.monotonic() < end:
                time.sleep(0.0005)
        finally:
            self._orders[0] = bytes(_ORDER.size)
        if answer == -errno.EINVAL:
            help = "net.ipv4.tcp_timestamps, tcp_window_scaling and tcp_sack must be on"
            raise KernelError(f"{client} has what this machine does not allow", help)
        if answer:
            why = "a segment does not arrive" if answer == _UNTOUCHED else os.strerror(-answer)
            raise KernelError(f"{client} cannot be put back into the backlog: {why}")

    def _deliver(self, client: Client) -> None:
        """What has come since the handshake. Whatever does not arrive is sent again, as by any peer."""
        wanted = len(client.data) + (client.state == TCP_CLOSE_WAIT)
        end = time.monotonic() + _PATIENCE_S
        there = client.find()
        while there is None and time.monotonic() < end:
            time.sleep(0.0005)
            there = client.find()
        while there is not None and there.unread < wanted and time.monotonic() < end:
            self._send_rest(client, there.unread)
            again = time.monotonic() + _AGAIN_S
            there = client.find()
            while there is not None and there.unread < wanted and time.monotonic() < again:
                time.sleep(0.0005)
                there = client.find()
        if there is None:
            raise KernelError(
                f"{client} does not get into the backlog",
                "the connection must not exist, a firewall not drop it, and net.core.somaxconn and "
                "net.ipv4.tcp_syncookies be as before",
            )
        if there.unread < wanted:
            raise KernelError(f"{client} does not get all of its data: {there.unread} of {wanted} bytes")
        if client.state == TCP_CLOSE:
            client.send(wanted, TH_RST | TH_ACK)

    @staticmethod
    def _send_rest(client: Client, first: int) -> None:
        for at in range(first, len(client.data), _PIECE):
            client.send(at, TH_ACK | TH_PUSH, client.data[at : at + _PIECE])
        if client.state == TCP_CLOSE_WAIT:
            client.send(len(client.data), TH_ACK | TH_FIN)

    def close(self) -> None:
        """Detach the program; nothing is left."""
        while self._descriptors:
            os.close(self._descriptors.pop())
