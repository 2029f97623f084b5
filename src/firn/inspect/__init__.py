"""What is in a checkpoint, as plain data (dicts, lists, strings, numbers), from the images alone.

:func:`describe` gives the document that ``firn inspect --json`` prints. Its keys (a later ``version`` may add some)::

    version             1
    directory           as it was asked for
    image_version       of CRIU's format
    parent              whether pages may lie in a parent directory
    stored_bytes        bytes of pages in these images; parent_bytes: in the parent's
    counts              processes, zombies, threads, descriptors, and kinds: kind -> number of descriptions
    processes           in the order of the tree, parents before children:
        pid ppid pgid sid comm state(running|stopped|zombie)
        zombies also    exit_code or exit_signal; they have nothing of what follows
        uid gid seccomp(disabled|strict|filter)
        threads         [{tid, comm}]; those with directories of their own also: cwd root umask
        exe cwd root    paths; umask
        memory          mappings, mapped_bytes, stored_bytes, parent_bytes, kinds: kind -> {mappings, bytes},
                        shared: inode ids of the shared memory that is mapped
        descriptor_table  number; processes with the same number share all descriptors
        descriptors     [{fd, file, kind, close_on_exec}]; file and kind lead to ``files``
        timers          [{clock, signal, next_ns, interval_ns}], pending_signals
    files               descriptions: file (number), kind, name, flags, holders: [{pid, fds}], and by kind:
                        access position unlinked pipe queued_bytes state
    shared_memory       [{inode, name, bytes, stored_bytes, mapped_by: [pid]}]
    locks               [{kind, type, breaking, pid, fd, start, length, name}]; length 0: to the end of any file
"""

from __future__ import annotations

from firn.errors import ImageError
from firn.images.pages import PAGE, PE_PARENT, PE_PRESENT, normalise
from firn.images.store import ImageDir, read_files
from firn.inspect.files import CLOCKS, KINDS
from firn.inspect.files import describe as describe_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Entry = dict[str, Any]

VERSION = 1
_STATES = {1: "running", 2: "zombie", 3: "stopped", 6: "zombie"}
_SECCOMP = {0: "disabled", 1: "strict", 2: "filter"}
_LOCKS = {1: "posix", 2: "flock", 4: "ofd", 8: "lease"}
_LOCK_TYPES = {0: "read", 1: "write", 2: "unlock"}
_SPECIAL = 4 | 8 | 1 << 12 | 1 << 13 | 1 << 17
"""vma_entry.status: vsyscall, vdso, vvar, AIO ring, uprobes."""
_GUARD, _MEMFD, _ANON_SHARED, _SYSVIPC, _SOCKET = 1 << 16, 1 << 14, 1 << 8, 1 << 10, 1 << 11
_FILE_PRIVATE, _FILE_SHARED = 1 << 6, 1 << 7


def describe(directory: str) -> Entry:
    """The contents of the checkpoint in *directory*. Raises ImageError for one that is damaged, or is none, UsageError
    for a directory that cannot be opened."""
    with ImageDir.open(directory) as images:
        return _Reading(images).document()


