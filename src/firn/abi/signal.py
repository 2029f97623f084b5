"""signal(7): numbers, sigaction(2) and siginfo layouts of x86-64. Source: arch/x86/include/uapi/asm/signal.h."""

from __future__ import annotations

import struct

SIGHUP = 1
SIGINT = 2
SIGKILL = 9
SIGUSR1 = 10
SIGALRM = 14
SIGTERM = 15
SIGCHLD = 17
SIGCONT = 18
SIGSTOP = 19
SIGTSTP = 20
SIGTTIN = 21
SIGTTOU = 22
SIGURG = 23
SIGWINCH = 28
SIGTRAP = 5
STOP_SIGNALS = frozenset((SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU))
LAST = 64

SIG_DFL = 0
SIG_IGN = 1

SA_RESTORER = 0x04000000

SIGACTION = struct.Struct("<4Q")
"""The kernel's struct sigaction: handler, flags, restorer, mask (32 bytes)."""
SIGINFO_SIZE = 128
STACK_T = struct.Struct("<QiiQ")
"""stack_t: ss_sp, ss_flags, padding, ss_size (24 bytes)."""
SS_ONSTACK = 1
SS_DISABLE = 2
SS_AUTODISARM = 1 << 31

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
SIGEVENT = struct.Struct("<QiiiI40x")
"""struct sigevent: sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id (64 bytes)."""


def bit(number: int) -> int:
    """The bit of signal *number* in a sigset_t."""
    return 1 << (number - 1)


ALL = (1 << 64) - 1
