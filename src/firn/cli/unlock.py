"""``firn unlock [-D DIR | --all]``: removes network locks that nobody will remove any more (:mod:`firn.unlock`)."""

from __future__ import annotations

from firn.cli import commands
from firn.cli.values import ShortUsage
from firn.unlock import unlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from firn.cli.commands import Request


def run(request: Request) -> int:
    """Unlock, and print a line per lock; the exit status."""
    if request.words[1:]:
        raise ShortUsage("unlock takes no parameters but options")
    directory = request.values.get("images_dir")
    everything = bool(request.values.get("all"))
    if directory is not None and everything:
        raise ShortUsage("-D and --all exclude each other")
    count = 0
    for line in unlock(directory, everything):
        commands.out(f"{line}\n")
        count += 1
    if not count:
        commands.out("nothing is locked\n")
    return 0
