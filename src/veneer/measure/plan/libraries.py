"""LoRA as other libraries have it by default, and their learning rates under our rule."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from veneer.measure.plan.figure import Figure
from veneer.measure.plan.rate import Rule, convert_rate
from veneer.types import ConfigError


@dataclass(frozen=True)
class Defaults:
    """What a user gets who gives nothing but what has to be given."""

    rank: int | None
    """None: there is none, and no adapter without one."""
    alpha: float
    targets: str
    rate: float | None
    """The learning rate of its reinforcement learning, or of the example; None: it has none of its own."""
    where: str
    """Repository and file."""
    read: str
    """The commit in which it was read, and its day."""
    note: str = ""


LINEAR = "all linear"
ATTENTION_AND_MLP = "q, k, v, o, gate, up, down"
LIBRARIES: Mapping[str, Defaults] = {
    "peft": Defaults(8, 8, "q, v of Llama and Qwen", None, "huggingface/peft src/peft/tuners/lora/config.py", "5d602fdbff04, 2026-08-21"),
    "trl": Defaults(
        16,
        32,
        "q, v of Llama and Qwen",
        1e-6,
        "huggingface/trl trl/trainer/model_config.py, grpo_config.py",
        "f2cd57710ae3, 2026-07-24",
        "the rate is for all weights",
    ),
    "verl": Defaults(
        None,
        16,
        LINEAR,
        1e-6,
        "verl-project/verl verl/trainer/config/model/hf_model.yaml, actor/actor.yaml",
        "1dda039b9c63, 2026-08-22",
        "the rate is for all weights; its example of LoRA has 3e-5 at rank 32, alpha 32",
    ),
    "skyrl": Defaults(
        None,
        16,
        LINEAR,
        1e-6,
        "NovaSky-AI/SkyRL skyrl/train/config/config.py",
        "a9564572eb8e, 2026-08-21",
        "the rate is for all weights; its examples of LoRA have 1e-5 and 3e-5",
    ),
    "prime-rl": Defaults(
        16,
        32,
        f"{ATTENTION_AND_MLP}, experts, latent projections",
        1e-6,
        "PrimeIntellect-ai/prime-rl packages/prime-rl-configs/src/prime_rl/configs/trainer.py",
        "559b44772e47, 2026-08-21",
        "the rate is for all weights; its examples of LoRA have 1e-5",
    ),
    "unsloth": Defaults(16, 16, ATTENTION_AND_MLP, 5e-5, "unslothai/unsloth unsloth/models/llama.py, rl.py", "015bdef0d94a, 2026-08-22"),
    "tinker": Defaults(
        32,
        32,
        "attention, MLP, experts, unembedding",
        1e-5,
        "thinking-machines-lab/tinker-cookbook tinker_cookbook/hyperparam_utils.py, recipes/math_rl/train.py",
        "9dfcc3a2cf44, 2026-08-19",
        "alpha cannot be set, 32 is what its authors say; other recipes have 3e-5 and 4e-5",
    ),
    "torchtune": Defaults(
        8, 16, "as given", None, "pytorch/torchtune torchtune/models/llama3_1/_model_builders.py", "bd2a0fc7c314, 2026-04-23"
    ),
    "llama-factory": Defaults(
        8,
        16,
        LINEAR,
        None,
        "hiyouga/LlamaFactory src/llamafactory/hparams/finetuning_args.py",
        "ff6d4d12eeb0, 2026-08-18",
        "alpha is twice the rank",
    ),
    "ms-swift": Defaults(8, 32, LINEAR, 1e-4, "modelscope/ms-swift swift/arguments/tuner_args.py, sft_args.py", "3602360a5623, 2026-08-22"),
    "axolotl": Defaults(
        32,
        16,
        LINEAR,
        2e-4,
        "axolotl-ai-cloud/axolotl examples/llama-3/lora-8b.yml",
        "067b021c8b87, 2026-07-24",
        "no defaults; its SFT example, which trains embeddings and unembedding whole",
    ),
    "openrlhf": Defaults(
        None, 16, LINEAR, 1e-6, "OpenRLHF/OpenRLHF openrlhf/cli/train_ppo_ray.py", "3c3be6234e0c, 2026-08-13", "the rate is for all weights"
    ),
}
"""As read in the files named; libraries change."""


def find_library(name: str) -> Defaults:
    """Raises:
    ConfigError: there is none; names the nearest.
    """
    if name.lower() not in LIBRARIES:
        near = difflib.get_close_matches(name.lower(), LIBRARIES, n=1)
        raise ConfigError(f"--from {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(LIBRARIES)}"))
    return LIBRARIES[name.lower()]


def rule_of(name: str, rank: int | None = None, alpha: float | None = None, *, root: bool = False) -> Rule:
    """A library's rule, with what a user gave in place of its defaults.

    Raises:
        ConfigError: there is no such library, or it has no default rank and none is given.
    """
    defaults = find_library(name)
    if rank is None and defaults.rank is None:
        raise ConfigError(f"--from {name}: it has no default rank; give --from-rank")
    chosen = rank or defaults.rank
    assert chosen is not None
    twice = 2.0 * chosen if name.lower() == "llama-factory" else defaults.alpha
    return Rule(chosen, twice if alpha is None else alpha, root)


def rate_from_library(
    name: str, rate: float | None, here: Rule, rank: int | None = None, alpha: float | None = None, *, root: bool = False
) -> Figure:
    """The learning rate under our rule that does what ``rate`` (None: its own) does there.

    Raises:
        ConfigError: there is no such library, or it has no rank, or no learning rate, and none is given.
    """
    defaults = find_library(name)
    chosen = rate or defaults.rate
    if chosen is None:
        raise ConfigError(f"--from {name}: it has no learning rate of its own; give --lr")
    found = convert_rate(chosen, rule_of(name, rank, alpha, root=root), here)
    note = f"{name}'s own rate ({defaults.note or defaults.where}); {found.note}" if rate is None else found.note
    return replace(found, note=note, formula=f"{chosen:g} in {name}; {found.formula}", source=f"{defaults.where}; {found.source}")


def conversion_table(here: Rule, rank: int) -> list[dict[str, Any]]:
    """Every library's defaults, alpha / rank at them (at ``rank`` where it has no rank), and between which factors its learning rates lie
    under our rule."""
    rows = list[dict[str, Any]]()
    for name, defaults in LIBRARIES.items():
        rule = rule_of(name, defaults.rank or rank)
        one = convert_rate(1.0, rule, here)
        rows.append({"library": name, **asdict(defaults), "scale": rule.scale, "factor": one.value, "factors": (one.low, one.high)})
    return rows
