"""The gradient noise scale of a run: from which batch on more episodes a step stop paying for themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NoiseScale:
    """Of the gradient over a run."""

    episodes: float | None
    """A batch of so many has as much noise as signal; far smaller ones learn as much from an episode, far larger ones waste it
    (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162). None: no signal stands out of the noise."""
    low: float | None
    """Ends of the 95% interval, by leaving out a step at a time; None: unbounded, or from too few steps."""
    high: float | None
    steps: int
    """On which it was measured."""


def noise_parts(squares: Sequence[float], whole: float, groups: int) -> dict[str, float]:
    """``noise/trace`` and ``noise/signal`` of one batch: unbiased for the trace of the covariance of a group's gradient and for the squared
    norm of the true one (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1).

    ``squares``: squared norms of what each group adds to the batch's gradient, of as many as add something; ``whole``: of their sum;
    ``groups``: two or more, of which the batch is the mean. With G_i = ``groups`` times what group i adds, and G their mean, the trace is
    (mean |G_i|^2 - |G|^2) / (1 - 1/P) and the signal (P |G|^2 - mean |G_i|^2) / (P - 1).
    """
    small = groups * sum(squares)
    return {"noise/trace": (small - whole) / (1 - 1 / groups), "noise/signal": (groups * whole - small) / (groups - 1)}


def noise_scale(metrics: Sequence[Mapping[str, Any]], group_size: int) -> NoiseScale | None:
    """From ``noise/trace`` and ``noise/signal`` of the steps that have them: the ratio of their means, in episodes, of which a group
    has ``group_size``. None: no step has them.

    The interval is the jackknife's of the logarithm (Efron & Stein 1981, https://doi.org/10.1214/aos/1176345462).
    """
    measured = [(m["noise/trace"], m["noise/signal"]) for m in metrics if "noise/trace" in m]
    if not measured:
        return None

    def ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
        trace, signal = (math.fsum(column) for column in zip(*pairs, strict=True))
        return group_size * trace / signal if trace > 0 and signal > 0 else None

    value, count = ratio(measured), len(measured)
    without = [ratio(measured[:i] + measured[i + 1 :]) for i in range(count)] if count > 2 else []
    if value is None or not without or any(one is None for one in without):
        return NoiseScale(value, None, None, count)
    logs = [math.log(one) for one in without if one is not None]
    mean = math.fsum(logs) / count
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, 0.975)) * math.sqrt((count - 1) / count * math.fsum((log - mean) ** 2 for log in logs))
    return NoiseScale(value, value * math.exp(-half), value * math.exp(half), count)
