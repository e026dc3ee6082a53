"""Which log-probability of a pass is whose: from the wanted positions of a line to each datum's targets, and to the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.engine.losses import REFERENCE_LOGPROBS, SEQUENCE_RATIO_MASK, LossInputs, SequenceTokens, Settings, Terms
from veneer.engine.packing import Member, Unit
from veneer.types import Floats

Places = NDArray[np.int64]


def line_targets(units: Sequence[Unit], device: torch.device) -> Tensor:
    """The targets at the wanted positions of a pass: int64 [wanted], or [wanted, K], where narrower datums have zeros behind theirs."""
    found, width = [], units[0].request.width
    for unit in units:
        for readers, first, stop in unit.pieces():
            here = readers[0].datum.targets[first:stop][readers[0].reads[first:stop]]
            found.append(_widened(here, width) if width else here)
    return torch.from_numpy(np.concatenate(found)).to(device)


def _widened(targets: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    table = np.zeros((len(targets), width), np.int64)
    columns = _columns(targets)
    table[:, : columns.shape[1]] = columns
    return table


class UnitTargets:
    """Where the targets that are asked for lie in the log-probabilities [wanted] or [wanted, K] of a unit, flattened."""

    def __init__(self, unit: Unit) -> None:
        self.members = unit.members
        rows: dict[int, list[Places]] = {id(member): [] for member in self.members}
        at = 0
        for readers, first, stop in unit.pieces():
            count = int(np.count_nonzero(readers[0].reads[first:stop]))
            for member in readers:
                rows[id(member)].append(np.arange(at, at + count))
            at += count
        self.places = [_places(member, np.concatenate(rows[id(member)]), unit.request.width) for member in self.members]
        """Per member of its asked targets, in their order."""

    def handed_back(self, lp: Floats) -> list[Floats]:
        """Per member the log-probabilities of its asked targets, in their order."""
        return [lp.reshape(-1)[places] for places in self.places]

    def loss_inputs(self, lp: Tensor, terms: Terms, entropy: Tensor | None = None) -> LossInputs:
        """What a loss reads; ``lp`` [wanted] or [wanted, K], ``entropy`` [wanted] if the terms need it."""
        flat, device = lp.reshape(-1), lp.device
        weighted = [p if m.asked is m.weighted else p[m.weighted[m.asked]] for m, p in zip(self.members, self.places, strict=True)]
        count = sum(map(len, weighted))
        index = None if count == len(flat) else _on(np.concatenate(weighted), device)
        own = flat if index is None else flat.index_select(0, index)
        if entropy is not None:
            every = entropy if lp.ndim == 1 else entropy[:, None].expand_as(lp).reshape(-1)
            entropy = every if index is None else every.index_select(0, index)
        q, advantages, weights = (self._trained(name, device) for name in ("logprobs", "advantages", "mask"))
        owners = np.repeat(np.arange(len(weighted)), [len(places) for places in weighted])
        sequence, reference = self._sequence(flat, weighted), self._reference(device) if terms.kl_coef else None
        return LossInputs(own, q, advantages, weights, _on(owners, device), sequence, reference, entropy)

    def _reference(self, device: torch.device) -> Tensor:
        """Datums without a weight bring none and are asked for none."""
        return _on(np.concatenate([m.datum.per_token[REFERENCE_LOGPROBS][m.weighted] for m in self.members if m.trains]), device)

    def _trained(self, field: str, device: torch.device) -> Tensor:
        return _on(np.concatenate([getattr(m.datum, field)[m.weighted] for m in self.members]), device)

    def settings(self, config: Mapping[str, float], device: torch.device) -> Settings:
        """A loss's settings: as they are, or per token if any datum brings its own, which are stronger."""
        if not any(name in member.datum.per_token for member in self.members for name in config):
            return config
        return {name: _on(np.concatenate([_setting(m, name, value) for m in self.members]), device) for name, value in config.items()}

    def _sequence(self, lp: Tensor, weighted: Sequence[Places]) -> SequenceTokens | None:
        """None: no datum says over which tokens its sequence's ratio is a mean."""
        if not any(SEQUENCE_RATIO_MASK in member.datum.per_token for member in self.members):
            return None
        places, q, weights = [], [], []
        for member, all_places, own in zip(self.members, self.places, weighted, strict=True):
            ratio = member.datum.per_token.get(SEQUENCE_RATIO_MASK)
            counted = member.weighted if ratio is None or not len(own) else ratio != 0
            places.append(all_places[counted[member.asked]])
            q.append(member.datum.logprobs[counted])
            weights.append(np.ones(len(q[-1]), np.float32) if ratio is None else ratio[counted])
        owners = np.repeat(np.arange(len(places)), [len(p) for p in places])
        joined = (_on(np.concatenate(parts), lp.device) for parts in (places, q, weights, [owners]))
        index, *others = joined
        return SequenceTokens(lp.detach().index_select(0, index), *others)


def _places(member: Member, rows: Places, width: int) -> Places:
    """``rows``: of the member's reads."""
    if not width:
        return rows
    asked = _columns(member.asked[member.reads])
    return (rows[:, None] * width + np.arange(asked.shape[1]))[asked]


def _columns(array: np.ndarray) -> np.ndarray:
    """[n, K] of [n, K] or, with K = 1, of [n]."""
    return array if array.ndim == 2 else array[:, None]


def _setting(member: Member, name: str, value: float) -> Floats:
    own = member.datum.per_token.get(name)
    return np.full(np.count_nonzero(member.weighted), value, np.float32) if own is None else own[member.weighted]


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
