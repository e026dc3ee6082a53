"""Forward and backward over the datums of many adapters at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from veneer.engine.base import Base
from veneer.engine.lora import Segment
from veneer.engine.losses import LossInputs, drift, resolve_loss
from veneer.engine.sampler import Weights
from veneer.types import Datum, Floats, ForwardBackwardOutput

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}
"""Padded tokens of one forward pass; more are cut into micro-batches, which changes sums by rounding only. On a CPU the
activations of a pass should stay in the cache: 1024 was more than twice as fast as 8192 on the bundled base."""


LOGITS_PER_PASS = 2**28
"""Float32 logits of one forward pass: 1 GiB."""


def tokens_per_pass(base: Base) -> int:
    return min(TOKENS_PER_PASS[base.device.type], max(256, LOGITS_PER_PASS // base.vocab_size))


@dataclass
class PassRequest:
    """One ``forward`` or ``forward_backward``."""

    slot: int | None
    data: Sequence[Datum]
    loss_fn: str
    loss_config: dict[str, float] | None
    backward: bool


@dataclass
class _Row:
    request: int
    index: int
    datum: Datum
    slot: int | None


def run_passes(base: Base, weights: Weights, requests: Sequence[PassRequest]) -> list[ForwardBackwardOutput]:
    """Answer every request; gradients are added to the slots' rows."""
    outputs: list[list[Floats]] = [[np.full(len(d.tokens), np.nan, np.float32) for d in r.data] for r in requests]
    sums: list[dict[str, float]] = [{} for _ in requests]
    rows = [_Row(i, j, d, r.slot) for i, r in enumerate(requests) for j, d in enumerate(r.data)]
    for backward in (False, True):
        chosen = [row for row in rows if requests[row.request].backward == backward and row.datum.mask.any()]
        for batch in _micro_batches(chosen, weights.mixes_slots, tokens_per_pass(base)):
            with torch.set_grad_enabled(backward):
                _run(base, weights, requests, batch, outputs, sums, backward)
    return [ForwardBackwardOutput(out, _means(total, request)) for out, total, request in zip(outputs, sums, requests, strict=True)]


def _micro_batches(rows: list[_Row], mixes_slots: bool, budget: int) -> list[list[_Row]]:
    """Rows of about one length together, at most ``budget`` tokens with padding, sorted by slot inside a batch."""

    def by_slot(row: _Row) -> int:
        return -1 if row.slot is None else row.slot

    batches: list[list[_Row]] = []
    for row in sorted(rows, key=lambda r: (0 if mixes_slots else by_slot(r), -len(r.datum.tokens))):
        width = len(batches[-1][0].datum.tokens) if batches else 0
        full = not batches or (len(batches[-1]) + 1) * width > budget
        if full or (not mixes_slots and batches[-1][0].slot != row.slot):
            batches.append([])
        batches[-1].append(row)
    return [sorted(batch, key=lambda r: (by_slot(r), r.request, r.index)) for batch in batches]


def _run(
    base: Base,
    weights: Weights,
    requests: Sequence[PassRequest],
    batch: list[_Row],
    outputs: list[list[Floats]],
    sums: list[dict[str, float]],
    backward: bool,
) -> None:
    width = max(len(row.datum.tokens) for row in batch)

    def stacked(field: str, dtype: torch.dtype) -> Tensor:
        """[rows, width], padded on the right, where causal attention never looks."""
        padded = torch.zeros(len(batch), width, dtype=dtype)
        for i, row in enumerate(batch):
            array = getattr(row.datum, field)
            padded[i, : len(array)] = torch.from_numpy(array)
        return padded.to(base.device)

    mask = stacked("mask", torch.float32)
    selected = mask != 0
    segments: list[Segment] = []
    for row in batch:
        if segments and segments[-1].slot == row.slot:
            segments[-1] = Segment(row.slot, segments[-1].rows + 1)
        else:
            segments.append(Segment(row.slot, 1))
    logits = weights.call(segments, train=True, selected=selected, input_ids=stacked("tokens", torch.long))
    targets = stacked("targets", torch.long)[selected]
    lp = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    row_of_token = torch.arange(len(batch), device=base.device)[:, None].expand(-1, width)[selected]
    flat = {name: stacked(name, torch.float32)[selected] for name in ("logprobs", "advantages", "mask")}
    loss = torch.zeros((), device=base.device)
    for number in sorted({row.request for row in batch}):
        of_request = torch.tensor([row.request == number for row in batch], device=base.device)[row_of_token]
        inputs = LossInputs(*(t[of_request] for t in (lp, flat["logprobs"], flat["advantages"], flat["mask"], row_of_token)))
        loss = loss + _loss(requests[number], inputs, sums[number])
    if backward:
        loss.backward()
    values = lp.detach().cpu().numpy()
    at = np.cumsum([0, *selected.sum(1).tolist()])
    for i, row in enumerate(batch):
        outputs[row.request][row.index][row.datum.mask != 0] = values[at[i] : at[i + 1]]


def _loss(request: PassRequest, inputs: LossInputs, total: dict[str, float]) -> Tensor:
    function, config = resolve_loss(request.loss_fn, request.loss_config)
    value, clipped = function(inputs, config)
    new = {"loss": float(value.detach()), "tokens": float(len(inputs.lp)), "clipped": float(clipped.sum())}
    if request.loss_fn != "cross_entropy":
        new |= {name: float(t) for name, t in drift(inputs).items()}
    for name, number in new.items():
        total[name] = total.get(name, 0.0) + number
    return value


def _means(total: dict[str, float], request: PassRequest) -> dict[str, float]:
    """Tinker's metric names, ``name:reduction``."""
    tokens = max(total.get("tokens", 0.0), 1.0)
    metrics = {"loss:sum": total.get("loss", 0.0), "tokens:sum": total.get("tokens", 0.0)}
    names = {"clipped": "clip_fraction", "ratio": "ratio"} | {k: k for k in total if k.startswith("kl_")}
    return metrics | {f"{new}:mean": total[old] / tokens for old, new in names.items() if old in total}
