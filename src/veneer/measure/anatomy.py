"""What an update did to the weights: how many of them visibly changed, how many would have by magnitude alone, of what rank, and where."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.types import LoraConfig

Array = NDArray[np.float32]
BINS = 32
"""Of a weight's magnitude, as many weights in each."""
SAMPLED = 2**20
KINDS = (("self_attn", "attention"), ("mlp", "MLP"), ("embed", "embedding"), ("lm_head", "unembedding"), ("norm", "norm"))


# ---------------------------------------------------------------- the update


@dataclass(frozen=True)
class Update:
    """What was added to one parameter: an array, or a product of two thin ones."""

    left: Array
    """[d_out, r]; without ``right`` all of it, of any shape."""
    right: Array | None = None
    """[r, d_in]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape if self.right is None else (self.left.shape[0], self.right.shape[1])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows(self, every: int = 1) -> Array:
        """Each ``every``-th of its first axis."""
        return self.left[::every] if self.right is None else self.left[::every] @ self.right

    def singular_values(self) -> NDArray[np.float64]:
        """Of two axes, in falling order; of a product as many as it is wide."""
        core = self.left.astype(np.float64)
        if self.right is not None:
            one, other = (np.asarray(np.linalg.qr(side, mode="r")) for side in (core, self.right.T.astype(np.float64)))
            core = one @ other.T
        return np.linalg.svd(core, compute_uv=False).astype(np.float64)


def updates_of(before: Mapping[str, Array], after: Mapping[str, Array], config: LoraConfig | None) -> dict[str, Update]:
    """What was added to each of the base's parameters, by its name. ``before``: the base's. ``after``: the weights of a checkpoint, all of
    them or, with ``config``, those of an adapter, whose update is (alpha / rank) B A.

    Raises:
        ValueError: a parameter that the base does not have, or of another shape.
    """
    if config is None:
        full = {name: array.shape for name, array in after.items()}
        _check_shapes(before, full)
        return {name: Update(array - before[name]) for name, array in after.items()}
    found = thin_updates(after, config)
    _check_shapes(before, {name: update.shape for name, update in found.items()})
    return found


def thin_updates(weights: Mapping[str, Array], config: LoraConfig) -> dict[str, Update]:
    """(alpha / rank) B A for each of the base's parameters that an adapter's ``weights`` change, by its name."""
    thin = {name.removeprefix("base_model.model."): array for name, array in weights.items()}
    modules = [name.removesuffix(".lora_A.weight") for name in thin if name.endswith(".lora_A.weight")]
    scale = np.float32(config.alpha / config.rank)
    return {f"{m}.weight": Update(scale * thin[f"{m}.lora_B.weight"], thin[f"{m}.lora_A.weight"]) for m in modules}


def _check_shapes(before: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in before or before[name].shape != shape:
            raise ValueError(f"the base has no {name} of the shape {shape}")


# ---------------------------------------------------------------- visible changes


def in_bfloat16(values: Array) -> Array:
    """Rounded to the nearest bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


