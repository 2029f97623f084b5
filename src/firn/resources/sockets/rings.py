"""The rings of packet sockets that programs have mapped (linux/if_packet.h, Documentation/networking/packet_mmap.rst).

State owned: the frames in them, and where the kernel goes on. Program and kernel walk around a ring each by itself, and
meet by the status of a frame (in TPACKET_V3: of a block of them). So a ring that came back empty and at its beginning
would leave the program waiting at a frame that the kernel reaches a whole turn later.

Dump: the ring is mapped through a copy of the socket, and read. The kernel's place in it is shown nowhere: it is read
in the kernel's memory (:mod:`firn.host.kernelmemory`). Packets may come all the while, but the program frees no frame.
What is kept: received frames (blocks) that the program has not given back, and all of
a ring for sending.

Restore: there is no call that sets a place. So the new socket gets as many packets as it takes, of firn's own, over the
loopback device: of a type for experiments, which nobody listens to (0x88B5, IEEE 802), and with a number at which
alone the socket's filter lets them in. A ring for sending sends such packets. In a ring of blocks, the block at which
the kernel shall stop is marked as the program's; there it waits ("frozen"), and opens that block when it is freed.

What goes wrong: without a view of the kernel's memory only a ring that was never used can be saved. The numbers of
blocks (seq_num) begin anew.
"""

from __future__ import annotations

import _socket
import os
import struct
import time

from firn.abi import nr
from firn.abi.libc import address_of, syscall
from firn.errors import KernelError
from firn.resources.sockets import options

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from typing import Any

SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_VNET_HDR_SZ = 263, 6, 15, 24
V3 = 2
_USER, _SENDING = 1, 2
"""TP_STATUS_USER (of a ring for sending: TP_STATUS_SEND_REQUEST), TP_STATUS_SENDING."""
_BLOCK_TIMEOUT = 1 << 5
_U32 = struct.Struct("<I")
_TX_HEADERS = (32, 32, 48)
"""By version: bytes of a frame's header; what is sent follows."""
_LENGTHS, _OFFSETS, _TX_STATUS = (8, 4, 16), (16, 12, 24), (0, 0, 20)
"""... where tp_len, tp_mac (and tp_net behind it), and tp_status are in it."""
_BLOCK_STATUS, _COUNT, _FIRST, _SEQUENCE, _LAST_TIME, _HEADER = 8, 12, 16, 24, 40, 48
"""Where struct tpacket_block_desc has its status, number of packets, the first's place, number, the last one's time;
its size."""
_ETHERTYPE = 0x88B5
_LOOPBACK = 1
_SOCKADDR_LL = struct.Struct("<HHiHBB8x")
_FILLING_S = 0.001
"""Longer than a processor takes to fill a frame."""
_TRIES = 1000
_AT_ONCE = 64
_PATIENCE_S = 5.0
_PAGE = 4096
_LARGEST = 60000


class Ring:
    """One ring, from byte *at* on of the memory *view*; *words* as in struct packet_diag_ring."""

    def __init__(self, words: tuple[int, ...], version: int, at: int, sends: bool) -> None:
        self.block_size, self.blocks, self.frame_size, self.frames = words[:4]
        self.version = version
        self.at = at
        self.sends = sends
        self.by_block = version == V3 and not sends
        self.units = self.blocks if self.by_block else self.frames
        self.unit_size = self.block_size if self.by_block else self.frame_size
        self.status = _BLOCK_STATUS if self.by_block else _TX_STATUS[version] if sends else 0
        self.view: mmap.mmap

    @property
    def size(self) -> int:
        """Bytes of the ring."""
        return self.block_size * self.blocks

    def place(self, unit: int) -> int:
        """Where in the memory frame, or block, number *unit* is. Frames do not cross blocks."""
        if self.by_block:
            return self.at + unit * self.block_size
        each = self.block_size // self.frame_size
        return self.at + unit // each * self.block_size + unit % each * self.frame_size

    def word(self, unit: int, offset: int) -> int:
        """A 32-bit number of a frame or block."""
        found: int = _U32.unpack_from(self.view, self.place(unit) + offset)[0]
        return found

    def mark(self, unit: int, status: int) -> None:
        """Set the status of a frame or block."""
        _U32.pack_into(self.view, self.place(unit) + self.status, status)

    def is_new(self) -> bool:
        """Whether nothing was ever received, or put there to be sent, as far as its memory tells."""
        if self.by_block:
            start = self.place(0)
            (number,) = struct.unpack_from("<Q", self.view, start + _SEQUENCE)
            return not self.word(0, _BLOCK_STATUS) & _USER and not self.word(0, _COUNT) and number == 1
        header = _TX_HEADERS[self.version]
        starts = self.place(0), self.place(self.units - 1)
        return not any(any(self.view[start : start + header]) for start in starts)