class _Reading:
    """One checkpoint while it is read."""

    def __init__(self, images: ImageDir) -> None:
        self.images = images
        self.inventory = images.read_inventory()
        self.items = images.read_all("PSTREE")
        if not self.items:
            raise ImageError(f"{images.path} is no checkpoint: pstree.img is missing or empty")
        self.table = read_files(images)
        self.memfds = {entry["inode_id"]: entry for entry in images.read_all("MEMFD_INODE")}
        self.tables = {
            "memfds": self.memfds,
            "terminals": {entry["id"]: entry for entry in images.read_all("TTY_INFO")},
            "remaps": {entry["orig_id"]: entry for entry in images.read_all("REMAP_FPATH")},
            "regular": {number: entry["reg"] for (kind, number), entry in self.table.items() if kind == 1},
            "pipes": self._queues("PIPES_DATA", "pipe_id", "bytes") | self._queues("FIFO_DATA", "pipe_id", "bytes"),
            "sockets": self._queues("SK_QUEUES", "id_for", "length"),
        }
        self.holders: dict[tuple[int, int], dict[int, list[int]]] = {}
        self.by_fd: dict[tuple[int, int], tuple[int, int]] = {}
        self.mapped_by: dict[int, list[int]] = {}
        self.fdinfo: dict[int, list[Entry]] = {}
        self.spaces: set[int] = set()

    def _queues(self, kind: str, key: str, size: str) -> dict[int, Entry]:
        """Owner -> the sum of its queued bytes."""
        found: dict[int, Entry] = {}
        for entry in self.images.read_all(kind):
            found.setdefault(entry[key], {"bytes": 0})["bytes"] += entry[size]
        return found

    def document(self) -> Entry:
        """All of it."""
        self._check_tree()
        processes = [self._process(item) for item in self.items]
        shared = [self._shared_memory(entry) for entry in self.memfds.values()]
        living = [process for process in processes if process["state"] != "zombie"]
        sources = [process["memory"] for process in living] + shared
        files = [self._file(*key) for key in self.table if key in self.holders]
        kinds: dict[str, int] = {}
        for file in files:
            kinds[file["kind"]] = kinds.get(file["kind"], 0) + 1
        tables = {process["descriptor_table"]: len(process["descriptors"]) for process in living}
        return {
            "version": VERSION,
            "directory": self.images.path,
            "image_version": self.inventory["img_version"],
            "parent": self._has_parent(),
            "stored_bytes": sum(source["stored_bytes"] for source in sources),
            "parent_bytes": sum(source["parent_bytes"] for source in sources),
            "counts": {
                "processes": len(processes),
                "zombies": len(processes) - len(living),
                "threads": sum(len(process["threads"]) for process in living),
                "descriptors": sum(tables.values()),
                "kinds": dict(sorted(kinds.items())),
            },
            "processes": processes,
            "files": files,
            "shared_memory": shared,
            "locks": [self._lock(entry) for entry in self.images.read_all("FILE_LOCKS")],
        }

    def _has_parent(self) -> bool:
        parent = self.images.parent()
        if parent is None:
            return False
        parent.close()
        return True

    def _check_tree(self) -> None:
        known: set[int] = set()
        for item in self.items:
            pid, ppid = item["pid"], item["ppid"]
            if pid in known or not pid:
                raise ImageError(f"pstree.img: process {pid} is there twice, or has no number")
            if ppid not in known and (known or ppid):
                raise ImageError(f"pstree.img: process {pid} comes before its parent {ppid}, or has none")
            known.add(pid)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _process(self, item: Entry) -> Entry:
        pid = item["pid"]
        core = self.images.read_one("CORE", pid)
        if "tc" not in core:
            raise ImageError(f"core-{pid}.img has no task part")
        tc = core["tc"]
        state = _STATES.get(tc["task_state"])
        if state is None:
            raise ImageError(f"core-{pid}.img: the task state {tc['task_state']} is none")
        found: Entry = {key: item[key] for key in ("pid", "ppid", "pgid", "sid")}
        found |= {"comm": tc["comm"], "state": state}
        if state == "zombie":
            status = tc["exit_code"]
            found |= {"exit_signal": status & 0x7F} if status & 0x7F else {"exit_code": status >> 8 & 0xFF}
            return found
        return found | self._living(pid, core, item.get("threads", []))

    def _living(self, pid: int, core: Entry, tids: list[int]) -> Entry:
        tc, own = core["tc"], core.get("thread_core", {})
        # Older images have these in files of their own.
        creds = own.get("creds") or (self.images.read_one("CREDS", pid) if self.images.exists("CREDS", pid) else {})
        ids, fs = self._one("IDS", core.get("ids"), pid), self.images.read_one("FS", pid)
        mm = self.images.read_one("MM", pid)
        threads = [self._thread(tid, pid, core) for tid in tids]
        seccomp = own.get("seccomp_mode", tc.get("old_seccomp_mode", 0))
        table = ids["files_id"]
        pending = [tc.get("signals_s", {}), own.get("signals_p", {})]
        return {
            "uid": creds.get("uid"), "gid": creds.get("gid"), "seccomp": _SECCOMP.get(seccomp, str(seccomp)),
            "threads": threads, "exe": self._path(mm["exe_file_id"], f"mm-{pid}.img"),
            **self._directories(fs, f"fs-{pid}.img"),
            "memory": self._memory(pid, mm, ids["vm_id"]), "descriptor_table": table,
            "descriptors": self._descriptors(pid, table), "timers": _timers(tc.get("timers", {})),
            "pending_signals": sum(len(queue.get("signals", ())) for queue in pending),
        }  # fmt: skip

    def _one(self, kind: str, inside: Entry | None, index: int) -> Entry:
        """An image of its own, or what an older one has in the core."""
        return inside if inside and not self.images.exists(kind, index) else self.images.read_one(kind, index)

    def _thread(self, tid: int, pid: int, core: Entry) -> Entry:
        own = (core if tid == pid else self.images.read_one("CORE", tid)).get("thread_core", {})
        found = {"tid": tid, "comm": str(own.get("comm", core["tc"]["comm"]))}
        directories = own.get("firn", {}).get("directories")
        return found | (self._directories(directories["fs"], f"core-{tid}.img") if directories else {})

    def _directories(self, fs: Entry, where: str) -> Entry:
        cwd, root = self._path(fs["cwd_id"], where), self._path(fs["root_id"], where)
        return {"cwd": cwd, "root": root, "umask": fs.get("umask")}

    def _path(self, number: int, where: str) -> str:
        found = self.tables["regular"].get(number)
        if found is None:
            raise ImageError(f"{where}: file {number} is not in the file table")
        return str(found["name"])

    def _descriptors(self, pid: int, table: int) -> list[Entry]:
        if table not in self.fdinfo:
            self.fdinfo[table] = sorted(self.images.read_all("FDINFO", table), key=lambda entry: int(entry["fd"]))
        found = []
        for entry in self.fdinfo[table]:
            key = entry["type"], entry["id"]
            if key not in self.table:
                raise ImageError(
                    f"fdinfo-{table}.img: file {key[1]} (descriptor {entry['fd']}) is not in the file table"
                )
            self.holders.setdefault(key, {}).setdefault(pid, []).append(entry["fd"])
            self.by_fd[pid, entry["fd"]] = key
            close = bool(entry["flags"] & 1)
            found.append({"fd": entry["fd"], "file": key[1], "kind": KINDS[key[0]][0], "close_on_exec": close})
        return found

    def _file(self, kind: int, number: int) -> Entry:
        holders = [{"pid": pid, "fds": fds} for pid, fds in self.holders[kind, number].items()]
        return {"file": number, **self._described(kind, number), "holders": holders}

    def _described(self, kind: int, number: int) -> Entry:
        return describe_file(kind, self.table[kind, number][KINDS[kind][1]], self.tables)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _memory(self, pid: int, mm: Entry, space: int) -> Entry:
        """Who shares the address space *space* with an earlier process has no page list."""
        kinds: dict[str, Entry] = {}
        shared: set[int] = set()
        vmas = mm.get("vmas") or self.images.read_all("VMAS", pid)
        for vma in vmas:
            if vma["status"] & _GUARD:
                continue
            if vma["end"] <= vma["start"]:
                raise ImageError(f"mm-{pid}.img: impossible mapping {vma['start']:#x}-{vma['end']:#x}")
            kind = kinds.setdefault(_area_kind(vma["status"]), {"mappings": 0, "bytes": 0})
            kind["mappings"] += 1
            kind["bytes"] += vma["end"] - vma["start"]
            if vma["status"] & _MEMFD:
                entry = self.table.get((18, vma["shmid"]))
                if entry is None:
                    raise ImageError(f"mm-{pid}.img: the memfd {vma['shmid']} is not in the file table")
                shared.add(entry["memfd"]["inode_id"])
        pages = self._pages("PAGEMAP", pid, space not in self.spaces)
        self.spaces.add(space)
        for inode in shared:
            self.mapped_by.setdefault(inode, []).append(pid)
        return {
            "mappings": sum(kind["mappings"] for kind in kinds.values()),
            "mapped_bytes": sum(kind["bytes"] for kind in kinds.values()),
            **pages,
            "kinds": kinds,
            "shared": sorted(shared),
        }

    def _pages(self, kind: str, index: int, needed: bool) -> Entry:
        """How many bytes a page list has here and in the parent."""
        found = {"stored_bytes": 0, "parent_bytes": 0}
        if not needed and not self.images.exists(kind, index):
            return found
        entries = self.images.read_all(kind, index)
        if not entries:
            raise ImageError(f"the page list of {'process' if needed else 'memory object'} {index} is missing or empty")
        for entry in entries[1:]:
            _, count, flags = normalise(entry)
            if flags & PE_PRESENT:
                found["stored_bytes"] += count * PAGE
            elif flags & PE_PARENT:
                found["parent_bytes"] += count * PAGE
        return found

    def _shared_memory(self, entry: Entry) -> Entry:
        pages = self._pages("PAGEMAP_SHMEM", entry["shmid"], False)
        mapped_by = self.mapped_by.get(entry["inode_id"], [])
        number = entry["inode_id"]
        return {"inode": number, "name": entry["name"], "bytes": entry["size"], **pages, "mapped_by": mapped_by}

    # -- locks ---------------------------------------------------------------------------------------------------------

    def _lock(self, entry: Entry) -> Entry:
        pid, fd = entry["pid"], entry["fd"]
        key = self.by_fd.get((pid, fd))
        if key is None:
            raise ImageError(f"filelocks.img: process {pid} has no descriptor {fd} that could be locked")
        return {
            "kind": _LOCKS.get(entry["flag"], str(entry["flag"])),
            "type": _LOCK_TYPES.get(entry["type"] & 3, str(entry["type"])), "breaking": bool(entry["type"] & 4),
            "pid": pid, "fd": fd, "start": entry["start"], "length": entry["len"],
            "name": self._described(*key)["name"],
        }  # fmt: skip


