"""KL divergence from samples, and the KL to the base as a penalty in the reward.

For x drawn from p, three estimates of KL(p || r) from log p(x) and log r(x), by http://joschu.net/blog/kl-approx.html: k1 is unbiased and
of either sign, k2 is biased and never negative, k3 is unbiased and never negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from veneer.types import DataError, Datum, Floats, RequestError

Doubles = NDArray[np.float64]


def k1(p: Doubles, r: Doubles) -> Doubles:
    """log p - log r."""
    return p - r


def k2(p: Doubles, r: Doubles) -> Doubles:
    """(log p - log r)^2 / 2."""
    return 0.5 * (p - r) ** 2


def k3(p: Doubles, r: Doubles) -> Doubles:
    """r/p - 1 - log(r/p)."""
    return np.expm1(r - p) - (r - p)


ESTIMATORS: dict[int, Callable[[Doubles, Doubles], Doubles]] = {1: k1, 2: k2, 3: k3}
"""Of log-probabilities [n] under p, which drew, and under r."""


def kl_penalty(
    data: Sequence[Datum], reference_logprobs_D: Sequence[Floats], coef: float, estimator: int = 1, discount: float = 0.0
) -> tuple[list[Datum], dict[str, float]]:
    """Advantages less ``coef`` times the KL of each sampled token to the reference, centred on the mean over the tokens of ``data``.

    The cookbook's ``incorporate_kl_penalty`` with ``estimator`` 1: A_t + coef (mean - kl_t), kl_t = log q(t) - log reference(t), and with
    ``discount`` > 0 that term's discounted sum over the positions of the row from t on, so that 1 is the KL of all that follows, as in
    REINFORCE++ (https://arxiv.org/abs/2501.03262). verl's penalty in the reward is -coef kl_t, not centred. Tokens count as 1 or, where
    the weight is 0, not at all; what a token's advantage is divided by later divides the penalty too.

    ``reference_logprobs_D``: of the targets of each datum, read where its weight is not 0: ``engine.forward(None, data, loss)`` has them.

    Returns the data and ``kl_policy_base``, the mean of the estimates.

    Raises:
        RequestError: no such estimator, or a discount outside 0 to 1.
        DataError: a log-probability is missing.
    """
    if estimator not in ESTIMATORS or not 0 <= discount <= 1:
        raise RequestError(f"KL penalty: the estimator must be 1, 2 or 3 and the discount from 0 to 1; got {estimator} and {discount:g}")
    kls = [_kl_of(i, d, r, estimator) for i, (d, r) in enumerate(zip(data, reference_logprobs_D, strict=True))]
    counted = sum(int(np.count_nonzero(datum.mask)) for datum in data)
    mean = float(sum(kl.sum() for kl in kls)) / max(1, counted)
    terms = [_to_go(np.where(d.mask != 0, coef * (mean - kl), 0.0), discount) for d, kl in zip(data, kls, strict=True)]
    added = [np.where(d.mask != 0, term, 0.0).astype(np.float32) for d, term in zip(data, terms, strict=True)]
    return [replace(d, advantages=d.advantages + a) for d, a in zip(data, added, strict=True)], {"kl_policy_base": mean}


def _kl_of(i: int, datum: Datum, reference: Floats, estimator: int) -> Doubles:
    """[N], 0 where the weight is."""
    if reference.shape != datum.targets.shape or not np.isfinite(reference[datum.mask != 0]).all():
        raise DataError(f"KL penalty: datum {i} has no finite reference log-probability for each of its trained targets")
    found = np.zeros(datum.mask.shape)
    read = datum.mask != 0
    found[read] = ESTIMATORS[estimator](datum.logprobs[read].astype(float), reference[read].astype(float))
    return found


def _to_go(values: Doubles, discount: float) -> Doubles:
    """sum_{s >= t} discount^(s - t) v_s."""
    if not discount:
        return values
    found, after = np.empty_like(values), 0.0
    for t in range(len(values) - 1, -1, -1):
        found[t] = after = values[t] + discount * after
    return found
