"""What different programs say of the texts that an adapter wrote: our trainer, a server over HTTP, stock PEFT, stock transformers."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
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
from veneer.train.rl import check_failures
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
    texts = write_on(machine, name, prompts, seed) if home is None else play(machine, name, home, prompts, seed)
    graded = [written.text for written in texts]
    trainer, limit = ask_trainer(machine, name, texts), LIMITS[machine.engine.dtype]
    gaps = {"sampler": compare(graded, trainer, [text.sampled for text in graded], limit)}
    left_out: dict[str, str] = {}

    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        if is_path(reference):
            left_out["server"] = "a server answers by names of the registry: import the adapter first"
        else:
            with a_server(base, threads, machine) if server is None else nullcontext(server) as url:
                gaps["server"] = compare(graded, trainer, ask_server(url, reference, entry.digest, texts), limit)
        write_adapter(workplace / "peft", dataclasses.replace(checkpoint, kind="sampler", optimizer={}), {})
        rows = ask_stock(resolve_base(base), workplace / "peft", machine, threads, texts, workplace)
        if rows is None:
            left_out["PEFT"] = "it is not installed: pip install peft"
        else:
            gaps["PEFT"] = compare(graded, trainer, rows, limit)
        stored = write_merged(base, checkpoint, workplace / "merged", None).dtype
        rows = ask_stock(str(workplace / "merged"), None, machine, threads, texts, workplace)
        assert rows is not None
        gaps["merged"] = compare(graded, trainer, rows, max(limit, LIMITS[stored]))
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
        "sides": {name: {**dataclasses.asdict(gap), "within": gap.within} for name, gap in gaps.items()},
        "left_out": left_out,
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
    data = trajectory_to_data(trajectory, 0.0)
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


def ask_stock(model: str, adapter: Path | None, machine: Machine, threads: int, texts: Sequence[Written], workplace: Path) -> Rows | None:
    """A model by name or folder, with a PEFT folder or none, in a process of its own, on the machine's device and in its dtype. None:
    PEFT is not installed.

    Raises:
        RunError: it failed; quotes the last line that it wrote.
    """
    paths = {name: workplace / f"stock-{name}" for name in ("request", "rows", "out")}
    save_file({str(i): row for i, row in enumerate(_rows(texts))}, paths["rows"])
    request = {
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "dtype": machine.engine.dtype,
        "device": str(machine.engine.base.device),
        "threads": threads,
        "rows": str(paths["rows"]),
        "out": str(paths["out"]),
    }
    paths["request"].write_text(json.dumps(request))
    command = [sys.executable, "-P", stock.__file__, str(paths["request"])]  # -P: what lies beside the program is not to be imported
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == stock.NO_PEFT:
        return None
    if done.returncode:
        raise RunError(
            f"stock {'transformers' if adapter is None else 'PEFT'} failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"
        )
    found = load_file(paths["out"])
    return _picked(texts, [found[str(i)] for i in range(len(found))])


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
def a_server(base: str, threads: int, machine: Machine) -> Generator[str, None, None]:
    """``veneer serve`` on a free port, for as long as it is needed.

    Raises:
        RunError: it does not start.
    """
    settings = {"--base": base, "--port": "0", "--threads": str(threads), "--device": machine.engine.base.device.type}
    command = [sys.executable, "-m", "veneer", "serve", *itertools.chain.from_iterable(settings.items())]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line.strip())
            if found := re.search(r"serving .* on (http://\S+)", line):
                yield found[1]
                break
        else:
            raise RunError(f"veneer serve did not start: {lines[-1] if lines else 'no word'}")
    finally:
        process.terminate()
        process.wait(30)
