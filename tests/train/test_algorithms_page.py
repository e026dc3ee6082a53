"""docs/algorithms.md lists what there is, with its defaults, and its recipes are the settings that are proved beside TRL."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from test_trl import EQUAL

from veneer.engine import LOSSES
from veneer.engine.losses import Terms, resolve_loss, resolve_terms
from veneer.train.advantages import ADVANTAGES, resolve_advantage
from veneer.train.config import make_config
from veneer.train.corrections import CORRECTIONS
from veneer.train.normalise import NORMALISATIONS

PAGE = (Path(__file__).parents[2] / "docs/algorithms.md").read_text()
RECIPES = {name.partition(";")[0]: tomllib.loads(text)["rl"] for name, text in re.findall(r"```toml\n# (.*?)\n(.*?)```", PAGE, re.DOTALL)}
PROVED = {"GRPO": "grpo", "Dr. GRPO": "dr_grpo", "DAPO": "dapo", "RLOO": "rloo", "GSPO": "gspo", "CISPO": "cispo"}


def rows(heading: str) -> dict[str, str]:
    """A section's table: first cell without ticks -> the whole line."""
    section = PAGE.partition(f"## {heading}")[2].partition("\n## ")[0]
    return {name: line for line in section.splitlines() if (name := "".join(re.findall(r"^\| `(\w+)` \|", line)))}


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("Advantages", ADVANTAGES),
        ("Losses", {name: entry for name, entry in LOSSES.items() if name != "cross_entropy"}),
        ("What a batch is divided by", NORMALISATIONS),
    ],
)
def test_tables_are_those_of_the_code(heading: str, table: dict[str, tuple[Any, dict[str, float]]]) -> None:
    """Who reads the page must find every choice, and no other, with the defaults that act."""
    found = rows(heading)
    assert set(found) == set(table)
    for name, (_, defaults) in table.items():
        for key, value in defaults.items():
            assert f"`{key} = {value}`" in found[name], name


def test_the_defaults_of_corrections_are_those_of_the_code() -> None:
    found = rows("Sampler and trainer")
    assert set(found) == {"none", *CORRECTIONS}
    for name, (_, bounds) in CORRECTIONS.items():
        assert f"| {bounds['low']}, {bounds['high']} |" in found[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve(name: str) -> None:
    """A recipe that is refused is no recipe."""
    rl = dict(RECIPES[name])
    resolve_advantage(rl.pop("advantage"), rl.pop("advantage_config", None))
    loss, config = rl.pop("loss"), rl.pop("loss_config", {})
    resolve_loss(loss, config)
    terms = resolve_terms(loss, {key: rl.pop(key) for key in ("kl_coef", "kl_estimator") if key in rl})
    assert (terms != Terms()) == ("kl_in" in rl)
    assert rl.pop("normalise") in NORMALISATIONS
    assert make_config({"rl": RECIPES[name]}).rl.model_dump(include=set(RECIPES[name])) == RECIPES[name]


def test_recipes_are_what_is_proved_beside_trl() -> None:
    """But for thresholds, which the comparison chooses so that some tokens are clipped."""
    assert set(RECIPES) == {*PROVED, "REINFORCE++"}
    for name, case in PROVED.items():
        rl, proved = RECIPES[name], EQUAL[case]
        assert (rl["advantage"], rl["loss"], rl["normalise"]) == (proved.advantage, proved.loss, proved.normalise)
        assert rl.get("mask_truncated", False) == proved.mask_truncated
