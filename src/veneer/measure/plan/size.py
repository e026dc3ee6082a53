"""The size of an adapter: its parameters and bytes, what fits into it, and the rank and alpha that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from veneer.measure.plan.figure import TML, Figure
from veneer.shapes import LinearMap, adapter_parameters, per_rank

TaskKind = Literal["rl", "sft"]
LEAST_RANK, MOST_RL_RANK, LEAST_SFT_RANK, MOST_SFT_RANK = 8, 32, 64, 256
"""Between which ranks are chosen: above the upper ones a learning rate has to be swept anew."""
ALPHA = 32.0
BITS_A_PARAMETER = (1.0, 2.0)
"""What TML compares with, and what networks were found to store after long training."""
RL_RANK_SOURCE = (
    f"{TML} (rank 1 equals full fine-tuning); Mind Lab, https://alpha.macaron.im/mindlab/research/"
    "lora-in-reasoning-rl-the-sweet-spot-between-performance-stability-and-cost (16 to 32 best); Structure over Scale, "
    "https://openreview.net/forum?id=XGZHI14m8P (128 and more collapse); docs/studies/rank.md (rank 1 worse by 0.035, rank 32 equal)"
)


def plan_parameters(maps: Sequence[LinearMap], rank: int) -> Figure:
    experts = any(m.kind == "expert" for m in maps)
    note = f"{len(maps)} linear maps, {per_rank(maps):,} for each unit of rank"
    if experts:
        note += "; experts have rank / active experts each"
    return Figure(
        "adapter parameters", adapter_parameters(maps, rank), "", "sum over adapted maps of rank (d_in + d_out)", "exact", note=note
    )


def plan_bytes(parameters: int) -> Figure:
    """On the disk and over the wire: adapters are kept in float32."""
    return Figure("adapter file", 4 * parameters, "bytes", "4 x parameters", "exact but for a header of some KiB", note="float32")


def plan_capacity(parameters: int) -> Figure:
    low, high = (parameters * bits for bits in BITS_A_PARAMETER)
    source = f"{TML} compares bits with parameters; 2 bits a parameter: Allen-Zhu & Li, https://arxiv.org/abs/2404.05405"
    return Figure("capacity", low, "bits", "1 to 2 bits x parameters", source, low, high, "ideal: after long training")


def plan_saturation(demand: Figure, capacity: Figure) -> Figure:
    """Whether what there is to learn can fit."""
    assert demand.value is not None
    assert capacity.value is not None
    assert capacity.high
    share = demand.value / capacity.value
    note = "fits" if share <= 1 else "more than fits: expect it to fall behind full fine-tuning; raise the rank"
    formula = "bits demanded / capacity"
    return Figure("demand over capacity", share, "", formula, "as the two", demand.value / capacity.high, share, note)


def plan_rank(maps: Sequence[LinearMap], kind: TaskKind, demand: Figure | None) -> Figure:
    """Enough for the bits, and within the range in which one learning rate was found to do."""
    width = min(m.width for m in maps)
    least, most = (LEAST_RANK, MOST_RL_RANK) if kind == "rl" else (LEAST_SFT_RANK, MOST_SFT_RANK)
    if kind == "sft":
        source = f"{TML}: low rank falls behind when there is more to memorise than fits; cookbook's sweep: 1 to 2% of loss from 1 to 64"
    else:
        source = RL_RANK_SOURCE
    if demand is None or demand.value is None:
        wanted, formula = least, f"{least}: the demand is not known"
    else:
        wanted = math.ceil(demand.value / per_rank(maps))
        formula = f"bits demanded / ({per_rank(maps):,} a unit of rank) = {wanted}, within {least} to {most}, at most {width} wide"
    value = min(max(wanted, least), most, width)
    note = f"the demand asks for {wanted}; go beyond {value} only with a learning rate swept anew" if wanted > value else ""
    return Figure("rank", value, "", formula, source, min(1 if kind == "rl" else least, value), min(most, width), note)


def plan_alpha() -> Figure:
    note = "the update is scaled by alpha / rank, so that one learning rate does for all ranks but 1"
    return Figure("alpha", ALPHA, "", "32 at every rank", f"{TML}, section on parametrisation", note=note)
