"""Names of the kinds of sockets that firn does not save, for people. Sources: linux/socket.h, linux/in.h."""

from __future__ import annotations

import _socket

_FAMILIES = {
    3: "an AX.25", 4: "an IPX", 5: "an AppleTalk", 8: "an ATM", 9: "an X.25", 15: "a key management (PF_KEY)",
    19: "an Econet", 21: "an RDS", 23: "an IrDA", 24: "a PPP", 26: "an LLC", 27: "an InfiniBand", 28: "an MPLS",
    29: "a CAN", 30: "a TIPC", 31: "a Bluetooth", 33: "an RxRPC", 35: "a Phonet", 36: "an IEEE 802.15.4", 37: "a CAIF",
    38: "a kernel crypto (AF_ALG)", 39: "an NFC", 40: "a vsock", 41: "a KCM", 42: "a Qualcomm IPC router", 43: "an SMC",
    44: "an XDP", 45: "an MCTP",
}  # fmt: skip
_PROTOCOLS = {33: "a DCCP", 132: "an SCTP", 136: "a UDP-Lite", 256: "an SMC", 262: "an MPTCP"}
_HELP = {38: "close it before the dump: it can be opened again at any time", 262: "use plain TCP (IPPROTO_TCP)"}
_INTERNET = (2, 10)


def why_refused(fd: int) -> tuple[str, str]:
    """(reason, help) why the socket *fd* cannot be saved."""
    # Not every family answers getsockname(2), so the family is given; it does not matter for getsockopt(2).
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    try:
        family, kind, protocol = (
            sock.getsockopt(_socket.SOL_SOCKET, option)
            for option in (_socket.SO_DOMAIN, _socket.SO_TYPE, _socket.SO_PROTOCOL)
        )
    finally:
        sock.detach()
    if family in _INTERNET:
        name = _PROTOCOLS.get(protocol, f"an internet socket of type {kind} and protocol {protocol}, a")
        key = protocol
    else:
        name, key = _FAMILIES.get(family, f"an unknown (address family {family})"), family
    return f"is {name} socket, which is not supported", _HELP.get(key, "close it before the dump")
