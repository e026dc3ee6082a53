"""What the server must agree with and none of us wrote: transformers' model, PEFT's adapter, torch's autograd and AdamW."""

from __future__ import annotations

import tempfile
import urllib.request
from collections.abc import Sequence
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tinker import types
from torch import Tensor
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
_EXPORTS = iter(range(1_000_000))


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(environ["ACCEPTANCE_BASE"], dtype=torch.float32).eval()


def logits_of(model: Any, tokens: Sequence[int]) -> Tensor:
    """float32 [N, vocabulary]."""
    return model(input_ids=torch.tensor([list(tokens)])).logits[0]


def target_logprobs(model: Any, datum: types.Datum) -> Tensor:
    """Of every target, [N] or [N, K]."""
    logprobs = torch.log_softmax(logits_of(model, datum.model_input.to_ints()), -1)
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    return logprobs.gather(-1, targets.reshape(len(targets), -1)).reshape(targets.shape)


# ---------------------------------------------------------------- the server's adapters, opened by PEFT


def export(model: tinker.TrainingClient, folder: Path | None = None) -> Path:
    """The model's weights as files, fetched by plain GETs without a key."""
    path = model.save_weights_external(f"export-{next(_EXPORTS)}").result().path
    return fetch(path, folder or Path(tempfile.mkdtemp(prefix="export-", dir=".")))


def fetch(path: str, folder: Path) -> Path:
    urls = tinker.RestClient().get_external_weights_urls(path).result().urls
    for name, url in urls.items():
        target = folder / name
        assert target.resolve().is_relative_to(folder.resolve()), name
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response:
            body = response.read()
            assert int(response.headers["Content-Length"]) == len(body), f"{name}: wrong Content-Length"
        target.write_bytes(body)
    return folder


def weights_of(model: tinker.TrainingClient) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    return load_file(export(model) / "adapter_model.safetensors")


def open_peft(folder: Path) -> Any:
    """PEFT's model over the bundled base, ready to train: dropout is off, so that it is the same function in both modes."""
    return PeftModel.from_pretrained(base_model(), str(folder), is_trainable=True).eval()


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Under the names of the adapter's file."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- losses, from their formulas


def loss_of(model: Any, data: Sequence[types.Datum], loss_fn: str, config: dict[str, float]) -> Tensor:
    """The plain sum over tokens and datums."""
    return torch.stack([datum_loss(target_logprobs(model, d), d, loss_fn, config) for d in data]).sum()


def datum_loss(lp: Tensor, datum: types.Datum, loss_fn: str, config: dict[str, float]) -> Tensor:
    """``lp``: log-probabilities of the targets. Formulas: https://tinker-docs.thinkingmachines.ai/losses"""
    inputs = {name: tensor.to_torch() for name, tensor in datum.loss_fn_inputs.items()}
    w = inputs.get("weights", torch.ones_like(lp))
    if loss_fn == "cross_entropy":
        return -(w * lp).sum()
    q, advantages = inputs["logprobs"], inputs["advantages"]
    low = inputs.get("clip_low_threshold", config.get("clip_low_threshold"))
    high = inputs.get("clip_high_threshold", config.get("clip_high_threshold"))
    ratio = (lp - q).exp()
    if loss_fn == "gspo":
        mask = inputs.get("sequence_ratio_mask", (w != 0).float())
        ratio = (((lp - q).detach() * mask).sum() / mask.sum()).exp() * (lp - lp.detach()).exp()
    if loss_fn in ("ppo", "gspo"):
        return -(w * torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)).sum()
    if loss_fn == "cispo":
        return -(w * ratio.detach().clamp(low, high) * advantages * lp).sum()
    if loss_fn == "dro":
        return -(w * (advantages * lp - 0.5 * config["beta"] * (lp - q).square())).sum()
    assert loss_fn == "importance_sampling", loss_fn
    return -(w * ratio * advantages).sum()


def gradients_of(model: Any, data: Sequence[types.Datum], loss_fn: str, config: dict[str, float]) -> dict[str, np.ndarray]:
    """Of PEFT's parameters, by autograd."""
    model.zero_grad()
    loss_of(model, data, loss_fn, config).backward()
    return {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy() for name, p in trained_parameters(model).items()
    }
