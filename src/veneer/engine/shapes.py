"""The shape of any causal language model that transformers knows, from its config.json alone: it is built on torch's meta device, where
tensors have shapes and no numbers, and its modules are walked. No weights are read and nothing is downloaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from veneer.assets import known_configs, resolve_base
from veneer.shapes import Attention, Kind, LinearMap, ModelShape, Rest
from veneer.types import BaseError, in_one_line

CLOSING = re.compile(r"(^|\.)(o_proj|out_proj|dense|c_proj|wo|down_proj|fc2|w2|dense_4h_to_h|fc_out)$")
"""Names of maps that read what their block made."""
ELSEWHERE = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal|mtp)")
"""Parts of a model that a token of text does not go through."""
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "top_k")
"""What configurations call the number of experts that a token goes through."""
LINEAR_ATTENTION = ("linear_attention", "mamba", "conv", "recurrent", "hybrid")
LIKE = "llama"
"""Whose layers those of an architecture that transformers does not know are counted as, if its configuration has these numbers:"""
NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MORE = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings")


def count_shape(source: str | Mapping[str, Any]) -> ModelShape:
    """Of a model by name (``nano``, one of ``assets/configs.json``, one in the hub's cache here), a folder, a config.json, or its content.

    Raises:
        BaseError: it is none of these, or transformers does not know the architecture and its configuration does not say enough.
    """
    name, values = (source, _read(source)) if isinstance(source, str) else (str(source.get("_name_or_path") or "model"), dict(source))
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        shape = count_shape(_likened(name, values))
        return replace(shape, architecture=f"{kind} as {shape.architecture}", doubts=[_likeness(str(kind)), *shape.doubts])
    try:
        config = CONFIG_MAPPING[kind].from_dict(values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        shape = None if head is None else _walk(name, model, head, config.get_text_config())
    except Exception as error:  # every architecture checks its configuration in its own way
        raise BaseError(f"base {name!r}: transformers cannot build a causal language model of it ({in_one_line(error)})") from error
    if shape is None:
        raise BaseError(f"base {name!r}: {type(model).__name__} has no unembedding, it is no causal language model")
    return shape


def _likened(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of what transformers does not know, as that of what it is counted as.

    Raises:
        BaseError: it says nothing of its kind, reads and writes apart, lacks a number, or has experts, which configurations describe in
            too many ways.
    """
    missing = [key for key in ("model_type", *NUMBERS) if not isinstance(values.get(key), int if key in NUMBERS else str)]
    other = [key for key in values if values[key] and ("expert" in key or key == "is_encoder_decoder")]
    if not missing and not other:
        return {**{key: values[key] for key in (*NUMBERS, *MORE) if values.get(key) is not None}, "model_type": LIKE, "_name_or_path": name}
    why = f"has no {', '.join(missing)}" if missing else f"has {', '.join(other)}"
    raise BaseError(
        f"base {name!r}: transformers does not know model_type {values.get('model_type')!r}, and its configuration {why}, so its layers "
        f"cannot be counted; give a config.json of an architecture that it knows and that has the same layers, or install a newer "
        f"transformers"
    )


def _likeness(kind: str) -> str:
    return (
        f"transformers does not know model_type {kind!r}: its layers are counted as those of a Llama of the same {', '.join(NUMBERS)} (and "
        f"{', '.join(MORE)}, where it has them), with q, k, v, o, gate, up and down in each; what else they have is not counted, and it "
        f"can be trained only where transformers knows it"
    )


def _read(name: str) -> dict[str, Any]:
    """The content of a config.json."""
    known = known_configs()
    if name in known:
        return known[name]
    path = Path(resolve_base(name))
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        try:
            path = Path(cached_file(name, "config.json", local_files_only=True) or "")
        except Exception as error:  # the hub has errors of its own for every way in which there is none
            raise BaseError(
                f"base {name!r}: no such folder or config.json, not in the hub's cache here, and its shape is not built in (those of "
                f"{', '.join(sorted({n.partition('/')[2] for n in known if '-Instruct' not in n and '-Base' not in n}))} are); give a "
                f"folder or a config.json"
            ) from error
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaseError(f"base {name!r}: {path} cannot be read ({in_one_line(error)})") from error
    if not isinstance(values, dict):
        raise BaseError(f"base {name!r}: {path} is no model's configuration")
    return values


def _walk(name: str, model: nn.Module, head: nn.Module, config: PretrainedConfig) -> ModelShape:
    seen, doubts = Counter[int](), list[str]()
    maps = list(_maps(model, head, config, seen, doubts))
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    parameters = {id(p): p.numel() for p in model.parameters()}
    shared = sum(seen[key] > 1 for key in seen)
    if shared:
        doubts.append(f"{shared} tensors serve several linear maps, each of which is counted: an adapter that they share would be smaller")
    return ModelShape(
        Path(name).name if Path(name).is_dir() else name,
        type(model).__name__,
        _staged(sorted(maps, key=lambda m: m.kind == "unembedding")),
        _attention(config),
        sum(parameters.values()),
        head.weight is embedding.weight,
        int(config.num_hidden_layers),
        int(config.hidden_size),
        int(config.vocab_size),
        int(getattr(config, "max_position_embeddings", None) or 2**31),
        _rest(model, seen, parameters),
        doubts,
    )


# ---------------------------------------------------------------- linear maps


def _maps(model: nn.Module, head: nn.Module, config: PretrainedConfig, seen: Counter[int], doubts: list[str]) -> Iterator[LinearMap]:
    """In model order; ``seen`` notes the parameters that they are made of."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        cubes = {key: p for key, p in own.items() if p.ndim == 3}
        if module is head:
            d_out, d_in = own["weight"].shape
            seen.update(map(id, own.values()))
            yield LinearMap(name, "unembedding", d_in, d_out)
        elif isinstance(module, nn.Linear | Conv1D):
            d_out, d_in = own["weight"].shape if isinstance(module, nn.Linear) else own["weight"].shape[::-1]
            seen.update(map(id, own.values()))
            yield LinearMap(name, _kind(name), d_in, d_out, active=0 if ELSEWHERE.search(name) else 1, closes=_closes(name))
        elif cubes and "expert" in f"{name} {type(module).__name__}".lower():
            active = _active(config, name, len(next(iter(cubes.values()))), doubts)
            for key, cube in cubes.items():
                seen[id(cube)] += 1
                yield from _experts(f"{name}.{key}", module, cube, active, int(config.hidden_size))
            seen.update(id(p) for key, p in own.items() if key.endswith("bias"))
        elif "Router" in type(module).__name__ and "weight" in own and own["weight"].ndim == 2:
            seen[id(own["weight"])] += 1
            d_out, d_in = own["weight"].shape
            yield LinearMap(name, "other", d_in, d_out)


def _kind(name: str) -> Kind:
    """The engine's rule (``engine/lora.py``): attention by name, everything else with the MLPs; but routers and other senses apart."""
    if ELSEWHERE.search(name) or re.search(r"(^|\.)(router|gate|shared_expert_gate)$", name):
        return "other"
    if ".experts." in name:
        return "expert"
    return "attention" if "attn" in name or "attention" in name else "mlp"


def _closes(name: str) -> bool:
    return CLOSING.search(name) is not None


def _active(config: PretrainedConfig, name: str, experts: int, doubts: list[str]) -> int:
    """How many of a layer's experts a token goes through."""
    for key in ACTIVE:
        value = getattr(config, key, None)
        value = max(value) if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and 1 <= value <= experts:
            return value
    doubts.append(f"{name}: the configuration does not say how many of its {experts} experts a token goes through; counted as all")
    return experts


def _experts(name: str, module: nn.Module, cube: nn.Parameter, active: int, hidden: int) -> Iterator[LinearMap]:
    """The maps in a tensor [experts, d_out, d_in], or [experts, d_in, d_out] as some architectures have it; gate and up are two."""
    copies, one, other = cube.shape
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = one == hidden and other != hidden if "down" not in name else other == hidden and one != hidden
    d_in, d_out = (one, other) if transposed else (other, one)
    if "gate_up" not in name:
        yield LinearMap(name, "expert", d_in, d_out, copies, active, closes=_closes(name))
        return
    for part in ("gate", "up"):
        yield LinearMap(name.replace("gate_up", part), "expert", d_in, d_out // 2, copies, active)


def _staged(maps: Sequence[LinearMap]) -> list[LinearMap]:
    """With their stages: maps of one block share an input unless they close it."""
    found = list[LinearMap]()
    stage, last = -1, None
    for m in maps:
        block = m.name.rpartition(".")[0]
        if block != last or m.closes:
            stage += 1
        last = None if m.closes else block
        found.append(LinearMap(m.name, m.kind, m.d_in, m.d_out, m.copies, m.active, stage, m.closes))
    return found


# ---------------------------------------------------------------- what is no linear map


def _attention(config: PretrainedConfig) -> list[Attention]:
    """From the configuration: layers that attend, those that are alike together. Layers of linear attention and the like have none."""
    count, window = int(config.num_hidden_layers), getattr(config, "sliding_window", None)
    layers: Sequence[Any] = getattr(config, "per_layer_config", None) or [config] * count
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    found = Counter[Attention]()
    for kind, layer in zip(kinds, layers, strict=False):
        heads = int(getattr(layer, "num_attention_heads", None) or 0)
        if not heads or any(word in kind for word in LINEAR_ATTENTION):
            continue
        dim = int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
        kv_heads, qk_dim, v_dim = int(getattr(layer, "num_key_value_heads", None) or heads), dim, dim
        if getattr(layer, "kv_lora_rank", None):  # latent attention; transformers caches what it is unfolded to
            kv_heads, qk_dim, v_dim = heads, int(layer.qk_nope_head_dim + layer.qk_rope_head_dim), int(layer.v_head_dim)
        sees = int(window) if window and ("sliding" in kind or "chunked" in kind) else None
        found[Attention(1, heads, kv_heads, qk_dim, v_dim, sees)] += 1
    return [replace(one, layers=number) for one, number in found.items()]


def _rest(model: nn.Module, seen: Mapping[int, int], parameters: Mapping[int, int]) -> list[Rest]:
    """By class, what holds parameters that no linear map has."""
    found: dict[str, tuple[str, int, bool]] = {}
    counted = set(seen)
    for name, module in model.named_modules():
        fresh = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        if not fresh:
            continue
        counted.update(map(id, fresh))
        kind = type(module).__name__
        example, numbers, known = found.get(kind, (name, 0, isinstance(module, nn.Embedding) or "Norm" in kind))
        found[kind] = example, numbers + sum(parameters[id(p)] for p in fresh), known
    return [Rest(kind, example, numbers, known) for kind, (example, numbers, known) in found.items()]
