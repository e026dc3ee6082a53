"""The shape of a model: its linear maps and its attention, as numbers without weights. Standard library only.

What a plan, a FLOP count and a parameter count are made from; ``engine/shapes.py`` finds it in any architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from veneer.types import AdapterError, LoraConfig

Kind = Literal["attention", "mlp", "expert", "unembedding", "other"]
"""other: routers, and whatever does not read a token of text; no adapter is put there."""


@dataclass(frozen=True)
class LinearMap:
    """y = W x with W [d_out, d_in], once or, for the experts of a layer, several times."""

    name: str
    """Of its module, as in the model; for the gate and up of fused experts as in checkpoints."""
    kind: Kind
    d_in: int
    d_out: int
    copies: int = 1
    active: int = 1
    """Of the copies, those that a token goes through."""
    stage: int = 0
    """Maps that read the same input have the same number; what reads their outputs has a higher one."""
    closes: bool = False
    """It reads what other maps of its block made (an output or down projection), not the block's input."""

    @property
    def weights(self) -> int:
        return self.copies * self.d_in * self.d_out

    @property
    def products(self) -> int:
        """Multiplications of one token in one forward pass."""
        return self.active * self.d_in * self.d_out

    @property
    def width(self) -> int:
        """The largest rank that fits."""
        return min(self.d_in, self.d_out)

    def rank(self, rank: int) -> int:
        """Of an adapter on each copy: divided by the active experts, so that a token meets as many columns as elsewhere ("LoRA Without
        Regret", section on layers, https://thinkingmachines.ai/blog/lora/); at least 1."""
        return max(1, rank // self.active) if self.kind == "expert" else rank


@dataclass(frozen=True)
class Attention:
    """Layers whose attention is alike."""

    layers: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    """Positions that a query sees; None: all before it."""


@dataclass(frozen=True)
class Rest:
    """Modules of one class that hold parameters and are no linear map."""

    module: str
    """The class."""
    example: str
    """The name of the first of them in the model."""
    parameters: int
    known: bool
    """An embedding or a norm: nothing that could be missed."""


@dataclass(frozen=True)
class ModelShape:
    name: str
    architecture: str
    """The class of the model."""
    maps: Sequence[LinearMap]
    """In model order, the unembedding last."""
    attention: Sequence[Attention]
    parameters: int
    """All of them, tied ones once."""
    tied: bool
    """Whether the unembedding is the embedding."""
    layers: int
    hidden: int
    vocab: int
    context: int
    rest: Sequence[Rest] = ()
    doubts: Sequence[str] = ()
    """What could not be found out, in words."""

    @property
    def cache_numbers(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(a.layers * a.kv_heads * (a.qk_dim + a.v_dim) for a in self.attention)

    @property
    def products(self) -> int:
        """Multiplications of one token in one forward pass, attention's own apart: W of the formulas."""
        return sum(m.products for m in self.maps)

    def adapted(self, config: LoraConfig) -> list[LinearMap]:
        """The maps that an adapter of this configuration is put on, by the rules of the engine.

        Raises:
            AdapterError: a pattern or a switch matches nothing, nothing is chosen, or the rank does not fit.
        """
        candidates = [m for m in self.maps if m.kind != "other"]
        if config.target_modules:
            chosen = list[LinearMap]()
            for pattern in config.target_modules:
                found = [m for m in candidates if m.name == pattern or m.name.endswith("." + pattern)]
                if not found:
                    endings = sorted({m.name.rsplit(".", 1)[-1] for m in candidates})
                    raise AdapterError(f"target {pattern!r} matches no linear map; {self.name} has {', '.join(endings)}")
                chosen += found
        else:
            switches = {"train_attn": ("attention",), "train_mlp": ("mlp", "expert"), "train_unembed": ("unembedding",)}
            on = {switch: [m for m in candidates if m.kind in kinds] for switch, kinds in switches.items() if getattr(config, switch)}
            for switch, found in on.items():
                if not found:
                    raise AdapterError(f"{switch} matches no linear map of {self.architecture}; set it to false")
            chosen = [m for found in on.values() for m in found]
        names = {m.name for m in chosen}
        if not names:
            raise AdapterError("nothing would be trained: train_attn, train_mlp and train_unembed are all false")
        maps = [m for m in candidates if m.name in names]
        narrow = min(maps, key=lambda m: m.width)
        if not 1 <= config.rank <= narrow.width:
            raise AdapterError(f"rank {config.rank} does not fit: it must be from 1 to {narrow.width}, the width of {narrow.name}")
        return maps


def per_rank(maps: Sequence[LinearMap]) -> int:
    """Parameters of an adapter for each unit of rank: the sum of d_in + d_out, P1 of the formulas. Experts' copies all count."""
    return sum(m.copies * (m.d_in + m.d_out) for m in maps)


def adapter_parameters(maps: Sequence[LinearMap], rank: int) -> int:
    """Of an adapter of this rank on these maps: rank (d_in + d_out) each; for experts see ``LinearMap.rank``."""
    return sum(m.copies * m.rank(rank) * (m.d_in + m.d_out) for m in maps)
