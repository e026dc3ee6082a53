"""How time and memory grow: with prompts, completions, rows, adapters, rows to train on, and the vocabulary.

    python benchmarks/long.py               # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

Every point is run by Veneer and by its peer, each in a process of its own, so that a peak is the point's; the processes take
turns. Random models of nano's shape, with a context of 8,192 or a vocabulary of 151,936. Per axis the rest stays fixed:

    prompt        1 prompt of the length, 8 completions of 16 tokens; peer: generate
    completion    8 rows after prompts of 32 tokens; peer: generate
    rows          8 completions each of prompts of 32 tokens, 32 tokens; peer: generate
    adapters      64 rows, 32 tokens, spread over adapters of rank 8; peer: PEFT's mixed batches
    train         forward_backward of 8 rows, half prompt, half completion; peer: PEFT and autograd
    vocabulary    forward_backward of 16 rows of 32 + 64 tokens; peer: PEFT and autograd, making the logits of all positions

A peer that needs more than 20 seconds for one pass is left out at that point. Memory is the process's peak above what it held
when its model was loaded; on a GPU, of the tensors. Last, what one process holds while an RL run of Veneer goes on: 500 steps of 64
completions of 32 tokens on nano, with an adapter of rank 8.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from measure import (
    Command,
    Json,
    Settings,
    WorkerFailed,
    device_peak_mb,
    forget_peak,
    in_worker,
    peak_mb,
    ratios,
    request_of,
    resident_mb,
    run,
    say,
    seconds_of,
    shown,
    spread,
    table_of,
)

AXES: dict[str, tuple[int, ...]] = {
    "prompt": (128, 512, 1024, 2048, 4096),
    "completion": (64, 256, 1024),
    "rows": (8, 64, 256, 1024),
    "adapters": (1, 4, 16, 64),
    "train": (128, 512, 1024, 2048, 4096),
    "vocabulary": (384, 151936),
}
QUICK: dict[str, tuple[int, ...]] = {"prompt": (128,), "vocabulary": (384,)}
PATIENCE, START = 20.0, 60.0
UNITS = {"prompt": "token, prompt and completions", "train": "position", "vocabulary": "position"}
COPIES = 8
STEPS, QUICK_STEPS = (10, 100, 200, 300, 400, 500), (1, 3)


# ---------------------------------------------------------------- in workers


def work(request: Json) -> Json:
    """One side at one point: seconds of a few passes, the tokens in each, and the peak in MiB."""
    from sides import prepare

    device = prepare(request)
    if request["axis"] == "steps":
        return {"resident_mb": held_after(request["value"], device)}
    build = training if request["axis"] in ("train", "vocabulary") else sampling
    one_pass, tokens = build(request, device)
    forget_peak(device)
    held = resident_mb()
    begun = time.monotonic()
    seconds_of(one_pass, device)
    if time.monotonic() - begun > PATIENCE and request["side"] == "peer":
        raise TimeoutError(f"one pass took more than {PATIENCE:.0f} s")
    seconds = statistics.median(seconds_of(one_pass, device) for _ in range(request["passes"]))
    on_device = device_peak_mb(device)
    return {"seconds": seconds, "tokens": tokens, "peak_mb": peak_mb() - held if on_device is None else on_device}


def sampling(request: Json, device: str) -> tuple[Callable[[], object], int]:
    from sides import generate, peft_model, plain_model, prompts_of, veneer_engine, veneer_sample

    axis, value = request["axis"], request["value"]
    prompts = prompts_of({"prompt": 1, "completion": 8, "rows": value // COPIES, "adapters": 64}[axis], value if axis == "prompt" else 32)
    copies = COPIES if axis in ("prompt", "rows") else 1
    tokens = {"prompt": 16, "completion": value}.get(axis, 32)
    adapters = value if axis == "adapters" else 0
    names = [f"a{i * adapters // len(prompts)}" for i in range(len(prompts))] if adapters else [None] * len(prompts)
    total = sum(map(len, prompts)) + len(prompts) * copies * tokens
    if request["side"] == "veneer":
        engine = veneer_engine("nano-8k", device, adapters)
        return lambda: veneer_sample(engine, prompts, copies, [tokens] * len(prompts), names, 0), total
    rows = [prompt for prompt in prompts for _ in range(copies)]
    if adapters:
        wrapped = peft_model("nano-8k", device, adapters)
        mixed = None if adapters == 1 else [str(name) for name in names]
        return lambda: generate(wrapped, rows, tokens, mixed), total
    plain = plain_model("nano-8k", device)
    return lambda: generate(plain, rows, tokens), total


def training(request: Json, device: str) -> tuple[Callable[[], object], int]:
    from sides import AutogradBatch, datums_of, peft_model, prompts_of, veneer_engine

    axis, value = request["axis"], request["value"]
    model = "nano-150k" if value > 8192 else "nano-8k"
    prompts = prompts_of(8, value // 2) if axis == "train" else prompts_of(16, 32)
    completion = value // 2 if axis == "train" else 64
    data = datums_of(prompts, [completion] * len(prompts), 151936 if model == "nano-150k" else 384)
    total = sum(len(datum.tokens) for datum in data)
    if request["side"] == "veneer":
        engine = veneer_engine(model, device, 1)
        return lambda: engine.forward_backward("a0", data, "importance_sampling").result(), total
    wrapped, batch = peft_model(model, device, 1).train(), AutogradBatch(data, device)

    def autograd() -> None:
        batch.backward(wrapped, all_logits=axis == "vocabulary")
        wrapped.zero_grad()

    return autograd, total


def held_after(steps: list[int], device: str) -> Json:
    """MiB that the process holds after so many steps of one RL run."""
    import asyncio

    from coins import CoinRun
    from sides import veneer_engine
    from veneer.render import load_renderer

    coin_run, held = CoinRun(veneer_engine("nano", device, 1), load_renderer("nano"), "a0"), dict[str, float]()
    for number in range(max(steps)):
        asyncio.run(coin_run.step(number))
        if number + 1 in steps:
            held[str(number + 1)] = resident_mb()
    return held


# ---------------------------------------------------------------- the command


def point_of(settings: Settings, axis: str, value: int) -> Json:
    """Both sides at one point, round by round."""
    passes = 1 if settings.quick else 3
    runs: dict[str, list[Json]] = {"veneer": [], "peer": []}
    found: Json = {}
    for number in range(settings.rounds):
        for side in ("veneer", "peer") if number % 2 == 0 else ("peer", "veneer"):
            if side == "peer" and "peer_left_out" in found:
                continue
            request = request_of(settings, axis=axis, value=value, side=side, passes=passes)
            try:
                runs[side].append(in_worker(__file__, request, limit=START + (1 + passes) * PATIENCE if side == "peer" else None))
            except WorkerFailed as failure:
                if side == "veneer":
                    raise
                found["peer_left_out"] = str(failure).splitlines()[-1]
                runs["peer"].clear()
    for side, many in runs.items():
        if many:
            micro = [1e6 * one["seconds"] / one["tokens"] for one in many]
            found[side] = {"microseconds_per_token": spread(micro), "peak_mb": spread([one["peak_mb"] for one in many])}
    if runs["peer"]:
        seconds, peaks = ([[one[key] for one in runs[side]] for side in ("peer", "veneer")] for key in ("seconds", "peak_mb"))
        found["peer_to_veneer"] = {"seconds": ratios(*seconds), "peak_mb": ratios(*peaks)}
    return found


def measure(settings: Settings) -> Json:
    axes: Json = {}
    for axis, values in (QUICK if settings.quick else AXES).items():
        axes[axis] = {}
        for value in values:
            point = axes[axis][str(value)] = point_of(settings, axis, value)
            took = point["veneer"]["microseconds_per_token"]["median"]
            say(f"{axis} {value}: {took:.1f} us a token, peer {shown(point.get('peer_to_veneer', {}).get('seconds'))} times as long")
    marks = QUICK_STEPS if settings.quick else STEPS
    held: Json = in_worker(__file__, request_of(settings, axis="steps", value=list(marks), side="veneer", passes=1))["resident_mb"]
    say(f"held after so many steps, MiB: {held}")
    return {"axes": {axis: with_growth(points) for axis, points in axes.items()}, "resident_mb_after_steps": held}


def with_growth(points: Json) -> Json:
    """Each side's time per token over that at the smallest value."""
    first = next(iter(points.values()))
    for point in points.values():
        for side in ("veneer", "peer"):
            if side in point and side in first:
                now, then = (one[side]["microseconds_per_token"]["median"] for one in (point, first))
                point[side]["time_per_token_to_first"] = now / then
    return points


