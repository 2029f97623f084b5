"""tun and tap devices, and what a network device can be told. Source: include/uapi/linux/if_tun.h, if.h, sockios.h,
ethtool.h, rtnetlink.h."""

from __future__ import annotations

import struct

TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOWNER = 0x400454CC
TUNSETLINK = 0x400454CD
TUNSETGROUP = 0x400454CE
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNGETSNDBUF, TUNSETSNDBUF = 0x800454D3, 0x400454D4
TUNGETVNETHDRSZ, TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
TUNSETQUEUE = 0x400454D9
TUNSETIFINDEX = 0x400454DA
TUNGETFILTER = 0x801054DB
TUNGETVNETLE, TUNSETVNETLE = 0x800454DD, 0x400454DC
TUNSETCARRIER = 0x400454E2
TUNGETDEVNETNS = 0x54E3
IFF_MULTI_QUEUE, IFF_DETACH_QUEUE, IFF_PERSIST = 0x100, 0x400, 0x800
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO = 1, 2, 4, 8, 0x60
"""The last is TUN_F_USO4 | TUN_F_USO6: neither goes without the other."""

IFREQ_NUMBER = struct.Struct("<16si20x")
"""struct ifreq with a name and a number: index, MTU, length of the transmit queue."""
IFREQ_FLAGS = struct.Struct("<16sH22x")
IFREQ_ADDRESS = struct.Struct("<16sH14s8x")
"""... with a struct sockaddr."""
IFREQ_POINTER = struct.Struct("<16sQ16x")
SIOCSIFFLAGS, SIOCSIFMTU, SIOCSIFHWADDR, SIOCSIFTXQLEN = 0x8914, 0x8922, 0x8924, 0x8943
SIOCETHTOOL, SIOCBRADDIF = 0x8946, 0x89A2
IFF_SETTABLE = 1 | 0x4 | 0x20 | 0x80 | 0x100 | 0x200 | 0x1000 | 0x2000 | 0x4000
"""UP, DEBUG, NOTRAILERS, NOARP, PROMISC, ALLMULTI, MULTICAST, PORTSEL, AUTOMEDIA."""

ETHTOOL_GSTRINGS, ETHTOOL_GSSET_INFO, ETHTOOL_GFEATURES, ETH_SS_FEATURES, ETH_GSTRING_LEN = 0x1B, 0x37, 0x3A, 4, 32
FEATURES_BLOCK = struct.Struct("<IIII")
"""struct ethtool_get_features_block: available, requested, active, never_changed."""

NETLINK_ROUTE = 0
RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 20, 22, 24, 26
NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 4, 0x200, 0x400
IFADDRMSG = struct.Struct("<BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index."""
RTMSG = struct.Struct("<BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type, flags."""
RTA_OIF, RTPROT_KERNEL, RT_TABLE_LOCAL, RTM_F_CLONED = 4, 2, 255, 0x200
"""The attribute with the index of the outgoing device; who made a route; the table of local ones; a cached one."""
