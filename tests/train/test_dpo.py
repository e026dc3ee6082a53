"""DPO: it prefers what was chosen, against the right reference, and an interrupted run goes on to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import final_weights, open_session, random_adapter, run_session

from veneer.cli.assemble import execute
from veneer.train.config import RunConfig, make_config
from veneer.train.session import Interrupted
from veneer.types import AttestationError

NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def config_for(data: Path, **dpo: Any) -> RunConfig:
    settings = {"data": str(data), "steps": 6, "batch_size": 4, "held_out": 0.3, "learning_rate": 2e-3, **dpo}
    return make_config(
        {"kind": "dpo", "name": "small", "lora": {"rank": 2}, "dpo": settings, "eval": {"every": 3}, "checkpoint_every": 100}
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"colour of {i}?", "chosen": "blue", "rejected": "green"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_prefers_what_was_chosen(tmp_path: Path, data: Path) -> None:
    """From no preference to all of the pairs that it has never seen; and the record has TRL's names."""
    session = open_session(config_for(data), tmp_path / "run")
    result = run_session(session)
    metrics = session.run.metrics()
    assert [m["step"] for m in metrics] == list(range(7))
    first, last = metrics[0], metrics[-1]
    assert first["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["eval/rewards/accuracies"] == 1.0
    assert last["eval/rewards/margins"] > 0.1
    assert last["eval/loss"] < first["eval/loss"]
    for m in metrics[1:]:
        assert set(m) >= set(NAMES)
        assert m["rewards/margins"] == pytest.approx(m["rewards/chosen"] - m["rewards/rejected"], abs=1e-6)
    assert result.pairs + result.held_out_pairs == 24


def test_the_summary_says_what_the_pairs_taught(tmp_path: Path, data: Path) -> None:
    """A bit each at first and less as the policy learns; beside what the adapter can hold."""
    summary, _, _ = execute(config_for(data).model_copy(update={"folder": str(tmp_path / "run")}), lambda metrics: None)
    assert 0 < summary["bits"] < summary["pairs"]
    assert summary["capacity_bits"] == summary["trainable_parameters"]
    assert summary["saturation"] == pytest.approx(summary["bits"] / summary["capacity_bits"])


def test_the_reference_is_the_adapter_that_init_names_as_it_was(tmp_path: Path, data: Path) -> None:
    """With the base in its place every step after SFT is pulled back to the base, which other trainers' users found months later."""
    maker = open_session(config_for(data), tmp_path / "maker")
    maker.run.close()
    init = random_adapter(maker, "sft", seed=3)
    session = open_session(config_for(data, steps=3), tmp_path / "run", init)
    run_session(session)
    metrics = session.run.metrics()
    assert metrics[1]["loss"] == pytest.approx(np.log(2), abs=1e-6), "the policy begins as its reference"
    assert metrics[1]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert metrics[3]["rewards/margins"] > metrics[2]["rewards/margins"] > 0.0
    fresh = open_session(config_for(data, steps=1), tmp_path / "fresh")
    run_session(fresh)
    assert abs(metrics[1]["logps/chosen"] - fresh.run.metrics()[1]["logps/chosen"]) > 0.1, "init did nothing"


@pytest.mark.parametrize("with_init", [False, True])
def test_resume_gives_the_same_bytes(tmp_path: Path, data: Path, with_init: bool) -> None:
    """The reference must be there again, too."""
    init = None
    if with_init:
        maker = open_session(config_for(data), tmp_path / "maker")
        maker.run.close()
        init = random_adapter(maker, "sft", seed=3)
    whole = open_session(config_for(data), tmp_path / "whole", init)
    run_session(whole)
    first = open_session(config_for(data), tmp_path / "cut", init)
    first.on_step = lambda metrics: first.stop.set() if metrics["step"] == 2 else None
    with pytest.raises(Interrupted, match="the state is saved"):
        run_session(first)
    second = open_session(config_for(data), tmp_path / "cut", init)
    run_session(second)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert final_weights(second) == final_weights(whole)


def test_learning_rate_zero_is_caught(tmp_path: Path, data: Path) -> None:
    """A run that trains nothing fails at once."""
    with pytest.raises(AttestationError, match="learning rate is 0"):
        run_session(open_session(config_for(data, learning_rate=0.0), tmp_path / "run"))
