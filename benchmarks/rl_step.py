"""Seconds per reinforcement-learning step: Veneer beside TRL's GRPOTrainer with PEFT, interleaved in one run.

    python benchmarks/rl_step.py            # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The same work for both: the bundled base, 8 prompts x 8 completions of exactly 32 tokens, a rank-8 adapter on all linear
maps, one optimizer step, float32, no KL term, no gradient checkpointing. TRL gets a venv of its own (.bench/trl), made here.
Each round starts both programs anew, one after the other; figures are medians over the rounds of medians over the steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NANO = ROOT / "src/veneer/assets/nano"
TRL_PYTHON = ROOT / ".bench/trl/bin/python"
TRL_PACKAGES = ["torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.23.0"]
PROMPTS, GROUP, TOKENS, RANK = 8, 8, 32, 8
WARMUP = 3


def question(index: int) -> str:
    """Sums of four numbers, so that every prompt has one length."""
    return "+".join(str(10 + (index * 37 + i * 23) % 90) for i in range(4)) + "=?"


def reward_of(tokens: list[int]) -> float:
    """A coin: no group is constant for long and nothing is learned."""
    return float(sum(tokens) % 2)


# ---------------------------------------------------------------- one side each


def veneer_worker(steps: int, threads: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of the sampling in it."""
    import asyncio

    from veneer.engine import LoraEngine, load_base, set_threads
    from veneer.render import load_renderer
    from veneer.train.advantages import group_mean
    from veneer.train.datums import trajectory_to_data
    from veneer.train.rollouts import Policy, do_rollouts
    from veneer.types import AdamParams, LoraConfig, Message, Observation, SamplingParams, StepResult

    class Coin:
        def __init__(self, index: int) -> None:
            self.index = index

        async def initial_observation(self) -> Observation:
            return Observation([{"role": "user", "content": question(self.index)}])

        async def step(self, action: Message) -> StepResult:
            return StepResult(reward_of(list(str(action).encode())), episode_done=True)

    class Coins:
        name = "coins"

        def env(self, split: str, index: int) -> Coin:
            return Coin(index)

    set_threads(threads)
    engine = LoraEngine(load_base("nano"))
    engine.create_adapter("bench", LoraConfig(rank=RANK))
    params = SamplingParams(max_tokens=TOKENS, stop_token_ids=())
    policy = Policy(engine, load_renderer("nano"), "bench", params)

    async def step(number: int) -> float:
        clock = time.perf_counter()
        groups_P = await do_rollouts(policy, Coins(), "train", range(number * PROMPTS, (number + 1) * PROMPTS), GROUP, number)
        sampled = time.perf_counter() - clock
        data = [
            datum
            for group in groups_P
            for trajectory, advantage in zip(group.trajectories_G, group_mean(group.rewards_G), strict=True)
            for datum in trajectory_to_data(trajectory, advantage / (PROMPTS * GROUP))
        ]
        await engine.forward_backward("bench", data, "importance_sampling")
        await engine.optim_step("bench", AdamParams(1e-4))
        await engine.publish("bench")
        return sampled

    seconds: list[float] = []
    sampling: list[float] = []
    for number in range(steps):
        clock = time.perf_counter()
        sampling.append(asyncio.run(step(number)))
        seconds.append(time.perf_counter() - clock)
    return seconds, sampling


