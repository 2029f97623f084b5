"""What the kernel tells about a network device: its folder in /sys/class/net, ethtool's ioctl, addresses and routes
(rtnetlink(7))."""

from __future__ import annotations

import fcntl
import os

from firn.abi import tun
from firn.abi.libc import address_of
from firn.host import procfs, sockdiag

_OFFLOADS = (
    ("tx-checksum-ip-generic", tun.TUN_F_CSUM), ("tx-tcp-segmentation", tun.TUN_F_TSO4),
    ("tx-tcp6-segmentation", tun.TUN_F_TSO6), ("tx-tcp-ecn-segmentation", tun.TUN_F_TSO_ECN),
    ("tx-udp-segmentation", tun.TUN_F_USO),
)  # fmt: skip
_AF_INET, _AF_INET6 = 2, 10


def attribute(name: str, key: str) -> str:
    """/sys/class/net/*name*/*key*; empty if it does not exist or tells nothing now."""
    try:
        return procfs.read(f"/sys/class/net/{name}/{key}").decode().strip()
    except OSError:
        return ""


def number(name: str, key: str) -> int:
    """The same as a number in any base, -1 for none."""
    text = attribute(name, key)
    return int(text, 0) if text else -1


def bridge(name: str) -> str:
    """The bridge that device *name* is a port of; empty if there is none."""
    return _last(f"/sys/class/net/{name}/brport/bridge")


def master(name: str) -> str:
    """The device that *name* belongs to: a bridge, or a bond, team, VRF."""
    return _last(f"/sys/class/net/{name}/master")


def _last(link: str) -> str:
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""


def _ethtool(name: str, buffer: bytearray) -> None:
    """SIOCETHTOOL with a buffer that begins with the command."""
    import _socket

    channel = _socket.socket(_AF_INET, 2 | sockdiag.SOCK_CLOEXEC)
    try:
        request = tun.IFREQ_POINTER.pack(os.fsencode(name), address_of(buffer))
        fcntl.ioctl(channel.fileno(), tun.SIOCETHTOOL, request)
    finally:
        channel.close()


def _word(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)


def offloads(name: str) -> int:
    """The TUN_F_* that were set by TUNSETOFFLOAD, from the device's active features."""
    asked = bytearray(_word(tun.ETHTOOL_GSSET_INFO, 0, 1 << tun.ETH_SS_FEATURES, 0, 0))
    _ethtool(name, asked)
    count = int.from_bytes(asked[16:20], "little")
    named = bytearray(_word(tun.ETHTOOL_GSTRINGS, tun.ETH_SS_FEATURES, count) + bytes(tun.ETH_GSTRING_LEN * count))
    _ethtool(name, named)
    blocks = (count + 31) // 32
    told = bytearray(_word(tun.ETHTOOL_GFEATURES, blocks) + bytes(tun.FEATURES_BLOCK.size * blocks))
    _ethtool(name, told)
    active = 0
    for index in range(blocks):
        block = tun.FEATURES_BLOCK.unpack_from(told, 8 + index * tun.FEATURES_BLOCK.size)
        active |= block[2] << 32 * index
    names = [
        named[at : at + tun.ETH_GSTRING_LEN].split(b"\0")[0].decode()
        for at in range(12, len(named), tun.ETH_GSTRING_LEN)
    ]
    return sum(flag for text, flag in _OFFLOADS if text in names and active >> names.index(text) & 1)


def addresses(index: int) -> list[bytes]:
    """The RTM_NEWADDR messages of the device *index*, without headers."""
    found = []
    for family in (_AF_INET, _AF_INET6):
        asked = tun.IFADDRMSG.pack(family, 0, 0, 0, 0)
        for payload in sockdiag.listing("addresses", asked, tun.RTM_GETADDR, tun.NETLINK_ROUTE):
            if tun.IFADDRMSG.unpack_from(payload)[4] == index:
                found.append(payload)
    return found


def routes(index: int) -> list[bytes]:
    """The RTM_NEWROUTE messages of routes through the device *index* that somebody has made, without headers."""
    found = []
    for family in (_AF_INET, _AF_INET6):
        asked = tun.RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for payload in sockdiag.listing("routes", asked, tun.RTM_GETROUTE, tun.NETLINK_ROUTE):
            _, _, _, _, table, protocol, _, _, flags = tun.RTMSG.unpack_from(payload)
            made = protocol != tun.RTPROT_KERNEL and table != tun.RT_TABLE_LOCAL and not flags & tun.RTM_F_CLONED
            if made and out_device(payload) == (index, True):
                found.append(payload)
    return found


def out_device(route: bytes) -> tuple[int, bool]:
    """(index of the device that a route leads through, whether it names one)."""
    for kind, data in sockdiag.attributes(route, tun.RTMSG.size):
        if kind == tun.RTA_OIF:
            return int.from_bytes(data, "little"), True
    return 0, False
