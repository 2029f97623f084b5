"""What ``criu restore`` (4.2) insists on: the facts of its image format as a check of a folder of images.

CRIU itself is not needed: what it refuses, and what it dies of, is known from experiments. A restore of ours is more
tolerant, so only this check tells that firn's own images would do for CRIU as well.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firn.images.store import ImageDir, read_files
from firn.resources import base
from firn.resources.memory import areas

DEAD = 2
O_PATH = 0o10000000
NEVER_OPENED_WITH = 0o100 | 0o1000 | 0o2000000
"""O_CREAT, O_TRUNC, O_CLOEXEC: CRIU opens with what it finds."""
KNOWN_ADVICE = sum(1 << number for number in (1, 2, 10, 12, 14, 15, 16, 18))
CONNECTED = (1, 2, 4, 5, 8, 9, 11)
XSAVE_ELEMENTS = {"ymmh_space": 64, "bndreg_state": 8, "bndcsr_state": 8, "opmask_reg": 8, "zmm_upper": 64,
                  "hi16_zmm": 128, "pkru": 2}  # fmt: skip
NAMESPACES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup")
WORD = 1 << 64
MAP_ANONYMOUS = 0x20
EXTERNAL_SERVICE = 1
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
Entry = dict[str, Any]

BEYOND = (
    r"ids-\d+: shares its (vm|fs|sighand)",
    r"ids-\d+: shares descriptors with one who is not its parent",
    r"pagemap-\d+: the memory of another process",
    r"fdinfo-\d+: the epoll target 2147483647 is not open",
    r"core-\d+: scheduling policy 6",
    r"mm-\d+: [0-9a-f]+: System V memory without a namespace",
    r"files: nlsk \d+: more than 32 groups",
)
"""State that firn saves and CRIU has no way to; docs/support-matrix.md says what CRIU makes of it."""


def complaints(folder: Path) -> list[str]:
    """What CRIU 4.2 would stumble over in the images in *folder*, but for what is beyond it by design."""
    with ImageDir.open(str(folder)) as images:
        found = set(_Judge(images, folder).all())
    return sorted(text for text in found if not any(re.fullmatch(pattern, text) for pattern in BEYOND))


class _Judge:
    def __init__(self, images: ImageDir, folder: Path) -> None:
        self.images = images
        self.folder = folder
        self.inventory = images.read_one("INVENTORY")
        self.tree = images.read_all("PSTREE")
        leaders = {item["pid"]: images.read_one("CORE", item["pid"]) for item in self.tree}
        # What a zombie has for threads means nothing.
        self.living = [item for item in self.tree if leaders[item["pid"]]["tc"]["task_state"] != DEAD]
        self.cores = {tid: images.read_one("CORE", tid) for item in self.living for tid in item["threads"]}
        self.ids = {item["pid"]: images.read_one("IDS", item["pid"]) for item in self.living}
        self.mms = {item["pid"]: images.read_one("MM", item["pid"]) for item in self.living}
        self.tables = {
            ids["files_id"]: images.read_all("FDINFO", ids["files_id"]) for ids in self.ids.values()
        }
        self.files = read_files(images)
        self.packets = images.read_all("SK_QUEUES")
        self.memfds = {entry["inode_id"]: entry for entry in images.read_all("MEMFD_INODE")}

    def all(self) -> Iterator[str]:
        yield from self.tree_rules()
        for item in self.living:
            pid = item["pid"]
            yield from (f"ids-{pid}: {text}" for text in self.ids_rules(item))
            for tid in item["threads"]:
                yield from (f"core-{tid}: {text}" for text in self.core_rules(tid, tid == pid))
            yield from (f"mm-{pid}: {text}" for text in self.mm_rules(pid))
            yield from (f"pagemap-{pid}: {text}" for text in self.page_rules(pid))
        yield from self.table_rules()
        yield from self.file_rules()
        yield from self.remap_rules()
        yield from self.queue_rules()

    # ---- the tree

    def tree_rules(self) -> Iterator[str]:
        inventory = self.inventory
        if inventory["img_version"] != 2 or not inventory.get("fdinfo_per_id") or not inventory.get("ns_per_id"):
            yield "inventory: not of today's version"
        root = inventory["root_ids"]
        if inventory.get("plugins_entry", {}).get("plugins") or inventory.get("allow_uprobes"):
            yield "inventory: asks for plugins or uprobes"
        if not all(root[f"{kind}_id"] for kind in ("vm", "files", "fs", "sighand")):
            yield "inventory: an id of root_ids is 0"
        known: set[int] = set()
        for item in self.tree:
            pid = item["pid"]
            if item["ppid"] not in known and (known or item["ppid"]):
                yield f"pstree: {pid} comes before its parent"
            known.add(pid)
            if item in self.living and item["threads"][:1] != [pid]:
                yield f"pstree: the threads of {pid} do not begin with it"
        taken = Counter(tid for item in self.living for tid in item["threads"])
        if len(taken) != taken.total():
            yield "pstree: an id is there twice"
        if not self.images.exists("TIMENS", 0) and not any("time_ns_id" in ids for ids in self.ids.values()):
            yield "timens: no clocks"

    def ids_rules(self, item: Entry) -> Iterator[str]:
        ids, root = self.ids[item["pid"]], self.inventory["root_ids"]
        for kind in NAMESPACES:
            if ids.get(f"{kind}_ns_id") != root.get(f"{kind}_ns_id"):
                yield f"another {kind} namespace"
        if ids["files_id"] == root["files_id"]:
            yield "the descriptors are those of the dumping program"
        parent = self.ids.get(item["ppid"])
        sharers = [pid for pid, other in self.ids.items() if other["files_id"] == ids["files_id"]]
        if len(sharers) > 1 and item["pid"] != sharers[0] and (not parent or parent["files_id"] != ids["files_id"]):
            yield "shares descriptors with one who is not its parent"
        for kind in ("vm", "fs", "sighand"):
            if sum(other[f"{kind}_id"] == ids[f"{kind}_id"] for other in self.ids.values()) > 1:
                yield f"shares its {kind}"
        fs = self.images.read_one("FS", item["pid"])
        for name in ("cwd_id", "root_id"):
            if (base.REG, fs[name]) not in self.files:
                yield f"fs: {name} leads nowhere"

    # ---- threads

    def core_rules(self, tid: int, leader: bool) -> Iterator[str]:
        core = self.cores[tid]
        if core["mtype"] != 1 or "thread_core" not in core or "thread_info" not in core:
            yield "parts are missing"
            return
        if leader:
            yield from self.task_rules(core["tc"])
        elif "tc" in core or "ids" in core:
            yield "a thread has the parts of a process"
        thread, info = core["thread_core"], core["thread_info"]
        creds = thread.get("creds", {})
        for name in ("cap_inh", "cap_prm", "cap_eff", "cap_bnd", "cap_amb"):
            if len(creds.get(name, ())) != 2:
                yield f"creds: {name}"
        if "lsm_profile" in creds:
            yield "creds: a security label"
        if thread.get("sched_policy", 0) not in (0, 1, 2, 3, 5):
            yield f"scheduling policy {thread['sched_policy']}"
        if not leader and "blk_sigset" not in thread:
            yield "a thread without a mask"
        if len(thread.get("comm", "")) > 15:
            yield "a long name"
        yield from self.signal_rules(thread.get("signals_p", {}))
        yield from self.cgroup_rules(thread.get("cg_set"))
        yield from self.seccomp_rules(thread)
        yield from self.register_rules(info)

    def task_rules(self, task: Entry) -> Iterator[str]:
        if task["task_state"] not in (1, 3):
            yield f"task state {task['task_state']}"
        if len(task.get("sigactions", ())) != 62 or "timers" not in task or "rlimits" not in task:
            yield "signal actions, timers or limits are missing"
        tids = set(self.cores)
        for timer in task["timers"].get("posix", ()):
            if timer["it_sigev_notify"] == 4 and timer.get("notify_thread_id") not in tids:
                yield f"timer {timer['it_id']} of no thread"
        yield from self.signal_rules(task.get("signals_s", {}))

    def signal_rules(self, queue: Entry) -> Iterator[str]:
        if any(len(signal["siginfo"]) != 128 for signal in queue.get("signals", ())):
            yield "a siginfo of another size"

    def cgroup_rules(self, cg_set: int | None) -> Iterator[str]:
        own = self.inventory.get("root_cg_set")
        if cg_set is not None and cg_set != own:
            sets = self.images.read_one("CGROUP")["sets"] if self.images.exists("CGROUP") else []
            if cg_set not in {entry["id"] for entry in sets}:
                yield f"cgroup set {cg_set} is nowhere"
        if own == 0 or (own is None and cg_set is not None):
            yield "root_cg_set"

    def seccomp_rules(self, thread: Entry) -> Iterator[str]:
        if not self.images.exists("SECCOMP"):
            yield "seccomp.img is missing"
            return
        filters = self.images.read_one("SECCOMP").get("seccomp_filters", [])
        if thread.get("seccomp_mode", 0) == 2:
            at: int | None = thread.get("seccomp_filter", 0)
            for _ in range(len(filters) + 1):
                if at is None:
                    return
                if not 0 <= at < len(filters):
                    yield "a seccomp filter that is nowhere"
                    return
                at = filters[at].get("prev")
            yield "seccomp filters in a circle"

    def register_rules(self, info: Entry) -> Iterator[str]:
        registers, floating = info["gpregs"], info["fpregs"]
        if registers["cs"] != 0x33 or registers.get("mode", 1) != 1:
            yield "not a 64-bit task"
        if registers["fs_base"] >> 47 or registers["gs_base"] >> 47:
            yield "an impossible base"
        if len(floating["st_space"]) != 32 or len(floating["xmm_space"]) != 64:
            yield "the size of the registers"
        for name, value in floating.get("xsave", {}).items():
            if isinstance(value, list) and len(value) not in (0, XSAVE_ELEMENTS[name]):
                yield f"{len(value)} elements of {name}"

    # ---- memory

    def mm_rules(self, pid: int) -> Iterator[str]:
        mm = self.mms[pid]
        executable = self.files.get((base.REG, mm["exe_file_id"]))
        if executable is None or executable["reg"]["flags"] & (O_PATH | 3):
            yield "the executable leads nowhere, or is not open for reading"
        if len(mm.get("mm_saved_auxv", ())) > 44:
            yield "a long auxv"
        for name in ("start_code", "end_code", "start_data", "end_data", "start_stack", "start_brk", "brk",
                     "arg_start", "arg_end", "env_start", "env_end"):  # fmt: skip
            if not mm[f"mm_{name}"]:
                yield f"mm_{name} is 0"
        if not mm.get("vmas"):
            yield "no mappings"
        end = 0
        for vma in mm.get("vmas", ()):
            if vma["status"] & areas.GUARD:
                yield from self.guard_rules(mm["vmas"], vma)
                continue
            if vma["start"] < end:
                yield f"mappings are not ascending at {vma['start']:x}"
            end = vma["end"]
            yield from (f"{vma['start']:x}: {text}" for text in self.vma_rules(vma))
        kinds = Counter(bit for vma in mm.get("vmas", ()) for bit in (areas.VDSO, areas.VVAR) if vma["status"] & bit)
        if kinds[areas.VDSO] != kinds[areas.VVAR] or kinds[areas.VDSO] > 1:
            yield "vdso and vvar do not belong together"

    @staticmethod
    def guard_rules(vmas: list[Entry], guard: Entry) -> Iterator[str]:
        if not any(vma["start"] <= guard["start"] and guard["end"] <= vma["end"] for vma in vmas if vma is not guard):
            yield f"{guard['start']:x}: guard pages outside of all mappings"

    def vma_rules(self, vma: Entry) -> Iterator[str]:
        status, shmid = vma["status"], vma["shmid"]
        anonymous = areas.ANON_PRIVATE | areas.ANON_SHARED
        if status & anonymous and not vma["flags"] & MAP_ANONYMOUS:
            yield "anonymous without MAP_ANONYMOUS"
        if vma.get("madv", 0) & ~KNOWN_ADVICE:
            yield "unknown advice"
        if vma["fd"] != -1 or not 0 <= vma["prot"] < 8:
            yield "fd or protection"
        if status & areas.SYSVIPC:
            yield "System V memory without a namespace"
        elif status & areas.MEMFD:
            if (base.MEMFD, shmid) not in self.files:
                yield "a memfd that is nowhere"
        elif status & (areas.FILE_PRIVATE | areas.FILE_SHARED) and (base.REG, shmid) not in self.files:
            yield "a file that is nowhere"

    def page_rules(self, pid: int) -> Iterator[str]:
        if not self.images.exists("PAGEMAP", pid):
            first = next(other for other, ids in self.ids.items() if ids["vm_id"] == self.ids[pid]["vm_id"])
            yield "is missing" if first == pid else "the memory of another process"
            return
        private = areas.ANON_PRIVATE | areas.FILE_PRIVATE
        spans = [
            (vma["start"], vma["end"]) for vma in self.mms[pid].get("vmas", ())
            if (vma["status"] & areas.REGULAR and vma["status"] & private and not vma["status"] & areas.VVAR)
            or vma["status"] & areas.AIORING
        ]  # fmt: skip
        end = 0
        for start, length, flags in self.runs("PAGEMAP", pid):
            at, stop = start, start + length
            if start < end or not length or flags & ~PE_LAZY not in (PE_PARENT, PE_PRESENT):
                yield f"the run at {start:x}"
            end = stop
            for low, high in spans:
                if low <= at < high:
                    at = min(stop, high)
            if at < stop:
                yield f"{at:x} is in no private mapping"
        yield from self.store_rules("PAGEMAP", pid, self.folder)

    def store_rules(self, kind: str, index: int, folder: Path) -> Iterator[str]:
        """The pages image of a list holds what the list says, and its parent has what it leaves to it."""
        with ImageDir.open(str(folder)) as images:
            stored = sum(length for _, length, flags in _runs(images, kind, index) if flags & PE_PRESENT)
            left = [(start, start + length) for start, length, flags in _runs(images, kind, index) if flags & PE_PARENT]
            number = images.read_one(kind, index)["pages_id"]
        path = folder / f"pages-{number}.img"
        if stored and (not path.exists() or path.stat().st_size < stored):
            yield f"pages-{number} is short of {stored} bytes"
        if left:
            with ImageDir.open(str(folder / "parent")) as parent:
                had = [(start, start + length) for start, length, _ in _runs(parent, kind, index)]
            if any(not _covered(span, had) for span in left):
                yield "pages are missing in the parent"
            yield from self.store_rules(kind, index, folder / "parent")

    def runs(self, kind: str, index: int) -> Iterator[tuple[int, int, int]]:
        return _runs(self.images, kind, index)

    # ---- files

    def table_rules(self) -> Iterator[str]:
        for number, table in self.tables.items():
            where = f"fdinfo-{number}"
            if len({entry["fd"] for entry in table}) != len(table):
                yield f"{where}: a number is there twice"
            for entry in table:
                if (entry["type"], entry["id"]) not in self.files:
                    yield f"{where}: {entry['fd']} leads nowhere"
                    continue
                found = self.files[entry["type"], entry["id"]]
                for target in found.get("epfd", {}).get("tfd", ()):
                    if target["tfd"] not in {other["fd"] for other in table}:
                        yield f"{where}: the epoll target {target['tfd']} is not open"

    def file_rules(self) -> Iterator[str]:
        used = {(entry["type"], entry["id"]) for table in self.tables.values() for entry in table}
        sent = {number for packet in self.packets for scm in packet.get("scm", ()) for number in scm.get("rights", ())}
        ids = Counter(number for _, number in self.files)
        for (kind, number), entry in self.files.items():
            message = entry[base.FIELD[kind]]
            where = f"files: {base.FIELD[kind]} {number}"
            if message["id"] != number:
                yield f"{where}: two ids"
            outside = kind == base.UNIXSK and message["uflags"] & EXTERNAL_SERVICE
            lonely = (kind, number) not in used and number not in sent and not outside
            if kind in (base.PIPE, base.UNIXSK, base.TTY) and lonely:
                yield f"{where}: nobody has it"
            if message.get("flags", 0) & NEVER_OPENED_WITH:
                yield f"{where}: flags {message['flags']:o}"
            owner = message.get("fown", {})
            if owner.get("pid") and owner["pid_type"] > 2:
                yield f"{where}: a strange owner"
            if kind in (base.FIFO, base.TTY) and (base.REG, message.get("regf_id")) not in self.files:
                yield f"{where}: without a path"
            if kind == base.TUNF and (base.REG, number) not in self.files:
                yield f"{where}: without a path"
            if ids[number] > 1 and number in sent:
                yield f"{where}: a message names an id of two files"
            yield from (f"{where}: {text}" for text in self.kind_rules(kind, message))

    def kind_rules(self, kind: int, message: Entry) -> Iterator[str]:
        if kind == base.REG:
            if not message["name"].startswith("/") and not message.get("ext"):
                yield f"a relative name {message['name']}"
            if WORD // 2 <= message["pos"] < WORD - 1:
                yield "an impossible position"
            if "size" in message and message["mode"] >> 12 != 0o10:
                yield "a size, but no regular file"
        elif kind == base.UNIXSK:
            yield from self.unix_rules(message)
        elif kind == base.INETSK:
            words = {2: 1, 10: 4}[message["family"]]
            if {len(message["src_addr"]), len(message["dst_addr"])} - {words}:
                yield "the length of an address"
            stream = self.images.exists("TCP_STREAM", message["ino"])
            connected = message["proto"] == 6 and message["state"] in CONNECTED
            if connected and not stream and not self.inventory.get("tcp_close"):
                yield "a connection without its stream"
        elif kind == base.MEMFD:
            yield from self.memfd_rules(message["inode_id"])
        elif kind == base.INOTIFY:
            for watch in message.get("wd", ()):
                if not watch["f_handle"].get("path") and not self.is_ghost(watch["i_ino"]):
                    yield f"watch {watch['wd']} has no path"
        elif kind == base.FANOTIFY:
            for mark in message.get("mark", ()):
                path = mark["type"] != 1 or mark["ie"]["f_handle"].get("path") or self.is_ghost(mark["ie"]["i_ino"])
                if not path:
                    yield "a mark has no path"
        elif kind == base.TTY:
            yield from self.tty_rules(message["tty_info_id"])
        elif kind == base.PIDFD:
            if message["nspid"] not in (-1, *self.cores, *(item["pid"] for item in self.tree)):
                yield "of a process that is not there"
        elif kind == base.NS:
            known = {number for ids in (self.inventory["root_ids"], *self.ids.values()) for number in ids.values()}
            if message["ns_id"] not in known:
                yield "of an unknown namespace"
        elif kind == base.NETLINKSK and len(message.get("groups", ())) > 1:
            yield "more than 32 groups"

    def is_ghost(self, inode: int) -> bool:
        remaps = self.images.read_all("REMAP_FPATH")
        ghosts = [remap["remap_id"] for remap in remaps if remap.get("remap_type") == 1]
        return inode in {self.images.read_one("GHOST_FILE", ghost)["ino"] for ghost in ghosts}

    def unix_rules(self, message: Entry) -> Iterator[str]:
        sockets = {entry["usk"]["ino"]: entry["usk"] for entry in self.files.values() if "usk" in entry}
        peer = message["peer"]
        if peer and peer not in sockets:
            yield "its peer is nowhere"
        elif peer and message["type"] != 2 and message["state"] == 1:
            other = sockets[peer]
            if other["state"] != 10 and other["peer"] != message["ino"]:
                yield "its peer does not know it"

    def memfd_rules(self, inode: int) -> Iterator[str]:
        if inode not in self.memfds:
            yield "its inode is nowhere"
            return
        entry = self.memfds[inode]
        if entry["size"] and not self.images.exists("PAGEMAP_SHMEM", entry["shmid"]):
            yield "its pages are nowhere"
        elif entry["size"]:
            yield from self.store_rules("PAGEMAP_SHMEM", entry["shmid"], self.folder)

    def tty_rules(self, number: int) -> Iterator[str]:
        known = {entry["id"]: entry for entry in self.images.read_all("TTY_INFO")}
        if number not in known:
            yield "its settings are nowhere"
            return
        entry = known[number]
        parts = [name for name in ("termios", "termios_locked", "winsize") if name in entry]
        if len(parts) not in (0, 3) or (number & 1 and not parts):
            yield f"only {', '.join(parts)}"
        if any(len(entry[name]["c_cc"]) != 19 for name in parts if name != "winsize"):
            yield "the number of control characters"
        if ("pty" in entry) != (entry["type"] == 1):
            yield "the number of a terminal"

    def remap_rules(self) -> Iterator[str]:
        for remap in self.images.read_all("REMAP_FPATH"):
            where = f"remap-fpath: {remap['orig_id']}"
            if (base.REG, remap["orig_id"]) not in self.files:
                yield f"{where} leads nowhere"
            kind = remap.get("remap_type")
            if kind == 0 and (base.REG, remap["remap_id"]) not in self.files:
                yield f"{where}: its link leads nowhere"
            if kind == 1 and not self.images.exists("GHOST_FILE", remap["remap_id"]):
                yield f"{where}: its ghost is nowhere"
            if kind not in (0, 1, 2):
                yield f"{where}: of an unknown kind"

    def queue_rules(self) -> Iterator[str]:
        numbers = {number for _, number in self.files}
        for packet in self.packets:
            rights = [number for scm in packet.get("scm", ()) for number in scm.get("rights", ())]
            if (base.UNIXSK, packet["id_for"]) not in self.files or set(rights) - numbers:
                yield f"sk-queues: a message for {packet['id_for']} leads nowhere"
        descriptors = {item["pid"]: self.tables[self.ids[item["pid"]]["files_id"]] for item in self.living}
        for lock in self.images.read_all("FILE_LOCKS"):
            if lock["fd"] not in {entry["fd"] for entry in descriptors.get(lock["pid"], ())}:
                yield f"filelocks: {lock['pid']} has no descriptor {lock['fd']}"
        pipes = {entry["pipe"]["pipe_id"] for entry in self.files.values() if "pipe" in entry}
        for data, _ in self.images.read_with_payload("PIPES_DATA"):
            if data["pipe_id"] not in pipes:
                yield f"pipes-data: {data['pipe_id']} is no pipe"


def _runs(images: ImageDir, kind: str, index: int) -> Iterator[tuple[int, int, int]]:
    for entry in images.read_all(kind, index)[1:]:
        yield entry["vaddr"], entry["nr_pages"] * os.sysconf("SC_PAGESIZE"), entry["flags"]


def _covered(span: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    at, end = span
    for low, high in sorted(spans):
        if low <= at < high:
            at = high
    return at >= end
