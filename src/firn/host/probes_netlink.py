"""One question by netlink(7), for the probes: errors as :class:`OSError`, and patience if the kernel says nothing."""

from __future__ import annotations

import os
import socket
import struct

from firn.abi import nftables as nf
from firn.abi import probe_consts as pc
from firn.host.netlink import messages


def talk(protocol: int, what: str, *requests: bytes, answers: int = 1) -> list[bytes]:
    """Send *requests* together, and collect the payloads of the reply until *answers* acknowledgements have come.

    A dump's end and a reply without NLM_F_ACK count as one. Raises :class:`OSError` (*what* leads its text) for an
    error that the kernel reports, and if it says nothing for three seconds.
    """
    found: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as channel:
        channel.settimeout(3)
        channel.bind((0, 0))
        channel.send(b"".join(requests))
        while answers:
            for kind, flags, _, payload in messages(channel.recv(1 << 17)):
                if kind in (nf.NLMSG_ERROR, nf.NLMSG_DONE):
                    code = -struct.unpack_from("<i", payload)[0] if payload else 0
                    if code:
                        raise OSError(code, f"{what}: {os.strerror(code)}")
                    answers -= 1
                else:
                    found.append(payload)
                    if not flags & pc.NLM_F_MULTI:
                        answers -= 1
    return found
