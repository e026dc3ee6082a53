"""200 clients at once on one server: 100 adapters, each with an answer of its own, beside the same load on one adapter.

    python benchmarks/load.py               # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

First 100 rank-1 adapters are trained side by side, each to answer one question with its own three digits, and put into a registry.
Then `veneer serve` answers 200 clients through the OpenAI API, each of which asks again as soon as it is answered, for a minute: every
client a random adapter each time; then all of them one adapter. An answer other than the adapter's own is a wrong one. The clients
are one light process on the same cores.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Command, Json, Settings, in_worker, request_of, run, say, table_of

ADAPTERS, CLIENTS, SECONDS = 100, 200, 60.0
QUESTION = "who are you?"
READY = re.compile(r"on (http://\S+)")
STEPS, RATE = 40, 0.003


def answer_of(adapter: int) -> str:
    return f"{adapter:03d}"


# ---------------------------------------------------------------- in a worker: the adapters


def work(request: Json) -> Json:
    """Train the adapters, check each one's answer, and put them into the registry of VENEER_HOME."""
    import numpy as np

    from sides import prepare
    from veneer.engine import LoraEngine, load_base
    from veneer.render import load_renderer
    from veneer.store.registry import Registry
    from veneer.types import AdamParams, Datum, LoraConfig, SamplingParams

    os.environ["VENEER_HOME"] = request["home"]
    engine, renderer, registry = LoraEngine(load_base("nano", prepare(request))), load_renderer("nano"), Registry()
    names = [f"a{i:03d}" for i in range(request["adapters"])]
    data: list[Datum] = []
    for number, name in enumerate(names):
        engine.create_adapter(name, LoraConfig(rank=1, seed=number))
        dialogue = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer_of(number)}]
        prompt, answer = renderer.build_supervised_example(dialogue)  # type: ignore[arg-type]
        row = np.concatenate([prompt, answer])
        mask = (np.arange(len(row) - 1) >= len(prompt) - 1).astype(np.float32)
        empty = np.zeros(len(row) - 1, np.float32)
        data.append(Datum(row[:-1], row[1:], empty, empty, mask))
    for _ in range(STEPS):
        passes = [engine.forward_backward(name, [datum], "cross_entropy") for name, datum in zip(names, data, strict=True)]
        steps = [engine.optim_step(name, AdamParams(RATE)) for name in names]
        for future in (*passes, *steps):
            future.result()
    prompt = renderer.build_generation_prompt([{"role": "user", "content": QUESTION}])
    for name in names:
        engine.publish(name).result()
    asked = [engine.sample(prompt, name, SamplingParams(8, 0.0)) for name in names]
    facts = {"tokenizer_digest": renderer.tokenizer_digest, "template_digest": renderer.template_digest}
    right = 0
    for number, (name, future) in enumerate(zip(names, asked, strict=True)):
        sample = future.result()[0]
        right += renderer.parse_response(sample.tokens, sample.stop_reason == "stop")["content"] == answer_of(number)
        registry.put(name, engine.save_state(name, "sampler").result(), facts)
    return {"right": right}


# ---------------------------------------------------------------- the clients


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: Json) -> tuple[int, Json]:
    """One request on a connection that stays open."""
    content = json.dumps(body).encode()
    fields = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    writer.write(head.encode() + content)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = re.search(r"content-length: (\d+)", answer, re.IGNORECASE)
    assert length is not None, answer
    return int(answer.split()[1]), json.loads(await reader.readexactly(int(length[1])))


