"""Tables of nf_tables that drop the packets of chosen TCP connections, made and removed through netlink(7).

No program ``nft`` is needed. A table has two chains, of the packets that come in for this machine and of those that it
sends, and one set of connections for each IP version. Each set has one element per connection: (own address . own port
. other address . other port); the rules of the two chains fill the registers from opposite sides of the packet.
A table may also close doors (:func:`close_doors`).
Everything is changed in one transaction of the kernel: a table is there with all that belongs to it, or not at all.

Where in the path: the own side of a packet must be what the *socket* sees, also where NAT rewrites it. Packets that
come in are rewritten last at priority 100, those that go out first at -100; so the chains stand behind and before that.
(The filter chains of others, at 0, see packets of a connection that NAT rewrites with another address.)

Source: linux/netfilter/nf_tables.h; libnftables' types for what ``nft list ruleset`` shows.
"""

from __future__ import annotations

import struct
import sys

from firn.abi import nftables as nf
from firn.host.netlink import Channel, attribute, attributes, message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MARK = 0xC114
"""The mark (SO_MARK) of packets that pass: those with which a restore rebuilds connections. CRIU's number."""
MAPPED = bytes(10) + b"\xff\xff"
AF_INET, AF_INET6 = 2, 10
_TCP = 6
_ADDRESS, _PORT = {4: 7, 16: 8}, 13
"""The numbers that nft gives to the types ipv4_addr, ipv6_addr, inet_service."""
_TYPE_BITS = 6
_SETS = {4: b"conns4\0", 16: b"conns6\0"}
_DOORS = {4: b"doors4\0", 16: b"doors6\0"}
_INPUT, _OUTPUT = b"input\0", b"output\0"
_FLAGS_OFFSET, _SYN, _RST, _ACK = 13, 2, 4, 16
"""Where the flags are in a TCP header, and some of them (RFC 9293)."""
_AT_ONCE = 1000
"""Elements in one message: an attribute must stay below 64 KiB."""
_USERDATA_COMMENT = 0
"""libnftnl's NFTNL_UDATA_TABLE_COMMENT: a string with its length in one byte, shown by ``nft list``."""
_COMMENT_LIMIT = 240
_NEW = nf.NLM_F_CREATE | nf.NLM_F_EXCL


class Connection:
    """A TCP connection as one of its sockets sees it: *family* (2 or 10), *source* and *destination* are 4 or 16 bytes
    in network order, *sport* and *dport* numbers. IPv4 addresses mapped into IPv6 count as what they are."""

    __slots__ = ("destination", "dport", "family", "source", "sport")

    def __init__(self, family: int, source: bytes, sport: int, destination: bytes, dport: int) -> None:
        if source.startswith(MAPPED) and destination.startswith(MAPPED):
            family, source, destination = AF_INET, source[12:], destination[12:]
        self.family = family
        self.source = source
        self.sport = sport
        self.destination = destination
        self.dport = dport

    def key(self) -> bytes:
        """The element of the set."""
        return door(self.source, self.sport) + door(self.destination, self.dport)

    def __repr__(self) -> str:
        import _socket

        near, far = (_socket.inet_ntop(self.family, raw) for raw in (self.source, self.destination))
        return f"{near}:{self.sport}-{far}:{self.dport}"


def door(address: bytes, port: int) -> bytes:
    """An address (4 or 16 bytes, network order) and a port as in an element of a set: whole registers of four bytes."""
    return address + port.to_bytes(2, "big") + b"\0\0"


