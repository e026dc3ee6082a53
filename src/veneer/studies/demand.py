"""Has an adapter room for what it is told? Arms beside the bits that each of their parameters would have to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.measure.verdict import Comparison
from veneer.studies.result import Finding


@dataclass(frozen=True)
class Demanded:
    """An arm, in words."""

    arm: str
    bits: float
    """That each of its parameters would have to hold."""
    comparison: Comparison
    """With the reference."""

    def __str__(self) -> str:
        return f"{self.arm}, {self.bits:.2g} bits a parameter: {self.comparison.verdict}"


def demand_findings(reference: str, arms: Sequence[Demanded]) -> list[Finding]:
    """First what the argument promises, that room is enough: ``holds`` if no arm that has it falls behind, ``broken`` if one does, else
    ``undecided``. Then what it leaves open: how many of the arms fall behind that have no room. ``untested`` where there is no such arm."""
    enough = [arm for arm in arms if arm.bits <= 1]
    short = [arm for arm in arms if arm.bits > 1]
    verdicts = {arm.comparison.verdict for arm in enough}
    promised = next((word for word, verdict in (("broken", "worse"), ("undecided", "undecided")) if verdict in verdicts), "holds")
    behind = sum(arm.comparison.verdict == "worse" for arm in short)
    return [
        Finding(
            f"adapters with a parameter or more for each bit do not fall behind {reference} in as many steps",
            promised if enough else "untested",
            "; ".join(map(str, enough)),
        ),
        Finding(
            f"adapters with more bits than parameters fall behind {reference} in as many steps",
            f"{behind} of {len(short)}" if short else "untested",
            "; ".join(map(str, short)),
        ),
    ]
