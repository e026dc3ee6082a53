"""Runs a file's checks one after the other and says what each found; and the few things that all of them need."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from os import environ
from typing import Any

import numpy as np
import tinker
from tinker import types

BASE = "Qwen/Qwen3-8B"
"""The bundled base under the name that the clients know."""
OTHER_NAME = "Qwen/Qwen3.5-9B-Base"
VOCABULARY, CONTEXT = 576, 2048
"""Of the bundled base."""
END = 330
"""Its <|im_end|>, the one end-of-sequence token."""

Figures = dict[str, float | int | str]
Check = Callable[[], Figures | None]


def run_checks(checks: Sequence[Check], description: str) -> None:
    """Run them all; write which passed, which failed and why, and the figures; exit 1 if one failed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--report", help="a file for the JSON document")
    parser.add_argument("--only", help="the name of one check")
    arguments, _ = parser.parse_known_args()
    passed: list[str] = []
    failed: dict[str, str] = {}
    figures: Figures = {}
    for check in checks:
        name, clock = check.__name__, time.monotonic()
        if arguments.only not in (None, name):
            continue
        try:
            found = check() or {}
        except BaseException as error:
            traceback.print_exc()
            failed[name] = in_one_line(error)
            print(f"FAILED {name} ({time.monotonic() - clock:.1f} s): {failed[name]}", flush=True)
            if isinstance(error, KeyboardInterrupt):
                break
        else:
            passed.append(name)
            figures |= found
            print(f"ok     {name} ({time.monotonic() - clock:.1f} s) {found or ''}", flush=True)
    if arguments.report:
        with open(arguments.report, "w") as report:
            json.dump({"passed": passed, "failed": failed, "figures": figures}, report)
    sys.exit(1 if failed or not passed else 0)


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if not text and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.name}, line {frame.lineno}: {frame.line}"
    return f"{type(error).__name__}: {text[:300]}"


# ---------------------------------------------------------------- sessions and models


def new_model(session: tinker.ServiceClient, rank: int = 8, seed: int = 1, base: str = BASE, **flags: Any) -> tinker.TrainingClient:
    return session.create_lora_training_client(base, rank=rank, seed=seed, **flags).result()


def train(model: tinker.TrainingClient, data: list[types.Datum], steps: int = 1, learning_rate: float = 1e-3) -> list[float]:
    """Steps of cross-entropy; the summed loss before each."""
    losses = []
    for _ in range(steps):
        passed = model.forward_backward(data, "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
        losses.append(passed.result().metrics["loss:sum"])
    return losses


def logprobs_of(model: tinker.TrainingClient, data: list[types.Datum]) -> list[np.ndarray]:
    """Of every target under the training weights."""
    return [out["logprobs"].to_numpy() for out in model.forward(data, "cross_entropy").result().loss_fn_outputs]


def refused(call: Callable[[], Any], *words: str, within: float = 20.0) -> str:
    """The call fails as a user's mistake, soon, and its message holds the words; returns the message.

    A 4xx answer and a failed future of category "user" are both right; 409 and 429 are not, since the SDK tries those again.
    """
    clock, answer, failure = time.monotonic(), None, None
    try:
        answer = call()
    except (tinker.RequestFailedError, tinker.APIStatusError) as error:
        failure = error
    assert failure is not None, f"it was not refused; the answer was {str(answer)[:200]}"
    assert time.monotonic() - clock < within, f"refused only after {time.monotonic() - clock:.0f} s"
    message = str(failure)
    if isinstance(failure, tinker.RequestFailedError):
        assert failure.category is types.RequestErrorCategory.User, f"category {failure.category}: {message}"
    else:
        assert failure.status_code in (400, 403, 404, 410, 413, 422), f"status {failure.status_code}: {message}"
    for word in words:
        assert word in message, f"the message does not name {word!r}: {message}"
    assert "Traceback" not in message, message
    return message


# ---------------------------------------------------------------- data


def tokens_of(text: str) -> list[int]:
    """The bundled tokenizer reads a question as its chat template writes it."""
    tokenizer = tokenizer_of()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    return [int(i) for i in ids]


def tokenizer_of() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(environ["ACCEPTANCE_BASE"])


def prompt_of(text: str) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens_of(text))


def rows(count: int = 4, length: int = 24, seed: int = 0) -> list[types.Datum]:
    """Random token rows with random weights, a quarter of which are zero."""
    rng = np.random.default_rng(seed)
    return [row(rng, length + int(rng.integers(0, 8))) for _ in range(count)]


def row(rng: np.random.Generator, length: int) -> types.Datum:
    weights = rng.random(length).astype(np.float32) * (rng.random(length) > 0.25)
    return datum(rng.integers(0, 256, length), rng.integers(0, 256, length), weights=weights.astype(np.float32))


def datum(tokens: Any, targets: Any, **arrays: Any) -> types.Datum:
    """Position i reads ``tokens[i]`` and predicts ``targets[i]``."""
    return types.Datum(
        model_input=types.ModelInput.from_ints([int(t) for t in tokens]),
        loss_fn_inputs={"target_tokens": np.asarray(targets, np.int64), **arrays},
    )


def policy_rows(count: int = 4, length: int = 20, seed: int = 0, spread: float = 0.3) -> list[types.Datum]:
    """Rows as reinforcement learning makes them: advantages, and the sampler's log-probabilities, here uniform ones moved about."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        q = rng.normal(-np.log(VOCABULARY), spread, length).astype(np.float32)
        advantages = rng.normal(0, 1, length).astype(np.float32)
        data.append(datum(rng.integers(0, 256, length), rng.integers(0, 256, length), logprobs=q, advantages=advantages))
    return data


def close(ours: Any, theirs: Any, tolerance: float, what: str) -> float:
    """The largest absolute difference; must be within the tolerance."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    worst = float(np.abs(ours - theirs).max(initial=0.0))
    assert worst <= tolerance, f"{what}: {worst:.2e} apart, allowed {tolerance:.0e}"
    return worst


# ---------------------------------------------------------------- plain HTTP


def http(method: str, path: str, body: Any = None, content_type: str = "application/json") -> tuple[int, Any]:
    """A call beside the SDK: status, and the JSON document or the bytes. ``body``: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        environ["TINKER_BASE_URL"] + path, data, {"Content-Type": content_type, "X-API-Key": "tml-dummy"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, raw = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    try:
        return status, json.loads(raw)
    except ValueError:
        return status, raw
