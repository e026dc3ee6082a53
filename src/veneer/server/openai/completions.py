"""``/v1/completions``: text after text, as bases without a chat template want it, and scores of given text (``echo``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from veneer.render.vocabulary import Vocabulary
from veneer.server.openai.answering import Answering, Envelope, Event, EventStream, JsonAnswer, Prompt, switched, usage
from veneer.server.openai.answers import FinishReason, TextChoice, TextCompletion, TextLogprobs
from veneer.server.openai.behaviours import Behaviour
from veneer.server.openai.drawing import Job
from veneer.server.openai.errors import FieldError
from veneer.server.openai.requests import CompletionRequest
from veneer.server.openai.writing import TextWriter, text_logprobs, whole
from veneer.types import DataError, Piece, Sample

DEFAULT_TOKENS = 16


async def answer_completion(answering: Answering, request: Request, body: CompletionRequest) -> Response:
    if body.stream and body.echo and body.logprobs is not None:
        raise FieldError("echo with logprobs scores the whole prompt before anything can be told; ask without stream", "stream")
    behaviour = await answering.behaviour(request, body)
    envelope = answering.envelope("cmpl", body, behaviour)
    prompts = await asyncio.to_thread(_encode, behaviour, body)
    limit, top, scores = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, body.logprobs or 0, _scores(body)
    jobs = [
        Job(
            prompt.tokens,
            None,
            (),
            answering.params(body, envelope, prompt.tokens, limit, "prompt"),
            body.count,
            top,
            prompt_logprobs=scores,
            prompt_top_logprobs=top if scores else 0,
        )
        for prompt in prompts
    ]
    telling = Telling(body, envelope, prompts)
    if not body.stream:
        return JsonAnswer(telling.completion(await answering.whole(request, envelope, prompts, jobs)), envelope.headers)
    events, opened = await answering.stream(request, envelope, prompts, jobs)
    return EventStream(telling.chunks(events), opened, envelope.headers)


def _scores(body: CompletionRequest) -> bool:
    """Whether log-probabilities of the prompt are wanted."""
    return bool(body.echo) and body.logprobs is not None


def _encode(behaviour: Behaviour, body: CompletionRequest) -> list[Prompt]:
    renderer = behaviour.served.renderer
    framed = body.add_special_tokens is not False
    prompts: list[Prompt] = []
    for prompt in body.prompt:
        try:
            tokens = renderer.encode(prompt, framed=framed) if isinstance(prompt, str) else np.array(prompt, np.int64)
        except DataError as error:
            raise FieldError(str(error), "prompt") from error
        prompts.append(Prompt(tokens, behaviour.course(tokens, len(tokens))))
    return prompts


@dataclass(frozen=True)
class Telling:
    """One request's answer in OpenAI's words, whole or in chunks. Choices are counted on from prompt to prompt."""

    body: CompletionRequest
    envelope: Envelope
    prompts: list[Prompt]

    def completion(self, drawn: list[list[Sample]]) -> TextCompletion:
        choices = [self._choice(number, index, sample) for number, many in enumerate(drawn) for index, sample in enumerate(many)]
        return self._completion(choices, usage=usage(self.prompts, drawn), veneer=self.envelope.attestation(self.prompts[0].course))

    def _choice(self, number: int, index: int, sample: Sample) -> TextChoice:
        piece, writer = whole(index, sample), self._writer(number)
        text = self._echo(number) + writer.feed(piece)
        logprobs = self._logprobs(piece, writer.offsets)
        if _scores(self.body) and logprobs is not None:
            logprobs = _joined(self._prompt_logprobs(number, sample), logprobs)
        choice = TextChoice(index=self._index(number, index), text=text, logprobs=logprobs, finish_reason=sample.stop_reason)
        if self.body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = list(piece.tokens), self.prompts[number].tokens.tolist()
        if (switches := switched(self.prompts[number].course, sample)) is not None:
            choice.veneer = switches
        return choice

    def _prompt_logprobs(self, number: int, sample: Sample) -> TextLogprobs:
        prompt, vocabulary = self.prompts[number].tokens, self._vocabulary
        assert sample.prompt_logprobs is not None
        piece = Piece(0, prompt.tolist(), sample.prompt_logprobs.tolist(), sample.prompt_top_logprobs)
        writer = TextWriter(vocabulary, ())
        writer.feed(piece)
        return text_logprobs(vocabulary, piece, writer.offsets)

    # ------------------------------------------------ chunks

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncGenerator[TextCompletion]:
        count = self.body.count
        writers = [[self._writer(number) for _ in range(count)] for number in range(len(self.prompts))]
        drawn: dict[int, list[Sample]] = {}
        yield self._begin()
        async for number, event in events:
            if isinstance(event, list):
                drawn[number] = event
                for index, sample in enumerate(event):
                    if self.prompts[number].course.changes:
                        choice = self._chunk_choice(number, index, "", sample.stop_reason)
                        choice.veneer = switched(self.prompts[number].course, sample)
                        yield self._completion([choice])
                continue
            choice = self._piece(number, event, writers[number][event.index])
            if choice.text or choice.finish_reason is not None or choice.logprobs is not None or choice.token_ids:
                yield self._completion([choice])
        if self.body.wants_usage:
            yield self._completion([], usage=usage(self.prompts, [drawn[number] for number in range(len(self.prompts))]))

    def _begin(self) -> TextCompletion:
        choices: list[TextChoice] = []
        for number in range(len(self.prompts)):
            for index in range(self.body.count):
                choice = self._chunk_choice(number, index, self._echo(number), None)
                if self.body.return_token_ids:
                    choice.prompt_token_ids = self.prompts[number].tokens.tolist()
                choices.append(choice)
        return self._completion(choices, veneer=self.envelope.attestation(self.prompts[0].course))

    def _piece(self, number: int, piece: Piece, writer: TextWriter) -> TextChoice:
        told = len(writer.offsets)
        text = writer.feed(piece)
        reason = None if self.prompts[number].course.changes else piece.stop_reason  # with switches it comes with them
        choice = self._chunk_choice(number, piece.index, text, reason)
        if self.body.logprobs is not None and piece.tokens:
            choice.logprobs = self._logprobs(piece, writer.offsets[told:])
        if self.body.return_token_ids:
            choice.token_ids = list(piece.tokens)
        return choice

    # ------------------------------------------------ parts of both

    def _chunk_choice(self, number: int, index: int, text: str, reason: FinishReason | None) -> TextChoice:
        return TextChoice(index=self._index(number, index), text=text, logprobs=None, finish_reason=reason)

    def _completion(self, choices: list[TextChoice], **told: Any) -> TextCompletion:
        if self.body.wants_usage:
            told.setdefault("usage", None)
        return TextCompletion(
            id=self.envelope.id,
            object="text_completion",
            created=self.envelope.created,
            model=self.envelope.model,
            choices=choices,
            system_fingerprint=self.envelope.fingerprint,
            **told,
        )

    @property
    def _vocabulary(self) -> Vocabulary:
        return self.envelope.behaviour.served.renderer.vocabulary

    def _index(self, number: int, index: int) -> int:
        return number * self.body.count + index

    def _echo(self, number: int) -> str:
        return self._vocabulary.text(self.prompts[number].tokens.tolist()) if self.body.echo else ""

    def _writer(self, number: int) -> TextWriter:
        return TextWriter(self._vocabulary, self.body.stop, len(self._echo(number)))

    def _logprobs(self, piece: Piece, offsets: list[int]) -> TextLogprobs | None:
        return None if self.body.logprobs is None else text_logprobs(self._vocabulary, piece, offsets)


def _joined(first: TextLogprobs, second: TextLogprobs) -> TextLogprobs:
    tops = None if first.top_logprobs is None or second.top_logprobs is None else first.top_logprobs + second.top_logprobs
    return TextLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=tops,
        text_offset=first.text_offset + second.text_offset,
    )
