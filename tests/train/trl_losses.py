"""What TRL's own trainers make of random ragged batches, recorded beside this file for test_trl.py.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2 transformers==5.23.0
    trl/bin/python tests/train/trl_losses.py

A real ``GRPOTrainer`` or ``RLOOTrainer`` is made on the bundled base. Three of its methods are given their results: what was generated,
its rewards, and the log-probabilities of the model. All else is TRL's: advantages, masks, importance-sampling ratios, counts, the loss
and its gradient with respect to each token's log-probability and entropy.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

NANO = Path(__file__).parents[2] / "src/veneer/assets/nano"
MOST, GROUP = 10, 4
VLLM = {"vllm_importance_sampling_clip_max": 1.2}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo_with_kl": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
    "dapo_with_entropy": {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "rloo": {"trainer": "rloo", "at": "old"},
    "rloo_of_one_token": {"trainer": "rloo", "lengths": 1},
    **{
        f"grpo_{mode}": {"loss_type": "grpo", "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": 0.8, **VLLM}
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
}
"""Settings of the trainer. Ours are ``trainer``, ``lengths`` of all answers, and which log-probabilities the loss is taken ``at``."""


def random_batch(seed: int, lengths: int | None) -> dict[str, Any]:
    """Four groups of four answers, the third with one reward, some cut off; log-probabilities of all that could have made them."""
    rng = np.random.default_rng(seed)
    count = 4 * GROUP
    sizes = [lengths or int(n) for n in rng.integers(1, MOST + 1, count)]
    rewards = rng.normal(0.3, 0.7, count).round(3)
    rewards[8:12] = 0.5
    old = [rng.normal(-2, 0.7, n) for n in sizes]
    # the rows move by different amounts, so that whole sequences are clipped on either side
    moved = {name: [lp + rng.normal(rng.normal(0, 0.1), 0.25, len(lp)) for lp in old] for name in ("lp", "sampler", "reference")}
    return {
        "rewards": [float(r) for r in rewards],
        "truncated": [bool(t) for t in rng.uniform(size=count) < 0.25],
        "old": floats(old),
        **{name: floats(rows) for name, rows in moved.items()},
        "entropy": floats([rng.uniform(0.1, 2, n) for n in sizes]),
    }


def floats(rows: list[Any]) -> list[list[float]]:
    """Exactly what float32 holds."""
    return [[float(x) for x in np.asarray(row, np.float32)] for row in rows]


def padded(rows: list[list[float]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1.0] * (width - len(row)) for row in rows])


def trainer_of(settings: dict[str, Any], folder: str) -> Any:
    settings = dict(settings)
    is_rloo = settings.pop("trainer", "grpo") == "rloo"
    for ours in ("lengths", "at"):
        settings.pop(ours, None)
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": 4 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": MOST,
        "num_iterations": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "beta": 0.0,
    }
    config, trainer = (trl.RLOOConfig, trl.RLOOTrainer) if is_rloo else (trl.GRPOConfig, trl.GRPOTrainer)
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=config(**common | settings),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(NANO),
    )


def record(settings: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    """TRL's advantages, loss and gradients."""
    is_rloo = settings.get("trainer") == "rloo"
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(settings, folder)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    end = trainer._tokenizer.eos_token_id
    other = end + 1
    answers = [[other] * (len(lp) - 1) + [other if cut else end] for lp, cut in zip(batch["lp"], batch["truncated"], strict=True)]
    trainer.use_vllm = "vllm_importance_sampling_mode" in settings
    sampler = batch["sampler"] if trainer.use_vllm else None
    prompts = [[other]] * len(answers)
    trainer._generate = lambda _: (
        (prompts, answers, ["x"] * len(answers)) if is_rloo else (prompts, answers, None, ["x"] * len(answers), sampler, {}, None, None)
    )
    trainer._calculate_rewards = lambda *_: torch.tensor(batch["rewards"])[:, None]
    # the trainer asks for the weights before the step, then for the reference if there is a beta
    given = [padded(batch["old"])] + ([padded(batch["reference"])] if "beta" in settings else [])
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (given.pop(0), None, None)
    inputs = trainer._generate_and_score_completions([{"prompt": "1"}] * len(answers))
    assert not given, "TRL did not read all that it was given"
    lp = padded(batch[settings.get("at", "lp")]).requires_grad_()
    entropy = padded(batch["entropy"]).requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (lp, entropy, None)
    loss = trainer._compute_loss(trainer.model, inputs)
    by_lp, by_entropy = torch.autograd.grad(loss, [lp, entropy], allow_unused=True)

    def cut(gradient: torch.Tensor | None) -> list[list[float]] | None:
        return None if gradient is None else [row[: len(own)] for row, own in zip(gradient.tolist(), batch["lp"], strict=True)]

    return {
        "settings": settings,
        "advantages": inputs["advantages"].tolist(),
        "loss": float(loss.detach()),
        "by_lp": cut(by_lp),
        "by_entropy": cut(by_entropy) if settings.get("entropy_coef") else None,
    }


def main() -> None:
    batches = {"ragged": random_batch(1, None), "one_token": random_batch(1, 1)}
    found = {name: record(settings, batches["one_token" if settings.get("lengths") else "ragged"]) for name, settings in CASES.items()}
    versions = {"trl": trl.__version__, "torch": torch.__version__.partition("+")[0]}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"versions": versions, "max_tokens": MOST, "batches": batches, "cases": found}) + "\n")
    for name, case in found.items():
        print(f"{name}: {case['loss']:.6g}")


if __name__ == "__main__":
    main()
