"""waitid(2). Source: include/uapi/linux/wait.h, include/uapi/asm-generic/siginfo.h."""

from __future__ import annotations

P_PID = 1
WNOHANG = 0x00000001
WSTOPPED = 0x00000002
WCONTINUED = 0x00000008
WNOWAIT = 0x01000000
SI_PID = 16
"""Where si_pid is in a siginfo_t of SIGCHLD."""
