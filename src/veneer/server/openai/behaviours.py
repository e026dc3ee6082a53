"""What answers a request: a base, and which adapters act on which tokens of prompt and answer.

An entry of ``lora`` acts on tokens from some place on, up to another:

- from the first token of the prompt, unless said otherwise;
- with ``activated`` from a place in the prompt on (activated LoRA, https://arxiv.org/abs/2504.12397): true means the first token
  that the chat template puts in front of the assistant's turn (in a completion, the prompt's last token), a text the first token
  of its last occurrence, which is PEFT's rule for ``alora_invocation_tokens``. What stands before is read by the base;
- with ``from`` once that text stands in the assistant's turn: drawn, or put there by the template;
- up to the end, or with ``until`` until that text stands there.

The adapter reads the last token of a ``from`` text, and so decides the token behind it; the last token of an ``until`` text is read
without it. Entries that act at one place are added. Texts are looked for as the tokens that the tokenizer makes of them, one
after the other, in the order in which the list first names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from veneer.server.bases import Served
from veneer.server.openai.answers import Acting
from veneer.server.openai.catalogue import invocation_tokens
from veneer.server.openai.errors import FieldError
from veneer.server.openai.fields import LEAST_SCALE
from veneer.server.openai.requests import LoraEntry
from veneer.store.entry import Entry
from veneer.types import Tokens


@dataclass(frozen=True)
class Part:
    """An adapter with the scale by which it acts."""

    reference: str
    """NAME@VERSION"""
    digest: str
    scale: float
    entry: Entry = field(compare=False, repr=False)

    def acting(self) -> Acting:
        return Acting(name=self.entry.name, version=self.entry.version, digest=self.digest, scale=self.scale)

    def __str__(self) -> str:
        return self.reference if self.scale == 1 else f"{self.reference};scale={self.scale:g}"


Phase = tuple[Part, ...]
"""What acts at one place; nothing: the base alone."""


@dataclass(frozen=True)
class Change:
    """From some place on another phase acts."""

    phase: Phase
    at: int | None = None
    """Position in the prompt."""
    after: tuple[int, ...] = ()
    """Or: on the last of these tokens, once they are drawn."""


@dataclass(frozen=True)
class Course:
    """The phases over one prompt and its answers."""

    first: Phase
    changes: tuple[Change, ...] = ()

    @property
    def phases(self) -> list[Phase]:
        """Those that act or may act, each once."""
        return list(dict.fromkeys([self.first, *(change.phase for change in self.changes)]))


@dataclass(frozen=True)
class Behaviour:
    """A base with the adapters of a request, as their names meant them when it arrived."""

    served: Served
    wanted: tuple[tuple[LoraEntry, Entry], ...] = ()

    @property
    def parts(self) -> list[Part]:
        """Each once."""
        return list(dict.fromkeys(Part(entry.reference, entry.digest, item.scale, entry) for item, entry in self.wanted))

    @property
    def digest(self) -> str:
        """Of base, adapters and scales together."""
        told = [self.served.engine.base_digest, *(f"{part.digest} {part.scale!r}" for part in self.parts)]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    @property
    def spans(self) -> bool:
        """Whether something acts on a part of prompt and answer only."""
        return any(
            item.activated or item.since or item.until or (item.activated is None and invocation_tokens(entry.folder))
            for item, entry in self.wanted
        )

    def course(self, prompt: Tokens, turn: int) -> Course:
        """Over one prompt. ``turn``: the position where the assistant's turn begins.

        Raises:
            FieldError: a text that activates an adapter is not in the prompt, or the spans contradict each other.
        """
        begins = [self._begin(number, prompt, turn) for number in range(len(self.wanted))]
        places = self._places(prompt, turn)
        acting = [begin == 0 for begin in begins]
        course = [Change(self._phase(acting))]
        for at in sorted({begin for begin in begins if begin} | {at for _, at, _ in places if at is not None}):
            acting = [on or begin == at for on, begin in zip(acting, begins, strict=True)]
            for text, place, _ in places:
                acting = self._behind(text, acting) if place == at else acting
            course.append(Change(self._phase(acting), at=at))
        for text, place, tokens in places:
            if place is None:
                acting = self._behind(text, acting)
                course.append(Change(self._phase(acting), after=tokens))
        return Course(course[0].phase, tuple(change for before, change in pairwise(course) if change.phase != before.phase))

    def _phase(self, acting: Sequence[bool]) -> Phase:
        """Scales of one adapter are added; what is left of them may be nothing."""
        scales: dict[str, float] = {}
        for (item, entry), on in zip(self.wanted, acting, strict=True):
            scales[entry.reference] = scales.get(entry.reference, 0.0) + (item.scale if on else 0.0)
        entries = {entry.reference: entry for _, entry in self.wanted}
        return tuple(Part(name, entries[name].digest, scale, entries[name]) for name, scale in scales.items() if abs(scale) >= LEAST_SCALE)

    def _behind(self, text: str, acting: Sequence[bool]) -> list[bool]:
        """Who acts behind a text."""
        return [(on or item.since == text) and item.until != text for (item, _), on in zip(self.wanted, acting, strict=True)]

    def _begin(self, number: int, prompt: Tokens, turn: int) -> int | None:
        """The position from which an entry acts; None: it waits for a text."""
        item, entry = self.wanted[number]
        if item.since is not None:
            if item.activated or item.since == item.until:
                other = "activated" if item.activated else "until of the same text"
                raise FieldError(f"lora.{number}: from and {other} contradict each other; give one", f"lora.{number}")
            return None
        if item.activated is True:
            return min(turn, len(prompt) - 1)
        if isinstance(item.activated, str):
            tokens, what = self.served.renderer.encode(item.activated), f"{item.activated!r}"
        else:
            tokens = np.array(() if item.activated is False else invocation_tokens(entry.folder), np.int64)
            what = f"{self.served.renderer.decode(tokens)!r}, by which {entry.reference} is activated,"
        found = _occurrences(prompt, tokens)
        if len(tokens) and not len(found):
            raise FieldError(f"lora.{number}: {what} is not in the prompt; put it there, or give activated", f"lora.{number}.activated")
        return int(found[-1]) if len(tokens) else 0

    def _places(self, prompt: Tokens, turn: int) -> list[tuple[str, int | None, tuple[int, ...]]]:
        """Texts that are waited for, in order, with the position of the last token where the prompt has them in the assistant's turn."""
        texts = dict.fromkeys(text for item, _ in self.wanted for text in (item.since, item.until) if text is not None)
        order = {text: number for number, text in enumerate(texts)}
        for number, (item, _) in enumerate(self.wanted):
            if item.since is not None and item.until is not None and order[item.until] < order[item.since]:
                raise FieldError(
                    f"lora.{number}: an entry before it names {item.until!r} first, so until comes before from", f"lora.{number}"
                )
        places: list[tuple[str, int | None, tuple[int, ...]]] = []
        start: int | None = turn
        for text in texts:
            tokens = self.served.renderer.encode(text)
            found = _occurrences(prompt[start:], tokens) if start is not None else []
            at = start + int(found[0]) + len(tokens) - 1 if start is not None and len(found) else None
            start = None if at is None else at + 1
            places.append((text, at, tuple(tokens.tolist())))
        return places


def _occurrences(prompt: Tokens, tokens: Tokens) -> Tokens:
    """Where ``tokens`` begin in a prompt, ascending."""
    if not 0 < len(tokens) <= len(prompt):
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(prompt, len(tokens))
    return np.flatnonzero((windows == tokens).all(axis=1))
