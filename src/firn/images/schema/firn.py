"""firn's own additions to the images: what it saves and CRIU has no field for.

They sit in field numbers from 1000 of CRIU's messages, which CRIU skips as unknown, so an image stays readable by both.
Nothing outside this module is firn's own. The syntax is described in :mod:`firn.images.schema`; what is added to a
message of CRIU's is optional, because images that CRIU wrote have none of it.
"""

from __future__ import annotations

EXTENSIONS = {
    "inventory_entry": "1000 firn firn_inventory?",
    "thread_core_entry": "1000 firn firn_thread?",
    "task_core_entry": "1000 firn firn_task?",
    "mm_entry": "1000 firn firn_mm?",
    "vma_entry": "1000 firn firn_vma?",
    "ghost_file_entry": "1000 firn firn_ghost?",
    "ipc_shm_entry": "1000 firn firn_segment?",
    "eventpoll_file_entry": "1000 firn firn_epoll?",
    "eventpoll_tfd_entry": "1000 firn firn_target?",
    "timerfd_entry": "1000 firn firn_timerfd?",
    "inet_sk_entry": "1000 firn firn_inet?",
    "netlink_sk_entry": "1000 firn firn_netlink?",
    "packet_sock_entry": "1000 firn firn_packet?",
    "sk_opts_entry": "1000 firn firn_sk_opts?",
    "sk_packet_entry": "1000 firn firn_sk_packet?",
    "unix_sk_entry": "1000 firn firn_unix?",
    "inotify_file_entry": "1000 firn firn_watcher?",
    "fanotify_file_entry": "1000 firn firn_watcher?",
    "pipe_data_entry": "1000 firn firn_pipe?",
    "tty_info_entry": "1000 firn firn_tty?",
    "tunfile_entry": "1000 firn firn_tun?",
    "reg_file_entry": "1000 firn firn_reg?",
}
"""Fields that are added to CRIU's messages."""

MESSAGES = {
    "firn_inventory": """
        1 cow_known bool?
        2 images str*
        3 session_keyring firn_keyring?
    """,
    "firn_keyring": """
        1 name str
        2 number i32?
        3 uid u32?
        4 gid u32?
        5 rights u32?
        6 keys firn_key*
    """,
    "firn_key": """
        1 name str
        2 uid u32?
        3 gid u32?
        4 rights u32?
        5 payload bytes?
    """,
    "firn_thread": """
        1 affinity bytes?
        2 timer_slack_ns u64?
        3 ioprio u32?
        4 restart firn_restart?
        5 sched_flags u64?
        6 sched_runtime u64?
        7 sched_deadline u64?
        8 sched_period u64?
        9 xsave bytes?
        10 numa_mode u32?
        11 numa_nodes bytes?
        12 speculation u32*
        13 util_min u32?
        14 util_max u32?
        15 switches u32?
        16 directories firn_directories?
    """,
    "firn_directories": """
        1 number u32
        2 fs fs_entry
    """,
    "firn_restart": """
        1 nr u32
        2 remaining_ns u64
        3 exact bool?
    """,
    "firn_task": """
        1 personality u32? hex
        2 coredump_filter u32? hex
        3 mdwe u32? hex
        4 io_flusher bool?
        5 mce_kill u32?
        6 ksm_merge bool?
        7 tsc u32?
        8 thp_flags u32?
        20 exit_signal u32?
        21 stop_told bool?
        22 leader_exited bool?
        23 leader_mask u64? hex
        24 continued bool?
        25 amx bool?
        26 no_cpuid bool?
        27 session_nice i32?
    """,
    "firn_mm": """
        1 lock_future u32? hex
        2 pkeys u32? hex
    """,
    "firn_vma": """
        1 sealed bool?
        2 anon_name str?
        3 account bool?
        4 pkey u32?
        5 numa_mode u32?
        6 numa_nodes bytes?
        7 locked u32?
    """,
    "firn_ghost": """
        1 atime_ns i64?
        2 mtime_ns i64?
        3 xattrs firn_xattr*
    """,
    "firn_xattr": """
        1 name str
        2 value bytes
    """,
    "firn_segment": """
        1 boot str?
        2 outside bool?
    """,
    "firn_timerfd": """
        1 deadline_ns u64?
    """,
    "firn_epoll": """
        1 params bytes?
    """,
    "firn_target": """
        1 type u32
        2 file u32
        3 number u32
    """,
    "firn_inet": """
        1 options firn_option*
        2 groups firn_group*
        3 datagrams firn_datagram*
        4 unread bytes?
        5 refused bool?
        6 clamp u32?
        7 devices firn_device*
        8 ssthresh u32?
        9 clients firn_client*
    """,
    "firn_client": """
        1 state u32? dict:sk
        2 src_addr u32* ipadd
        3 src_port u32?
        4 dst_addr u32* ipadd
        5 dst_port u32?
        6 stream tcp_stream_entry?
        7 data bytes?
        8 rcvbuf u32?
        9 urgent u32?
    """,
    "firn_netlink": """
        1 groups bytes?
        2 options firn_option*
    """,
    "firn_packet": """
        1 options firn_option*
        2 devices firn_device*
        3 rx_place u32?
        4 tx_place u32?
        5 stretches firn_stretch*
    """,
    "firn_stretch": """
        1 offset u64?
        2 data bytes?
    """,
    "firn_device": """
        1 index u32
        2 name str
    """,
    "firn_sk_opts": """
        1 options firn_option*
        2 uid u32?
        3 gid u32?
    """,
    "firn_sk_packet": """
        1 credentials firn_identity?
        2 sender bytes?
        3 nameless bool?
        4 mark u32?
    """,
    "firn_unix": """
        1 peer firn_identity?
        2 connector firn_identity?
        3 lost firn_unix_lost?
        4 reset bool?
        5 sent firn_unix_message*
        6 gone firn_unix_client*
    """,
    "firn_unix_lost": """
        1 name bytes?
        2 left bool?
    """,
    "firn_unix_message": """
        1 data bytes?
        2 rights u32*
        3 about firn_sk_packet?
    """,
    "firn_unix_client": """
        1 place u32?
        2 name bytes?
        3 connector firn_identity?
        4 sent firn_unix_message*
    """,
    "firn_identity": """
        1 pid u32
        2 uid u32
        3 gid u32
        4 groups bytes?
    """,
    "firn_pipe": """
        1 outside str?
        2 pages u32*
    """,
    "firn_reg": """
        1 rdev u64?
        2 kmsg u64?
        3 boot str?
    """,
    "firn_watcher": """
        1 overflow bool?
    """,
    "firn_tun": """
        1 flags u32? hex
        2 index u32?
        3 state u32? hex
        4 carrier bool?
        5 alias str?
        6 bridge str?
        7 link u32?
        8 mac bytes?
        9 mtu u32?
        10 queue u32?
        11 owner u32?
        12 group u32?
        13 sndbuf u32?
        14 header u32?
        15 little_endian bool?
        16 offload u32? hex
        17 addresses bytes*
        18 routes bytes*
    """,
    "firn_tty": """
        1 stopped u32?
    """,
    "firn_option": """
        1 level u32
        2 number u32
        3 value bytes
    """,
    "firn_group": """
        1 interface str?
        2 group bytes?
        3 mode u32?
        4 sources bytes*
    """,
    "firn_datagram": """
        1 source bytes
        2 port u32
        3 destination bytes
        4 data bytes
        5 hops u32?
        6 kind u32?
    """,
}

ENUMS: dict[str, str] = {}
