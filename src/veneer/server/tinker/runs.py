"""A training run: one adapter's operations, in the order of their sequence numbers, whatever order they arrive in.

After a restart the run starts from its last state on disk and repeats the operations since then, which gives the same weights to
the bit on a CPU; operations that were answered keep their answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.server.bases import Served
from veneer.server.tinker import requests, wire
from veneer.server.tinker.promises import Promise, Promises
from veneer.server.tinker.state import RunRow, put
from veneer.store.adapters import read_adapter, write_adapter
from veneer.types import AdamParams, AdapterError, Checkpoint, DataError, RequestError, RunError

if TYPE_CHECKING:
    from veneer.server.tinker.checkpoints import Checkpoints
    from veneer.server.tinker.sampling import Sampling

LOG = logging.getLogger("veneer.server")
STATE_SHARE = 0.01
"""Of a run's time at most this much goes into saving its state; what lies between two states is repeated after a restart."""

ROW_BYTES = 5 * 4
"""Of a parameter."""


class Run:
    """One model that a client trains. Its name in the engine is its id."""

    def __init__(
        self,
        row: RunRow,
        served: Served,
        promises: Promises,
        checkpoints: Checkpoints,
        sampling: Sampling,
        states: Path,
    ) -> None:
        """``states``: a folder for the run's states, its own."""
        self.row, self.served, self.promises, self.checkpoints, self.sampling = row, served, promises, checkpoints, sampling
        self.states = states
        self.last_request = row.created
        self.size = 0
        """Bytes in memory: published weights, those in training, gradient and two moments."""
        self.failed: Exception | None = None
        """Why there is no such model: it could not be made."""
        self._next = 0 if row.state_seq is None else row.state_seq + 1
        self._early: dict[int, Promise] = {}
        self._arrived = asyncio.Event()
        self._passes: dict[asyncio.Task[None], Promise] = {}
        self._spoilt: Promise | None = None
        """A forward_backward that failed. What was gathered with it is no gradient of anything; who asks for another after hearing of the
        failure begins anew."""
        self._doing = False
        self._covered: list[Promise] = []
        """Operations since the last state on disk."""
        self._saving: asyncio.Task[None] | None = None
        self._save_after = 0.0
        self._work = asyncio.create_task(self._run())

    @property
    def at_work(self) -> bool:
        """Something runs or waits for its turn."""
        return bool(self._early or self._passes or self._doing)

    @property
    def idle_for(self) -> float:
        """Seconds; 0 while it is at work or its state is being saved."""
        saving = self._saving is not None and not self._saving.done()
        return 0.0 if self.at_work or saving else time.time() - self.last_request

    def offer(self, promise: Promise) -> None:
        """Take an operation in; it runs when its turn comes."""
        self.last_request = time.time()
        self._early[promise.seq] = promise
        self._arrived.set()

    def stop(self) -> None:
        """What was not finished is done again when the run comes back."""
        self._work.cancel()
        for task in self._passes:
            task.cancel()

    async def stopped(self) -> None:
        tasks = [self._work, *self._passes, *([] if self._saving is None else [self._saving])]
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------ the sequence

    async def _run(self) -> None:
        if self.row.state_folder is not None:
            await self._begin(lambda: self._read_state(str(self.row.state_folder)))
        while True:
            while self._next not in self._early:
                self._arrived.clear()
                await self._arrived.wait()
            promise = self._early.pop(self._next)
            self._next += 1
            if self.failed is not None and promise.seq > 0:
                self.promises.fail(promise, self.failed)
                continue
            self._doing = True
            try:
                await self._do(promise)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self.promises.fail(promise, error)
                if promise.seq == 0:
                    self.failed = AdapterError(f"model {self.row.id} could not be made: {error}")
            finally:
                self._doing = False
            if promise.kind != "forward_backward":
                self._covered.append(promise)

    async def _begin(self, read: Callable[[], Checkpoint]) -> None:
        try:
            checkpoint = await asyncio.to_thread(read)
            await self._loaded(checkpoint)
        except Exception as error:
            LOG.exception("the state of %s cannot be read", self.row.id)
            self.failed = RunError(f"the state of {self.row.id} cannot be read: {error}")

    def _read_state(self, folder: str) -> Checkpoint:
        return read_adapter(Path(folder))[0]

    async def _loaded(self, checkpoint: Checkpoint) -> None:
        await self._ask(lambda: self.served.engine.load_state(self.row.id, checkpoint))
        self.size = ROW_BYTES * sum(array.size for array in checkpoint.weights.values())
        await self.served.check(self.row.id, checkpoint)

    def _ask(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        return self.served.shelf.worker.ask(self.served.engine, call)

    async def _do(self, promise: Promise) -> None:
        repeated = promise.done
        if promise.kind == "forward_backward":
            if self._spoilt is not None and promise.created > (self._spoilt.done_at or 0):
                await self._drop_gradient()
            if not repeated or not wire.parse_pass(promise.body).forward_only:
                task = asyncio.create_task(self._pass(promise))
                self._passes[task] = promise
                task.add_done_callback(lambda done: self._passes.pop(done))
                await asyncio.sleep(0)  # so that passes are queued in order
            return
        await asyncio.gather(*self._passes)
        if promise.kind in ("create_model", "load_new", "load_weights", "optim_step"):
            await self._changes()[promise.kind](promise)
        elif not repeated:
            await self._saves()[promise.kind](promise)

    def _changes(self) -> dict[str, Callable[[Promise], Awaitable[None]]]:
        """Operations that change the weights, and run again after a restart."""
        return {"create_model": self._create, "load_new": self._load, "load_weights": self._load, "optim_step": self._step}

    def _saves(self) -> dict[str, Callable[[Promise], Awaitable[None]]]:
        return {
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_for_sampler,
            "save_weights_external": self._save_external,
        }

    # ------------------------------------------------ operations

    async def _create(self, promise: Promise) -> None:
        count = await self.served.shelf.worker.run(lambda: self.served.engine.create_adapter(self.row.id, self.row.lora))
        self.size = ROW_BYTES * count
        self.promises.resolve(promise, {"model_id": self.row.id, "type": "create_model"})

    async def _load(self, promise: Promise) -> None:
        body = requests.parse(requests.LoadWeights, promise.body)
        row = self.checkpoints.find(body.path, promise.owner, ("weights",))
        checkpoint = await asyncio.to_thread(lambda: read_adapter(Path(row.folder))[0])
        if not body.optimizer:
            checkpoint = dataclasses.replace(checkpoint, kind="sampler", optimizer={})
        await self._loaded(checkpoint)
        self._spoilt = None
        if checkpoint.config is not None:
            self.row.lora = checkpoint.config
        await self._save_state(promise.seq)  # the checkpoint may be deleted
        self.promises.resolve(promise, {"path": body.path, "model_id": self.row.id, "type": "load_weights"})

    async def _pass(self, promise: Promise) -> None:
        engine, request = self.served.engine, wire.parse_pass(promise.body)

        def call() -> Any:
            if not request.data:
                raise DataError("no data: a forward_backward needs at least one datum")
            data = wire.to_data(request.data, request.loss_fn)
            config = wire.loss_settings(request.loss_fn, request.loss_config)
            run = engine.forward if request.forward_only else engine.forward_backward
            return run(self.row.id, data, request.loss_fn, config, everywhere=True)  # type: ignore[arg-type]

        try:
            output = await self._ask(call)
        except Exception as error:
            self.promises.fail(promise, error)
            if not request.forward_only:
                self._spoilt = promise
        else:
            self.promises.resolve(promise, wire.output_bytes(output), wire.PROTOBUF)
        self._covered.append(promise)

    async def _step(self, promise: Promise) -> None:
        params = requests.parse(requests.OptimStep, promise.body).params()
        if self._spoilt is not None:
            failed = self._spoilt.seq
            await self._drop_gradient()
            raise RequestError(f"no step was taken: operation {failed}, a forward_backward, failed, and what had been gathered was dropped")
        metrics = await self._ask(lambda: self.served.engine.optim_step(self.row.id, AdamParams(**params), need_gradient=False))
        self.promises.resolve(promise, {"metrics": wire.metric_numbers(metrics), "type": "optim_step"})
        if time.monotonic() >= self._save_after and (self._saving is None or self._saving.done()):
            started = time.monotonic()
            checkpoint = await self._ask(lambda: self.served.engine.save_state(self.row.id))
            self._saving = asyncio.create_task(self._write_state(promise.seq, checkpoint, [*self._covered, promise], started))

    async def _saved(self, kind: Literal["training", "sampler"]) -> Checkpoint:
        """The weights as they are, with a record of what they do."""
        name, served = self.row.id, self.served
        return await served.shelf.worker.run(lambda: served.record(name, served.engine.save_state(name, kind).result()))

    async def _drop_gradient(self) -> None:
        self._spoilt = None
        await self._ask(lambda: self.served.engine.zero_grad(self.row.id))

    async def _save_weights(self, promise: Promise) -> None:
        body = requests.parse(requests.SaveWeights, promise.body)
        self.checkpoints.check(self.row.id, "weights", body.path, body.ttl_seconds, body.overwrite)
        checkpoint = await self._saved("training")
        path = await self.checkpoints.save(self.row, "weights", body.path, checkpoint, body.ttl_seconds, body.user_metadata)
        self.promises.resolve(promise, {"path": path, "type": "save_weights"})

    async def _save_for_sampler(self, promise: Promise) -> None:
        body = requests.parse(requests.SaveWeightsForSampler, promise.body)
        if body.path is not None:
            self.checkpoints.check(self.row.id, "sampler_weights", body.path, body.ttl_seconds, overwrite=False)
        checkpoint = await self._saved("sampler")
        if body.path is not None:
            kind = "sampler_weights"
            path = await self.checkpoints.save(self.row, kind, body.path, checkpoint, body.ttl_seconds, body.user_metadata)
            self.promises.resolve(promise, {"path": path, "type": "save_weights_for_sampler"})
            return
        sampler = await self.sampling.from_run(self.row, checkpoint, promise, body)
        self.promises.resolve(promise, {"path": None, "sampling_session_id": sampler, "type": "save_weights_for_sampler"})

    async def _save_external(self, promise: Promise) -> None:
        body = requests.parse(requests.SaveWeightsExternal, promise.body)
        self.checkpoints.check(self.row.id, "external_weights", body.path, body.ttl_seconds, overwrite=False)
        recipients = self.checkpoints.recipients(body.age_encryption_recipients)
        checkpoint = await self._saved("sampler")
        path = await self.checkpoints.save(
            self.row, "external_weights", body.path, checkpoint, body.ttl_seconds, None, recipients=recipients
        )
        size = self.checkpoints.find(path, promise.owner, ("external_weights",)).size
        self.promises.resolve(promise, {"path": path, "size_bytes": size, "type": "save_weights_external"})

    # ------------------------------------------------ the state on disk

    async def _save_state(self, seq: int) -> None:
        if self._saving is not None:
            await asyncio.gather(self._saving, return_exceptions=True)
        started = time.monotonic()
        checkpoint = await self._ask(lambda: self.served.engine.save_state(self.row.id))
        await self._write_state(seq, checkpoint, self._covered.copy(), started)

    async def _write_state(self, seq: int, checkpoint: Checkpoint, covered: list[Promise], started: float) -> None:
        """Write the state after operation ``seq``; ``covered`` need not run again. ``started``: when saving it began."""
        old = self.row.state_folder
        folder = self.states / f"after-{seq:09d}"
        try:
            await asyncio.to_thread(write_adapter, folder, checkpoint, {}, durable=False)
            self.row.state_seq, self.row.state_folder = seq, str(folder)
            await self.promises.journal.write(put(self.row))
        except Exception:
            LOG.exception("the state of %s was not saved; the run goes on", self.row.id)
        else:
            self._covered = [promise for promise in self._covered if promise not in covered]
            self.promises.forget_body(*covered)
            if old is not None and old != str(folder):
                await asyncio.to_thread(self.checkpoints.remove_folder, Path(old))
        self._save_after = time.monotonic() + (time.monotonic() - started) / STATE_SHARE
