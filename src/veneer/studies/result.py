"""What a study hands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One sentence that was tested, and what the runs say to it."""

    question: str
    verdict: str
    """equal, better, worse or undecided; or a number, where one is asked for."""
    numbers: str
    """What the verdict rests on, in a line."""


@dataclass(frozen=True)
class Result:
    findings: Sequence[Finding]
    tables: str
    """Markdown: every number that a reader needs to doubt the findings."""
    document: Mapping[str, Any]
    """The same and more, as JSON."""
    draw: Callable[[Path], None]
    """The picture, written as SVG."""