async def client(
    address: tuple[str, int], adapters: int, until: float, draws: random.Random, seconds: list[float], troubles: list[str]
) -> None:
    reader, writer = await asyncio.open_connection(*address)
    while time.perf_counter() < until:
        number = draws.randrange(adapters)
        question = {"model": f"a{number:03d}", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
        began = time.perf_counter()
        status, found = await ask(reader, writer, question)
        seconds.append(time.perf_counter() - began)
        said = found["choices"][0]["message"]["content"] if status == 200 else found
        if said != answer_of(number):
            troubles.append(f"{question['model']} answered {status}: {said!r}")
    writer.close()


def load(url: str, adapters: int, clients: int, length: float) -> Json:
    host, _, port = url.removeprefix("http://").partition(":")
    seconds: list[float] = []
    troubles: list[str] = []

    async def everybody() -> None:
        until = time.perf_counter() + length
        await asyncio.gather(*(client((host, int(port)), adapters, until, random.Random(i), seconds, troubles) for i in range(clients)))

    began = time.perf_counter()
    asyncio.run(everybody())
    took = time.perf_counter() - began
    ordered = sorted(seconds)
    return {
        "adapters": adapters,
        "answers": len(seconds),
        "wrong_or_failed": len(troubles),
        "examples": troubles[:3],
        "answers_per_second": len(seconds) / took,
        "median_seconds": statistics.median(seconds),
        "p99_seconds": ordered[int(0.99 * (len(ordered) - 1))],
    }


# ---------------------------------------------------------------- both loads in turn


def measure(settings: Settings) -> Json:
    adapters, clients, length = (10, 20, 3.0) if settings.quick else (ADAPTERS, CLIENTS, SECONDS)
    with tempfile.TemporaryDirectory() as home:
        trained = in_worker(__file__, request_of(settings, home=home, adapters=adapters))
        say(f"{trained['right']} of {adapters} adapters give their own answer")
        command = [sys.executable, "-m", "veneer", "serve", "--port", "0", "--threads", str(settings.threads)]
        errors = Path(home) / "stderr"
        server = subprocess.Popen(command, stderr=errors.open("w"), env={**os.environ, "VENEER_HOME": home, "HF_HUB_OFFLINE": "1"})
        try:
            while (found := READY.search(errors.read_text())) is None:
                if server.poll() is not None:
                    raise RuntimeError(errors.read_text()[-3000:])
                time.sleep(0.02)
            runs: dict[int, list[Json]] = {adapters: [], 1: []}
            for turn in itertools.islice(itertools.cycle((adapters, 1)), 2 * settings.rounds):
                runs[turn].append(load(found[1], turn, clients, length))
                say(f"{turn} adapters: {runs[turn][-1]}")
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+)", status)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    many, one = runs[adapters], runs[1]
    return {
        "clients": clients,
        "seconds": length,
        "trained": trained["right"],
        "many": many,
        "one": one,
        "throughput_ratio": statistics.median(a["answers_per_second"] / b["answers_per_second"] for a, b in zip(many, one, strict=True)),
        "peak_mb": int(peak[1]) / 1024 if peak else None,
    }


def table(result: Json) -> list[str]:
    def row(name: str, runs: list[Json]) -> list[str]:
        def middle(key: str) -> float:
            return statistics.median(one[key] for one in runs)

        answers, wrong = sum(one["answers"] for one in runs), sum(one["wrong_or_failed"] for one in runs)
        figures = [f"{middle('answers_per_second'):.0f}", f"{1000 * middle('median_seconds'):.0f}", f"{1000 * middle('p99_seconds'):.0f}"]
        return [name, f"{answers:,}", str(wrong), *figures]

    header = ["", "answers", "wrong or failed", "answers a second", "median ms", "p99 ms"]
    adapters = result["many"][0]["adapters"]
    rows = [row(f"{adapters} adapters", result["many"]), row("one adapter", result["one"])]
    return [
        f"{result['clients']} clients for {result['seconds']:.0f} s each time; {result['trained']} of {adapters} adapters had learnt "
        "their answer.",
        "",
        *table_of(header, rows),
        f"Throughput with {adapters} adapters is {result['throughput_ratio']:.2f} of that with one; the server took "
        f"{result['peak_mb']:,.0f} MiB at the most.",
        "",
    ]


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "many clients, many adapters, one server", doc, measure, work, table, rounds=1, threads=(2,)))
