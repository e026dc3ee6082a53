"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from veneer.render.reading import Reader
from veneer.server.openai.answering import Answering, Envelope, Event, EventStream, JsonAnswer, Prompt, switched, usage
from veneer.server.openai.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    ToolCall,
)
from veneer.server.openai.behaviours import Behaviour
from veneer.server.openai.drawing import Job
from veneer.server.openai.errors import FieldError
from veneer.server.openai.requests import ChatRequest
from veneer.server.openai.writing import ChatWriter, TextWriter, chat_logprobs, whole
from veneer.types import DataError, Piece, Sample


async def answer_chat(answering: Answering, request: Request, body: ChatRequest) -> Response:
    behaviour = await answering.behaviour(request, body)
    envelope = answering.envelope("chatcmpl", body, behaviour)
    prompt, thinking = await asyncio.to_thread(_render, behaviour, body)
    params = answering.params(body, envelope, prompt.tokens, body.limit, "messages")
    jobs = [Job(prompt.tokens, None, (), params, body.count, body.top_logprobs or 0)]
    telling = Telling(body, envelope, prompt, thinking)
    if not body.stream:
        (drawn,) = await answering.whole(request, envelope, [prompt], jobs)
        return JsonAnswer(telling.completion(drawn), envelope.headers)
    events, opened = await answering.stream(request, envelope, [prompt], jobs)
    return EventStream(telling.chunks(events), opened, envelope.headers)


def _render(behaviour: Behaviour, body: ChatRequest) -> tuple[Prompt, bool]:
    """The prompt, and whether the answer begins inside of a thought.

    Raises:
        FieldError: the chat template refuses the messages or has no such option, or a span does not fit.
    """
    renderer, tools, options = behaviour.served.renderer, body.offered_tools, body.template_options
    if tools and not renderer.shows_tools:
        raise FieldError(f"the chat template of base {behaviour.served.name!r} shows no tools", "tools")
    if unknown := set(options) - renderer.template_options:
        param = "chat_template_kwargs" if unknown <= set(body.chat_template_kwargs or {}) else "reasoning_effort"
        there = ", ".join(sorted(renderer.template_options)) or "none"
        raise FieldError(f"the chat template has no option {sorted(unknown)[0]!r}; it has: {there}", param)
    messages = [message.to_message() for message in body.messages]
    try:
        tokens = renderer.build_generation_prompt(messages, tools, options)
        turn = renderer.turn_start(messages, tools, options) if behaviour.spans else len(tokens)
    except DataError as error:
        raise FieldError(str(error), "messages") from error
    return Prompt(tokens, behaviour.course(tokens, turn)), renderer.opens_thinking(tokens)


@dataclass(frozen=True)
class Telling:
    """One request's answer in OpenAI's words, whole or in chunks."""

    body: ChatRequest
    envelope: Envelope
    prompt: Prompt
    thinking: bool

    def completion(self, drawn: list[Sample]) -> ChatCompletion:
        told: dict[str, Any] = {"prompt_token_ids": self.prompt.tokens.tolist()} if self.body.return_token_ids else {}
        return ChatCompletion(
            id=self.envelope.id,
            object="chat.completion",
            created=self.envelope.created,
            model=self.envelope.model,
            choices=[self._choice(index, sample) for index, sample in enumerate(drawn)],
            usage=usage([self.prompt], [drawn]),
            system_fingerprint=self.envelope.fingerprint,
            veneer=self.envelope.attestation(self.prompt.course),
            **told,
        )

    def _choice(self, index: int, sample: Sample) -> ChatChoice:
        piece, writer = whole(index, sample), self._writer()
        deltas = writer.feed(piece)
        content = "".join(delta.content or "" for delta in deltas)
        message = ChatMessage(role="assistant", content=content or (None if writer.calls else ""), refusal=None)
        if writer.thought:
            message.reasoning_content = "".join(delta.reasoning_content or "" for delta in deltas)
        if writer.calls:
            message.tool_calls = [ToolCall(id=call.id, type="function", function=call.function) for call in writer.calls]
        finish = writer.finish_reason(piece)
        assert finish is not None
        choice = ChatChoice(index=index, message=message, logprobs=self._logprobs(piece), finish_reason=finish)
        if self.body.return_token_ids:
            choice.token_ids = list(piece.tokens)
        if (switches := switched(self.prompt.course, sample)) is not None:
            choice.veneer = switches
        return choice

    # ------------------------------------------------ chunks

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncGenerator[ChatChunk]:
        """An empty one to begin with for each choice, text as it becomes certain, a reason at the end, and usage if it was asked for."""
        writers = [self._writer() for _ in range(self.body.count)]
        reasons: dict[int, FinishReason] = {}
        for index in range(self.body.count):
            yield self._begin(index)
        async for _, event in events:
            if isinstance(event, list):
                for index, sample in enumerate(event):
                    if self.prompt.course.changes:
                        yield self._end(index, reasons[index], sample)
                if self.body.wants_usage:
                    yield self._chunk([], usage=usage([self.prompt], [event]))
                return
            for choice in self._choices(event, writers[event.index]):
                yield self._chunk([choice])
            if event.stop_reason is not None:
                reason = reasons[event.index] = writers[event.index].finish_reason(event) or "stop"
                if not self.prompt.course.changes:  # otherwise it waits until it is known where they came
                    yield self._end(event.index, reason)

    def _begin(self, index: int) -> ChatChunk:
        chunk = self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""), finish_reason=None)])
        if index == 0:
            chunk.veneer = self.envelope.attestation(self.prompt.course)
            if self.body.return_token_ids:
                chunk.prompt_token_ids = self.prompt.tokens.tolist()
        return chunk

    def _choices(self, piece: Piece, writer: ChatWriter) -> list[ChatChunkChoice]:
        """One for each delta; what belongs to tokens is with the first."""
        deltas = writer.feed(piece)
        if not deltas and piece.tokens and (self.body.logprobs or self.body.return_token_ids):
            deltas = [ChatDelta()]
        choices = [ChatChunkChoice(index=piece.index, delta=delta, finish_reason=None) for delta in deltas]
        if choices and self.body.logprobs:
            choices[0].logprobs = self._logprobs(piece)
        if choices and self.body.return_token_ids:
            choices[0].token_ids = list(piece.tokens)
        return choices

    def _end(self, index: int, reason: FinishReason, sample: Sample | None = None) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason)
        if sample is not None and (switches := switched(self.prompt.course, sample)) is not None:
            choice.veneer = switches
        return self._chunk([choice])

    def _chunk(self, choices: list[ChatChunkChoice], **told: Any) -> ChatChunk:
        if self.body.wants_usage:
            told.setdefault("usage", None)
        return ChatChunk(
            id=self.envelope.id,
            object="chat.completion.chunk",
            created=self.envelope.created,
            model=self.envelope.model,
            choices=choices,
            system_fingerprint=self.envelope.fingerprint,
            **told,
        )

    def _writer(self) -> ChatWriter:
        text = TextWriter(self.envelope.behaviour.served.renderer.vocabulary, self.body.stop)
        return ChatWriter(text, Reader(thinking=self.thinking, calls=bool(self.body.offered_tools)))

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        vocabulary = self.envelope.behaviour.served.renderer.vocabulary
        return ChatLogprobs(content=chat_logprobs(vocabulary, piece)) if self.body.logprobs else None
