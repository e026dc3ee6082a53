"""What the measures beside a run cost: a run as it is, beside the same run without them, in turns in one process.

    python benchmarks/measures.py           # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

recipes/sums.toml for 40 steps: rank 1 on nano, 8 problems x 8 episodes a step, 256 held-out problems before, every 20 steps and behind.
No setting turns a measure off, so here their functions are replaced: those of bits, habits, the gradient's noise and the update's anatomy
by ones that return nothing, and on the side that has them by ones that also look at the clock. Both sides of a round train the same
adapter to the same bytes, which is checked. A third side has the scorecard too (8 problems x 16 tries by both policies), which a run
has only if it is asked for.

A step is sampling, training and what is measured in between; the noise is measured on every 20th. The sum by clocks is the
seconds in the functions over the seconds of the rest. The sum by runs is the one side's time over the other's, less one: with all that
a machine does meanwhile, so it is also told of the processor's time, which leaves out what other programs take.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from measure import ROOT, Command, Json, Settings, in_worker, ratios, request_of, run, say, shown, spread, table_of

STEPS, QUICK_STEPS = 40, 4
SCORECARD = {"problems": 8, "tries": 16}
LIMIT = 0.1
"""What the measures may add to a run's time."""


@dataclass(frozen=True)
class Nothing:
    """A record without anything in it."""


async def _no_metrics(*_: object) -> Json:
    return {}


MEASURES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "bits": {"veneer.train.metrics.reward_bits": lambda *_: 0.0, "veneer.cli.loops.ledger": lambda *_: Nothing()},
    "habits": {"veneer.train.metrics.habit_metrics": lambda *_: {}, "veneer.train.evaluate.habit_metrics": lambda *_: {}},
    "noise": {"veneer.train.learn.noise_metrics": _no_metrics, "veneer.cli.loops.noise_scale": lambda *_: None},
    "anatomy": {"veneer.cli.assemble.updates_of": lambda *_: {}, "veneer.cli.assemble.anatomy": lambda *_: None},
}
"""Where a run looks its measures up, and what stands there if there are none."""
LABELS = {
    "bits": "bits of rewards, ledger",
    "habits": "habits of rollouts",
    "noise": "noise of the gradient",
    "anatomy": "anatomy of the update",
}
IN_STEPS = ("veneer.train.metrics.", "veneer.train.learn.")
"""Those that are within a step."""
SIDES = ("measured", "bare", "scorecard")


# ---------------------------------------------------------------- in a worker


