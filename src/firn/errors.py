"""The errors that firn raises.

::

    FirnError
    |-- UsageError          the command line or an option's value is wrong (exit status 1, usage shown)
    |   `-- NotBuilt        an option that exists but whose work firn does not do yet
    |-- ImageError          an image file is missing, cut, flipped or says something impossible
    |-- TargetError         a process cannot be reached, frozen or driven
    |-- Refused             the target has state that cannot be saved: every obstacle, listed at once
    |-- RestoreError        the checkpoint cannot be brought back here
    `-- KernelError         this kernel lacks something that the work needs

A failed system call is an :class:`OSError` (call, object and task are in its text); the orchestrators turn it into
one of these. Only the command line prints.
"""

from __future__ import annotations


class FirnError(Exception):
    """A judgement of firn's own: *message* says what is wrong with which object, *hint* what would help."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(FirnError):
    """The command line, a configuration file or an option's value is wrong."""


class NotBuilt(UsageError):
    """A known option whose work is not done yet: refused by name, never ignored."""


class ImageError(FirnError):
    """An image file is missing, damaged or contradicts another one."""


class TargetError(FirnError):
    """The process that was asked for is not there, cannot be traced, or vanished."""


class KernelError(FirnError):
    """The running kernel lacks an ability that this work needs."""


class RestoreError(FirnError):
    """The checkpoint is sound, but this machine cannot take it (pid taken, file changed, ...)."""


class Obstacle:
    """One thing that stands against a dump: the *thing*, the *reason*, and the option or action that would *help*.

    It is *passing* if the program itself will do away with it, as it goes on.
    """

    __slots__ = ("help", "passing", "reason", "thing")

    def __init__(self, thing: str, reason: str, help: str = "", passing: bool = False) -> None:
        self.thing = thing
        self.reason = reason
        self.help = help
        self.passing = passing

    def __str__(self) -> str:
        return f"{self.thing}: {self.reason}" + (f"; {self.help}" if self.help else "")


class Refused(FirnError):
    """A dump that cannot be done; ``obstacles`` has all the reasons, not just the first."""

    def __init__(self, obstacles: list[Obstacle]) -> None:
        self.obstacles = obstacles
        lines = "".join(f"\n  {obstacle}" for obstacle in obstacles)
        super().__init__(f"{len(obstacles)} obstacle{'s' if len(obstacles) != 1 else ''} to this dump:{lines}")
