"""The same weights, prompts and work on Veneer's side and on its peers': transformers, PEFT, plain autograd."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen3Config

from measure import ROOT, Json, resolve_device
from veneer.assets import NANO_FOLDER
from veneer.engine import LoraEngine, load_base, set_threads
from veneer.types import Datum, Engine, LoraConfig, SamplingParams, Tokens

RANK, ALPHA = 8, 32
MODELS = ROOT / ".bench/models"
SHAPES: dict[str, Json] = {
    "25m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "nano-8k": {"max_position_embeddings": 8192},
    "nano-150k": {"vocab_size": 151936},
}
"""Differences to nano's configuration; the weights are random, from seed 0."""


def model_folder(name: str) -> str:
    """Where a model lies that every side can load; random ones are made on first use."""
    if name == "nano":
        return str(NANO_FOLDER)
    folder = MODELS / name
    if not (folder / "config.json").exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=MODELS))
        torch.manual_seed(0)
        own = json.loads((NANO_FOLDER / "config.json").read_text()) | SHAPES[name]
        own["layer_types"] = ["full_attention"] * own["num_hidden_layers"]
        AutoModelForCausalLM.from_config(Qwen3Config(**own), dtype=torch.float32).save_pretrained(unfinished)
        for part in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(NANO_FOLDER / part, unfinished)
        os.replace(unfinished, folder)
    return str(folder)


def prepare(request: Json) -> str:
    """Set the number of threads; returns the device."""
    set_threads(request["threads"])
    return resolve_device(request["device"])


def dtype_on(device: str) -> torch.dtype:
    """What ``load_base`` computes in."""
    return torch.float32 if device == "cpu" else torch.bfloat16


# ---------------------------------------------------------------- models


def veneer_engine(model: str, device: str, adapters: int, rank: int = RANK) -> Any:
    """An engine with adapters a0, a1, ..."""
    engine = LoraEngine(load_base(model_folder(model), device))
    for i in range(adapters):
        engine.create_adapter(f"a{i}", LoraConfig(rank=rank, alpha=ALPHA, seed=i))
    return engine


def plain_model(model: str, device: str) -> Any:
    """transformers' own, which never stops before max_new_tokens."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_folder(model), dtype=dtype_on(device))
    loaded = loaded.to(torch.device(device)).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


def peft_config(rank: int = RANK) -> PeftConfig:
    return PeftConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def peft_model(model: str, device: str, adapters: int, rank: int = RANK) -> Any:
    """PEFT's, with adapters a0, a1, ... on the linear maps that Veneer adapts."""
    wrapped = get_peft_model(plain_model(model, device), peft_config(rank), adapter_name="a0")
    for i in range(1, adapters):
        wrapped.add_adapter(f"a{i}", peft_config(rank))
    return wrapped.eval()


# ---------------------------------------------------------------- sampling


def prompts_of(count: int, length: int, seed: int = 0) -> list[Tokens]:
    """Different prompts of ordinary tokens."""
    return list(np.random.default_rng(seed).integers(3, 300, (count, length)))


def veneer_sample(
    engine: Engine, prompts: Sequence[Tokens], n: int, budgets: Sequence[int], adapters: Sequence[str | None], seed: int
) -> int:
    """Draw n completions of every prompt, to ``budgets`` tokens prompt by prompt; returns how many tokens came."""
    futures = [
        engine.sample(prompt, adapter, SamplingParams(max_tokens=budget, stop_token_ids=(), seed=seed), n=n)
        for prompt, budget, adapter in zip(prompts, budgets, adapters, strict=True)
    ]
    return sum(len(sample.tokens) for future in futures for sample in future.result())


@torch.no_grad()
def generate(model: Any, rows: Sequence[Tokens], tokens: int, adapter_names: Sequence[str] | None = None) -> int:
    """transformers' ``generate`` over rows of one length; returns how many tokens came."""
    ids = torch.from_numpy(np.stack(rows)).to(model.device)
    more = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        pad_token_id=0,
        **more,
    )
    return int(out.shape[0] * (out.shape[1] - ids.shape[1]))


