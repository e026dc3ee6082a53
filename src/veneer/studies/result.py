"""What a study hands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.measure.verdict import t_interval


@dataclass(frozen=True)
class Finding:
    """One sentence that was tested, and what the runs say to it."""

    question: str
    verdict: str
    """equal, better, worse or undecided; or a number, where one is asked for."""
    numbers: str
    """What the verdict rests on, in a line."""


def interval_of(values: Sequence[float]) -> str:
    """The mean over seeds with its 95% interval, in words."""
    mean = t_interval(values)
    return f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]"


def ratio_of(logs: Sequence[float], form: str = ".1f") -> str:
    """The geometric mean over seeds with its 95% interval, from logarithms to base 2."""
    mean = t_interval(logs)
    return f"{2**mean.value:{form}} [{2**mean.low:{form}}, {2**mean.high:{form}}]"


@dataclass(frozen=True)
class Result:
    findings: Sequence[Finding]
    tables: str
    """Markdown: every number that a reader needs to doubt the findings."""
    document: Mapping[str, Any]
    """The same and more, as JSON."""
    draw: Callable[[Path], None]
    """The picture, written as SVG."""


def joined(parts: Mapping[str, Result], heading: str, draw: Callable[[Path], None]) -> Result:
    """Of a study that answers its question in several ways, by their names. ``heading``: Markdown above the tables of all."""
    findings = [replace(finding, question=f"{way}: {finding.question}") for way, part in parts.items() for finding in part.findings]
    tables = "\n".join([heading, *(f"## {way[0].upper()}{way[1:]}\n\n{part.tables}" for way, part in parts.items())])
    return Result(findings, tables, {"ways": {way: part.document for way, part in parts.items()}}, draw)
