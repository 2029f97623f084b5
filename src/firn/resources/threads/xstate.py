"""The extended processor state (images: user_x86_fpregs_entry, user_x86_xsave_entry).

State owned: x87, SSE, AVX, AVX-512, PKRU, and whatever else XSAVE holds. Kernel: ptrace NT_X86_XSTATE. The image has an
array per component, so the offsets of the processor that dumped do not matter; components that CRIU has no array for
(AMX) are kept as a raw area in firn's own field.
"""

from __future__ import annotations

import struct

from firn.abi import x86_64 as cpu
from firn.abi.cpuid import xsave_layout
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.log import Log

_LEGACY = struct.Struct("<4H2Q2I")
COMPONENTS = (
    (2, "ymmh_space", 64, "I"), (3, "bndreg_state", 8, "Q"), (4, "bndcsr_state", 8, "Q"), (5, "opmask_reg", 8, "Q"),
    (6, "zmm_upper", 64, "Q"), (7, "hi16_zmm", 128, "Q"), (9, "pkru", 2, "I"),
)  # fmt: skip
"""Component number, field, elements, element type."""
_DEFAULT_PKRU = [0x55555554, 0]
"""What every thread has until it uses protection keys (arch/x86/kernel/cpu/common.c, init_pkru): no state that a
processor without them lacks."""
_KNOWN = 3 | sum(1 << number for number, _, _, _ in COMPONENTS)


def save(area: bytes) -> tuple[dict[str, Any], bytes]:
    """(user_x86_fpregs_entry, raw area if it holds components without a field, else b"")."""
    cwd, swd, twd, fop, rip, rdp, mxcsr, mask = _LEGACY.unpack_from(area)
    entry: dict[str, Any] = {
        "cwd": cwd, "swd": swd, "twd": twd, "fop": fop, "rip": rip, "rdp": rdp, "mxcsr": mxcsr, "mxcsr_mask": mask,
        "st_space": list(struct.unpack_from("<32I", area, 32)),
        "xmm_space": list(struct.unpack_from("<64I", area, 160)),
    }  # fmt: skip
    if len(area) < cpu.XSAVE_MIN:
        return entry, b""
    bits = int.from_bytes(area[512:520], "little")
    xsave: dict[str, Any] = {"xstate_bv": bits, "ymmh_space": []}
    layout = xsave_layout()
    for number, field, count, kind in COMPONENTS:
        if number in layout and layout[number][0] + layout[number][1] <= len(area):
            xsave[field] = list(struct.unpack_from(f"<{count}{kind}", area, layout[number][0]))
    entry["xsave"] = xsave
    return entry, area if bits & ~_KNOWN else b""


def check(tid: int, info: dict[str, Any], forced: bool, log: Log) -> None:
    """Look for components in use that this processor lacks. *info* is the thread's thread_info_x86.

    By the calling convention (System V ABI for x86-64, 3.2.1) a thread that waits in a system call holds nothing in
    them, so they are dropped, with a warning. Raises RestoreError for any other thread, unless *forced*.
    """
    xsave, layout = info["fpregs"].get("xsave", {}), xsave_layout()
    lacking = [
        field
        for number, field, _, _ in COMPONENTS
        if number not in layout and xsave.get("xstate_bv", 0) >> number & 1
        and any(xsave.get(field, [])) and xsave[field] != _DEFAULT_PKRU
    ]  # fmt: skip
    if not lacking:
        return
    what = f"thread {tid} has used processor state that this processor lacks ({', '.join(lacking)})"
    waits = not info["gpregs"].get("orig_ax", cpu.NO_SYSCALL) >> 63
    if not waits and not forced:
        raise RestoreError(what, "restore on the same kind of processor, or use --cpu-cap=none to lose it")
    log.warn(f"{what}: it is dropped; instructions that need it will end the program by SIGILL")


def load(entry: dict[str, Any], raw: bytes, template: bytes) -> bytes:
    """The XSAVE area to set; *template* is the current one of the thread to be set (it has this machine's size)."""
    area = bytearray(len(template))
    xsave = entry.get("xsave", {})
    bits = xsave.get("xstate_bv", 3) | 3
    if raw:
        if len(raw) != len(template):
            raise RestoreError(
                f"the checkpoint holds {len(raw)} bytes of extended processor state, "
                f"this processor has {len(template)}",
                "restore on the same kind of processor",
            )
        area[:] = raw
    _LEGACY.pack_into(
        area, 0, *(entry[name] for name in ("cwd", "swd", "twd", "fop", "rip", "rdp", "mxcsr")),
        entry.get("mxcsr_mask") or 0xFFFF,
    )  # fmt: skip
    for name, count, offset in (("st_space", 32, 32), ("xmm_space", 64, 160)):
        if len(entry.get(name, [])) != count:
            raise ImageError(f"core image: {name} has {len(entry.get(name, []))} words instead of {count}")
        struct.pack_into(f"<{count}I", area, offset, *entry[name])
    have = int.from_bytes(template[cpu.SW_RESERVED : cpu.SW_RESERVED + 8], "little")
    layout = xsave_layout()
    used = 3 | (bits & have if raw else 0)
    for number, field, count, kind in COMPONENTS:
        values = xsave.get(field, [])
        if not values or not bits >> number & 1:
            continue
        if len(values) != count:
            raise ImageError(f"core image: {field} has {len(values)} elements instead of {count}")
        if number not in layout or not have >> number & 1:
            continue  # see check
        struct.pack_into(f"<{count}{kind}", area, layout[number][0], *values)
        used |= 1 << number
    if len(area) >= cpu.XSAVE_MIN:
        area[cpu.SW_RESERVED : cpu.SW_RESERVED + 8] = template[cpu.SW_RESERVED : cpu.SW_RESERVED + 8]
        struct.pack_into("<Q", area, 512, used)
    return bytes(area)
