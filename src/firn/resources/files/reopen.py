"""Opening the files of a checkpoint again (images: reg_file_entry, remap-fpath, ghost-file, memfd entries).

Everything is opened by the controller before the first task exists, so that a file that is missing or was changed is
one clear error and nothing has to be undone; only names below /proc/PID of a restored task must wait for that task.
Unlinked files are made under their old name, opened, and unlinked again; those that never had a name (O_TMPFILE) are
made without one, so that they can still be given one (linkat(2)); files of dead processes and threads are opened while
a helper stands in for them; hard links that a dump left (link_remap) are
taken away when the restore has succeeded.
"""

from __future__ import annotations

import errno
import os
import stat

from firn.abi import fcntl as fc
from firn.errors import ImageError, NotBuilt, RestoreError
from firn.resources import base
from firn.resources.base import FIELD, MEMFD, REG
from firn.resources.files import external, memfd
from firn.resources.files.buildid import read_build_id, to_words
from firn.resources.files.paths import GHOST, LINKED, NO_SEEK, PROCFS
from firn.resources.files.procfiles import is_of_descriptor, process_of, thread_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.api import RestoreOptions
    from firn.images.reader import PayloadRef
    from firn.images.store import ImageDir
    from firn.tracee.program import Program

TMPFILE_BIT = 0o20000000
AS_RECORDED = -1
_NOT_FOR_OPEN = fc.O_CREAT | fc.O_EXCL | fc.O_TRUNC | TMPFILE_BIT | fc.FASYNC
_KIND_NAMES = {16: "a file of a plugin of CRIU", 19: "a BPF map"}


