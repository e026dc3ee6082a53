"""Canaries: is an adapter that was loaded the one that was saved, is it applied, and is the base below it the same?

The commonest failure of LoRA systems is silent: the adapter is there, has a name, and does nothing, or something else. A
digest says which numbers are in memory, not that they act. So whoever saves an adapter records what it does to the
log-probabilities of one fixed row of tokens, from the training weights; whoever loads it draws the same row from the weights
that answer requests and compares. It costs one pass over two short rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from veneer.types import (
    Adapter,
    AttestationError,
    Canary,
    Checkpoint,
    Datum,
    Engine,
    Floats,
    ForwardBackwardOutput,
    Future,
    Sample,
    SamplingParams,
    Tokens,
)

LENGTH = 24
LIMITS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Nats by which a log-probability may differ between two engines of the less precise of their dtypes. Measured on nano against
float32: float32 by other passes 1e-5, float16 0.03, bfloat16 0.15; unlikely tokens of large models differ more."""


def canary_tokens(vocab: int) -> Tokens:
    """The row: tokens from all over a vocabulary of this size, by a rule that never changes."""
    return np.arange(1, LENGTH + 1, dtype=np.int64) * 2654435761 % 2**32 * vocab // 2**32  # Knuth's multiplicative hash


# ---------------------------------------------------------------- saving


def with_canary(engine: Engine, name: str, checkpoint: Checkpoint, tokens: Tokens, base_logprobs: Floats | None = None) -> Checkpoint:
    """The checkpoint with a record of what the training weights of ``name``, which it was saved from, do now. ``base_logprobs``: the row
    without an adapter, if it is known from earlier. Runs the engine."""
    trained = ask_trained(engine, name, tokens)
    if base_logprobs is None:
        base_logprobs = base_row(engine, tokens)
    canary = make_canary(tokens, base_logprobs, trained.result().logprobs_D[0], checkpoint.adapter, engine.dtype)
    return dataclasses.replace(checkpoint, canary=canary)


def base_row(engine: Engine, tokens: Tokens) -> Floats:
    """The log-probabilities of the row without an adapter [len(tokens) - 1], as training has them. Runs the engine."""
    return ask_trained(engine, None, tokens).result().logprobs_D[0]


def ask_trained(engine: Engine, name: str | None, tokens: Tokens) -> Future[ForwardBackwardOutput]:
    """The row under the training weights."""
    zeros = np.zeros(len(tokens) - 1, np.float32)
    return engine.forward(name, [Datum(tokens[:-1], tokens[1:], zeros, zeros, zeros + 1)], "cross_entropy")


def make_canary(tokens: Tokens, base_logprobs: Floats, logprobs: Floats, adapter: Adapter, dtype: str) -> Canary:
    """A record of two rows of log-probabilities [len(tokens) - 1]."""
    rows = (tuple(map(float, base_logprobs)), tuple(map(float, logprobs)))
    return Canary(tuple(map(int, tokens)), *rows, adapter.digest, adapter.base_digest, dtype)


# ---------------------------------------------------------------- loading


