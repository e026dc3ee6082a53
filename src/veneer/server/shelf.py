"""Adapters that serve: in the engine by the digest of what they do, loaded when somebody asks, gone when others need the room."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from veneer.server.worker import Worker
from veneer.types import Checkpoint, Engine

MOST = 1024
"""Adapters in memory that nobody is using; beyond it the least recently used leaves."""
ROOM = 2**31
"""Bytes that adapters take in memory, those in use among them; beyond it those that nobody is using leave."""
FLOAT32 = 4


@dataclass
class _Place:
    loaded: asyncio.Task[None]
    unread: Callable[[], Checkpoint] | None = None
    """Reads what is stored of an adapter that came from memory, until the proof asks for it."""
    proven: asyncio.Task[None] | None = None
    """Begins when somebody asks for the adapter."""
    checkpoint: Checkpoint | None = None
    """Until it is proven."""
    size: int = 0
    users: int = 0
    leaving: bool = False
    """It is not kept once nobody uses it."""

    @property
    def failure(self) -> BaseException | None:
        """Why it does not answer."""
        for task in (self.loaded, self.proven):
            if task is not None and task.done() and (task.cancelled() or task.exception() is not None):
                return asyncio.CancelledError() if task.cancelled() else task.exception()
        return None


@dataclass
class Shelf:
    """One engine's adapters. Two behaviours with one digest are one adapter in memory."""

    worker: Worker
    engine: Engine
    most: int = MOST
    room: int = ROOM
    prove: Callable[[str, Checkpoint], Awaitable[None]] | None = None
    """Called once for each load with the name in the engine and what was loaded; refuses it by raising."""
    _places: OrderedDict[str, _Place] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(place.size for place in self._places.values())

    @asynccontextmanager
    async def hold(self, digest: str, read: Callable[[], Checkpoint], *, early: bool = False) -> AsyncIterator[str]:
        """The adapter's name in the engine, which stays loaded meanwhile. ``read`` fetches it, on another thread, if it is not there.
        ``early``: do not wait for the proof before, only after the block; what was drawn in it is worth nothing if this raises."""
        place = self._places.get(digest)
        if place is None:
            place = self._begin(digest, read)
        if place.proven is None:
            place.proven = asyncio.create_task(self._prove(place, digest))
        place.users += 1
        place.leaving = False
        self._places.move_to_end(digest)
        try:
            await asyncio.shield(place.loaded if early else place.proven)
            yield digest
            await asyncio.shield(place.proven)
        except Exception as error:
            failure = place.failure
            if failure is None or failure is error:
                raise
            raise failure from error  # and not that it was taken away
        finally:
            place.users -= 1
            self._make_room()

    async def bring(self, digest: str, checkpoint: Checkpoint, read: Callable[[], Checkpoint]) -> None:
        """Load an adapter that is in memory, and that somebody will ask for soon; ``read`` is for then, when what is stored must be sound
        too. If that fails it is not there, and whoever asks for it is told why."""
        place = self._places.get(digest)
        if place is None:
            place = self._begin(digest, read, checkpoint)
            place.loaded.add_done_callback(lambda _: self._make_room())
        self._places.move_to_end(digest)
        await asyncio.wait([place.loaded])

    def _begin(self, digest: str, read: Callable[[], Checkpoint], known: Checkpoint | None = None) -> _Place:
        async def loading() -> None:
            try:
                await self._load(place, digest, known or await asyncio.to_thread(read))
            except BaseException:
                if self._places.get(digest) is place:
                    del self._places[digest]
                raise

        place = self._places[digest] = _Place(asyncio.create_task(loading()), None if known is None else read)
        place.loaded.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())  # seen
        return place

    async def _load(self, place: _Place, digest: str, checkpoint: Checkpoint) -> None:
        place.size = FLOAT32 * sum(array.size for array in checkpoint.weights.values())
        await self.worker.ask(self.engine, lambda: self.engine.load_state(digest, checkpoint))
        place.checkpoint = checkpoint if checkpoint.canary is None else dataclasses.replace(checkpoint, weights={}, optimizer={})

    async def _prove(self, place: _Place, digest: str) -> None:
        await asyncio.shield(place.loaded)
        checkpoint, place.checkpoint = place.checkpoint, None
        unread, place.unread = place.unread, None
        try:
            if self.prove is not None and checkpoint is not None:
                await self.prove(digest, checkpoint)
            if unread is not None:  # not beside: it would keep the interpreter from the requests that the adapter was loaded for
                await asyncio.to_thread(unread)
        except BaseException:
            if self._places.get(digest) is place:
                self._remove(digest)
            raise

    def _make_room(self) -> None:
        unused = [digest for digest, place in self._places.items() if place.users == 0 and place.loaded.done()]
        leaving = [digest for digest in unused if self._places[digest].leaving]
        staying = [digest for digest in unused if not self._places[digest].leaving]
        for digest in leaving:
            self._remove(digest)
        size = self.size
        for digest in staying:
            if len(self._places) <= self.most and size <= self.room:
                break
            size -= self._places[digest].size
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
