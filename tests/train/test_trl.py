"""GRPO, Dr. GRPO, DAPO, RLOO, GSPO and CISPO beside TRL: our advantages, normalisation, corrections and losses on the tensors whose
losses and gradients TRL's own trainers gave (trl_losses.py, which made trl_losses.json).

Differences of convention, each of which a setting below takes care of or a test shows:

- TRL's thresholds are distances from 1, ours are on the ratio: epsilon 0.2 is clip_low_threshold 0.8 and clip_high_threshold 1.2. For
  CISPO alone its ``epsilon_high`` is the threshold itself, and there is none below (ours: 0).
- TRL divides by a deviation with n - 1 below the sum, plus 1e-4.
- TRL keeps groups of one reward in the batch: they count among the episodes and tokens that a loss is divided by, and a KL term acts on
  them. Here they are dropped; the batch's episodes are counted with them, its tokens only if they are told.
- With ``mask_truncated_completions`` an episode counts among TRL's episodes and not among its tokens, as here.
- TRL weighs the policy's term alone with the importance weights of a correction; here they are weights of the whole loss.
- TRL multiplies its k3 by the ratio unless ``use_bias_correction_kl=False``; ours is the paper's.
- TRL's entropy bonus is a mean over tokens whatever the loss is divided by; ours is divided as the loss is.
- TRL's RLOO takes the ratio of a whole sequence, the product over its tokens, and clips it; ours is a ratio a token. On fresh samples,
  where every ratio is 1, the gradients are the same and the values are not (A each sequence against A each token); for answers of one
  token all is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.engine.losses import LossInputs, add_terms, resolve_loss, resolve_terms
from veneer.train.advantages import Advantages, compute_advantages
from veneer.train.corrections import correct
from veneer.train.datums import groups_to_data
from veneer.train.normalise import normalise
from veneer.types import LossName, Sample, Trajectory, TrajectoryGroup, Transition

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
EPISODES, GROUP = 16, 4


@dataclass(frozen=True)
class Ours:
    """The settings under which we are equal to a case of TRL's."""

    advantage: str
    loss: LossName
    normalise: str
    config: Mapping[str, float] = field(default_factory=dict[str, float])
    correction: tuple[str, str] | None = None
    mask_truncated: bool = False
    keep_constant: bool = False
    """Groups of one reward stay, with advantages of 0."""


PPO = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
HIGHER = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
EQUAL = {
    "grpo": Ours("grpo", "ppo", "sequence_mean", PPO),
    "grpo_with_kl": Ours("grpo", "ppo", "sequence_mean", PPO | {"kl_coef": 0.3, "kl_estimator": 3}, keep_constant=True),
    "dr_grpo": Ours("group_mean", "ppo", "max_tokens", PPO),
    "dapo": Ours("grpo", "ppo", "token_mean", HIGHER, mask_truncated=True, keep_constant=True),
    "dapo_with_entropy": Ours("grpo", "ppo", "token_mean", HIGHER | {"entropy_coef": 0.2}, keep_constant=True),
    "gspo": Ours("grpo", "gspo", "sequence_mean", {"clip_low_threshold": 0.97, "clip_high_threshold": 1.04}),
    "cispo": Ours("grpo", "cispo", "token_mean", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.3}, keep_constant=True),
    "rloo": Ours("rloo", "importance_sampling", "episodes"),
    "rloo_of_one_token": Ours("rloo", "ppo", "episodes", PPO),
    "grpo_token_truncate": Ours("grpo", "ppo", "sequence_mean", PPO, ("truncated", "token")),
    "grpo_token_mask": Ours("grpo", "ppo", "sequence_mean", PPO, ("masked", "token")),
    "grpo_sequence_truncate": Ours("grpo", "ppo", "sequence_mean", PPO, ("truncated", "sequence")),
    "grpo_sequence_mask": Ours("grpo", "ppo", "sequence_mean", PPO, ("masked", "sequence")),
}


def batch_of(name: str) -> dict[str, Any]:
    return RECORDED["batches"]["one_token" if "lengths" in RECORDED["cases"][name]["settings"] else "ragged"]


