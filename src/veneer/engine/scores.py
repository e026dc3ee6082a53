"""What a model makes of a prompt's own tokens: log-probabilities at temperature 1, without ever holding the logits of a whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from veneer.engine.base import Head
from veneer.engine.flat import TILE
from veneer.engine.logprobs import LOGITS_AT_ONCE
from veneer.types import Floats, Tokens, TopLogprobs


@dataclass(frozen=True, eq=False)
class PromptWish:
    """What is to be told of a prompt."""

    logprobs: bool = False
    """Of its tokens."""
    top: int = 0
    """How many of the likeliest tokens at each place."""
    targets: Tokens | None = None
    """int64 [len(prompt) - 1, K]: these behind each token but the last; -1 for none."""

    def __bool__(self) -> bool:
        return self.logprobs or self.top > 0 or self.targets is not None


@dataclass(frozen=True)
class PromptScores:
    """What was wished for, as ``Sample`` holds it."""

    logprobs: Floats | None = None
    top: TopLogprobs | None = None
    targets: Floats | None = None

    def finite(self, wish: PromptWish) -> bool:
        """Whether every number that was wished for is one."""
        found = [] if self.logprobs is None else [self.logprobs[1:]]
        found += [] if self.top is None else [self.top.logprobs[1:]]
        found += [] if self.targets is None or wish.targets is None else [self.targets[wish.targets >= 0]]
        return all(bool(np.isfinite(numbers).all()) for numbers in found)


def score_prompt(hidden: Tensor, head: Head, start: int, prompt: Tokens, wishes: Sequence[PromptWish]) -> list[PromptScores]:
    """hidden [len(prompt) - 1, d]: the final states of all its tokens but the last, the wanted ones from number ``start`` on."""
    ks = {wish.top for wish in wishes} - {0}
    following = torch.from_numpy(prompt[1:]).to(hidden.device)
    targets = {i: torch.from_numpy(wish.targets).to(hidden.device) for i, wish in enumerate(wishes) if wish.targets is not None}
    logprobs: list[Tensor] = []
    tops: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in ks}
    found: dict[int, list[np.ndarray]] = {i: [] for i in targets}
    rows = max(TILE, LOGITS_AT_ONCE[hidden.device.type] // head.vocab_size)
    for at in range(0, len(hidden), rows):
        here = slice(at, min(at + rows, len(hidden)))
        logits = head(hidden[here], start + at)
        total = logits.logsumexp(-1, keepdim=True)
        logprobs.append(logits.gather(1, following[here, None])[:, 0] - total[:, 0])
        for k in ks:
            values, tokens = logits.topk(k)
            tops[k].append((tokens, values - total))
        for i, wanted in targets.items():
            values = logits.gather(1, wanted[here].clamp(min=0)) - total
            found[i].append(values.masked_fill(wanted[here] < 0, torch.nan).cpu().numpy())
    first = np.full(1, np.nan, np.float32)
    return [
        PromptScores(
            np.concatenate([first, *(part.cpu().numpy() for part in logprobs)]) if wish.logprobs else None,
            _top(wish.top, tops[wish.top]) if wish.top else None,
            None if wish.targets is None else np.concatenate([np.empty((0, wish.targets.shape[1]), np.float32), *found[i]]),
        )
        for i, wish in enumerate(wishes)
    ]


def _top(k: int, parts: Sequence[tuple[Tensor, Tensor]]) -> TopLogprobs:
    tokens = [np.zeros((1, k), np.int64), *(part.cpu().numpy() for part, _ in parts)]
    logprobs = [np.full((1, k), np.nan, np.float32), *(part.cpu().numpy() for _, part in parts)]
    return TopLogprobs(np.concatenate(tokens), np.concatenate(logprobs))
