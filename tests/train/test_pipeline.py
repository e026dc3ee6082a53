"""Pipelines: what stages share, what each says itself, and which one a mistake is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.train.config import load_config
from veneer.train.pipeline import load_stages
from veneer.types import ConfigError

PIPELINE = """
seed = 3
base = "nano"
[lora]
rank = 2
alpha = 16
[eval]
problems = 8
[[stages]]
kind = "sft"
sft = { data = "rows.jsonl", steps = 5 }
[[stages]]
kind = "rl"
seed = 4
lora.rank = 1
env.name = "sort"
[[stages]]
name = "anew"
kind = "rl"
init = ""
[[stages]]
name = "from-another"
kind = "rl"
init = "other@2"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "both.toml"
    found.write_text(PIPELINE)
    return found


def refuse(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_stages(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stages_share_what_stands_above_them(path: Path) -> None:
    """Sections are merged key by key; what a stage says itself is stronger."""
    sft, rl, anew, other = load_stages(path)
    assert [s.config.name for s in (sft, rl, anew, other)] == ["both-sft", "both-rl", "anew", "from-another"]
    assert [(s.config.seed, s.config.lora.rank, s.config.lora.alpha) for s in (sft, rl)] == [(3, 2, 16.0), (4, 1, 16.0)]
    assert all(s.config.eval.problems == 8 for s in (sft, rl, anew))
    assert (rl.config.env.name, anew.config.env.name) == ("sort", "arithmetic")
    assert [s.follows for s in (sft, rl, anew, other)] == [False, True, False, False]
    assert other.config.init == "other@2"


def test_overrides_reach_into_stages(path: Path) -> None:
    """And those above them reach all that do not say otherwise."""
    sft, rl, *_ = load_stages(path, ["stages.0.sft.steps=3", "stages.1.rl.loss=ppo", "eval.problems=4", "seed=9", "stages.1.init=''"])
    assert (sft.config.sft.steps, rl.config.rl.loss, rl.config.init, rl.follows) == (3, "ppo", "", False)
    assert (sft.config.eval.problems, sft.config.seed, rl.config.seed) == (4, 9, 4)


@pytest.mark.parametrize(
    "override", ["stages.4.seed=1", "stages.x.seed=1", "stages.-1.seed=1", "stages.0=1", "stages.0.kind.x=1", "stages=3"]
)
def test_bad_overrides(path: Path, override: str) -> None:
    """The same care as for a single run's."""
    assert "stages" in refuse(path, PIPELINE, override)


def test_mistakes_name_their_stage(path: Path) -> None:
    """In a file of five stages, which steps = -1 is it?"""
    assert refuse(path, PIPELINE, "stages.1.rl.steps=-1").startswith("stage 1 (both-rl): rl.steps = -1")
    assert "stage 0 (both-sft): unknown key 'sft.stepps'; did you mean 'sft.steps'?" in refuse(path, PIPELINE, "stages.0.sft.stepps=1")
    assert "stage 0 (both-sft): unknown key 'sede'" in refuse(path, PIPELINE.replace("seed = 3", "sede = 3"))


def test_two_stages_are_not_one_run(path: Path) -> None:
    """The second would find the first's folder, with other settings or worse the same."""
    twice = '[[stages]]\nkind = "rl"\n[[stages]]\nkind = "rl"\nseed = 1\n'
    assert "stages 0 and 1 are both kept in both-rl" in refuse(path, twice)
    assert "names of their own" in refuse(path, f'name = "x"\n{twice}')
    assert "stages 0 and 1 are both kept in /tmp/x" in refuse(path, 'folder = "/tmp/x"\n' + PIPELINE)


@pytest.mark.parametrize("stages", ["stages = 3", "stages = []", "stages = [1]", "[stages]\nkind = 'rl'"])
def test_what_is_no_pipeline(path: Path, stages: str) -> None:
    """One pair of brackets too few is the usual mistake."""
    assert "[[stages]]" in refuse(path, stages)


def test_a_single_run_is_no_pipeline(path: Path) -> None:
    """And a pipeline is no single run."""
    path.write_text("seed = 1\n")
    assert load_stages(path) == []
    path.write_text(PIPELINE)
    with pytest.raises(ConfigError, match="stages"):
        load_config(path)
