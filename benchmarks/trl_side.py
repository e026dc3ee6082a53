"""TRL's side of rl_step.py: GRPOTrainer with PEFT. Runs in a virtual environment that has TRL and no Veneer.

The request names the model's folder, the questions, how many completions of how many tokens each gets, and the steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from measure import Json, device_peak_mb, peak_mb, resolve_device


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def timed(function: Any, seconds: list[float]) -> Any:
    """The function, with the time of each call kept."""

    def call(*args: Any, **kwargs: Any) -> Any:
        clock = time.perf_counter()
        answer = function(*args, **kwargs)
        seconds.append(time.perf_counter() - clock)
        return answer

    return call


def coin(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def config_of(request: Json, folder: str, device: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        max_steps=request["steps"],
        per_device_train_batch_size=request["prompts"] * request["group"],
        num_generations=request["group"],
        max_completion_length=request["tokens"],
        generation_kwargs={"min_new_tokens": request["tokens"]},
        beta=0.0,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def work(request: Json) -> Json:
    """Seconds of each step, of the calls of ``generate`` in it, and memory peaks in MiB."""
    torch.set_num_threads(request["threads"])
    device, clock, sampling = resolve_device(request["device"]), Clock(), []
    model: Any = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model.generate = timed(model.generate, sampling)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=coin,
            args=config_of(request, folder, device),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in request["questions"]]),
            processing_class=AutoTokenizer.from_pretrained(request["folder"]),
            peft_config=LoraConfig(r=request["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    assert len(sampling) == len(clock.seconds), "generate was not called once a step"
    return {"seconds": clock.seconds, "sampling": sampling, "peak_mb": peak_mb(), "device_peak_mb": device_peak_mb(device)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True, help="the request, JSON")
    print(json.dumps(work(json.loads(parser.parse_args().worker))))
