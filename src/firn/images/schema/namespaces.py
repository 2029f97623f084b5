"""Namespaces and what lives in them: hosts, users, clocks, IPC, mounts, network, control groups.

The syntax is described in :mod:`firn.images.schema`. Source: CRIU's image format, version 4.2.
"""

from __future__ import annotations

MESSAGES = {
    "utsns_entry": """
        1 nodename str
        2 domainname str
    """,
    "pidns_entry": """
        1 ext_key str?
    """,
    "uid_gid_extent": """
        1 first u32
        2 lower_first u32
        3 count u32
    """,
    "userns_entry": """
        1 uid_map uid_gid_extent*
        2 gid_map uid_gid_extent*
    """,
    "timespec": """
        1 tv_sec u64
        2 tv_nsec u64
    """,
    "timens_entry": """
        1 monotonic timespec
        2 boottime timespec
    """,
    "ipc_desc_entry": """
        1 key u32
        2 uid u32
        3 gid u32
        4 cuid u32
        5 cgid u32
        6 mode u32
        7 id u32
    """,
    "ipc_var_entry": """
        1 sem_ctls u32*
        2 msg_ctlmax u32
        3 msg_ctlmnb u32
        4 msg_ctlmni u32
        5 auto_msgmni u32
        6 shm_ctlmax u64
        7 shm_ctlall u64
        8 shm_ctlmni u32
        9 shm_rmid_forced u32
        10 mq_queues_max u32
        11 mq_msg_max u32
        12 mq_msgsize_max u32
        13 mq_msg_default u32?
        14 mq_msgsize_default u32?
        15 msg_next_id u32?
        16 sem_next_id u32?
        17 shm_next_id u32?
    """,
    "ipc_shm_entry": """
        1 desc ipc_desc_entry
        2 size u64
        3 in_pagemaps bool?
        4 hugetlb_flag u32?
    """,
    "ipc_msg": """
        1 mtype u64
        2 msize u32
    """,
    "ipc_msg_entry": """
        1 desc ipc_desc_entry
        2 qbytes u32
        3 qnum u32
    """,
    "ipc_sem_entry": """
        1 desc ipc_desc_entry
        2 nsems u32
    """,
    "mnt_entry": """
        1 fstype u32
        2 mnt_id u32
        3 root_dev u32 dev
        4 parent_mnt_id u32
        5 flags u32 hex
        6 root str
        7 mountpoint str
        8 source str
        9 options str
        10 shared_id u32?
        11 master_id u32?
        12 with_plugin bool?
        13 ext_mount bool?
        14 fsname str?
        15 internal_sharing bool?
        16 deleted bool?
        17 sb_flags u32? hex
        18 ext_key str?
    """,
    "autofs_entry": """
        1 fd i32
        2 pgrp i32
        3 timeout i32
        4 minproto i32
        5 maxproto i32
        6 mode i32
        7 uid i32?
        8 gid i32?
        9 read_fd i32?
    """,
    "binfmt_misc_entry": """
        1 name str
        2 enabled bool
        3 interpreter str
        4 flags str?
        5 extension str?
        6 magic str?
        7 mask str?
        8 offset i32?
    """,
    "net_device_entry": """
        1 type enum:nd_type
        2 ifindex u32
        3 mtu u32
        4 flags u32 hex
        5 name str
        6 tun tun_link_entry?
        7 address bytes?
        8 conf i32*
        9 conf4 sysctl_entry*
        10 conf6 sysctl_entry*
        11 macvlan macvlan_link_entry?
        12 peer_ifindex u32?
        13 peer_nsid u32?
        14 master u32?
        15 sit sit_entry?
    """,
    "netns_id": """
        1 target_ns_id u32
        2 netnsid_value i32
    """,
    "netns_entry": """
        1 def_conf i32*
        2 all_conf i32*
        3 def_conf4 sysctl_entry*
        4 all_conf4 sysctl_entry*
        5 def_conf6 sysctl_entry*
        6 all_conf6 sysctl_entry*
        7 nsids netns_id*
        8 ext_key str?
        9 unix_conf sysctl_entry*
        10 ipv4_sysctl sysctl_entry*
    """,
    "macvlan_link_entry": """
        1 mode u32
        2 flags u32?
    """,
    "sit_entry": """
        1 link u32?
        2 local u32* ipadd
        3 remote u32* ipadd
        4 ttl u32?
        5 tos u32?
        6 pmtudisc bool?
        7 proto u32?
        8 flags u32?
        9 encap_type u32?
        10 encap_flags u32?
        11 encap_sport u32?
        12 encap_dport u32?
        13 rd_prefixlen u32?
        14 rd_prefix u32* ipadd
        15 relay_prefixlen u32?
        16 relay_prefix u32* ipadd
    """,
    "sysctl_entry": """
        1 type enum:SysctlType
        2 iarg i32?
        3 sarg str?
    """,
    "cgroup_perms": """
        1 mode u32
        2 uid u32
        3 gid u32
    """,
    "cgroup_prop_entry": """
        1 name str
        2 value str
        3 perms cgroup_perms?
    """,
    "cgroup_dir_entry": """
        1 dir_name str
        2 children cgroup_dir_entry*
        3 properties cgroup_prop_entry*
        4 dir_perms cgroup_perms?
    """,
    "cg_controller_entry": """
        1 cnames str*
        2 dirs cgroup_dir_entry*
        3 is_threaded bool?
    """,
    "cg_member_entry": """
        1 name str
        2 path str
        3 cgns_prefix u32?
    """,
    "cg_set_entry": """
        1 id u32
        2 ctls cg_member_entry*
    """,
    "cgroup_entry": """
        1 sets cg_set_entry*
        2 controllers cg_controller_entry*
    """,
}

ENUMS = {
    "fstype": (
        "UNSUPPORTED 0, PROC 1, SYSFS 2, DEVTMPFS 3, BINFMT_MISC 4, TMPFS 5, DEVPTS 6, SIMFS 7, PSTORE 8, "
        "SECURITYFS 9, FUSECTL 10, DEBUGFS 11, CGROUP 12, AUFS 13, MQUEUE 14, FUSE 15, AUTO 16, "
        "OVERLAYFS 17, AUTOFS 18, TRACEFS 19, CGROUP2 23"
    ),
    "nd_type": "LOOPBACK 1, VETH 2, TUN 3, EXTLINK 4, VENET 5, BRIDGE 6, MACVLAN 7, SIT 8",
    "SysctlType": "CTL_STR 5, CTL_32 6",
}
