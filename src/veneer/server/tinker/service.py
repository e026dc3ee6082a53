"""The Tinker side of the server: sessions, runs and samplers, and how they come back after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from veneer.server.bases import Bases, Served
from veneer.server.errors import Busy, Gone, NotFound
from veneer.server.journal import Journal
from veneer.server.tinker import requests, wire
from veneer.server.tinker.checkpoints import Checkpoints
from veneer.server.tinker.promises import Promise, Promises
from veneer.server.tinker.runs import Run
from veneer.server.tinker.sampling import Sampling, new_seed
from veneer.server.tinker.state import SCHEMA, RunRow, SamplerRow, Session, put, row_of
from veneer.types import AdapterError, LoraConfig, RequestError

LOG = logging.getLogger("veneer.server")
ALPHA = 32.0
"""The protocol sends none; the scale is alpha / rank."""
TIDY_EVERY = 60.0
ABANDONED = 7 * 24 * 3600.0
"""Seconds without a sign of life after which a session's runs and snapshots are removed; named checkpoints stay."""
PARKED = 1800.0
"""Seconds without an operation after which a run leaves the engine."""
ROOM = 2**31
MOST_OPEN = 20_000
"""Promises that one owner may have open at once; more are told to come back later. What waits for a number that never comes is open."""


