"""Many reinforcement-learning runs on one engine: all at once, one after another, and one after another in TRL.

    python benchmarks/concurrency.py        # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

K runs, each with an adapter and seed of its own and the step of rl_step.py (8 prompts x 8 completions of 32 tokens, rank 8),
on one engine in one process: their loops gathered by asyncio, against the same loops awaited in turn. Every K has a process of
its own; its memory peak is read after the runs went at once and before they go in turn. TRL trains one run per program, so its
figure is K times the steady step of one run, measured beside every K in the same round, without the start of its programs.
Whether each run sampled the same tokens, log-probabilities and rewards alone and in company is checked bit for bit.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from measure import Command, Json, Settings, in_worker, peak_mb, ratios, request_of, run, say, shown, spread, table_of
from rl_step import TRL_FILE, TRL_PACKAGES, TRL_PYTHON, WARMUP, ensure_trl, facts_of

KS, STEPS = (1, 2, 4, 8, 16), 5


# ---------------------------------------------------------------- in a worker


def work(request: Json) -> Json:
    if request["job"] == "facts":
        return facts_of(request)
    return Runs(request).measured(request["rounds"])


class Runs:
    """K runs on one engine, started anew as often as wanted."""

    def __init__(self, request: Json) -> None:
        from sides import prepare, veneer_engine
        from veneer.render import load_renderer

        self.device, self.k, self.steps = prepare(request), request["k"], request["steps"]
        self.engine, self.renderer = veneer_engine(request["model"], self.device, 0), load_renderer("nano")

    def all_of_them(self, at_once: bool) -> tuple[float, list[list[str]]]:
        """Seconds of K whole runs from fresh adapters, and what each saw."""
        import asyncio

        from coins import CoinRun
        from sides import RANK
        from veneer.types import LoraConfig

        runs = []
        for k in range(self.k):
            self.engine.create_adapter(f"run{k}", LoraConfig(rank=RANK, seed=k))
            runs.append(CoinRun(self.engine, self.renderer, f"run{k}", seed=1000 * k))

        async def steps(one: CoinRun) -> None:
            for number in range(self.steps):
                await one.step(number)

        async def together() -> None:
            await asyncio.gather(*map(steps, runs))

        async def in_turn() -> None:
            for one in runs:
                await steps(one)

        clock = time.perf_counter()
        asyncio.run(together() if at_once else in_turn())
        seconds = time.perf_counter() - clock
        for k in range(self.k):
            self.engine.remove_adapter(f"run{k}")
        return seconds, [one.seen for one in runs]

    def measured(self, rounds: int) -> Json:
        from measure import device_peak_mb

        _, seen = self.all_of_them(at_once=True)
        peak, on_device = peak_mb(), device_peak_mb(self.device)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        identical = True
        for number in range(rounds):
            for at_once in (number % 2 == 0, number % 2 == 1):
                took, now = self.all_of_them(at_once)
                seconds[at_once].append(took)
                identical &= now == seen
        return {
            "at_once_seconds": seconds[True],
            "in_turn_seconds": seconds[False],
            "identical": identical,
            "peak_mb": peak,
            "device_peak_mb": on_device,
        }


# ---------------------------------------------------------------- the command


def measure(settings: Settings) -> Json:
    ensure_trl()
    return {"models": {model: measure_model(settings, model) for model in settings.models}}


def measure_model(settings: Settings, model: str) -> Json:
    ks, steps = ((2,), 1) if settings.quick else (KS, STEPS)
    trl_steps, warmup = (3, 1) if settings.quick else (3 * WARMUP, WARMUP)
    request = request_of(settings, model=model, steps=trl_steps)
    facts = in_worker(__file__, request | {"job": "facts"})
    trl: list[Json] = []
    found: dict[str, Json] = {}
    for k in ks:
        if not (settings.quick and trl):
            trl.append(in_worker(TRL_FILE, request | facts, python=str(TRL_PYTHON)))
        found[str(k)] = in_worker(__file__, request | {"job": "runs", "k": k, "steps": steps})
        say(f"{model}, {settings.threads} thread(s), {k} run(s) at once: {statistics.median(found[str(k)]['at_once_seconds']):.2f} s")
    trl_step = spread([statistics.median(one["seconds"][warmup:]) for one in trl])
    return {
        "steps": steps,
        "trl": {"step_seconds": trl_step, "peak_mb": statistics.median(one["peak_mb"] for one in trl)},
        "runs": {k: figures_of(one, int(k), steps, facts, trl_step["median"]) for k, one in found.items()},
    }


def figures_of(raw: Json, k: int, steps: int, facts: Json, trl_step: float) -> Json:
    at_once, in_turn = raw["at_once_seconds"], raw["in_turn_seconds"]
    tokens = k * steps * facts["prompts"] * facts["group"] * facts["tokens"]
    return {
        "seconds": {"at_once": spread(at_once), "in_turn": spread(in_turn), "trl": k * steps * trl_step},
        "completion_tokens_per_second": spread([tokens / seconds for seconds in at_once]),
        "throughput_to_in_turn": ratios(in_turn, at_once),
        "throughput_to_trl": spread([k * steps * trl_step / seconds for seconds in at_once]),
        "identical": raw["identical"],
        "peak_mb": raw["peak_mb"],
        "device_peak_mb": raw["device_peak_mb"],
    }


def table(result: Json) -> list[str]:
    lines: list[str] = []
    header = ["runs", "seconds at once", "in turn", "K x TRL", "times in turn", "times TRL", "same bits alone", "peak, MiB"]
    for model, found in result["models"].items():
        rows = [
            [
                k,
                shown(one["seconds"]["at_once"]),
                shown(one["seconds"]["in_turn"]),
                f"{one['seconds']['trl']:.2f}",
                shown(one["throughput_to_in_turn"]),
                shown(one["throughput_to_trl"]),
                "yes" if one["identical"] else "NO",
                f"{one['peak_mb']:,.0f}",
            ]
            for k, one in found["runs"].items()
        ]
        lines += [f"Base {model}, {found['steps']} steps a run; one TRL program peaks at {found['trl']['peak_mb']:,.0f} MiB:", ""]
        lines += table_of(header, rows)
    return lines


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "many RL runs at once", doc, measure, work, table, rounds=3, packages=TRL_PACKAGES))
