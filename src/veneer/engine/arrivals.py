"""What datums must be before they are queued, so that a mistake fails at once and alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from veneer.engine.losses import SEQUENCE_RATIO_MASK, check_per_token
from veneer.types import DataError, Datum, Floats, LossName


def check_data(data: Sequence[Datum], loss_fn: LossName, vocab_size: int, context_length: int) -> None:
    """Lengths, token ids, and numbers: the mask must be finite everywhere, all else wherever a loss reads it.

    Raises:
        DataError: which datum, which array, and what is wrong with it.
        RequestError: a datum brings what the loss does not read.
    """
    for i, datum in enumerate(data):
        if len(datum.tokens) > context_length:
            raise DataError(f"datum {i} has {len(datum.tokens)} tokens; the base's context is {context_length}")
        for name, ids in (("tokens", datum.tokens), ("targets", datum.targets)):
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise DataError(f"datum {i}: {name} must be from 0 to {vocab_size - 1}")
        if datum.per_token:
            check_per_token(loss_fn, datum.per_token)
        _check_numbers(i, datum)


def _check_numbers(i: int, datum: Datum) -> None:
    _check_finite(f"datum {i}: mask", datum.mask)
    weighted = datum.mask != 0
    where = "where the mask is not 0"
    for name in ("logprobs", "advantages"):
        _check_finite(f"datum {i}: {name}", getattr(datum, name), weighted, where)
    for name, array in datum.per_token.items():
        if name != SEQUENCE_RATIO_MASK:
            _check_finite(f"datum {i}: {name}", array, weighted, where)
            continue
        _check_finite(f"datum {i}: {name}", array)
        if array.min() < 0:
            raise DataError(f"datum {i}: {name} must not be negative; {array.min():g} is in it")
        _check_finite(f"datum {i}: logprobs", datum.logprobs, array != 0, f"where {name} is not 0")


def _check_finite(what: str, array: Floats, read: NDArray[np.bool_] | None = None, where: str = "everywhere") -> None:
    bad = ~np.isfinite(array)
    if not bad.any():
        return
    bad = bad if read is None else bad & read
    if bad.any():
        place = np.argwhere(bad)[0].tolist()
        raise DataError(f"{what} must be finite {where}; {array[tuple(place)]} is at {place}")
