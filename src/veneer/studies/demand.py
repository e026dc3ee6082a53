"""Do adapters fall behind where they are told more bits than they have parameters? One finding for all arms of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.measure.verdict import Comparison
from veneer.studies.result import Finding

ASKED = "an adapter falls behind {reference} where there are more bits than it has parameters, and nowhere else"


@dataclass(frozen=True)
class Demanded:
    """Of an arm, in words, with what each of its parameters would have to hold."""

    arm: str
    bits: float
    """A parameter."""
    comparison: Comparison
    """With the reference."""

    @property
    def said(self) -> str:
        """Whether it bears the argument out."""
        if self.comparison.verdict == "undecided":
            return "undecided"
        return "holds" if (self.bits > 1) == (self.comparison.verdict == "worse") else "broken"

    def __str__(self) -> str:
        return f"{self.arm}, {self.bits:.2g} bits a parameter: {self.comparison.verdict}"


def demand_finding(reference: str, arms: Sequence[Demanded]) -> Finding:
    """``broken`` by any of them, else ``undecided`` by any of them, else ``holds``."""
    said = {arm.said for arm in arms}
    verdict = next(word for word in ("broken", "undecided", "holds") if word in said)
    return Finding(ASKED.format(reference=reference), verdict, "; ".join(map(str, arms)))
