"""Settings that differ from token to token, against plain torch in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engine_tools import count_passes, datum, gradients
from peft import PeftModel
from test_fast_paths import family
from test_targets import check, engine_with, in_float64, near, soft

from veneer.types import DataError, Datum, RequestError


def spread(model: PeftModel, row: Datum, seed: int, ratio: bool = True) -> Datum:
    """The row with thresholds of its own at every token and a ratio mask that is neither the weights nor in them."""
    rng, (near_row,) = np.random.default_rng([5, seed]), near(model, [row], seed)
    low, high = rng.uniform(0.5, 0.95, row.mask.shape), rng.uniform(1.05, 1.5, row.mask.shape)
    counted = rng.uniform(size=row.mask.shape) < 0.5
    per_token = {"clip_low_threshold": low, "clip_high_threshold": high} | ({"sequence_ratio_mask": counted} if ratio else {})
    return dataclasses.replace(near_row, per_token={name: array.astype(np.float32) for name, array in per_token.items()})


@pytest.mark.parametrize("everywhere", [False, True], ids=["asked", "everywhere"])
@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_settings_per_token_are_those_of_plain_torch(name: str, everywhere: bool, tmp_path) -> None:
    """Thresholds and the sequence's tokens, of some rows of a request and not of others, are stronger than its settings."""
    engine = engine_with()
    model, is_gspo = in_float64("qwen3", engine, tmp_path), name == "gspo"
    rows = [spread(model, row, i, is_gspo) for i, row in enumerate([datum(20), soft(14, 3), datum(31, 2)])]
    data = [rows[0], *near(model, [datum(12, 7)]), *rows[1:]]
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    check(engine, model, data, name, config, everywhere=everywhere)
    metrics = engine.forward("x", data, name, config).result().metrics
    assert 0 < metrics["clip_fraction:mean"] < 1
    without = [dataclasses.replace(row, per_token={}) for row in data]
    assert engine.forward("x", without, name, config).result().metrics["loss:sum"] != pytest.approx(metrics["loss:sum"], rel=1e-3)


def test_a_sequences_ratio_reads_tokens_without_weight(tmp_path) -> None:
    """Their log-probabilities are computed and told, also in the prompt that a group shares, and they get no gradient of their own."""
    engine = engine_with()
    model = in_float64("qwen3", engine, tmp_path)
    data = [
        dataclasses.replace(row, per_token={"sequence_ratio_mask": np.ones_like(row.mask)}) for row in near(model, family(20, (9, 4, 6)))
    ]
    calls = count_passes(engine)
    check(engine, model, data, "gspo", {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0})
    assert sum(calls) == 20 + 9 + 4 + 6
    assert all(np.isfinite(lp).all() for lp in engine.forward("x", data, "gspo").result().logprobs_D)


def test_a_mean_over_no_tokens_leaves_the_ratio_at_one() -> None:
    """An empty answer in a batch must not make NaN of it."""
    engine = engine_with()
    row = datum(12)
    empty = dataclasses.replace(row, per_token={"sequence_ratio_mask": np.zeros_like(row.mask)})
    loss = engine.forward_backward("x", [empty], "gspo").result().metrics["loss:sum"]
    assert loss == pytest.approx(-float((row.mask * row.advantages).sum()), rel=1e-5)
    assert all(torch.isfinite(g).all() for g in gradients(engine, "x").values())


def test_dro_takes_its_penalty_per_token(tmp_path) -> None:
    """Whatever a loss has as a setting may differ from token to token."""
    engine = engine_with()
    row = datum(12)
    lp = engine.forward("x", [row], "dro").result().logprobs_D[0]
    beta = np.linspace(0, 1, 12).astype(np.float32)
    found = engine.forward("x", [dataclasses.replace(row, per_token={"beta": beta})], "dro").result().metrics["loss:sum"]
    wanted = -np.nansum(row.mask * (row.advantages * lp - beta / 2 * (lp - row.logprobs) ** 2))
    assert found == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "given", "words"),
    [
        ("ppo", "sequence_ratio_mask", ("ppo", "sequence_ratio_mask", "clip_low_threshold, clip_high_threshold")),
        ("gspo", "sequence_ratoi_mask", ("gspo", "sequence_ratoi_mask", "sequence_ratio_mask")),
        ("cross_entropy", "clip_low_threshold", ("cross_entropy", "clip_low_threshold", "none")),
    ],
)
def test_unknown_settings_per_token_are_refused_by_name(loss: str, given: str, words: tuple[str, ...]) -> None:
    """A mistyped array that is silently ignored costs a day."""
    engine, row = engine_with(), dataclasses.replace(datum(6), per_token={given: np.ones(6, np.float32)})
    for call in (engine.forward, engine.forward_backward):
        with pytest.raises(RequestError) as caught:
            call("x", [datum(5), row], loss)
        assert all(word in str(caught.value) for word in words), caught.value
    assert engine.step() == 0, "a refused request must not be queued"


def test_a_setting_that_is_not_a_number_is_refused() -> None:
    """It would make NaN of every token."""
    with pytest.raises(RequestError, match="beta"):
        engine_with().forward("x", [datum(6)], "dro", {"beta": float("nan")})


def test_the_weights_of_a_mean_are_relative(tmp_path) -> None:
    """A ratio mask of hundredths is the same mean as one of ones; and tokens weigh as the mask says."""
    engine, wide = engine_with(), {"clip_low_threshold": 0.0, "clip_high_threshold": 99.0}
    model = in_float64("qwen3", engine, tmp_path)
    (row,) = near(model, [datum(15, 3)])
    for weights in (np.full(15, 0.01), np.linspace(0, 0.05, 15)):
        counted = dataclasses.replace(row, per_token={"sequence_ratio_mask": weights.astype(np.float32)})
        check(engine, model, [counted], "gspo", wide)
        engine.zero_grad("x").result()


def test_datums_without_weights_have_no_ratio(tmp_path) -> None:
    """A group that cancelled, scored beside others with all that it brought."""
    engine = engine_with()
    idle = dataclasses.replace(datum(9, 1), mask=np.zeros(9, np.float32), per_token={"sequence_ratio_mask": np.ones(9, np.float32)})
    alone = engine.forward("x", [datum(40)], "gspo").result().metrics
    output = engine.forward("x", [idle, datum(40), idle], "gspo", everywhere=True).result()
    assert output.metrics == pytest.approx(alone, rel=1e-6)
    assert all(np.isfinite(lp).all() for lp in output.logprobs_D)


def test_what_a_ratio_reads_must_be_finite() -> None:
    """Also where it has no weight in the loss."""
    row = datum(9)
    row.logprobs[1] = np.nan
    counted = {"sequence_ratio_mask": np.ones(9, np.float32)}
    engine_with().forward("x", [row], "gspo").result()
    with pytest.raises(DataError, match=r"datum 0: logprobs must be finite where sequence_ratio_mask is not 0; nan is at \[1\]"):
        engine_with().forward("x", [dataclasses.replace(row, per_token=counted)], "gspo")
