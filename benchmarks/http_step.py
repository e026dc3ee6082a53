"""What HTTP adds to a reinforcement-learning step: the public Tinker SDK against ``veneer serve``, beside the engine in one process.

    python benchmarks/http_step.py          # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The same step for both: 8 prompts of 30 tokens x 8 completions of exactly 32, a rank-8 adapter on all linear maps and the
unembedding, importance sampling, one optimizer step, the new weights published to a sampler. The SDK is another process with a
venv of its own (.bench/clients, made here); so on two cores it also takes processor time from the engine. A bare client
(bare_side.py) sends the same requests and does nothing else: what it takes is the server's part. Each round starts all sides anew,
one after the other; figures are medians over the rounds of medians over the steps.
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
CLIENTS = {
    "bare": (sys.executable, str(ROOT / "benchmarks/bare_side.py")),
    "sdk": (str(CLIENT_PYTHON), str(ROOT / "benchmarks/tinker_side.py")),
}
"""The Python and the file of each."""
SIDES = ("in_process", *CLIENTS)
STEPS, WARMUP = 20, 4
PROMPTS, GROUP, PROMPT_TOKENS, TOKENS, RANK = 8, 8, 30, 32, 8
NAMES = ("publish", "sample", "train", "optimize", "step")
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


def over_http(settings: Settings, steps: int, python: str, client: str) -> Json:
    """The same through a server and a client."""
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
            raw = in_worker(client, request, python=python)
            peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())
            return {**raw, "ready": ready, "peak_mb": int(peak[1]) / 1024 if peak else None}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def medians(seconds: list[list[float]]) -> list[float]:
    """Of each part, and of whole steps."""
    return [statistics.median(column) for column in zip(*seconds, strict=True)] + [statistics.median(map(sum, seconds))]


def measure(settings: Settings) -> Json:
    ensure_client()
    steps, warmup = (6, 2) if settings.quick else (STEPS, WARMUP)
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    facts: dict[str, list[Json]] = {side: [] for side in CLIENTS}
    for number in range(settings.rounds):
        for side in SIDES if number % 2 else SIDES[::-1]:
            if side == "in_process":
                seconds = in_worker(__file__, request_of(settings, steps=steps))["seconds"]
            else:
                answer = over_http(settings, steps, *CLIENTS[side])
                seconds = answer["seconds"]
                first, client = answer["ready"] + sum(seconds[0]), statistics.median(answer["processor"][warmup:])
                facts[side].append({"ready": answer["ready"], "first_step": first, "peak_mb": answer["peak_mb"], "client": client})
            found[side].append(medians(seconds[warmup:]))
            say(f"{settings.threads} thread(s), round {number + 1}: {side} {found[side][-1][-1]:.3f} s a step")
    result: Json = {}
    for side, rows in found.items():
        result[side] = {name: statistics.median(row[i] for row in rows) for i, name in enumerate(NAMES)}
        if side in CLIENTS:
            inside = found["in_process"]
            result[side]["overhead"] = {n: ratios([row[i] for row in rows], [row[i] for row in inside]) for i, n in enumerate(NAMES)}
            result[side] |= {key: statistics.median(fact[key] for fact in facts[side]) for key in facts[side][0]}
    return result


def table(result: Json) -> list[str]:
    rows = []
    for name in NAMES:
        row = [name, f"{1000 * result['in_process'][name]:.1f}"]
        for side in CLIENTS:
            row += [f"{1000 * result[side][name]:.1f}", shown(result[side]["overhead"][name])]
        rows.append(row)
    bare, sdk = result["bare"], result["sdk"]
    return [
        *table_of(["ms of", "engine in process", "bare client", "ratio", "SDK", "ratio"], rows),
        f"The server answered {sdk['ready']:.1f} s after its start, its first step was done {sdk['first_step']:.1f} s after it (the "
        f"client's own start aside), and it took {sdk['peak_mb']:,.0f} MiB at the most. A step takes {1000 * sdk['client']:.0f} ms of "
        f"processor time in the SDK's process, {1000 * bare['client']:.0f} ms in the bare client's.",
        "",
    ]


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "what HTTP adds to an RL step", doc, measure, work, table, rounds=5, threads=(1, 2), packages=CLIENT_PACKAGES))
