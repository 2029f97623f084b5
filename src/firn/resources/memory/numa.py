"""NUMA policies of single mappings (mbind(2); those of threads: :mod:`firn.resources.policies`).

State owned: the policy of a mapping, where it is another than its process's. Kernel: /proc/PID/numa_maps (numa(7)).
To read that walks all page tables, so it is read only on machines where memory has more than one node. It comes back by
mbind(2) before pages are read in, so that these come from the right nodes. What goes wrong: nodes that this machine
does not have; then the mapping has no policy. Home nodes (set_mempolicy_home_node(2)) are not shown.
"""

from __future__ import annotations

import errno

from firn.abi import nr
from firn.abi import policies as pol
from firn.host import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from firn.resources.memory.areas import Area
    from firn.tracee.program import Program

_MODES = {
    "weighted interleave": pol.MPOL_WEIGHTED_INTERLEAVE, "prefer (many)": pol.MPOL_PREFERRED_MANY,
    "interleave": pol.MPOL_INTERLEAVE, "prefer": pol.MPOL_PREFERRED, "local": pol.MPOL_LOCAL, "bind": pol.MPOL_BIND,
    "default": pol.MPOL_DEFAULT,
}  # fmt: skip
"""The names of mm/mempolicy.c; longer ones come before what they begin with."""
_FLAGS = {
    "static": pol.MPOL_F_STATIC_NODES, "relative": pol.MPOL_F_RELATIVE_NODES, "balancing": pol.MPOL_F_NUMA_BALANCING,
}  # fmt: skip
_NODES = 1024
_MASK = _NODES // 8


def parse(text: str) -> tuple[int, bytes]:
    """(Mode with flags, mask of nodes) of a line of numa_maps behind its address; mode 0 for what is not known."""
    name = next((name for name in _MODES if text.startswith(name)), "")
    if not name:
        return pol.MPOL_DEFAULT, b""
    flags, _, nodes = text[len(name) :].split(" ", 1)[0].partition(":")
    mode, mask = _MODES[name], 0
    for flag in flags.removeprefix("=").split("|"):
        mode |= _FLAGS.get(flag, 0)
    for part in nodes.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            for node in range(int(first), min(int(last or first), _NODES - 1) + 1):
                mask |= 1 << node
    return mode, mask.to_bytes((mask.bit_length() + 7) // 8, "little")


_nodes: list[bool] = []


def has_nodes() -> bool:
    """Whether memory has more than one node."""
    if not _nodes:
        try:
            _nodes.append(len(procfs.read("/sys/devices/system/node/has_memory").strip()) > 1)
        except OSError:
            _nodes.append(False)
    return _nodes[0]


def collect(pid: int, areas: list[Area], own: tuple[int, bytes]) -> None:
    """Note the policies of *areas* of frozen process *pid*, if they are not *own*, its first thread's: numa_maps shows
    that for mappings without one."""
    if not has_nodes():
        return
    try:
        lines = procfs.read(f"/proc/{pid}/numa_maps").decode("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return
    found = {int(at, 16): parse(text) for at, _, text in (line.partition(" ") for line in lines)}
    for area in areas:
        policy = found.get(area.map.start, own)
        if policy[0] != pol.MPOL_DEFAULT and policy != own:
            area.numa = policy


def plan(program: Program, vmas: list[dict[str, Any]]) -> None:
    """Give the new mappings their policies."""
    for vma in vmas:
        own = vma.get("firn", {})
        if not own.get("numa_mode"):
            continue
        start, length, nodes = vma["start"], vma["end"] - vma["start"], own.get("numa_nodes", b"")[:_MASK]
        program.reserve(1, _MASK)
        at = program.data(nodes.ljust(_MASK, b"\0")) if nodes else 0
        last = _NODES + 1 if nodes else 0
        program.call(f"mbind {start:#x}", nr.mbind, start, length, own["numa_mode"], at, last, 0, allow=errno.EINVAL)
