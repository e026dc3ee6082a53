"""Every study keeps the rules that docs/studies.md states."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import re
from pathlib import Path

import pytest
from test_lab import lab, never, small

from veneer.studies.catalogue import DOCUMENT, STUDIES, find_study, keep, kept, larger, naming_diverged
from veneer.studies.contest import Terms
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result
from veneer.train.config import make_config
from veneer.types import ConfigError

ROOT = Path(__file__).parents[2]


WITH_ARMS = [name for name in STUDIES if hasattr(importlib.import_module(f"veneer.studies.{name}"), "arms")]


@pytest.mark.parametrize("name", WITH_ARMS)
def test_every_arm_has_a_grid_of_its_own(name: str) -> None:
    """Five learning rates or more, rising by one factor of at most 3; settings that there are; the same work for all, of one loop. What two
    loops have in common is for a study's own test."""
    module = importlib.import_module(f"veneer.studies.{name}")
    arms = module.arms()
    assert len({arm.name for arm in arms}) == len(arms) >= 2
    kinds, loops, work = set[str](), set[str](), set[str]()
    for arm in arms:
        factors = [b / a for a, b in itertools.pairwise(arm.rates)]
        assert len(arm.rates) >= 5
        assert factors == pytest.approx([factors[0]] * len(factors))
        assert 1 < factors[0] <= 3
        config = make_config({**module.SHARED, **arm.settings})
        kinds.add(config.kind)
        loops.add(json.dumps(getattr(config, config.kind).model_dump()))
        work.add(json.dumps([config.env.model_dump(), config.eval.model_dump()]))
    assert len(work) == 1
    assert len(loops) == 1 or len(kinds) > 1


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_on_the_page(name: str) -> None:
    page, study = (ROOT / "docs/studies.md").read_text(), find_study(name)
    assert f"| `{name}` | {study.question} |" in page
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    assert [int(number) for number in re.findall(r"(\d+): ", row)] == list(study.claims)
    assert study.about.splitlines()[1] == ""  # the page of a study leaves the first line to its title


@pytest.mark.parametrize("name", STUDIES)
def test_who_chooses_a_learning_rate_is_who_has_use_for_choice_seeds(name: str) -> None:
    """By what its module calls: a budget says of no other study that it has fewer choice seeds."""
    source = (ROOT / f"src/veneer/studies/{name}.py").read_text()
    assert find_study(name).chooses == any(word in source for word in ("choice_seeds", "hold_contest", "sweep_all"))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("override", ["rl.stebs=3", "seed=1", "weights=full"])
def test_what_a_study_does_not_take_is_refused_before_any_work(name: str, override: str, tmp_path: Path) -> None:
    """A setting that nothing follows would stand on the study's page as if it had been."""
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        asyncio.run(find_study(name).conduct(lab(tmp_path, never), Terms(2, 1, (override,))))


def test_what_is_kept_replaces_what_was(tmp_path: Path) -> None:
    def made(verdict: str) -> Result:
        return Result([Finding("asked", verdict, "0.1")], "| a |\n|---|\n", {"more": 1}, lambda path: path.write_text("<svg/>") and None)

    folder = tmp_path / "rank"
    for verdict in ("equal", "worse"):
        keep(find_study("rank"), Terms(3, 1, ("rl.steps=2",)), made(verdict), folder)
    ((document, where),) = kept(tmp_path)
    assert where == folder
    assert document["findings"] == [{"question": "asked", "verdict": "worse", "numbers": "0.1"}]
    assert document["terms"] == {"seeds": 3, "choice_seeds": 1, "overrides": ["rl.steps=2"], "coarse": False}
    assert document == json.loads((folder / DOCUMENT).read_text())
    page = (folder / "study.md").read_text()
    assert "| asked | **worse** | 0.1 |" in page
    assert "`veneer study run rank --seeds 3 --choice-seeds 1 --set rl.steps=2`" in page


def test_runs_that_diverge_are_named_whatever_a_study_makes_of_them(tmp_path: Path) -> None:
    here = lab(tmp_path)

    async def looks_at_nothing(lab: Lab, terms: Terms) -> Result:
        await lab.run([small(rl={"learning_rate": 1e30}), small(seed=1)])
        return Result([], "a table\n", {"a": 1}, lambda path: None)

    async def sound(lab: Lab, terms: Terms) -> Result:
        await lab.run([small(seed=1)])
        return Result([], "a table\n", {}, lambda path: None)

    for _ in range(2):  # the second time its runs are there already
        result = asyncio.run(naming_diverged(looks_at_nothing)(here, Terms(2, 1)))
        assert result.tables.startswith("a table\n\nRuns that diverged")
        (told,) = result.document["diverged"]
        assert told.startswith("rank 1, learning rate 1e+30, seed 0: diverged, ")
        assert f"- {told}" in result.tables
    assert asyncio.run(naming_diverged(sound)(here, Terms(2, 1))).tables == "a table\n", "not those of a study before"


@pytest.mark.parametrize("name", ["learning_rate", "early", "horizon", "layers"])
def test_a_study_of_held_out_losses_leaves_some_rows_for_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.held_out=0: this study compares losses of held-out rows"):
        asyncio.run(find_study(name).conduct(lab(tmp_path, never), Terms(2, 1, ("sft.held_out=0",))))


@pytest.mark.parametrize(
    ("name", "override"), [("rank", "rejection.bar=0.5"), ("capacity", "dpo.steps=3"), ("visibility", "distill.steps=3")]
)
def test_settings_of_a_loop_that_a_study_does_not_run_are_refused(name: str, override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"read none of {override.partition('.')[0]}"):
        asyncio.run(find_study(name).conduct(lab(tmp_path, never), Terms(2, 1, (override,))))


def test_a_smaller_form_does_not_take_the_place_of_a_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = tmp_path / "rank", Result([Finding("asked", "equal", "0")], "", {}, lambda path: path.write_text("<svg/>"))
    assert larger(folder, Terms(2, 1)) is None
    keep(find_study("rank"), Terms(5, 2), result, folder)
    for smaller in (Terms(2, 1, coarse=True), Terms(5, 1), Terms(5, 2, coarse=True)):
        there = larger(folder, smaller)
        assert there is not None
        assert there["seeds"] == 5
    for other in (Terms(5, 2), Terms(8, 1), Terms(2, 1, ("env.name=sort",))):
        assert larger(folder, other) is None
    monkeypatch.setattr("veneer.studies.catalogue.origin", lambda: "another")
    assert larger(folder, Terms(2, 1)) is None, "what an older Veneer has found is no reason to keep this one's"