def rings(version: int, rx_ring: tuple[int, ...], tx_ring: tuple[int, ...]) -> list[Ring]:
    """The rings of a socket, as they lie in its memory: first that for receiving."""
    found: list[Ring] = []
    for words, sends in ((rx_ring, False), (tx_ring, True)):
        if words:
            found.append(Ring(words, version, sum(ring.size for ring in found), sends))
    return found


def memory(fd: int, found: list[Ring]) -> mmap.mmap:
    """The memory of the rings of socket *fd*, for them to look into."""
    import mmap

    view = mmap.mmap(fd, sum(ring.size for ring in found), mmap.MAP_SHARED)
    for ring in found:
        ring.view = view
    return view


# -- dump --------------------------------------------------------------------------------------------------------------


class Places:
    """Tells where the kernel goes on in rings. To be made before a freeze. Raises :class:`KernelError`."""

    def __init__(self) -> None:
        from firn.host.kernelmemory import KernelMemory

        self._memory = memory = KernelMemory()
        try:
            at = memory.types.offset
            self._sock = at("socket", "sk")
            self._rings = {sends: at("packet_sock", "tx_ring" if sends else "rx_ring") for sends in (False, True)}
            self._blocks = at("packet_ring_buffer", "pg_vec_len")
            self._frame = at("packet_ring_buffer", "head")
            self._block = at("packet_ring_buffer", "prb_bdqc") + at("tpacket_kbdq_core", "kactive_blk_num")
            with open("/dev/null", "rb") as file:
                memory.object(file.fileno())  # so that its members are known, too
        except BaseException:
            self.close()
            raise

    def watch(self, fd: int, ring: Ring) -> Callable[[], int]:
        """What tells the number of the frame or block each time, with OSError if it cannot be seen. Raises
        :class:`KernelError` or :class:`OSError` if it never can."""
        memory = self._memory
        buffer = memory.number(memory.object(fd) + self._sock) + self._rings[ring.sends]
        at, size = (buffer + self._block, 2) if ring.by_block else (buffer + self._frame, 4)
        if memory.number(buffer + self._blocks, 4) != ring.blocks or memory.number(at, size) >= ring.units:
            raise KernelError("the kernel's memory is in an order that is not known")
        return lambda: memory.number(at, size)

    def close(self) -> None:
        """Let go of the kernel's memory."""
        self._memory.close()


def sight() -> Places | None:
    """What tells the kernel's places; None if nobody may look there."""
    try:
        return Places()
    except (KernelError, OSError):
        return None