class Opener:
    """The opened files of a checkpoint, by (type, file id)."""

    def __init__(
        self,
        images: ImageDir,
        files: dict[tuple[int, int], dict[str, Any]],
        remaps: dict[int, dict[str, Any]],
        memfds: dict[int, dict[str, Any]],
        pids: list[int],
        options: RestoreOptions,
        warn: Callable[[str], object],
        stand_in: Callable[[int, list[int]], object],
    ) -> None:
        self.images = images
        self.files = files
        self.remaps = remaps
        self.memfds = memfds
        self.own_proc = tuple(f"/proc/{pid}/" for pid in pids)
        self.validation = options.file_validation
        self.check_mode = not options.skip_file_rwx_check
        self.kinds: dict[int, base.Kind] = {}
        self.inherited = external.Inherited(options.inherit_fd)
        self.context = base.RestoreContext(
            images, options, pids, files, self.message, self.open, self.inherited, warn
        )
        self.fds: dict[tuple[int, int, int], int] = {}
        self.objects: dict[int, memfd.RestoredObject] = {}
        self.remap_links: set[str] = set()
        self.stand_in = stand_in
        self.stand_ins: dict[int, list[int]] = {}
        """Pid -> all ids of who stands in for a dead process, its own first."""
        self._ghosts: dict[int, str] = {}
        self._temporary: list[tuple[str, bool]] = []
        self._nameless: dict[str, int] = {}

    def message(self, kind: int, number: int) -> dict[str, Any]:
        """The message of file *number*; ImageError if it is not there or of another kind."""
        entry = self.files.get((kind, number))
        if entry is None:
            raise ImageError(f"files image: file {number} (type {kind}) is not there")
        if not (kind in (REG, MEMFD) or base.is_built(kind)):
            name = _KIND_NAMES.get(kind, f"a file of type {kind}")
            raise NotBuilt(f"the checkpoint holds {name}, which is not supported yet")
        if FIELD[kind] not in entry:
            raise ImageError(f"files image: file {number} of type {kind} has no {FIELD[kind]} part")
        message: dict[str, Any] = entry[FIELD[kind]]
        return message

    def kind(self, kind: int) -> base.Kind:
        """The module's side of type *kind*."""
        if kind not in self.kinds:
            self.kinds[kind] = base.load(kind)()
        return self.kinds[kind]

    def plan_session(self, program: Program, sid: int) -> None:
        """What the new leader of session *sid* has to do before it has children."""
        for kind in self.kinds.values():
            kind.plan_session(program, sid)

    def complete(self) -> None:
        """What is left to do when all tasks have all their descriptors."""
        for kind in list(self.kinds.values()):
            kind.complete()

    def is_late(self, kind: int, number: int) -> bool:
        """Whether the file can only be opened when the restored task exists."""
        if kind == MEMFD or self._inherit_key(kind, number):
            return False
        if kind != REG:
            message = self.message(kind, number)
            return self.kind(kind).is_late(message, self.context)
        if self.remaps.get(number, {}).get("remap_type") == PROCFS:
            return False
        name = self.message(kind, number)["name"]
        return name.startswith(self.own_proc) or name + "/" in self.own_proc

    def open(self, kind: int, number: int, mode: int = AS_RECORDED) -> int:
        """Our descriptor of file *number*, opened once per access *mode* (O_RDONLY, O_WRONLY, O_RDWR; mappings have one
        of their own, the descriptions behind descriptors are opened as recorded)."""
        key = (kind, number, mode)
        if key not in self.fds:
            message = self.message(kind, number)
            if mode != AS_RECORDED:
                kept = message["flags"] & ~(fc.O_ACCMODE | TMPFILE_BIT)
                message = {**message, "flags": kept | mode & fc.O_ACCMODE, "pos": 0}
            inherited = self._inherit_key(kind, number) if mode == AS_RECORDED else ""
            if inherited:
                self.fds[key] = self.inherited.open(inherited, kind, message)
            elif kind == MEMFD:
                self.fds[key] = self._open_memfd(message)
            elif kind == REG:
                self.fds[key] = self._open_reg(number, message)
            else:
                self.fds[key] = self.kind(kind).open(number, message, self.context)
        return self.fds[key]

    def _inherit_key(self, kind: int, number: int) -> str:
        """The key under which file *number* is inherited; empty if it is not."""
        if not self.inherited:
            return ""
        message = self.message(kind, number)
        memory = self.memfds.get(message["inode_id"], {}).get("name", "") if kind == MEMFD else ""
        key = external.inherit_key(kind, message, memory)
        return key if key in self.inherited else ""

    # -- regular files -----------------------------------------------------------------------------------------------

    def _open_reg(self, number: int, message: dict[str, Any]) -> int:
        name = message["name"]
        if external.is_external(message):
            raise external.not_supplied(message)
        if not name.startswith("/") or "\0" in name:
            raise ImageError(f"files image: file {number} has no absolute name ({name!r})")
        remap = self.remaps.get(number)
        remapped = False
        if remap is not None:
            remapped = self._remap(number, name, remap)
        path = self._ghosts.get(number, name)
        if message["flags"] & TMPFILE_BIT and path in self._nameless:
            return _at_position(self._nameless.pop(path), name, message["pos"])
        flags = message["flags"] & ~_NOT_FOR_OPEN | fc.O_CLOEXEC | fc.O_NOCTTY
        if stat.S_ISLNK(message.get("mode", 0)):
            flags |= fc.O_PATH | fc.O_NOFOLLOW
        if flags & fc.O_DIRECTORY and not message.get("mode", stat.S_IFDIR) & stat.S_IFDIR:
            flags &= ~fc.O_DIRECTORY
        try:
            fd = os.open(path, flags)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise RestoreError(f"{name} cannot be opened: {why}", "put the file back") from None
        if not remapped:
            self._validate(fd, message)
        if "kmsg" in message.get("firn", {}):
            from firn.resources.files import kmsg

            kmsg.seek(fd, message["firn"])
        return fd if flags & fc.O_PATH else _at_position(fd, name, message["pos"])

    def _validate(self, fd: int, message: dict[str, Any]) -> None:
        name = message["name"]
        st = os.fstat(fd)
        if "mode" in message:
            there, wanted = st.st_mode, message["mode"]
            if not self.check_mode:
                there, wanted = stat.S_IFMT(there), stat.S_IFMT(wanted)
            if there != wanted:
                raise RestoreError(
                    f"{name} was changed since the dump: mode {there:o} instead of {wanted:o}",
                    "put the file back, or use --skip-file-rwx-check if only its permissions differ",
                )
        device = message.get("firn", {}).get("rdev", st.st_rdev)
        if st.st_rdev != device:
            numbers = [f"{os.major(each)}:{os.minor(each)}" for each in (st.st_rdev, device)]
            raise RestoreError(f"{name} is the device {numbers[0]} now, instead of {numbers[1]}", "put it back")
        if "size" not in message or not stat.S_ISREG(st.st_mode) or name.startswith("/proc/"):
            return
        if message["flags"] & fc.O_ACCMODE == fc.O_WRONLY and message["flags"] & fc.O_APPEND:
            return
        if st.st_size != message["size"]:
            raise RestoreError(
                f"{name} was changed since the dump: {st.st_size} bytes instead of {message['size']}",
                "put the file back",
            )
        recorded = message.get("build_id")
        if recorded and self.validation == "buildid":
            found = read_build_id(f"/proc/self/fd/{fd}")
            if found is not None and to_words(found) != recorded:
                raise RestoreError(
                    f"{name} was changed since the dump: its build-id is another one", "put the file back"
                )

    # -- unlinked files ------------------------------------------------------------------------------------------------

    def _remap(self, number: int, name: str, remap: dict[str, Any]) -> bool:
        """Make sure that *name* (or what ``_ghosts`` says) leads to the file; True if contents are not to be
        checked."""
        kind, target = remap.get("remap_type"), remap["remap_id"]
        if kind is None:
            kind, target = (GHOST, target & 0x7FFFFFFF) if target >> 31 else (LINKED, target)
        if kind == GHOST:
            self._ghosts[number] = self._make_ghost(name, target)
            return True
        if kind == LINKED:
            link = self.message(REG, target)["name"]
            self.remap_links.add(link)
            path = self._make_parents(name, f".cr.{number:x}.link")
            try:
                os.link(link, path)
            except FileExistsError:
                self._ghosts[number] = link
                return True
            except OSError as error:
                raise RestoreError(f"{link} cannot be linked to {name}: {os.strerror(error.errno or 0)}") from None
            self._temporary.append((path, False))
            if path != name:
                self._ghosts[number] = path
            return True
        if kind != PROCFS or process_of(name) != target:
            raise ImageError(f"remap-fpath.img: {name} cannot be of process {target}")
        if target not in self.stand_ins:
            threads = {thread_of(self.message(REG, number)["name"]) for number, each in self.remaps.items()
                       if (each.get("remap_type"), each["remap_id"]) == (PROCFS, target)}  # fmt: skip
            self.stand_ins[target] = [target, *sorted(threads - {0, target})]
            self.stand_in(target, self.stand_ins[target][1:])
        return False

    def dead_process(self, kind: int, number: int) -> int:
        """The pid of the dead process that the file in /proc belongs to; 0 if it belongs to none."""
        remap = self.remaps.get(number, {}) if kind == REG else {}
        return remap["remap_id"] if remap.get("remap_type") == PROCFS else 0

    def looks_at_descriptors(self, kind: int, number: int) -> bool:
        """Whether the file is one of /proc that shows another descriptor, and can only be opened after that."""
        return kind == REG and self.is_late(kind, number) and is_of_descriptor(self.message(kind, number)["name"])

    def _make_parents(self, name: str, ending: str) -> str:
        """Make directories on the way that are gone too; taken away again with the file. The name under which it can be
        made: one with *ending* if there is something else now where a directory was."""
        missing = []
        parent = os.path.dirname(name)
        while parent not in ("/", "") and not os.path.lexists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            return parent + ending
        for path in reversed(missing):
            os.mkdir(path, 0o700)
            self._temporary.append((path, True))
        return name

    def _make_ghost(self, name: str, number: int) -> str:
        key = -number
        if key in self._ghosts:
            return self._ghosts[key]
        if not self.images.exists("GHOST_FILE", number):
            raise ImageError(f"ghost-file-{number:x}.img is not there")
        ending = f".cr.{number:x}.ghost"
        path = self._make_parents(name, ending)
        nameless = self._make_nameless(path, number)
        if nameless or os.path.lexists(path):
            path = nameless or path + ending
        entries = self.images.read_with_payload("GHOST_FILE", number)
        if not entries:
            raise ImageError(f"ghost-file-{number:x}.img: cut short: it has no entry")
        entry = entries[0][0]
        try:
            fill_ghost(self.images, path, entries)
        except FileExistsError:
            raise RestoreError(f"{path} is in the way of an unlinked file", "move it away") from None
        except OSError as error:
            raise RestoreError(f"unlinked file {path} cannot be made: {os.strerror(error.errno or 0)}") from error
        if not nameless:
            self._temporary.append((path, stat.S_ISDIR(entry["mode"])))
        self._ghosts[key] = path
        return path

    def _make_nameless(self, name: str, ghost: int) -> str:
        """The path of a new file without a name for a ghost whose description says O_TMPFILE, else ""."""
        made = [self.files[REG, remap["orig_id"]]["reg"]["flags"] for remap in self.remaps.values()
                if remap["remap_id"] == ghost and (REG, remap["orig_id"]) in self.files]  # fmt: skip
        flags = next((flags for flags in made if flags & TMPFILE_BIT and flags & fc.O_ACCMODE), 0)
        if not flags:
            return ""
        try:
            fd = os.open(os.path.dirname(name), flags & ~fc.O_EXCL | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        except OSError:
            return ""  # a file system without such files
        path = f"/proc/self/fd/{fd}"
        self._nameless[path] = fd
        return path

    def remove_temporary(self) -> None:
        """Unlink what was made only to be opened. (Who made the stand-ins of dead processes ends them.)"""
        while self._temporary:
            path, directory = self._temporary.pop()
            try:
                os.rmdir(path) if directory else os.unlink(path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise

    def succeeded(self) -> None:
        """The restore is complete: hard links made by the dump are no longer needed."""
        for path in self.remap_links:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def quiet(self) -> list[int]:
        """The descriptors that :meth:`resume` needs; none if it has nothing to do."""
        return [fd for kind in self.kinds.values() for fd in kind.quiet()]

    def resume(self, again: bool = False) -> None:
        """The tasks run in a moment. *again*: who had begun with this is dead."""
        for kind in self.kinds.values():
            kind.resume(again)

    # -- memory objects ------------------------------------------------------------------------------------------------

    def memory_object(self, inode_id: int) -> memfd.RestoredObject:
        """The memory object *inode_id*, made and filled once."""
        found = self.objects.get(inode_id)
        if found is None:
            entry = self.memfds.get(inode_id)
            if entry is None:
                raise ImageError(f"memfd.img has no inode {inode_id}")
            key = f"/memfd:{entry['name']}"
            if key in self.inherited:
                found = memfd.RestoredObject({**entry, "seals": memfd.F_SEAL_SEAL}, self.inherited.take(key))
            else:
                found = memfd.restore(entry, self.images)
            self.objects[inode_id] = found
        return found

    def _open_memfd(self, message: dict[str, Any]) -> int:
        made = self.memory_object(message["inode_id"])
        flags = message["flags"] & ~_NOT_FOR_OPEN | fc.O_CLOEXEC
        try:
            fd = os.open(f"/proc/self/fd/{made.fd}", flags)
        except OSError as error:
            raise RestoreError(f"memfd {made.entry['name']!r}: {error.strerror}") from None
        if message["pos"] not in (0, NO_SEEK):
            os.lseek(fd, message["pos"], os.SEEK_SET)
        return fd

    def seal(self) -> None:
        """Set the seals, after all mappings are made."""
        for made in self.objects.values():
            made.seal()

    def close(self) -> None:
        """Close everything and remove what is temporary."""
        self.remove_temporary()
        for kind in self.kinds.values():
            kind.close()
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()
        for made in self.objects.values():
            os.close(made.fd)
        self.objects.clear()
        while self._nameless:
            os.close(self._nameless.popitem()[1])


def _at_position(fd: int, name: str, position: int) -> int:
    """*fd*, at *position*."""
    if position != NO_SEEK and position:
        try:
            os.lseek(fd, position, os.SEEK_SET)
        except (OSError, OverflowError) as error:
            raise RestoreError(f"{name}: cannot go to position {position}: {error}") from None
    return fd


def fill_ghost(images: ImageDir, path: str, entries: list[tuple[dict[str, Any], PayloadRef]]) -> None:
    """Make the file of a ghost image at *path*; it must not exist."""
    entry, payload = entries[0]
    mode = entry["mode"]
    if stat.S_ISDIR(mode):
        os.mkdir(path, 0o700)
    elif stat.S_ISFIFO(mode):
        os.mkfifo(path, 0o600)
    elif stat.S_ISREG(mode):
        new = 0 if path.startswith("/proc/self/fd/") else os.O_CREAT | os.O_EXCL
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | new, 0o600)
        try:
            if entry.get("chunks"):
                for chunk, part in entries[1:]:
                    _copy_payload(images, part, fd, chunk["off"])
                os.ftruncate(fd, entry["size"])
            else:
                _copy_payload(images, payload, fd, 0)
        finally:
            os.close(fd)
    else:
        raise NotBuilt(f"{path}: an unlinked device or link is not supported yet")
    os.chown(path, entry["uid"], entry["gid"])
    os.chmod(path, mode & 0o7777)
    own = entry.get("firn", {})
    for xattr in own.get("xattrs", []):
        os.setxattr(path, xattr.get("name", ""), xattr.get("value", b""))
    if "atime_ns" in own and "mtime_ns" in own:
        os.utime(path, ns=(own["atime_ns"], own["mtime_ns"]))
    elif "atim" in entry and "mtim" in entry:
        times = tuple(entry[key]["tv_sec"] * 10**9 + entry[key]["tv_usec"] * 1000 for key in ("atim", "mtim"))
        os.utime(path, ns=(times[0], times[1]))


def _copy_payload(images: ImageDir, payload: PayloadRef, target: int, at: int) -> None:
    """Copy image bytes into file *target* from offset *at* on."""
    source = images.open_raw(payload.name, os.O_RDONLY)
    try:
        os.lseek(target, at, os.SEEK_SET)
        offset, end = payload.offset, payload.offset + payload.length
        while offset < end:
            sent = os.sendfile(target, source, offset, min(end - offset, 1 << 30))
            if not sent:
                raise ImageError(f"{payload.name} is cut")
            offset += sent
    finally:
        os.close(source)
