"""What chat and completions share: who answers with which seed, how it is told, and how a stream is sent."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from veneer.server.access import Caller, caller_of
from veneer.server.bases import Bases
from veneer.server.errors import UNKNOWN, status_of, told
from veneer.server.openai.answers import Answer, Attestation, ChoiceAttestation, PromptTokensDetails, Switched, Usage
from veneer.server.openai.behaviours import Behaviour, Course, Phase
from veneer.server.openai.catalogue import Catalogue
from veneer.server.openai.drawing import Job, pieces, samples, while_connected
from veneer.server.openai.errors import FieldError, error_body
from veneer.server.openai.loading import Loading, attest, switches
from veneer.server.openai.requests import Drawing, LoraEntry
from veneer.store.registry import Registry
from veneer.types import Piece, Sample, SamplingParams, Tokens, VeneerError

LOG = logging.getLogger("veneer.server")
Event = tuple[int, Piece | list[Sample]]


@dataclass(frozen=True)
class Prompt:
    """A prompt of a request, and which adapters act where on it."""

    tokens: Tokens
    course: Course


@dataclass(frozen=True)
class Envelope:
    """What every answer to one request says of itself."""

    id: str
    model: str
    behaviour: Behaviour
    seed: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        return f"fp_{self.behaviour.digest[:16]}"

    def attestation(self, course: Course) -> Attestation:
        served = self.behaviour.served
        adapters = [part.acting() for part in course.first]
        return Attestation(base=served.name, base_digest=served.engine.base_digest, adapters=adapters, seed=self.seed)

    @property
    def headers(self) -> dict[str, str]:
        """Header values are ASCII; adapters' names are."""
        served, parts = self.behaviour.served, self.behaviour.parts
        base = served.name.encode("ascii", "backslashreplace").decode()
        headers = {"x-veneer-base": base, "x-veneer-base-digest": served.engine.base_digest}
        if parts:
            headers["x-veneer-adapter"] = ", ".join(map(str, parts))
            headers["x-veneer-adapter-digest"] = ", ".join(part.digest for part in parts)
        return headers


