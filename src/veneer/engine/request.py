"""A sampling request: what was asked for, its completions as they grow, and what has been told of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from veneer.engine.base import Base
from veneer.engine.cache import Bank, Shared
from veneer.engine.memory import total_memory
from veneer.engine.scores import PromptScores, PromptWish
from veneer.types import Adapter, DataError, Floats, Piece, RequestError, RunError, SamplingParams, Switch, Tokens, TopLogprobs

StopReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Acting:
    """What acts on tokens: the published version of an adapter, or the base alone."""

    slot: int | None
    adapter: Adapter | None


@dataclass(frozen=True)
class Span:
    """Positions of a prompt."""

    start: int
    stop: int
    acting: Acting

    @property
    def digest(self) -> str | None:
        """What the weights are called by their content; None: the base's."""
        return None if self.acting.adapter is None else self.acting.adapter.digest


@dataclass(eq=False)
class SampleRequest:
    prompt: Tokens
    params: SamplingParams
    n: int
    wish: PromptWish
    top_logprobs: int = 0
    on_piece: Callable[[Piece], None] | None = None
    switches: Sequence[Switch] = ()
    acting: Sequence[Acting] = ()
    """Who acts first, and who from each switch on; bound by the engine when the request's turn comes."""
    cancelled: bool = False
    failure: RunError | None = None
    """Why it was given up."""
    answered: bool = False
    """It is done and the engine knows; ended rows may still be in the batch."""
    waiting: int = 0
    """Completions that have not started."""
    scores: PromptScores | None = None
    """What was wished for."""
    rows: list[Completion] = field(default_factory=list["Completion"], repr=False)
    told: dict[int, Told] = field(default_factory=dict[int, "Told"], repr=False)
    """Of each completion, by index. Rows that start anew draw the same again, which is not told again."""

    @cached_property
    def spans(self) -> list[Span]:
        """Of the prompt."""
        starts = [0, *(switch.at for switch in self.switches if switch.at is not None)]
        ends = zip(starts, [*starts[1:], len(self.prompt)], self.acting, strict=False)
        return [Span(start, stop, acting) for start, stop, acting in ends if start < stop]

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Completions of equal keys have the same keys and values of their prompt."""
        return (*((span.start, span.acting.slot) for span in self.spans), self.prompt.tobytes())

    def fail(self, turn: int) -> None:
        """Give it up because of numbers that are none, while ``acting[turn]`` acted."""
        adapters = dict.fromkeys(acting.adapter for acting in self.acting[: turn + 1])
        names = [f"version {adapter.version} of adapter {adapter.name!r}" for adapter in adapters if adapter is not None]
        who = " or ".join(names) or "the base"
        self.failure = RunError(f"{who} gives log-probabilities that are not finite; go back to weights that are sound")
        self.cancelled = True

    @property
    def done(self) -> bool:
        return self.waiting == 0 and all(row.stop_reason is not None for row in self.rows)

    def pieces(self) -> Iterator[Piece]:
        """What the completions drew since this was last asked."""
        for row in self.rows:
            told = self.told.setdefault(row.index, Told())
            first, ends = told.tokens, row.stop_reason is not None and not told.end
            if len(row.tokens) > first or ends:
                told.tokens, told.end = len(row.tokens), ends
                yield Piece(row.index, row.tokens[first:], row.logprobs[first:], row.top_logprobs(first), row.stop_reason)


@dataclass
class Told:
    """How much of a completion."""

    tokens: int = 0
    end: bool = False


@dataclass(eq=False)
class Completion:
    """A row while it grows."""

    request: SampleRequest
    index: int
    """In its request."""
    budget: int
    key: int
    stop_tokens: frozenset[int]
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    likeliest: list[tuple[Tokens, Floats]] = field(default_factory=list[tuple[Tokens, Floats]])
    """Tokens [k] and log-probabilities [k] at each place, if asked for."""
    stop_reason: StopReason | None = None
    spoilt: bool = False
    """It has keys or values that are not finite."""
    bank: Bank | None = None
    place: int = 0
    """Its slot in the bank."""
    shared: Shared | None = None
    """Where the keys of its prompt are, if not in the bank."""
    known: int = 0
    """Tokens of the prompt whose keys were there already."""
    turn: int = field(init=False)
    """Who acts now, by number in ``request.acting``."""
    since: int = 0
    """Tokens that were drawn when that began."""
    switched: list[int] = field(default_factory=list[int])
    """The positions behind the prompt at which somebody else began."""

    def __post_init__(self) -> None:
        self.turn = sum(switch.at is not None for switch in self.request.switches)

    @property
    def acting(self) -> Acting:
        return self.request.acting[self.turn]

    @property
    def switches(self) -> tuple[tuple[int, Adapter | None], ...]:
        """Who acted from which position on, behind who acted first."""
        places = [*(switch.at for switch in self.request.switches if switch.at is not None), *self.switched]
        return tuple((place, acting.adapter) for place, acting in zip(places, self.request.acting[1:], strict=False))

    def switch(self) -> bool:
        """Let the next one act from the newest token on, if that token completes what it waits for; whether it does. What it waits for
        is drawn as a whole behind the switch before it."""
        if self.turn == len(self.request.switches):
            return False
        after = self.request.switches[self.turn].after
        if len(self.tokens) - self.since < len(after) or tuple(self.tokens[-len(after) :]) != after:
            return False
        self.turn, self.since = self.turn + 1, len(self.tokens)
        self.switched.append(self.position)
        return True

    @property
    def ended(self) -> bool:
        return self.stop_reason is not None or self.request.cancelled

    @property
    def position(self) -> int:
        """Of its newest token, which the next step reads."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def top_logprobs(self, first: int = 0) -> TopLogprobs | None:
        """From place ``first`` on; None if nobody asked."""
        if not self.request.top_logprobs:
            return None
        shape, found = (len(self.tokens) - first, self.request.top_logprobs), self.likeliest[first:]
        tokens, logprobs = np.array([tokens for tokens, _ in found], np.int64), np.array([lps for _, lps in found], np.float32)
        return TopLogprobs(tokens.reshape(shape), logprobs.reshape(shape))

    @property
    def left(self) -> int:
        """Positions that its slot still has room for."""
        assert self.bank is not None
        return self.bank.capacity - self.position + (0 if self.shared is None else self.shared.length)


