"""What different programs say of the texts that an adapter wrote: our trainer, a server over HTTP, stock PEFT, stock transformers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from veneer.assets import resolve_base
from veneer.cli.assemble import Home, Machine
from veneer.engine import stock
from veneer.engine.merge import write_merged
from veneer.measure.canary import LIMITS, canary_tokens
from veneer.measure.equivalence import Text, compare
from veneer.store.adapters import write_adapter
from veneer.store.registry import Registry, is_path
from veneer.train.datums import trajectory_to_data
from veneer.train.evaluate import evaluate
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, derive_seed
from veneer.types import (
    AdapterError,
    AttestationError,
    Datum,
    Floats,
    RequestError,
    RunError,
    SamplingParams,
    Tokens,
    Trajectory,
    Transition,
)

Rows = list[list[Floats]]
"""Per text and part the log-probabilities of the sampled tokens."""
UNTRAINED_TOKENS = 48
"""Of each completion where there is no environment."""
BATCH = 16
"""Rows in one request to a server."""
KEY = "VENEER_API_KEY"
WHY_NOT = {
    "server": "a server answers by names of the registry: import the adapter first",
    "PEFT": "it is not installed: pip install peft",
}
"""A side that was not asked."""


@dataclass(frozen=True)
class Written:
    """A text with the rows of tokens that it stands in; mask says where."""

    text: Text
    data: Sequence[Datum]


def compare_sides(
    machine: Machine, reference: str, home: Home | None, prompts: int, seed: int, base: str, threads: int, server: str | None
) -> dict[str, Any]:
    """The whole report, as JSON. ``server``: its address; None: one is started for this, and ended.

    Raises:
        AdapterError: it cannot be used, or is a full copy.
        RunError, RequestError, AttestationError: a side fails.
    """
    entry, checkpoint, name = Registry().resolve(reference), machine.read(reference), machine.load(reference)
    if checkpoint.config is None:
        raise AdapterError(f"adapter {reference!r} is a fully fine-tuned copy; compared are programs that run low-rank adapters")
    named, ours = not is_path(reference), server is None
    starting = a_server(base, threads, machine) if named and ours else nullcontext(lambda: server or "")
    with tempfile.TemporaryDirectory() as folder, starting as address:
        texts = write_on(machine, name, prompts, seed) if home is None else play(machine, name, home, prompts, seed)
        sides: dict[str, Rows | None] = {"sampler": [list(written.text.sampled) for written in texts], "server": None}
        if named and not ours:
            sides["server"] = ask_server(address(), reference, entry.digest, texts)
        peft, merged = Path(folder) / "peft", Path(folder) / "merged"
        write_adapter(peft, dataclasses.replace(checkpoint, kind="sampler", optimizer={}), {})
        stored = write_merged(base, checkpoint, merged, None).dtype
        models = [(resolve_base(base), peft), (str(merged), None)]
        sides["PEFT"], sides["merged"] = ask_stock(models, machine, threads, texts, Path(folder))
        if named and ours:  # it started while the others were asked
            sides["server"] = ask_server(address(), reference, entry.digest, texts)
    graded, trainer = [written.text for written in texts], ask_trainer(machine, name, texts)
    limit = LIMITS[machine.engine.dtype]
    limits = {"merged": max(limit, LIMITS[stored])}
    gaps = {side: compare(graded, trainer, rows, limits.get(side, limit)) for side, rows in sides.items() if rows is not None}
    return {
        "adapter": reference,
        "digest": entry.digest,
        "base": machine.engine.base_id,
        "base_digest": machine.engine.base_digest,
        "dtype": machine.engine.dtype,
        "merged_stored_in": stored,
        "env": None if home is None else home.env.name,
        "texts": len(texts),
        "tokens": sum(len(part) for text in graded for part in text.sampled),
        "reward": None if home is None else statistics.fmean(text.reward or 0.0 for text in graded),
        "sides": {side: {**dataclasses.asdict(gap), "within": gap.within} for side, gap in gaps.items()},
        "left_out": {side: WHY_NOT[side] for side, rows in sides.items() if rows is None},
        "equal": all(gap.within for gap in gaps.values()),
    }


# ---------------------------------------------------------------- texts


def play(machine: Machine, name: str, home: Home, problems: int, seed: int) -> list[Written]:
    """Held-out problems, answered by the adapter once each; the episodes that did not fail."""
    policy = Policy(machine.engine, machine.renderer, name, SamplingParams(max_tokens=home.max_tokens), home.env.seconds)
    result = asyncio.run(evaluate(policy, home.dataset(), problems, seed))
    check_failures([result.group()], home.env.max_failed_share)
    return [_written(t, t.reward) for t in result.trajectories if t.error is None]


def write_on(machine: Machine, name: str, prompts: int, seed: int) -> list[Written]:
    """Completions of rows of tokens, by a rule that never changes, of different lengths."""
    engine, row = machine.engine, canary_tokens(machine.renderer.vocab_size)
    starts = [np.roll(row, i)[: 4 + i % (len(row) - 3)] for i in range(prompts)]
    params = [SamplingParams(max_tokens=UNTRAINED_TOKENS, seed=derive_seed("equivalence", seed, i)) for i in range(prompts)]
    futures = [engine.sample(start, name, p) for start, p in zip(starts, params, strict=True)]
    samples = [future.result()[0] for future in futures]
    turns = [Transition(start, sample, {"role": "assistant", "content": ""}, 0.0) for start, sample in zip(starts, samples, strict=True)]
    return [_written(Trajectory([turn], 0.0), None) for turn in turns]


def _written(trajectory: Trajectory, reward: float | None) -> Written:
    data = trajectory_to_data(trajectory)
    return Written(Text([datum.logprobs[datum.mask > 0] for datum in data], reward), data)


def _flat(texts: Sequence[Written]) -> list[Datum]:
    return [datum for written in texts for datum in written.data]


def _rows(texts: Sequence[Written]) -> list[Tokens]:
    return [np.append(datum.tokens, datum.targets[-1]) for datum in _flat(texts)]


def _picked(texts: Sequence[Written], found: Sequence[Floats]) -> Rows:
    """Of log-probabilities of every token but the first of each row, those of sampled tokens, by text and part."""
    rest = iter(found)
    return [[next(rest)[datum.mask > 0] for datum in written.data] for written in texts]


# ---------------------------------------------------------------- sides


def ask_trainer(machine: Machine, name: str, texts: Sequence[Written]) -> Rows:
    return _picked(texts, machine.engine.forward(name, _flat(texts), "cross_entropy").result().logprobs_D)


def ask_stock(
    models: Sequence[tuple[str, Path | None]], machine: Machine, threads: int, texts: Sequence[Written], workplace: Path
) -> list[Rows | None]:
    """Models by name or folder, each with a PEFT folder or none, in a process of its own, on the machine's device and in its dtype.
    None where PEFT is wanted and not installed.

    Raises:
        RunError: it failed; quotes the last line that it wrote.
    """
    request, rows = workplace / "stock.json", workplace / "stock-rows"
    save_file({str(i): row for i, row in enumerate(_rows(texts))}, rows)
    jobs = [
        {"model": model, "adapter": None if adapter is None else str(adapter), "out": str(workplace / f"stock-{i}")}
        for i, (model, adapter) in enumerate(models)
    ]
    settings = {"dtype": machine.engine.dtype, "device": str(machine.engine.base.device), "threads": threads}
    request.write_text(json.dumps({**settings, "rows": str(rows), "jobs": jobs}))
    command = [sys.executable, "-P", stock.__file__, str(request)]  # -P: what lies beside the program is not to be imported
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"stock transformers or PEFT failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    found = [load_file(job["out"]) if Path(job["out"]).is_file() else None for job in jobs]
    return [None if rows is None else _picked(texts, [rows[str(i)] for i in range(len(rows))]) for rows in found]


def ask_server(url: str, model: str, digest: str, texts: Sequence[Written]) -> Rows:
    """A running server, by the adapter's name there, over its ``/v1/completions``.

    Raises:
        RequestError, RunError: it refused, or does not answer.
        AttestationError: it answered with other weights.
    """
    rows = _rows(texts)
    found: list[Floats] = []
    for i in range(0, len(rows), BATCH):
        batch = [row.tolist() for row in rows[i : i + BATCH]]
        body = {"model": model, "prompt": batch, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1}
        answer, told = _post(f"{url.rstrip('/')}/v1/completions", body)
        if told != digest:
            raise AttestationError(f"{url} answered {model!r} with the weights {(told or 'of the base')[:12]}; asked for was {digest[:12]}")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found += [np.array(choice["logprobs"]["token_logprobs"][1:], np.float32) for choice in choices]
    return _picked(texts, found)


def _post(url: str, body: object) -> tuple[dict[str, Any], str | None]:
    """The answer, and the digest of the adapter that gave it."""
    key = os.environ.get(KEY)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
            return json.load(response), response.headers.get("x-veneer-adapter-digest")
    except urllib.error.HTTPError as error:
        hint = f"; set {KEY}" if error.code == 401 else ""
        kind = RequestError if error.code < 500 else RunError
        raise kind(f"{url} answered {error.code}: {' '.join(error.read().decode(errors='replace').split())[:300]}{hint}") from error
    except OSError as error:
        raise RequestError(f"{url} cannot be reached ({error}); is a server running there?") from error


@contextmanager
def a_server(base: str, threads: int, machine: Machine) -> Generator[Callable[[], str]]:
    """``veneer serve`` on a free port, for as long as it is needed. What comes of it waits until it answers, and tells where.

    Raises:
        RunError: it does not start.
    """
    device = machine.engine.base.device.type
    command = [sys.executable, "-m", "veneer", "serve", "--base", base, "--port", "0", "--threads", str(threads), "--device", device]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    stderr = process.stderr

    def address() -> str:
        last = "no word"
        for line in stderr:
            if found := re.search(r"serving .* on (http://\S+)", line):
                return found[1]
            last = line.strip() or last
        raise RunError(f"veneer serve did not start: {last}")

    try:
        yield address
    finally:
        process.terminate()
        process.wait()
