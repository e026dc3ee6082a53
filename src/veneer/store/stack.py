"""Several adapters as one: the sum of their updates, each times a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from veneer.digest import digest_adapter
from veneer.types import Adapter, AdapterError, Checkpoint, LoraConfig


def stack_adapters(parts: Sequence[tuple[Checkpoint, float]], name: str) -> Checkpoint:
    """One adapter whose update is sum_i scale_i (alpha_i / rank_i) B_i A_i: A_i [r_i, d_in] one below the other, B_i [d_out, r_i] side by
    side, so its rank is the sum of theirs; zeros where a part leaves a module alone. Scales go into B, in float64 and then rounded
    once. A single adapter with scale 1 comes back with the digest it had. The sum must fit the base's narrowest map, which an engine
    checks, and serves fastest up to rank 16.

    Raises:
        AdapterError: there are no parts, one is a fully fine-tuned copy, they were made for different bases, or a scale is no number.
    """
    if not parts:
        raise AdapterError("a stack needs at least one adapter")
    first = parts[0][0].adapter
    configs: list[LoraConfig] = []
    for checkpoint, scale in parts:
        adapter = checkpoint.adapter
        if checkpoint.config is None:
            raise AdapterError(f"adapter {adapter.name!r} is a fully fine-tuned copy, which cannot be stacked")
        if adapter.base_digest != first.base_digest:
            raise AdapterError(
                f"adapter {adapter.name!r} was made for base {adapter.base_id!r} ({adapter.base_digest[:12]}), {first.name!r} for "
                f"{first.base_id!r} ({first.base_digest[:12]}); adapters of one stack need one base"
            )
        if not math.isfinite(scale):
            raise AdapterError(f"adapter {adapter.name!r} cannot be stacked with scale {scale}; give a finite number")
        configs.append(checkpoint.config)
    rank = sum(config.rank for config in configs)
    alpha = configs[0].alpha * (rank / configs[0].rank)
    factors = [scale * (c.alpha / c.rank) / (configs[0].alpha / configs[0].rank) for (_, scale), c in zip(parts, configs, strict=True)]
    modules = sorted({key.rsplit(".lora_", 1)[0] for checkpoint, _ in parts for key in checkpoint.weights})
    weights: dict[str, NDArray[np.float32]] = {}
    for module in modules:
        a_key, b_key = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        d_in = next(c.weights[a_key].shape[1] for c, _ in parts if a_key in c.weights)
        d_out = next(c.weights[b_key].shape[0] for c, _ in parts if b_key in c.weights)
        sides = [
            (c.weights[a_key], _scaled(c.weights[b_key], factor))
            if a_key in c.weights
            else (np.zeros((config.rank, d_in), np.float32), np.zeros((d_out, config.rank), np.float32))
            for (c, _), config, factor in zip(parts, configs, factors, strict=True)
        ]
        weights[a_key] = np.concatenate([a for a, _ in sides], axis=0)
        weights[b_key] = np.concatenate([b for _, b in sides], axis=1)
    lora = LoraConfig(rank, alpha, target_modules=tuple(modules))
    steps = max(checkpoint.adapter.version for checkpoint, _ in parts)
    adapter = Adapter(name, steps, digest_adapter(weights, lora), first.base_id, first.base_digest)
    return Checkpoint("sampler", adapter, lora, weights)


def _scaled(b: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    return (b.astype(np.float64) * factor).astype(np.float32)
