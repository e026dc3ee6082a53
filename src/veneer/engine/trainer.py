"""Forward and backward over the datums of many adapters.

Each unit of a pass has its attention, its loss and its gradient to itself, and gradients are added up in the order of the
units. So a request's numbers do not depend on what else is trained, or on how many passes run side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.engine.base import Base, Head
from veneer.engine.crew import Weights
from veneer.engine.lanes import Lanes, Stuck
from veneer.engine.logprobs import target_logprobs, target_logprobs_and_entropies
from veneer.engine.losses import add_terms, drift, resolve_loss
from veneer.engine.memory import free_memory, out_of_memory
from veneer.engine.packing import PassRequest, Unit, cut, join, pack
from veneer.engine.targets import UnitTargets, line_targets
from veneer.types import Floats, ForwardBackwardOutput

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}
"""At most. On a CPU a pass should stay near the caches: 1,024 tokens were more than twice as fast as 8,192 on the bundled base."""
LEAST = 256
SHARE = 0.5
"""Of the free memory, for the activations of the passes that run side by side."""


@dataclass
class Answer:
    """What units gave so far."""

    logprobs_D: list[Floats]
    sums: dict[str, float] = field(default_factory=dict[str, float])
    error: Exception | None = None


def tokens_that_fit(base: Base, gradient_checkpointing: bool) -> int:
    """Whose activations fit into ``SHARE`` of the free memory.

    A token keeps, per layer, about four vectors of the model's width, four of its heads' and five of its MLP's; while it is
    computed as much again. With checkpointing a layer keeps one vector, and one layer at a time the rest.
    """
    config = base.model.config.get_text_config()
    width: int = config.hidden_size
    heads: int = config.num_attention_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    layer = 4 * width + 4 * heads + 5 * (getattr(config, "intermediate_size", None) or 4 * width)
    floats = base.layers * width + 2 * layer if gradient_checkpointing else (base.layers + 1) * layer
    return max(LEAST, int(SHARE * free_memory(base.device)) // (floats * base.dtype.itemsize))


class Trainer:
    """Runs passes, several side by side on a CPU: one thread each is faster than all threads on one, and gives the same bits
    whatever their number."""

    def __init__(self, base: Base, weights: Weights, lanes: Lanes[Any]) -> None:
        self.base, self.weights = base, weights
        self._lanes: Lanes[list[_Result]] = lanes

    def run(self, requests: Sequence[PassRequest], add_gradient: Callable[[int, Tensor], None]) -> list[Answer]:
        """Answer every request; ``add_gradient(slot, row)`` is called unit by unit, in order. A request with an error may have
        had some of its gradient added."""
        lanes = self._lanes.threads if self._side_by_side else 1
        fits = tokens_that_fit(self.base, self.weights.gradient_checkpointing)
        budget = min(TOKENS_PER_PASS[self.base.device.type], fits)
        lanes = max(1, min(lanes, fits // budget))
        answers = {id(r): Answer([np.full(d.targets.shape, np.nan, np.float32) for d in r.data]) for r in requests}
        units = [unit for request in requests for unit in cut(request, budget)]
        for backward in (False, True):
            kind = [unit for unit in units if unit.backward == backward]
            share = -(-sum(unit.tokens for unit in kind) // lanes)
            passes = join(kind, min(budget, share), self.weights.mixes_slots)
            for result in self._run_all(passes, lanes):
                self._take(result, answers[id(result.unit.request)], add_gradient)
        return [answers[id(request)] for request in requests]

    @property
    def _side_by_side(self) -> bool:
        return self.base.device.type == "cpu" and self.weights.passes_side_by_side

    def _take(self, result: _Result, answer: Answer, add_gradient: Callable[[int, Tensor], None]) -> None:
        if result.error is not None:
            answer.error = answer.error or result.error
            return
        if result.gradient is not None and result.unit.request.slot is not None:
            add_gradient(result.unit.request.slot, result.gradient)
        for name, number in result.sums.items():
            answer.sums[name] = answer.sums.get(name, 0.0) + number
        for member, found in zip(result.unit.members, result.logprobs_M, strict=True):
            answer.logprobs_D[member.index][member.asked] = found

    def _run_all(self, passes: Sequence[list[Unit]], lanes: int) -> Iterator[_Result]:
        """Results in order. The units of a pass that got stuck are tried one by one."""
        jobs = [partial(self._guarded, group) for group in passes]
        threads = 1 if self._side_by_side else self._lanes.threads
        for group, results in zip(passes, self._lanes.run(jobs, lanes, threads), strict=True):
            if not isinstance(results, Stuck):
                yield from results
            elif len(group) > 1:
                yield from self._run_all([[unit] for unit in group], lanes)
            else:
                yield _Result(group[0], error=results)

    def _guarded(self, units: list[Unit]) -> list[_Result]:
        """Run a pass; where it fails, its units one by one, and a unit that is too large for the memory in halves."""
        try:
            return self._pass(units)
        except Exception as error:
            if len(units) > 1:
                return [result for unit in units for result in self._guarded([unit])]
            halves = units[0].halves() if out_of_memory(error) else []
            if not halves:
                return [_Result(units[0], error=error)]
        warnings.warn(f"out of memory on {units[0].tokens} tokens at once; going on with half", RuntimeWarning, stacklevel=2)
        return [result for half in halves for result in self._guarded([half])]

    def _pass(self, units: list[Unit]) -> list[_Result]:
        flat = pack(units, self.base.device, self.base.window)
        results: list[_Result] = []

        def finish(hidden: Tensor, head: Head) -> Tensor:
            read, entropy = line_targets(units, hidden.device), None
            if units[0].request.needs_entropy:
                lp, entropy = target_logprobs_and_entropies(hidden, read, head)
            else:
                lp = target_logprobs(hidden, read, head)
            losses, counts = [], [segment.wanted for segment in flat.segments]
            entropies = [None] * len(units) if entropy is None else entropy.split(counts)
            for unit, part, own in zip(units, lp.split(counts), entropies, strict=True):
                targets = UnitTargets(unit)
                loss, sums = _loss(unit.request, targets, part, own)
                losses.append(loss)
                results.append(_Result(unit, targets.handed_back(part.detach().cpu().numpy()), sums))
            return torch.stack(losses).sum()

        if not units[0].backward:
            self.weights.infer(flat, finish, published=False)
            return results
        for result, gradient in zip(results, self.weights.train(flat, finish), strict=True):
            result.gradient = gradient
        return results


@dataclass
class _Result:
    unit: Unit
    logprobs_M: list[Floats] = field(default_factory=list[Floats])
    """Per member of the unit, of the targets that it asks for."""
    sums: dict[str, float] = field(default_factory=dict[str, float])
    gradient: Tensor | None = None
    error: Exception | None = None


def _loss(request: PassRequest, targets: UnitTargets, lp: Tensor, entropy: Tensor | None) -> tuple[Tensor, dict[str, float]]:
    """The summed loss of a unit and what is told about it; the loss of no tokens is 0."""
    if not any(member.trains for member in targets.members):
        return lp.new_zeros(()), {}
    function, config = resolve_loss(request.loss_fn, request.loss_config)
    inputs = targets.loss_inputs(lp, request.terms, entropy)
    value, clipped = function(inputs, targets.settings(config, lp.device))
    added, told = add_terms(inputs, request.terms)
    value = value if added is None else value + added
    sums = {"loss": float(value.detach()), "tokens": float(len(inputs.lp)), "clipped": float(clipped.sum())}
    if request.loss_fn != "cross_entropy":
        sums |= {name: float(t) for name, t in (drift(inputs) | told).items()}
    return value, sums


def to_output(answer: Answer) -> ForwardBackwardOutput:
    """Tinker's metric names, ``name:reduction``."""
    total = answer.sums
    tokens = max(total.get("tokens", 0.0), 1.0)
    metrics = {"loss:sum": total.get("loss", 0.0), "tokens:sum": total.get("tokens", 0.0)}
    names = {"clipped": "clip_fraction", "ratio": "ratio", "entropy": "entropy"} | {k: k for k in total if k.startswith("kl_")}
    metrics |= {f"{new}:mean": total[old] / tokens for old, new in names.items() if old in total}
    return ForwardBackwardOutput(answer.logprobs_D, metrics)