def visible(weights: Array, update: Array, dtype: str = "float32", tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Where weights that are stored in ``dtype`` differ by more than ``tolerance`` behind the update.

    An update below half the distance to the next number of the dtype is lost in storing it: in bfloat16 one of less than |w| / 512
    always is, one of more than |w| / 256 never (8 bits of significand).

    Raises:
        ValueError: another dtype than float32 or bfloat16.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; it must be float32 or bfloat16")
    before, after = weights, weights + update
    if dtype == "bfloat16":
        before, after = in_bfloat16(before), in_bfloat16(after)
    return np.abs(after - before) > tolerance


@dataclass(frozen=True)
class Visible:
    """The share of all weights that visibly changed."""

    dtype: str
    tolerance: float
    measured: float
    null: float
    """The same updates dealt out anew among the weights of each matrix: what their sizes alone would have made visible. A circuit of its
    own would show as a difference."""


def share_visible(
    weights: Mapping[str, Array], updates: Mapping[str, Update], dtype: str = "float32", tolerance: float = 0.0, seed: int = 0
) -> Visible:
    """Of all weights that have an update; of a matrix with more than SAMPLED weights every second, third or later row is looked at, and
    counts for those between."""
    rng = np.random.default_rng(seed)
    changed = shuffled = 0.0
    for name, update in updates.items():
        every = -(-update.size // SAMPLED)
        here, delta = weights[name][::every], update.rows(every)
        dealt = rng.permutation(delta.ravel()).reshape(delta.shape)
        changed += update.size * float(visible(here, delta, dtype, tolerance).mean())
        shuffled += update.size * float(visible(here, dealt, dtype, tolerance).mean())
    total = sum(update.size for update in updates.values())
    return Visible(dtype, tolerance, changed / total, shuffled / total)


@dataclass(frozen=True)
class Overlap:
    """Of the weights that two updates changed: the share of the one's that is among the other's, averaged over both directions."""

    measured: float
    chance: float
    """If each had changed as many anywhere."""
    by_magnitude: float
    """If each had changed as many of every magnitude: what a rule that looks at nothing but |w| comes to."""


def overlap_of(weights: Sequence[Array], one: Sequence[NDArray[np.bool_]], other: Sequence[NDArray[np.bool_]]) -> Overlap:
    """Of masks of changed weights, matrix by matrix. Magnitudes are binned within a matrix: by powers of two, between which the distance
    of neighbouring numbers of a dtype changes and with it what is visible, and by BINS quantiles.

    Raises:
        ValueError: a mask without a changed weight.
    """
    counts = np.zeros(2)
    both = chance = matched = 0.0
    for values, first, second in zip(weights, one, other, strict=True):
        counts += first.sum(), second.sum()
        both += float((first & second).sum())
        chance += float(first.sum()) * float(second.sum()) / first.size
        sizes = np.abs(values).ravel()
        order = np.argsort(sizes, kind="stable")
        exponents = np.frexp(sizes[order])[1]
        quantiles = np.arange(min(BINS, values.size)) * values.size // min(BINS, values.size)
        starts = np.union1d(quantiles, np.flatnonzero(np.diff(exponents)) + 1)
        theirs, ours = (np.add.reduceat(mask.ravel()[order], starts, dtype=np.float64) for mask in (first, second))
        matched += float((theirs * ours / np.diff(np.append(starts, values.size))).sum())
    if not counts.all():
        raise ValueError("an update that changed nothing overlaps with nothing")
    mean = float((1 / counts).mean())
    return Overlap(both * mean, chance * mean, matched * mean)


# ---------------------------------------------------------------- ranks and places


def effective_rank(singular: NDArray[np.float64]) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007, https://ieeexplore.ieee.org/document/7098875): as many equal
    ones would be as evenly spread. 0 of an update that is zero."""
    shares = singular[singular > 0] / max(float(singular.sum()), np.finfo(float).tiny)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def stable_rank(singular: NDArray[np.float64]) -> float:
    """Squared Frobenius norm over squared spectral norm: at most the rank, and not moved by what is small."""
    return float((singular**2).sum() / singular[0] ** 2) if singular[0] > 0 else 0.0


@dataclass(frozen=True)
class Matrix:
    """The update of one parameter of two axes."""

    name: str
    norm: float
    """Frobenius."""
    relative: float
    """Over the weights' own norm."""
    effective_rank: float
    stable_rank: float
    rank: int
    """The most it could be."""


@dataclass(frozen=True)
class Anatomy:
    matrices: Sequence[Matrix]
    by_layer: Mapping[str, float]
    """Shares of the update's squared norm; "-" is what stands in no layer."""
    by_kind: Mapping[str, float]
    visible: Sequence[Visible]
    parameters: int
    """That have an update."""

    def in_short(self) -> dict[str, Any]:
        """As JSON, with means over the matrices."""
        short = {key: value for key, value in asdict(self).items() if key != "matrices"}
        means = {key: statistics.fmean(getattr(one, key) for one in self.matrices) for key in ("effective_rank", "stable_rank", "rank")}
        return short | means


def anatomy(weights: Mapping[str, Array], updates: Mapping[str, Update], config: LoraConfig | None) -> Anatomy | None:
    """All of it; of full fine-tuning if ``config`` is None. None: nothing was changed."""
    squares: dict[str, float] = {}
    matrices = []
    for name, update in updates.items():
        if len(update.shape) != 2:
            squares[name] = float(np.square(update.rows(), dtype=np.float64).sum())
            continue
        singular = update.singular_values()
        squares[name] = float((singular**2).sum())
        own, norm = float(np.linalg.norm(weights[name])), math.sqrt(squares[name])
        most = min(update.shape) if config is None else min(config.rank, *update.shape)
        matrices.append(Matrix(name, norm, norm / own, effective_rank(singular), stable_rank(singular), most))
    total = math.fsum(squares.values())
    if total == 0:
        return None
    shown = [("float32", 0.0), ("bfloat16", 0.0), ("bfloat16", 1e-5)]
    return Anatomy(
        matrices,
        _shares(squares, layer_of, total),
        _shares(squares, kind_of, total),
        [share_visible(weights, updates, dtype, tolerance) for dtype, tolerance in shown],
        sum(update.size for update in updates.values()),
    )


def layer_of(name: str) -> str:
    """The number of a parameter's layer, "-" if it is in none."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")
    return found[1] if found else "-"


def kind_of(name: str) -> str:
    """attention, MLP, embedding, unembedding, norm or other: by the parameter's name."""
    return next((kind for part, kind in KINDS if part in name and not (kind != "norm" and "norm" in name)), "other")


def _shares(squares: Mapping[str, float], place_of: Callable[[str], str], total: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, square in squares.items():
        place = place_of(name)
        found[place] = found.get(place, 0.0) + square / total
    return found
