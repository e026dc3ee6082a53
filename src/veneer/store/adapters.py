"""Adapters as PEFT folders, checked on the way in and on the way out.

An adapter is ``adapter_config.json`` and ``adapter_model.safetensors``, which stock PEFT reads, a ``README.md`` card,
and ``veneer.json`` with what those leave out: digests of weights, base, tokenizer and template, lineage, scores. A training
checkpoint also holds ``optimizer.safetensors``. A fully fine-tuned copy has ``model.safetensors`` in place of PEFT's two files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

from veneer.digest import digest_adapter, digest_arrays
from veneer.store.files import new_folder
from veneer.types import Adapter, AdapterError, Canary, Checkpoint, LoraConfig, in_one_line

PEFT_PREFIX = "base_model.model."
CONFIG, WEIGHTS, FULL_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
OPTIMIZER, MANIFEST, CARD = "optimizer.safetensors", "veneer.json", "README.md"
ANOTHER = "use another version or checkpoint"
# What PEFT can express and this engine cannot; each must be absent, empty or false.
UNSUPPORTED = (
    *("use_dora", "use_rslora", "use_qalora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias"),
    *("fan_in_fan_out", "target_parameters", "trainable_token_indices", "layer_replication", "exclude_modules", "alora_invocation_tokens"),
)


def write_adapter(folder: Path, checkpoint: Checkpoint, facts: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a checkpoint; ``durable`` is ``new_folder``'s. ``facts`` go into ``veneer.json``: environment, seeds, scores, parent,
    digests of tokenizer and template."""
    manifest = {
        "format": 1,
        "kind": checkpoint.kind,
        **dataclasses.asdict(checkpoint.adapter),
        "lora": None if checkpoint.config is None else dataclasses.asdict(checkpoint.config),
        "optimizer_digest": digest_arrays(checkpoint.optimizer) if checkpoint.optimizer else None,
        "canary": None if checkpoint.canary is None else dataclasses.asdict(checkpoint.canary),
        **facts,
    }
    with new_folder(folder, durable=durable) as aside:
        if checkpoint.config is None:
            _save(checkpoint.weights, aside / FULL_WEIGHTS)
        else:
            (aside / CONFIG).write_text(json.dumps(_peft_config(checkpoint), indent=2) + "\n")
            _save({PEFT_PREFIX + name: array for name, array in checkpoint.weights.items()}, aside / WEIGHTS)
        if checkpoint.optimizer:
            _save(checkpoint.optimizer, aside / OPTIMIZER)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        (aside / CARD).write_text(_card(manifest))


