"""What becomes visible in 16 bits, by reward and by demonstrations, beside what sizes alone make visible."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from test_lab import Counted, lab

from veneer.engine import load_base
from veneer.studies import visibility
from veneer.studies.contest import Terms
from veneer.studies.visibility import REWARDED, SHARED, SHOWN, _base
from veneer.train.config import make_config

RL = ("rl.groups_per_batch=2", "rl.group_size=2", "rl.max_tokens=8", "eval.problems=2")
SFT = ("sft.batch_size=2", "sft.held_out=0.1")


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two rates, three seeds and two small steps: both ways, every finding, a page and a picture."""
    monkeypatch.setattr(visibility, "RATES", (1e-5, 1e-3))
    monkeypatch.setattr(visibility, "LENGTHS", (1, 2))
    monkeypatch.setattr(visibility, "ROWS", 40)
    result = asyncio.run(visibility.conduct(lab(tmp_path, Counted()), Terms(3, 1, RL + SFT)))
    shown = json.loads(json.dumps(result.document))["shown"]
    wanted = [(way, rate, steps) for way in (REWARDED, SHOWN) for rate in (1e-5, 1e-3) for steps in (1, 2)]
    assert [(one["way"], one["learning_rate"], one["steps"]) for one in shown] == wanted
    by_demonstrations = [one for one in shown[4:] if one["steps"] == 2]
    for once, twice in itertools.pairwise(shown[4:6]):
        assert all(0 < first < both for first, both in zip(once["bfloat16"], twice["bfloat16"], strict=True)), "a second step shows more"
    for one in by_demonstrations:  # each step moves every weight by about the rate
        assert min(one["float32"]) > 0.5
        assert all(0 < share < 1 for share in one["bfloat16"])
        assert [pair[:2] for pair in one["overlaps"]] == [[0, 1], [0, 2], [1, 2]]
    small, large = (np.mean(one["bfloat16"]) for one in by_demonstrations)
    assert large > small + 0.2
    assert sum("beside what sizes alone" in f.question for f in result.findings) == 4
    assert sum("by reward beside by demonstrations" in f.question for f in result.findings) == 2
    assert sum("after so many steps: 1" in f.question for f in result.findings) == 2
    assert result.tables.count("\n| by ") == 8
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_the_base_is_what_was_loaded(tmp_path: Path) -> None:
    found = asyncio.run(_base(lab(tmp_path, Counted()), make_config(SHARED[REWARDED])))
    model = load_base("nano", "cpu").model
    assert all(np.array_equal(found[name], p.detach().numpy()) for name, p in model.named_parameters())
