"""Bits that reward tells beside the parameters that are to hold them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_lab import lab

from veneer.measure.verdict import compare_seeds
from veneer.studies import received
from veneer.studies.contest import Terms
from veneer.studies.demand import Demanded, demand_findings
from veneer.studies.received import THICK, THIN, _late_rise, conduct, received_findings

FULL = [0.8, 0.81, 0.82]


def contest(thin: float) -> Any:
    """All solve 0.8 but for the thinnest, which solves this much less; all were told 600 bits, and the base solves 0.2."""

    sweep = SimpleNamespace(choice_error=lambda deviation: 0.001)

    def entrant(name: str, less: float, reference: bool) -> SimpleNamespace:
        scores = [score - less for score in FULL]
        metrics = [{"step": 0}, {"bits": 400.0}, {"bits": 200.0}]
        outcomes = [SimpleNamespace(score=score, score_before=0.2, metrics=metrics) for score in scores]
        comparison = None if reference else compare_seeds(scores, FULL, 0.03)
        return SimpleNamespace(arm=SimpleNamespace(name=name), outcomes=outcomes, comparison=comparison, scores=scores, sweep=sweep)

    made = [entrant("wide", 0.0, True), entrant(THICK, 0.0, False), entrant(THIN, thin, False)]
    return SimpleNamespace(entrants=made, reference=made[0], margin=0.03)


@pytest.mark.parametrize(
    ("parameters", "less", "words"),
    [
        (100, 0.3, ("worse", "holds", "1 of 1")),
        (100, 0.0, ("equal", "holds", "0 of 1")),
        (6000, 0.3, ("worse", "broken", "untested")),
        (6000, 0.0, ("equal", "holds", "untested")),
    ],
)
def test_words(parameters: int, less: float, words: tuple[str, str, str]) -> None:
    """Room for 600 bits that is not enough breaks the argument; a want of room that does no harm is none of its business."""
    thin, told, room, behind = received_findings(contest(less), {"wide": 10**6, THICK: 10**5, THIN: parameters})
    assert (thin.verdict, room.verdict, behind.verdict) == words
    assert told.verdict == f"{600 / parameters:.1f}"


def test_one_undecided_arm_leaves_it_undecided_and_one_worse_breaks_it() -> None:
    unsure, equal, worse = (compare_seeds(scores, FULL, 0.03) for scores in ([0.7, 0.9, 0.8], FULL, [0.5, 0.51, 0.52]))

    def verdicts(*arms: tuple[float, Any]) -> list[str]:
        return [finding.verdict for finding in demand_findings("x", [Demanded("a", bits, comparison) for bits, comparison in arms])]

    assert verdicts((0.5, equal), (0.9, unsure)) == ["undecided", "untested"]
    assert verdicts((0.5, worse), (0.9, unsure)) == ["broken", "untested"]
    assert verdicts((2.0, worse), (2.0, unsure), (3.0, equal)) == ["untested", "1 of 3"]


def test_the_course_of_the_rewards() -> None:
    metrics = [{"reward/total": reward} for reward in (0.1, 0.1, 0.4, 0.4, 0.6, 0.6, 0.7, 0.8)]
    assert _late_rise(cast("Any", SimpleNamespace(metrics=metrics))) == pytest.approx(0.15)
    assert _late_rise(cast("Any", SimpleNamespace(metrics=metrics[:3]))) == 0.0


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RATES", "THIN_RATES"):
        monkeypatch.setattr(received, name, (1e-3, 2e-3))
    monkeypatch.setattr("veneer.studies.contest._beyond", lambda rates, best: [])  # grids are not widened: test_contest.py does
    small = ("env.name=sort", "rl.steps=1", "rl.groups_per_batch=2", "rl.max_tokens=24", "eval.problems=4")
    result = asyncio.run(conduct(lab(tmp_path, side_by_side=16), Terms(2, 1, small)))
    assert result.document["parameters"] == {
        "rank 16": 180_224,
        "rank 1": 11_264,
        "rank 1 of down_proj": 2_560,
        "rank 16 of one map": 4_096,
        "rank 1 of one map": 256,
    }
    assert all(0 <= bits <= 2 * 8 for found in result.document["bits"].values() for bits in found), "an episode tells a bit at most"
    assert len(result.findings) == 4 + 4 + 1
    json.dumps(result.document)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