def read_adapter(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Read what ``write_adapter`` wrote: the checkpoint and the whole manifest.

    Raises:
        AdapterError: something is missing, damaged, or does not match its digest.
    """
    if not (folder / MANIFEST).is_file():
        hint = "import it first: veneer adapters import" if (folder / CONFIG).is_file() else "there is no veneer.json"
        raise AdapterError(f"{folder} is no Veneer adapter; {hint}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        adapter = Adapter(*(manifest[f.name] for f in dataclasses.fields(Adapter)))
        config = None if manifest["lora"] is None else LoraConfig(**_tuples(manifest["lora"]))
        canary = Canary(**_tuples(manifest["canary"])) if manifest.get("canary") else None
        raw = load_file(folder / (FULL_WEIGHTS if config is None else WEIGHTS))
        weights = {name.removeprefix(PEFT_PREFIX): array for name, array in raw.items()}
        optimizer = load_file(folder / OPTIMIZER) if manifest["kind"] == "training" else {}
        peft = {} if config is None else json.loads((folder / CONFIG).read_text())
        if config is not None and config.rank < 1:
            raise ValueError(f"its rank is {config.rank}")
        same_shape = config is None or (peft["r"], peft["lora_alpha"]) == (config.rank, config.alpha)
    except Exception as error:  # json, safetensors and the file system each raise their own
        raise AdapterError(f"{folder} is damaged ({in_one_line(error)}); {ANOTHER}") from error
    if digest_adapter(weights, config) != adapter.digest:
        raise AdapterError(f"{folder} is damaged: weights and scale do not have the digest in {MANIFEST}; {ANOTHER}")
    if optimizer and digest_arrays(optimizer) != manifest.get("optimizer_digest"):
        raise AdapterError(f"{folder} is damaged: {OPTIMIZER} does not have the digest in {MANIFEST}; {ANOTHER}")
    if not same_shape:
        raise AdapterError(f"{folder} is damaged: r or lora_alpha in {CONFIG} is not that of {MANIFEST}; {ANOTHER}")
    return Checkpoint(manifest["kind"], adapter, config, weights, optimizer, canary), manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """``veneer.json`` as it is; empty if it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says beside the checkpoint itself."""
    own = {"format", "kind", "lora", "optimizer_digest", "canary", *(f.name for f in dataclasses.fields(Adapter))}
    return {key: value for key, value in manifest.items() if key not in own}


def recorded_base(folder: Path) -> str | None:
    """The base that a PEFT folder names, if it names one; a name, not an identity."""
    try:
        named = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and named else None


def read_peft(folder: Path, name: str, base_id: str, base_digest: str) -> Checkpoint:
    """A foreign PEFT LoRA folder as a sampler checkpoint for the given base. Shapes are checked when an engine loads it.

    Raises:
        AdapterError: the folder is damaged, or asks for something that cannot be represented exactly (named in the message).
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = {key.removeprefix(PEFT_PREFIX): array for key, array in _load_float32(folder / WEIGHTS).items()}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1:
            raise ValueError(f"r is {rank}")
    except Exception as error:
        raise AdapterError(f"{folder} is no readable PEFT folder ({in_one_line(error)})") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA can be imported")
    for key, harmless in {**dict.fromkeys(UNSUPPORTED, ()), "bias": ("none",), "init_lora_weights": (True, "gaussian")}.items():
        if config.get(key) and config[key] not in harmless:
            raise AdapterError(f"{folder}: {key} = {config[key]!r} cannot be represented; only plain LoRA can be imported")
    odd = [key for key in weights if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd:
        raise AdapterError(f"{folder}: tensor {odd[0]!r} is no LoRA weight")
    modules = sorted({key.rsplit(".", 2)[0] for key in weights})
    lora = LoraConfig(rank=rank, alpha=alpha, target_modules=tuple(modules))
    return Checkpoint("sampler", Adapter(name, 0, digest_adapter(weights, lora), base_id, base_digest), lora, weights)


def _save(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)  # it writes the buffer, whatever the strides


def _load_float32(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a safetensors file, widened to float32: exact from bfloat16, which numpy does not know, and float16."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, tensor in deserialize(path.read_bytes()):
        if tensor["dtype"] == "BF16":
            array = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(tensor["data"], {"F32": np.float32, "F16": np.float16}[tensor["dtype"]]).astype(np.float32)
        arrays[name] = array.reshape(tensor["shape"])
    return arrays


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.config is not None
    modules = sorted({name.rsplit(".", 2)[0] for name in checkpoint.weights})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.adapter.base_id,
        "revision": None,
        "r": checkpoint.config.rank,
        "lora_alpha": checkpoint.config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _card(manifest: Mapping[str, Any]) -> str:
    lines = [
        "---",
        f"base_model: {manifest['base_id']}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, reinforcement-learning, veneer]",
        "---",
        f"# {manifest['name']}",
        "",
        f"An adapter for `{manifest['base_id']}` (base digest `{manifest['base_digest'][:16]}`).",
        f"{manifest['version']} optimizer steps, digest `{manifest['digest'][:16]}`.",
        "",
    ]
    lora, scores = manifest.get("lora"), manifest.get("scores") or {}
    if lora:
        lines += [f"Rank {lora['rank']}, alpha {lora['alpha']:g}.", ""]
    for key in ("env", "seed", "parent"):
        if manifest.get(key) is not None:
            lines.append(f"- {key}: {manifest[key]}")
    for name, rate in scores.items():
        lines.append(f"- {name}: {rate['value']:.3f} (95% interval {rate['low']:.3f} to {rate['high']:.3f}, {rate['trials']} problems)")
    return "\n".join(lines) + "\n"
