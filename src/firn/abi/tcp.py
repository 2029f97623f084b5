"""TCP from the inside: states, repair mode, what TCP_INFO says (linux/tcp.h, net/tcp_states.h, linux/sockios.h)."""

from __future__ import annotations

import struct

(TCP_ESTABLISHED, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT,
 TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING) = range(1, 12)  # fmt: skip
"""enum tcp_states (net/tcp_states.h), also in linux/bpf.h."""

TCP_MAXSEG, TCP_DEFER_ACCEPT, TCP_WINDOW_CLAMP, TCP_INFO, TCP_QUICKACK = 2, 9, 10, 11, 12
TCP_FASTOPEN, TCP_FASTOPEN_CONNECT = 23, 30
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
TCP_SAVED_SYN = 28
TCP_AO_INFO = 40  # linux/tcp.h, since Linux 6.7

TCP_REPAIR_ON, TCP_REPAIR_OFF, TCP_REPAIR_OFF_NO_WP = 1, 0, -1
TCP_NO_QUEUE, TCP_RECV_QUEUE, TCP_SEND_QUEUE = 0, 1, 2

TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK_PERM, TCPOPT_TIMESTAMP = 2, 3, 4, 8
"""net/tcp.h; RFC 9293, RFC 7323, RFC 2018."""
TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE, TCPI_OPT_ECN = 1, 2, 4, 8
TCP_MAX_WSCALE = 14

INFO = struct.Struct("<B4xBB17xII")
"""Start of struct tcp_info: state, options, window scales (ours to read the peer's in the lower four bits); of a
listening socket, how many connections wait to be accepted, and how many may."""
INFO_SSTHRESH = 64
"""Where struct tcp_info has the window's limit of the moment (tcpi_rcv_ssthresh)."""
INFO_DELIVERED = 192
"""Where struct tcp_info has the number of segments that arrived at the peer, since Linux 4.18. The SYN is one."""
REPAIR_OPT = struct.Struct("<II")
"""struct tcp_repair_opt: which option, its value."""
WINDOW = struct.Struct("<5I")
"""struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup."""

SIOCINQ, SIOCOUTQ, SIOCOUTQNSD = 0x541B, 0x5411, 0x894B
"""tcp(7): bytes not read, not acknowledged, not sent; the latter two count a FIN."""

TH_FIN, TH_RST, TH_PUSH, TH_ACK, TH_URG = 1, 4, 8, 16, 32
"""RFC 9293, section 3.1."""