@dataclass
class Clocks:
    """Seconds in the functions of each measure: within steps, and in all of a run."""

    steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))
    whole: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))

    def around(self, measure: str, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(begun: float) -> None:
            took = time.perf_counter() - begun
            self.whole[measure] += took
            self.steps[measure] += took if place.startswith(IN_STEPS) else 0.0

        async def awaited(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return await function(*args)
            finally:
                note(begun)

        def called(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                note(begun)

        return awaited if asyncio.iscoroutinefunction(function) else called


@contextlib.contextmanager
def functions(chosen: Callable[[str, str, Callable[..., Any]], Callable[..., Any]]) -> Generator[None, None, None]:
    """With every function of the measures replaced by what ``chosen(measure, place, function)`` returns."""
    with contextlib.ExitStack() as stack:
        for measure, places in MEASURES.items():
            for place in places:
                path, _, name = place.rpartition(".")
                module = importlib.import_module(path)
                own = getattr(module, name)
                stack.callback(setattr, module, name, own)
                setattr(module, name, chosen(measure, place, own))
        yield


def work(request: Json) -> Json:
    """Rounds of all sides, the first not counted; by side its rounds."""
    import os
    import tempfile

    from veneer.cli.assemble import execute, start
    from veneer.train.config import load_config

    found: dict[str, list[Json]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as home:
        os.environ["VENEER_HOME"] = home
        machine = start("nano", request["threads"], "lora", request["device"])
        for number in range(1 + request["rounds"]):
            steps = QUICK_STEPS if request["quick"] or not number else STEPS
            for side in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
                more = [f"name=r{number}-{side}", f"seed={number}", f"rl.steps={steps}", f"threads={request['threads']}"]
                more += [f"scorecard.{key}={value}" for key, value in SCORECARD.items() if side == "scorecard"]
                more += ["eval.problems=16", "eval.every=2"] if request["quick"] else []
                config, clocks = load_config(ROOT / "recipes/sums.toml", more), Clocks()
                bare = functions(lambda measure, place, own: MEASURES[measure][place])
                clock, processor = time.perf_counter(), time.process_time()
                with bare if side == "bare" else functions(clocks.around):
                    summary, _, folder = execute(config, lambda metrics: None, machine, once=True)
                whole, processor = time.perf_counter() - clock, time.process_time() - processor
                if number:
                    found[side].append({"processor": processor, **one_run(summary, folder.timings(), whole, clocks)})
    return found


def one_run(summary: Json, timings: list[dict[str, float]], whole: float, clocks: Clocks) -> Json:
    steps = sum(t["sample"] + t["train"] for t in timings if t["step"] > 0)
    card = summary.get("scorecard")
    return {
        "whole": whole,
        "steps": steps,
        "step": steps / summary["steps"],
        "digest": summary["adapter_digest"],
        "clocks": {"steps": clocks.steps, "whole": clocks.whole},
        "scorecard": None if card is None else {key: card[key] for key in ("episodes", "seconds")},
    }


# ---------------------------------------------------------------- the command


def shares(measured: list[Json], part: str) -> Json:
    """By measure and in sum, round by round: seconds in its functions over the seconds of the rest, of steps or of the whole run."""
    rest = [one[part] - sum(one["clocks"][part].values()) for one in measured]
    found = {name: [one["clocks"][part][name] / left for one, left in zip(measured, rest, strict=True)] for name in MEASURES}
    found["sum"] = [sum(one["clocks"][part].values()) / left for one, left in zip(measured, rest, strict=True)]
    return {name: spread(many) for name, many in found.items()}


def measure(settings: Settings) -> Json:
    raw = in_worker(__file__, request_of(settings))
    measured, bare, carded = (raw[side] for side in SIDES)
    same = sum(len({one["digest"] for one in ones}) == 1 for ones in zip(measured, bare, carded, strict=True))
    result = {
        "rounds": len(measured),
        "same_bytes": same,
        "step_seconds": {"measured": spread([one["step"] for one in measured]), "bare": spread([one["step"] for one in bare])},
        "run_seconds": {"measured": spread([one["whole"] for one in measured]), "bare": spread([one["whole"] for one in bare])},
        "by_clocks": {part: shares(measured, part) for part in ("steps", "whole")},
        "seconds_by_clocks": {name: spread([one["clocks"]["whole"][name] for one in measured]) for name in MEASURES},
        "by_runs": {part: ratios([one[part] for one in measured], [one[part] for one in bare]) for part in ("steps", "whole", "processor")},
        "scorecard": {
            "episodes": statistics.median(one["scorecard"]["episodes"] for one in carded),
            "seconds": spread([one["scorecard"]["seconds"] for one in carded]),
            "of_the_run": spread([one["scorecard"]["seconds"] / (one["whole"] - one["scorecard"]["seconds"]) for one in carded]),
        },
    }
    say(f"{settings.threads} thread(s): measures are {percent(result['by_clocks']['whole']['sum'])} of a run's time")
    return result


def percent(values: Mapping[str, float], less: float = 0.0) -> str:
    return shown({key: 100 * (value - less) for key, value in values.items()}, ".1f") + " %"


def table(result: Json) -> list[str]:
    steps, whole, took = result["by_clocks"]["steps"], result["by_clocks"]["whole"], result["seconds_by_clocks"]
    rows = [[label, percent(steps[name]), percent(whole[name]), shown(took[name], ".3f")] for name, label in LABELS.items()]
    rows.append(["their sum, by clocks", percent(steps["sum"]), percent(whole["sum"]), "-"])
    steps, whole, processor = (percent(result["by_runs"][part], 1.0) for part in ("steps", "whole", "processor"))
    rows += [["their sum, by runs", steps, whole, "-"], ["the same, of the processor's time", "-", processor, "-"]]
    seconds, card = result["run_seconds"], result["scorecard"]
    verdict = "under" if result["by_clocks"]["whole"]["sum"]["median"] < LIMIT else "above"
    return [
        *table_of(["measure", "of the time of steps", "of the whole run's time", "seconds in a run"], rows),
        f"A run takes {shown(seconds['measured'], '.1f')} s, without measures {shown(seconds['bare'], '.1f')} s: by clocks they are "
        f"{verdict} {LIMIT:.0%} of it. In {result['same_bytes']} of {result['rounds']} rounds all sides trained the same bytes. A "
        f"scorecard of {SCORECARD['problems']} problems x {SCORECARD['tries']} tries plays {card['episodes']:,} episodes in "
        f"{shown(card['seconds'], '.1f')} s, {percent(card['of_the_run'])} of such a run.",
        "",
    ]


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "the measures beside a run", doc, measure, work, table, threads=(1,), packages=("torch",)))
