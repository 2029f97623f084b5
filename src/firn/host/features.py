"""What this kernel offers, found by trying it: never by its version.

Each function answers one question, at most once per process, and only when asked. ``False`` means "cannot be used
here", be it not built, not permitted or filtered away: :data:`refusals` then has the kernel's own words. An error that
says something else (no memory, no more files) is raised as :class:`OSError`.

The dump and the restore ask on their way, so this module imports next to nothing. The questions that only
``firn check`` asks are in the ``probes_*`` modules next to this one.
"""

from __future__ import annotations

import errno
import os
import struct

from firn.abi import mman, nr, prctl, probe_consts, ptrace, sched, signal
from firn.abi.libc import address_of, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ABSENT = frozenset(
    (
        errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.ENXIO, errno.ENODEV,
        errno.E2BIG, errno.EIO, errno.ENOENT, errno.EPERM, errno.EACCES,
    )
)  # fmt: skip

refusals: dict[str, str] = {}
"""Why an ability is absent, by the name of its function here."""
_answers: dict[str, bool] = {}


def described(error: OSError) -> str:
    """The words of *error*, with the file that it is about, without its number."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


def _ability(attempt: Callable[[], object]) -> Callable[[], bool]:
    """Make a question of *attempt*, which returns if the ability is there and raises :class:`OSError` if not."""
    name = attempt.__name__

    def answer() -> bool:
        if name not in _answers:
            try:
                attempt()
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                refusals[name] = described(error)
            _answers[name] = name not in refusals
        return _answers[name]

    answer.__name__ = answer.__qualname__ = name
    answer.__doc__ = attempt.__doc__
    return answer


class StoppedChild:
    """A child process of ours, seized and stopped, for trying ptrace(2) requests; gone after the ``with`` block.

    *options* are PTRACE_O_* bits for PTRACE_SEIZE; the kernel's refusal of them is raised on entry (:class:`OSError`).
    *before* is run by the child first; its :class:`OSError` is raised here, and there is no child then. The value of
    the ``with`` is the child's pid.
    """

    __slots__ = ("_before", "_options", "_pid")

    def __init__(self, options: int = 0, before: Callable[[], object] | None = None) -> None:
        self._options = options | ptrace.O_EXITKILL
        self._before = before
        self._pid = 0

    def __enter__(self) -> int:
        self._pid = os.fork()
        if not self._pid:
            self._live()
        try:
            if self._before:
                self._await_stop()
            syscall("ptrace seize", nr.ptrace, ptrace.SEIZE, self._pid, 0, self._options)
            if not self._before:
                syscall("ptrace interrupt", nr.ptrace, ptrace.INTERRUPT, self._pid, 0, 0)
            os.waitpid(self._pid, ptrace.WALL)
        except BaseException:
            self.__exit__()
            raise
        return self._pid

    def __exit__(self, *_: object) -> None:
        if not self._pid:
            return
        try:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, ptrace.WALL)
        except (ProcessLookupError, ChildProcessError):
            pass  # It has ended; where SIGCHLD is ignored, the kernel has reaped it too.

    def _live(self) -> None:
        """What the child does; it never returns, and does not outlive its parent."""
        try:
            syscall("prctl", nr.prctl, prctl.SET_PDEATHSIG, signal.SIGKILL)
            if self._before:
                self._before()
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                syscall("pause", nr.pause)
        except OSError as error:
            os._exit(error.errno or errno.EIO)
        finally:
            os._exit(errno.EIO)

    def _await_stop(self) -> None:
        pid, self._pid = self._pid, 0
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            code = os.WEXITSTATUS(status) or errno.EIO
            raise OSError(code, f"in a child made for ptrace(2): {os.strerror(code)}")
        self._pid = pid


# -- Memory ---------------------------------------------------------------------------------------------------------


def _scan_nothing(categories: int) -> None:
    """PAGEMAP_SCAN of an empty range: only the request is judged (Documentation/admin-guide/mm/pagemap.rst)."""
    import fcntl

    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = mman.PM_SCAN_ARG.size
        inverted = mman.PAGE_IS_FILE | mman.PAGE_IS_PFNZERO
        arg = mman.PM_SCAN_ARG.pack(size, 0, 0, 0, 0, 0, 0, 0, inverted, inverted, categories, categories)
        fcntl.ioctl(fd, mman.PAGEMAP_SCAN, arg)
    finally:
        os.close(fd)


@_ability
def pagemap_scan() -> None:
    """Whether the PAGEMAP_SCAN ioctl lists the pages to save (Linux 6.7); else /proc/PID/pagemap is read."""
    _scan_nothing(mman.PAGE_IS_PRESENT | mman.PAGE_IS_SWAPPED | mman.PAGE_IS_HUGE | mman.PAGE_IS_WRITTEN)


@_ability
def pagemap_scan_guard() -> None:
    """Whether PAGEMAP_SCAN tells guard pages apart (Linux 6.15)."""
    _scan_nothing(mman.PAGE_IS_PRESENT | mman.PAGE_IS_SWAPPED | mman.PAGE_IS_GUARD)


@_ability
def madvise_guard() -> None:
    """Whether madvise(2) makes guard pages, MADV_GUARD_INSTALL (Linux 6.13)."""
    flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
    page = syscall("mmap", nr.mmap, 0, mman.PAGE, mman.PROT_READ | mman.PROT_WRITE, flags, -1, 0)
    try:
        syscall("MADV_GUARD_INSTALL", nr.madvise, page, mman.PAGE, mman.MADV_GUARD_INSTALL)
    finally:
        syscall("munmap", nr.munmap, page, mman.PAGE)


@_ability
def guard_flag() -> None:
    """Whether smaps marks mappings that have guard pages (VmFlags gu; those with a file have it since Linux 6.19)."""
    from firn.host import procfs

    flags = mman.MAP_SHARED | mman.MAP_ANONYMOUS
    page = syscall("mmap", nr.mmap, 0, mman.PAGE, mman.PROT_READ | mman.PROT_WRITE, flags, -1, 0)
    try:
        syscall("MADV_GUARD_INSTALL", nr.madvise, page, mman.PAGE, mman.MADV_GUARD_INSTALL)
        if not any(m.start <= page < m.end and "gu" in (m.flags or ()) for m in procfs.smaps(os.getpid())):
            raise OSError(errno.ENOENT, "smaps does not show guard pages")
    finally:
        syscall("munmap", nr.munmap, page, mman.PAGE)


@_ability
def map_vdso() -> None:
    """Whether arch_prctl(2) maps a vdso at a chosen address, ARCH_MAP_VDSO_64 (needs CONFIG_CHECKPOINT_RESTORE)."""
    try:
        syscall("ARCH_MAP_VDSO_64", nr.arch_prctl, prctl.ARCH_MAP_VDSO_64, 0)
    except OSError as error:
        # A process may have one vdso, and we have ours: the request itself was understood.
        if error.errno != errno.EEXIST:
            raise


_uffd: list[int] = []


def userfaultfd_features() -> int:
    """The UFFD_FEATURE_* bits that userfaultfd(2) has here, 0 if it cannot be used (faults of the kernel included)."""
    if not _uffd:
        try:
            _uffd.append(_ask_userfaultfd())
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            refusals["userfaultfd_features"] = described(error)
            _uffd.append(0)
    return _uffd[0]


def _ask_userfaultfd() -> int:
    import fcntl

    fd = syscall("userfaultfd", nr.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        request = probe_consts.UFFDIO_API_ARG.pack(probe_consts.UFFD_API, 0, 0)
        reply = fcntl.ioctl(fd, probe_consts.UFFDIO_API, request)
    finally:
        os.close(fd)
    features: int = probe_consts.UFFDIO_API_ARG.unpack(reply)[1]
    return features


# -- Processes and time -----------------------------------------------------------------------------------------------


@_ability
def pidfd_getfd() -> None:
    """Whether pidfd_getfd(2) copies a file descriptor out of another process (Linux 5.6)."""
    pidfd = syscall("pidfd_open", nr.pidfd_open, os.getpid(), 0)
    try:
        os.close(syscall("pidfd_getfd", nr.pidfd_getfd, pidfd, pidfd, 0))
    finally:
        os.close(pidfd)


@_ability
def clone3_set_tid() -> None:
    """Whether clone3(2) knows how to give a new task a chosen pid, set_tid (Linux 5.5).

    It needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN too: see :func:`effective_caps`.
    """
    # A set_tid array that cannot be read: a kernel that knows the field faults on it, before anything is cloned.
    args = bytearray(sched.CLONE_ARGS.pack(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 1, 1, 0))
    try:
        syscall("clone3", nr.clone3, address_of(args), len(args))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


@_ability
def timer_restore_ids() -> None:
    """Whether POSIX timers can be made with chosen ids, PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15); else in a loop."""
    get = probe_consts.PR_TIMER_CREATE_RESTORE_IDS_GET
    syscall("PR_TIMER_CREATE_RESTORE_IDS", nr.prctl, prctl.TIMER_CREATE_RESTORE_IDS, get, 0, 0, 0)


@_ability
def time_namespace() -> None:
    """Whether there are time namespaces (time_namespaces(7), Linux 5.6)."""
    os.stat("/proc/self/timens_offsets")


@_ability
def membarrier_registrations() -> None:
    """Whether membarrier(2) tells what a process has registered for (Linux 6.3)."""
    syscall("membarrier", nr.membarrier, probe_consts.MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0)


# -- Tracing ----------------------------------------------------------------------------------------------------------


@_ability
def rseq_configuration() -> None:
    """Whether ptrace(2) tells a thread's rseq area, PTRACE_GET_RSEQ_CONFIGURATION (Linux 5.13)."""
    area = bytearray(24)
    with StoppedChild() as pid:
        request = ptrace.GET_RSEQ_CONFIGURATION
        syscall("PTRACE_GET_RSEQ_CONFIGURATION", nr.ptrace, request, pid, len(area), address_of(area))


