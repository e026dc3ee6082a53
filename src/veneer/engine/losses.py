"""Losses as pure functions in a table, and what can be added to them. Each is a plain sum over tokens: normalisation is the caller's.

Notation, with one entry per trained token and all tensors [n]: ``lp`` log-probability under the training weights,
``q`` under the sampler, ``A`` advantage, ``w`` weight (the mask), ``r = exp(lp - q)``. Names, thresholds and defaults are
Tinker's (https://tinker-docs.thinkingmachines.ai/losses). Of K targets at one position each is a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from veneer.types import LossName, RequestError

SEQUENCE_RATIO_MASK = "sequence_ratio_mask"
"""What a datum may bring for gspo: the weight of each token in the mean that makes the sequence's ratio."""
REFERENCE_LOGPROBS = "reference_logprobs"
"""What a datum must bring where ``kl_coef`` is not 0: the log-probability of each target under the reference, the base as a rule."""


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
    reference: Tensor | None = None
    """Log-probability under the reference; None: not needed."""
    entropy: Tensor | None = None
    """Of the whole distribution that the token was one draw from, with gradient; None: not needed."""


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


@dataclass(frozen=True)
class Terms:
    """What is added to any loss but ``cross_entropy``, token by token under the same weights: + kl_coef k - entropy_coef H."""

    kl_coef: float = 0.0
    kl_estimator: float = 3.0
    """1, 2 or 3: see ``kl_estimate``."""
    entropy_coef: float = 0.0
    """Of H, the entropy of the whole next-token distribution where the token was drawn; a negative one lowers it."""


TERMS = tuple(field.name for field in fields(Terms))
"""Their settings, beside a loss's own."""


def kl_estimate(lp: Tensor, reference: Tensor, estimator: float) -> Tensor:
    """[n] estimates of KL(trained || reference) from tokens of the trained policy (http://joschu.net/blog/kl-approx.html), with d their
    lp - reference: 1 is d, 2 is d^2 / 2, 3 is exp(-d) - 1 + d, which is the loss of GRPO (https://arxiv.org/abs/2402.03300, equation 4)
    and of TRL with ``use_bias_correction_kl=False``.

    As a loss on fresh samples, only 2 has the gradient of the KL: that of 1 is 0 in the mean, and that of 3 is the other direction's,
    KL(reference || trained) (https://arxiv.org/abs/2506.09477)."""
    gap = lp - reference
    if estimator == 1:
        return gap
    return 0.5 * gap.square() if estimator == 2 else torch.expm1(-gap) + gap


def add_terms(x: LossInputs, terms: Terms) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What is added to the loss, None for nothing; and sums over tokens of the estimates and the entropies."""
    parts: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    if x.reference is not None:
        kl = kl_estimate(x.lp, x.reference, terms.kl_estimator)
        parts.append(terms.kl_coef * (x.weights * kl).sum())
        sums["kl_base"] = kl.detach().sum()
    if x.entropy is not None:
        parts.append(-terms.entropy_coef * (x.weights * x.entropy).sum())
        sums["entropy"] = x.entropy.detach().sum()
    return torch.stack(parts).sum() if parts else None, sums


def resolve_loss(name: str, config: Mapping[str, float] | None) -> tuple[Loss, dict[str, float]]:
    """The function and its own full settings; ``resolve_terms`` has the others.

    Raises:
        RequestError: an unknown loss or setting, or a setting that is not a number.
    """
    if name not in LOSSES:
        raise RequestError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
    function, defaults = LOSSES[name]
    known = [*defaults, *(TERMS if name != "cross_entropy" else ())]
    unknown = set(config or ()) - set(known)
    if unknown:
        raise RequestError(f"loss {name!r} has no setting {sorted(unknown)[0]!r}; it has {', '.join(known) or 'none'}")
    odd = [key for key, value in (config or {}).items() if math.isnan(value)]
    if odd:
        raise RequestError(f"loss {name!r}: setting {odd[0]!r} must be a number, and is NaN")
    return function, {key: (config or {}).get(key, default) for key, default in defaults.items()}


def resolve_terms(name: str, config: Mapping[str, float] | None) -> Terms:
    """What is added to a loss that is known with these settings.

    Raises:
        RequestError: a setting has a value that it cannot have.
    """
    terms = Terms(**{key: value for key, value in (config or {}).items() if key in TERMS})
    if not (0 <= terms.kl_coef < math.inf and math.isfinite(terms.entropy_coef)):
        raise RequestError(f"loss {name!r}: kl_coef must be a finite number from 0 and entropy_coef a finite number")
    if terms.kl_estimator not in (1, 2, 3):
        raise RequestError(f"loss {name!r}: kl_estimator must be 1, 2 or 3, and is {terms.kl_estimator:g}")
    return terms


def check_per_token(loss: LossName, names: Iterable[str], terms: Terms) -> None:
    """Whether a loss reads what datums bring under these names.

    Raises:
        RequestError: it does not.
    """
    known = [*LOSSES[loss][1], *([SEQUENCE_RATIO_MASK] if loss == "gspo" else []), *([REFERENCE_LOGPROBS] if terms.kl_coef else [])]
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
