"""Probes of sockets and of the network. For the rules of a probe see :mod:`probes_tracing`."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from firn.abi import bpf as abi
from firn.abi import nftables as nf
from firn.abi import nr
from firn.abi import probe_consts as pc
from firn.abi.libc import syscall
from firn.errors import KernelError
from firn.host import bpf
from firn.host.btf import KernelTypes
from firn.host.netlink import attribute, attributes, message
from firn.host.probes_netlink import talk
from firn.host.unixqueue import Queues

_PROBE_NAME = b"firn-probe\0"
_ALL_STATES = 0xFFFFFFFF
_LOOPBACK = 1
"""The index of lo in every network namespace (LOOPBACK_IFINDEX)."""


def _new_network() -> None:
    syscall("unshare of the network namespace", nr.unshare, pc.CLONE_NEWNET)


# -- Listing sockets --------------------------------------------------------------------------------------------------


def _list_sockets(what: str, request: bytes) -> list[bytes]:
    dump = message(pc.SOCK_DIAG_BY_FAMILY, nf.NLM_F_DUMP, request)
    return talk(pc.NETLINK_SOCK_DIAG, f"sock_diag of {what}", dump)


def _inet_request(family: int, protocol: int) -> bytes:
    return pc.INET_DIAG_REQ.pack(family, protocol, 0, 0, _ALL_STATES)


def socket_lists() -> str | None:
    """sock_diag(7) of all kinds of sockets; UDP-Lite and raw ones may be missing."""
    _list_sockets("unix", pc.UNIX_DIAG_REQ.pack(socket.AF_UNIX, 0, 0, _ALL_STATES, 0, 0, 0))
    _list_sockets("packet", pc.NETLINK_DIAG_REQ.pack(socket.AF_PACKET, 0, 0, 0, 0, 0))
    _list_sockets("netlink", pc.NETLINK_DIAG_REQ.pack(socket.AF_NETLINK, pc.NDIAG_PROTO_ALL, 0, 0, 0, 0))
    missing = []
    for name, protocol in (
        ("tcp", socket.IPPROTO_TCP),
        ("udp", socket.IPPROTO_UDP),
        ("udplite", socket.IPPROTO_UDPLITE),
        ("raw", socket.IPPROTO_RAW),
    ):
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                _list_sockets(name, _inet_request(family, protocol))
            except OSError as error:
                if error.errno != errno.ENOENT or name in ("tcp", "udp"):
                    raise
                missing.append(name)
    return f"not listed: {', '.join(sorted(set(missing)))} sockets" if missing else None


def raw_socket_lists() -> None:
    """sock_diag(7) of raw sockets (Linux 4.10, CONFIG_INET_RAW_DIAG), IPv4 and IPv6."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
            inode = os.fstat(raw.fileno()).st_ino
            found = _list_sockets("raw", _inet_request(family, socket.IPPROTO_RAW))
            if inode not in [struct.unpack_from("<I", reply, pc.INET_DIAG_INODE)[0] for reply in found]:
                raise KernelError("sock_diag does not show a raw socket")


# -- Socket options ---------------------------------------------------------------------------------------------------


def peek_offset() -> None:
    """SO_PEEK_OFF (socket(7)), off at first."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if sock.getsockopt(socket.SOL_SOCKET, pc.SO_PEEK_OFF) != -1:
            raise KernelError("SO_PEEK_OFF of a new socket is not -1")


def filter_and_device() -> None:
    """Reading SO_GET_FILTER (Linux 3.8) and SO_BINDTODEVICE (3.8) of a socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.getsockopt(socket.SOL_SOCKET, pc.SO_GET_FILTER, 0)
        sock.getsockopt(socket.SOL_SOCKET, pc.SO_BINDTODEVICE, 16)


def buffer_lock() -> None:
    """SO_BUF_LOCK (Linux 5.15)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.getsockopt(socket.SOL_SOCKET, pc.SO_BUF_LOCK)


def ipv6_freebind() -> None:
    """IPV6_FREEBIND (Linux 4.15)."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, pc.IPV6_FREEBIND, 1)


