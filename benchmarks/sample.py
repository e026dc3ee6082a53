"""Tokens sampled per second: Veneer beside transformers' generate, its continuous batching, and PEFT.

    python benchmarks/sample.py             # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The cases, each 32 new tokens after prompts of 30, drawn at temperature 1 and never stopped early:

    base       64 rows, 8 prompts x 8 completions, no adapter
    base-256   256 rows, 32 prompts x 8 completions, no adapter
    adapter    64 rows through one adapter of rank 8
    mixed      64 rows through 8 adapters, 8 rows each: PEFT's mixed batches (adapter_names)
    ragged     64 rows that want from 4 to 64 tokens; generate runs all to the longest, and only wanted tokens count

The share of the matmul peak counts the least that must be computed: each different prompt once, then one token per row and
step, linear maps only. On a GPU the share of the memory roofline is given too: weights once per step, and the cache.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from measure import Command, Json, Settings, in_worker, ratios, request_of, run, say, shown, spread, table_of

CASES = ("base", "base-256", "adapter", "mixed", "ragged")
PROMPT, TOKENS, LONGEST, COPIES, MIXED = 30, 32, 64, 8, 8
PEERS = {"generate": "transformers generate", "continuous": "transformers continuous batching", "peft": "PEFT generate"}


@dataclass(frozen=True)
class Case:
    """What is to be drawn."""

    rows: int
    adapters: Sequence[str | None]
    """Per row."""
    budgets: Sequence[int]
    """Per row, tokens."""

    @classmethod
    def of(cls, name: str, quick: bool) -> Case:
        import numpy as np

        rows = 256 if name == "base-256" else 64
        adapters: list[str | None] = [None] * rows
        if name == "adapter":
            adapters = ["a0"] * rows
        if name == "mixed":
            adapters = [f"a{i * MIXED // rows}" for i in range(rows)]
        tokens = 6 if quick else TOKENS
        budgets = [tokens] * rows
        if name == "ragged":
            budgets = np.random.default_rng(1).integers(4, 1 + (8 if quick else LONGEST), rows).tolist()
        return cls(rows, adapters, budgets)


# ---------------------------------------------------------------- in a worker


def work(request: Json) -> Json:
    """All cases on one model."""
    from measure import bandwidth_peak, matmul_peak
    from sides import dtype_on, prepare

    device = prepare(request)
    models = Models(request["model"], device)
    ceilings = {"matmul_peak_gflops": matmul_peak(device, dtype_on(device)) / 1e9}
    if device == "cuda":
        ceilings["bandwidth_gb_per_second"] = bandwidth_peak(device) / 1e9
    cases = {}
    for name in CASES:
        if not (request["quick"] and name == "base-256"):
            cases[name] = run_case(models, Case.of(name, request["quick"]), request["rounds"], ceilings)
    return {**ceilings, "cases": cases}


class Models:
    """One model on every side."""

    def __init__(self, name: str, device: str) -> None:
        from sides import peft_model, plain_model, veneer_engine

        self.name, self.device = name, device
        self.engine = veneer_engine(name, device, MIXED)
        self.plain, self.for_batching = plain_model(name, device), plain_model(name, device)
        self.peft = peft_model(name, device, MIXED)


def run_case(models: Models, case: Case, rounds: int, ceilings: Json) -> Json:
    from measure import take_turns
    from sides import ContinuousBatching, generate, prompts_of, veneer_sample

    prompts = prompts_of(case.rows // COPIES, PROMPT)
    rows = [prompt for prompt in prompts for _ in range(COPIES)]
    alike = len(set(case.budgets)) == 1

    def veneer(number: int) -> int:
        if alike:
            return veneer_sample(models.engine, prompts, COPIES, case.budgets[::COPIES], case.adapters[::COPIES], number)
        return veneer_sample(models.engine, rows, 1, case.budgets, case.adapters, number)

    longest, found = max(case.budgets), {}
    sides: dict[str, Callable[[int], object]] = {"veneer": veneer}
    batching = None
    if case.adapters[0] is None:
        sides["generate"] = lambda number: generate(models.plain, rows, longest)
        try:
            batching = ContinuousBatching(models.for_batching, case.rows, PROMPT + longest)
            assert batching(rows, case.budgets) == sum(case.budgets)
            sides["continuous"] = lambda number: batching(rows, case.budgets)
        except Exception as error:  # transformers refuses some devices and attention kernels, each in its own way
            found["continuous_batching_did_not_run"] = f"{type(error).__name__}: {error}"
    else:
        names = None if len(set(case.adapters)) == 1 else [str(name) for name in case.adapters]
        sides["peft"] = lambda number: generate(models.peft, rows, longest, names)
    assert veneer(0) == sum(case.budgets), "Veneer drew another number of tokens than was asked for"
    seconds = take_turns(sides, rounds, models.device)
    if batching is not None:
        batching.close()
    return found | figures_of(models, case, seconds, ceilings)


def figures_of(models: Models, case: Case, seconds: dict[str, list[float]], ceilings: Json) -> Json:
    """Tokens a second of every side, and Veneer's ratio to each peer and to the ceilings."""
    tokens, own = sum(case.budgets), seconds["veneer"]
    found: Json = {
        "rows": case.rows,
        "tokens": tokens,
        "tokens_per_second": {side: spread([tokens / one for one in many]) for side, many in seconds.items()},
        "veneer_to": {side: ratios(many, own) for side, many in seconds.items() if side != "veneer"},
        "gflop": least_gflop(models, case),
    }
    found["share_of_matmul_peak"] = found["gflop"] / ceilings["matmul_peak_gflops"] / statistics.median(own)
    if "bandwidth_gb_per_second" in ceilings:
        least = least_bytes(models, case) / 1e9 / ceilings["bandwidth_gb_per_second"]
        found["share_of_memory_roofline"] = least / statistics.median(own)
    return found


