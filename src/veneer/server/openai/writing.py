"""One choice while it is drawn: tokens in, text and log-probabilities out.

Everything is decided token by token and from left to right, so a stream's pieces joined are the answer that others get whole.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence

from veneer.render.reading import Part, Reader
from veneer.render.vocabulary import Utf8Reader, Vocabulary
from veneer.server.openai.answers import CalledFunction, ChatDelta, FinishReason, TextLogprobs, TokenLogprob, ToolCallDelta, TopLogprob
from veneer.types import Piece, Sample, TopLogprobs

UNLIKELY = -9999.0
"""What OpenAI writes for a log-probability that is no JSON number."""


class TextWriter:
    """The text of one choice, without the token that ended the turn, and without the stop text and what lies behind it."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], length: int = 0) -> None:
        """``length``: characters of text that stand before it, as with ``echo``."""
        self._vocabulary, self._stops = vocabulary, stops
        self._longest = max(map(len, stops), default=0)
        self._utf8 = Utf8Reader()
        self._held = ""
        """It may be the beginning of a stop text."""
        self._stopped = False
        self._length = length
        self.offsets: list[int] = []
        """Where each token begins, in characters."""

    def feed(self, piece: Piece) -> str:
        """What has become certain."""
        ended = piece.stop_reason == "stop" and len(piece.tokens) > 0
        closed = ended and piece.tokens[-1] in self._vocabulary.special
        shown = "".join(map(self._take, piece.tokens[:-1] if closed else piece.tokens))
        if closed:
            self.offsets.append(self._length)
        if piece.stop_reason is not None and not self._stopped:
            shown += self._held + self._utf8.feed(b"", last=True)
            if ended and not closed:  # a token ended the turn that looks like text
                shown = shown.removesuffix(self._vocabulary.text(piece.tokens[-1:]))
        return shown

    def _take(self, token: int) -> str:
        self.offsets.append(self._length)
        text = self._utf8.feed(self._vocabulary.bytes_of(token))
        self._length += len(text)
        if self._stopped:
            return ""
        text = self._held + text
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self._stopped = bool(places)
        certain = min(places) if places else self._certain(text)
        self._held = text[certain:]
        return text[:certain]

    def _certain(self, text: str) -> int:
        """Where the first stop text may begin that is not complete."""
        starts = range(max(0, len(text) - self._longest + 1), len(text))
        return next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))


class ChatWriter:
    """The message of one choice: its text taken apart into thinking, content and calls."""

    def __init__(self, text: TextWriter, reader: Reader) -> None:
        self._text, self._reader = text, reader
        self.calls: list[ToolCallDelta] = []

    def feed(self, piece: Piece) -> list[ChatDelta]:
        """What has become certain, each time one thing."""
        return [self._delta(part) for part in self._reader.feed(self._text.feed(piece), last=piece.stop_reason is not None)]

    def _delta(self, part: Part) -> ChatDelta:
        if part.call is None:
            return ChatDelta(content=part.content) if part.content else ChatDelta(reasoning_content=part.reasoning)
        function = CalledFunction(name=part.call["name"], arguments=json.dumps(part.call["arguments"], ensure_ascii=False))
        call = ToolCallDelta(index=len(self.calls), id=f"call_{secrets.token_hex(12)}", type="function", function=function)
        self.calls.append(call)
        return ChatDelta(tool_calls=[call])

    @property
    def thought(self) -> bool:
        return self._reader.thought

    def finish_reason(self, piece: Piece) -> FinishReason | None:
        return "tool_calls" if piece.stop_reason == "stop" and self.calls else piece.stop_reason


# ---------------------------------------------------------------- log-probabilities


def chat_logprobs(vocabulary: Vocabulary, piece: Piece) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token=vocabulary.name(token),
            bytes=list(vocabulary.bytes_of(token)),
            logprob=_number(logprob),
            top_logprobs=[
                TopLogprob(token=vocabulary.name(other), bytes=list(vocabulary.bytes_of(other)), logprob=value)
                for other, value in _likeliest(piece.top_logprobs, i)
            ],
        )
        for i, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True))
    ]


def text_logprobs(vocabulary: Vocabulary, piece: Piece, offsets: list[int]) -> TextLogprobs:
    """The legacy form. ``offsets``: of these tokens."""
    names = [vocabulary.name(token) for token in piece.tokens]
    numbers = [None if math.isnan(logprob) else _number(logprob) for logprob in piece.logprobs]
    tops: list[dict[str, float] | None] | None = None
    if piece.top_logprobs is not None:
        tops = []
        for i, (name, number) in enumerate(zip(names, numbers, strict=True)):
            likeliest = {vocabulary.name(other): value for other, value in _likeliest(piece.top_logprobs, i)}
            tops.append(None if number is None else likeliest | {name: number})
    return TextLogprobs(tokens=names, token_logprobs=numbers, top_logprobs=tops, text_offset=offsets)


def _likeliest(top: TopLogprobs | None, place: int) -> list[tuple[int, float]]:
    if top is None:
        return []
    pairs = zip(top.tokens[place].tolist(), top.logprobs[place].tolist(), strict=True)
    return [(token, value) for token, value in pairs if math.isfinite(value)]


def _number(logprob: float) -> float:
    return max(float(logprob), UNLIKELY)


def whole(index: int, sample: Sample) -> Piece:
    """All of a completion as one piece."""
    return Piece(index, sample.tokens.tolist(), sample.logprobs.tolist(), sample.top_logprobs, sample.stop_reason)
