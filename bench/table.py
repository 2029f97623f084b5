"""Rows of results: medians of paired runs, against a limit and a reference measured in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

HEADER = ("measure", "value", "limit", "reference", "ratio", "other", "ratio", "verdict")


class Row:
    """One measure. All values are in *unit*; one per round, so value[i], reference[i] and other[i] belong together.

    ``limit`` is for the median of the values, ``ratio_limit`` for that of value/reference. ``failure`` says why there
    are no values.
    """

    def __init__(
        self, name: str, unit: str, limit: float | None = None, reference: str = "", ratio_limit: float | None = None
    ) -> None:
        self.name = name
        self.unit = unit
        self.limit = limit
        self.reference_name = reference
        self.ratio_limit = ratio_limit
        self.values: list[float] = []
        self.references: list[float] = []
        self.others: list[float] = []
        self.failure = ""
        self.other_failure = ""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def over(self) -> bool:
        """Whether a limit is not kept."""
        if not self.values:
            return False
        ratio = paired_ratio(self.values, self.references)
        return (self.limit is not None and self.value > self.limit) or (
            self.ratio_limit is not None and ratio is not None and ratio > self.ratio_limit
        )

    def cells(self) -> tuple[str, ...]:
        """The texts of the table, in the order of HEADER."""
        if not self.values:
            return self.name, "n/a", _number(self.limit), "", "", self._other(), "", "n/a"
        reference = ""
        if self.references:
            reference = f"{_number(statistics.median(self.references))} {self.reference_name}"
        return (
            self.name,
            f"{_number(self.value)} {self.unit}",
            self._limits(),
            reference,
            _ratio(paired_ratio(self.values, self.references)),
            self._other(),
            _ratio(paired_ratio(self.values, self.others)),
            "OVER" if self.over else "ok" if self.limit or self.ratio_limit else "-",
        )

    def _limits(self) -> str:
        parts = [_number(self.limit)] if self.limit is not None else []
        parts += [f"{self.ratio_limit:g}x"] if self.ratio_limit is not None else []
        return ", ".join(parts)

    def _other(self) -> str:
        if self.others:
            return _number(statistics.median(self.others))
        return "fails" if self.other_failure else ""

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "measure": self.name, "unit": self.unit, "limit": self.limit, "ratio_limit": self.ratio_limit,
            "value": self.value if self.values else None, "values": self.values,
            "reference": self.reference_name, "references": self.references,
            "ratio": paired_ratio(self.values, self.references),
            "others": self.others, "ratio_to_other": paired_ratio(self.values, self.others),
            "over": self.over, "failure": self.failure, "other_failure": self.other_failure,
        }  # fmt: skip


def paired_ratio(values: Sequence[float], references: Sequence[float]) -> float | None:
    """The median of value/reference over the rounds; None without a reference."""
    pairs = [value / reference for value, reference in zip(values, references, strict=False) if reference]
    return statistics.median(pairs) if pairs else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def render(lines: Sequence[Sequence[str]]) -> str:
    """A text table with aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