def collect(fd: int, found: list[Ring], places: Places | None) -> dict[str, Any]:
    """Fields of a firn_packet: places and contents. Without *places*: of rings that were never used.

    Raises :class:`KernelError` if that is not enough or a ring does not stand still, :class:`OSError`.
    """
    view = memory(fd, found)
    try:
        fields: dict[str, Any] = {}
        stretches: list[dict[str, Any]] = []
        for ring in found:
            name = "tx_place" if ring.sends else "rx_place"
            fields[name] = 0
            if places is not None:
                look = places.watch(fd, ring)
                copy = _copy_sent if ring.sends else _copy_blocks if ring.by_block else _copy_frames
                fields[name], pieces = copy(ring, look)
                _join(stretches, pieces)
            elif not ring.is_new():
                raise KernelError("where the kernel goes on in it cannot be seen", "CAP_BPF and CAP_PERFMON")
        return fields | {"stretches": stretches}
    finally:
        view.close()


def _copy_frames(ring: Ring, look: Callable[[], int]) -> tuple[int, list[tuple[int, bytes]]]:
    """The place, and received frames that are not free. The kernel first moves on and then fills the frame: those that
    it had just taken are given a moment, and those that it takes in the meantime are waited for."""
    start = look()
    time.sleep(_FILLING_S)
    copies = [_used(ring, unit) for unit in range(ring.units)]
    now = look()
    limit = time.monotonic() + _PATIENCE_S
    for each in range(start, now if now >= start else now + ring.units):
        unit = each % ring.units
        while not ring.word(unit, ring.status) & _USER:
            if time.monotonic() > limit:
                raise KernelError("a frame in it is never filled", "try again")
        copies[unit] = _used(ring, unit)
    if now == start and ring.word(now, ring.status) & _USER and look() == now:
        # It is full. Whether it was before, or the kernel came around in the meantime, nobody can tell.
        time.sleep(_FILLING_S)
        copies = [_used(ring, unit) for unit in range(ring.units)]
    return now, [(ring.place(unit), data) for unit, data in enumerate(copies)]


def _copy_blocks(ring: Ring, look: Callable[[], int]) -> tuple[int, list[tuple[int, bytes]]]:
    """The place, and received blocks that are not free. That which the kernel still fills is closed in the copy."""
    start = look()
    copies = [_used(ring, unit) for unit in range(ring.units)]
    for _ in range(_TRIES):
        now = look()
        for unit in range(start, now if now >= start else now + ring.units):
            copies[unit % ring.units] = _used(ring, unit % ring.units)
        start = now
        head, is_open, is_full = _bytes(ring, now)[:_HEADER], _is_open(ring, now), bool(_used(ring, now))
        # The packets that it counts are all there a moment later.
        time.sleep(_FILLING_S)
        block = head + _bytes(ring, now)[_HEADER:]
        if look() == now and bool(_used(ring, now)) == is_full:
            break
    else:
        raise KernelError("packets come into it too quickly", "try again")
    if is_full:
        # The kernel waits. Whether it came around in the meantime nobody can tell.
        copies = [_used(ring, unit) for unit in range(ring.units)]
    elif is_open and _U32.unpack_from(head, _COUNT)[0]:
        copies[now] = _closed(block)
        now = (now + 1) % ring.units
    return now, [(ring.place(unit), data) for unit, data in enumerate(copies)]


def _bytes(ring: Ring, unit: int) -> bytes:
    start = ring.place(unit)
    return ring.view[start : start + ring.unit_size]


def _used(ring: Ring, unit: int) -> bytes:
    """A frame or block that the program has; empty if the kernel has it."""
    return _bytes(ring, unit) if ring.word(unit, ring.status) & _USER else b""


def _is_open(ring: Ring, unit: int) -> bool:
    """Whether the kernel fills a block, which then has the highest number. It may not have opened it again yet."""
    numbers: list[int] = [
        struct.unpack_from("<Q", ring.view, ring.place(each) + _SEQUENCE)[0] for each in range(ring.units)
    ]
    return numbers[unit] == max(numbers) and not ring.word(unit, _BLOCK_STATUS) & _USER