class Table:
    """A table that exists: ``name``; ``comment`` as it was given (empty if the kernel or its maker has none);
    ``owned``: it vanishes when the process that made it ends (so that process lives); ``armed``: it has an effect."""

    __slots__ = ("armed", "comment", "name", "owned")

    def __init__(self, payload: bytes) -> None:
        found = attributes(payload[nf.NFGENMSG.size :])
        self.name = found.get(nf.NFTA_TABLE_NAME, b"").rstrip(b"\0").decode("utf-8", "surrogateescape")
        self.owned = bool(int.from_bytes(found.get(nf.NFTA_TABLE_FLAGS, b""), "big") & nf.NFT_TABLE_F_OWNER)
        self.armed = any(found.get(nf.NFTA_TABLE_USE, b""))
        data = found.get(nf.NFTA_TABLE_USERDATA, b"")
        self.comment = ""
        if len(data) > 2 and data[0] == _USERDATA_COMMENT:
            self.comment = data[2 : 2 + data[1]].rstrip(b"\0").decode("utf-8", "replace")


def open_channel(namespace: int = -1) -> Channel:
    """A channel to nf_tables of a network namespace (a descriptor; -1: our own). Raises :class:`OSError`."""
    return Channel(nf.NETLINK_NETFILTER, namespace)


def tables(channel: Channel) -> list[Table]:
    """All tables of the family inet. Raises :class:`OSError`."""
    request = _message(nf.NFT_MSG_GETTABLE, nf.NLM_F_DUMP, b"")
    return [Table(payload) for payload in channel.ask("list of nftables tables", request)]


def make(channel: Channel, name: str, comment: str = "", owned: bool = False) -> None:
    """Make the table *name*, which must not exist. It has no effect yet.

    An *owned* table (Linux 5.13) vanishes with *channel*, so also if the process dies; nobody else can change it. The
    *comment* (Linux 5.10) is cut at 240 bytes. Raises :class:`OSError`: EEXIST, or another error where the kernel does
    not know nf_tables, the family inet or owners.
    """
    flags = attribute(nf.NFTA_TABLE_FLAGS, _number(nf.NFT_TABLE_F_OWNER if owned else 0))
    text = comment.encode("utf-8", "surrogateescape")[:_COMMENT_LIMIT] + b"\0"
    data = attribute(nf.NFTA_TABLE_USERDATA, bytes((_USERDATA_COMMENT, len(text))) + text) if comment else b""
    request = _text(nf.NFTA_TABLE_NAME, name) + flags + data
    _change(channel, f"making nftables table {name}", [_message(nf.NFT_MSG_NEWTABLE, _NEW, request)])


def arm(channel: Channel, name: str, connections: Iterable[Connection] = ()) -> None:
    """Let the table *name*, just made, drop the packets of *connections*. Raises :class:`OSError`."""
    requests = [_set(name, _SETS[width], width, (_ADDRESS[width], _PORT) * 2) for width in _SETS]
    requests += _chain(name, _INPUT, nf.NF_INET_LOCAL_IN, nf.NF_IP_PRI_NAT_SRC + 50, incoming=True)
    requests += _chain(name, _OUTPUT, nf.NF_INET_LOCAL_OUT, nf.NF_IP_PRI_RAW, incoming=False)
    _change(channel, f"arming nftables table {name}", [*requests, *_elements(name, connections)])


def add(channel: Channel, name: str, connections: Iterable[Connection]) -> None:
    """Let the armed table *name* drop the packets of *connections* too. Raises :class:`OSError`."""
    _change(channel, f"adding to nftables table {name}", _elements(name, connections))


SYN_IN, ALL_IN, RESET_OUT = range(3)
"""What is dropped at a door: the SYN of new clients, for a listening socket that shall get no more connections;
everything that comes, so that no handshake ends either; only resets in answer, for a socket that is gone: another
server in its place can be reached."""


