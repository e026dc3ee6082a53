"""Corrections for a sampler and a trainer that are not quite the same distribution: other kernels, other precision, older weights.

Let q be the sampler's log-probability of a token and p the trainer's before the step ("old"). The gradient of what was sampled is
unbiased under p with each token weighted by w = exp(p - q), or each row by the product over its tokens. Both have large variance, so w
is kept within bounds. The loss's own ratio is then to p, the proximal policy, and its clipping knows nothing of the sampler.
(https://fengyao.notion.site/off-policy-rl; "decoupled PPO", https://arxiv.org/abs/2110.00641.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from veneer.train.choices import Settings, resolve
from veneer.train.kl import ESTIMATORS, Doubles
from veneer.types import DataError, Datum, Floats, RequestError

Bound = Callable[[Doubles, float, float], Doubles]
"""Ratios, low, high -> weights."""


def truncated(ratio: Doubles, low: float, high: float) -> Doubles:
    """min(max(w, low), high): truncated importance sampling (https://fengyao.notion.site/off-policy-rl; verl's ``rollout_is``, TRL's
    ``token_truncate`` and ``sequence_truncate``)."""
    return ratio.clip(low, high)


def masked(ratio: Doubles, low: float, high: float) -> Doubles:
    """w within [low, high], else 0: IcePop (https://ringtech.notion.site/icepop), TRL's ``token_mask`` and ``sequence_mask``."""
    return np.where((ratio >= low) & (ratio <= high), ratio, 0.0)


CORRECTIONS: dict[str, tuple[Bound, Settings]] = {
    "truncated": (truncated, {"low": 0.0, "high": 2.0}),
    "masked": (masked, {"low": 0.5, "high": 5.0}),
}
"""name -> (function, its bounds with their defaults)."""

LEVELS = ("token", "sequence")


def resolve_correction(name: str, level: str = "token", config: Settings | None = None) -> tuple[Bound, dict[str, float]]:
    """The function and its bounds.

    Raises:
        RequestError: an unknown name, level or setting, or bounds that are not 0 <= low <= high with 1 between them.
    """
    function, bounds = resolve("correction", CORRECTIONS, name, config)
    if level not in LEVELS:
        raise RequestError(f"unknown level {level!r} of a correction; there are {', '.join(LEVELS)}")
    if not 0 <= bounds["low"] <= 1 <= bounds["high"]:
        raise RequestError(
            f"correction {name!r}: low must be from 0 to 1 and high at least 1; got {bounds['low']:g} and {bounds['high']:g}"
        )
    return function, bounds


def correct(
    data: Sequence[Datum], old_logprobs_D: Sequence[Floats], name: str, level: str = "token", config: Settings | None = None
) -> tuple[list[Datum], dict[str, float]]:
    """Data whose ``logprobs`` are the trainer's and whose weights carry the correction, and what is told about it.

    ``old_logprobs_D``: of the targets of each datum under the weights before the step, read where its weight is not 0:
    ``engine.forward(adapter, data, loss)`` has them. A sequence is a datum: an episode whose history was written anew is several.

    What is weighted is a token of the whole loss: its terms for KL and entropy too, where TRL weighs the policy's term alone. A token
    that is masked drops out of gspo's mean. Normalise before, as TRL does, so that what is masked still counts.

    Metrics: ``correction_weight`` is the mean of w over tokens after it was bounded, ``correction_share`` the share of tokens (level
    "token") or rows ("sequence") whose w was out of bounds, and ``kl_sample_train_v1`` to ``v3`` estimate KL(sampler || trainer) before
    the step, in nats a token. The engine's metrics of the same names are of corrected data, so between old and new weights.

    Raises:
        RequestError: as ``resolve_correction``.
        DataError: a log-probability is missing.
    """
    function, bounds = resolve_correction(name, level, config)
    rows = [_trained(i, d, old) for i, (d, old) in enumerate(zip(data, old_logprobs_D, strict=True))]
    gaps = [old - q for old, q in rows]
    with np.errstate(over="ignore"):  # what overflows is out of bounds
        ratios = [np.exp(gap if level == "token" else np.full(len(gap), gap.sum())) for gap in gaps]
    weights = [function(ratio, bounds["low"], bounds["high"]) for ratio in ratios]
    corrected = [_with(d, old, w) for d, old, w in zip(data, old_logprobs_D, weights, strict=True)]
    return corrected, _metrics(rows, ratios, weights, bounds, level)


def _trained(i: int, datum: Datum, old: Floats) -> tuple[Doubles, Doubles]:
    """The trainer's and the sampler's log-probabilities of a datum's trained targets."""
    read = datum.mask != 0
    if old.shape != datum.targets.shape or not np.isfinite(old[read]).all():
        raise DataError(f"correction: datum {i} has no finite log-probability of the trainer for each of its trained targets")
    return old[read].astype(float), datum.logprobs[read].astype(float)


def _with(datum: Datum, old: Floats, weights: Doubles) -> Datum:
    mask, read = datum.mask.copy(), datum.mask != 0
    mask[read] *= weights.astype(np.float32)
    return replace(datum, mask=mask, logprobs=np.where(read, old, np.float32(0)).astype(np.float32))


def _metrics(
    rows: Sequence[tuple[Doubles, Doubles]], ratios: Sequence[Doubles], weights: Sequence[Doubles], bounds: Settings, level: str
) -> dict[str, float]:
    if not any(len(old) for old, _ in rows):
        return {}
    olds, qs = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    ratio, weight = np.concatenate(ratios), np.concatenate(weights)
    judged = ratio if level == "token" else np.array([one[0] for one in ratios if len(one)])
    out = (judged < bounds["low"]) | (judged > bounds["high"])
    kl = {f"kl_sample_train_v{k}": float(estimate(qs, olds).mean()) for k, estimate in ESTIMATORS.items()}
    return {"correction_weight": float(weight.mean()), "correction_share": float(out.mean()), **kl}