@_ability
def suspend_seccomp() -> None:
    """Whether a tracer may suspend seccomp filters, PTRACE_O_SUSPEND_SECCOMP (CAP_SYS_ADMIN, no filter of our own)."""
    with StoppedChild(ptrace.O_SUSPEND_SECCOMP):
        pass


# -- Capabilities -----------------------------------------------------------------------------------------------------

_last_cap: list[int] = []


def cap_last_cap() -> int:
    """The number of the last capability that the kernel knows (capabilities(7))."""
    if not _last_cap:
        _last_cap.append(_ask_last_cap())
    return _last_cap[0]


def _ask_last_cap() -> int:
    try:
        fd = os.open("/proc/sys/kernel/cap_last_cap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # Sandboxes hide /proc/sys; the bounding set answers too, up to the first number that is not valid.
        number = 0
        try:
            while True:
                syscall("PR_CAPBSET_READ", nr.prctl, prctl.CAPBSET_READ, number, 0, 0, 0)
                number += 1
        except OSError:
            return number - 1
    try:
        return int(os.read(fd, 16))
    finally:
        os.close(fd)


def effective_caps() -> int:
    """The effective capabilities of this process, now; bit n is capability n (capabilities(7))."""
    header = bytearray(prctl.CAP_HEADER.pack(prctl.CAP_VERSION_3, 0))
    data = bytearray(prctl.CAP_DATA.size)
    syscall("capget", nr.capget, address_of(header), address_of(data))
    low, _, _, high, _, _ = struct.unpack("<6I", data)
    return int(low) | int(high) << 32
