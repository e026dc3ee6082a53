"""PEFT LoRA folders that others made, as checkpoints of ours: represented exactly, or refused by name.

An adapter of ours has one rank and one alpha. Where PEFT gives modules ranks and alphas of their own, the narrow ones are
filled up with zeros, and the ratio between the scales goes into B, if every product is a float32. Rules read in peft 0.21:
``peft/tuners/lora/model.py: _create_and_replace``, ``layer.py: update_layer``, ``utils/other.py: get_pattern_key``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from veneer.digest import digest_adapter
from veneer.store.adapters import ALORA, CONFIG, PEFT_PREFIX, WEIGHTS
from veneer.types import Adapter, AdapterError, Checkpoint, LoraConfig, in_one_line

Float32 = NDArray[np.float32]
IsBase = Callable[[str, Float32], bool]
PICKLE = "adapter_model.bin"
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", ALORA}
"""Settings that are represented."""
SAYS_NOTHING = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the weights say what is adapted
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),  # of what must be off
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # PiSSA, OLoRA, LoftQ, CorDA, MiCA read or change the base as they load
}
"""Settings that may have these values, or be absent, empty or false, as any other must be."""
LARGEST = 29
"""Bits of a factor whose product with a float32 is a float64 exactly."""


@dataclass(frozen=True)
class Module:
    """One adapted module: A [rank, d_in], B [d_out, rank], and (alpha / rank)^2, or alpha^2 / rank for rsLoRA."""

    a: Float32
    b: Float32
    scale_squared: Fraction

    @property
    def rank(self) -> int:
        return len(self.a)


def read_peft(folder: Path, name: str, base_id: str, base_digest: str, is_base: IsBase | None = None) -> tuple[Checkpoint, dict[str, Any]]:
    """A PEFT LoRA folder as a sampler checkpoint for the given base, and the facts that its manifest is to keep. Shapes are compared
    with the base when an engine loads it.

    PEFT saves the unembedding along with an adapter of it; ``is_base`` says whether the base holds these numbers under a name, so
    that a copy can be left out.

    Raises:
        AdapterError: the folder is damaged, or asks for something that cannot be represented exactly (named in the message).
    """
    if (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder}: {PICKLE} is a pickle, which can run code when it is read; save it as {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = _load_float32(folder / WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"r is {rank}, lora_alpha is {alpha}")
    except AdapterError:
        raise
    except Exception as error:  # json, safetensors and the file system each raise their own
        raise AdapterError(f"{folder} is no readable PEFT folder ({in_one_line(error)})") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA can be imported")
    for key, value in config.items():
        if key not in READ | SAYS_NOTHING and value and value not in HARMLESS.get(key, ()):
            raise AdapterError(f"{folder}: {key} = {json.dumps(value)} cannot be represented; only plain LoRA can be imported")
    modules = _modules(folder, config, tensors, is_base)
    lora, weights = _in_one_scale(folder, config, modules)
    facts = {ALORA: [int(token) for token in config[ALORA]]} if config.get(ALORA) else {}
    return Checkpoint("sampler", Adapter(name, 0, digest_adapter(weights, lora), base_id, base_digest), lora, weights), facts


# ---------------------------------------------------------------- tensors


def _load_float32(path: Path) -> dict[str, Float32]:
    """Every tensor of a safetensors file, widened to float32: exact from bfloat16, which numpy does not know, and float16."""
    arrays: dict[str, Float32] = {}
    for name, tensor in deserialize(path.read_bytes()):
        if tensor["dtype"] not in ("BF16", "F16", "F32"):
            raise AdapterError(f"{path}: tensor {name!r} is {tensor['dtype']}; only F32, BF16 and F16 can be imported exactly")
        if tensor["dtype"] == "BF16":
            array = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(tensor["data"], {"F32": np.float32, "F16": np.float16}[tensor["dtype"]]).astype(np.float32)
        if not np.isfinite(array).all():
            raise AdapterError(f"{path}: tensor {name!r} holds numbers that are not finite")
        arrays[name] = array.reshape(tensor["shape"])
    return arrays


def _modules(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Float32], is_base: IsBase | None) -> dict[str, Module]:
    """The adapted modules by name, each with its own rank and scale.

    Raises:
        AdapterError: a tensor is no LoRA weight, or not of the shape that the config gives it.
    """
    sides: dict[str, dict[str, Float32]] = {}
    for key, array in tensors.items():
        module, dot, side = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if key.startswith(PEFT_PREFIX) and dot and side in ("A.weight", "B.weight"):
            sides.setdefault(module, {})[side[0]] = array
        elif not _is_copy_of_base(key, array, is_base):
            raise AdapterError(f"{folder}: tensor {key!r} is no LoRA weight of a linear map; only plain LoRA can be imported")
    modules = {module: _module(folder, config, module, pair) for module, pair in sorted(sides.items())}
    if not modules:
        raise AdapterError(f"{folder}: {WEIGHTS} holds no LoRA weights")
    return modules


def _is_copy_of_base(key: str, array: Float32, is_base: IsBase | None) -> bool:
    name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    return is_base is not None and ".lora_" not in name and is_base(name, array)


def _module(folder: Path, config: Mapping[str, Any], name: str, pair: Mapping[str, Float32]) -> Module:
    try:
        rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha is {alpha}")
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(f"{folder}: rank_pattern or alpha_pattern cannot be read for {name} ({in_one_line(error)})") from error
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
        shapes = [None if side is None else side.shape for side in (a, b)]
        raise AdapterError(f"{folder}: {name} has A and B of shapes {shapes[0]} and {shapes[1]}; its rank is {rank} by {CONFIG}")
    return Module(a, b, _simplest(alpha) ** 2 / (rank if config.get("use_rslora") else rank**2))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's own rule: the first key that is the module's name, an ending of it behind a dot, or a regular expression for one."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


# ---------------------------------------------------------------- scales


def _simplest(number: float) -> Fraction:
    """The fraction of small numbers that has this float: 16 / 3 for 5.333333333333333."""
    simple = Fraction(number).limit_denominator(1 << 20)
    return simple if float(simple) == number else Fraction(number)


def _in_one_scale(folder: Path, config: Mapping[str, Any], modules: Mapping[str, Module]) -> tuple[LoraConfig, dict[str, Float32]]:
    """One rank and one alpha for all modules: zeros below A and beside B, and B times a whole number.

    Raises:
        AdapterError: the scales have no common unit, or a product is no float32.
    """
    first, rank = next(iter(modules.values())), max(module.rank for module in modules.values())
    ratios: dict[str, Fraction] = {}
    for name, module in modules.items():
        root = _root(module.scale_squared / first.scale_squared)
        if root is None:
            raise AdapterError(
                f"{folder}: {_cause(config)} gives {name} an irrational multiple of other modules' scale: no float32 holds it"
            )
        ratios[name] = root
    unit = Fraction(math.gcd(*(r.numerator for r in ratios.values())), math.lcm(*(r.denominator for r in ratios.values())))
    alpha_squared = first.scale_squared * unit**2 * rank**2
    alpha = _root(alpha_squared)
    weights: dict[str, Float32] = {}
    for name, module in modules.items():
        b = _times(module.b, ratios[name] / unit)
        if b is None:
            raise AdapterError(
                f"{folder}: {_cause(config)} scales {name} by {ratios[name] / unit} times the common unit of all scales, and B times "
                "that is not exact in float32"
            )
        missing = rank - module.rank
        weights[f"{name}.lora_A.weight"] = np.pad(module.a, ((0, missing), (0, 0)))
        weights[f"{name}.lora_B.weight"] = np.pad(b, ((0, 0), (0, missing)))
    return LoraConfig(rank, math.sqrt(alpha_squared) if alpha is None else float(alpha), target_modules=tuple(modules)), weights


def _cause(config: Mapping[str, Any]) -> str:
    return " with ".join(key for key in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(key))


def _root(square: Fraction) -> Fraction | None:
    """None: irrational."""
    root = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    return root if root * root == square else None


def _times(b: Float32, factor: Fraction) -> Float32 | None:
    """None: some product is no float32."""
    assert factor.denominator == 1, "the unit divides every scale"
    if factor.numerator.bit_length() > LARGEST:
        return None
    with np.errstate(over="ignore"):
        exact = b.astype(np.float64) * factor.numerator
        rounded = exact.astype(np.float32)
    return rounded if np.array_equal(rounded, exact) else None