def socket_namespace() -> None:
    """SIOCGSKNS (Linux 4.10): the network namespace of a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        namespace = fcntl.ioctl(sock.fileno(), pc.SIOCGSKNS)
        if not os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/net")):
            raise KernelError("SIOCGSKNS gives another namespace than ours")


def unix_file() -> None:
    """SIOCUNIXFILE (Linux 4.15): the file of a bound socket; this one is not bound."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock.fileno(), pc.SIOCUNIXFILE)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def unix_queues() -> None:
    """bpf(2) and BTF: what is in the queue of a connection that was not accepted yet, in the kernel's memory."""
    Queues().close()


# -- TCP_REPAIR -------------------------------------------------------------------------------------------------------


def tcp_repair() -> str | None:
    """TCP_REPAIR (Linux 3.5, CAP_NET_ADMIN), and TCP_TIMESTAMP (3.9)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, pc.TCP_REPAIR, 1)
        try:
            sock.getsockopt(socket.IPPROTO_TCP, pc.TCP_TIMESTAMP)
        except OSError as error:
            return f"TCP_TIMESTAMP cannot be read: {error.strerror}"
    return None


def tcp_repair_window() -> None:
    """TCP_REPAIR_WINDOW (Linux 4.8)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, pc.TCP_REPAIR, 1)
        sock.getsockopt(socket.IPPROTO_TCP, pc.TCP_REPAIR_WINDOW, 20)


def tcp_half_closed() -> None:
    """TCP_REPAIR of a connection that one side has shut down (Linux 4.5): a connection to ourselves."""
    try:
        _new_network()
        up = pc.IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, _LOOPBACK, pc.IFF_UP, pc.IFF_UP)
        talk(pc.NETLINK_ROUTE, "RTM_NEWLINK", message(pc.RTM_NEWLINK, nf.NLM_F_ACK, up))
    except PermissionError:
        pass  # Then in the network that we are in.
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=3)
        peer = server.accept()[0]
    with client, peer:
        # A reset at the end, so that the address is not kept in TIME_WAIT.
        for sock in (client, peer):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("<ii", 1, 0))
        client.shutdown(socket.SHUT_WR)
        if peer.recv(1):
            raise KernelError("a shut down connection has data")
        client.setsockopt(socket.IPPROTO_TCP, pc.TCP_REPAIR, 1)
        client.setsockopt(socket.IPPROTO_TCP, pc.TCP_REPAIR, 0)


def tcp_backlog() -> None:
    """A BPF program can vouch for a handshake (bpf_sk_assign_tcp_reqsk, Linux 6.8), and look a socket up in a map."""
    KernelTypes().function("bpf_sk_assign_tcp_reqsk")
    bpf.Map(abi.BPF_MAP_TYPE_SOCKMAP, 8).close()


# -- Interfaces and namespaces ----------------------------------------------------------------------------------------


def namespace_id() -> None:
    """RTM_GETNSID (Linux 4.0): the id of our own network namespace, by our pid."""
    request = bytes(4) + attribute(pc.NETNSA_PID, struct.pack("<I", os.getpid()))
    reply = talk(pc.NETLINK_ROUTE, "RTM_GETNSID", message(pc.RTM_GETNSID, 0, request))
    if pc.NETNSA_NSID not in attributes(reply[0][4:]):
        raise KernelError("RTM_GETNSID gives no id")


def new_index() -> None:
    """IFLA_NEW_IFINDEX (Linux 5.14): an impossible index is refused before the missing interface is noticed."""
    request = pc.IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0)
    request += attribute(pc.IFLA_IFNAME, _PROBE_NAME)
    request += attribute(pc.IFLA_NEW_IFINDEX, struct.pack("<i", -1))
    try:
        talk(pc.NETLINK_ROUTE, "RTM_SETLINK with a new index", message(pc.RTM_SETLINK, nf.NLM_F_ACK, request))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    else:
        raise KernelError("RTM_SETLINK takes an impossible index")


