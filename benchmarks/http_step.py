"""What HTTP adds to a reinforcement-learning step: the public Tinker SDK against ``veneer serve``, beside the engine in one process.

    python benchmarks/http_step.py          # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The same step for both: 8 prompts of 30 tokens x 8 completions of exactly 32, a rank-8 adapter on all linear maps and the
unembedding, importance sampling, one optimizer step, the new weights published to a sampler. The SDK is another process with a
venv of its own (.bench/clients, made here); so on two cores it also takes processor time from the engine. Each round starts both
sides anew, one after the other; figures are medians over the rounds of medians over the steps.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, Command, Json, Settings, in_worker, ratios, request_of, run, say, shown, table_of

CLIENT_PYTHON = ROOT / ".bench/clients/bin/python"
CLIENT_PACKAGES = ("torch==2.13.0", "tinker==0.38.0")
CLIENT_FILE = str(ROOT / "benchmarks/tinker_side.py")
STEPS, WARMUP = 20, 4
PROMPTS, GROUP, PROMPT_TOKENS, TOKENS, RANK = 8, 8, 30, 32, 8
PARTS = ("publish", "sample", "train", "optimize")
READY = re.compile(r"on (http://\S+)")


def ensure_client() -> None:
    """Make the environment that has the SDK, unless it is there."""
    if not CLIENT_PYTHON.exists():
        say("making .bench/clients")
        subprocess.run([sys.executable, "-m", "venv", CLIENT_PYTHON.parents[1]], check=True)
        subprocess.run([CLIENT_PYTHON, "-m", "pip", "install", "--quiet", *CLIENT_PACKAGES], check=True)


def prompts(vocabulary: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % vocabulary for j in range(PROMPT_TOKENS)] for i in range(PROMPTS)]


def work(request: Json) -> Json:
    """The steps in this process: seconds of each part of each step."""
    import numpy as np

    from sides import prepare
    from veneer.engine import LoraEngine, load_base, set_threads
    from veneer.types import AdamParams, Datum, LoraConfig, SamplingParams

    device = prepare(request)
    set_threads(1)
    engine = LoraEngine(load_base("nano", device), patience=600, threads=request["threads"])
    engine.create_adapter("mine", LoraConfig(rank=RANK, train_unembed=True, seed=1))
    seconds: list[list[float]] = []
    for step in range(request["steps"]):
        clock = [time.perf_counter()]
        engine.publish("mine").result()
        clock.append(time.perf_counter())
        params = SamplingParams(TOKENS, stop_token_ids=(), seed=step)
        asked = [engine.sample(np.array(prompt), "mine", params, GROUP) for prompt in prompts(engine.base.vocab_size)]
        groups = [future.result() for future in asked]
        clock.append(time.perf_counter())
        data = []
        for prompt, samples in zip(prompts(engine.base.vocab_size), groups, strict=True):
            for number, sample in enumerate(samples):
                row, here = np.concatenate([prompt, sample.tokens]), np.arange(PROMPT_TOKENS + TOKENS - 1) >= PROMPT_TOKENS - 1
                advantages = np.where(here, number % 2 * 2 - 1, 0).astype(np.float32)
                logprobs = np.concatenate([np.zeros(PROMPT_TOKENS - 1, np.float32), sample.logprobs])
                data.append(Datum(row[:-1], row[1:], logprobs, advantages, here.astype(np.float32)))
        engine.forward_backward("mine", data, "importance_sampling", everywhere=True).result()
        clock.append(time.perf_counter())
        engine.optim_step("mine", AdamParams(1e-4)).result()
        clock.append(time.perf_counter())
        seconds.append(np.diff(clock).tolist())
    return {"seconds": seconds}


def over_http(settings: Settings, steps: int) -> Json:
    """The same through a server and the SDK."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "veneer", "serve", "--port", "0", "--threads", str(settings.threads)]
        errors = Path(home) / "stderr"
        began = time.perf_counter()
        server = subprocess.Popen(command, stderr=errors.open("w"), env={**os.environ, "VENEER_HOME": home, "HF_HUB_OFFLINE": "1"})
        try:
            while (found := READY.search(errors.read_text())) is None:
                if server.poll() is not None:
                    raise RuntimeError(errors.read_text()[-3000:])
                time.sleep(0.02)
            ready = time.perf_counter() - began
            request = request_of(settings, url=found[1], steps=steps, group=GROUP, tokens=TOKENS, rank=RANK, prompts=prompts(368))
            raw = in_worker(CLIENT_FILE, request, python=str(CLIENT_PYTHON))
            peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())
            return {**raw, "ready": ready, "peak_mb": int(peak[1]) / 1024 if peak else None}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def measure(settings: Settings) -> Json:
    ensure_client()
    steps, warmup = (6, 2) if settings.quick else (STEPS, WARMUP)
    inside: list[list[float]] = []
    outside: list[list[float]] = []
    facts: list[Json] = []
    for number in range(settings.rounds):
        for side in sorted(("http", "inside"), reverse=number % 2 == 0):
            if side == "inside":
                seconds = in_worker(__file__, request_of(settings, steps=steps))["seconds"][warmup:]
                inside.append([statistics.median(column) for column in zip(*seconds, strict=True)] + [statistics.median(map(sum, seconds))])
            else:
                found = over_http(settings, steps)
                seconds = found["seconds"][warmup:]
                first, client = found["ready"] + sum(found["seconds"][0]), statistics.median(found["processor"][warmup:])
                facts.append({"ready": found["ready"], "first_step": first, "peak_mb": found["peak_mb"], "client": client})
                outside.append(
                    [statistics.median(column) for column in zip(*seconds, strict=True)] + [statistics.median(map(sum, seconds))]
                )
            say(
                f"{settings.threads} thread(s), round {number + 1}: {side} {(inside if side == 'inside' else outside)[-1][-1]:.3f} s a step"
            )
    names = (*PARTS, "step")
    return {
        "in_process": {name: statistics.median(row[i] for row in inside) for i, name in enumerate(names)},
        "http": {name: statistics.median(row[i] for row in outside) for i, name in enumerate(names)},
        "overhead": {name: ratios([row[i] for row in outside], [row[i] for row in inside]) for i, name in enumerate(names)},
        **{key: statistics.median(fact[key] for fact in facts) for key in facts[0]},
    }


def table(result: Json) -> list[str]:
    rows = [
        [name, f"{1000 * result['in_process'][name]:.1f}", f"{1000 * result['http'][name]:.1f}", shown(result["overhead"][name])]
        for name in (*PARTS, "step")
    ]
    return [
        *table_of(["ms of", "engine in process", "SDK and server", "ratio"], rows),
        f"The server answered {result['ready']:.1f} s after its start, its first step was done {result['first_step']:.1f} s after it (the "
        f"client's own start aside), and it took {result['peak_mb']:,.0f} MiB at the most. The client's process itself used "
        f"{1000 * result['client']:.0f} ms of processor time a step.",
        "",
    ]


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "what HTTP adds to an RL step", doc, measure, work, table, rounds=5, threads=(1, 2), packages=CLIENT_PACKAGES))
