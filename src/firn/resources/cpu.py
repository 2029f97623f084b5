"""What the processor can do (image: cpuinfo.img), compared before a checkpoint made on another one is restored.

State owned: none of a process; vendor, capability words and size of the extended state of the machine. Kernel: the
CPUID instruction itself, as programs see it. The words are in the order of the kernel's feature words
(arch/x86/include/asm/cpufeatures.h); those that Linux makes up or that no current processor has are 0. What goes wrong:
a program has found out once what it may use, so a processor that lacks an instruction kills it much later.
"""

from __future__ import annotations

from firn.abi import cpuid
from firn.errors import ImageError, RestoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.images.store import ImageDir

FPU, CPU, INS = 1, 2, 4
"""What is compared: the extended state, everything, the instructions."""
_VENDORS = {b"GenuineIntel": 1, b"AuthenticAMD": 2}
_VERSION, _WORDS = 2, 19
_EAX, _EBX, _ECX, _EDX = range(4)
_SOURCES = {
    0: (1, 0, _EDX), 1: (0x80000001, 0, _EDX), 4: (1, 0, _ECX), 6: (0x80000001, 0, _ECX), 9: (7, 0, _EBX),
    10: (0xD, 1, _EAX), 11: (0xF, 0, _EDX), 12: (0xF, 1, _EDX), 13: (0x80000008, 0, _EBX), 14: (6, 0, _EAX),
    15: (0x8000000A, 0, _EDX), 16: (7, 0, _ECX), 17: (0x80000007, 0, _EBX), 18: (7, 0, _EDX),
}  # fmt: skip
"""Word -> (leaf, subleaf, register) of CPUID."""
_INSTRUCTIONS = {
    0: (0, 4, 8, 11, 15, 19, 23, 24, 25, 26),
    1: (11, 22, 25, 27, 29, 30, 31),
    4: (0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 27, 28, 29, 30),
    6: (0, 5, 6, 7, 8, 11, 15, 16, 21),
    9: (0, 3, 4, 5, 8, 9, 11, 14, 16, 17, 18, 19, 21, 23, 24, 26, 27, 28, 29, 30, 31),
    10: (0, 1, 2),
    13: (0,),
    16: (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 22, 25, 27, 28, 29),
    18: (2, 3, 4, 5, 8, 14, 16, 20, 22, 23, 24, 25),
}
"""Word -> the bits that stand for instructions which user programs may find and use (Intel SDM vol. 2, AMD APM vol. 3,
CPUID)."""
_STATE = {0: (0, 24), 4: (27,), 10: (3,)}
"""FPU, FXSR, OSXSAVE, XSAVES."""


def _bits(bits: tuple[int, ...]) -> int:
    return sum(1 << bit for bit in bits)


def read() -> dict[str, Any]:
    """The cpuinfo_x86_entry of this processor."""
    ask = cpuid.ask()
    highest, *name = ask(0)
    highest_extended = ask(0x80000000)[0]
    signature = ask(1)[0]
    family, model = signature >> 8 & 15, signature >> 4 & 15
    model |= (signature >> 16 & 15) << 4 if family in (6, 15) else 0
    family += signature >> 20 & 255 if family == 15 else 0
    words = [0] * _WORDS
    for word, (leaf, subleaf, register) in _SOURCES.items():
        if leaf <= (highest_extended if leaf >> 31 else highest):
            words[word] = ask(leaf, subleaf)[register]
    vendor = b"".join(value.to_bytes(4, "little") for value in (name[0], name[2], name[1]))
    brand = b"".join(value.to_bytes(4, "little") for leaf in (2, 3, 4) for value in ask(0x80000000 | leaf))
    state = ask(0xD) if highest >= 0xD else (0, 0, 0, 0)
    return {
        "vendor_id": _VENDORS.get(vendor, 0), "cpu_family": family, "model": model, "stepping": signature & 15,
        "capability_ver": _VERSION, "capability": words,
        "model_id": brand.split(b"\0")[0].decode("ascii", "replace").strip(),
        "xfeatures_mask": state[_EAX] | state[_EDX] << 32, "xsave_size": state[_EBX], "xsave_size_max": state[_ECX],
    }  # fmt: skip


def save(images: ImageDir) -> None:
    """Write cpuinfo.img."""
    images.write_one("CPUINFO", {"x86_entry": [read()]})


def check(images: ImageDir, what: int) -> None:
    """Compare cpuinfo.img with this processor as *what* (FPU, CPU, INS) asks. Raises ImageError if it is not there or
    says nothing that can be compared, RestoreError if the processor is no match."""
    if not images.exists("CPUINFO"):
        raise ImageError("cpuinfo.img is not there: the dump was made without --cpu-cap")
    entries = images.read_one("CPUINFO").get("x86_entry", [])
    if len(entries) != 1:
        raise ImageError(f"cpuinfo.img describes {len(entries)} x86 processors instead of one")
    there = entries[0]
    words = there.get("capability", [])
    if there["vendor_id"] not in _VENDORS.values() or there["capability_ver"] not in (1, _VERSION):
        raise ImageError("cpuinfo.img: unknown processor vendor, or version of the capability words")
    wrong = differences(there | {"capability": [*words, *[0] * (_WORDS - len(words))]}, read(), what)
    if wrong:
        raise RestoreError(f"this processor is no match for that of the dump: {'; '.join(wrong)}", "see --cpu-cap")


def differences(there: dict[str, Any], here: dict[str, Any], what: int) -> list[str]:
    """What speaks against restoring on *here* what was dumped on *there*, both as :func:`read` gives them."""
    wrong = []
    if there["vendor_id"] != here["vendor_id"] and what & CPU:
        wrong.append("it is of another vendor")
    for flag, table, name in ((FPU, _STATE, "it lacks state"), (INS, _INSTRUCTIONS, "it lacks instructions")):
        for word, bits in table.items():
            missing = there["capability"][word] & ~here["capability"][word] & _bits(bits)
            if what & flag and missing:
                wrong.append(f"{name} (word {word}, bits {missing:#x})")
    if what & CPU:
        wrong += [
            f"word {word} differs ({one:#x}, {other:#x})"
            for word, (one, other) in enumerate(zip(there["capability"], here["capability"], strict=False))
            if one != other
        ]
    if what & FPU:
        if there.get("xfeatures_mask", 0) & ~here["xfeatures_mask"]:
            wrong.append(f"it has extended states {here['xfeatures_mask']:#x}, not {there['xfeatures_mask']:#x}")
        wrong += [
            f"{name} is {here[name]}, not {there[name]}"
            for name in ("xsave_size", "xsave_size_max")
            if there.get(name, here[name]) != here[name]
        ]
    return wrong