def _area_kind(status: int) -> str:
    if status & _SPECIAL:
        return "kernel"
    if status & (_MEMFD | _ANON_SHARED | _SYSVIPC):
        return "private memfd" if status & _FILE_PRIVATE else "shared memory"
    if status & _SOCKET:
        return "packet ring"
    if status & _FILE_PRIVATE:
        return "private file"
    return "shared file" if status & _FILE_SHARED else "private"


def _timers(timers: Entry) -> list[Entry]:
    """The armed interval timers and all POSIX timers."""
    found = []
    for name, signal in (("real", 14), ("virt", 26), ("prof", 27)):
        timer = timers.get(name)
        if timer and (timer["vsec"] or timer["vusec"]):
            left, interval = (timer[f"{of}sec"] * 10**9 + timer[f"{of}usec"] * 1000 for of in ("v", "i"))
            found.append({"clock": f"itimer-{name}", "signal": signal, "next_ns": left, "interval_ns": interval})
    for timer in timers.get("posix", ()):
        left, interval = (timer[f"{of}sec"] * 10**9 + timer[f"{of}nsec"] for of in ("v", "i"))
        clock, signal = CLOCKS.get(timer["clock_id"], str(timer["clock_id"])), timer["si_signo"]
        found.append({"clock": clock, "signal": signal, "next_ns": left, "interval_ns": interval})
    return found
