"""A sampling request: what was asked for, its completions as they grow, and what has been told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from veneer.engine.cache import Bank, Shared
from veneer.types import Floats, Piece, SamplingParams, Tokens

StopReason = Literal["stop", "length"]


@dataclass(eq=False)
class SampleRequest:
    prompt: Tokens
    slot: int | None
    """Bound by the engine when the request's turn comes."""
    params: SamplingParams
    n: int
    prompt_logprobs: bool = False
    on_piece: Callable[[Piece], None] | None = None
    cancelled: bool = False
    answered: bool = False
    """It is done and the engine knows; ended rows may still be in the batch."""
    waiting: int = 0
    """Completions that have not started."""
    scores: Floats | None = None
    """[len(prompt)] if asked for."""
    rows: list[Completion] = field(default_factory=list["Completion"], repr=False)
    told: dict[int, Told] = field(default_factory=dict[int, "Told"], repr=False)
    """Of each completion, by index. Rows that start anew draw the same again, which is not told again."""

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
                yield Piece(row.index, row.tokens[first:], row.logprobs[first:], None, row.stop_reason)


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
    stop_reason: StopReason | None = None
    bank: Bank | None = None
    place: int = 0
    """Its slot in the bank."""
    shared: Shared | None = None
    """Where the keys of its prompt are, if not in the bank."""

    @property
    def ended(self) -> bool:
        return self.stop_reason is not None or self.request.cancelled

    @property
    def position(self) -> int:
        """Of its newest token, which the next step reads."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def left(self) -> int:
        """Positions that its slot still has room for."""
        assert self.bank is not None
        return self.bank.capacity - self.position + (0 if self.shared is None else self.shared.length)
