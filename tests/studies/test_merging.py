"""Merging on the real base: what the study says of the engine's own merging, and of mergings that lose something."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_lab import lab

from veneer.engine.counting import Bench
from veneer.engine.merge import Rounding, write_merged
from veneer.store.stack import stack_adapters
from veneer.studies import merging
from veneer.studies.contest import Terms
from veneer.studies.merging import DTYPES, Merged, conduct
from veneer.studies.result import Result
from veneer.types import Checkpoint, ConfigError

SMALL = ("env.name=sort", "rl.steps=2", "rl.groups_per_batch=4", "rl.max_tokens=24", "eval.problems=4")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROBLEMS": 4, "STRENGTHS": (1.0, 0.01)}.items():
        monkeypatch.setattr(merging, name, value)
    for name, value in {"PROMPTS": 2, "ANSWERS": 2, "LENGTH": 6}.items():
        monkeypatch.setattr(f"veneer.studies.toggle.{name}", value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters are kept, so that they are trained once."""
    return tmp_path_factory.mktemp("merging")


def study(folder: Path, merge: Callable[..., Any]) -> Result:
    return asyncio.run(conduct(lab(folder, bench=Bench(), merge=merge), Terms(2, 1, SMALL)))


def test_the_whole_study_runs(folder: Path, tmp_path: Path) -> None:
    """In float32 nothing is lost; in sixteen bits the more, the weaker the adapter and the fewer bits a number has. No file is left."""
    result = study(folder, write_merged)
    assert result.findings[0].verdict == "equal"
    assert len(result.findings) == 1 + 6 + 4
    found = [Merged(**one) for one in result.document["merged"]]
    assert len(found) == 2 * 2 * len(DTYPES)
    lost = {(one.dtype, one.strength): one.lost for one in found if one.seed == 0}
    assert lost["float32", 1.0] < 1e-3 < lost["float16", 1.0] < lost["bfloat16", 1.0] < lost["bfloat16", 0.01]
    shares = {(one.dtype, one.strength): one.gap_share for one in found if one.seed == 0}
    assert shares["float32", 1.0] < shares["float16", 1.0] < shares["bfloat16", 1.0] < shares["bfloat16", 0.01]
    assert all(one.solved == one.solved_beside for one in found if one.dtype == "float32")
    assert not list(folder.rglob("merged-*"))
    json.dumps(result.document)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_a_merging_that_halves_the_update_differs(folder: Path) -> None:
    def halved(base: str, checkpoint: Checkpoint, folder: Path, dtype: str) -> Rounding:
        return write_merged(base, stack_adapters([(checkpoint, 0.5)], "half"), folder, dtype)

    result = study(folder, halved)
    assert result.findings[0].verdict == "differs"
    assert all(one["gap_share"] > 0.1 for one in result.document["merged"])


def test_a_lab_that_cannot_merge_says_so_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to merge with"):
        asyncio.run(conduct(lab(tmp_path), Terms(2, 1, SMALL)))
    assert not (tmp_path / "runs").exists()