class Tinker:
    """Everything of one home, on the bases that this process holds."""

    def __init__(self, bases: Bases, home: Path, room: int = ROOM) -> None:
        """``home``: a folder of its own; what an earlier process left there goes on after ``resume``. ``room``: bytes for runs in memory;
        when more are needed, those that do nothing leave until their next operation."""
        self.room = room
        self.bases, self.home = bases, home
        self.journal = Journal(home / "state.sqlite", SCHEMA)
        self.promises = Promises(self.journal)
        self.checkpoints = Checkpoints(self.journal, home / "checkpoints")
        self.sampling = Sampling(self.journal, self.promises, bases, self.checkpoints, home / "snapshots")
        self.sessions: dict[str, Session] = {r["id"]: row_of(Session, r) for r in self.journal.read("SELECT * FROM sessions")}
        self._rows: dict[str, RunRow] = {r["id"]: row_of(RunRow, r) for r in self.journal.read("SELECT * FROM runs")}
        self._runs: dict[str, Run] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None

    # ------------------------------------------------ coming and going

    def resume(self) -> None:
        """Go on with what was acknowledged before the last process ended."""
        for target in self.promises.open_targets():
            try:
                if target in self._rows:
                    self.run(target)
                    continue
                sampler = self.sampling.samplers.get(target)
                if sampler is None:
                    raise NotFound(f"there is no {target!r} any more")
                for promise in self.promises.to_do(target):
                    self.sampling.start(promise, sampler)
            except RequestError as error:
                for promise in self.promises.to_do(target):
                    self.promises.fail(promise, error)
        self._tidying = asyncio.create_task(self._tidy())

    async def close(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
        for run in self._runs.values():
            run.stop()
        await asyncio.gather(*(run.stopped() for run in self._runs.values()))
        await asyncio.to_thread(self.journal.close)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_EVERY)
            try:
                self.promises.tidy()
                await self.checkpoints.expire()
                await self._remove_abandoned()
                for row in [run.row for run in self._runs.values() if run.idle_for > PARKED]:
                    await self._park(row)
            except Exception:
                LOG.exception("tidying failed; it is tried again")

    async def _remove_abandoned(self) -> None:
        before = time.time() - ABANDONED
        for session in [s for s in self.sessions.values() if s.seen < before]:
            gone = [s for s in self.sampling.samplers.values() if s.session_id == session.id]
            for sampler in gone:
                del self.sampling.samplers[sampler.id]
            kept = {s.folder for s in self.sampling.samplers.values()}
            for folder in {s.folder for s in gone if s.kind in ("snapshot", "inflight")} - kept:
                shutil.rmtree(str(folder), ignore_errors=True)
            for row in [r for r in self._rows.values() if r.session_id == session.id]:
                await self._unload(row)
                shutil.rmtree(self._states(row.id), ignore_errors=True)
                row.state_folder = None
            await self.journal.write(("DELETE FROM samplers WHERE session_id = ?", [session.id]))
            del self.sessions[session.id]
            await self.journal.write(("DELETE FROM sessions WHERE id = ?", [session.id]))

    async def _unload(self, row: RunRow) -> None:
        """Take a run out of memory. It comes back with its next operation."""
        run = self._runs.pop(row.id, None)
        if run is None:
            return
        run.stop()
        removed = None
        if run.failed is None:  # asked for before anything is awaited, so before the run can come back
            removed = run.served.shelf.worker.run(lambda: run.served.engine.remove_adapter(row.id))
        await run.stopped()
        if removed is not None:
            await removed

    async def _park(self, row: RunRow) -> None:
        """The same, unless it has begun to do something."""
        if row.id in self._runs and self._runs[row.id].idle_for:
            await self._unload(row)

    # ------------------------------------------------ sessions

    async def create_session(self, owner: str, body: requests.CreateSession) -> Session:
        now = time.time()
        session = Session(str(uuid.uuid4()), owner, body.model_dump(), now, now)
        await self.journal.write(put(session))
        self.sessions[session.id] = session
        return session

    def session(self, owner: str, session_id: str) -> Session:
        """
        Raises:
            NotFound: the caller has no such session.
        """
        session = self.sessions.get(session_id)
        if session is None or session.owner != owner:
            raise NotFound(f"there is no session {session_id!r}")
        session.seen = time.time()
        return session

    def open_session(self, owner: str, session_id: str) -> Session:
        session = self.session(owner, session_id)
        if session.finished is not None:
            raise RequestError(f"session {session_id!r} is finished; make a new ServiceClient")
        return session

    def heartbeat(self, owner: str, session_id: str) -> None:
        """
        Raises:
            Gone: the session is finished, so that the client stops.
        """
        if self.session(owner, session_id).finished is not None:
            raise Gone(f"session {session_id!r} is finished")

    async def finish(self, owner: str, session_id: str) -> None:
        """The first one counts."""
        session = self.session(owner, session_id)
        if session.finished is None:
            session.finished = time.time()
            await self.journal.write(put(session))

    # ------------------------------------------------ runs

    def rows(self, owner: str) -> list[RunRow]:
        """Newest first."""
        return sorted((row for row in self._rows.values() if row.owner == owner), key=lambda row: -row.created)

    def row(self, owner: str, run_id: str) -> RunRow:
        """
        Raises:
            NotFound: the caller has no such run.
        """
        row = self._rows.get(run_id)
        if row is None or row.owner != owner:
            raise NotFound(f"there is no training run {run_id!r}")
        return row

    def last_request(self, row: RunRow) -> float:
        run = self._runs.get(row.id)
        return row.created if run is None else run.last_request

    def failure(self, row: RunRow) -> Exception | None:
        run = self._runs.get(row.id)
        return None if run is None else run.failed

    def loaded(self, base: Served) -> int:
        """How many runs are in memory on a base."""
        return sum(run.served is base for run in self._runs.values())

    def size_on(self, base: Served) -> int:
        """Bytes of those runs."""
        return sum(run.size for run in self._runs.values() if run.served is base)

    def run(self, run_id: str) -> Run:
        """A run at work, woken up from its state if need be."""
        if run_id not in self._runs:
            row = self._rows.get(run_id)
            if row is None:
                raise NotFound(f"there is no model {run_id!r}")
            self._make_room()
            served = self.bases.find(row.base)
            run = self._runs[run_id] = Run(row, served, self.promises, self.checkpoints, self.sampling, self._states(run_id))
            for promise in self.promises.to_do(run_id, -1 if row.state_seq is None else row.state_seq):
                run.offer(promise)
        return self._runs[run_id]

    @property
    def size(self) -> int:
        """Bytes of the runs in memory."""
        return sum(run.size for run in self._runs.values())

    def _make_room(self) -> None:
        """Let the runs that have done nothing for the longest time leave."""
        excess = self.size - self.room
        for run in sorted(self._runs.values(), key=lambda run: -run.idle_for):
            if excess <= 0 or not run.idle_for:
                break
            excess -= run.size
            leaving = asyncio.create_task(self._park(run.row))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    def _states(self, run_id: str) -> Path:
        return self.home / "runs" / run_id.replace(":", "_")  # made of a session's uuid and a number

    async def create_model(self, owner: str, raw: bytes) -> Promise:
        """
        Raises:
            BaseError: the server does not hold that base.
            RequestError: the optimizer or the adapter cannot be had.
        """
        body = requests.parse(requests.CreateModel, raw)
        self.open_session(owner, body.session_id)
        self.bases.find(body.base_model)
        _check_optimizer(body.optimizer_config)
        if body.lora_config is None:
            raise RequestError("create_model needs lora_config: this server trains low-rank adapters")
        fields = body.lora_config
        seed = secrets.randbits(62) if fields.seed is None else fields.seed
        lora = LoraConfig(fields.rank, ALPHA, fields.train_attn, fields.train_mlp, fields.train_unembed, seed=seed)
        return await self._new_run(
            owner, body.session_id, body.model_seq_id, body.base_model, lora, body.user_metadata, "create_model", raw
        )

    async def load_weights(self, owner: str, raw: bytes) -> Promise:
        """Make a model from a checkpoint, or replace one's weights by it."""
        body = requests.parse(requests.LoadWeights, raw)
        if body.model_id is not None and body.seq_id is not None:
            return await self.operation(owner, body.model_id, body.seq_id, "load_weights", raw)
        if body.session_id is None or body.model_seq_id is None:
            raise RequestError("load_weights needs model_id and seq_id, or session_id and model_seq_id")
        self.open_session(owner, body.session_id)
        _check_optimizer(body.optimizer_config)
        row = self.checkpoints.find(body.path, owner, ("weights",))
        base = row.base if body.base_model is None else body.base_model
        if self.bases.find(base) is not self.bases.find(row.base):
            raise AdapterError(f"{body.path!r} was made on base {row.base!r}, not on {base!r}")
        metadata = body.user_metadata if body.user_metadata is not None else row.user_metadata
        return await self._new_run(owner, body.session_id, body.model_seq_id, base, row.lora, metadata, "load_new", raw)

    async def _new_run(
        self, owner: str, session: str, seq: int, base: str, lora: LoraConfig, metadata: dict[str, Any] | None, kind: str, raw: bytes
    ) -> Promise:
        self._check_load(owner)
        run_id = f"{session}:train:{seq}"
        if sum(run.size for run in self._runs.values() if run.at_work) > self.room:
            raise Busy("the runs that are at work fill the memory for adapters; come back when some of them are done")
        row = self._rows.get(run_id) or RunRow(run_id, session, owner, base, lora, metadata, time.time())
        promise, fresh = await self.promises.accept(owner, run_id, 0, kind, raw, {"run": run_id}, put(row))
        if fresh:
            self._rows[run_id] = row
            self.run(run_id).offer(promise)
        return promise

    async def copy_weights(self, owner: str, raw: bytes, key: str) -> str:
        """A checkpoint of one's own from one that one may read, in a run that nobody trains. The same ``key`` makes one copy.

        Raises:
            NotFound: there is no such checkpoint.
            RequestError: it would take the place of a run.
        """
        body = requests.parse(requests.CopyWeights, raw)
        source = self.checkpoints.find(body.source_path, owner)
        if body.session_id is not None:
            self.open_session(owner, body.session_id)
            run_id = f"{body.session_id}:train:{body.model_seq_id or 0}"
        else:
            run_id = f"{uuid.uuid5(uuid.NAMESPACE_URL, f'{owner} {key}')}:train:0"
        path = f"tinker://{run_id}/{source.id}"
        if run_id in self._rows:
            if any(row.path == path for row in self.checkpoints.of_owner(owner, run_id)):
                return path
            raise RequestError(f"there is a training run {run_id!r} already; give another model_seq_id")
        row = RunRow(run_id, "", owner, source.base, source.lora, source.user_metadata, time.time())
        path = await self.checkpoints.copy(source, row, body.ttl_seconds)
        self._rows[run_id] = row
        return path

    async def create_custom_loss(self, owner: str, raw: bytes) -> Promise:
        """Answered with a refusal: a loss of the client's own runs on the client's side, by ``forward_backward_custom``."""
        body = requests.parse(requests.CreateCustomLoss, raw)
        self.open_session(owner, body.session_id)
        promise, _ = await self.promises.accept(owner, f"{body.session_id}:loss", body.custom_loss_seq_id, "create_custom_loss", raw, {})
        self.promises.fail(promise, RequestError("losses are not kept on this server; forward_backward_custom computes them on the client"))
        return promise

    async def operation(self, owner: str, run_id: str, seq: int, kind: str, raw: bytes) -> Promise:
        """Accept an operation of a model. What is wrong with it beyond its address is told through the promise."""
        row = self.row(owner, run_id)
        self.open_session(owner, row.session_id)
        self._check_load(owner)
        if seq < 1 or seq >= 2**31:
            raise RequestError(f"seq_id {seq}: a model's operations are counted from 1")
        promise, fresh = await self.promises.accept(owner, run_id, seq, kind, raw, {"run": run_id})
        if fresh:
            self.run(run_id).offer(promise)
        return promise

    async def forward_backward(self, owner: str, raw: bytes) -> Promise:
        request = wire.parse_pass(raw)
        return await self.operation(owner, request.model_id, request.seq_id, "forward_backward", raw)

    # ------------------------------------------------ samples

    async def sample(self, owner: str, raw: bytes) -> Promise:
        body = requests.parse(requests.Sample, raw)
        self._check_load(owner)
        sampler = await self._sampler_for(owner, body)
        seed, seq = new_seed(body.sampling_params.seed), secrets.randbits(62) if body.seq_id is None else body.seq_id
        facts = {"seed": seed, "sequences": [f"{sampler.id}:{seq}:{i}" for i in range(body.num_samples)]}
        promise, _ = await self.promises.accept(
            owner, sampler.id, seq, "asample", raw, facts, begin=lambda promise: self.sampling.start(promise, sampler)
        )
        return promise

    async def _sampler_for(self, owner: str, body: requests.Sample) -> SamplerRow:
        if body.sampling_session_id is not None:
            return self.sampler(owner, body.sampling_session_id)
        if body.base_model is None and body.model_path is None:
            raise RequestError("asample needs sampling_session_id, base_model or model_path")
        direct = requests.CreateSamplingSession(session_id=f"direct-{owner}", base_model=body.base_model, model_path=body.model_path)
        direct.session_id += f"-{secrets.token_hex(8)}"
        return self.sampling.samplers[await self.sampling.create(owner, direct)]

    def sampler(self, owner: str, sampler_id: str) -> SamplerRow:
        sampler = self.sampling.samplers.get(sampler_id)
        if sampler is None or sampler.owner != owner:
            raise NotFound(f"there is no sampling session {sampler_id!r}")
        session = self.sessions.get(sampler.session_id)
        if session is not None:
            session.seen = time.time()
            if session.finished is not None:
                raise RequestError(f"session {session.id!r} is finished; make a new ServiceClient")
        return sampler

    def _check_load(self, owner: str) -> None:
        if self.promises.open(owner) >= MOST_OPEN:
            raise Busy(f"{self.promises.open(owner)} operations of yours are open already; wait for some of them")

    # ------------------------------------------------ answers

    async def wait_for(self, owner: str, request_id: str, seconds: float) -> Promise:
        """The promise, when it is answered or the time is over.

        Raises:
            NotFound: the caller was never given such an id.
            Gone: the answer is not kept any more.
        """
        promise = self.promises.find(request_id)
        if promise is None and self.promises.was_given_out(request_id):
            raise Gone(f"request {request_id!r} is answered and gone")
        if promise is None or promise.owner != owner:
            raise NotFound(f"there is no request {request_id!r}")
        if not promise.done:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(promise.over.wait(), seconds)
        return promise

    def cancel(self, owner: str, request_id: str) -> None:
        promise = self.promises.find(request_id)
        if promise is not None and promise.owner == owner and promise.kind == "asample":
            self.sampling.cancel(request_id)


def _check_optimizer(config: requests.OptimizerConfig | None) -> None:
    if config is not None and config.type != "adamw":
        raise RequestError(f"optimizer {config.type!r} is not there, only adamw")
