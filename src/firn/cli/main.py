"""The commands ``firn`` and ``criu``: which one it is called as decides (busybox style).

Here are the order of events, and the one place where errors become messages and exit statuses.
"""

from __future__ import annotations

import os
import sys

from firn import __version__
from firn.cli import commands
from firn.cli.parse import parse
from firn.cli.values import ShortUsage, ShowHelp, ShowVersion, atoi
from firn.errors import FirnError, UsageError
from firn.log import ERROR, Log, place_of
from firn.scripts import ScriptFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CRIU_VERSION = "4.2"
FAULTS = range(1, 139)
_SIGHUP, _SIGINT, _SIGTERM = 1, 2, 15  # asm-generic/signal.h


def console() -> None:
    """The entry point of the launcher: runs :func:`main` and ends the process."""
    code = main(sys.argv)
    # Nothing is left to clean up, and tearing the interpreter down takes milliseconds.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed by whoever started us
    os._exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command; the result is its exit status (CRIU's statuses; 128 + signal when interrupted)."""
    _fill_standard_descriptors()
    program = "criu" if os.path.basename(argv[0]) == "criu" else "firn"
    log = Log(program=program)
    request = commands.Request(program, log)
    _interruptible()
    try:
        try:
            return _run(list(argv), request)
        except ShowHelp:
            from firn.cli import usage

            commands.out(usage.full(program))
            return 0
        except ShowVersion:
            commands.out(f"Version: {CRIU_VERSION}\n" if program == "criu" else f"firn {__version__}\n")
            return 0
        except UsageError as error:
            _show_usage_error(request, error)
            return 1
    except (Exception, SystemExit) as error:
        return _report(request, error)
    finally:
        log.close()


def _run(argv: list[str], request: commands.Request) -> int:
    fault = os.environ.get("CRIU_FAULT")
    if fault is not None and atoi(fault) not in FAULTS:
        raise UsageError(f"CRIU_FAULT is not a fault's number: {fault}")
    if len(argv) < 2:
        commands.out(_short_usage(request.program))
        return 1
    request.words, request.values = parse(argv, request.program)
    request.log.level = request.values.get("verbosity", request.log.level)
    if fault is not None:
        request.log.info(f"CRIU_FAULT is set to {fault}")
    return commands.run(request)


def _short_usage(program: str) -> str:
    from firn.cli import usage

    return usage.short(program)


def _show_usage_error(request: commands.Request, error: UsageError) -> None:
    _maybe_traceback()
    if isinstance(error, ShortUsage) and error.raw:
        os.write(2, os.fsencode(f"{error}\n"))
    else:
        request.log.error(str(error), _place(error))
    if request.closing:
        request.log.record(ERROR, request.closing[1])
    if isinstance(error, ShortUsage) and request.program == "criu":
        commands.out(_short_usage("criu"))
    elif isinstance(error, ShortUsage):
        request.log.close()  # what was kept goes first
        os.write(2, b"Try: firn --help\n")


def _report(request: commands.Request, error: BaseException) -> int:
    """Say what ended the command; its exit status."""
    _maybe_traceback()
    if isinstance(error, SystemExit):  # of _interruptible
        code = int(error.code or 0)
        text = f"interrupted by signal {code - 128}"
    elif isinstance(error, ScriptFailed) and error.action == "post-dump":
        code, text = 255, str(error)
    elif isinstance(error, FirnError):
        code, text = 1, str(error)
    elif isinstance(error, OSError):
        code, text = 1, _system_error(error)
    else:
        code, text = 1, f"internal error: {type(error).__name__}: {error}; at {_place(error)}"
    request.log.error(text, _place(error))
    if request.closing:
        request.log.record(ERROR, request.closing[1])
    if request.program == "criu" and code in (129, 130, 143):
        request.log.close()
        _die_by(code - 128)
    return code


def _system_error(error: OSError) -> str:
    """A failed system call in words: ours carry call and object in their text, Python's have a file name."""
    if error.filename is None:
        return error.strerror or str(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"{name}: {error.strerror}"


def _place(error: BaseException) -> str:
    """Where *error* was raised, as ``file:line``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return place_of(trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else "firn"


def _maybe_traceback() -> None:
    if os.environ.get("FIRN_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()


def _fill_standard_descriptors() -> None:
    """Some callers close 0, 1 and 2. No file of ours may get such a number, or messages would go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # the lowest free number is this one


def _interruptible() -> None:
    """Turn the signals that end a command into an exception, so that everything is undone; a second one waits."""
    import _signal

    numbers = (_SIGHUP, _SIGINT, _SIGTERM)

    def interrupt(number: int, _frame: object) -> None:
        for other in numbers:
            _signal.signal(other, _signal.SIG_IGN)
        raise SystemExit(128 + number)

    # Ignored by whoever started us, it would have the kernel reap our children.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    for number in numbers:
        # Ignored by whoever started us (nohup): it stays ignored.
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, interrupt)


def _die_by(number: int) -> None:
    """End as a process without a handler does, which is what callers of ``criu`` see."""
    import _signal

    _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    console()
