"""What belongs to no task: the processor, security policies, statistics, the image streamer, options.

The syntax is described in :mod:`firn.images.schema`. Source: CRIU's image format, version 4.2.
"""

from __future__ import annotations

MESSAGES = {
    "cpuinfo_x86_entry": """
        1 vendor_id enum:cpuinfo_x86_entry.vendor
        2 cpu_family u32
        3 model u32
        4 stepping u32
        5 capability_ver u32
        6 capability u32*
        7 model_id str?
        8 xfeatures_mask u64?
        9 xsave_size u32?
        10 xsave_size_max u32?
    """,
    "cpuinfo_ppc64_entry": """
        1 endian enum:cpuinfo_ppc64_entry.endianness
        2 hwcap u64*
    """,
    "cpuinfo_s390_entry": """
        2 hwcap u64*
    """,
    "cpuinfo_entry": """
        1 x86_entry cpuinfo_x86_entry*
        2 ppc64_entry cpuinfo_ppc64_entry*
        3 s390_entry cpuinfo_s390_entry*
    """,
    "aa_policy": """
        1 name str
        2 blob bytes
    """,
    "aa_namespace": """
        1 name str
        2 policies aa_policy*
        3 namespaces aa_namespace*
    """,
    "apparmor_entry": """
        1 namespaces aa_namespace*
    """,
    "dump_stats_entry": """
        1 freezing_time u32
        2 frozen_time u32
        3 memdump_time u32
        4 memwrite_time u32
        5 pages_scanned u64
        6 pages_skipped_parent u64
        7 pages_written u64
        8 irmap_resolve u32?
        9 pages_lazy u64
        10 page_pipes u64?
        11 page_pipe_bufs u64?
        12 shpages_scanned u64?
        13 shpages_skipped_parent u64?
        14 shpages_written u64?
    """,
    "restore_stats_entry": """
        1 pages_compared u64
        2 pages_skipped_cow u64
        3 forking_time u32
        4 restore_time u32
        5 pages_restored u64?
    """,
    "stats_entry": """
        1 dump dump_stats_entry?
        2 restore restore_stats_entry?
    """,
    "img_streamer_request_entry": """
        1 filename str
    """,
    "img_streamer_reply_entry": """
        1 exists bool
    """,
    "CRIU_Opts": """
        1 hex bool?
        2 ipadd bool?
        3 flags str?
        4 dev bool?
        5 odev bool?
        6 dict str?
        7 conv str?
    """,
}

ENUMS = {
    "cpuinfo_x86_entry.vendor": "UNKNOWN 0, INTEL 1, AMD 2",
    "cpuinfo_ppc64_entry.endianness": "BIGENDIAN 0, LITTLEENDIAN 1",
}