def least_gflop(models: Models, case: Case) -> float:
    """Of the linear maps, with each different (adapter, prompt) read once and one token per row and step after it."""
    from sides import RANK, adapter_size, linear_sizes

    body, head = linear_sizes(models.plain)
    if case.adapters[0] is not None:
        body += adapter_size(models.plain, RANK)
    prompts, steps = case.rows // COPIES, sum(case.budgets) - case.rows
    return 2 * (body * (prompts * PROMPT + steps) + head * (prompts + steps)) / 1e9


def least_bytes(models: Models, case: Case) -> float:
    """That decoding must read: all weights in every step, and the keys and values of every running row."""
    from sides import cache_bytes_per_token, dtype_on, linear_sizes

    weights = sum(linear_sizes(models.plain)) * dtype_on(models.device).itemsize
    cached = sum(PROMPT * budget + math.comb(budget, 2) for budget in case.budgets)
    return weights * max(case.budgets) + cached * cache_bytes_per_token(models.name, models.device)


# ---------------------------------------------------------------- the command


def measure(settings: Settings) -> Json:
    models = {}
    for model in settings.models:
        models[model] = in_worker(__file__, request_of(settings, model=model))
        for name, case in models[model]["cases"].items():
            against = ", ".join(f"{shown(ratio)} x {PEERS[peer]}" for peer, ratio in case["veneer_to"].items())
            say(f"{model}, {settings.threads} thread(s), {name}: {against}")
    return {"models": models}


def table(result: Json) -> list[str]:
    lines: list[str] = []
    for model, found in result["models"].items():
        rows = []
        for name, case in found["cases"].items():
            shares = f"{case['share_of_matmul_peak']:.0%}"
            if "share_of_memory_roofline" in case:
                shares += f", {case['share_of_memory_roofline']:.0%} of memory"
            versus = [shown(case["veneer_to"].get(peer)) for peer in PEERS]
            rows.append([name, str(case["rows"]), shown(case["tokens_per_second"]["veneer"], ",.0f"), *versus, shares])
        header = ["case", "rows", "Veneer, tokens a second", *(f"times {peer}" for peer in PEERS.values()), "share of peak"]
        lines += [f"Base {model}; matmul peak {found['matmul_peak_gflops']:,.0f} GFLOP/s:", "", *table_of(header, rows)]
        for name, case in found["cases"].items():
            if "continuous_batching_did_not_run" in case:
                lines += [f"{name}: continuous batching did not run ({case['continuous_batching_did_not_run']}).", ""]
    return lines


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "sampling beside transformers and PEFT", doc, measure, work, table, models=("nano", "25m")))
