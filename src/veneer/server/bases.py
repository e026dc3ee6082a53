"""The bases that a server holds, by every name they answer to."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from veneer.measure.canary import ask_sampled, ask_trained, base_row, canary_tokens, check_effect, make_canary, row_of
from veneer.render import Renderer
from veneer.server.errors import NotFound
from veneer.server.shelf import Shelf
from veneer.types import Adapter, Canary, Checkpoint, Engine, Floats, ForwardBackwardOutput, Tokens


@dataclass(frozen=True)
class Served:
    """One base in memory."""

    names: tuple[str, ...]
    """Its own name first, then aliases."""
    engine: Engine
    renderer: Renderer
    shelf: Shelf

    def __post_init__(self) -> None:
        self.shelf.prove = self.check

    @cached_property
    def _canary(self) -> Tokens:
        return canary_tokens(self.renderer.vocab_size)

    @cached_property
    def _base_logprobs(self) -> Floats:
        """As they were at the first record: whatever changes the base later shows at the next check."""
        return base_row(self.engine, self._canary)

    async def save(self, name: str, kind: Literal["training", "sampler"]) -> tuple[Checkpoint, asyncio.Task[Canary]]:
        """The training weights of ``name`` as they are, and a record of what these do, which takes longer: it is in the engine's queue
        before whatever may change them next."""
        saved = self.shelf.worker.ask(self.engine, lambda: self.engine.save_state(name, kind))
        asked = self._ask_row(name)
        try:
            checkpoint = await saved
        except BaseException:
            asked.cancel()
            raise
        record = asyncio.create_task(self._canary_of(checkpoint.adapter, asked))
        record.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen; whoever waits for it is told
        return checkpoint, record

    async def record(self, name: str, adapter: Adapter) -> Canary:
        """What the training weights of ``name`` do now, as a record of ``adapter``."""
        return await self._canary_of(adapter, self._ask_row(name))

    def _ask_row(self, name: str) -> asyncio.Future[tuple[Floats, ForwardBackwardOutput]]:
        worker = self.shelf.worker
        base = worker.run(lambda: self._base_logprobs)
        return asyncio.gather(base, worker.ask(self.engine, partial(ask_trained, self.engine, name, self._canary)))

    async def _canary_of(self, adapter: Adapter, asked: asyncio.Future[tuple[Floats, ForwardBackwardOutput]]) -> Canary:
        base, trained = await asked
        return make_canary(self._canary, base, trained.logprobs_D[0], adapter, self.engine.dtype)

    async def check(self, name: str, checkpoint: Checkpoint) -> None:
        """Whether ``name`` does what its checkpoint recorded. The engine draws it among whatever else it is drawing.

        Raises:
            AttestationError: it does not.
        """
        engine, row = self.engine, row_of(checkpoint, self._canary)
        asked = [self.shelf.worker.ask(engine, partial(ask_sampled, engine, asked, row)) for asked in (None, name)]
        (base,), (adapted,) = await asyncio.gather(*asked)
        check_effect(checkpoint, base, adapted, engine.dtype)

    @property
    def name(self) -> str:
        return self.names[0]


class Bases:
    def __init__(self, served: Sequence[Served]) -> None:
        self.served = list(served)
        self._by_name = {name: base for base in served for name in base.names}

    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Served:
        """The base of that name; what stands behind a colon ("Qwen/Qwen3-8B:peft:131072") is the client's affair.

        Raises:
            NotFound: the server does not hold it. It is never replaced by another.
        """
        base = self._by_name.get(name) or self._by_name.get(name.partition(":")[0])
        if base is None:
            near = difflib.get_close_matches(name, self._by_name, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise NotFound(f"this server does not hold base {name!r}; {hint}it holds {', '.join(map(repr, self._by_name))}")
        return base