def link_namespace_id() -> None:
    """IFLA_LINK_NETNSID (Linux 4.0): where the peer of a veth device is; tried between two new namespaces."""
    _new_network()
    outer = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _new_network()
    nothing = pc.IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0)
    peer = nothing + attribute(pc.IFLA_IFNAME, b"peer\0") + attribute(pc.IFLA_NET_NS_FD, struct.pack("<I", outer))
    data = attribute(pc.VETH_INFO_PEER, peer, nested=True)
    info = attribute(pc.IFLA_INFO_KIND, b"veth") + attribute(pc.IFLA_INFO_DATA, data, nested=True)
    request = nothing + attribute(pc.IFLA_IFNAME, b"veth\0") + attribute(pc.IFLA_LINKINFO, info, nested=True)
    flags = nf.NLM_F_ACK | nf.NLM_F_CREATE
    talk(pc.NETLINK_ROUTE, "making a veth pair", message(pc.RTM_NEWLINK, flags, request))
    links = talk(pc.NETLINK_ROUTE, "RTM_GETLINK", message(pc.RTM_GETLINK, nf.NLM_F_DUMP, nothing))
    for link in links:
        found = attributes(link[pc.IFINFOMSG.size :])
        if found.get(pc.IFLA_IFNAME) == b"veth\0" and pc.IFLA_LINK_NETNSID in found:
            return
    raise KernelError("the list of links does not tell the namespace of a veth peer")


# -- nftables ---------------------------------------------------------------------------------------------------------


def _nft(kind: int, payload: bytes, flags: int = nf.NLM_F_ACK | nf.NLM_F_CREATE) -> bytes:
    return message(nf.NFNL_SUBSYS_NFTABLES << 8 | kind, flags, struct.pack(">BBH", nf.NFPROTO_INET, 0, 0) + payload)


def nft_concatenated_sets() -> None:
    """A table of nftables with a set of (address . port) pairs (Linux 5.6), in a new network namespace."""
    _new_network()
    fields = b"".join(
        attribute(nf.NFTA_LIST_ELEM, attribute(pc.NFTA_SET_FIELD_LEN, struct.pack(">I", size)), nested=True)
        for size in (4, 2)
    )
    ipv4_address, port = 7, 13  # The numbers that nft(8) gives to the types of the two fields.
    new_set = (
        attribute(nf.NFTA_SET_TABLE, _PROBE_NAME)
        + attribute(nf.NFTA_SET_NAME, b"pairs\0")
        + attribute(nf.NFTA_SET_FLAGS, struct.pack(">I", pc.NFT_SET_CONCAT))
        + attribute(nf.NFTA_SET_KEY_TYPE, struct.pack(">I", ipv4_address << 6 | port))
        + attribute(nf.NFTA_SET_KEY_LEN, struct.pack(">I", 8))
        + attribute(nf.NFTA_SET_ID, struct.pack(">I", 1))
        + attribute(pc.NFTA_SET_DESC, attribute(pc.NFTA_SET_DESC_CONCAT, fields, nested=True), nested=True)
    )
    edge = struct.pack(">BBH", socket.AF_UNSPEC, 0, nf.NFNL_SUBSYS_NFTABLES)
    talk(
        nf.NETLINK_NETFILTER,
        "making a concatenated nftables set",
        message(nf.NFNL_MSG_BATCH_BEGIN, 0, edge),
        _nft(nf.NFT_MSG_NEWTABLE, attribute(nf.NFTA_TABLE_NAME, _PROBE_NAME)),
        _nft(nf.NFT_MSG_NEWSET, new_set),
        message(nf.NFNL_MSG_BATCH_END, 0, edge),
        answers=2,
    )


# -- iptables ---------------------------------------------------------------------------------------------------------


def legacy_iptables() -> None:
    """The programs that list the rules of the legacy kind, for IPv4 and, where there is IPv6, for that too."""
    for family in ("iptables", "ip6tables"):
        if family == "ip6tables" and not os.path.exists("/proc/sys/net/ipv6"):
            continue
        if not any(_lists_legacy_rules(name) for name in (f"{family}-legacy-save", f"{family}-save")):
            raise KernelError(f"there is no {family}-save of the legacy kind")


def _lists_legacy_rules(name: str) -> bool:
    import shutil
    import subprocess

    path = shutil.which(name)
    if path is None:
        return False
    try:
        version = subprocess.run([path, "-V"], stdin=subprocess.DEVNULL, capture_output=True, timeout=3, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    # The other kind, on top of nftables, calls itself (nf_tables); old programs do not say.
    return not version.returncode and b"nf_tables" not in version.stdout
