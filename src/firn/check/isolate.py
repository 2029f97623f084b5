"""Running one probe in a process of its own, so that it may crash, hang or change itself as it likes."""

from __future__ import annotations

import gc
import os
import select
import signal
import time

from firn.abi import nr, prctl
from firn.abi.libc import syscall
from firn.errors import FirnError
from firn.host.features import described

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Probe = Callable[[], str | None]

YES, PARTLY, NO = "yes", "partly", "no"
SECONDS = 5.0
"""How long a probe may take, and then once more how long its processes may take to die."""
_LIMIT = 4096
_OVERDUE = b"\0"


class Finding:
    """What was found: *state* is :data:`YES`, :data:`PARTLY` or :data:`NO`, *reason* says why, *error* is an errno."""

    __slots__ = ("error", "reason", "state")

    def __init__(self, state: str, reason: str = "", error: int = 0) -> None:
        self.state = state
        self.reason = reason
        self.error = error


def run(probe: Probe, seconds: float = SECONDS) -> Finding:
    """Run *probe* in a child process with a process group of its own; all of it is gone afterwards.

    A probe that raises anything, dies, or takes longer than *seconds* finds "no".
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        return Finding(NO, f"no process can be made to try it: {error.strerror}", error.errno or 0)
    if not pid:
        _child(probe, writer)
    os.close(writer)
    _lead_group(pid)
    answer = _OVERDUE
    try:
        answer = _read_answer(reader, seconds)
    finally:
        os.close(reader)
        status = _end(pid, overdue=answer == _OVERDUE)
    if answer == _OVERDUE:
        return Finding(NO, f"trying it took longer than {seconds:g} s")
    if not answer:
        how = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended without an answer"
        return Finding(NO, f"the process that tried it was {how}")
    state, number, reason = answer.decode().split("\0", 2)
    return Finding(state, reason, int(number))


def _lead_group(pid: int) -> None:
    """Both sides do this, because either may need it first (setpgid(2))."""
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # It is so already, or the process has ended.


def _child(probe: Probe, writer: int) -> None:
    """The probe's process; never returns."""
    try:
        _lead_group(0)
        syscall("prctl", nr.prctl, prctl.SET_PDEATHSIG, signal.SIGKILL)
        while writer <= 2:
            writer = os.dup(writer)
        # What the probe's own programs or a crashing interpreter say is not for our user.
        nowhere = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        # Whoever listens to collections may look at the clock, and one probe moves the vdso away.
        gc.disable()
        # The default of SIGCHLD, because probes wait for children of their own.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.write(writer, _judge(probe).encode("ascii", "backslashreplace")[:_LIMIT])
    finally:
        os._exit(0)


def _judge(probe: Probe) -> str:
    """The answer as it goes through the pipe: state, errno, reason."""
    state, number = NO, 0
    try:
        reason = probe() or ""
        state = PARTLY if reason else YES
    except OSError as error:
        number, reason = error.errno or 0, described(error)
    except FirnError as error:
        reason = str(error)
    except Exception as error:
        reason = f"the probe failed: {type(error).__name__}: {error}"
    return f"{state}\0{number}\0{reason}"


def _read_answer(reader: int, seconds: float) -> bytes:
    """What the probe wrote: nothing if it died, :data:`_OVERDUE` if there is still no word."""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    return os.read(reader, _LIMIT) if poller.poll(seconds * 1000) else _OVERDUE


def _end(pid: int, overdue: bool) -> int:
    """See the probe's process off, kill what else is in its group, and reap what is ours; its wait status.

    The group is killed before its leader is reaped: until then nobody else can have the number.
    """
    deadline = time.monotonic() + SECONDS
    status = 0
    try:
        while not overdue and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            overdue = not _pause(deadline)
        os.killpg(pid, signal.SIGKILL)
        while True:
            ended, result = os.waitpid(-pid, os.WNOHANG)
            if ended == pid:
                status = result
            if not ended and not _pause(deadline):
                return status
    except (ChildProcessError, ProcessLookupError):
        return status


def _pause(deadline: float) -> bool:
    """Sleep a little; whether there is time for more."""
    time.sleep(0.0005)
    return time.monotonic() < deadline