def table(result: Json) -> list[str]:
    lines: list[str] = []
    header = ["", "Veneer, us", "peer / Veneer, time", "Veneer, x first", "peer, x first", "Veneer, MiB", "peer / Veneer, memory"]
    for axis, points in result["axes"].items():
        rows = []
        for value, point in points.items():
            own, peer, ratio = point["veneer"], point.get("peer", {}), point.get("peer_to_veneer", {})
            growth = peer.get("time_per_token_to_first")
            rows.append(
                [
                    f"{int(value):,}",
                    shown(own["microseconds_per_token"], ".1f"),
                    shown(ratio.get("seconds")),
                    f"{own['time_per_token_to_first']:.2f}",
                    "-" if growth is None else f"{growth:.2f}",
                    shown(own["peak_mb"], ",.0f"),
                    shown(ratio.get("peak_mb")),
                ]
            )
        lines += [f"{axis}, time per {UNITS.get(axis, 'token, prompts and completions')}:", "", *table_of(header, rows)]
        lines += [f"- at {value} the peer was left out: {p['peer_left_out']}" for value, p in points.items() if "peer_left_out" in p]
    held = result["resident_mb_after_steps"]
    lines += [
        "One RL run, MiB held after so many steps:",
        "",
        *table_of(["", *held], [["Veneer", *(f"{mb:,.0f}" for mb in held.values())]]),
    ]
    return lines


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "growth with length, rows, adapters and vocabulary", doc, measure, work, table, rounds=3, threads=(1,)))
