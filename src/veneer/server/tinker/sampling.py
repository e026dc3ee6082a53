"""Sampling sessions: the base, a checkpoint, a snapshot of a run that never changes, or one in flight that follows its run."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from veneer.measure.canary import check_drawn
from veneer.server.bases import Bases, Served
from veneer.server.journal import Journal
from veneer.server.tinker import requests, wire
from veneer.server.tinker.checkpoints import Checkpoints
from veneer.server.tinker.promises import Promise, Promises
from veneer.server.tinker.state import RunRow, SamplerRow, put, row_of
from veneer.store.adapters import read_adapter, write_adapter
from veneer.types import AttestationError, Checkpoint, DataError, RequestError, SamplingParams

CLONE = 1_000_000_000
"""Sequence numbers of a cloned client begin at a multiple of this."""
POLL = 0.05
MOST_TARGETS = 2**22
"""Of one prompt: looking them up keeps everybody else waiting."""


class Sampling:
    def __init__(self, journal: Journal, promises: Promises, bases: Bases, checkpoints: Checkpoints, folder: Path) -> None:
        """``folder``: snapshots, by digest."""
        self.journal, self.promises, self.bases, self.checkpoints, self.folder = journal, promises, bases, checkpoints, folder
        self.samplers: dict[str, SamplerRow] = {row["id"]: row_of(SamplerRow, row) for row in journal.read("SELECT * FROM samplers")}
        self._running: dict[str, asyncio.Task[None]] = {}

    # ------------------------------------------------ sessions

    async def create(self, owner: str, body: requests.CreateSamplingSession) -> str:
        """A session on a base or a checkpoint.

        Raises:
            BaseError, AdapterError: the server has no such base or checkpoint.
        """
        sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        if sampler_id in self.samplers:
            return sampler_id
        if body.model_path is not None:
            row = self.checkpoints.find(body.model_path, owner, ("weights", "sampler_weights"))
            kind, base, digest, folder = "checkpoint", row.base, row.digest, row.folder
        elif body.base_model is not None:
            self.bases.find(body.base_model)
            kind, base, digest, folder = "base", body.base_model, None, None
        else:
            raise RequestError("create_sampling_session needs base_model or model_path")
        sampler = SamplerRow(sampler_id, body.session_id, owner, base, kind, body.model_path, None, digest, folder, time.time())
        await self.journal.write(put(sampler))
        self.samplers[sampler_id] = sampler
        return sampler_id

    async def from_run(self, run: RunRow, checkpoint: Checkpoint, promise: Promise, body: requests.SaveWeightsForSampler) -> str:
        """A session on a run's weights as they are now. Those in flight share the weights of their run's newest save of that kind."""
        digest, session = checkpoint.adapter.digest, run.session_id
        folder = self.folder / digest
        seq = body.sampling_session_seq_id
        sampler_id = f"{session}:sample:{f'op-{promise.target}-{promise.seq}' if seq is None else seq}"
        sampler = SamplerRow(sampler_id, session, run.owner, run.base, body.kind, None, run.id, digest, str(folder), time.time())
        # before it is written, as each keeps the interpreter from the other, and for a sample it must be loaded
        await self.bases.find(run.base).shelf.bring(digest, checkpoint, lambda: _read(str(folder), digest))
        followers = [s for s in self.samplers.values() if s.run_id == run.id and s.kind == body.kind == "inflight"]
        moved = [dataclasses.replace(follower, digest=digest, folder=str(folder)) for follower in followers]
        written = self.journal.write(*(put(row) for row in [*moved, sampler]))  # a row without its folder is written anew
        if folder.is_dir():
            await written
        else:
            await asyncio.gather(written, asyncio.to_thread(write_adapter, folder, checkpoint, {}, durable=False))
        self.samplers |= {row.id: row for row in [*moved, sampler]}
        return sampler_id

    async def completions(self, sampler: SamplerRow, body: requests.RetrieveFutures, hold: float) -> dict[str, Any]:
        """What was answered since the cursor; waits for something to be."""
        clone = body.target.cloned_sampler_id
        first, until = clone * CLONE, time.monotonic() + (hold if body.timeout is None else min(hold, body.timeout))
        while True:
            found = self.promises.completed(sampler.id, first, first + CLONE - 1, body.prev_cursor)
            if found or time.monotonic() >= until:
                break
            await asyncio.sleep(POLL)
        finished = [
            {"state": "failed", "request_id": request}
            if failed
            else {"state": "finished", "request_id": request, "response_payload_uncompressed_size": size}
            for _, request, failed, size in found
        ]
        return {"completions": finished, "cursor": found[-1][0] if found else body.prev_cursor}

    # ------------------------------------------------ samples

    def start(self, promise: Promise, sampler: SamplerRow) -> asyncio.Task[None]:
        """Answer an accepted ``asample``, with the weights that the session has now."""
        task = asyncio.create_task(self._answer(promise, sampler, sampler.digest, sampler.folder))
        self._running[promise.id] = task
        task.add_done_callback(lambda _: self._running.pop(promise.id, None))
        return task

    def cancel(self, request_id: str) -> None:
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()

    async def _answer(self, promise: Promise, sampler: SamplerRow, digest: str | None, folder: str | None) -> None:
        try:
            body = requests.parse(requests.Sample, promise.body)
            served = self.bases.find(sampler.base)
            async with AsyncExitStack() as stack:
                name = None
                if digest is not None:
                    name = await stack.enter_async_context(served.shelf.hold(digest, lambda: _read(str(folder), digest), early=True))
                content = await self._draw(served, name, body, int(promise.facts["seed"]))
            self.promises.resolve(promise, content, wire.PROTOBUF)
        except asyncio.CancelledError:
            self.promises.fail(promise, RequestError("the request was cancelled"))
        except Exception as error:
            self.promises.fail(promise, error)
        self.promises.forget_body(promise)

    async def _draw(self, served: Served, name: str | None, body: requests.Sample, seed: int) -> bytes:
        prompt = np.array(body.prompt.tokens(), np.int64)
        params = self._params(body.sampling_params, served.engine.context_length - len(prompt), seed)
        if body.prompt_alt_tokens_k or body.record_stability_info:
            wanted = "prompt_alt_tokens_k" if body.prompt_alt_tokens_k else "record_stability_info"
            raise RequestError(f"{wanted} is not there on this server")
        if body.prompt_logprobs_last_n is not None and not body.prompt_logprobs:
            raise RequestError("prompt_logprobs_last_n needs prompt_logprobs")
        targets = None if body.target_prompt_logprobs is None else _targets(body.target_prompt_logprobs, len(prompt))
        engine = served.engine
        samples = await served.shelf.worker.ask(
            engine,
            lambda: engine.sample(
                prompt,
                name,
                params,
                body.num_samples,
                prompt_logprobs=bool(body.prompt_logprobs),
                top_logprobs=body.topk_sample_logprobs,
                prompt_top_logprobs=body.topk_prompt_logprobs,
                prompt_targets=None if targets is None else targets.tokens,
            ),
            crowd=True,
        )
        check_drawn(samples, name, engine.base_digest)  # a shelf's names are digests
        return wire.sample_bytes(samples, targets, body.prompt_logprobs_last_n)

    def _params(self, wanted: requests.Sampling, room: int, seed: int) -> SamplingParams:
        """Absent stops mean the end of a turn; given ones replace it, and an empty list is none at all."""
        stop = wanted.stop
        texts: tuple[str, ...] = (stop,) if isinstance(stop, str) else tuple(s for s in stop or () if isinstance(s, str))
        if any(not text for text in texts):
            raise RequestError("stop: an empty text would stop everything; leave it out")
        tokens = None if stop is None else () if isinstance(stop, str) else tuple(s for s in stop if isinstance(s, int))
        limit = max(room, 1) if wanted.max_tokens is None else wanted.max_tokens
        return SamplingParams(limit, wanted.temperature, max(wanted.top_k, 0), wanted.top_p, texts, tokens, seed)


def _read(folder: str, digest: str) -> Checkpoint:
    """
    Raises:
        AttestationError: the folder holds another adapter than the session was made on.
    """
    checkpoint = read_adapter(Path(folder))[0]
    if checkpoint.adapter.digest != digest:
        raise AttestationError(f"the session samples from {digest[:12]}, and {folder} holds {checkpoint.adapter.digest[:12]}")
    return checkpoint


def _targets(fields: requests.TensorFields, prompt: int) -> wire.PromptTargets:
    shape = fields.shape or []
    data = np.array(fields.data, np.int64)
    if len(shape) != 2 or shape[0] != prompt - 1 or shape[1] < 1 or min(shape) < 0:
        raise DataError(f"target_prompt_logprobs must have shape [{prompt - 1}, K], a row for each prompt token but the first")
    if shape[0] * shape[1] > MOST_TARGETS:
        raise DataError(f"target_prompt_logprobs: {shape[0]} x {shape[1]} targets are too many, at most {MOST_TARGETS} can be looked up")
    if fields.sparse_crow_indices is None:
        if data.size != shape[0] * shape[1]:
            raise DataError(f"target_prompt_logprobs: {data.size} numbers do not fill shape {shape}")
        return wire.PromptTargets(data.reshape(shape))
    crow, col = np.array(fields.sparse_crow_indices, np.int64), np.array(fields.sparse_col_indices or [], np.int64)
    dense = wire.from_csr(data + 1, crow, col, shape) - 1  # what CSR leaves out asks for nothing
    return wire.PromptTargets(dense, (crow, col))


def new_seed(wanted: int | None) -> int:
    return random.getrandbits(62) if wanted is None else wanted
