"""From a request to what the engine draws: prompts in, pieces or whole samples out, and an end to all of it when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from veneer.server.bases import Served
from veneer.types import Future, Piece, Sample, SamplingParams, Switch, Tokens

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One prompt, and what is wanted of it."""

    prompt: Tokens
    adapter: str | None
    switches: tuple[Switch, ...]
    params: SamplingParams
    n: int
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0


async def samples(served: Served, jobs: Sequence[Job]) -> list[list[Sample]]:
    """Of each job its samples; all are given up if one fails."""
    asked = [served.shelf.worker.ask(served.engine, _call(served, job)) for job in jobs]
    try:
        return list(await asyncio.gather(*asked))
    finally:
        for answer in asked:
            answer.cancel()


async def pieces(served: Served, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece | list[Sample]]]:
    """With the number of the job: what is drawn as it is drawn, and in the end the samples. Closing it gives up what is left."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | asyncio.Future[list[Sample]]]]()
    asked: list[asyncio.Future[list[Sample]]] = []
    try:
        for number, job in enumerate(jobs):

            def tell(piece: Piece, number: int = number) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

            answer = served.shelf.worker.ask(served.engine, _call(served, job, tell))
            answer.add_done_callback(lambda answer, number=number: queue.put_nowait((number, answer)))
            asked.append(answer)
        left = len(jobs)
        while left:
            number, event = await queue.get()
            if isinstance(event, asyncio.Future):
                left -= 1
                yield number, event.result()
            else:
                yield number, event
    finally:
        for answer in asked:
            answer.cancel()


def _call(served: Served, job: Job, on_piece: Callable[[Piece], None] | None = None) -> Callable[[], Future[list[Sample]]]:
    return lambda: served.engine.sample(
        job.prompt,
        job.adapter,
        job.params,
        job.n,
        prompt_logprobs=job.prompt_logprobs,
        top_logprobs=job.top_logprobs,
        prompt_top_logprobs=job.prompt_top_logprobs,
        switches=job.switches,
        on_piece=on_piece,
    )


async def while_connected(request: Request, work: Coroutine[None, None, T]) -> T:
    """``work``, given up when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
