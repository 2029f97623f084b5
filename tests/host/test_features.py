"""The questions that the dump and the restore ask: truthful, asked once, cheap to import, and traceless."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from host.sandbox import FULL, capability, denied, deny, kernel_config

from firn.abi import nr, ptrace
from firn.abi import probe_consts as pc
from firn.check.isolate import NO, YES, run
from firn.host import features

QUESTIONS: dict[str, Callable[[], bool]] = {
    question.__name__: question
    for question in (
        features.pagemap_scan,
        features.pagemap_scan_guard,
        features.pidfd_getfd,
        features.clone3_set_tid,
        features.timer_restore_ids,
        features.time_namespace,
        features.rseq_configuration,
        features.map_vdso,
        features.madvise_guard,
        features.membarrier_registrations,
        features.suspend_seccomp,
    )
}

# The system call without which each of them must say no.
CALLS = {
    "pagemap_scan": nr.ioctl,
    "pagemap_scan_guard": nr.ioctl,
    "pidfd_getfd": nr.pidfd_getfd,
    "clone3_set_tid": nr.clone3,
    "timer_restore_ids": nr.prctl,
    "time_namespace": nr.newfstatat,
    "rseq_configuration": nr.ptrace,
    "map_vdso": nr.arch_prctl,
    "madvise_guard": nr.madvise,
    "membarrier_registrations": nr.membarrier,
    "suspend_seccomp": nr.ptrace,
}

CONFIG = {
    "timer_restore_ids": "POSIX_TIMERS",
    "time_namespace": "TIME_NS",
    "rseq_configuration": "RSEQ",
    "map_vdso": "CHECKPOINT_RESTORE",
    "membarrier_registrations": "MEMBARRIER",
    "suspend_seccomp": "SECCOMP_FILTER",
}

_FORBIDDEN = (
    "typing dataclasses enum re signal socket argparse subprocess pathlib logging json collections contextlib "
    "functools importlib traceback"
)


def _python(code: str) -> str:
    source = Path(features.__file__).parents[2]
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(source)!r})\n{code}"]
    return subprocess.run(bare, capture_output=True, text=True, timeout=60, check=True).stdout


def test_importing_and_asking_stays_lean() -> None:
    calls = "".join(f"features.{name}()\n" for name in QUESTIONS)
    code = (
        "before = set(sys.modules)\nfrom firn.host import features\nassert not features._answers\n"
        f"{calls}features.userfaultfd_features(); features.cap_last_cap(); features.effective_caps()\n"
        f"print(*sorted((set(sys.modules) - before) & set('{_FORBIDDEN}'.split())))"
    )
    assert _python(code).split() == []


@pytest.mark.parametrize("name", QUESTIONS)
def test_answer_is_a_truth_value_with_a_reason(name: str) -> None:
    answer = QUESTIONS[name]()
    assert isinstance(answer, bool)
    assert answer is (name not in features.refusals)
    assert QUESTIONS[name].__doc__


@pytest.mark.parametrize("name", QUESTIONS)
def test_asked_once(name: str) -> None:
    def probe() -> None:
        first = QUESTIONS[name]()
        deny([CALLS[name]])
        assert QUESTIONS[name]() is first

    assert run(probe).state == YES


@pytest.mark.parametrize("name", QUESTIONS)
def test_poorer_kernel_is_noticed(name: str) -> None:
    def probe() -> None:
        assert QUESTIONS[name]() is False
        assert features.refusals[name]

    finding = run(denied(probe, [CALLS[name]]))
    assert finding.state == YES, finding.reason


@pytest.mark.parametrize("name", QUESTIONS)
def test_unrelated_errors_are_no_answer(name: str) -> None:
    def probe() -> None:
        try:
            QUESTIONS[name]()
        except OSError as error:
            assert error.errno == errno.ENOMEM
        else:
            raise AssertionError("no memory was taken for an answer")
        assert name not in features._answers

    finding = run(denied(probe, [CALLS[name]], errno.ENOMEM))
    assert finding.state == YES, finding.reason


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.skipif(not kernel_config(), reason="this kernel does not tell its configuration")
@pytest.mark.skipif(not FULL, reason="needs root")
def test_agrees_with_the_configuration(name: str) -> None:
    if CONFIG[name] not in kernel_config():
        assert not QUESTIONS[name]()
    elif name not in ("timer_restore_ids", "membarrier_registrations"):  # These came long after their options.
        assert QUESTIONS[name](), features.refusals[name]


def test_userfaultfd_features() -> None:
    found = features.userfaultfd_features()
    if kernel_config() and FULL:
        assert bool(found) is ("USERFAULTFD" in kernel_config())
    if found and "HAVE_ARCH_USERFAULTFD_WP" in kernel_config():
        assert found & 1  # UFFD_FEATURE_PAGEFAULT_FLAG_WP


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_userfaultfd_is_missed(code: int) -> None:
    def probe() -> None:
        assert features.userfaultfd_features() == 0
        assert "userfaultfd" in features.refusals["userfaultfd_features"]

    finding = run(denied(probe, [nr.userfaultfd], code))
    assert finding.state == YES, finding.reason


def test_last_capability() -> None:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        assert features.cap_last_cap() == int(file.read())


def test_last_capability_without_proc() -> None:
    def probe() -> None:
        assert features._ask_last_cap() == features.cap_last_cap()

    features.cap_last_cap()
    finding = run(denied(probe, [nr.openat], errno.EACCES))
    assert finding.state == YES, finding.reason


def test_effective_capabilities() -> None:
    found = features.effective_caps()
    assert [bool(found >> number & 1) for number in range(64)] == [capability(number) for number in range(64)]


def test_effective_capabilities_are_those_of_now() -> None:
    def probe() -> None:
        os.setresuid(65534, 65534, 65534)
        assert features.effective_caps() == 0

    if not features.effective_caps():
        pytest.skip("has no capabilities to lose")
    finding = run(probe)
    assert finding.state == YES, finding.reason


# -- The child for ptrace ---------------------------------------------------------------------------------------------


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("before", [None, lambda: None])
def test_stopped_child(before: Callable[[], None] | None) -> None:
    with features.StoppedChild(before=before) as pid:
        assert _state(pid) == "t"
        with open(f"/proc/{pid}/status") as file:
            assert f"TracerPid:\t{os.getpid()}\n" in file.readlines()
    assert not os.path.exists(f"/proc/{pid}")


def test_stopped_child_is_gone_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), features.StoppedChild() as pid:
        raise ZeroDivisionError
    assert not os.path.exists(f"/proc/{pid}")


def test_stopped_child_that_cannot_begin() -> None:
    def fail() -> None:
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError), features.StoppedChild(before=fail):
        pass
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_stopped_child_that_cannot_be_seized() -> None:
    impossible = 1 << 31
    with pytest.raises(OSError, match="seize") as caught, features.StoppedChild(impossible):
        pass
    assert caught.value.errno in (errno.EIO, errno.EINVAL)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_stopped_child_where_sigchld_is_ignored() -> None:
    def probe() -> None:
        import signal

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with features.StoppedChild() as pid:
            assert _state(pid) == "t"

    finding = run(probe)
    assert finding.state == YES, finding.reason


def test_stopped_child_dies_with_its_parent() -> None:
    reader, writer = os.pipe()

    def probe() -> None:
        with features.StoppedChild() as pid:
            os.write(writer, f"{pid}".encode())
            os._exit(0)

    assert run(probe).state == NO
    pid = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    for _ in range(500):
        if not os.path.exists(f"/proc/{pid}") or _state(pid) in "ZX":
            return
        time.sleep(0.01)
    raise AssertionError(f"the child {pid} lives on")


@pytest.mark.skipif(not FULL, reason="needs root")
def test_options_reach_the_kernel() -> None:
    with features.StoppedChild(ptrace.O_TRACESYSGOOD) as pid:
        from firn.abi.libc import address_of, syscall

        info = bytearray(88)
        assert syscall("info", nr.ptrace, pc.PTRACE_GET_SYSCALL_INFO, pid, len(info), address_of(info)) >= 24
