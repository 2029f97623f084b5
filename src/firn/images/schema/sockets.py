"""Sockets: their state, options, queues and TCP connections.

The syntax is described in :mod:`firn.images.schema`. Source: CRIU's image format, version 4.2.
"""

from __future__ import annotations

MESSAGES = {
    "sk_opts_entry": """
        1 so_sndbuf u32
        2 so_rcvbuf u32
        3 so_snd_tmo_sec u64
        4 so_snd_tmo_usec u64
        5 so_rcv_tmo_sec u64
        6 so_rcv_tmo_usec u64
        7 reuseaddr bool?
        8 so_priority u32?
        9 so_rcvlowat u32?
        10 so_mark u32?
        11 so_passcred bool?
        12 so_passsec bool?
        13 so_dontroute bool?
        14 so_no_check bool?
        15 so_bound_dev str?
        16 so_filter f64*
        17 so_reuseport bool?
        18 so_broadcast bool?
        19 so_keepalive bool?
        20 tcp_keepcnt u32?
        21 tcp_keepidle u32?
        22 tcp_keepintvl u32?
        23 so_oobinline u32?
        24 so_linger u32?
        25 so_buf_lock u32?
    """,
    "file_perms_entry": """
        1 mode u32
        2 uid u32
        3 gid u32
    """,
    "unix_sk_entry": """
        1 id u32
        2 ino u32
        3 type u32 dict:sk
        4 state u32 dict:sk
        5 flags u32 hex
        6 uflags u32 hex
        7 backlog u32
        8 peer u32
        9 fown fown_entry
        10 opts sk_opts_entry
        11 name bytes conv:unix_name
        12 shutdown enum:sk_shutdown?
        13 file_perms file_perms_entry?
        14 name_dir str?
        15 deleted bool?
        16 ns_id u32?
        17 mnt_id s32? default:-1
    """,
    "ip_opts_raw_entry": """
        1 hdrincl bool?
        2 nodefrag bool?
        3 checksum bool?
        4 icmpv_filter u32*
    """,
    "ip_opts_entry": """
        1 freebind bool?
        4 raw ip_opts_raw_entry?
        5 pktinfo bool?
        6 tos u32?
        7 ttl u32?
    """,
    "inet_sk_entry": """
        1 id u32
        2 ino u32
        3 family u32 dict:sk
        4 type u32 dict:sk
        5 proto u32 dict:sk
        6 state u32 dict:sk
        7 src_port u32
        8 dst_port u32
        9 flags u32 hex
        10 backlog u32
        11 src_addr u32* ipadd
        12 dst_addr u32* ipadd
        13 fown fown_entry
        14 opts sk_opts_entry
        15 v6only bool?
        16 ip_opts ip_opts_entry?
        17 ifname str?
        18 ns_id u32?
        19 shutdown enum:sk_shutdown?
        20 tcp_opts tcp_opts_entry?
    """,
    "netlink_sk_entry": """
        1 id u32
        2 ino u32
        3 protocol u32
        4 state u32
        6 flags u32 hex
        7 portid u32
        8 groups u32*
        9 dst_portid u32
        10 dst_group u32
        11 fown fown_entry
        12 opts sk_opts_entry
        13 ns_id u32?
    """,
    "scm_entry": """
        1 type u32
        2 rights u32*
    """,
    "sk_packet_entry": """
        1 id_for u32
        2 length u32
        4 scm scm_entry*
    """,
    "packet_mclist": """
        1 index u32
        2 type u32
        3 addr bytes
    """,
    "packet_ring": """
        1 block_size u32
        2 block_nr u32
        3 frame_size u32
        4 frame_nr u32
        5 retire_tmo u32
        6 sizeof_priv u32
        7 features u32
    """,
    "packet_sock_entry": """
        1 id u32
        2 type u32
        3 protocol u32
        4 flags u32 hex
        5 ifindex u32
        6 fown fown_entry
        7 opts sk_opts_entry
        8 version u32
        9 reserve u32
        10 aux_data bool
        11 orig_dev bool
        12 vnet_hdr bool
        13 loss bool
        14 timestamp u32
        15 copy_thresh u32
        16 mclist packet_mclist*
        17 fanout u32? default:4294967295
        18 rx_ring packet_ring?
        19 tx_ring packet_ring?
        20 ns_id u32?
    """,
    "tcp_opts_entry": """
        1 cork bool?
        2 nodelay bool?
        3 keepcnt u32?
        4 keepidle u32?
        5 keepintvl u32?
    """,
    "tcp_stream_entry": """
        1 inq_len u32
        2 inq_seq u32
        3 outq_len u32
        4 outq_seq u32
        5 opt_mask u32 hex
        6 snd_wscale u32
        7 mss_clamp u32
        8 rcv_wscale u32?
        9 timestamp u32?
        10 cork bool?
        11 nodelay bool?
        12 unsq_len u32?
        13 snd_wl1 u32?
        14 snd_wnd u32?
        15 max_window u32?
        16 rcv_wnd u32?
        17 rcv_wup u32?
    """,
}

ENUMS = {
    "sk_shutdown": "NONE 0, READ 1, WRITE 2, BOTH 3",
}
