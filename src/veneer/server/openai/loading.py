"""Adapters and sums of adapters in the engine, for as long as somebody is answered with them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import AsyncExitStack
from dataclasses import replace

from veneer.measure.canary import check_drawn
from veneer.server.bases import Served
from veneer.server.openai.behaviours import Change, Course, Phase
from veneer.server.openai.catalogue import Catalogue
from veneer.store.registry import Registry
from veneer.store.stack import stack_adapters
from veneer.types import Checkpoint, Sample, Switch

MOST_STACKS = 4096
"""Sums whose digest is remembered."""


class Loading:
    def __init__(self, registry: Registry, catalogue: Catalogue) -> None:
        self.registry, self.catalogue = registry, catalogue
        self._stacks: OrderedDict[Phase, str] = OrderedDict()

    async def hold(self, stack: AsyncExitStack, served: Served, phases: list[Phase]) -> dict[Phase, str | None]:
        """What each phase is called in the engine, where it stays until ``stack`` is closed: the digest of what is drawn with."""
        return {phase: await self._hold(stack, served, phase) for phase in phases}

    async def _hold(self, stack: AsyncExitStack, served: Served, phase: Phase) -> str | None:
        if not phase:
            return None
        if len(phase) == 1 and phase[0].scale == 1:
            part = phase[0]
            return await stack.enter_async_context(served.shelf.hold(part.digest, lambda: self.registry.read(part.entry)[0]))
        digest = self._stacks.get(phase)
        if digest is None:
            made = await asyncio.to_thread(self._sum, phase)
            digest = self._stacks[phase] = made.adapter.digest
            while len(self._stacks) > MOST_STACKS:
                self._stacks.popitem(last=False)
            return await stack.enter_async_context(served.shelf.hold(digest, lambda: made))
        self._stacks.move_to_end(phase)
        return await stack.enter_async_context(served.shelf.hold(digest, lambda: self._sum(phase)))

    def _sum(self, phase: Phase) -> Checkpoint:
        return stack_adapters([(self.registry.read(part.entry)[0], part.scale) for part in phase], " + ".join(map(str, phase)))

    async def forget(self, digest: str) -> None:
        """Take an adapter and every sum with it out of memory."""
        sums = {phase: made for phase, made in self._stacks.items() if any(part.digest == digest for part in phase)}
        for phase in sums:
            del self._stacks[phase]
        for served in self.catalogue.bases.served:
            for gone in {digest, *sums.values()}:
                await served.shelf.forget(gone)


def switches(course: Course, names: dict[Phase, str | None]) -> tuple[Switch, ...]:
    """A course as the engine takes it."""

    def switch(change: Change) -> Switch:
        return Switch(names[change.phase], change.at, change.after)

    return tuple(map(switch, course.changes))


def attest(served: Served, course: Course, names: dict[Phase, str | None], samples: list[Sample]) -> None:
    """What the engine says that it drew with must be what the names meant.

    Raises:
        AttestationError: it is not.
    """
    base = served.engine.base_digest
    check_drawn(samples, names[course.first], base)
    for sample in samples:
        for change, (_, adapter) in zip(course.changes, sample.switches, strict=False):
            check_drawn([replace(sample, adapter=adapter)], names[change.phase], base)
