"""Open files: descriptors, the file table, what it refers to, and file contents.

The syntax is described in :mod:`firn.images.schema`. Source: CRIU's image format, version 4.2.
"""

from __future__ import annotations

MESSAGES = {
    "fdinfo_entry": """
        1 id u32
        2 flags u32
        3 type enum:fd_types
        4 fd u32
        5 xattr_security_selinux str?
    """,
    "file_entry": """
        1 type enum:fd_types
        2 id u32
        3 reg reg_file_entry?
        4 isk inet_sk_entry?
        5 nsf ns_file_entry?
        6 psk packet_sock_entry?
        7 nlsk netlink_sk_entry?
        8 efd eventfd_file_entry?
        9 epfd eventpoll_file_entry?
        10 sgfd signalfd_entry?
        11 tunf tunfile_entry?
        12 tfd timerfd_entry?
        13 ify inotify_file_entry?
        14 ffy fanotify_file_entry?
        15 ext ext_file_entry?
        16 usk unix_sk_entry?
        17 fifo fifo_entry?
        18 pipe pipe_entry?
        19 tty tty_file_entry?
        20 memfd memfd_file_entry?
        21 bpf bpfmap_file_entry?
        22 pidfd pidfd_entry?
    """,
    "reg_file_entry": """
        1 id u32
        2 flags u32 flags:rfile.flags
        3 pos u64
        5 fown fown_entry
        6 name str
        7 mnt_id s32? default:-1
        8 size u64?
        9 ext bool?
        10 mode u32?
        11 build_id u32*
        12 checksum u32?
        13 checksum_config u32?
        14 checksum_parameter u32?
    """,
    "fown_entry": """
        1 uid u32
        2 euid u32
        3 signum u32
        4 pid_type u32
        5 pid u32
    """,
    "ext_file_entry": """
        1 id u32
        5 fown fown_entry
    """,
    "ns_file_entry": """
        1 id u32
        2 ns_id u32
        3 ns_cflag u32
        4 flags u32
    """,
    "eventfd_file_entry": """
        1 id u32
        2 flags u32
        3 fown fown_entry
        4 counter u64
    """,
    "eventpoll_tfd_entry": """
        1 id u32
        2 tfd u32
        3 events u32
        4 data u64
        5 dev u32?
        6 inode u64?
        7 pos u64?
    """,
    "eventpoll_file_entry": """
        1 id u32
        2 flags u32
        3 fown fown_entry
        4 tfd eventpoll_tfd_entry*
    """,
    "signalfd_entry": """
        1 id u32
        2 flags u32 hex
        3 fown fown_entry
        4 sigmask u64 hex
    """,
    "timerfd_entry": """
        1 id u32
        2 flags u32 hex
        3 fown fown_entry
        4 clockid u32
        5 ticks u64
        6 settime_flags u32 hex
        7 vsec u64
        8 vnsec u64
        9 isec u64
        10 insec u64
    """,
    "pidfd_entry": """
        1 id u32
        2 ino u32
        3 flags u32
        4 nspid i32
        5 fown fown_entry
    """,
    "fh_entry": """
        1 bytes u32
        2 type u32
        3 handle u64*
        4 path str?
        5 mnt_id u32?
    """,
    "irmap_cache_entry": """
        1 dev u32 dev odev
        2 inode u64
        3 path str
    """,
    "inotify_wd_entry": """
        1 id u32
        2 i_ino u64
        3 mask u32 hex
        4 ignored_mask u32 hex
        5 s_dev u32 dev
        6 wd u32
        7 f_handle fh_entry
    """,
    "inotify_file_entry": """
        1 id u32
        2 flags u32 hex
        4 fown fown_entry
        5 wd inotify_wd_entry*
    """,
    "fanotify_inode_mark_entry": """
        1 i_ino u64
        2 f_handle fh_entry
    """,
    "fanotify_mount_mark_entry": """
        1 mnt_id u32
        2 path str?
    """,
    "fanotify_mark_entry": """
        1 id u32
        2 type enum:mark_type
        3 mflags u32 hex
        4 mask u32 hex
        5 ignored_mask u32 hex
        6 s_dev u32 dev
        7 ie fanotify_inode_mark_entry?
        8 me fanotify_mount_mark_entry?
    """,
    "fanotify_file_entry": """
        1 id u32
        2 flags u32 hex
        3 fown fown_entry
        4 faflags u32 hex
        5 evflags u32 hex
        6 mark fanotify_mark_entry*
    """,
    "fifo_entry": """
        1 id u32
        2 pipe_id u32
        3 regf_id u32?
    """,
    "pipe_entry": """
        1 id u32
        2 pipe_id u32
        3 flags u32 hex
        4 fown fown_entry
    """,
    "pipe_data_entry": """
        1 pipe_id u32
        2 bytes u32
        3 size u32?
    """,
    "ghost_file_entry": """
        1 uid u32
        2 gid u32
        3 mode u32
        4 dev u32? dev
        5 ino u64?
        6 rdev u32? dev odev
        7 atim timeval?
        8 mtim timeval?
        9 chunks bool?
        10 size u64?
        11 symlnk_target str?
    """,
    "ghost_chunk_entry": """
        1 len u64
        2 off u64
    """,
    "remap_file_path_entry": """
        1 orig_id u32
        2 remap_id u32
        3 remap_type enum:remap_type?
    """,
    "memfd_file_entry": """
        1 id u32
        2 flags u32 flags:rfile.flags
        3 pos u64
        4 fown fown_entry
        5 inode_id u32
    """,
    "memfd_inode_entry": """
        1 name str
        2 uid u32
        3 gid u32
        4 size u64
        5 shmid u32
        6 seals u32 flags:seals.flags
        7 inode_id u64
        8 hugetlb_flag u32?
        9 mode u32?
    """,
    "file_lock_entry": """
        1 flag u32
        2 type u32
        3 pid i32
        4 fd i32
        5 start i64
        6 len i64
    """,
    "winsize_entry": """
        1 ws_row u32
        2 ws_col u32
        3 ws_xpixel u32
        4 ws_ypixel u32
    """,
    "termios_entry": """
        1 c_iflag u32
        2 c_oflag u32
        3 c_cflag u32
        4 c_lflag u32
        5 c_line u32
        6 c_ispeed u32
        7 c_ospeed u32
        8 c_cc u32*
    """,
    "tty_pty_entry": """
        1 index u32
    """,
    "tty_data_entry": """
        1 tty_id u32
        2 data bytes
    """,
    "tty_info_entry": """
        1 id u32
        2 type enum:TtyType
        3 locked bool
        4 exclusive bool
        5 packet_mode bool
        6 sid u32
        7 pgrp u32
        8 rdev u32
        9 termios termios_entry?
        10 termios_locked termios_entry?
        11 winsize winsize_entry?
        12 pty tty_pty_entry?
        13 dev u32?
        14 uid u32?
        15 gid u32?
    """,
    "tty_file_entry": """
        1 id u32
        2 tty_info_id u32
        3 flags u32 hex
        4 fown fown_entry
        6 regf_id u32?
    """,
    "bpfmap_file_entry": """
        1 id u32
        2 flags u32 flags:rfile.flags
        3 pos u64
        4 fown fown_entry
        5 map_type u32
        6 key_size u32
        7 value_size u32
        8 map_id u32
        9 max_entries u32
        10 map_flags u32
        11 memlock u64
        12 frozen bool default:0
        13 map_name str
        14 ifindex u32 default:0
        15 mnt_id s32? default:-1
        16 map_extra u64?
    """,
    "bpfmap_data_entry": """
        1 map_id u32
        2 keys_bytes u32
        3 values_bytes u32
        4 count u32
    """,
    "tunfile_entry": """
        1 id u32
        2 netdev str?
        3 detached bool?
        4 ns_id u32?
    """,
    "tun_link_entry": """
        1 flags u32 hex
        2 owner i32
        3 group i32
        4 vnethdr u32
        5 sndbuf u32
    """,
}

ENUMS = {
    "fd_types": (
        "UND 0, REG 1, PIPE 2, FIFO 3, INETSK 4, UNIXSK 5, EVENTFD 6, EVENTPOLL 7, INOTIFY 8, SIGNALFD 9, "
        "PACKETSK 10, TTY 11, FANOTIFY 12, NETLINKSK 13, NS 14, TUNF 15, EXT 16, TIMERFD 17, MEMFD 18, "
        "BPFMAP 19, PIDFD 20, CTL_TTY 65534, AUTOFS_PIPE 65535"
    ),
    "fh_entry_sizes": "min_entries 16",
    "mark_type": "INODE 1, MOUNT 2",
    "remap_type": "LINKED 0, GHOST 1, PROCFS 2",
    "TtyType": "UNKNOWN 0, PTY 1, CONSOLE 2, VT 3, CTTY 4, EXT_TTY 5, SERIAL 6",
}
