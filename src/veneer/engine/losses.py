"""Losses as pure functions in a table. Each is a plain sum over tokens: normalisation is the caller's.

Notation, with one entry per trained token and all tensors [n]: ``lp`` log-probability under the training weights,
``q`` under the sampler, ``A`` advantage, ``w`` weight (the mask), ``r = exp(lp - q)``. Names, thresholds and defaults are
Tinker's (https://tinker-docs.thinkingmachines.ai/losses).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.types import LossName, RequestError


@dataclass(frozen=True)
class LossInputs:
    """One forward pass over some datums, flattened to the tokens with a weight."""

    lp: Tensor
    q: Tensor
    advantages: Tensor
    weights: Tensor
    datum: Tensor
    """Which datum a token belongs to, counted from 0; int64 [n]."""


Loss = Callable[[LossInputs, Mapping[str, float]], tuple[Tensor, Tensor]]
"""-> (summed loss, which tokens were clipped: bool [n])."""


def cross_entropy(x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """-sum w lp."""
    return -(x.weights * x.lp).sum(), torch.zeros_like(x.lp, dtype=torch.bool)


def importance_sampling(x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """-sum w r A."""
    return -(x.weights * (x.lp - x.q).exp() * x.advantages).sum(), torch.zeros_like(x.lp, dtype=torch.bool)


def ppo(x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """-sum w min(r A, clip(r, lo, hi) A) (https://arxiv.org/abs/1707.06347, equation 7), thresholds on r itself."""
    return _clipped((x.lp - x.q).exp(), x, config)


def cispo(x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """-sum w sg(clip(r, lo, hi)) A lp (https://arxiv.org/abs/2506.13585, equation 4): a clipped token still has a gradient."""
    ratio = (x.lp - x.q).exp().detach()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -(x.weights * clipped * x.advantages * x.lp).sum(), clipped != ratio


def dro(x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """-sum w (A lp - beta/2 (lp - q)^2) (https://arxiv.org/abs/2405.19107, equation 3, token by token)."""
    value = x.advantages * x.lp - 0.5 * config["beta"] * (x.lp - x.q).square()
    return -(x.weights * value).sum(), torch.zeros_like(x.lp, dtype=torch.bool)


def gspo(x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """PPO with the sequence's ratio s = exp(mean of lp - q over its weighted tokens), in GSPO-token form: the value of s and the
    gradient of each token's own lp (https://arxiv.org/abs/2507.18071, equations 7 and 14)."""
    present = (x.weights != 0).to(x.lp.dtype)
    size = int(x.datum.max()) + 1
    gap = torch.zeros(size, dtype=x.lp.dtype, device=x.lp.device).index_add(0, x.datum, (x.lp - x.q).detach() * present)
    count = torch.zeros_like(gap).index_add(0, x.datum, present)
    sequence_ratio = (gap / count.clamp(min=1)).exp()[x.datum]
    return _clipped(sequence_ratio * (x.lp - x.lp.detach()).exp(), x, config)


def _clipped(ratio: Tensor, x: LossInputs, config: Mapping[str, float]) -> tuple[Tensor, Tensor]:
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
        RequestError: an unknown loss or setting.
    """
    if name not in LOSSES:
        raise RequestError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
    function, defaults = LOSSES[name]
    unknown = set(config or ()) - set(defaults)
    if unknown:
        raise RequestError(f"loss {name!r} has no setting {sorted(unknown)[0]!r}; it has {', '.join(defaults) or 'none'}")
    return function, {**defaults, **(config or {})}


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
