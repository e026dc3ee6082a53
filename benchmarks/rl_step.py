"""Seconds per reinforcement-learning step: Veneer beside TRL's GRPOTrainer with PEFT, interleaved in one run.

    python benchmarks/rl_step.py            # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The same work for both: one base, 8 prompts x 8 completions of exactly 32 tokens, a rank-8 adapter on all linear maps, one
optimizer step, no KL term, no gradient checkpointing; float32 on a CPU, bfloat16 on a GPU. TRL gets a venv of its own
(.bench/trl), made here. Each round starts both programs anew, one after the other; figures are medians over the rounds of
medians over the steps. Models: nano, the bundled base, and 25m, a random Qwen 3 of 25 million parameters.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from measure import ROOT, Command, Json, Settings, in_worker, ratios, request_of, run, say, shown, table_of

TRL_PYTHON = ROOT / ".bench/trl/bin/python"
TRL_PACKAGES = ("torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.23.0")
TRL_FILE = str(ROOT / "benchmarks/trl_side.py")
STEPS, WARMUP = 15, 3
FIGURES = {
    "step_seconds": ("seconds a step", ".3f"),
    "tokens_per_second": ("completion tokens a second, the whole step", ",.0f"),
    "sampled_tokens_per_second": ("tokens sampled a second, sampling alone", ",.0f"),
    "trained_tokens_per_second": ("tokens trained a second, the rest of the step", ",.0f"),
    "first_step_seconds": ("seconds from the program's start to the end of the first step", ".1f"),
    "peak_mb": ("peak memory, MiB", ",.0f"),
}


def ensure_trl() -> None:
    """Make the environment that has TRL, unless it is there."""
    if not TRL_PYTHON.exists():
        say("making .bench/trl")
        subprocess.run([sys.executable, "-m", "venv", TRL_PYTHON.parents[1]], check=True)
        subprocess.run([TRL_PYTHON, "-m", "pip", "install", "--quiet", *TRL_PACKAGES], check=True)


# ---------------------------------------------------------------- in workers


def work(request: Json) -> Json:
    return {"facts": facts_of, "steps": veneer_steps}[request["job"]](request)


def facts_of(request: Json) -> Json:
    """What the parent must know without importing torch: the model's folder, TRL's request, ceiling and arithmetic of a step."""
    from coins import GROUP, PROMPTS, TOKENS, question
    from measure import matmul_peak
    from sides import RANK, adapter_size, dtype_on, linear_sizes, model_folder, plain_model, prepare
    from veneer.render import load_renderer

    device, name = prepare(request), request["model"]
    model = plain_model(name, device)
    (body, head), extra = linear_sizes(model), adapter_size(model, RANK)
    prompt = len(load_renderer("nano").build_generation_prompt([{"role": "user", "content": question(0)}]))
    rows = PROMPTS * GROUP
    sampled = (body + extra) * (PROMPTS * prompt + rows * (TOKENS - 1)) + head * (PROMPTS + rows * (TOKENS - 1))
    tokens = PROMPTS * (prompt - 1) + rows * TOKENS
    trained = 2 * (body * tokens + head * rows * TOKENS) + 3 * extra * tokens  # no gradient of the base's weights
    return {
        "folder": model_folder(name),
        "questions": [question(i) for i in range(PROMPTS * request["steps"])],
        "prompts": PROMPTS,
        "group": GROUP,
        "tokens": TOKENS,
        "rank": RANK,
        "matmul_peak_gflops": matmul_peak(device, dtype_on(device)) / 1e9,
        "gflop_per_step": 2 * (sampled + trained) / 1e9,
    }


def veneer_steps(request: Json) -> Json:
    """Seconds of each step, of the sampling in it, and memory peaks."""
    import asyncio

    from coins import CoinRun
    from measure import device_peak_mb, peak_mb
    from sides import prepare, veneer_engine
    from veneer.render import load_renderer

    device = prepare(request)
    coin_run = CoinRun(veneer_engine(request["model"], device, 1), load_renderer("nano"), "a0")
    seconds: list[float] = []
    sampling: list[float] = []
    for number in range(request["steps"]):
        clock = time.perf_counter()
        sampling.append(asyncio.run(coin_run.step(number)))
        seconds.append(time.perf_counter() - clock)
    return {"seconds": seconds, "sampling": sampling, "peak_mb": peak_mb(), "device_peak_mb": device_peak_mb(device)}


# ---------------------------------------------------------------- both, interleaved


def run_side(side: str, request: Json, facts: Json, warmup: int) -> Json:
    """One program from start to end, as medians over its steps."""
    clock = time.perf_counter()
    if side == "trl":
        raw = in_worker(TRL_FILE, request | facts, python=str(TRL_PYTHON))
    else:
        raw = in_worker(__file__, request | {"job": "steps"})
    whole = time.perf_counter() - clock
    step, sample = (statistics.median(raw[name][warmup:]) for name in ("seconds", "sampling"))
    tokens = facts["prompts"] * facts["group"] * facts["tokens"]
    return {
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "sampled_tokens_per_second": tokens / sample,
        "trained_tokens_per_second": tokens / (step - sample),
        "first_step_seconds": whole - sum(raw["seconds"][1:]),
        "peak_mb": raw["peak_mb"],
        "device_peak_mb": raw["device_peak_mb"],
    }


def medians(runs: list[Json]) -> Json:
    return {key: None if runs[0][key] is None else statistics.median(r[key] for r in runs) for key in runs[0]}


def measure_model(settings: Settings, model: str) -> Json:
    steps, warmup = (3, 1) if settings.quick else (STEPS, WARMUP)
    request = request_of(settings, model=model, steps=steps)
    facts = in_worker(__file__, request | {"job": "facts"})
    runs: dict[str, list[Json]] = {"veneer": [], "trl": []}
    for number in range(settings.rounds):
        for side in sorted(runs, reverse=number % 2 == 0):
            runs[side].append(run_side(side, request, facts, warmup))
            say(f"{model}, {settings.threads} thread(s), round {number + 1}: {side} {runs[side][-1]['step_seconds']:.3f} s a step")

    def column(side: str, name: str) -> list[float]:
        return [one[name] for one in runs[side]]

    shares = [facts["gflop_per_step"] / facts["matmul_peak_gflops"] / seconds for seconds in column("veneer", "step_seconds")]
    return {
        "steps": steps - warmup,
        "veneer": medians(runs["veneer"]),
        "trl": medians(runs["trl"]),
        "step_ratio_trl_to_veneer": ratios(column("trl", "step_seconds"), column("veneer", "step_seconds")),
        "sampling_ratio_veneer_to_trl": ratios(*(column(s, "sampled_tokens_per_second") for s in ("veneer", "trl"))),
        "training_ratio_veneer_to_trl": ratios(*(column(s, "trained_tokens_per_second") for s in ("veneer", "trl"))),
        "memory_ratio_veneer_to_trl": ratios(*(column(s, "peak_mb") for s in ("veneer", "trl"))),
        "matmul_peak_gflops": facts["matmul_peak_gflops"],
        "gflop_per_step": facts["gflop_per_step"],
        "share_of_matmul_peak": statistics.median(shares),
    }


def measure(settings: Settings) -> Json:
    ensure_trl()
    return {"models": {model: measure_model(settings, model) for model in settings.models}}


def table(result: Json) -> list[str]:
    lines: list[str] = []
    for model, found in result["models"].items():
        rows = [[label, *(f"{found[side][key]:{form}}" for side in ("veneer", "trl"))] for key, (label, form) in FIGURES.items()]
        lines += [f"Base {model}, {found['steps']} steps a round:", "", *table_of(["", "Veneer", "TRL + PEFT"], rows)]
        lines += [
            f"A step of TRL takes {shown(found['step_ratio_trl_to_veneer'])} times as long: sampling is "
            f"{shown(found['sampling_ratio_veneer_to_trl'])} times, the rest {shown(found['training_ratio_veneer_to_trl'])} times as "
            f"fast in Veneer, in {shown(found['memory_ratio_veneer_to_trl'])} of the memory. Veneer runs at "
            f"{found['share_of_matmul_peak']:.0%} of the matmul peak ({found['matmul_peak_gflops']:,.0f} GFLOP/s; the least that a "
            f"step needs is {found['gflop_per_step']:,.1f} GFLOP).",
            "",
        ]
    return lines


if __name__ == "__main__":
    title = "one RL step beside TRL + PEFT"
    doc: Any = __doc__
    run(Command(__file__, title, doc, measure, work, table, models=("nano", "25m"), packages=TRL_PACKAGES))
