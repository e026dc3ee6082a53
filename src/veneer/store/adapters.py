"""Adapters as PEFT folders, checked on the way in and on the way out.

An adapter is ``adapter_config.json`` and ``adapter_model.safetensors``, which stock PEFT reads, a ``README.md`` card,
and ``veneer.json`` with what those leave out: digests of weights, base, tokenizer and template, lineage, scores. A registry
adds ``veneer.sig``. A training checkpoint also holds ``optimizer.safetensors``. A fully fine-tuned copy has
``model.safetensors`` in place of PEFT's two files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from veneer.digest import digest_adapter, digest_arrays
from veneer.store.files import new_folder
from veneer.store.signature import check_signature
from veneer.types import Adapter, AdapterError, Canary, Checkpoint, LoraConfig, in_one_line

PEFT_PREFIX = "base_model.model."
CONFIG, WEIGHTS, FULL_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
OPTIMIZER, MANIFEST, CARD = "optimizer.safetensors", "veneer.json", "README.md"
ANOTHER = "use another version or checkpoint"
ALORA = "alora_invocation_tokens"
"""PEFT's name for the tokens from which on an activated adapter acts (https://arxiv.org/abs/2504.12397); a fact of ours too."""


def write_adapter(folder: Path, checkpoint: Checkpoint, facts: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a checkpoint; ``durable`` is ``new_folder``'s. ``facts`` go into ``veneer.json``: environment, seeds, scores, parents,
    digests of tokenizer and template."""
    with new_folder(folder, durable=durable) as aside:
        fill_adapter(aside, checkpoint, facts)


def fill_adapter(folder: Path, checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    """The same into a folder that is there."""
    manifest = {
        "format": 1,
        "kind": checkpoint.kind,
        **dataclasses.asdict(checkpoint.adapter),
        "lora": None if checkpoint.config is None else dataclasses.asdict(checkpoint.config),
        "optimizer_digest": digest_arrays(checkpoint.optimizer) if checkpoint.optimizer else None,
        "canary": None if checkpoint.canary is None else dataclasses.asdict(checkpoint.canary),
        **facts,
    }
    if checkpoint.config is None:
        _save(checkpoint.weights, folder / FULL_WEIGHTS)
    else:
        (folder / CONFIG).write_text(json.dumps(_peft_config(checkpoint, facts), indent=2) + "\n")
        _save({PEFT_PREFIX + name: array for name, array in checkpoint.weights.items()}, folder / WEIGHTS)
    if checkpoint.optimizer:
        _save(checkpoint.optimizer, folder / OPTIMIZER)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    (folder / CARD).write_text(_card(manifest))


def read_adapter(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Read what ``write_adapter`` wrote: the checkpoint and the whole manifest.

    Raises:
        AdapterError: something is missing, damaged, or does not match its digest or signature.
    """
    if not (folder / MANIFEST).is_file():
        hint = "import it first: veneer adapters import" if (folder / CONFIG).is_file() else "there is no veneer.json"
        raise AdapterError(f"{folder} is no Veneer adapter; {hint}")
    check_signature(folder)
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
        same = config is None or (peft["r"], peft["lora_alpha"], peft.get(ALORA)) == (config.rank, config.alpha, manifest.get(ALORA))
    except Exception as error:  # json, safetensors and the file system each raise their own
        raise AdapterError(f"{folder} is damaged ({in_one_line(error)}); {ANOTHER}") from error
    if digest_adapter(weights, config) != adapter.digest:
        raise AdapterError(f"{folder} is damaged: weights and scale do not have the digest in {MANIFEST}; {ANOTHER}")
    if optimizer and digest_arrays(optimizer) != manifest.get("optimizer_digest"):
        raise AdapterError(f"{folder} is damaged: {OPTIMIZER} does not have the digest in {MANIFEST}; {ANOTHER}")
    if not same:
        raise AdapterError(f"{folder} is damaged: r, lora_alpha or {ALORA} in {CONFIG} is not that of {MANIFEST}; {ANOTHER}")
    return Checkpoint(manifest["kind"], adapter, config, weights, optimizer, canary), manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """``veneer.json`` as it is; empty if it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says beside the checkpoint itself and its place in a registry."""
    own = {"format", "kind", "lora", "optimizer_digest", "canary", "registry", *(f.name for f in dataclasses.fields(Adapter))}
    return {key: value for key, value in manifest.items() if key not in own}


def recorded_base(folder: Path) -> str | None:
    """The base that a PEFT folder names, if it names one; a name, not an identity."""
    try:
        named = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and named else None


def _save(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)  # it writes the buffer, whatever the strides


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _peft_config(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> dict[str, Any]:
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
        **({ALORA: facts[ALORA]} if facts.get(ALORA) else {}),
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
    if manifest.get("lora"):
        lines += [f"Rank {manifest['lora']['rank']}, alpha {manifest['lora']['alpha']:g}.", ""]
    facts = {key: manifest.get(key) for key in ("stage", "env", "seed")}
    facts["made from"] = ", ".join(f"{p['reference']} ({p['digest'][:16]})" for p in manifest.get("parents") or [])
    lines += [f"- {key}: {value}" for key, value in facts.items() if value not in (None, "")]
    for score in manifest.get("scores") or []:
        interval = f"95% interval {score['low']:.3f} to {score['high']:.3f}, {score['problems']} problems, seed {score['seed']}"
        lines.append(f"- {score['env']}: {score['value']:.3f} ({interval})")
    return "\n".join(lines) + "\n"
