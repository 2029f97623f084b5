"""What is in the receive queues of unix sockets that cannot be read without being changed (net/unix/af_unix.c).

A connection that was not accepted yet is a socket that no descriptor leads to: it hangs on a message in the queue of
the listening one, and what its client sends waits in its own queue. Only accept(2) leads there, and nothing leads back.
So the kernel's memory is looked at (:mod:`kernelmemory`), while those who could change these queues stand still.

A buffer (struct sk_buff) has its first bytes in place and the rest in pages (struct skb_shared_info). Where a page is
in memory the kernel does not say; but one that firn has filled itself tells it for all, because both are in order
(CONFIG_SPARSEMEM_VMEMMAP: struct page number N, and page number N of the direct map).
"""

from __future__ import annotations

import os
import struct

from firn.errors import KernelError
from firn.host.kernelmemory import KernelMemory

_FRAGMENT = struct.Struct("<QII")
"""skb_frag_t: page, length, offset (also as struct bio_vec, before Linux 6.7)."""
_UCRED = struct.Struct("<iII")
_MOST_MESSAGES = 1 << 20
_PAGE = 4096
_STEP = 1 << 30
"""The kernel begins its maps of memory at multiples of this (PUD_SIZE)."""
_SAMPLE = 16384


class Message:
    """A piece of a queue: ``files`` are addresses of struct file, ``credentials`` a struct ucred or nothing, ``sender``
    the name of the socket it came from; ``urgent``: out-of-band."""

    __slots__ = ("credentials", "data", "files", "sender", "urgent")

    def __init__(self, data: bytes, files: list[int], credentials: bytes, sender: bytes, urgent: bool) -> None:
        self.data = data
        self.files = files
        self.credentials = credentials
        self.sender = sender
        self.urgent = urgent


class Client:
    """Who waits to be accepted: ``name`` of the socket, who connected (``pid``, ``uid``, ``gid``, packed ``groups``),
    and what was sent."""

    __slots__ = ("gid", "groups", "name", "pid", "sent", "uid")

    def __init__(self, name: bytes, pid: int, uid: int, gid: int, groups: bytes, sent: list[Message]) -> None:
        self.name = name
        self.pid = pid
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.sent = sent


