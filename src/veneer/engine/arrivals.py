"""What datums and sampling requests must be before they are queued, so that a mistake fails at once and alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from veneer.engine.base import Base
from veneer.engine.losses import REFERENCE_LOGPROBS, SEQUENCE_RATIO_MASK, Terms, check_per_token
from veneer.engine.memory import total_memory
from veneer.engine.request import SampleRequest
from veneer.types import DataError, Datum, Floats, LossName, RequestError


def check_data(data: Sequence[Datum], loss_fn: LossName, terms: Terms, vocab_size: int, context_length: int) -> None:
    """Lengths, token ids, and numbers: the mask must be finite everywhere, all else wherever a loss reads it.

    Raises:
        DataError: which datum, which array, and what is wrong with it.
        RequestError: a datum brings what the loss does not read.
    """
    if _plainly_sound(data, terms, vocab_size, context_length):
        return
    for i, datum in enumerate(data):
        if len(datum.tokens) > context_length:
            raise DataError(f"datum {i} has {len(datum.tokens)} tokens; the base's context is {context_length}")
        for name, ids in (("tokens", datum.tokens), ("targets", datum.targets)):
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise DataError(f"datum {i}: {name} must be from 0 to {vocab_size - 1}")
        if datum.per_token:
            check_per_token(loss_fn, datum.per_token, terms)
        if terms.kl_coef and REFERENCE_LOGPROBS not in datum.per_token and datum.mask.any():
            raise DataError(f"datum {i} has no {REFERENCE_LOGPROBS!r} per token, which loss {loss_fn!r} needs as its kl_coef is not 0")
        _check_numbers(i, datum)


def _plainly_sound(data: Sequence[Datum], terms: Terms, vocab_size: int, context_length: int) -> bool:
    """Whether nothing can be wrong, looked at all at once; a look at each of 64 short datums takes as long as a decoding step."""
    if terms.kl_coef or not data or any(datum.per_token or len(datum.tokens) > context_length for datum in data):
        return False
    ids = np.concatenate([array.reshape(-1) for datum in data for array in (datum.tokens, datum.targets)])
    numbers = np.concatenate([a.reshape(-1) for datum in data for a in (datum.mask, datum.logprobs, datum.advantages)])
    return ids.min() >= 0 and ids.max() < vocab_size and bool(np.isfinite(numbers).all())


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


def check_request(request: SampleRequest, base: Base) -> None:
    """
    Raises:
        DataError: the prompt or its targets do not fit the base.
        RequestError: the settings make no sense.
    """
    prompt, params, vocab = request.prompt, request.params, base.vocab_size
    if not 0 < len(prompt) < base.context_length:
        raise DataError(
            f"the prompt has {len(prompt)} tokens; it must have from 1 to {base.context_length - 1}, the base's context less one"
        )
    if prompt.min() < 0 or prompt.max() >= vocab:
        raise DataError(f"prompt tokens must be from 0 to {vocab - 1}")
    length = min(len(prompt) + params.max_tokens, base.context_length)
    need, there = base.cache_numbers * base.dtype.itemsize * length, total_memory(base.device)
    if need > there:
        raise DataError(
            f"{length:,} tokens of prompt and completion need {need / 2**30:.1f} GiB of cache; the machine has "
            f"{there / 2**30:.1f} GiB of memory. Lower max_tokens"
        )
    if params.stop and base.tokenizer is None:
        raise RequestError("stop texts need the base's tokenizer, and this base was made without one; use stop_token_ids")
    if request.n < 1 or params.max_tokens < 0:
        raise RequestError("n must be at least 1 and max_tokens at least 0")
    if not 0 <= params.temperature < math.inf or params.top_k < 0 or not 0 < params.top_p <= 1:
        raise RequestError("temperature must be a number from 0, top_k must not be negative, and top_p must be above 0 and at most 1")
    for name, k in (("top_logprobs", request.top_logprobs), ("prompt_top_logprobs", request.wish.top)):
        if not 0 <= k <= vocab:
            raise RequestError(f"{name} is {k}; it must be from 0 to {vocab}, the base's vocabulary")
    targets = request.wish.targets
    if targets is not None and (targets.ndim != 2 or len(targets) != len(prompt) - 1):
        raise DataError(f"prompt_targets has shape {list(targets.shape)}; for this prompt it must be [{len(prompt) - 1}, K]")
    if targets is not None and targets.size and (targets.min() < -1 or targets.max() >= vocab):
        raise DataError(f"prompt_targets must be from 0 to {vocab - 1}, or -1 for none")
    _check_switches(request, vocab)


def _check_switches(request: SampleRequest, vocab: int) -> None:
    place, waits = 0, False
    for i, switch in enumerate(request.switches):
        if (switch.at is None) == (not switch.after):
            raise RequestError(f"switch {i} needs one of two: the position of the prompt at which it comes, or the tokens after which")
        if switch.at is None:
            waits = True
            if min(switch.after) < 0 or max(switch.after) >= vocab:
                raise RequestError(f"switch {i} comes after {switch.after}; tokens must be from 0 to {vocab - 1}")
        elif waits:
            raise RequestError(f"switch {i} is in the prompt, but one before it waits for tokens behind the prompt; put it first")
        elif not place <= switch.at < len(request.prompt):
            last = len(request.prompt) - 1
            raise RequestError(f"switch {i} is at position {switch.at}; it must be from {place} to {last}, in order and in the prompt")
        else:
            place = switch.at + 1