def close_doors(channel: Channel, name: str, doors: Iterable[bytes], what: int) -> None:
    """Let the armed table *name* drop *what* (SYN_IN and so on) at *doors* (see :func:`door`; address 0: any address).
    If it is called again, what is dropped is so at all doors. Raises :class:`OSError`.
    """
    incoming = what != RESET_OUT
    requests = []
    for width, protocol, first in _VERSIONS:
        mine = [each for each in dict.fromkeys(doors) if len(each) == width + 4]
        if not mine:
            continue
        requests.append(_set(name, _DOORS[width], width, (_ADDRESS[width], _PORT)))
        value = attribute(nf.NFTA_DATA_VALUE, bytes(width))
        wildcard = _expression(
            b"immediate\0",
            attribute(nf.NFTA_IMMEDIATE_DREG, _number(nf.NFT_REG32_00))
            + attribute(nf.NFTA_IMMEDIATE_DATA, value, nested=True),
        )
        port = _payload(nf.NFT_REG32_00 + width // 4, nf.NFT_PAYLOAD_TRANSPORT_HEADER, 2 * incoming, 2)
        address = _payload(nf.NFT_REG32_00, nf.NFT_PAYLOAD_NETWORK_HEADER, first + width * incoming, width)
        flags = (_flags(_SYN | _ACK, _SYN), b"", _flags(_RST, _RST))[what]
        for key in (address + port, wildcard + port):
            rule = _tcp(protocol) + flags + key + _drop_if_in(_DOORS[width], width)
            requests.append(_rule(name, _INPUT if incoming else _OUTPUT, rule))
        requests += _list(name, _DOORS[width], [_element_head(width + 4) + each for each in mine])
    _change(channel, f"closing doors in nftables table {name}", requests)


def remove(channel: Channel, names: Sequence[str]) -> None:
    """Remove these tables, all at once. Raises :class:`OSError`: ENOENT if one is not there, EPERM if another
    process owns it."""
    requests = [_message(nf.NFT_MSG_DELTABLE, 0, _text(nf.NFTA_TABLE_NAME, name)) for name in names]
    _change(channel, f"removing nftables table {', '.join(names)}", requests)


# -- messages ----------------------------------------------------------------------------------------------------------


def _message(kind: int, flags: int, payload: bytes) -> bytes:
    head = nf.NFGENMSG.pack(nf.NFPROTO_INET, 0, 0)
    return message(nf.NFNL_SUBSYS_NFTABLES << 8 | kind, flags, head + payload)


def _change(channel: Channel, what: str, requests: list[bytes]) -> None:
    """One transaction."""
    if not requests:
        return
    edge = nf.NFGENMSG.pack(0, 0, int.from_bytes(nf.NFNL_SUBSYS_NFTABLES.to_bytes(2, "big"), "little"))
    begin, end = (message(kind, 0, edge) for kind in (nf.NFNL_MSG_BATCH_BEGIN, nf.NFNL_MSG_BATCH_END))
    # Old kernels answer nothing to the end of a batch: so the last request is the one that is acknowledged.
    size, kind, flags, _, pid = nf.NLMSGHDR.unpack_from(requests[-1])
    last = nf.NLMSGHDR.pack(size, kind, flags | nf.NLM_F_ACK, 0, pid) + requests[-1][nf.NLMSGHDR.size :]
    channel.change(what, [begin, *requests[:-1], last, end])


def _number(value: int) -> bytes:
    return struct.pack(">i", value)


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode("utf-8", "surrogateescape") + b"\0")


