"""Losses as pure functions in a table. Each is a plain sum over tokens: normalisation is the caller's.

Notation, with one entry per trained token and all tensors [n]: ``lp`` log-probability under the training weights,
``q`` under the sampler, ``A`` advantage, ``w`` weight (the mask), ``r = exp(lp - q)``. Names, thresholds and defaults are
Tinker's (https://tinker-docs.thinkingmachines.ai/losses). Of K targets at one position each is a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.types import LossName, RequestError

SEQUENCE_RATIO_MASK = "sequence_ratio_mask"
"""What a datum may bring for gspo: the weight of each token in the mean that makes the sequence's ratio."""


@dataclass(frozen=True)
class SequenceTokens:
    """The tokens that sequences' ratios are means over, with or without a weight in the loss; all [m]."""

    lp: Tensor
    """Without gradient."""
    q: Tensor
    weights: Tensor
    datum: Tensor


@dataclass(frozen=True)
class LossInputs:
    """One forward pass over some datums, flattened to the tokens with a weight."""

    lp: Tensor
    q: Tensor
    advantages: Tensor
    weights: Tensor
    datum: Tensor
    """Which datum a token belongs to, counted from 0; int64 [n]."""
    sequence: SequenceTokens | None = None
    """None: the tokens with a weight, each counted once."""


Settings = Mapping[str, Any]
"""Of a loss by name: all are numbers, or, where some datum brings its own, all are tensors [n]."""
Loss = Callable[[LossInputs, Settings], tuple[Tensor, Tensor]]
"""-> (summed loss, which tokens were clipped: bool [n])."""


def cross_entropy(x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    """-sum w lp."""
    return -(x.weights * x.lp).sum(), torch.zeros_like(x.lp, dtype=torch.bool)


def importance_sampling(x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    """-sum w r A."""
    return -(x.weights * (x.lp - x.q).exp() * x.advantages).sum(), torch.zeros_like(x.lp, dtype=torch.bool)


def ppo(x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    """-sum w min(r A, clip(r, lo, hi) A) (https://arxiv.org/abs/1707.06347, equation 7), thresholds on r itself."""
    return _clipped((x.lp - x.q).exp(), x, config)


def cispo(x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    """-sum w sg(clip(r, lo, hi)) A lp (https://arxiv.org/abs/2506.13585, equation 4): a clipped token still has a gradient."""
    ratio = (x.lp - x.q).exp().detach()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -(x.weights * clipped * x.advantages * x.lp).sum(), clipped != ratio


def dro(x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    """-sum w (A lp - beta/2 (lp - q)^2) (https://arxiv.org/abs/2405.19107, equation 3, token by token)."""
    value = x.advantages * x.lp - 0.5 * config["beta"] * (x.lp - x.q).square()
    return -(x.weights * value).sum(), torch.zeros_like(x.lp, dtype=torch.bool)


def gspo(x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    """PPO with the sequence's ratio s = exp(mean of lp - q over its tokens), in GSPO-token form: the value of s and the gradient of
    each token's own lp (https://arxiv.org/abs/2507.18071, equations 7 and 14). A mean over no tokens is 0."""
    mean = x.sequence or SequenceTokens(x.lp, x.q, (x.weights != 0).to(x.lp.dtype), x.datum)
    size = int(x.datum.max()) + 1
    gap = torch.zeros(size, dtype=x.lp.dtype, device=x.lp.device).index_add(0, mean.datum, (mean.lp - mean.q).detach() * mean.weights)
    count = torch.zeros_like(gap).index_add(0, mean.datum, mean.weights)
    sequence_ratio = (gap / count.where(count > 0, 1)).exp()[x.datum]
    return _clipped(sequence_ratio * (x.lp - x.lp.detach()).exp(), x, config)


def _clipped(ratio: Tensor, x: LossInputs, config: Settings) -> tuple[Tensor, Tensor]:
    bounded = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    plain, clipped = ratio * x.advantages, bounded * x.advantages
    return -(x.weights * torch.minimum(plain, clipped)).sum(), clipped < plain


LOSSES: dict[LossName, tuple[Loss, dict[str, float]]] = {
    "cross_entropy": (cross_entropy, {}),
    "importance_sampling": (importance_sampling, {}),
    "ppo": (ppo, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": (cispo, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": (dro, {"beta": 0.05}),
    "gspo": (gspo, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
}
"""name -> (function, its settings with their defaults)."""


def resolve_loss(name: str, config: Mapping[str, float] | None) -> tuple[Loss, dict[str, float]]:
    """The function and its full settings.

    Raises:
        RequestError: an unknown loss or setting, or a setting that is not a number.
    """
    if name not in LOSSES:
        raise RequestError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
    function, defaults = LOSSES[name]
    unknown = set(config or ()) - set(defaults)
    if unknown:
        raise RequestError(f"loss {name!r} has no setting {sorted(unknown)[0]!r}; it has {', '.join(defaults) or 'none'}")
    settings = {**defaults, **(config or {})}
    odd = [key for key, value in settings.items() if math.isnan(value)]
    if odd:
        raise RequestError(f"loss {name!r}: setting {odd[0]!r} must be a number, and is NaN")
    return function, settings


def check_per_token(loss: LossName, names: Iterable[str]) -> None:
    """Whether a loss reads what datums bring under these names.

    Raises:
        RequestError: it does not.
    """
    known = [*LOSSES[loss][1], *([SEQUENCE_RATIO_MASK] if loss == "gspo" else [])]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise RequestError(f"loss {loss!r} reads no {unknown[0]!r} per token; it reads {', '.join(known) or 'none'}")


def drift(x: LossInputs) -> dict[str, Tensor]:
    """Sums over tokens that tell how far the training weights are from the sampler: the k1 and k2 estimators of KL(sampler || trainer)
    (http://joschu.net/blog/kl-approx.html) and the ratio, under the cookbook's metric names."""
    present = (x.weights != 0).to(x.lp.dtype)
    gap = (x.q - x.lp.detach()) * present
    return {
        "kl_sample_train_v1": gap.sum(),
        "kl_sample_train_v2": 0.5 * gap.square().sum(),
        "ratio": ((-gap).exp() * present).sum(),
    }
