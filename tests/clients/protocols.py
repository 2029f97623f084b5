"""Clients that check every answer of a server; standard library only, for use inside a checkpointed tree and outside.

Each has ``step``: one exchange with the server. A wrong answer is an AssertionError, silence a TimeoutError.
"""

from __future__ import annotations

import hashlib
import socket

PATIENCE = 60.0  # seconds
KEYS = 50

Address = str | tuple[str, int]


def value_of(number: int) -> bytes:
    """Some hundred bytes that only *number* gives."""
    return hashlib.sha256(b"%d" % number).hexdigest().encode() * (1 + number % 20)


class Client:
    """A connection to a path or to host and port, and the number of exchanges that were right."""

    def __init__(self, address: Address) -> None:
        self.steps = 0
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(PATIENCE)
            self._socket.connect(address)
        else:
            self._socket = socket.create_connection(address, PATIENCE)
        self._unread = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def _more(self) -> None:
        got = self._socket.recv(1 << 16)
        assert got, f"the server closed the connection after {self.steps} answers"
        self._unread += got

    def line(self) -> bytes:
        """A line, without its end."""
        while b"\r\n" not in self._unread:
            self._more()
        line, _, self._unread = self._unread.partition(b"\r\n")
        return line

    def exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._more()
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def step(self) -> None:
        self.exchange(self.steps)
        self.steps += 1

    def exchange(self, number: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._socket.close()


class Redis(Client):
    """Values set and got again, a counter, and a transaction that is open most of the time."""

    def ask(self, *words: bytes) -> bytes | None:
        self.send(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
        return self.reply()

    def reply(self) -> bytes | None:
        line = self.line()
        if line[:1] != b"$":
            assert line[:1] in (b"+", b":"), line
            return line[1:]
        if line == b"$-1":
            return None
        return self.exactly(int(line[1:]) + 2)[:-2]

    def exchange(self, number: int) -> None:
        mine = b"%d-" % id(self)
        key, old = (b"%s%d" % (mine, which % KEYS) for which in (number, number + 1))
        assert self.ask(b"SET", key, value_of(number)) == b"OK"
        assert self.ask(b"GET", old) == (value_of(number + 1 - KEYS) if number + 1 >= KEYS else None)
        assert self.ask(b"INCR", mine) == b"%d" % (number + 1)


class Memcached(Client):
    """The text protocol."""

    def get(self, key: bytes) -> bytes | None:
        self.send(b"get %s\r\n" % key)
        line = self.line()
        if line == b"END":
            return None
        word, name, _, size = line.split()
        assert (word, name) == (b"VALUE", key)
        found = self.exactly(int(size) + 2)[:-2]
        assert self.line() == b"END"
        return found

    def exchange(self, number: int) -> None:
        key, old = (b"%d-%d" % (id(self), which % KEYS) for which in (number, number + 1))
        value = value_of(number)
        self.send(b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value))
        assert self.line() == b"STORED"
        assert self.get(old) == (value_of(number + 1 - KEYS) if number + 1 >= KEYS else None)


class Echo(Client):
    """A server that answers each line with a digest of all that it was sent by this client, and its own pid."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._sent = hashlib.sha256()
        self.pids: set[bytes] = set()

    def exchange(self, number: int) -> None:
        value = value_of(number)
        self.send(value + b"\r\n")
        self._sent.update(value)
        digest, pid = self.line().split()
        assert digest == self._sent.hexdigest().encode()
        self.pids.add(pid)
        assert len(self.pids) == 1, "another process serves this connection"


class Http(Client):
    """GET over one connection that is kept alive: a file's contents each time."""

    path = b"/page"
    wanted = b""

    def exchange(self, number: int) -> None:
        self.send(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % self.path)
        status = self.line()
        assert status.startswith(b"HTTP/1.1 200"), status
        size = 0
        while header := self.line():
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                size = int(value)
            assert (name.lower(), value.strip()) != (b"connection", b"close"), "the connection is not kept"
        assert self.exactly(size) == self.wanted


CLIENTS: dict[str, type[Client]] = {"redis": Redis, "memcached": Memcached, "echo": Echo}


class Maria(Client):
    """The MySQL protocol, for a server that asks for no password: a transaction for each exchange."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._packet()
        capabilities = 0x8 | 0x200 | 0x8000 | 0x80000  # a database named, protocol 4.1, authentication plugins
        hello = capabilities.to_bytes(4, "little") + (1 << 24).to_bytes(4, "little") + b"\x21" + bytes(23)
        hello += b"root\0" + b"\0" + b"test\0" + b"mysql_native_password\0"
        self._write(1, hello)
        answer = self._packet()
        assert answer[0] == 0, answer
        self._table = f"t{id(self)}"
        self.ask(f"CREATE TABLE {self._table} (id INT PRIMARY KEY, text VARCHAR(2000))")

    def _write(self, sequence: int, data: bytes) -> None:
        self.send(len(data).to_bytes(3, "little") + bytes([sequence]) + data)

    def _packet(self) -> bytes:
        return self.exactly(int.from_bytes(self.exactly(4)[:3], "little"))

    def ask(self, statement: str) -> list[bytes]:
        """The first column of the result, of rows that are short."""
        self._write(0, b"\x03" + statement.encode())
        first = self._packet()
        assert first[0] != 0xFF, first
        if not first[0]:
            return []
        while self._packet()[0] != 0xFE:
            pass
        rows = []
        while (row := self._packet())[0] != 0xFE:
            rows.append(row[1 : 1 + row[0]])
        return rows

    def exchange(self, number: int) -> None:
        self.ask("BEGIN")
        self.ask(f"INSERT INTO {self._table} VALUES ({number}, '{value_of(number).decode()}')")
        self.ask("COMMIT")
        found = self.ask(f"SELECT LEFT(text, 200) FROM {self._table} WHERE id = {number}")
        assert found == [value_of(number)[:200]]
        assert self.ask(f"SELECT COUNT(*) FROM {self._table}") == [b"%d" % (number + 1)]


class Dns(Client):
    """Queries over UDP, each for one of a hundred names."""

    def __init__(self, address: Address) -> None:
        self.steps = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.settimeout(1)
        self._socket.connect(address)

    def exchange(self, number: int) -> None:
        host = number % 100
        name = b"".join(bytes([len(part)]) + part for part in (b"host%d" % host, b"test")) + b"\0"
        query = (number % 65536).to_bytes(2, "big") + b"\x01\0\0\1\0\0\0\0\0\0" + name + b"\0\1\0\1"
        answer = self._over_udp(query)
        assert answer[:2] == query[:2] and answer[3] & 15 == 0 and answer[6:8] == b"\0\1", answer
        assert answer[-4:] == bytes([10, 0, 0, host])

    def _over_udp(self, query: bytes) -> bytes:
        """Datagrams may be lost while the server is away, so a resolver asks again."""
        for _ in range(int(PATIENCE)):
            self._socket.send(query)
            try:
                while (answer := self._socket.recv(2000))[:2] != query[:2]:
                    pass
                return answer
            except (TimeoutError, ConnectionRefusedError):
                continue
        raise TimeoutError("no answer")
