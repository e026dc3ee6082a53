"""Merging on the real base: what the study says of the engine's own merging, and of mergings that lose something."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lab import lab
from test_lab import small as toy

from veneer.engine import LoraEngine, load_base
from veneer.engine.counting import Bench
from veneer.engine.merge import Rounding, write_merged
from veneer.store.adapters import read_adapter
from veneer.store.stack import stack_adapters
from veneer.studies import merging
from veneer.studies.contest import Terms
from veneer.studies.lab import RECORD
from veneer.studies.merging import BESIDE, Merged, _solved, answers_logprobs, conduct
from veneer.studies.result import Result
from veneer.types import Checkpoint, ConfigError, RunError, SamplingParams

SMALL = ("env.name=sort", "rl.steps=2", "rl.groups_per_batch=4", "rl.max_tokens=24", "eval.problems=4")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROBLEMS": 4, "STRENGTHS": (1.0, 2**-12), "DTYPES": ("float32", "bfloat16")}.items():
        monkeypatch.setattr(merging, name, value)
    for name, value in {"PROMPTS": 2, "ANSWERS": 2, "LENGTH": 6}.items():
        monkeypatch.setattr(f"veneer.studies.toggle.{name}", value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters are kept, so that they are trained once."""
    return tmp_path_factory.mktemp("merging")


def never(*_: Any) -> Rounding:
    raise AssertionError("merged again")


def study(folder: Path, merge: Callable[..., Any], *more: str) -> Result:
    return asyncio.run(conduct(lab(folder, bench=Bench(), merge=merge), Terms(2, 1, (*SMALL, *more))))


def test_the_whole_study_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 nothing is lost; in bfloat16 something, and all of an adapter that is below the last bit. No file is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = study(folder, write_merged)
    assert not list(tmp_path.iterdir())
    assert result.findings[0].verdict == "equal"
    assert len(result.findings) == 1 + 2 + 2
    found = [Merged(**one) for one in result.document["merged"]]
    assert [(one.dtype, one.seed, one.strength) for one in found] == [
        (dtype, seed, strength) for seed, dtype, strength in itertools.product((0, 1), merging.DTYPES, merging.STRENGTHS)
    ]
    for one in found:
        if one.dtype == "float32":
            assert one.lost < 1e-2
            assert one.gap < 1e-3
            assert one.solved == one.solved_beside, "the same draws from the same probabilities"
        elif one.strength == 1:
            assert 1e-3 < one.lost < 0.5
            assert 1e-3 < one.gap_share < 0.5
        else:
            assert one.lost == pytest.approx(1, abs=0.1)
            assert one.changed < 1e-2
            assert one.gap_share == pytest.approx(1, abs=0.1), "what is merged is the base again"
    assert study(folder, never).document == result.document, "and is not measured again"
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_a_merging_that_halves_the_update_differs(folder: Path) -> None:
    def halved(base: str, checkpoint: Checkpoint, folder: Path, dtype: str) -> Rounding:
        return write_merged(base, stack_adapters([(checkpoint, 0.5)], "half"), folder, dtype)

    for record in folder.glob(f"runs/*/{RECORD}"):
        record.unlink()  # what was measured with the other
    result = study(folder, halved)
    assert result.findings[0].verdict == "differs"
    assert all(one["gap_share"] > 0.1 for one in result.document["merged"])


def test_what_is_solved_is_what_the_adapter_solves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what its base does: one that was spoilt solves nothing."""
    monkeypatch.setattr(merging, "PROBLEMS", 24)
    here = lab(tmp_path)
    (spoilt,) = asyncio.run(here.run([toy(rl={"learning_rate": 0.3})]))
    place = here.place(spoilt.config)

    async def solved() -> tuple[float, float]:
        await place.engine.load_state(BESIDE, read_adapter(spoilt.folder / "adapter")[0])
        return await _solved(place, None, spoilt.config), await _solved(place, BESIDE, spoilt.config)

    base, adapted = asyncio.run(solved())
    assert base > 0
    assert adapted == 0.0


def test_log_probabilities_are_those_of_the_answers() -> None:
    """As they were when they were drawn, and of none of the prompt's tokens."""
    engine = LoraEngine(load_base("nano"))
    prompts = [np.array([5, 9, 12]), np.array([7, 3, 3, 8, 1])]
    drawn = [engine.sample(prompt, None, SamplingParams(max_tokens=4, stop_token_ids=(), seed=1), 1).result()[0] for prompt in prompts]
    rows = [(len(prompt), np.concatenate([prompt, sample.tokens])) for prompt, sample in zip(prompts, drawn, strict=True)]
    found = asyncio.run(answers_logprobs(engine, None, rows))
    assert found == pytest.approx(np.concatenate([sample.logprobs for sample in drawn]), abs=1e-4)


def test_an_adapter_that_does_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="seed 0 changes no log-probability"):
        study(tmp_path, write_merged, "rl.steps=0")


def test_a_lab_that_cannot_merge_says_so_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to merge with"):
        asyncio.run(conduct(lab(tmp_path), Terms(2, 1, SMALL)))
    assert not (tmp_path / "runs").exists()