def _set(table: str, name: bytes, width: int, types: tuple[int, ...]) -> bytes:
    """A set whose elements are addresses of *width* bytes and ports, as *types* says."""
    number = 0
    for each in types:
        number = number << _TYPE_BITS | each
    return _message(
        nf.NFT_MSG_NEWSET,
        nf.NLM_F_CREATE,
        _text(nf.NFTA_SET_TABLE, table)
        + attribute(nf.NFTA_SET_NAME, name)
        + attribute(nf.NFTA_SET_FLAGS, _number(0))
        + attribute(nf.NFTA_SET_KEY_TYPE, _number(number))
        + attribute(nf.NFTA_SET_KEY_LEN, _number(len(types) // 2 * (width + 4)))
        + attribute(nf.NFTA_SET_ID, _number(width)),
    )


def _elements(table: str, connections: Iterable[Connection]) -> list[bytes]:
    elements: dict[int, list[bytes]] = {}
    for connection in connections:
        width = len(connection.source)
        elements.setdefault(width, []).append(_ELEMENT_HEADS[width] + connection.key())
    return [request for width, each in elements.items() for request in _list(table, _SETS[width], each)]


def _list(table: str, name: bytes, elements: list[bytes]) -> list[bytes]:
    return [
        _message(
            nf.NFT_MSG_NEWSETELEM,
            nf.NLM_F_CREATE,
            _text(nf.NFTA_SET_ELEM_LIST_TABLE, table)
            + attribute(nf.NFTA_SET_ELEM_LIST_SET, name)
            + attribute(nf.NFTA_SET_ELEM_LIST_ELEMENTS, b"".join(elements[first : first + _AT_ONCE]), nested=True),
        )
        for first in range(0, len(elements), _AT_ONCE)
    ]


def _element_head(size: int) -> bytes:
    """What stands before the key of an element, of *size* bytes: the same for all."""
    key = bytes(size)
    value = attribute(nf.NFTA_SET_ELEM_KEY, attribute(nf.NFTA_DATA_VALUE, key), nested=True)
    return attribute(nf.NFTA_LIST_ELEM, value, nested=True).removesuffix(key)


_ELEMENT_HEADS = {width: _element_head(2 * (width + 4)) for width in _SETS}
"""Made once, for there may be thousands of elements."""
_VERSIONS = ((4, nf.NFPROTO_IPV4, 12), (16, nf.NFPROTO_IPV6, 8))
"""Of IP: the width of an address, the number, and the offset of the source in the header."""


def _chain(table: str, name: bytes, hook: int, priority: int, incoming: bool) -> list[bytes]:
    """The chain *name* and its rules: marked packets pass, those of the connections in the sets are dropped."""
    place = attribute(nf.NFTA_HOOK_HOOKNUM, _number(hook)) + attribute(nf.NFTA_HOOK_PRIORITY, _number(priority))
    chain = (
        _text(nf.NFTA_CHAIN_TABLE, table)
        + attribute(nf.NFTA_CHAIN_NAME, name)
        + attribute(nf.NFTA_CHAIN_HOOK, place, nested=True)
        + attribute(nf.NFTA_CHAIN_TYPE, b"filter\0")
    )
    rules = [_equal(nf.NFT_META_MARK, MARK.to_bytes(4, sys.byteorder)) + _verdict(nf.NF_ACCEPT)]
    for width, protocol, first in _VERSIONS:
        rules.append(_tcp(protocol) + _key(width, first, incoming) + _drop_if_in(_SETS[width], width))
    return [_message(nf.NFT_MSG_NEWCHAIN, nf.NLM_F_CREATE, chain), *(_rule(table, name, rule) for rule in rules)]


def _rule(table: str, chain: bytes, expressions: bytes) -> bytes:
    return _message(
        nf.NFT_MSG_NEWRULE,
        nf.NLM_F_CREATE | nf.NLM_F_APPEND,
        _text(nf.NFTA_RULE_TABLE, table)
        + attribute(nf.NFTA_RULE_CHAIN, chain)
        + attribute(nf.NFTA_RULE_EXPRESSIONS, expressions, nested=True),
    )


def _tcp(protocol: int) -> bytes:
    """Go on only with TCP packets of an IP version."""
    return _equal(nf.NFT_META_NFPROTO, bytes((protocol,))) + _equal(nf.NFT_META_L4PROTO, bytes((_TCP,)))


def _drop_if_in(name: bytes, number: int) -> bytes:
    """Drop the packet if what the registers hold is in the set *name*, which has that *number* if it is new."""
    lookup = (
        attribute(nf.NFTA_LOOKUP_SET, name)
        + attribute(nf.NFTA_LOOKUP_SREG, _number(nf.NFT_REG32_00))
        + attribute(nf.NFTA_LOOKUP_SET_ID, _number(number))
    )
    return _expression(b"lookup\0", lookup) + _expression(b"counter\0", b"") + _verdict(nf.NF_DROP)


def _expression(name: bytes, data: bytes) -> bytes:
    inner = attribute(nf.NFTA_EXPR_NAME, name) + attribute(nf.NFTA_EXPR_DATA, data, nested=True)
    return attribute(nf.NFTA_LIST_ELEM, inner, nested=True)


def _equal(key: int, value: bytes) -> bytes:
    """Go on only with packets whose meta information *key* is *value*."""
    register = attribute(nf.NFTA_META_DREG, _number(nf.NFT_REG32_00))
    return _expression(b"meta\0", register + attribute(nf.NFTA_META_KEY, _number(key))) + _compare(value)


def _compare(value: bytes) -> bytes:
    """Go on only if the first register holds *value*."""
    wanted = attribute(nf.NFTA_DATA_VALUE, value)
    return _expression(
        b"cmp\0",
        attribute(nf.NFTA_CMP_SREG, _number(nf.NFT_REG32_00))
        + attribute(nf.NFTA_CMP_OP, _number(nf.NFT_CMP_EQ))
        + attribute(nf.NFTA_CMP_DATA, wanted, nested=True),
    )


def _flags(mask: int, wanted: int) -> bytes:
    """Go on only with packets of which these of the TCP flags are *wanted*."""
    mine, zero = (attribute(nf.NFTA_DATA_VALUE, bytes((each,))) for each in (mask, 0))
    masked = _expression(
        b"bitwise\0",
        attribute(nf.NFTA_BITWISE_SREG, _number(nf.NFT_REG32_00))
        + attribute(nf.NFTA_BITWISE_DREG, _number(nf.NFT_REG32_00))
        + attribute(nf.NFTA_BITWISE_LEN, _number(1))
        + attribute(nf.NFTA_BITWISE_MASK, mine, nested=True)
        + attribute(nf.NFTA_BITWISE_XOR, zero, nested=True),
    )
    where = nf.NFT_PAYLOAD_TRANSPORT_HEADER, _FLAGS_OFFSET, 1
    return _payload(nf.NFT_REG32_00, *where) + masked + _compare(bytes((wanted,)))


def _key(width: int, first: int, incoming: bool) -> bytes:
    """Fill the registers with own address, own port, other address, other port of a packet.

    *width* of an address, whose source is at offset *first* of the IP header, with the destination behind it.
    """
    loads, register = b"", nf.NFT_REG32_00
    for destination in (incoming, not incoming):
        for base, offset, size in (
            (nf.NFT_PAYLOAD_NETWORK_HEADER, first + width * destination, width),
            (nf.NFT_PAYLOAD_TRANSPORT_HEADER, 2 * destination, 2),
        ):
            loads += _payload(register, base, offset, size)
            register += (size + 3) // 4
    return loads


def _payload(register: int, base: int, offset: int, size: int) -> bytes:
    """Load *size* bytes of the header *base*."""
    return _expression(
        b"payload\0",
        attribute(nf.NFTA_PAYLOAD_DREG, _number(register))
        + attribute(nf.NFTA_PAYLOAD_BASE, _number(base))
        + attribute(nf.NFTA_PAYLOAD_OFFSET, _number(offset))
        + attribute(nf.NFTA_PAYLOAD_LEN, _number(size)),
    )


def _verdict(code: int) -> bytes:
    verdict = attribute(nf.NFTA_DATA_VERDICT, attribute(nf.NFTA_VERDICT_CODE, _number(code)), nested=True)
    return _expression(
        b"immediate\0",
        attribute(nf.NFTA_IMMEDIATE_DREG, _number(nf.NFT_REG_VERDICT))
        + attribute(nf.NFTA_IMMEDIATE_DATA, verdict, nested=True),
    )