def check_loaded(engine: Engine, name: str, checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Compare what ``name`` does in this engine with what its checkpoint recorded. Without a record all that can be
    said is that the digest must be the checkpoint's and that weights which are not zero must have some effect on the row ``tokens``.
    Runs the engine.

    Raises:
        AttestationError: another adapter answers under this name, the base is another, or the adapter has no effect or another one.
    """
    row = row_of(checkpoint, tokens)
    asked = ask_sampled(engine, None, row), ask_sampled(engine, name, row)
    (base,), (adapted,) = (future.result() for future in asked)
    check_effect(checkpoint, base, adapted, engine.dtype)


def row_of(checkpoint: Checkpoint, tokens: Tokens) -> Tokens:
    """The row that its record is of; ``tokens`` if it has none."""
    return tokens if checkpoint.canary is None else np.array(checkpoint.canary.tokens, np.int64)


def check_effect(checkpoint: Checkpoint, base: Sample, adapted: Sample, dtype: str) -> None:
    """``check_loaded`` of ``row_of`` as the engine has drawn it without and with the adapter.

    Raises:
        AttestationError: as there.
    """
    check_drawn([adapted], checkpoint.adapter.digest, checkpoint.adapter.base_digest)
    if checkpoint.canary is not None:
        judge(checkpoint.canary, base, adapted, dtype)
    elif has_weights(checkpoint) and not effect_of(base, adapted).any():
        raise AttestationError(
            f"adapter {checkpoint.adapter.name!r} ({checkpoint.adapter.digest[:12]}) has no effect here: its weights are not zero, and it "
            "changes no log-probability; it is loaded and not applied"
        )


def ask_sampled(engine: Engine, name: str | None, tokens: Tokens) -> Future[list[Sample]]:
    """The row under the weights that answer requests."""
    return engine.sample(tokens, name, SamplingParams(max_tokens=0), prompt_logprobs=True)


def judge(canary: Canary, base: Sample, adapted: Sample, dtype: str) -> None:
    """Compare a record with the same row as this engine draws it.

    Raises:
        AttestationError: says which comparison failed, by how much.
    """
    check_drawn([base], None, canary.base_digest)
    check_drawn([adapted], canary.digest, canary.base_digest)
    limit = max(LIMITS.get(kind, LIMITS["bfloat16"]) for kind in (canary.dtype, dtype))
    recorded = np.array(canary.logprobs, np.float32) - np.array(canary.base_logprobs, np.float32)
    called = f"adapter {canary.digest[:12]}"
    where = f"(limit {limit:g}, saved in {canary.dtype}, here {dtype})"

    gap = largest(_row(base) - np.array(canary.base_logprobs, np.float32))
    if not gap <= limit:
        raise AttestationError(
            f"the base is not what it was when {called} was saved: without the adapter the canary's log-probabilities differ by up to "
            f"{gap:.3g} nats {where}"
        )
    least = 0.0 if canary.dtype == dtype else limit / 10  # rounding of one dtype may swallow what another shows
    if largest(recorded) > least and not effect_of(base, adapted).any():
        raise AttestationError(
            f"{called} has no effect here: it changed the canary's log-probabilities by up to {largest(recorded):.3g} nats where it was "
            "saved and changes none of them here; it is loaded and not applied"
        )
    gap = largest(_row(adapted) - np.array(canary.logprobs, np.float32))
    limit *= max(1.0, largest(recorded))  # a large effect magnifies rounding: of one of 18 nats 0.0011 were measured
    if not gap <= limit:
        where = f"(limit {limit:.3g}, saved in {canary.dtype}, here {dtype})"
        changes = f"recorded is a change by up to {largest(recorded):.3g}, measured one by up to {largest(effect_of(base, adapted)):.3g}"
        raise AttestationError(
            f"{called} has another effect here than where it was saved: the canary's log-probabilities differ by up to {gap:.3g} nats "
            f"{where}; {changes}"
        )


def check_drawn(samples: Iterable[Sample], digest: str | None, base_digest: str) -> None:
    """Every sample must come from the adapter that was asked for, by digest; None: from the base alone.

    Raises:
        AttestationError: one comes from other weights.
    """
    for sample in samples:
        drawn = sample.adapter
        if (None if drawn is None else drawn.digest) == digest and (drawn is None or drawn.base_digest == base_digest):
            continue
        asked = "the base alone" if digest is None else f"adapter {digest[:12]} on base {base_digest[:12]}"
        if drawn is None:
            raise AttestationError(f"a sample comes from the base alone, asked for was {asked}: the request lost its adapter on the way")
        found = f"adapter {drawn.name!r} version {drawn.version} ({drawn.digest[:12]}) on base {drawn.base_digest[:12]}"
        raise AttestationError(f"a sample comes from {found}, asked for was {asked}: the sampler has other weights than the request says")


# ---------------------------------------------------------------- arithmetic


def has_weights(checkpoint: Checkpoint) -> bool:
    """Whether some update B A is not zero, as far as can be seen without multiplying. False for a full copy: it may be the base's."""
    weights = checkpoint.weights
    pairs = [(weights[key], weights.get(key.replace(".lora_B.", ".lora_A."))) for key in weights if ".lora_B." in key]
    return any(a is not None and a.any() and b.any() for b, a in pairs)


def effect_of(base: Sample, adapted: Sample) -> Floats:
    return _row(adapted) - _row(base)


def largest(gaps: Floats) -> float:
    """In absolute value; NaN if one is."""
    return float(np.abs(gaps).max())


def _row(sample: Sample) -> Floats:
    assert sample.prompt_logprobs is not None
    return sample.prompt_logprobs[1:]