class ContinuousBatching:
    """transformers' own continuous batching, kept running between calls."""

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        """``rows`` that run at once, of at most ``tokens`` tokens with their prompts."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        page = 256
        config = ContinuousBatchingConfig(page_size=page, num_blocks=rows * -(-tokens // page) + 8, max_batch_tokens=2048)
        drawing = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
        self.manager = model.init_continuous_batching(generation_config=drawing, continuous_batching_config=config)
        self.manager.start()

    def __call__(self, rows: Sequence[Tokens], budgets: Sequence[int]) -> int:
        for row, budget in zip(rows, budgets, strict=True):
            self.manager.add_request(row.tolist(), max_new_tokens=budget)
        done, tokens, end = 0, 0, time.monotonic() + 300
        while done < len(rows):
            answer = self.manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                done, tokens = done + 1, tokens + len(answer.generated_tokens)
            if not self.manager.is_running() or time.monotonic() > end:
                raise RuntimeError(f"it stopped after {done} of {len(rows)} rows: {getattr(answer, 'error', None)}")
        return tokens

    def close(self) -> None:
        self.manager.stop(block=True, timeout=5)
        self.manager.destroy()


# ---------------------------------------------------------------- training


def datums_of(prompts: Sequence[Tokens], lengths: Sequence[int], vocab: int, seed: int = 0) -> list[Datum]:
    """A datum per prompt: a random completion of the given length, drawn as if uniformly, and a random advantage."""
    rng, data = np.random.default_rng(seed), []
    for prompt, length in zip(prompts, lengths, strict=True):
        row = np.concatenate([prompt, rng.integers(3, min(vocab, 300), length)])
        mask = np.zeros(len(row) - 1, np.float32)
        mask[len(prompt) - 1 :] = 1
        logprobs = mask * np.float32(-np.log(vocab))
        data.append(Datum(row[:-1], row[1:], logprobs, mask * np.float32(rng.normal() / len(prompts)), mask))
    return data


class AutogradBatch:
    """The same data as a batch padded on the right, and its importance-sampling loss by plain autograd.

    Prompts have one length, so logits are only made from the first completion position on."""

    def __init__(self, data: Sequence[Datum], device: str) -> None:
        length, self.start = max(len(d.tokens) for d in data), int(np.flatnonzero(data[0].mask)[0])

        def padded(name: str) -> Tensor:
            return torch.from_numpy(np.stack([np.pad(getattr(d, name), (0, length - len(d.tokens))) for d in data])).to(device)

        self.tokens, self.kept = padded("tokens"), length - self.start
        self.targets, self.logprobs, self.advantages = (padded(n)[:, self.start :] for n in ("targets", "logprobs", "advantages"))
        ragged = len({len(d.tokens) for d in data}) > 1
        real = torch.arange(length, device=device) < torch.tensor([[len(d.tokens)] for d in data], device=device)
        self.attention = {"attention_mask": real.long()} if ragged else {}

    def backward(self, model: Any, *, all_logits: bool = False) -> float:
        """Forward, loss and backward; the gradient is left in the model. ``all_logits``: make the prompts' logits too."""
        keep = {} if all_logits else {"logits_to_keep": self.kept}
        logits = model(input_ids=self.tokens, use_cache=False, **self.attention, **keep).logits[:, -self.kept :].float()
        lp = logits.gather(2, self.targets[..., None])[..., 0] - logits.logsumexp(-1)
        loss = -((lp - self.logprobs).exp() * self.advantages).sum()
        loss.backward()
        return float(loss.detach())


# ---------------------------------------------------------------- arithmetic


def linear_sizes(model: Any) -> tuple[int, int]:
    """Multiply-adds per token of a transformers model's linear maps: of its body, and of its unembedding."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features * m.out_features for m in linears if m is not head), head.in_features * head.out_features


def adapter_size(model: Any, rank: int) -> int:
    """Multiply-adds per token of an adapter on all linear maps but the unembedding."""
    head = model.get_output_embeddings()
    return sum(rank * (m.in_features + m.out_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def cache_bytes_per_token(model: str, device: str) -> int:
    """Keys and values of one token in all layers."""
    config = AutoConfig.from_pretrained(model_folder(model))
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_on(device).itemsize
