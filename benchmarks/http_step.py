"""What HTTP adds to a reinforcement-learning step: the public Tinker SDK against ``veneer serve``, beside the engine in one process.

    python benchmarks/http_step.py          # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The same step for all: 8 prompts of 30 tokens x 8 completions of exactly 32, a rank-8 adapter on all linear maps and the
unembedding, importance sampling, one optimizer step, the new weights published to a sampler. The SDK is another process with a
venv of its own (.bench/clients, made here); so on two cores it also takes processor time from the engine. A bare client
(bare_side.py) sends the same requests and does nothing else: what it takes is the server's part. Each round starts all sides anew,
each with a server of its own if it needs one, and then they take turns of a few steps, the first of which is not counted: machines
change their speed from minute to minute. Figures are medians over the rounds; a round's ratio is the median over its turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from measure import ROOT, Command, Json, Settings, WorkerFailed, environment_of, ratios, request_of, run, say, shown, spread, table_of
from turns import Turns

CLIENT_PYTHON = ROOT / ".bench/clients/bin/python"
CLIENT_PACKAGES = ("torch==2.13.0", "tinker==0.38.0")
CLIENTS = {
    "bare": (sys.executable, str(ROOT / "benchmarks/bare_side.py")),
    "sdk": (str(CLIENT_PYTHON), str(ROOT / "benchmarks/tinker_side.py")),
}
"""The Python and the file of each."""
SIDES = ("in_process", *CLIENTS)
TURNS, TURN, WARMUP = 8, 4, 2
"""Turns a round, steps a turn, and turns before that which are not counted."""
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


def work(request: Json) -> None:
    """The steps in this process, in turns."""
    import numpy as np

    from sides import prepare
    from veneer.engine import LoraEngine, load_base, set_threads
    from veneer.types import AdamParams, Datum, LoraConfig, SamplingParams

    device = prepare(request)
    set_threads(1)
    engine = LoraEngine(load_base("nano", device), patience=600, threads=request["threads"])
    engine.create_adapter("mine", LoraConfig(rank=RANK, train_unembed=True, seed=1))
    turns = Turns(request)
    for step in turns:
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
        turns.seconds.append(np.diff(clock).tolist())


class Side:
    """A program that takes turns."""

    def __init__(self, python: str, file: str, request: Json) -> None:
        command, pipe = [python, file, "--worker", json.dumps(request)], subprocess.PIPE
        self.program = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment_of(request))

    def turn(self) -> Json:
        """Seconds of each part of each step, and of this program's processor."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write("\n")
        self.program.stdin.flush()
        answer = self.program.stdout.readline()
        if not answer:
            raise WorkerFailed(f"{self.program.args} ended with {self.program.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        assert self.program.stdin is not None
        self.program.stdin.close()
        self.program.wait(60)


@contextlib.contextmanager
def serving(settings: Settings) -> Generator[tuple[str, float, int]]:
    """A server with a home of its own: its address, the seconds until it answered, its process."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "veneer", "serve", "--port", "0", "--threads", str(settings.threads)]
        errors = Path(home) / "stderr"
        began = time.perf_counter()
        server = subprocess.Popen(command, stderr=errors.open("w"), env={**os.environ, "VENEER_HOME": home, "HF_HUB_OFFLINE": "1"})
        try:
            while (found := READY.search(errors.read_text())) is None:
                if server.poll() is not None:
                    raise WorkerFailed(errors.read_text()[-3000:])
                time.sleep(0.02)
            yield found[1], time.perf_counter() - began, server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def peak_of(process: int) -> float:
    """The most main memory of a process so far, MiB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def one_round(settings: Settings, turns: int) -> Json:
    """By side: each turn's medians of each part and of the whole step, and facts about its server and client."""
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    facts: dict[str, Json] = {}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        sides, servers = dict[str, Side](), dict[str, int]()
        for name in SIDES:
            request = request_of(settings, turn=TURN, group=GROUP, tokens=TOKENS, rank=RANK, prompts=prompts(368))
            if name == "in_process":
                sides[name] = Side(sys.executable, __file__, request)
            else:
                url, ready, servers[name] = stack.enter_context(serving(settings))
                sides[name] = Side(*CLIENTS[name], request | {"url": url})
            stack.callback(sides[name].end)
            first = sum(sides[name].turn()["seconds"][0])
            if name != "in_process":
                facts[name] = {"ready": ready, "first_step": ready + first}
        for number in range(WARMUP + turns):
            for name in SIDES if number % 2 else SIDES[::-1]:
                answer = sides[name].turn()
                if number >= WARMUP:
                    found[name].append(medians(answer["seconds"][1:]))
                    processor[name] += answer["processor"][1:]
        for name, server in servers.items():
            facts[name] |= {"peak_mb": peak_of(server), "client": statistics.median(processor[name])}
    return {"turns": found, "facts": facts}


def medians(seconds: list[list[float]]) -> list[float]:
    """Of each part, and of whole steps."""
    return [statistics.median(column) for column in zip(*seconds, strict=True)] + [statistics.median(map(sum, seconds))]


def measure(settings: Settings) -> Json:
    ensure_client()
    rounds: list[Json] = []
    for number in range(settings.rounds):
        rounds.append(one_round(settings, 2 if settings.quick else TURNS))
        took = {side: statistics.median(turn[-1] for turn in turns) for side, turns in rounds[-1]["turns"].items()}
        said = ", ".join(f"{side} {seconds:.3f} s a step" for side, seconds in took.items())
        say(f"{settings.threads} thread(s), round {number + 1}: {said}")
    result: Json = {}
    for side in SIDES:
        turns = [turn for found in rounds for turn in found["turns"][side]]
        result[side] = {name: statistics.median(turn[i] for turn in turns) for i, name in enumerate(NAMES)}
        if side in CLIENTS:
            result[side]["overhead"] = {name: spread([_ratio(found, side, i) for found in rounds]) for i, name in enumerate(NAMES)}
            facts = [found["facts"][side] for found in rounds]
            result[side] |= {key: statistics.median(fact[key] for fact in facts) for key in facts[0]}
    return result


def _ratio(found: Json, side: str, part: int) -> float:
    """Of one round: what a part took over what it took in process, the median over the turns."""
    over, under = ([turn[part] for turn in found["turns"][name]] for name in (side, "in_process"))
    return ratios(over, under)["median"]


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
