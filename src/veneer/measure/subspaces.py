"""Do two updates go the same way? The directions that each writes to and reads from, how many they share, and how many chance would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.measure.anatomy import Update, kind_of

Basis = NDArray[np.float64]
"""[width, directions]: orthonormal columns."""
LARGEST = 64
"""Directions of an update that are looked at: its strongest ones."""
WHOLE = "all"
"""All kinds of matrices together."""


@dataclass(frozen=True)
class Directions:
    """What an update [d_out, d_in] can do to its matrix, the strongest direction first."""

    written: Basis
    """Of d_out: left singular vectors, along which its outputs are moved."""
    read: Basis
    """Of d_in: right singular vectors, the only ones of its inputs that it sees."""


@dataclass(frozen=True)
class Share:
    """Of their directions that two updates have in common, from 0 (all at right angles) to 1 (one subspace within the other), a mean over
    matrices."""

    measured: float
    null: float
    """Of random subspaces of the same sizes: the mean,"""
    null_sd: float
    """and the standard deviation of a mean over so many matrices."""


@dataclass(frozen=True)
class Common:
    """Of the matrices of a kind that both updates have."""

    matrices: int
    directions: float
    """Of the thinner of the two, a mean over matrices."""
    written: Share
    read: Share


def directions_of(updates: Mapping[str, Update]) -> dict[str, Directions]:
    """By parameter, of those with two axes whose update is not zero. Of a thin update it takes the time that its singular values take."""
    found = {name: _directions(update) for name, update in updates.items() if len(update.shape) == 2}
    return {name: one for name, one in found.items() if one.written.shape[1]}


def _directions(update: Update) -> Directions:
    left = update.left.astype(np.float64)
    if update.right is None:
        written, singular, read = np.linalg.svd(left, full_matrices=False)
    else:
        outer, core = np.linalg.qr(left)
        inner, other = np.linalg.qr(update.right.T.astype(np.float64))
        written, singular, read = np.linalg.svd(core @ other.T, full_matrices=False)
        written, read = outer @ written, read @ inner.T
    told = singular > singular[0] * len(singular) * np.finfo(np.float32).eps  # the rest is rounding of float32 factors
    kept = min(int(told.sum()), LARGEST)
    return Directions(written[:, :kept], read[:kept].T)


def subspace_overlap(one: Basis, other: Basis) -> float:
    """|U^T V|^2 / min(k, l) of subspaces of k and l dimensions: the measure of the LoRA paper's section 7.2
    (https://arxiv.org/abs/2106.09685)."""
    return float(np.square(one.T @ other).sum()) / min(one.shape[1], other.shape[1])


def random_overlap(width: int, one: int, other: int) -> tuple[float, float]:
    """Mean and variance of ``subspace_overlap`` of two uniformly random subspaces of k = ``one`` and l = ``other`` dimensions.

    tr(P Q) of their projections has the mean k l / d. A randomly turned Q has E[Q_ij Q_mn] = a I_ij I_mn + b (I_im I_jn + I_in I_jm), whose
    a and b follow from tr(Q) = tr(Q^2) = l; so the variance is 2 k l (d - k)(d - l) / (d^2 (d - 1)(d + 2)).
    """
    most = min(one, other)
    variance = 2 * one * other * (width - one) * (width - other) / (width**2 * max(width - 1, 1) * (width + 2))
    return one * other / (width * most), variance / most**2


def compare_directions(one: Mapping[str, Directions], other: Mapping[str, Directions]) -> dict[str, Common]:
    """By kind of matrix, WHOLE first, of the matrices that both have.

    Raises:
        ValueError: there is none, or one has another shape there.
    """
    both = [name for name in one if name in other]
    if not both:
        raise ValueError("the updates have no matrix in common")
    for name in both:
        shapes = [(len(directions[name].written), len(directions[name].read)) for directions in (one, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in one and {shapes[1]} in the other")
    groups = {WHOLE: both}
    for name in both:
        groups.setdefault(kind_of(name), []).append(name)
    return {kind: _common([(one[name], other[name]) for name in names]) for kind, names in groups.items()}


def _common(pairs: Sequence[tuple[Directions, Directions]]) -> Common:
    thinner = [min(a.written.shape[1], b.written.shape[1]) for a, b in pairs]
    written, read = _share([(a.written, b.written) for a, b in pairs]), _share([(a.read, b.read) for a, b in pairs])
    return Common(len(pairs), sum(thinner) / len(pairs), written, read)


def _share(pairs: Sequence[tuple[Basis, Basis]]) -> Share:
    nulls = [random_overlap(len(a), a.shape[1], b.shape[1]) for a, b in pairs]
    count = len(pairs)
    measured = math.fsum(subspace_overlap(a, b) for a, b in pairs) / count
    return Share(measured, math.fsum(mean for mean, _ in nulls) / count, math.sqrt(math.fsum(variance for _, variance in nulls)) / count)


def in_short(common: Mapping[str, Common]) -> dict[str, Any]:
    """As JSON."""
    return {kind: asdict(one) for kind, one in common.items()}