def groups_of(batch: dict[str, Any], sampler: str) -> list[TrajectoryGroup]:
    """The batch as episodes of one turn behind a prompt of one token."""
    episodes: list[Trajectory] = []
    for reward, logprobs, cut in zip(batch["rewards"], batch[sampler], batch["truncated"], strict=True):
        tokens = np.arange(len(logprobs), dtype=np.int64)
        sample = Sample(tokens, np.array(logprobs, np.float32), "length" if cut else "stop", "base", None)
        turn = Transition(np.array([7]), sample, {"role": "assistant", "content": ""}, reward)
        episodes.append(Trajectory([turn], reward, truncated=cut))
    return [TrajectoryGroup(i, episodes[i * GROUP : (i + 1) * GROUP]) for i in range(EPISODES // GROUP)]


def kept(advantages_P: Advantages) -> Advantages:
    return [[[0.0]] * GROUP if group is None else group for group in advantages_P]


def evaluate(name: str, ours: Ours, batch: dict[str, Any]) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """Our loss, and its gradients with respect to log-probabilities and entropies, per episode."""
    groups = groups_of(batch, "sampler" if ours.correction else "old")
    advantages = compute_advantages(groups, ours.advantage)
    data_ED = groups_to_data(groups, kept(advantages) if ours.keep_constant else advantages, mask_truncated=ours.mask_truncated)
    index = [i for i in range(EPISODES) if ours.keep_constant or advantages[i // GROUP] is not None]
    data_ED = normalise(data_ED, ours.normalise, episodes=EPISODES, max_tokens=RECORDED["max_tokens"])
    rows = [(i, datum) for i, data_D in zip(index, data_ED, strict=True) for datum in data_D]
    if ours.correction:
        bounds = {"low": 0.8, "high": 1.2}
        data, _ = correct([d for _, d in rows], [np.array(batch["old"][i], np.float32) for i, _ in rows], *ours.correction, bounds)
        rows = [(i, datum) for (i, _), datum in zip(rows, data, strict=True)]
    lps, entropies = ([torch.tensor(row, requires_grad=True) for row in batch[key]] for key in ("lp", "entropy"))
    if name == "rloo":
        lps = [torch.tensor(row, requires_grad=True) for row in batch["old"]]
    config = dict(ours.config)
    terms = resolve_terms(ours.loss, config)

    def joined(per_row: list[torch.Tensor]) -> torch.Tensor:
        """At the tokens with a weight, as the engine gives them."""
        return torch.cat([values[torch.from_numpy(d.mask != 0)] for values, (_, d) in zip(per_row, rows, strict=True)])

    def of(attribute: str) -> torch.Tensor:
        return joined([torch.from_numpy(getattr(d, attribute)) for _, d in rows])

    x = LossInputs(
        joined([lps[i] for i, _ in rows]),
        *(of(attribute) for attribute in ("logprobs", "advantages", "mask")),
        joined([torch.full((len(d.mask),), at) for at, (_, d) in enumerate(rows)]),
        reference=joined([torch.tensor(batch["reference"][i]) for i, _ in rows]) if terms.kl_coef else None,
        entropy=joined([entropies[i] for i, _ in rows]) if terms.entropy_coef else None,
    )
    function, full = resolve_loss(ours.loss, config)
    loss, _ = function(x, full)
    added, _ = add_terms(x, terms)
    loss = loss if added is None else loss + added
    loss.backward()
    zeros = [
        [np.zeros(len(row)) if leaf.grad is None else leaf.grad.numpy() for leaf, row in zip(leaves, batch["lp"], strict=True)]
        for leaves in (lps, entropies)
    ]
    return float(loss.detach()), *zeros


def test_every_case_that_was_recorded_is_compared() -> None:
    """By the versions that the benchmarks use."""
    assert set(EQUAL) == set(RECORDED["cases"])
    assert RECORDED["versions"] == {"trl": "1.16.0", "torch": "2.13.0"}


@pytest.mark.parametrize("name", EQUAL)
def test_advantages_are_trls(name: str) -> None:
    """From rewards alone; a group without a signal is 0 there and dropped here."""
    found = kept(compute_advantages(groups_of(batch_of(name), "old"), EQUAL[name].advantage))
    assert [a for group in found for turns in group or () for a in turns] == pytest.approx(RECORDED["cases"][name]["advantages"], abs=1e-6)


@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_are_trls(name: str) -> None:
    """Token by token, to what float32 can tell."""
    batch, case = batch_of(name), RECORDED["cases"][name]
    loss, by_lp, by_entropy = evaluate(name, EQUAL[name], batch)
    if name == "rloo":  # a constant: A each token against A each sequence
        counts = [a * (len(row) - 1) for a, row in zip(case["advantages"], batch["lp"], strict=True)]
        loss += sum(counts) / EPISODES
    assert loss == pytest.approx(case["loss"], abs=2e-6)
    size = max(abs(g) for row in case["by_lp"] for g in row)
    for ours, theirs in zip(by_lp, case["by_lp"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * size, rtol=2e-6)
    for ours, theirs in zip(by_entropy, case["by_entropy"] or [np.zeros(len(row)) for row in batch["lp"]], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8, rtol=2e-6)


def test_the_recorded_batch_has_what_tells_conventions_apart() -> None:
    """Ragged lengths, one group without a signal, cut answers, clipped and unclipped tokens and sequences of both signs, and weights
    beyond both bounds: else the comparison could not fail."""
    batch = RECORDED["batches"]["ragged"]
    ratios = [np.exp(np.subtract(lp, old)) for lp, old in zip(batch["lp"], batch["old"], strict=True)]
    weights = [np.exp(np.subtract(old, q)) for old, q in zip(batch["old"], batch["sampler"], strict=True)]
    means = [np.exp(np.log(r).mean()) for r in ratios]
    assert len({len(r) for r in ratios}) > 5
    assert 0 < sum(batch["truncated"]) < EPISODES
    assert len({*batch["rewards"][8:12]}) == 1
    signs = np.sign(RECORDED["cases"]["grpo"]["advantages"])
    for sign in (-1, 1):
        mine = np.concatenate([r for r, s in zip(ratios, signs, strict=True) if s == sign])
        assert (mine < 0.8).any()
        assert (mine > 1.28).any()
        assert ((mine > 0.8) & (mine < 1.2)).any()
    rose = np.concatenate([r for r, s, cut in zip(ratios, signs, batch["truncated"], strict=True) if s > 0 and not cut])
    assert ((rose > 1.21) & (rose < 1.27)).any(), "a token that only DAPO's higher threshold lets through"
    assert any(m < 0.97 and s < 0 for m, s in zip(means, signs, strict=True))
    assert any(m > 1.04 and s > 0 for m, s in zip(means, signs, strict=True))
    for judged in (np.concatenate(weights), np.array([w.prod() for w in weights])):
        assert (judged < 0.8).any()
        assert (judged > 1.2).any()
        assert ((judged > 0.8) & (judged < 1.2)).any()


WRONG = {
    "grpo": {"advantage": "group_mean"},
    "dr_grpo": {"normalise": "sequence_mean"},
    "dapo": {"config": PPO},
    "gspo": {"loss": "ppo"},
    "cispo": {"loss": "importance_sampling", "config": {}},
    "rloo": {"advantage": "group_mean"},
    "grpo_token_mask": {"correction": ("truncated", "token")},
    "grpo_sequence_mask": {"correction": ("masked", "token")},
    "grpo_with_kl": {"config": PPO | {"kl_coef": 0.3, "kl_estimator": 2}},
    "dapo_with_entropy": {"normalise": "episodes"},
}


@pytest.mark.parametrize("name", WRONG)
def test_another_setting_is_another_loss(name: str) -> None:
    """The comparison can fail: one choice changed, and the gradients are others."""
    batch, case = batch_of(name), RECORDED["cases"][name]
    _, by_lp, _ = evaluate(name, replace(EQUAL[name], **WRONG[name]), batch)
    gap = max(float(np.abs(np.subtract(ours, theirs)).max()) for ours, theirs in zip(by_lp, case["by_lp"], strict=True))
    assert gap > 1e-4


def test_token_mean_can_count_what_trl_counts() -> None:
    """With its constant group dropped, and the tokens of the whole batch told, DAPO's gradient is TRL's all the same."""
    batch, case = batch_of("cispo"), RECORDED["cases"]["cispo"]
    groups = groups_of(batch, "old")
    data_ED = groups_to_data(groups, compute_advantages(groups, "grpo"))
    tokens = sum(map(len, batch["lp"]))
    weights = {
        float(w)
        for data_D in normalise(data_ED, "token_mean", episodes=EPISODES, max_tokens=MOST, tokens=tokens)
        for d in data_D
        for w in d.mask
    }
    assert weights == {float(np.float32(1 / tokens))}
    assert len(data_ED) == EPISODES - GROUP
    assert not any(any(row) for row in case["by_lp"][8:12])


MOST: int = RECORDED["max_tokens"]
