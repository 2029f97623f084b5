"""BPF programs without a compiler: loaded as instructions, run at once or attached to what a network device receives.

Everything ends with the descriptors, so nothing is left if firn is killed. Source: bpf(2).
"""

from __future__ import annotations

import errno
import os

from firn.abi import bpf, nr
from firn.abi.libc import address_of, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Line = tuple[int, int, int, int | str, int] | str

_LOG_SIZE = 1 << 14
LICENCE = b"GPL v2"
"""What the kernel is told of every program: it lets only those that are (also) under the GPL call what they need.

The tables of instructions that firn loads (:mod:`kernelmemory`, resources/sockets/admission.py) are its own work. They
may be used under the licence of the rest or the GNU GPL: SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
"""


def call(what: str, command: int, attr: bytes) -> tuple[int, bytearray]:
    """bpf(2): (its result, *attr* as it is afterwards). Raises :class:`OSError`."""
    buffer = bytearray(attr.ljust(bpf.ATTR_SIZE, b"\0"))
    return syscall(f"bpf: {what}", nr.bpf, command, address_of(buffer), len(buffer)), buffer


class Map:
    """A map with keys of four bytes. ``fd`` is its descriptor."""

    def __init__(self, kind: int, size: int, entries: int = 1) -> None:
        """*size* of a value in bytes. Raises :class:`OSError`."""
        self._size = size
        self.fd: Final = call("making a map", bpf.BPF_MAP_CREATE, bpf.MAP_CREATE.pack(kind, 4, size, entries))[0]

    def _element(self, command: int, number: int, value: bytearray | None) -> None:
        key = bytearray(number.to_bytes(4, "little"))
        where = address_of(value) if value is not None else 0
        call("an element of a map", command, bpf.MAP_ELEM.pack(self.fd, address_of(key), where, 0))

    def __setitem__(self, number: int, value: bytes) -> None:
        self._element(bpf.BPF_MAP_UPDATE_ELEM, number, bytearray(value))

    def __getitem__(self, number: int) -> bytes:
        value = bytearray(self._size)
        self._element(bpf.BPF_MAP_LOOKUP_ELEM, number, value)
        return bytes(value)

    def __delitem__(self, number: int) -> None:
        self._element(bpf.BPF_MAP_DELETE_ELEM, number, None)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


def assemble(lines: list[Line]) -> bytes:
    """Instructions from (operation, target, source, jump, constant), where a jump may be to a label: a line that is a
    string. A LOAD_IMM_64 takes two."""
    places: dict[str, int] = {}
    at = 0
    for line in lines:
        if isinstance(line, str):
            places[line] = at
        else:
            at += 1 + (line[0] == bpf.LOAD_IMM_64)
    code = b""
    for line in lines:
        if isinstance(line, str):
            continue
        operation, target, source, jump, constant = line
        if isinstance(jump, str):
            jump = places[jump] - len(code) // bpf.INSTRUCTION.size - 1
        code += bpf.INSTRUCTION.pack(operation, target | source << 4, jump, constant)
        if operation == bpf.LOAD_IMM_64:
            code += bpf.INSTRUCTION.pack(0, 0, 0, 0)
    return code


def load(kind: int, code: bytes, name: bytes, attach_type: int = 0) -> int:
    """The descriptor of a program of this *kind* (BPF_PROG_TYPE_*). Raises :class:`OSError`; if the kernel's verifier
    does not accept it, with the end of what it says."""
    instructions, text, log = bytearray(code), bytearray(LICENCE + b"\0"), bytearray(_LOG_SIZE)
    count = len(code) // bpf.INSTRUCTION.size
    head = bpf.PROG_LOAD.pack(kind, count, address_of(instructions), address_of(text))

    def attr(level: int) -> bytes:
        report = (level, len(log), address_of(log)) if level else (0, 0, 0)
        return head + bpf.PROG_LOAD_REST.pack(*report, 0, 0, name, 0, attach_type)

    try:
        return call("loading a program", bpf.BPF_PROG_LOAD, attr(0))[0]
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        refused = error
    try:
        return call("loading a program", bpf.BPF_PROG_LOAD, attr(1))[0]
    except OSError:
        said = log.rstrip(b"\0").decode("ascii", "replace").strip().splitlines()[-3:]
        raise OSError(refused.errno, f"{refused.strerror}: {' / '.join(said)}") from None


def run(program: int, context: bytes) -> int:
    """What *program* of BPF_PROG_TYPE_RAW_TRACEPOINT returns (32 bits) if it is run now. Raises :class:`OSError`."""
    buffer = bytearray(context)
    attr = bpf.TEST_RUN.pack(program, 0, 0, 0, 0, 0, 0, 0, len(buffer), 0, address_of(buffer))
    returned: int = bpf.TEST_RUN.unpack_from(call("running a program", bpf.BPF_PROG_TEST_RUN, attr)[1])[1]
    return returned


def attach(program: int, device: int) -> int:
    """The descriptor of a link: *program* sees first what *device* (its index) receives, in our network namespace,
    until it is closed. Raises :class:`OSError` (EINVAL before Linux 6.6)."""
    attr = bpf.LINK_CREATE.pack(program, device, bpf.BPF_TCX_INGRESS, bpf.BPF_F_BEFORE, 0, 0)
    return call("attaching a program", bpf.BPF_LINK_CREATE, attr)[0]