def _closed(block: bytes) -> bytes:
    """A block that was being filled, as the kernel would hand it over when its time is up (prb_close_block)."""
    made = bytearray(block)
    count, at = (_U32.unpack_from(made, offset)[0] for offset in (_COUNT, _FIRST))
    for _ in range(count - 1):
        at += _U32.unpack_from(made, at)[0]
    _U32.pack_into(made, at, 0)
    made[_LAST_TIME : _LAST_TIME + 8] = made[at + 4 : at + 12]
    _U32.pack_into(made, _BLOCK_STATUS, _USER | _BLOCK_TIMEOUT)
    return bytes(made)


def _copy_sent(ring: Ring, look: Callable[[], int]) -> tuple[int, list[tuple[int, bytes]]]:
    """The place, and all that is in a ring for sending: programs prepare frames long before. What is on its way counts
    as sent."""
    made = bytearray(ring.view[ring.at : ring.at + ring.size])
    for unit in range(ring.units):
        where = ring.place(unit) - ring.at + ring.status
        (status,) = _U32.unpack_from(made, where)
        if status & _SENDING:
            _U32.pack_into(made, where, status & ~_SENDING)
    pages = ((at, bytes(made[at : at + _PAGE])) for at in range(0, len(made), _PAGE))
    return look(), [(ring.at + at, page) for at, page in pages if any(page)]


def _join(stretches: list[dict[str, Any]], pieces: list[tuple[int, bytes]]) -> None:
    """Add *pieces* that are not empty; those that follow each other as one."""
    parts: list[tuple[int, list[bytes]]] = []
    end = -1
    for at, data in pieces:
        if data:
            if at != end:
                parts.append((at, []))
            parts[-1][1].append(data)
            end = at + len(data)
    stretches += [{"offset": at, "data": b"".join(each)} for at, each in parts]


# -- restore -----------------------------------------------------------------------------------------------------------


def rebuild(sock: _socket.socket, found: list[Ring], own: dict[str, Any]) -> bool:
    """Bring the new rings of *sock*, which is not bound, to the places and contents in *own* (a firn_packet).

    Returns whether it is bound now; then it has a filter that lets nothing in. Raises :class:`OSError`,
    :class:`ValueError`.
    """
    bound = False
    view = memory(sock.fileno(), found)
    try:
        stretches = own.get("stretches", [])
        if any(each.get("offset", 0) + len(each.get("data", b"")) > len(view) for each in stretches):
            raise ValueError("frames lie outside of its rings")
        # Sending first: bound, the socket would hear itself.
        for ring in sorted(found, key=lambda ring: not ring.sends):
            place = own.get("tx_place" if ring.sends else "rx_place", 0)
            if place >= ring.units:
                raise ValueError("a place outside of its ring")
            turn = _Turn(sock, ring)
            if ring.sends:
                turn.send(place)
            else:
                bound = turn.receive(place, _is_user(ring, place, stretches))
        _fill(view, found, own, stretches)
        return bound
    finally:
        view.close()


def _is_user(ring: Ring, unit: int, stretches: list[dict[str, Any]]) -> bool:
    """Whether the program has a block."""
    at = ring.place(unit) + ring.status
    for each in stretches:
        start, data = each.get("offset", 0), each.get("data", b"")
        if start <= at and at + 4 <= start + len(data):
            return bool(_U32.unpack_from(data, at - start)[0] & _USER)
    return False


def _fill(view: mmap.mmap, found: list[Ring], own: dict[str, Any], stretches: list[dict[str, Any]]) -> None:
    """Put the contents in place of firn's packets. The block at which the kernel waits is freed last, and one that it
    has already opened is left alone."""
    for ring in found:
        place = own.get("rx_place", 0) if ring.by_block else -1
        for unit in range(ring.units):
            start, end = ring.place(unit), ring.place(unit) + ring.unit_size
            if unit != place:
                view[start:end] = bytes(end - start)
            elif ring.word(unit, ring.status) & _USER:
                view[start + _COUNT : end] = bytes(end - start - _COUNT)
    for each in stretches:
        start, data = each.get("offset", 0), each.get("data", b"")
        view[start : start + len(data)] = data
    for ring in found:
        place = own.get("rx_place", 0)
        if ring.by_block and not _is_user(ring, place, stretches):
            ring.mark(place, 0)


