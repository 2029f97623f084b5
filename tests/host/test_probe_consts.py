"""The constants of the probes against the headers of this machine."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from firn.abi import probe_consts as pc

_HEADERS = (
    "linux/membarrier.h", "linux/prctl.h", "linux/userfaultfd.h", "linux/fs.h", "linux/audit.h",
    "linux/filter.h", "linux/seccomp.h", "linux/kcmp.h", "linux/inotify.h", "linux/timerfd.h",
    "linux/sockios.h", "linux/un.h", "linux/if_tun.h", "linux/openat2.h", "linux/aio_abi.h", "linux/tcp.h",
    "linux/in6.h", "linux/in.h", "asm/socket.h", "asm/ioctls.h", "linux/mount.h", "linux/sched.h",
    "linux/capability.h", "linux/netlink.h", "linux/sock_diag.h", "linux/inet_diag.h", "linux/unix_diag.h",
    "linux/packet_diag.h", "linux/netlink_diag.h", "linux/rtnetlink.h", "linux/if_link.h", "linux/if.h",
    "linux/net_namespace.h", "linux/veth.h", "linux/netfilter/nfnetlink.h", "linux/netfilter/nf_tables.h",
    "linux/netfilter.h", "linux/ptrace.h",
)  # fmt: skip

# Our structures, and the sizes that they must have.
_SIZES = {
    "UFFDIO_API_ARG": "sizeof(struct uffdio_api)",
    "UFFDIO_REGISTER_ARG": "sizeof(struct uffdio_register)",
    "BPF_RETURN": "sizeof(struct sock_filter)",
    "SOCK_FPROG": "sizeof(struct sock_fprog)",
    "KCMP_EPOLL_SLOT": "sizeof(struct kcmp_epoll_slot)",
    "OPEN_HOW": "sizeof(struct open_how)",
    "IOCB": "sizeof(struct iocb)",
    "INET_DIAG_REQ": "sizeof(struct inet_diag_req_v2)",
    "UNIX_DIAG_REQ": "sizeof(struct unix_diag_req)",
    "NETLINK_DIAG_REQ": "sizeof(struct netlink_diag_req)",
    "IFINFOMSG": "sizeof(struct ifinfomsg)",
    "SYSCALL_INFO_HEAD": "offsetof(struct ptrace_syscall_info, entry)",
}
# Numbers that have no name, or another one, in the headers.
_EXPRESSIONS = {
    "IO_EVENT_SIZE": "sizeof(struct io_event)",
    "INET_DIAG_INODE": "offsetof(struct inet_diag_msg, idiag_inode)",
    "USER_DEBUGREG": "offsetof(struct user, u_debugreg)",
    "BPF_RET_K": "BPF_RET | BPF_K",
    "SIOCUNIXFILE": "SIOCPROTOPRIVATE",
    "PTRACE_POKEUSER": "PTRACE_POKEUSR",
}
# Newer than the headers that a distribution may have, or only in the documentation.
_MAY_BE_MISSING = {
    "PAGEMAP_SOFT_DIRTY", "PM_SCAN_CHECK_WPASYNC", "PM_SCAN_WP_MATCHING", "PR_TIMER_CREATE_RESTORE_IDS_GET",
    "UFFD_FEATURE_WP_ASYNC", "UFFD_FEATURE_WP_UNPOPULATED", "MEMBARRIER_CMD_GET_REGISTRATIONS", "NETLINK_SOCK_DIAG",
}  # fmt: skip


def _expressions() -> dict[str, tuple[int, str]]:
    """Name -> our value, and the header's way to say it."""
    found = {}
    for name, value in vars(pc).items():
        if isinstance(value, struct.Struct):
            found[name] = (value.size, _SIZES[name])
        elif isinstance(value, int):
            found[name] = (value, _EXPRESSIONS.get(name, name))
    return found


def _compiled(expressions: dict[str, str], directory: Path) -> tuple[dict[str, int], set[str]]:
    """The values of C *expressions* by name, and the names of those that the headers do not know."""
    head = ["#include <stddef.h>", "#include <stdio.h>", "#include <sys/user.h>"]
    head += [f"#include <{header}>" for header in _HEADERS]
    names = list(expressions)
    rows = [f"unsigned long long v{number} = {expressions[name]};" for number, name in enumerate(names)]
    shown = "".join(f'printf("{name} %llu\\n", v{number});' for number, name in enumerate(names))
    program = directory / "constants"
    result = subprocess.run(
        ["gcc", "-fmax-errors=0", "-x", "c", "-o", str(program), "-"],
        input="\n".join([*head, *rows, f"int main(void) {{ {shown} return 0; }}"]),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if result.returncode:
        at = {int(line.split(":")[1]) - len(head) - 1 for line in result.stderr.splitlines() if ": error: " in line}
        unknown = {names[number] for number in at if number < len(names)}
        assert unknown, result.stderr
        found, _ = _compiled({name: e for name, e in expressions.items() if name not in unknown}, directory)
        return found, unknown
    output = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}, set()


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_constants(tmp_path: Path) -> None:
    ours = _expressions()
    theirs, unknown = _compiled({name: expression for name, (_, expression) in ours.items()}, tmp_path)
    assert unknown <= _MAY_BE_MISSING
    assert {name: ours[name][0] for name in theirs} == theirs
    assert len(theirs) > 80


def test_nothing_idle() -> None:
    """Every constant is used by a probe."""
    source = Path(pc.__file__).parents[1]
    users = [*source.glob("host/*.py"), *source.glob("check/*.py")]
    text = "".join(path.read_text() for path in users)
    assert [name for name in _expressions() if f".{name}" not in text] == []
