"""What a dump or restore does outside itself besides images: action scripts and the pidfile."""

from __future__ import annotations

import os

from firn.errors import FirnError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.api import DumpOptions, RestoreOptions
    from firn.log import Log

_SIGXFSZ = 25  # asm-generic/signal.h

# A failure here comes too late to stop anything: it is only logged.
_TOO_LATE = ("network-unlock", "pre-resume", "post-resume")


class ScriptFailed(FirnError):
    """An action script exited with something else than 0; ``action`` says at which moment."""

    def __init__(self, action: str, paths: list[str]) -> None:
        super().__init__(f"{action} script failed: {', '.join(paths)}")
        self.action = action


def run_scripts(
    options: DumpOptions | RestoreOptions, action: str, root_pid: int, image_dir_fd: int, log: Log | None = None
) -> None:
    """Run all ``options.action_script`` for the moment *action* (``pre-dump``, ...), the last added one first.

    *root_pid* is 0 while there is no root task. *image_dir_fd* is the open image directory (-1: its path is told).
    Scripts write to *log*'s descriptor and start in the work directory. Raises :class:`ScriptFailed` when all have
    run and one has failed, except at moments that come too late, where it is a warning.
    """
    if not options.action_script:
        return
    environment = {
        **os.environ,
        "CRTOOLS_SCRIPT_ACTION": action,
        "CRTOOLS_IMAGE_DIR": f"/proc/{os.getpid()}/fd/{image_dir_fd}" if image_dir_fd >= 0 else options.images_dir,
    }
    if root_pid:
        environment["CRTOOLS_INIT_PID"] = str(root_pid)
    output = log.fd if log is not None else 2
    failed = []
    for path in reversed(options.action_script):
        problem = _run(path, environment, output, options.work_dir)
        if problem:
            failed.append(f"{path} ({problem})")
    if failed and action not in _TOO_LATE:
        raise ScriptFailed(action, failed)
    if failed and log is not None:
        log.warn(f"{action} script failed: {', '.join(failed)}")


def _run(path: str, environment: dict[str, str], output: int, directory: str) -> str:
    """Run one script to its end; what went wrong with it, or nothing."""
    # Python opens files close-on-exec, but descriptors that firn inherited may lack the flag. They are made to have it
    # one by one: a close action for a number that is not open would fail the spawn.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                continue  # the listing's own descriptor is gone already
    actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2), (os.POSIX_SPAWN_CLOSE, 0)]
    # posix_spawn has no way to say the directory. Nothing else of firn runs meanwhile.
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        # Python ignores SIGXFSZ, which a script would inherit.
        pid = os.posix_spawn(path, [path], environment, file_actions=actions, setsigmask=(), setsigdef=(_SIGXFSZ,))
    except OSError as error:
        return f"cannot be run: {error.strerror}"
    finally:
        os.fchdir(before)
        os.close(before)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return f"killed by signal {-code}"
    return f"exit status {code}" if code else ""


def write_pidfile(path: str, pid: int) -> None:
    """Write *pid* in decimal, without a newline, to the new file *path* (mode 0600).

    Raises :class:`FirnError` if *path* exists or cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise FirnError(f"pidfile {path}: {error.strerror}") from error
    try:
        os.write(descriptor, b"%d" % pid)
    finally:
        os.close(descriptor)