class _Turn:
    """Turns one new ring on to its place."""

    def __init__(self, sock: _socket.socket, ring: Ring) -> None:
        self.sock = sock
        self.ring = ring
        self.token = os.urandom(4)

    def send(self, place: int) -> None:
        """*place* packets are sent from the ring."""
        ring, version = self.ring, self.ring.version
        head = bytes(12) + _ETHERTYPE.to_bytes(2, "big") if self.sock.type == _socket.SOCK_RAW else b""
        body = bytes(self._offload()) + head + self.token
        start = _TX_HEADERS[version]
        for unit in range(place):
            at = ring.place(unit)
            _U32.pack_into(ring.view, at + _LENGTHS[version], len(body))
            struct.pack_into("<HH", ring.view, at + _OFFSETS[version], start, start)
            ring.view[at + start : at + start + len(body)] = body
            ring.mark(unit, _USER)
        where = self._address()
        limit = time.monotonic() + _PATIENCE_S
        while any(ring.word(unit, ring.status) & (_USER | _SENDING) for unit in range(place)):
            _check(limit)
            syscall("send a ring", nr.sendto, self.sock.fileno(), 0, 0, 0, address_of(where), len(where))

    def _offload(self) -> int:
        """Bytes of struct virtio_net_hdr before each packet."""
        try:
            return self.sock.getsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ)
        except OSError:
            return 10 if self.sock.getsockopt(SOL_PACKET, PACKET_VNET_HDR) else 0

    def receive(self, place: int, is_full: bool) -> bool:
        """The kernel comes to *place*; in a ring of blocks, *is_full*: the program has not yet given that one back.
        Returns whether packets were needed."""
        ring = self.ring
        if not place and not (ring.by_block and is_full):
            return False
        self._listen()
        sender = _socket.socket(_socket.AF_PACKET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC, 0)
        try:
            if not ring.by_block:
                for first in range(0, place, _AT_ONCE):
                    self._feed(sender, self.token, min(_AT_ONCE, place - first))
                return True
            if place:
                ring.mark(place, _USER)
            data = self.token.ljust(min(ring.block_size, _LARGEST), b"\0")
            while not ring.word((place - 1) % ring.units, ring.status) & _USER:
                self._feed(sender, data, 1)
            self._feed(sender, data, 1)
            return True
        finally:
            sender.close()

    def _listen(self) -> None:
        """Bind the socket, and let only our packets in."""
        at = 14 if self.sock.type == _socket.SOCK_RAW else 0
        number = int.from_bytes(self.token, "big")
        # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K (linux/filter.h)
        code = (0x20, 0, 0, at), (0x15, 0, 1, number), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)
        options.set_filter(self.sock.fileno(), [c << 48 | jt << 40 | jf << 32 | k for c, jt, jf, k in code])
        where = self._address()
        syscall("bind", nr.bind, self.sock.fileno(), address_of(where), len(where))

    def _feed(self, sender: _socket.socket, data: bytes, count: int) -> None:
        """Have *count* packets come in. Those that found no room are counted too."""
        device = _socket.if_indextoname(_LOOPBACK)
        for _ in range(count):
            sender.sendto(data, (device, _ETHERTYPE))
        limit = time.monotonic() + _PATIENCE_S
        while count > 0:
            _check(limit)
            # Reading the number clears it.
            count -= _U32.unpack_from(self.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 12))[0]

    @staticmethod
    def _address() -> bytearray:
        return bytearray(_SOCKADDR_LL.pack(_socket.AF_PACKET, _socket.htons(_ETHERTYPE), _LOOPBACK, 0, 0, 0))


def _check(limit: float) -> None:
    if time.monotonic() > limit:
        raise OSError(0, "its ring cannot be turned on: packets do not come through the loopback device")
