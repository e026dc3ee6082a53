"""Toggling on the real base: what holds is found to hold, and what is broken on purpose is found to be broken."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lab import lab

from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.render import load_renderer
from veneer.studies import toggle
from veneer.studies.contest import Terms
from veneer.studies.lab import Lab, Place
from veneer.studies.result import Finding, Result
from veneer.studies.toggle import Costs, Dose, conduct
from veneer.types import Switch

SMALL = ("env.name=sort", "rl.steps=2", "rl.groups_per_batch=4", "rl.max_tokens=24", "eval.problems=4")
OFF, ON, BATCH, WITHIN, LONGER, RATIO, ANEW, DOSE = range(8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"PROMPTS": 3, "ANSWERS": 2, "LENGTH": 6, "REPEATS": 3, "CONTEXT": 64, "PROBLEMS": 4, "SCALES": (0.0, 0.5, 1.0)}
    for name, value in few.items():
        monkeypatch.setattr(f"veneer.studies.toggle.{name}", value)


class Opened:
    """Opens places, and does something to each engine."""

    def __init__(self, harm: Callable[[LocalEngine], None] = lambda engine: None) -> None:
        self.engines: list[LocalEngine] = []
        self.harm = harm

    def __call__(self, config: object) -> Place:
        self.engines.append(LoraEngine(load_base("nano")))
        self.harm(self.engines[-1])
        return Place(self.engines[-1], load_renderer("nano"))


def study(folder: Path, opener: Opened) -> Result:
    return asyncio.run(conduct(lab(folder, opener), Terms(2, 1, SMALL)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters are kept, so that they are trained once."""
    return tmp_path_factory.mktemp("toggle")


def verdicts(findings: list[Finding]) -> list[str]:
    return [finding.verdict for finding in findings]


def test_the_whole_study_runs(folder: Path, tmp_path: Path) -> None:
    """On one engine, on which no adapter was before, and none is afterwards."""
    opener = Opened()
    result = study(folder, opener)
    (engine,) = opener.engines
    assert verdicts([*result.findings])[:4] == ["equal", "holds", "equal", "holds"]
    assert result.findings[DOSE].verdict == "holds"
    assert result.document["bits"] == {
        "answers": 6,
        "adapters": 2,
        "base_beside": 0,
        "base_after": 0,
        "adapters_beside": 0,
        "adapters_alike": 0,
        "digest_kept": True,
    }
    assert all(cost["kept"] >= 32 and len(cost["same"]) == 3 for cost in result.document["costs_ms"])
    assert not engine._slots
    json.dumps(result.document)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_adapters_that_are_not_applied_are_found(folder: Path) -> None:
    """They are loaded and have names, and all of them answer as the base."""

    def not_applied(engine: LocalEngine) -> None:
        engine._stack.thin.slots = lambda segments, counts: np.full(sum(counts), -1)

    study(folder, Opened())  # trained soundly
    result = study(folder, Opened(not_applied))
    assert result.findings[OFF].verdict == "equal"
    assert result.findings[ON].verdict == "broken"
    assert result.findings[WITHIN].verdict == "broken"
    assert result.findings[DOSE].verdict == "broken"


def test_a_base_that_was_changed_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a bit of one weight, while adapters were trained."""
    study(folder, Opened())
    opener, runs = Opened(), Lab.run

    async def and_a_bit(self: Lab, configs: list, **more: bool) -> list:
        outcomes = await runs(self, configs, **more)
        weight = opener.engines[0].base.model.model.layers[0].mlp.down_proj.weight
        with torch.no_grad():
            weight[0, 0] = weight[0, 0] * (1 + 2**-10) + 2**-10
        return outcomes

    monkeypatch.setattr(Lab, "run", and_a_bit)
    result = study(folder, opener)
    assert result.findings[OFF].verdict == "differs"
    assert "another" in result.findings[OFF].numbers


def test_a_switch_to_nothing_changes_nothing_behind_it() -> None:
    place = Opened()(None)
    tokens = np.arange(40, 90, dtype=np.int64)
    assert not toggle._untouched(place, tokens, [Switch(None, at=30)])


# ---------------------------------------------------------------- words


def costs(same: float, switched: float, within: float = 1.0, anew: float = 2.0, untouched: bool = True) -> Costs:
    return Costs([same] * 3, [switched] * 3, [within] * 3, [anew] * 3, 48, untouched)


def test_costs_are_medians_of_a_seed() -> None:
    one = Costs([1.0, 1.0, 90.0], [1.5, 1.5, 0.0], [2.0, 2.0, 2.0], [8.0, 8.0, 1.0], 48, True)
    assert (one.switch, one.switch_ratio, one.within_ratio) == (0.5, 1.5, 0.25)


@pytest.mark.parametrize(
    ("switched", "words"),
    [
        ((2.0, 2.01, 2.02), ["equal", "equal"]),
        ((2.5, 2.51, 2.52), ["equal", "higher"]),
        ((4.0, 4.1, 4.2), ["higher", "higher"]),
        ((1.5, 1.51, 1.52), ["equal", "lower"]),
        ((1.0, 6.0, 2.0), ["undecided", "undecided"]),
    ],
)
def test_words_for_costs(switched: tuple[float, ...], words: list[str]) -> None:
    found = toggle._of_costs([costs(2.0, ms) for ms in switched])
    assert verdicts(found) == [*words, "lower"]
    assert "48 tokens" in found[2].numbers


def test_words_for_doses() -> None:
    good = Dose([0.0, 0.1, 0.4], [0.1, 0.2, 0.5], True)
    assert toggle._of_doses([good, good]).verdict == "holds"
    assert toggle._of_doses([good, Dose([0.0, 0.5, 0.4], [0.1, 0.2, 0.5], True)]).verdict == "broken"
    assert toggle._of_doses([good, Dose(good.kl, good.solved, False)]).verdict == "broken"
    assert "0.1000 at 0.5" in toggle._of_doses([good]).numbers