class Queues:
    """Looks into queues, until :meth:`close`. All methods raise :class:`KernelError` or :class:`OSError` for what
    cannot be seen. First it is tried with a queue of our own, so that a kernel with another order is not misread."""

    def __init__(self) -> None:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if file.read().split() != ["0", "0", "4294967295"]:
                raise KernelError("user ids of the kernel are not ours in a user namespace")
        self._memory = KernelMemory()
        self._page_map: int | None = None
        try:
            ours = self._memory.field(self._memory.task, "task_struct", "thread_pid")
            self._level = self._memory.field(ours, "pid", "level", size=4)
            self._numbers = self._memory.types.offset("pid", "numbers")
            self._namespace = self._memory.number(ours + self._numbers + 16 * self._level + 8)
            self._try()
        except BaseException:
            self.close()
            raise

    def _try(self) -> None:
        import _socket

        server, client = (_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC) for _ in range(2))
        try:
            server.bind(b"")
            server.listen(1)
            client.connect(server.getsockname())
            control = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, client.fileno().to_bytes(4, "little"))]
            client.sendmsg([b"early"], control)
            (seen,) = self.clients(server.fileno())
            right = [(piece.data, piece.files) for piece in seen.sent] == [(b"early", [self.file(client.fileno())])]
            if not right or (seen.pid, seen.uid, seen.gid) != (os.getpid(), os.geteuid(), os.getegid()):
                raise KernelError("the kernel's memory is in an order that is not known")
        finally:
            server.close()
            client.close()

    def close(self) -> None:
        """Let go of the kernel's memory."""
        self._memory.close()

    def file(self, fd: int) -> int:
        """The address of the struct file of our descriptor *fd*."""
        return self._memory.file(fd)

    def messages(self, fd: int) -> list[Message]:
        """What is in the queue of the socket *fd*, which is ours or a copy."""
        return self._messages(self._sock(fd))

    def clients(self, fd: int) -> list[Client]:
        """Who waits to be accepted by the listening socket *fd*, in order."""
        return [self._client(skb) for skb in self._buffers(self._sock(fd))]

    def _at(self, structure: str, member: str) -> int:
        return self._memory.types.offset(structure, member)

    def _sock(self, fd: int) -> int:
        return self._memory.field(self._memory.file(fd), "file", "private_data>socket", "sk")

    def _buffers(self, sock: int) -> list[int]:
        """The addresses of the buffers in a socket's queue. Two pointers come first in its head and in each of them."""
        head = sock + self._at("sock", "sk_receive_queue")
        found: list[int] = []
        at = self._memory.number(head)
        while at != head:
            found.append(at)
            if len(found) > _MOST_MESSAGES:
                raise KernelError("the queue of a socket does not end")
            at = self._memory.number(at)
        return found

    def _client(self, skb: int) -> Client:
        sock = self._memory.field(skb, "sk_buff", "sk")
        peer = self._memory.field(sock, "unix_sock", "peer")
        pid = self._pid(self._memory.field(sock, "sock", "sk_peer_pid"))
        who = self._memory.field(sock, "sock", "sk_peer_cred")
        uid, gid = (self._memory.field(who, "cred", name, size=4) for name in ("euid", "egid"))
        groups = self._memory.field(who, "cred", "group_info")
        count = self._memory.field(groups, "group_info", "ngroups", size=4)
        packed = self._memory.read(groups + self._at("group_info", "gid"), 4 * count) if count else b""
        return Client(self._name(peer) if peer else b"", pid, uid, gid, packed, self._messages(sock))

    def _name(self, sock: int) -> bytes:
        """The bytes of sun_path of a socket's name."""
        address = self._memory.field(sock, "unix_sock", "addr")
        if not address:
            return b""
        size = self._memory.field(address, "unix_address", "len", size=4)
        name = self._memory.read(address + self._at("unix_address", "name"), size)[2:]
        return name if name[:1] == b"\0" else name.split(b"\0")[0]

    def _pid(self, pid: int) -> int:
        """The number of a struct pid in our namespace; 0 if it has none."""
        if not pid or self._memory.field(pid, "pid", "level", size=4) < self._level:
            return 0
        number, namespace = struct.unpack("<I4xQ", self._memory.read(pid + self._numbers + 16 * self._level, 16))
        return int(number) if namespace == self._namespace else 0

    def _messages(self, sock: int) -> list[Message]:
        urgent = 0
        if self._memory.types.has("unix_sock", "oob_skb"):
            urgent = self._memory.field(sock, "unix_sock", "oob_skb")
        return [self._message(skb, skb == urgent) for skb in self._buffers(sock)]

    def _message(self, skb: int, urgent: bool) -> Message:
        control = skb + self._at("sk_buff", "cb")
        pid = self._memory.field(control, "unix_skb_parms", "pid")
        credentials = b""
        if pid:
            uid, gid = (self._memory.field(control, "unix_skb_parms", name, size=4) for name in ("uid", "gid"))
            credentials = _UCRED.pack(self._pid(pid), uid, gid)
        sent = self._memory.field(control, "unix_skb_parms", "fp")
        files: list[int] = []
        if sent:
            count = self._memory.field(sent, "scm_fp_list", "count", size=2)
            raw = self._memory.read(sent + self._at("scm_fp_list", "fp"), 8 * count)
            files = list(struct.unpack(f"<{count}Q", raw))
        sender = self._memory.field(skb, "sk_buff", "sk")
        # Of a stream a part may have been read.
        data = self._data(skb)[self._memory.field(control, "unix_skb_parms", "consumed", size=4) :]
        return Message(data, files, credentials, self._name(sender) if sender else b"", urgent)

    def _data(self, skb: int) -> bytes:
        whole = self._memory.field(skb, "sk_buff", "len", size=4)
        apart = self._memory.field(skb, "sk_buff", "data_len", size=4)
        start = self._memory.field(skb, "sk_buff", "data")
        data = self._memory.read(start, whole - apart)
        for page, count, offset in self._fragments(skb) if apart else ():
            data += self._memory.read(self._address(page) + offset, count)
        if len(data) != whole:
            raise KernelError("a message is spread over memory in an unknown way")
        return data

    def _fragments(self, skb: int) -> list[tuple[int, int, int]]:
        end = self._memory.field(skb, "sk_buff", "end", size=4)
        info = self._memory.field(skb, "sk_buff", "head") + end
        count = self._memory.field(info, "skb_shared_info", "nr_frags", size=1)
        raw = self._memory.read(info + self._at("skb_shared_info", "frags"), _FRAGMENT.size * count)
        return list(_FRAGMENT.iter_unpack(raw))

    def _address(self, page: int) -> int:
        """Where the page of a struct page (64 bytes) is mapped."""
        if self._page_map is None:
            self._page_map = self._find_pages()
        return page * (_PAGE // 64) + self._page_map

    def _find_pages(self) -> int:
        """What to add to the address of a struct page times 64 for that of its page, found by a message of our own."""
        import _socket

        one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        try:
            sample = os.urandom(_SAMPLE)
            one.send(sample)
            (skb,) = self._buffers(self._sock(other.fileno()))
            linear = _SAMPLE - self._memory.field(skb, "sk_buff", "data_len", size=4)
            page, count, offset = self._fragments(skb)[0]
            wanted = sample[linear : linear + min(count, 64)]
            near = self._memory.field(skb, "sk_buff", "head")
            memory = os.sysconf("SC_PHYS_PAGES") * _PAGE
            for below in range(2 * memory // _STEP + 8):
                base = near // _STEP * _STEP - below * _STEP
                for far in range(memory // 64 // _STEP + 2):
                    first = page // _STEP * _STEP - far * _STEP
                    if self._has(base + (page - first) * (_PAGE // 64) + offset, wanted):
                        return base - first * (_PAGE // 64)
        finally:
            one.close()
            other.close()
        raise KernelError("where the kernel has its pages cannot be found")

    def _has(self, address: int, wanted: bytes) -> bool:
        try:
            return self._memory.read(address, len(wanted)) == wanted
        except OSError:
            return False
