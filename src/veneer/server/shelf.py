"""Adapters that serve: in the engine by the digest of what they do, loaded when somebody asks, gone when others need the room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from veneer.server.worker import Worker
from veneer.types import Adapter, Checkpoint, Engine

MOST = 1024
"""Adapters in memory that nobody is using; beyond it the least recently used leaves."""


@dataclass
class _Place:
    loaded: asyncio.Task[Adapter]
    users: int = 0
    leaving: bool = False
    """It is not kept once nobody uses it."""


@dataclass
class Shelf:
    """One engine's adapters. Two behaviours with one digest are one adapter in memory."""

    worker: Worker
    engine: Engine
    most: int = MOST
    on_load: list[Callable[[str, Checkpoint], None]] = field(default_factory=list)
    """Called with the name in the engine and the weights, on the engine's thread, after each load; may refuse by raising."""
    _places: OrderedDict[str, _Place] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    @asynccontextmanager
    async def hold(self, digest: str, read: Callable[[], Checkpoint]) -> AsyncIterator[str]:
        """The adapter's name in the engine, which stays loaded meanwhile. ``read`` fetches it, on another thread, if it is not there."""
        place = self._places.get(digest)
        if place is None:
            place = self._places[digest] = _Place(asyncio.create_task(self._load(digest, read)))
        place.users += 1
        place.leaving = False
        self._places.move_to_end(digest)
        try:
            if not place.loaded.done():
                await asyncio.shield(place.loaded)
            place.loaded.result()
            yield digest
        finally:
            place.users -= 1
            failed = place.loaded.done() and (place.loaded.cancelled() or place.loaded.exception() is not None)
            if failed and self._places.get(digest) is place:
                del self._places[digest]
            self._make_room()

    async def _load(self, digest: str, read: Callable[[], Checkpoint]) -> Adapter:
        checkpoint = await asyncio.to_thread(read)
        await self.worker.ask(self.engine, lambda: self.engine.load_state(digest, checkpoint))

        def check() -> None:
            try:
                for look in self.on_load:
                    look(digest, checkpoint)
            except Exception:
                self.engine.remove_adapter(digest)
                raise

        await self.worker.run(check)
        return checkpoint.adapter

    def _make_room(self) -> None:
        unused = [digest for digest, place in self._places.items() if place.users == 0 and place.loaded.done()]
        leaving = [digest for digest in unused if self._places[digest].leaving]
        staying = [digest for digest in unused if not self._places[digest].leaving]
        for digest in leaving + staying[: max(0, len(self._places) - len(leaving) - self.most)]:
            self._remove(digest)

    def release(self, digest: str) -> None:
        """Take an adapter out of memory as soon as nobody is answered with it."""
        if digest in self._places:
            self._places[digest].leaving = True
            self._make_room()

    def _remove(self, digest: str) -> None:
        del self._places[digest]
        self.worker.run(lambda: self.engine.remove_adapter(digest))

    async def forget(self, digest: str) -> bool:
        """Take an adapter out of memory, with whatever was cached of it; what is being answered with it fails. False: it was not there."""
        if self._places.pop(digest, None) is None:
            return False
        await self.worker.run(lambda: self.engine.remove_adapter(digest))
        return True
