"""How every command here measures: rounds that take turns, ratios with their spread, the machine's ceilings, one page of results.

A command is a ``Command``. Its ``measure`` runs once per number of threads and returns one JSON object; the work itself is
done by programs that ``in_worker`` starts, so that memory peaks and thread pools are a measurement's own. Nothing but the
standard library is imported here before a measurement needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/RESULTS.md"
ORDER = ("rl_step", "sample", "train", "concurrency", "toggle", "long", "measures", "http_step", "load", "async_rl")
HEAD = """# Benchmarks

Each section is written by the command that it names. Figures are medians of rounds in which the sides took turns, with the
lowest and highest round in brackets; only ratios carry over to other machines.
"""
PACKAGES = ("torch", "transformers", "peft")
Json = dict[str, Any]


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Settings:
    """What one measurement is asked for."""

    threads: int
    device: str
    models: Sequence[str]
    rounds: int
    quick: bool


@dataclass(frozen=True)
class Command:
    file: str
    title: str
    doc: str
    measure: Callable[[Settings], Json]
    """Runs in the command's own process, once per number of threads."""
    work: Callable[[Json], Any]
    """Runs in a worker: from the request given to ``in_worker`` to what that returns."""
    table: Callable[[Json], list[str]]
    """One result of ``measure`` as lines of Markdown."""
    rounds: int = 5
    threads: Sequence[int] = (1, 2)
    models: Sequence[str] = ("nano",)
    packages: Sequence[str] = field(default=PACKAGES)

    @property
    def name(self) -> str:
        return Path(self.file).stem


def run(command: Command) -> None:
    """The whole program: parse arguments, measure, print one JSON document, write the section if asked to."""
    args = _arguments(command)
    if args.worker:
        print(json.dumps(command.work(json.loads(args.worker))))
        return
    rounds = args.rounds or (1 if args.quick else command.rounds)
    threads = args.threads or (command.threads[:1] if args.quick else command.threads)
    models = args.models or (command.models[:1] if args.quick else command.models)
    results = [command.measure(Settings(count, args.device, models, rounds, args.quick)) for count in threads]
    document = {
        "benchmark": command.name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.device, command.packages),
        "settings": {"rounds": rounds, "models": list(models), "device": args.device, "quick": args.quick},
        "results": [{"threads": count, **result} for count, result in zip(threads, results, strict=True)],
    }
    print(json.dumps(document, indent=1))
    if args.write:
        write_section(args.results, command, document)


def _arguments(command: Command) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=command.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"in which the sides take turns (default {command.rounds})")
    parser.add_argument("--threads", type=int, nargs="+", help=f"of one matrix product; each is measured (default {command.threads})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--models", nargs="+", help=f"nano, 25m (default {command.models})")
    parser.add_argument("--quick", action="store_true", help="one short round: whether it runs, not how fast")
    parser.add_argument("--write", action="store_true", help="put this command's section into the page of results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="that page")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


class WorkerFailed(Exception):
    """A worker ended with an error, or took too long."""


def in_worker(file: str, request: Json, *, python: str = sys.executable, limit: float | None = None) -> Any:
    """What the command in ``file`` answers to ``request``, in a process of its own, with ``request["threads"]`` threads.

    Raises:
        WorkerFailed: it took more than ``limit`` seconds, or failed.
    """
    command = [python, file, "--worker", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment_of(request), timeout=limit)
    except subprocess.TimeoutExpired:
        raise WorkerFailed(f"took more than {limit:.0f} s") from None
    if done.returncode:
        raise WorkerFailed(done.stderr.strip()[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def environment_of(request: Json) -> dict[str, str]:
    """A worker's."""
    return os.environ | {
        "OMP_NUM_THREADS": str(request["threads"]),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- time and memory


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds until the work is done, on the device too."""
    synchronize(device)
    clock = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - clock


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def take_turns(sides: Mapping[str, Callable[[int], object]], rounds: int, device: str = "cpu", warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side in each round. Every round runs all sides, each round beginning with another; the first ``warmup``
    rounds are not counted. A side is called with the number of the round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = seconds_of(lambda side=sides[name], n=number: side(n), device)
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Round by round ``over / under``, and the spread of that."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def shown(values: Mapping[str, float] | None, form: str = ".2f") -> str:
    """A spread as text."""
    return "-" if values is None else f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def resident_mb() -> float:
    """Main memory of this process now, MiB."""
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The most main memory of this process so far, MiB. Not ru_maxrss, which a child inherits from its parent."""
    return _status_mb("VmHWM")


def forget_peak(device: str) -> None:
    """Let peaks count from now on, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def device_peak_mb(device: str) -> float | None:
    """The most GPU memory that tensors took so far, MiB."""
    if device != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


# ---------------------------------------------------------------- ceilings


def matmul_peak(device: str, dtype: Any) -> float:
    """FLOP/s of the best of twenty products of two square matrices: 1,024 wide on a CPU, 8,192 on a GPU."""
    import torch

    width = 8192 if device == "cuda" else 1024
    a = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * width**3 / min(seconds_of(lambda: a @ a, device) for _ in range(20))


def bandwidth_peak(device: str) -> float:
    """Bytes a second, read and written, of the best of ten copies of 256 MiB."""
    import torch

    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def resolve_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str, packages: Sequence[str]) -> Json:
    found: Json = {"cpu": _cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    if resolve_device(device) == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    found["packages"] = [name if "==" in name else f"{name}=={importlib.metadata.version(name)}" for name in packages]
    return found


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


# ---------------------------------------------------------------- the page


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]


def write_section(path: Path, command: Command, document: Json) -> None:
    """Replace this command's section of the page and leave the others. A page without marked sections is begun anew."""
    sections = _sections(path.read_text()) if path.exists() else {}
    sections[command.name] = "\n".join(_section(command, document))
    ordered = sorted(sections, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    marked = [f"<!-- {name} -->\n{sections[name].strip()}\n<!-- end of {name} -->\n" for name in ordered]
    path.write_text("\n".join([HEAD, *marked]))


def _sections(page: str) -> dict[str, str]:
    return {m[1]: m[2] for m in re.finditer(r"<!-- (\w+) -->\n(.*?)\n<!-- end of \1 -->", page, re.DOTALL)}


def _section(command: Command, document: Json) -> list[str]:
    lines = [f"## `python benchmarks/{command.name}.py`: {command.title}", ""]
    rounds, found = document["settings"]["rounds"], document["machine"]
    for result in document["results"]:
        threads = result["threads"]
        lines += [f"**{threads} thread{'s' * (threads != 1)}**, {rounds} round{'s' * (rounds != 1)}.", "", *command.table(result)]
    hardware = ", ".join(filter(None, [found.get("gpu"), found["cpu"], f"{found['cores']} cores"]))
    quick = " A quick run: not for comparison." if document["settings"]["quick"] else ""
    return [*lines, f"{document['date']}; {hardware}; Python {found['python']}, {', '.join(found['packages'])}.{quick}", ""]


def request_of(settings: Settings, **more: Any) -> Json:
    """The request that ``in_worker`` passes on."""
    return asdict(settings) | more
