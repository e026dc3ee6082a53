"""Small adapters that the store tests share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.digest import digest_adapter
from veneer.types import Adapter, Checkpoint, LoraConfig

if TYPE_CHECKING:
    from veneer.engine import LocalEngine  # torch: processes that only put and read start without it


def make(value: float = 0.5, kind: Any = "sampler", name: str = "x", rank: int = 2, alpha: float = 8.0) -> Checkpoint:
    """A small adapter of no base in particular."""
    rng = np.random.default_rng(int(value * 100))
    weights = {}
    for module in ("layers.0.q_proj", "layers.1.q_proj"):
        weights[f"{module}.lora_A.weight"] = rng.normal(size=(rank, 6)).astype(np.float32)
        weights[f"{module}.lora_B.weight"] = rng.normal(size=(4, rank)).astype(np.float32)
    optimizer = {f"{m}.{k}": np.abs(w) for m in "mv" for k, w in weights.items()} | {"step": np.array(7)} if kind == "training" else {}
    lora = LoraConfig(rank=rank, alpha=alpha)
    return Checkpoint(kind, Adapter(name, 7, digest_adapter(weights, lora), "nano", "b" * 64), lora, weights, optimizer)


def nano_engine() -> LocalEngine:
    from veneer.engine import LoraEngine, load_base

    return LoraEngine(load_base("nano"))


def nano_adapter(rank: int = 2, seed: int = 3) -> Checkpoint:
    """A real adapter of the bundled base whose B is not zero."""
    engine = nano_engine()
    engine.create_adapter("made", LoraConfig(rank=rank, seed=seed))
    fresh = engine.save_state("made", "sampler").result()
    rng = np.random.default_rng(seed)
    weights = {k: w + (0.05 * rng.normal(size=w.shape).astype(np.float32) if "lora_B" in k else 0) for k, w in fresh.weights.items()}
    adapter = dataclasses.replace(fresh.adapter, digest=digest_adapter(weights, fresh.config))
    return dataclasses.replace(fresh, weights=weights, adapter=adapter)


def same(left: Any, right: Any) -> bool:
    return set(left) == set(right) and all(left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k]) for k in left)