def check_request(request: SampleRequest, base: Base) -> None:
    """
    Raises:
        DataError: the prompt or its targets do not fit the base.
        RequestError: the settings make no sense.
    """
    prompt, params, vocab = request.prompt, request.params, base.vocab_size
    if not 0 < len(prompt) < base.context_length:
        raise DataError(
            f"the prompt has {len(prompt)} tokens; it must have from 1 to {base.context_length - 1}, the base's context less one"
        )
    if prompt.min() < 0 or prompt.max() >= vocab:
        raise DataError(f"prompt tokens must be from 0 to {vocab - 1}")
    length = min(len(prompt) + params.max_tokens, base.context_length)
    need, there = base.cache_numbers * base.dtype.itemsize * length, total_memory(base.device)
    if need > there:
        raise DataError(
            f"{length:,} tokens of prompt and completion need {need / 2**30:.1f} GiB of cache; the machine has "
            f"{there / 2**30:.1f} GiB of memory. Lower max_tokens"
        )
    if params.stop and base.tokenizer is None:
        raise RequestError("stop texts need the base's tokenizer, and this base was made without one; use stop_token_ids")
    if request.n < 1 or params.max_tokens < 0:
        raise RequestError("n must be at least 1 and max_tokens at least 0")
    if not 0 <= params.temperature < math.inf or params.top_k < 0 or not 0 < params.top_p <= 1:
        raise RequestError("temperature must be a number from 0, top_k must not be negative, and top_p must be above 0 and at most 1")
    for name, k in (("top_logprobs", request.top_logprobs), ("prompt_top_logprobs", request.wish.top)):
        if not 0 <= k <= vocab:
            raise RequestError(f"{name} is {k}; it must be from 0 to {vocab}, the base's vocabulary")
    targets = request.wish.targets
    if targets is not None and (targets.ndim != 2 or len(targets) != len(prompt) - 1):
        raise DataError(f"prompt_targets has shape {list(targets.shape)}; for this prompt it must be [{len(prompt) - 1}, K]")
    if targets is not None and targets.size and (targets.min() < -1 or targets.max() >= vocab):
        raise DataError(f"prompt_targets must be from 0 to {vocab - 1}, or -1 for none")
    _check_switches(request, vocab)


def _check_switches(request: SampleRequest, vocab: int) -> None:
    place, waits = 0, False
    for i, switch in enumerate(request.switches):
        if (switch.at is None) == (not switch.after):
            raise RequestError(f"switch {i} needs one of two: the position of the prompt at which it comes, or the tokens after which")
        if switch.at is None:
            waits = True
            if min(switch.after) < 0 or max(switch.after) >= vocab:
                raise RequestError(f"switch {i} comes after {switch.after}; tokens must be from 0 to {vocab - 1}")
        elif waits:
            raise RequestError(f"switch {i} is in the prompt, but one before it waits for tokens behind the prompt; put it first")
        elif not place <= switch.at < len(request.prompt):
            last = len(request.prompt) - 1
            raise RequestError(f"switch {i} is at position {switch.at}; it must be from {place} to {last}, in order and in the prompt")
        else:
            place = switch.at + 1
