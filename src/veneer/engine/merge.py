"""An adapter added to the base's own weights: W + (alpha / rank) B A, for servers that know no adapters.

What comes out is a Hugging Face folder and no adapter any more: it cannot be switched off, scaled, stacked or taken back. In 16 bits
it is also not the same: rounding W + dW keeps only what reaches the last bit of W, and says how much that was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from veneer.engine.base import read_model, tensor_digest
from veneer.engine.engine import LocalEngine
from veneer.engine.stock import stock_logprobs
from veneer.types import AdapterError, AttestationError, BaseError, Checkpoint, Datum, Floats, SamplingParams, Tokens

LIMITS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Nats by which a log-probability of the merged model, stored in that dtype and run in float32, may differ from base and adapter."""
SHARE = 0.5
"""Of the adapter's effect, by root mean square: a merged model that is further off than this is closer to having lost it."""
COMPLETIONS = 8
TOKENS = 32


@dataclass(frozen=True)
class Rounding:
    """What storing the sum cost."""

    modules: int
    """Weights that an update was added to."""
    dtype: str
    lost: float
    """|stored - exact| / |update|, Frobenius norms over all of them: 0 is all there, 1 is as much noise as update."""
    changed: float
    """Share of their numbers that are not the base's any more."""
    untied: bool
    """The unembedding was one with the embedding and is a matrix of its own now."""


@dataclass(frozen=True)
class Expected:
    """Rows of tokens with their log-probabilities under the base alone, and with the adapter."""

    rows: Sequence[Tokens]
    base: Sequence[Floats]
    adapted: Sequence[Floats]


@dataclass(frozen=True)
class Gaps:
    """Of the merged model's log-probabilities, in nats."""

    adapter: float
    """Largest, to base and adapter."""
    adapter_rms: float
    base: float
    """Largest, to the base alone."""
    base_rms: float
    limit: float


def expect(engine: LocalEngine, name: str, start: Tokens) -> Expected:
    """What base and adapter say on completions that the adapter draws behind ``start``.

    Raises:
        AttestationError: the adapter changes none of it.
    """
    params = SamplingParams(max_tokens=TOKENS, stop_token_ids=())
    drawn = engine.sample(start, name, params, COMPLETIONS).result()
    rows = [np.concatenate([start, sample.tokens]) for sample in drawn]
    base, adapted = (engine.forward(who, [_datum(row) for row in rows], "cross_entropy").result().logprobs_D for who in (None, name))
    if not any((b != a).any() for b, a in zip(base, adapted, strict=True)):
        raise AttestationError(f"adapter {name!r} changes no log-probability: merged, it would be the base again")
    return Expected(rows, base, adapted)


def _datum(row: Tokens) -> Datum:
    zeros = np.zeros(len(row) - 1, np.float32)
    return Datum(row[:-1], row[1:], zeros, zeros, zeros + 1)


def write_merged(base: str, checkpoint: Checkpoint, folder: Path, dtype: str | None) -> Rounding:
    """Fill a folder with the base's configuration, tokenizer and weights, the adapter's update in them. ``dtype`` None: as the base is
    stored.

    Raises:
        AdapterError: it was made for another base, adapts what is not there, or is a full copy.
    """
    model, tokenizer = read_model(base)
    digest = tensor_digest(model.named_parameters())
    if digest != checkpoint.adapter.base_digest:
        made_for = f"{checkpoint.adapter.base_id!r} ({checkpoint.adapter.base_digest[:12]})"
        raise AdapterError(f"adapter {checkpoint.adapter.name!r} was made for base {made_for}; {base!r} has the digest {digest[:12]}")
    rounding = add_update(model, checkpoint, None if dtype is None else getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return rounding


@torch.no_grad()
def add_update(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Rounding:
    """Add scale B A to the model's own weights, in float64, rounded once to ``dtype`` or the dtype that they have.

    Raises:
        AdapterError: it adapts what is not there, or is a full copy.
    """
    if checkpoint.config is None:
        raise AdapterError(f"{checkpoint.adapter.name!r} is a fully fine-tuned copy: there is no update to merge")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    updates = _updates(checkpoint.weights)
    missing = sorted(set(updates) - set(linears))
    if missing:
        raise AdapterError(f"adapter {checkpoint.adapter.name!r} adapts {missing[0]}, which is no linear map of this base")
    untied = _untie(model, [linears[name] for name in updates])
    scale = checkpoint.config.alpha / checkpoint.config.rank
    error = size = changed = numbers = 0.0
    for name, (a, b) in updates.items():
        weight = linears[name].weight
        if weight.shape != (len(b), a.shape[1]):
            raise AdapterError(f"adapter {checkpoint.adapter.name!r}: {name} is {tuple(weight.shape)}, its update {(len(b), a.shape[1])}")
        update = scale * (b.double() @ a.double())
        exact = weight.double() + update
        stored = exact.to(dtype or weight.dtype)
        error += float((stored.double() - exact).square().sum())
        size += float(update.square().sum())
        changed += float((stored != weight.to(stored.dtype)).sum())
        numbers += weight.numel()
        weight.data = stored
    for parameter in model.parameters():  # not model.to(dtype): rotary frequencies and other buffers stay as precise as they are
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    model.config.dtype = next(model.parameters()).dtype
    kind = str(model.config.dtype).removeprefix("torch.")
    return Rounding(len(updates), kind, (error / size) ** 0.5 if size else 0.0, changed / numbers, untied)


def _updates(weights: Mapping[str, NDArray[Any]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A [rank, d_in], B [d_out, rank])."""
    modules = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    return {m: (torch.from_numpy(weights[f"{m}.lora_A.weight"]), torch.from_numpy(weights[f"{m}.lora_B.weight"])) for m in modules}


def _untie(model: PreTrainedModel, targets: Sequence[nn.Module]) -> bool:
    """Give the unembedding a matrix of its own if it is adapted and was one with the embedding, which is not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head not in targets or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def verify_merged(folder: Path, expected: Expected, stored: str) -> Gaps:
    """Read the folder with stock transformers, run it in float32, and compare it with what base and adapter say.

    Raises:
        AttestationError: it says something else, or what the base says.
        BaseError: it cannot be read.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    model, loading = loaded
    wrong = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if wrong:
        raise BaseError(f"the merged model cannot be read back: {wrong[0]} is missing or too much")
    merged = np.concatenate(stock_logprobs(model, expected.rows))
    to_adapter, to_base = merged - np.concatenate(expected.adapted), merged - np.concatenate(expected.base)
    effect = _rms(np.concatenate(expected.adapted) - np.concatenate(expected.base))
    gaps = Gaps(_largest(to_adapter), _rms(to_adapter), _largest(to_base), _rms(to_base), LIMITS[stored])
    if not gaps.adapter <= gaps.limit or not gaps.adapter_rms <= SHARE * effect:
        off = f"it is off by up to {gaps.adapter:.3g} nats, {gaps.adapter_rms:.3g} root mean square"
        what = "says what the base says: the update is not in its weights" if gaps.base_rms < effect / 100 else "is not base and adapter"
        advice = "" if stored == "float32" else f". If rounding to {stored} loses it, merge with --dtype float32, or serve the adapter"
        raise AttestationError(f"the merged model {what} ({off}; limits {gaps.limit:g} and {SHARE * effect:.3g}){advice}")
    return gaps


def _largest(gaps: Floats) -> float:
    return float(np.abs(gaps).max())


def _rms(gaps: Floats) -> float:
    return float(np.sqrt(np.square(gaps, dtype=np.float64).mean()))
