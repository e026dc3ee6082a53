"""The engine: one frozen base, many adapters, a queue, and a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from veneer.digest import digest_adapter
from veneer.engine.arrivals import check_data, check_request
from veneer.engine.base import Base
from veneer.engine.full import FullStack
from veneer.engine.lanes import Lanes
from veneer.engine.lora import LoraStack
from veneer.engine.losses import resolve_loss
from veneer.engine.memory import out_of_memory
from veneer.engine.packing import PassRequest
from veneer.engine.queue import EngineFuture, Request, plan
from veneer.engine.request import Acting, Completion, SampleRequest
from veneer.engine.sampler import Sampler
from veneer.engine.scores import PromptScores, PromptWish
from veneer.engine.trainer import Trainer, to_output
from veneer.types import (
    AdamParams,
    Adapter,
    AdapterError,
    AttestationError,
    Checkpoint,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    LossName,
    Piece,
    RequestError,
    RunError,
    Sample,
    SamplingParams,
    Switch,
    Tokens,
)

T = TypeVar("T")

ENOUGH_TOKENS = 16
"""The first gradient of at least this many tokens must reach every target; a row of one token has none for queries and keys."""
NOTHING_MOVED = (
    "the optimizer step changed no weight, though neither gradient nor learning rate is 0: the optimizer does not hold this adapter, or "
    "learning rate and eps let every change vanish in rounding"
)


@dataclass
class _Slot:
    """What the engine knows about an adapter beside its tensors."""

    slot: int
    config: LoraConfig | None
    version: int = 0
    """Optimizer steps in the adapter's whole life; Adam's own count starts anew when only weights are loaded."""
    published: Adapter | None = None
    digests: dict[int, str] = field(default_factory=dict)
    """version -> digest of everything that was ever published under this name."""
    pending_tokens: float = 0.0
    """Tokens whose gradient waits for the next optimizer step."""
    dropped: bool = False
    """The last ``forward_backward`` failed, and what was gathered went with it."""
    reached: bool = False
    """A gradient has reached every target, or the adapter came with steps behind it."""


class LocalEngine:
    """The Engine protocol in this process. ``stack`` decides what an adapter is: low-rank updates or a full copy."""

    def __init__(
        self,
        base: Base,
        stack: LoraStack | FullStack,
        patience: float | None = None,
        threads: int | None = None,
        beside: LocalEngine | None = None,
    ) -> None:
        """``patience``: seconds after which a pass through the base counts as stuck and is given up; None: never. ``threads`` and
        ``beside``: as ``LoraEngine`` has them."""
        self.base, self._stack = base, stack
        self._slots: dict[str, _Slot] = {}
        self._queue: list[Request] = []
        self._lanes: Lanes[Any] = Lanes(patience, threads) if beside is None else beside._lanes
        self._sampler = Sampler(base, stack, self._lanes)
        self._sampling: dict[SampleRequest, Request] = {}
        self._trainer = Trainer(base, stack, self._lanes)

    @property
    def base_id(self) -> str:
        return self.base.base_id

    @property
    def base_digest(self) -> str:
        return self.base.digest

    @property
    def context_length(self) -> int:
        return self.base.context_length

    @property
    def dtype(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    def measure_base_digest(self) -> str:
        return self.base.measure_digest()

    # ------------------------------------------------ adapters

    def create_adapter(self, name: str, config: LoraConfig | None) -> int:
        if name in self._slots:
            raise AdapterError(f"there is an adapter {name!r} already")
        slot = self._stack.create(config)
        self._slots[name] = _Slot(slot, config)
        self._publish(name)
        count = self._stack.trainable_parameters(slot)
        if count == 0:
            raise AdapterError(f"adapter {name!r} has no trainable parameters")
        return count

    def remove_adapter(self, name: str) -> None:
        self._forget(name)
        gone, self._queue = [r for r in self._queue if name in r.adapters], [r for r in self._queue if name not in r.adapters]
        for sample, request in list(self._sampling.items()):
            if name in request.adapters:
                gone.append(request)
                self._stop_sampling(sample)
        _fail(gone, AdapterError(f"adapter {name!r} was removed before this request was answered"))

    def _forget(self, name: str) -> None:
        self._stack.remove(self._slot(name).slot)
        self._drop_prefixes(self._slots.pop(name).published)

    def _drop_prefixes(self, adapter: Adapter | None) -> None:
        """Nobody samples from these weights any more, or not under this name."""
        if adapter is not None and all(slot.published is None or slot.published.digest != adapter.digest for slot in self._slots.values()):
            self._sampler.prefixes.drop(adapter.digest)

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise AdapterError(f"there is no adapter {name!r}; loaded are: {', '.join(self._slots) or 'none'}")
        return self._slots[name]

    def _describe(self, name: str, weights: Mapping[str, np.ndarray]) -> Adapter:
        slot = self._slot(name)
        return Adapter(name, slot.version, digest_adapter(weights, slot.config), self.base_id, self.base_digest)

    # ------------------------------------------------ passes

    def sample(
        self,
        prompt: Tokens,
        adapter: str | None,
        params: SamplingParams,
        n: int = 1,
        *,
        prompt_logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_top_logprobs: int = 0,
        prompt_targets: Tokens | None = None,
        switches: Sequence[Switch] = (),
        on_piece: Callable[[Piece], None] | None = None,
    ) -> EngineFuture[list[Sample]]:
        if switches and not self._stack.mixes_slots:
            raise RequestError("full copies of the weights take turns, so a completion cannot switch between them; use low-rank adapters")
        switches = [replace(switch, after=tuple(switch.after)) for switch in switches]
        targets = None if prompt_targets is None else np.array(prompt_targets, np.int64)
        wish = PromptWish(prompt_logprobs, prompt_top_logprobs, targets)
        request = SampleRequest(np.array(prompt, np.int64), params, n, wish, top_logprobs, on_piece, switches)
        check_request(request, self.base)
        later = tuple(switch.adapter for switch in switches)
        for name in (adapter, *later):
            self._check_known(name)
        return self._enqueue(Request(adapter, EngineFuture(self.step, self._cancel), later, sample=request))

    def forward(
        self,
        adapter: str | None,
        data: Sequence[Datum],
        loss_fn: LossName,
        loss_config: Mapping[str, float] | None = None,
        *,
        everywhere: bool = False,
    ) -> EngineFuture[ForwardBackwardOutput]:
        request = PassRequest(None, data, loss_fn, dict(loss_config or {}), backward=False, everywhere=everywhere)
        return self._enqueue_pass(adapter, request)

    def forward_backward(
        self,
        adapter: str,
        data: Sequence[Datum],
        loss_fn: LossName,
        loss_config: Mapping[str, float] | None = None,
        *,
        everywhere: bool = False,
    ) -> EngineFuture[ForwardBackwardOutput]:
        self._check_provenance(adapter, data)
        request = PassRequest(None, data, loss_fn, dict(loss_config or {}), backward=True, everywhere=everywhere)
        return self._enqueue_pass(adapter, request)

    def _enqueue_pass(self, adapter: str | None, request: PassRequest) -> EngineFuture[ForwardBackwardOutput]:
        self._check_known(adapter)
        resolve_loss(request.loss_fn, request.loss_config)
        check_data(request.data, request.loss_fn, request.terms, self.base.vocab_size, self.context_length)
        return self._enqueue(Request(adapter, EngineFuture(self.step, self._cancel), train=request))

    def _check_known(self, adapter: str | None) -> None:
        """The adapter is here, or a load that will bring it is queued."""
        if adapter is not None and adapter not in self._slots and not any(request.adapter == adapter for request in self._queue):
            self._slot(adapter)

    def _check_provenance(self, name: str, data: Sequence[Datum]) -> None:
        """A batch may only be trained by the adapter that sampled it, in a version that this engine published."""
        for sampled in {datum.adapter for datum in data if datum.adapter is not None}:
            promised = self._slot(name).digests.get(sampled.version)
            if sampled.name == name and sampled.base_digest == self.base_digest and promised == sampled.digest:
                continue
            raise AttestationError(
                f"these samples come from adapter {sampled.name!r} version {sampled.version} ({sampled.digest[:12]}) on base "
                f"{sampled.base_digest[:12]}; {name!r} published {(promised or 'no such version')[:15]} on base {self.base_digest[:12]}"
            )

    # ------------------------------------------------ barriers

    def optim_step(self, adapter: str, params: AdamParams, *, need_gradient: bool = True) -> EngineFuture[dict[str, float]]:
        numbers = (params.learning_rate, params.eps, params.weight_decay, params.grad_clip_norm)
        if not all(0 <= number < math.inf for number in numbers) or not (0 <= params.beta1 < 1 and 0 <= params.beta2 < 1):
            raise RequestError(f"{params}: every number must be finite and not negative, and both betas below 1")
        return self._enqueue(Request(adapter, EngineFuture(self.step, self._cancel), optim=params, need_gradient=need_gradient))

    def _optim_steps(self, requests: list[Request]) -> None:
        """One update over the rows of several adapters, each of which appears once."""
        ready: list[tuple[Request, _Slot, AdamParams]] = []
        for request in requests:
            assert request.adapter is not None
            assert request.optim is not None
            try:
                slot = self._slot(request.adapter)
                self._check_gradient(slot, request.need_gradient)
                ready.append((request, slot, request.optim))
            except (AdapterError, RunError) as error:
                request.future.set_error(error)
        if not ready:
            return
        rows = self._stack.rows
        before = [rows.training(slot.slot).clone() for _, slot, _ in ready]
        norms = rows.adam([slot.slot for _, slot, _ in ready], [params for _, _, params in ready])
        for (request, slot, params), norm, old in zip(ready, norms, before, strict=True):
            slot.pending_tokens = 0
            if not isinstance(norm, Exception) and norm > 0 < params.learning_rate and torch.equal(old, rows.training(slot.slot)):
                norm = AttestationError(NOTHING_MOVED)
            if isinstance(norm, Exception):
                request.future.set_error(norm)
                continue
            slot.version += 1
            request.future.set_result({"grad_norm": norm, "version": float(slot.version)})

    def _check_gradient(self, slot: _Slot, need_gradient: bool) -> None:
        dropped, slot.dropped = slot.dropped, False
        if dropped and slot.pending_tokens == 0:
            raise RunError("optim_step without a gradient: the last forward_backward failed; train on its data again")
        if need_gradient and slot.pending_tokens == 0:
            raise RunError("optim_step without a gradient: no forward_backward since the last step")
        if not slot.reached and slot.pending_tokens >= ENOUGH_TOKENS:
            untrained = self._stack.without_gradient(slot.slot)
            if untrained:
                raise AttestationError(
                    f"the adapter would be half trained: {len(untrained)} targets got no gradient, {untrained[0]} among them"
                )
            slot.reached = bool(self._stack.rows.open(slot.slot).grad.any())

    def zero_grad(self, adapter: str) -> EngineFuture[float]:
        return self._enqueue_barrier(adapter, lambda: self._zero_grad(adapter))

    def _zero_grad(self, name: str) -> float:
        slot = self._slot(name)
        slot.pending_tokens = 0
        return self._stack.rows.drop_gradient(slot.slot)

    def publish(self, adapter: str) -> EngineFuture[Adapter]:
        return self._enqueue_barrier(adapter, lambda: self._publish(adapter), changes_samples=True)

    def _publish(self, name: str) -> Adapter:
        slot = self._slot(name)
        self._stack.rows.publish(slot.slot)
        before = slot.published
        sampled = self._stack.rows.published(slot.slot)  # what will be, not what was meant
        slot.published = self._describe(name, self._arrays(slot.slot, sampled, copied=False))
        self._drop_prefixes(before)
        slot.digests[slot.published.version] = slot.published.digest
        return slot.published

    def save_state(self, adapter: str, kind: Literal["training", "sampler"] = "training") -> EngineFuture[Checkpoint]:
        return self._enqueue_barrier(adapter, lambda: self._save_state(adapter, kind))

    def _save_state(self, name: str, kind: Literal["training", "sampler"]) -> Checkpoint:
        slot, rows = self._slot(name), self._stack.rows
        optimizer: dict[str, np.ndarray] = {}
        if kind == "training":
            state = rows.open(slot.slot)
            optimizer = {f"m.{key}": array for key, array in self._arrays(slot.slot, state.m).items()}
            optimizer |= {f"v.{key}": array for key, array in self._arrays(slot.slot, state.v).items()}
            optimizer["step"] = np.array(state.steps)
        weights = self._arrays(slot.slot, rows.training(slot.slot))
        return Checkpoint(kind, self._describe(name, weights), slot.config, weights, optimizer)

    def _arrays(self, slot: int, row: torch.Tensor, *, copied: bool = True) -> dict[str, np.ndarray]:
        """``copied``: to be kept; otherwise they may change with the row."""
        arrays = {key: t.detach().cpu().numpy() for key, t in self._stack.named(slot, row).items()}
        return {key: array.copy(order="C") for key, array in arrays.items()} if copied else arrays

    def load_state(self, adapter: str, checkpoint: Checkpoint) -> EngineFuture[None]:
        return self._enqueue_barrier(adapter, lambda: self._load_state(adapter, checkpoint), changes_samples=True)

    def _load_state(self, name: str, checkpoint: Checkpoint) -> None:
        if checkpoint.adapter.base_digest != self.base_digest:
            made_for = f"{checkpoint.adapter.base_id!r} ({checkpoint.adapter.base_digest[:12]})"
            here = f"{self.base_id!r} ({self.base_digest[:12]})"
            raise AdapterError(f"adapter {checkpoint.adapter.name!r} was made for base {made_for}; this one is {here}")
        slot = self._stack.claim(checkpoint.config)
        try:
            self._fill(slot, checkpoint)
        except AdapterError:
            self._stack.remove(slot)
            raise
        if name in self._slots:
            self._forget(name)
        self._slots[name] = _Slot(slot, checkpoint.config, checkpoint.adapter.version, reached=_steps(checkpoint) > 0)
        self._publish(name)

    def _fill(self, slot: int, checkpoint: Checkpoint) -> None:
        rows = self._stack.rows
        if checkpoint.kind == "training":
            if "step" not in checkpoint.optimizer:
                raise AdapterError(f"checkpoint of {checkpoint.adapter.name!r}: the optimizer's step is missing")
            state = rows.open(slot)
            state.steps = _steps(checkpoint)
            parts = [(state.weights, "", checkpoint.weights), (state.m, "m.", checkpoint.optimizer), (state.v, "v.", checkpoint.optimizer)]
        else:
            parts = [(rows.published(slot), "", checkpoint.weights)]
        for row, prefix, arrays in parts:
            named = self._stack.named(slot, row)
            for key, tensor in named.items():
                array = arrays.get(prefix + key)
                if array is None or array.shape != tuple(tensor.shape):
                    found = "missing" if array is None else f"of shape {array.shape}"
                    raise AdapterError(
                        f"checkpoint of {checkpoint.adapter.name!r}: {prefix + key} is {found}, wanted {tuple(tensor.shape)}"
                    )
                tensor.copy_(torch.from_numpy(np.asarray(array, np.float32)))
            if prefix == "" and (extra := set(arrays) - set(named)):
                raise AdapterError(
                    f"checkpoint of {checkpoint.adapter.name!r} has weights that its config does not name: {sorted(extra)[0]}"
                )

    # ------------------------------------------------ the queue

    def _enqueue(self, request: Request) -> EngineFuture[Any]:
        self._queue.append(request)
        return request.future

    def _enqueue_barrier(self, adapter: str, run: Callable[[], Any], *, changes_samples: bool = False) -> EngineFuture[Any]:
        return self._enqueue(Request(adapter, EngineFuture(self.step, self._cancel), barrier=run, changes_samples=changes_samples))

    def step(self) -> int:
        """Run the barriers, optimizer steps and training passes that are due, and draw up to eight tokens for every running completion."""
        now, self._queue = plan(self._queue, {name for request in self._sampling.values() for name in request.adapters})
        self._run_barriers([r for r in now if r.sample is None and r.train is None])
        passes = [r for r in now if (r.sample is not None or r.train is not None) and self._bind(r)]
        for request in passes:
            if request.sample is not None:
                self._sampling[request.sample] = request
                self._sampler.add(request.sample)
        self._run_passes([r for r in passes if r.train is not None])
        return sum(request.sample is None for request in now) + self._run_sampler()

    def _run_barriers(self, requests: list[Request]) -> None:
        """In order for each adapter; optimizer steps of different adapters in one go."""
        steps: dict[str | None, Request] = {}
        for request in requests:
            if request.adapter in steps:
                self._optim_steps(list(steps.values()))
                steps.clear()
            if request.optim is not None:
                steps[request.adapter] = request
            elif request.barrier is not None:
                _answer(request.future, request.barrier)
        self._optim_steps(list(steps.values()))

    def _cancel(self, future: EngineFuture[Any]) -> None:
        self._queue = [request for request in self._queue if request.future is not future]
        for sample, request in list(self._sampling.items()):
            if request.future is future:
                self._stop_sampling(sample)

    def _stop_sampling(self, sample: SampleRequest) -> None:
        del self._sampling[sample]
        self._sampler.cancel(sample)

    def _bind(self, request: Request) -> bool:
        """Look the adapter up now: a load that was queued ahead may have replaced it. False: it cannot run, and the future says why."""
        try:
            slots = [None if name is None else self._slot(name) for name in request.adapters]
            if request.adapter is not None and request.train is not None and request.train.backward:
                self._check_provenance(request.adapter, request.train.data)
        except (AdapterError, AttestationError) as error:
            request.future.set_error(error)
            if request.adapter in self._slots and request.train is not None and request.train.backward:
                self._slots[request.adapter].dropped = True
            return False
        if request.train is not None:
            request.train.slot = None if slots[0] is None else slots[0].slot
            if request.train.backward and request.train.slot is not None:
                self._stack.rows.open(request.train.slot)
        if request.sample is not None:
            request.sample.acting = [Acting(None, None) if slot is None else Acting(slot.slot, slot.published) for slot in slots]
        return True

    def _run_sampler(self) -> int:
        """Returns the number of requests answered."""
        if self._sampler.idle:
            return 0
        done = self._sampler.step()
        self._tell()
        for sample in done:
            request = self._sampling.pop(sample, None)
            if request is None:  # given up while it was told
                continue
            request.future.set_result([self._to_sample(row) for row in sample.rows])
        failed, self._sampler.failed = self._sampler.failed, []
        for sample, error in failed:
            request = self._sampling.pop(sample, None)
            if request is not None:
                _fail([request], error)
        return len(done) + len(failed)

    def _tell(self) -> None:
        """Hand over what was drawn since the last time to those who listen."""
        for sample, request in list(self._sampling.items()):
            if sample.on_piece is None or sample.cancelled:
                continue
            try:
                for piece in sample.pieces():
                    if request.future.done():
                        break
                    sample.on_piece(piece)
            except Exception as error:
                if sample in self._sampling:
                    self._stop_sampling(sample)
                    request.future.set_error(error)

    def _to_sample(self, row: Completion) -> Sample:
        assert row.stop_reason is not None
        scores = row.request.scores or PromptScores()
        return Sample(
            np.array(row.tokens, np.int64),
            np.array(row.logprobs, np.float32),
            row.stop_reason,
            self.base_id,
            row.request.acting[0].adapter,
            scores.logprobs,
            row.top_logprobs(),
            scores.top,
            scores.targets,
            row.switches,
            row.known,
        )

    def _run_passes(self, requests: list[Request]) -> None:
        passes = [(r, r.train) for r in requests if r.train is not None]
        if not passes:
            return
        answers = self._trainer.run([train for _, train in passes], self._add_gradient)
        spoilt: set[str] = set()
        for (request, train), answer in zip(passes, answers, strict=True):
            name = request.adapter if train.backward else None
            if answer.error is not None:
                spoilt |= {name} if name is not None else set()
                _fail([request], answer.error)
                continue
            output = to_output(answer)
            if name is not None:
                slot = self._slot(name)
                slot.pending_tokens, slot.dropped = slot.pending_tokens + output.metrics["tokens:sum"], False
            request.future.set_result(output)
        for name in spoilt:  # half a gradient must not be stepped on: it is dropped, and optim_step will say so
            self._zero_grad(name)
            self._slot(name).dropped = True

    def _add_gradient(self, slot: int, gradient: torch.Tensor) -> None:
        total = self._stack.rows.trained[slot].grad
        if total.is_cuda:
            total.add_(gradient)
        else:
            np.add(total.numpy(), gradient.numpy(), out=total.numpy())  # torch would use all threads, which other passes are using


def _steps(checkpoint: Checkpoint) -> int:
    return int(checkpoint.optimizer.get("step", 0))


def _answer(future: EngineFuture[T], run: Callable[[], T]) -> None:
    try:
        future.set_result(run())
    except Exception as error:
        future.set_error(error)


def _fail(requests: list[Request], error: Exception) -> None:
    if out_of_memory(error):
        error = RunError("out of memory; lower rl.groups_per_batch, rl.group_size or rl.max_tokens")
    for request in requests:
        if not request.future.done():
            request.future.set_error(error)
