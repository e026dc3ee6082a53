"""Bits that reward tells beside the parameters that are to hold them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_lab import lab

from veneer.measure.verdict import compare_seeds
from veneer.studies import received
from veneer.studies.contest import Terms
from veneer.studies.demand import Demanded, demand_finding
from veneer.studies.received import conduct, received_findings

FULL = [0.8, 0.81, 0.82]


def contest(thin: float) -> Any:
    """The reference solves 0.8, the thin arm this much less; both were told 600 bits in two steps, from a base that solves 0.2."""

    def entrant(name: str, less: float, reference: bool) -> SimpleNamespace:
        scores = [score - less for score in FULL]
        metrics = [{"step": 0}, {"bits": 400.0}, {"bits": 200.0}]
        outcomes = [SimpleNamespace(score=score, score_before=0.2, metrics=metrics) for score in scores]
        comparison = None if reference else compare_seeds(scores, FULL, 0.03)
        return SimpleNamespace(arm=SimpleNamespace(name=name), outcomes=outcomes, comparison=comparison, scores=scores)

    made = [entrant("wide", 0.0, True), entrant("thin", thin, False)]
    return SimpleNamespace(entrants=made, reference=made[0])


@pytest.mark.parametrize(
    ("parameters", "less", "word"), [(100, 0.3, "holds"), (100, 0.0, "broken"), (6000, 0.3, "broken"), (6000, 0.0, "holds")]
)
def test_words(parameters: int, less: float, word: str) -> None:
    """An arm that lacks parameters and is behind, or has them and is not, bears the argument out."""
    argument, told, learned = received_findings(contest(less), {"wide": 10**6, "thin": parameters})
    assert argument.verdict == word
    assert told.verdict == f"{600 / parameters:.1f}"
    assert float(learned.verdict) == pytest.approx(1 - less / 0.61, abs=0.02)


def test_one_undecided_arm_leaves_it_undecided_and_one_broken_breaks_it() -> None:
    unsure, equal, worse = (compare_seeds(scores, FULL, 0.03) for scores in ([0.7, 0.9, 0.8], FULL, [0.5, 0.51, 0.52]))
    fine = Demanded("a", 0.5, equal)
    assert demand_finding("x", [fine, Demanded("b", 2.0, worse)]).verdict == "holds"
    assert demand_finding("x", [fine, Demanded("b", 2.0, unsure)]).verdict == "undecided"
    assert demand_finding("x", [Demanded("a", 0.5, worse), Demanded("b", 2.0, unsure)]).verdict == "broken"


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
    assert len(result.findings) == 3 + 4 + 1
    json.dumps(result.document)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