class Answering:
    """Requests of both kinds, on the bases and adapters that there are."""

    def __init__(self, bases: Bases, registry: Registry) -> None:
        self.bases = bases
        self.catalogue = Catalogue(bases, registry)
        self.loading = Loading(registry, self.catalogue)

    # ------------------------------------------------ before anything is drawn

    async def behaviour(self, request: Request, body: Drawing) -> Behaviour:
        """
        Raises:
            UnknownModel: there is no such base or adapter.
            FieldError: an adapter does not fit the base.
        """
        caller, served = caller_of(request), self.catalogue.base(body.model)
        if served is not None:
            wanted = [(item, await self.catalogue.find(caller, item.name, f"lora.{i}.name")) for i, item in enumerate(body.lora or ())]
            for i, (_, entry) in enumerate(wanted):
                self.catalogue.check(entry, served, f"lora.{i}.name")
            return Behaviour(served, tuple(wanted))
        return await self._one_adapter(caller, body)

    async def _one_adapter(self, caller: Caller, body: Drawing) -> Behaviour:
        """A model that is no base: an adapter of that name, on its base."""
        entry = await self.catalogue.find(caller, body.model)
        served = self.catalogue.base_of(entry)
        if body.lora:
            raise FieldError(f"model {body.model!r} is an adapter; with lora, give the base as the model and name it there", "lora")
        if served is None:
            there = ", ".join(f"{base.name!r} ({base.engine.base_digest[:12]})" for base in self.bases.served)
            made = f"{entry.base_id!r} ({entry.base_digest[:12]})"
            raise FieldError(f"{entry.reference} was made for base {made}, which this server does not hold; it holds {there}", "model")
        self.catalogue.check(entry, served, "model")
        return Behaviour(served, ((LoraEntry.model_validate({"name": body.model}), entry),))

    def envelope(self, kind: str, body: Drawing, behaviour: Behaviour) -> Envelope:
        seed = secrets.randbits(53) if body.seed is None else body.seed  # 53 bits: JSON numbers of JavaScript hold them
        return Envelope(f"{kind}-{secrets.token_hex(12)}", body.model, behaviour, seed)

    def params(self, body: Drawing, envelope: Envelope, prompt: Tokens, limit: int | None, param: str) -> SamplingParams:
        """
        Raises:
            FieldError: the prompt leaves no room in the base's context.
        """
        context = envelope.behaviour.served.engine.context_length
        if len(prompt) >= context:
            text = f"the prompt has {len(prompt)} tokens; the base's context is {context}, prompt and answer together"
            raise FieldError(text, param, "context_length_exceeded")
        return SamplingParams(
            max_tokens=min(context - len(prompt) if limit is None else limit, context),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(body.top_k or 0, 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            stop=tuple(body.stop),
            stop_token_ids=() if body.ignore_eos else None,
            seed=envelope.seed,
        )

    # ------------------------------------------------ drawing

    async def whole(self, request: Request, envelope: Envelope, prompts: Sequence[Prompt], jobs: Sequence[Job]) -> list[list[Sample]]:
        """Of each prompt its samples. ``jobs``: without adapters, which come from the prompts' courses."""
        async with AsyncExitStack() as stack:
            names, ready = await self._load(stack, envelope, prompts, jobs)
            drawn = await while_connected(request, samples(envelope.behaviour.served, ready))
        for prompt, of_prompt in zip(prompts, drawn, strict=True):
            attest(envelope.behaviour.served, prompt.course, names, of_prompt)
        return drawn

    async def stream(
        self, request: Request, envelope: Envelope, prompts: Sequence[Prompt], jobs: Sequence[Job]
    ) -> tuple[AsyncIterator[Event], AsyncExitStack]:
        """Events as they come, the first of them there already: what is wrong with a request is told with its status. Close the stack."""
        async with AsyncExitStack() as stack:
            names, ready = await self._load(stack, envelope, prompts, jobs)
            events = pieces(envelope.behaviour.served, ready)
            stack.push_async_callback(events.aclose)
            first = await while_connected(request, anext(events))  # type: ignore[arg-type]
            opened = stack.pop_all()

        async def checked() -> AsyncGenerator[Event]:
            number, event = first
            while True:
                if isinstance(event, list):
                    attest(envelope.behaviour.served, prompts[number].course, names, event)
                yield number, event
                try:
                    number, event = await anext(events)
                except StopAsyncIteration:
                    return

        return checked(), opened

    async def _load(
        self, stack: AsyncExitStack, envelope: Envelope, prompts: Sequence[Prompt], jobs: Sequence[Job]
    ) -> tuple[dict[Phase, str | None], list[Job]]:
        phases = list(dict.fromkeys(phase for prompt in prompts for phase in prompt.course.phases))
        names = await self.loading.hold(stack, envelope.behaviour.served, phases)
        ready = [_with_adapters(job, prompt.course, names) for job, prompt in zip(jobs, prompts, strict=True)]
        return names, ready


def _with_adapters(job: Job, course: Course, names: dict[Phase, str | None]) -> Job:
    return replace(job, adapter=names[course.first], switches=switches(course, names))


# ---------------------------------------------------------------- telling


def usage(prompts: Sequence[Prompt], drawn: Sequence[Sequence[Sample]]) -> Usage:
    """A prompt counts once, however many choices it has."""
    asked = sum(len(prompt.tokens) for prompt in prompts)
    told = sum(len(sample.tokens) for of_prompt in drawn for sample in of_prompt)
    cached = sum(of_prompt[0].cached_tokens for of_prompt in drawn)
    details = PromptTokensDetails(cached_tokens=cached)
    return Usage(prompt_tokens=asked, completion_tokens=told, total_tokens=asked + told, prompt_tokens_details=details)


def switched(course: Course, sample: Sample) -> ChoiceAttestation | None:
    """Where which adapters began to act in one choice; None: the same ones acted everywhere."""
    changes = zip(sample.switches, course.changes, strict=False)
    told = [Switched(position=at, adapters=[part.acting() for part in change.phase]) for (at, _), change in changes]
    return ChoiceAttestation(switches=told) if course.changes else None


class JsonAnswer(Response):
    media_type = "application/json"

    def __init__(self, answer: Answer, headers: dict[str, str] | None = None) -> None:
        super().__init__(answer.to_json(), headers=headers)


class EventStream(StreamingResponse):
    """Chunks as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), and OpenAI's last one."""

    def __init__(self, chunks: AsyncIterator[Answer], opened: AsyncExitStack, headers: dict[str, str]) -> None:
        """``opened``: closed when the last byte is sent, or the client has left, be it before the first."""
        super().__init__(_events(chunks), headers=headers | {"cache-control": "no-store", "x-accel-buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._opened.aclose())


async def _events(chunks: AsyncIterator[Answer]) -> AsyncGenerator[bytes]:
    try:
        async for chunk in chunks:
            yield b"data: " + chunk.to_json() + b"\n\n"
    except VeneerError as error:
        yield _event_of(status_of(error), told(error), error)
    except Exception:
        LOG.exception("a stream failed")
        yield _event_of(500, UNKNOWN)
    yield b"data: [DONE]\n\n"


def _event_of(status: int, text: str, error: VeneerError | None = None) -> bytes:
    return b"data: " + json.dumps(error_body(status, text, error)).encode() + b"\n\n"
