"""The bases that a server holds, by every name they answer to."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from veneer.measure.canary import ask_sampled, base_row, canary_tokens, check_effect, row_of, with_canary
from veneer.render import Renderer
from veneer.server.errors import NotFound
from veneer.server.shelf import Shelf
from veneer.types import Checkpoint, Engine, Floats, Tokens


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

    def record(self, name: str, checkpoint: Checkpoint) -> Checkpoint:
        """With what the training weights of ``name`` do now. On the engines' thread."""
        return with_canary(self.engine, name, checkpoint, self._canary, self._base_logprobs)

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
