"""AIO contexts (images: mm_entry.aios, AIORING mappings).

State owned: the ring of io_setup(2), which is a mapping whose address is the context's id, and the completed events in
it that nobody has fetched yet. Kernel: the ring's header (struct aio_ring, fs/aio.c) in the process's memory. It comes
back by io_setup(2) and mremap(2) to the old address (the kernel follows the move); unfetched events are made by as many
reads of /dev/null, which complete at once, and are then overwritten with the saved ones. The positions of head and tail
in the ring need not be the old ones: libraries and io_getevents(2) read them from the header.

What goes wrong: requests in flight. The ring does not show them, and no call tells; the kernel's own counters do
(:mod:`firn.host.aiorequests`). Those of files end by themselves soon, and are waited for; those that wait for something
to happen (IOCB_CMD_POLL) stand against the dump. Where nobody may look at the kernel, their events are lost, and the
log says so.
"""

from __future__ import annotations

import struct
import time

from firn.abi import mman, nr
from firn.errors import ImageError, KernelError, Obstacle
from firn.host import procfs
from firn.tracee import memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from firn.host.aiorequests import AioRequests
    from firn.tracee.program import Program

_HEADER = struct.Struct("<8I")
"""struct aio_ring: id, nr, head, tail, magic, compat_features, incompat_features, header_length."""
MAGIC = 0xA10A10A1
EVENT_SIZE = 32
_IOCB = struct.Struct("<QIiHhIQQqQII")
"""struct iocb: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved, flags, resfd (64 bytes)."""
_PREAD = 0
_BATCH = 256
_PATIENCE_S, _POLL_S = 0.02, 0.001
"""How long requests may take while the target stands still."""


def is_used(pid: int) -> bool:
    """Whether process *pid* has a context."""
    return procfs.read("/proc/sys/fs/aio-nr").strip() != b"0" and b" /[aio]" in procfs.read(f"/proc/{pid}/maps")


class Watch:
    """Sees requests in flight."""

    def __init__(self, requests: AioRequests) -> None:
        self._requests = requests

    @classmethod
    def make(cls, warn: Callable[[str], object]) -> Watch | None:
        """A watch, or None where nobody may look at the kernel; then the log is told. Takes 0.1 s."""
        from firn.host.aiorequests import AioRequests

        try:
            return cls(AioRequests())
        except (KernelError, OSError) as error:
            warn(f"requests in flight of AIO contexts cannot be seen here, and would be lost: {error}")
            return None

    def close(self) -> None:
        """Let go of the kernel's memory."""
        self._requests.close()

    def check(self, pid: int, voice: int, obstacles: list[Obstacle]) -> None:
        """Give the requests of frozen process *pid* a moment to end, and note those that do not."""
        deadline = time.monotonic() + _PATIENCE_S
        while flying := [each for each in self._requests.of(voice) if each[1]]:
            waiting = any(waits for _, _, waits in flying)
            if waiting or time.monotonic() > deadline:
                ring, count, _ = flying[0]
                reason = f"the AIO context {ring:#x} has requests in flight: {count}"
                reason += ", which wait for something to happen (IOCB_CMD_POLL)" if waiting else ""
                obstacles.append(Obstacle(f"process {pid}", reason, "cancel them, or try again later", passing=True))
                return
            time.sleep(_POLL_S)


def save(pid: int, start: int, end: int) -> dict[str, Any]:
    """The aio_ring_entry of the ring at [start, end)."""
    magic = _HEADER.unpack(memory.read(pid, start, _HEADER.size))[4]
    if magic != MAGIC:
        raise ImageError(f"process {pid}: the AIO ring at {start:#x} has no header")
    # The kernel doubles the request, adds two events and the header, and rounds up to pages (ioctx_alloc).
    return {"id": start, "nr_req": (end - start - _HEADER.size) // (2 * EVENT_SIZE) - 1, "ring_len": end - start}


def unfetched(ring: bytes) -> bytes:
    """The events in a saved ring that were not fetched, oldest first."""
    _, slots, head, tail, magic, *_ = _HEADER.unpack_from(ring)
    if magic != MAGIC or not slots or _HEADER.size + slots * EVENT_SIZE > len(ring) or head >= slots or tail >= slots:
        raise ImageError("pages image: an AIO ring has an impossible header")
    count = (tail - head) % slots
    places = ((head + index) % slots for index in range(count))
    return b"".join(ring[_HEADER.size + at * EVENT_SIZE : _HEADER.size + (at + 1) * EVENT_SIZE] for at in places)


def rebuild(program: Program, entry: dict[str, Any], events: bytes) -> None:
    """Make the context of *entry* in the task, with *events* waiting in it. Runs the program."""
    program.run()
    at = program.buffer(8)
    program.call(f"io_setup for {entry['nr_req']} requests", nr.io_setup, entry["nr_req"], at)
    program.run()
    made: int = struct.unpack("<Q", program.read(at, 8))[0]
    program.call(
        f"mremap AIO ring to {entry['id']:#x}", nr.mremap, made, entry["ring_len"], entry["ring_len"],
        mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED, entry["id"],
    )  # fmt: skip
    count = len(events) // EVENT_SIZE
    if not count:
        return
    path = program.text("/dev/null")
    opened = program.call("open /dev/null", nr.open, path, 0)
    program.run()
    fd = program.results[opened]
    for first in range(0, count, _BATCH):
        _complete(program, entry["id"], fd, min(_BATCH, count - first))
    program.call("close", nr.close, fd)
    program.run()
    memory.write(program.runner.pid, entry["id"] + _HEADER.size, events)


def _complete(program: Program, context: int, fd: int, count: int) -> None:
    """Have *count* requests complete."""
    program.reserve(1, count * (_IOCB.size + 8) + 64)
    request = _IOCB.pack(0, 0, 0, _PREAD, 0, fd, 0, 0, 0, 0, 0, 0)
    table = program.data(request * count)
    pointers = program.data(struct.pack(f"<{count}Q", *(table + index * _IOCB.size for index in range(count))))
    call = program.call("io_submit", nr.io_submit, context, count, pointers)
    program.run()
    if program.results[call] != count:
        raise ImageError(f"AIO context {context:#x}: only {program.results[call]} of {count} events could be made")