def trl_worker(steps: int, threads: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of the calls of ``generate`` in it."""
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            seconds.append(time.perf_counter() - self.started)

    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    sampling: list[float] = []
    generate = model.generate

    def timed_generate(*args, **kwargs):  # type: ignore[no-untyped-def]
        clock = time.perf_counter()
        answer = generate(*args, **kwargs)
        sampling.append(time.perf_counter() - clock)
        return answer

    model.generate = timed_generate
    rows = [{"prompt": [{"role": "user", "content": question(i)}]} for i in range(PROMPTS * steps)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            generation_kwargs={"min_new_tokens": TOKENS},
            beta=0.0,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completion_ids, **columns: [reward_of(ids) for ids in completion_ids],
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(NANO),
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
    assert len(sampling) == len(seconds), "generate was not called once a step"
    return seconds, sampling


def worker(side: str, steps: int, threads: int) -> dict[str, float]:
    started = time.perf_counter()
    seconds, sampling = {"veneer": veneer_worker, "trl": trl_worker}[side](steps, threads)
    step, sample = statistics.median(seconds[WARMUP:]), statistics.median(sampling[WARMUP:])
    return {
        "step_seconds": step,
        "tokens_per_second": PROMPTS * GROUP * TOKENS / step,
        "sampled_tokens_per_second": PROMPTS * GROUP * TOKENS / sample,
        "trained_tokens_per_second": PROMPTS * GROUP * TOKENS / (step - sample),
        "first_step_seconds": time.perf_counter() - started - sum(seconds[1:]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


# ---------------------------------------------------------------- both, interleaved


def ensure_trl() -> None:
    if TRL_PYTHON.exists():
        return
    print("making .bench/trl", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", TRL_PYTHON.parents[1]], check=True)
    subprocess.run([TRL_PYTHON, "-m", "pip", "install", "--quiet", *TRL_PACKAGES], check=True)


def run_worker(side: str, steps: int, threads: int) -> dict[str, float]:
    python = sys.executable if side == "veneer" else str(TRL_PYTHON)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [python, __file__, "--worker", side, "--steps", str(steps), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def matmul_peak(threads: int) -> float:
    """Float32 GFLOP/s of the best of twenty products of 1024 x 1024 matrices."""
    import torch

    torch.set_num_threads(threads)
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(20):
        clock = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - clock)
    return 2 * 1024**3 / best / 1e9


def step_gflop() -> float:
    """Multiply-adds of the linear maps in one step, counted twice: prefill once per prompt, one forward per sampled token, and
    forward plus backward through activations (no weight gradients of the base) over prompt and completion of every row."""
    from veneer.engine import load_base
    from veneer.engine.lora import linear_modules
    from veneer.render import load_renderer

    base = load_base("nano")
    sizes = {name: m.in_features * m.out_features for name, m in linear_modules(base).items()}
    head = sum(size for name, size in sizes.items() if base.model.get_submodule(name) is base.head)
    body = sum(sizes.values()) - head
    prompt = len(load_renderer("nano").build_generation_prompt([{"role": "user", "content": question(0)}]))
    rows = PROMPTS * GROUP
    sampled = body * (PROMPTS * prompt + rows * TOKENS) + head * rows * TOKENS
    trained = body * rows * (prompt + TOKENS) + head * rows * TOKENS
    return 2 * (sampled + 2 * trained) / 1e9


def measure(rounds: int, steps: int, threads: int) -> dict[str, object]:
    ensure_trl()
    runs: dict[str, list[dict[str, float]]] = {"veneer": [], "trl": []}
    for number in range(rounds):
        for side in runs:
            runs[side].append(run_worker(side, steps, threads))
            print(f"round {number + 1}: {side} {runs[side][-1]['step_seconds']:.3f} s a step", file=sys.stderr)
    medians = {side: {key: statistics.median(run[key] for run in many) for key in many[0]} for side, many in runs.items()}
    ratios = [v["step_seconds"] / t["step_seconds"] for v, t in zip(runs["veneer"], runs["trl"], strict=True)]
    peak, gflop = matmul_peak(threads), step_gflop()
    return {
        "work": f"{PROMPTS * GROUP} completions of {TOKENS} tokens, rank {RANK}, all linear maps, float32, {threads} thread(s)",
        "rounds": rounds,
        "steps": steps - WARMUP,
        **medians,
        "step_ratio_veneer_to_trl": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory_ratio_veneer_to_trl": medians["veneer"]["peak_mb"] / medians["trl"]["peak_mb"],
        "matmul_peak_gflops": peak,
        "gflop_per_step": gflop,
        "share_of_matmul_peak": gflop / peak / medians["veneer"]["step_seconds"],
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), "packages": TRL_PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def page(results: list[dict]) -> str:  # type: ignore[type-arg]
    """RESULTS.md as this command writes it."""
    lines = [
        "# Benchmarks",
        "",
        "Written by the commands named below; figures are medians, and only ratios carry over to other machines.",
        "",
        "## `make bench`: one RL step beside TRL + PEFT",
        "",
    ]
    return "\n".join(lines + [line for result in results for line in section(result)])


def section(result: dict) -> list[str]:  # type: ignore[type-arg]
    lines = [
        f"{result['work']}; {result['rounds']} interleaved rounds of {result['steps']} steps, {result['date']}.",
        "",
        "| | Veneer | TRL + PEFT |",
        "|---|---|---|",
    ]
    v, t = result["veneer"], result["trl"]
    rows = (("seconds a step", "step_seconds", ".3f"), ("completion tokens a second, the whole step", "tokens_per_second", ",.0f"))
    rows += (("tokens sampled a second, sampling alone", "sampled_tokens_per_second", ",.0f"),)
    rows += (("tokens trained a second, the rest of the step", "trained_tokens_per_second", ",.0f"),)
    rows += (("seconds to the end of the first step", "first_step_seconds", ".1f"), ("peak memory, MB", "peak_mb", ",.0f"))
    lines += [f"| {label} | {v[key]:{form}} | {t[key]:{form}} |" for label, key, form in rows]
    ratio, machine = result["step_ratio_veneer_to_trl"], result["machine"]
    lines += [
        "",
        f"Veneer / TRL per step: {ratio['median']:.2f} (rounds from {ratio['min']:.2f} to {ratio['max']:.2f}). "
        f"Share of the matmul peak ({result['matmul_peak_gflops']:.0f} GFLOP/s): {result['share_of_matmul_peak']:.0%} "
        f"of {result['gflop_per_step']:.1f} GFLOP a step.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {', '.join(machine['packages'])}.",
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help=f"of which the first {WARMUP} are not counted")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of one matrix product; each is measured")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--worker", choices=("veneer", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.steps, args.threads[0])))
        return
    results = [measure(args.rounds, args.steps, threads) for threads in args.threads]
    print(json.dumps(results, indent=1))
    if args.write:
        (ROOT / "benchmarks/RESULTS.md").write_text(page(results))


if __name__ == "__main__":
    main()
