"""What the summed loss of a batch is divided by: factors on the weights of its tokens, so that every term of a loss scales alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from veneer.train.choices import Settings, resolve
from veneer.types import Datum


@dataclass(frozen=True)
class Batch:
    """What factors are made of."""

    episodes: int
    """Of the whole batch, with those that failed, were dropped or are masked."""
    tokens: int
    """Of all episodes that train."""
    max_tokens: int
    """The limit of a turn: a constant of the run."""


Normalisation = Callable[[int, Batch], float]
"""Trained tokens of an episode, at least 1 -> the factor on their weights."""


def episodes(tokens: int, batch: Batch) -> float:
    """1 / episodes: a token counts the same in every episode, whatever its length, and a batch with less signal takes a smaller step."""
    return 1 / batch.episodes


def sequence_mean(tokens: int, batch: Batch) -> float:
    """1 / (episodes * the episode's tokens): GRPO (https://arxiv.org/abs/2402.03300, equation 3), TRL's ``loss_type="grpo"``. Tokens of
    long episodes count less."""
    return 1 / (batch.episodes * tokens)


def token_mean(tokens: int, batch: Batch) -> float:
    """1 / tokens that train: DAPO (https://arxiv.org/abs/2503.14476, equation 8), TRL's ``loss_type="dapo"`` and ``"cispo"``."""
    return 1 / batch.tokens


def max_tokens(tokens: int, batch: Batch) -> float:
    """1 / (episodes * max_tokens): Dr. GRPO (https://arxiv.org/abs/2503.20783), TRL's ``loss_type="dr_grpo"``."""
    return 1 / (batch.episodes * batch.max_tokens)


NORMALISATIONS: dict[str, tuple[Normalisation, Settings]] = {
    "episodes": (episodes, {}),
    "sequence_mean": (sequence_mean, {}),
    "token_mean": (token_mean, {}),
    "max_tokens": (max_tokens, {}),
}
"""name -> (function, its settings: none has any)."""


def normalise(
    data_ED: Sequence[Sequence[Datum]], name: str, *, episodes: int, max_tokens: int, tokens: int | None = None
) -> list[list[Datum]]:
    """Per episode its datums with scaled weights.

    A token counts if its weight is not 0 here, so this comes before a correction's weights and behind the masking of episodes. A loss
    is a sum over tokens, so the factors are those of the whole batch even where it is trained in parts. ``tokens``: of the whole batch;
    None: those of ``data_ED``. TRL's groups without a signal stay in its batch and are counted by ``token_mean``; here they are not in
    ``data_ED``, as DAPO's dynamic sampling leaves them out.

    Raises:
        RequestError: an unknown normalisation.
    """
    function, _ = resolve("normalisation", NORMALISATIONS, name, None)
    counts = [sum(int(np.count_nonzero(datum.mask)) for datum in data_D) for data_D in data_ED]
    batch = Batch(episodes, max(1, sum(counts) if tokens is None else tokens), max_tokens)
    factors = [np.float32(function(max(1, count), batch)) for count in counts]
    return [[replace(datum, mask=datum.mask * factor) for datum in data_D] for data_D, factor in zip(data_ED, factors, strict=True)]
