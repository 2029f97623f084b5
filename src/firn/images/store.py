"""A directory of images: reading and writing its files, and making a checkpoint of them.

Everything is reached through one descriptor of the directory, and no file through a symbolic link. A directory is a
checkpoint once it has an inventory, so that is written last (:meth:`ImageDir.commit`).
"""

from __future__ import annotations

import errno
import os
import stat

from firn.errors import ImageError, UsageError
from firn.images import catalog
from firn.images.reader import VERSION, ImageReader, PayloadRef
from firn.images.writer import ImageWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_TEMPORARY = "inventory.img.new"


class ImageDir:
    """A directory of images, open. ``fd`` is its descriptor, ``path`` the name it was opened by, for messages only."""

    __slots__ = ("_below", "_committed", "_created", "_version", "_writable", "fd", "path")

    def __init__(self, fd: int, path: str, writable: bool) -> None:
        self.fd = fd
        self.path = path
        self._writable = writable
        self._below: ImageDir | None = None
        self._created: dict[str, None] = {}
        self._committed: dict[str, None] = {}
        self._version: int | None = None

    @classmethod
    def open(cls, path: str, *, create_files: bool = False) -> ImageDir:
        """Open the directory *path*; *create_files*: to write images, too.

        Raises :class:`UsageError` if there is no such directory, or no permission.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"cannot open the images directory {path}: {reason}") from None
        if create_files and not os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True):
            os.close(fd)
            raise UsageError(f"cannot create files in the images directory {path}")
        return cls(fd, path, create_files)

    def __enter__(self) -> ImageDir:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory, and of the one that :meth:`make_parent` made; nothing is removed."""
        if self._below is not None:
            self._below.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def parent(self) -> ImageDir | None:
        """The directory that this one's link ``parent`` leads to, None if there is no link.

        Raises :class:`ImageError` for a link that leads nowhere.
        """
        if not self._has("parent"):
            return None
        try:
            fd = os.open("parent", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError as error:
            raise ImageError(f"{self.path}/parent: cannot be opened: {error.strerror}") from None
        return ImageDir(fd, f"{self.path}/parent", False)

    def make_parent(self) -> ImageDir | None:
        """A new directory ``parent`` in this one, for images of this checkpoint; None if the name is in use.

        It is committed, aborted and revoked with this one. Raises :class:`ImageError` if it cannot be made.
        """
        self._check_writable()
        try:
            os.mkdir("parent", 0o700, dir_fd=self.fd)
        except FileExistsError:
            return None
        except OSError as error:
            raise ImageError(f"{self.path}/parent: cannot be made: {error.strerror}") from None
        fd = os.open("parent", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        self._below = ImageDir(fd, f"{self.path}/parent", True)
        return self._below

    # --- reading ------------------------------------------------------------------------------------------------------

    def exists(self, kind: str, index: int | None = None) -> bool:
        """Whether there is such an image."""
        return self._has(catalog.kind(kind).file(index))

    def version(self) -> int:
        """inventory_entry.img_version, 0 without an inventory or in that of a pre-dump.

        Raises :class:`ImageError` for a damaged inventory and for a version that firn does not know.
        """
        if self._version is None:
            version = self.read_one("INVENTORY")["img_version"] if self.exists("INVENTORY") else 0
            if version > VERSION:
                raise ImageError(f"inventory.img: image version {version} is not known")
            self._version = version
        return self._version

    def read_inventory(self) -> dict[str, Any]:
        """The inventory of a checkpoint, whose images are all there as far as it lists them (firn's does).

        Raises :class:`ImageError` if there is none, it is damaged, or an image is missing.
        """
        if not self.exists("INVENTORY"):
            raise ImageError(f"{self.path} is no checkpoint: it has no inventory.img")
        inventory = self.read_one("INVENTORY")
        for name in inventory.get("firn", {}).get("images", ()):
            if not self._has(name):
                raise ImageError(f"{name}: missing")
        return inventory

    def read_one(self, kind: str, index: int | None = None) -> dict[str, Any]:
        """The first entry of an image.

        Raises :class:`ImageError` if there is none, or it is damaged.
        """
        reader = self._reader(kind, index)
        if reader is None:
            raise ImageError(f"{catalog.kind(kind).file(index)}: missing")
        with reader:
            return reader.first()

    def read_all(self, kind: str, index: int | None = None) -> list[dict[str, Any]]:
        """All entries of an image, none if there is no such file. Payload is passed over.

        Raises :class:`ImageError` for a damaged file.
        """
        reader = self._reader(kind, index)
        if reader is None:
            return []
        with reader:
            return reader.all()

    def read_with_payload(self, kind: str, index: int | None = None) -> list[tuple[dict[str, Any], PayloadRef]]:
        """All entries of an image, each with the place of its payload; none if there is no such file.

        Entries that are framed inside another one (ghost_chunk_entry, ipc_msg) follow it.
        Raises :class:`ImageError` for a damaged file.
        """
        reader = self._reader(kind, index)
        if reader is None:
            return []
        with reader:
            return list(reader.with_payload())

    def _reader(self, kind: str, index: int | None) -> ImageReader | None:
        """The image, open behind its magics; None if there is no such file."""
        found = catalog.kind(kind)
        if not found.message:
            raise ImageError(f"image kind {kind} has no entries")
        version = 0 if kind == "INVENTORY" or found.head == catalog.HEAD_SERVICE else self.version()
        name = found.file(index)
        try:
            return ImageReader(found, self._open_regular(name, os.O_RDONLY), name, version)
        except FileNotFoundError:
            return None

    def open_raw(self, name: str, flags: int) -> int:
        """A descriptor of the file *name* of this directory, opened with *flags* of open(2).

        With O_CREAT the file is made anew, and its name must be one of an image.
        Raises :class:`ImageError` naming the file.
        """
        if flags & os.O_CREAT:
            return self._create(name, flags)
        try:
            return self._open_regular(name, flags)
        except FileNotFoundError:
            raise ImageError(f"{name}: missing") from None

    def read_payload(self, ref: PayloadRef, limit: int) -> bytes:
        """The bytes of a payload that is small by nature.

        Raises :class:`ImageError` if it has more than *limit* bytes.
        """
        if ref.length > limit:
            raise ImageError(f"{ref.name}: a payload of {ref.length} bytes where at most {limit} are possible")
        fd = self.open_raw(ref.name, os.O_RDONLY)
        try:
            data = os.pread(fd, ref.length, ref.offset)
        finally:
            os.close(fd)
        if len(data) != ref.length:
            raise ImageError(f"{ref.name}: shrank while it was read")
        return data

    def _has(self, name: str) -> bool:
        if "/" in name or "\0" in name:
            raise ImageError(f"{name!r} is no name of an image")
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ImageError(f"{name}: cannot be looked up: {error.strerror}") from None
        return True

    def _open_regular(self, name: str, flags: int) -> int:
        """open(2) of an existing regular file; FileNotFoundError passes through."""
        if "/" in name or "\0" in name:
            raise ImageError(f"{name!r} is no name of an image")
        try:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = "a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
            raise ImageError(f"{name}: {reason}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageError(f"{name}: not a regular file")
        return fd

    # --- writing ------------------------------------------------------------------------------------------------------

    def writer(self, kind: str, index: int | None = None) -> ImageWriter:
        """Create an image, replacing an old one; to be used in a ``with`` statement.

        Raises :class:`ImageError` naming the file.
        """
        found = catalog.kind(kind)
        if not found.message or kind == "INVENTORY":
            raise ImageError(f"image kind {kind}: {'written by commit()' if found.message else 'has no entries'}")
        name = found.file(index)
        return ImageWriter(found, self._create(name, os.O_WRONLY), name)

    def write_one(self, kind: str, entry: dict[str, Any], index: int | None = None) -> None:
        """Write an image of one entry. Raises :class:`ImageError` naming the file."""
        self.write_all(kind, (entry,), index)

    def write_all(self, kind: str, entries: Iterable[dict[str, Any]], index: int | None = None) -> None:
        """Write an image of *entries*. Raises :class:`ImageError` naming the file."""
        with self.writer(kind, index) as writer:
            for entry in entries:
                writer.add(entry)

    def created(self) -> list[str]:
        """The names of the images written since the directory was opened."""
        return list(self._created)

    def clear_old(self) -> None:
        """Remove the images of an earlier dump, the inventory first; no other files. A directory ``parent`` that such a
        dump made goes too, with its images: it has no inventory, or it would be another checkpoint.

        Raises :class:`ImageError` naming a file that cannot be removed.
        """
        self._check_writable()
        self._remove("inventory.img")
        self._remove(_TEMPORARY)
        for name in os.listdir(self.fd):
            found = catalog.identify(name)
            if found and found[0].head == catalog.HEAD_IMAGE:
                self._remove(name)
        self._clear_parent()

    def _clear_parent(self) -> None:
        try:
            fd = os.open("parent", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:
            return
        with ImageDir(fd, f"{self.path}/parent", True) as below:
            if below.exists("INVENTORY"):
                return
            below.clear_old()
        try:
            os.rmdir("parent", dir_fd=self.fd)
        except OSError:
            pass

    def commit(self, inventory: dict[str, Any]) -> None:
        """Make a checkpoint of what has been written: *inventory* appears, whole, under its name.

        After it :meth:`abort` removes nothing, only :meth:`revoke` does. Raises :class:`ImageError` naming the file.
        """
        fd = self._create(_TEMPORARY, os.O_WRONLY)
        with ImageWriter(catalog.kind("INVENTORY"), fd, "inventory.img") as writer:
            writer.add(inventory)
        try:
            os.rename(_TEMPORARY, "inventory.img", src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            raise ImageError(f"inventory.img: cannot be written: {error.strerror}") from None
        self._committed = {**self._created, "inventory.img": None}
        self._created.clear()
        self._version = None

    def revoke(self) -> None:
        """Take everything back, a checkpoint that was already committed too. Errors as :meth:`abort`."""
        self._created |= self._committed
        self._committed = {}
        if self._below is not None:
            self._below.revoke()
        self.abort()

    def abort(self) -> None:
        """Remove what has been created since the last commit, the newest first.

        Raises :class:`ImageError` naming a file that cannot be removed, after trying them all.
        """
        failed: ImageError | None = None
        if self._below is not None and not self._committed:
            self._below.abort()
            self._below.close()
            self._below = None
            try:
                os.rmdir("parent", dir_fd=self.fd)
            except OSError as error:
                failed = ImageError(f"{self.path}/parent: cannot be removed: {error.strerror}")
        while self._created:
            name, _ = self._created.popitem()
            try:
                self._remove(name)
            except ImageError as error:
                failed = error
        if failed:
            raise failed

    def _create(self, name: str, flags: int) -> int:
        """A new, empty file; what had the name before is unlinked, not overwritten."""
        self._check_writable()
        if name != _TEMPORARY and catalog.identify(name) is None:
            raise ImageError(f"{name!r} is no name of an image")
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._remove(name)
        self._created[name] = None
        try:
            return os.open(name, flags, 0o600, dir_fd=self.fd)
        except OSError as error:
            del self._created[name]
            raise ImageError(f"{name}: cannot be created: {error.strerror}") from None

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ImageError(f"{name}: cannot be removed: {error.strerror}") from None

    def _check_writable(self) -> None:
        if not self._writable:
            raise ImageError(f"the images directory {self.path} was opened for reading only")


# --- the file table ---------------------------------------------------------------------------------------------------

_OLD_FILES = (
    (1, "REG_FILES", "reg"), (2, "PIPES", "pipe"), (3, "FIFO", "fifo"), (4, "INETSK", "isk"), (5, "UNIXSK", "usk"),
    (6, "EVENTFD_FILE", "efd"), (7, "EVENTPOLL_FILE", "epfd"), (8, "INOTIFY_FILE", "ify"), (9, "SIGNALFD", "sgfd"),
    (10, "PACKETSK", "psk"), (11, "TTY_FILES", "tty"), (12, "FANOTIFY_FILE", "ffy"), (13, "NETLINK_SK", "nlsk"),
    (14, "NS_FILES", "nsf"), (15, "TUNFILE", "tunf"), (16, "EXT_FILES", "ext"), (17, "TIMERFD", "tfd"),
    (20, "PIDFD", "pidfd"),
)  # fmt: skip
"""(fd_types, old image kind, field of file_entry)."""

_OLD_RECORDS = (("EVENTPOLL_TFD", 7, "tfd"), ("INOTIFY_WD", 8, "wd"), ("FANOTIFY_MARK", 12, "mark"))
"""(old image kind, fd_types of the owner, field of the owner's message): the record's id is the owner's."""


def read_files(images: ImageDir) -> dict[tuple[int, int], dict[str, Any]]:
    """The file_entry messages of a checkpoint by (type, id), from files.img or, without it, the old images per type.

    Raises :class:`ImageError` for damaged images, an entry that is there twice or lacks its message, a message with
    another id than its entry, and an old record without an owner.
    """
    entries = images.read_all("FILES") or _read_old_files(images)
    fields = {type_: field for type_, _, field in _OLD_FILES} | {18: "memfd", 19: "bpf"}
    table: dict[tuple[int, int], dict[str, Any]] = {}
    for entry in entries:
        key = entry["type"], entry["id"]
        field = fields.get(key[0], "")
        if not field:
            raise ImageError(f"files: file {key[1]} has the unknown type {key[0]}")
        if entry.get(field, {}).get("id") != key[1]:
            raise ImageError(f"files: the entry of file {key[1]} does not have its {field!r} message")
        if key in table:
            raise ImageError(f"files: file {key[1]} of type {key[0]} is there twice")
        table[key] = entry
    return table


def _read_old_files(images: ImageDir) -> list[dict[str, Any]]:
    entries = [
        {"type": type_, "id": message["id"], field: message}
        for type_, kind, field in _OLD_FILES
        for message in images.read_all(kind)
    ]
    owners = {(entry["type"], entry["id"]): entry for entry in entries}
    fields = {type_: field for type_, _, field in _OLD_FILES}
    for kind, type_, field in _OLD_RECORDS:
        for record in images.read_all(kind):
            owner = owners.get((type_, record["id"]))
            if owner is None:
                raise ImageError(f"{catalog.kind(kind).file()}: no file has the id {record['id']}")
            owner[fields[type_]][field].append(record)
    return entries
