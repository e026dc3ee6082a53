"""Time and money: FLOPs and bytes of a step over what a device does in a second."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.measure.flops import StepFlops, StepWork
from veneer.measure.plan.figure import Figure
from veneer.types import ConfigError

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """What a data sheet promises, or what was measured."""

    name: str
    flops: float
    """A second, dense, in ``dtype``."""
    bandwidth: float
    """Bytes a second from its memory."""
    memory: float
    """Bytes."""
    dtype: str
    sheet: str
    """Where the numbers are from."""
    used_flops: tuple[float, float] = (0.1, 0.43)
    """The share of ``flops`` that training reaches."""
    used_bandwidth: tuple[float, float] = (0.3, 0.8)
    """The share of ``bandwidth`` that decoding reaches: an assumption."""


HOPPER = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
AMPERE = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
DEVICES: Mapping[str, Device] = {
    "h200": Device("h200", 989.4 * TERA, 4800 * GIGA, 141 * GIGA, "bfloat16", "https://www.nvidia.com/en-us/data-center/h200/"),
    "h100": Device("h100", 989.4 * TERA, 3350 * GIGA, 80 * GIGA, "bfloat16", HOPPER),
    "a100-80gb": Device("a100-80gb", 312 * TERA, 2039 * GIGA, 80 * GIGA, "bfloat16", AMPERE),
    "l4": Device("l4", 121 * TERA, 300 * GIGA, 24 * GIGA, "bfloat16", ADA),
}
"""SXM where there are several kinds; without sparsity."""
USED = (
    "share of peak in training: 0.43 in Llama 3's pre-training (https://arxiv.org/abs/2407.21783); 0.1 from prime-rl's BENCHMARKS.md, "
    "Qwen3-0.6B on one H100; share of bandwidth in decoding: assumed"
)


def find_device(name: str) -> Device:
    """Raises:
    ConfigError: there is none; names the nearest.
    """
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name, [*DEVICES, "cpu"], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(DEVICES)} and cpu, which is measured"
    raise ConfigError(f"--device {name!r}: {hint}")


@dataclass(frozen=True)
class StepBytes:
    """What decoding reads from memory."""

    weights: float
    """Bytes of the base, read once a token of all completions that run together."""
    cache_token: float
    """Bytes of the keys and values of a token."""
    rows: int
    """Completions that run together."""


def step_seconds(device: Device, flops: StepFlops, work: StepWork, size: StepBytes, used: tuple[float, float]) -> tuple[float, float]:
    """Of sampling and of all else, at these shares of FLOPs and bandwidth.

    Completions decode in waves of ``rows``, each until its longest ends. A token of all of a wave takes what is slower of its products and
    of reading the weights, and of every completion's keys and values the prompt's and, on average, half of what is drawn."""
    of_flops, of_bandwidth = used
    rest = (flops.prompts + flops.old_logprobs + flops.training + flops.attention) / (device.flops * of_flops)
    if not work.samples or not work.drawn:
        return 0.0, rest
    waves = math.ceil(work.episodes / size.rows)
    cache = size.cache_token * work.drawn * (work.prompt_tokens + work.drawn_tokens / 2)
    reading = (waves * work.longest * size.weights + cache) / (device.bandwidth * of_bandwidth)
    return max(reading, flops.sampling / (device.flops * of_flops)), rest


def plan_step_time(device: Device, flops: StepFlops, work: StepWork, size: StepBytes) -> Figure:
    """Seconds of a step; the range is that of the shares."""
    slow, fast = (sum(step_seconds(device, flops, work, size, used)) for used in zip(device.used_flops, device.used_bandwidth, strict=True))
    formula = (
        f"training FLOPs / (peak x {device.used_flops[0]:g} to {device.used_flops[1]:g}) + tokens drawn one after the other x (weights + "
        f"cache) / (bandwidth x {device.used_bandwidth[0]:g} to {device.used_bandwidth[1]:g}), or their FLOPs where these take longer"
    )
    source = f"{device.sheet}; {USED}" if device.name != "cpu" else device.sheet
    note = "environments, graders, and what a program does between two products apart: on small models and a CPU that is as much again"
    return Figure("a step", math.sqrt(slow * fast), "seconds", formula, source, fast, slow, note)


def plan_run_time(step: Figure, steps: int) -> Figure:
    assert step.value is not None
    assert step.low is not None
    assert step.high is not None
    source = "the step's"
    return Figure(
        "the run", steps * step.value, "seconds", f"{steps:,} x a step", source, steps * step.low, steps * step.high, "evaluations apart"
    )


def plan_money(run: Figure, price: float) -> Figure:
    """``price``: of an hour of the device."""
    assert run.value is not None
    assert run.low is not None
    assert run.high is not None
    value, low, high = (price * seconds / 3600 for seconds in (run.value, run.low, run.high))
    return Figure("cost", value, "", f"hours x {price:g}", "--price", low, high, "in the currency of --price")


def steps_within(step: Figure, seconds: float) -> int:
    """That fit even if every step takes as long as it may."""
    assert step.high is not None
    return int(seconds / step.high)


def train_speedup(time_share: float, ratio: float) -> float:
    """How many times faster a run becomes whose training, ``time_share`` of its time, costs ``ratio`` of what it did (Amdahl)."""
    return 1 / ((1 - time_share) + time_share * ratio)
