"""``check``: what this kernel offers, and whether it is enough.

Two voices. As ``criu``, stdout has CRIU's verdict and nothing else, and what was found goes to the log. As ``firn``,
stdout has a line for every ability first, and what firn itself needs and uses counts like what CRIU does.
"""

from __future__ import annotations

from firn.check.isolate import NO, PARTLY, Finding, run
from firn.check.table import ABILITIES, EXPERIMENTAL, EXTRA, NEEDED, REQUIRED, UNUSED, USED, Ability
from firn.log import SILENT, Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class CheckOptions(Protocol):
        """What the command line gives."""

        @property
        def feature(self) -> str | None: ...
        @property
        def extra(self) -> bool: ...
        @property
        def experimental(self) -> bool: ...
        @property
        def all(self) -> bool: ...
        @property
        def criu_style(self) -> bool: ...


GOOD = "Looks good."
BAD = "Does not look good."
INCOMPLETE = (
    "Looks good but some kernel features are missing",
    "which, depending on your process tree, may cause",
    "dump or restore failure.",
)

_HEADINGS = {
    NEEDED: "What firn needs:",
    USED: "What some processes need, or what makes firn faster:",
    UNUSED: "What firn does not use, or not yet:",
}


def check(options: CheckOptions, out: Callable[[str], object], log: Log | None = None) -> int:
    """Probe the kernel; *out* gets the lines for stdout, *log* the rest. The exit status, 0 or 1 (criu(8), check).

    Probes run one after the other, each in a child process and for at most :data:`firn.check.isolate.SECONDS`.
    """
    log = log or Log(SILENT)
    if options.feature is not None:
        return _one(options.feature, options.criu_style, out, log)
    asked = set()
    if options.extra or options.all:
        asked.add(EXTRA)
    if options.experimental or options.all:
        asked.add(EXPERIMENTAL)
    return _as_criu(asked, out, log) if options.criu_style else _as_firn(asked, out)


def _one(name: str, criu_style: bool, out: Callable[[str], object], log: Log) -> int:
    """Answer for one ability; as ``criu`` only those can be named that CRIU knows."""
    ability = next((row for row in ABILITIES if row.name == name and (row.feature or not criu_style)), None)
    if ability is None:
        log.error(f"Unknown feature {name}")
        return 1
    finding = run(ability.probe)
    if finding.state == NO or (finding.state == PARTLY and ability.strict):
        log.error(f"{name} is not supported: {finding.reason}")
        return 1
    if finding.reason:
        log.warn(f"{name}: {finding.reason}")
    out(f"{name} is supported")
    return 0


def _missing(ability: Ability, finding: Finding) -> bool:
    """Whether a verdict counts the ability as missing."""
    if finding.state == NO:
        return not ability.tolerated or finding.error != ability.tolerated
    return finding.state == PARTLY and ability.strict


def _line(ability: Ability, finding: Finding) -> str:
    reason = f" ({finding.reason})" if finding.reason else ""
    return f"{ability.name:<25}{finding.state:<8}{ability.purpose}; without it: {ability.loss}{reason}"


def _try(ability: Ability, log: Log) -> bool:
    """Probe, and log what was found; whether the ability is missing."""
    finding = run(ability.probe)
    missing = _missing(ability, finding)
    (log.warn if missing else log.info)(_line(ability, finding))
    return missing


def _as_criu(asked: set[int], out: Callable[[str], object], log: Log) -> int:
    """CRIU's categories: the first missing ability of the required ones ends it, the *asked* ones are all tried."""
    if any(_try(ability, log) for ability in ABILITIES if ability.criu == REQUIRED):
        log.warn(BAD)
        return 1
    missing = [ability for ability in ABILITIES if ability.criu in asked and _try(ability, log)]
    # Never part of the verdict.
    _try(next(ability for ability in ABILITIES if ability.name == "breakpoints"), log)
    return _verdict(missing, out)


def _verdict(missing: list[Ability], out: Callable[[str], object]) -> int:
    for line in INCOMPLETE if missing else (GOOD,):
        out(line)
    return 1 if missing else 0


def _as_firn(asked: set[int], out: Callable[[str], object]) -> int:
    """Every ability on a line, by what it means to firn, then firn's own judgement and the verdict."""
    missing: list[Ability] = []
    for use, heading in _HEADINGS.items():
        out(heading)
        for ability in ABILITIES:
            if ability.firn == use:
                finding = run(ability.probe)
                out(_line(ability, finding))
                if _missing(ability, finding):
                    missing.append(ability)
    out(_own_judgement(missing))
    if any(ability.firn == NEEDED or ability.criu == REQUIRED for ability in missing):
        out(BAD)
        return 1
    return _verdict([a for a in missing if a.criu in asked or (EXTRA in asked and a.firn == USED)], out)


def _own_judgement(missing: list[Ability]) -> str:
    for use, text in ((NEEDED, "firn cannot work here without"), (USED, "firn works here, but would use")):
        names = [ability.name for ability in missing if ability.firn == use]
        if names:
            return f"{text}: {', '.join(names)}."
    return "firn has all that it needs and uses."
