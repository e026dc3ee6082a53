"""What it costs to switch between adapters, to load one, and to keep a thousand: Veneer beside PEFT.

    python benchmarks/toggle.py             # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

Two adapters, a and b, answer single-token requests in threes, a b b, then b a a: the second of three follows another adapter,
the third the same one, and a switch costs the difference of the two. A PEFT request is set_adapter, where the adapter
changes, and generate. Loading puts a rank-8 checkpoint that is in memory over an adapter that is there: load_state, and
set_peft_model_state_dict. Memory is the process's growth from no adapter to 1, 10, 100 and 1,000 of rank 1; PEFT is
stopped after 60 seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from measure import Command, Json, Settings, in_worker, ratios, request_of, resident_mb, run, say, seconds_of, shown, spread, table_of

COUNTS = (1, 10, 100, 1000)
PROMPT, PATIENCE = 30, 60.0


# ---------------------------------------------------------------- in workers


def work(request: Json) -> Json:
    return {"latency": latency, "memory": memory}[request["job"]](request)


def latency(request: Json) -> Json:
    """Milliseconds of requests, switches and loads; both sides take turns, request by request."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from sides import generate, peft_model, prepare, prompts_of, veneer_engine, veneer_sample

    device = prepare(request)
    engine, peft = veneer_engine("nano", device, 2), peft_model("nano", device, 2)
    prompt = prompts_of(1, PROMPT)
    state = get_peft_model_state_dict(peft, adapter_name="a0")
    checkpoint = engine.save_state("a0", "sampler").result()

    def ask_peft(name: str) -> None:
        if peft.active_adapter != name:
            peft.set_adapter(name)
        generate(peft, prompt, 1)

    asks: dict[str, Callable[[str], object]] = {"veneer": lambda name: veneer_sample(engine, prompt, 1, [1], [name], 0), "peft": ask_peft}
    loads: dict[str, Callable[[], object]] = {
        "veneer": lambda: engine.load_state("a1", checkpoint).result(),
        "peft": lambda: set_peft_model_state_dict(peft, state, adapter_name="a1"),
    }
    rounds = [one_round(asks, loads, 5 if request["quick"] else 50, device) for _ in range(1 + request["rounds"])][1:]
    return {side: {name: [one[side][name] for one in rounds] for name in rounds[0][side]} for side in asks}


def one_round(asks: dict[str, Callable[[str], object]], loads: dict[str, Callable[[], object]], pairs: int, device: str) -> Json:
    """Medians of one round, milliseconds."""
    times: dict[str, dict[str, list[float]]] = {side: {"switched": [], "same": [], "load": []} for side in asks}
    for number in range(pairs):
        for side, ask in asks.items():
            ask(f"a{(number + 1) % 2}")  # not counted: the first request after the other side's finds its caches cold
            for kind in ("switched", "same"):
                times[side][kind].append(1e3 * seconds_of(lambda a=ask, n=f"a{number % 2}": a(n), device))
    for _ in range(pairs):
        for side, load in loads.items():
            times[side]["load"].append(1e3 * seconds_of(load, device))
    for ask in asks.values():  # what the loads left cold is not the next round's to pay
        for name in ("a0", "a1"):
            ask(name)
    return {side: {name: statistics.median(many) for name, many in kinds.items()} for side, kinds in times.items()}


def memory(request: Json) -> Json:
    """Growth of the process with the number of adapters, MiB, and milliseconds to add one, mean of those since the last count."""
    from peft import get_peft_model

    from sides import adapter_size, peft_config, plain_model, prepare, veneer_engine
    from veneer.types import LoraConfig

    device, side = prepare(request), request["side"]
    engine: Any = veneer_engine("nano", device, 0) if side == "veneer" else None
    plain = plain_model("nano", device)
    parameters = adapter_size(plain, 1)
    before, model, found, begun = resident_mb(), None, {}, time.monotonic()
    clock, counted = time.perf_counter(), 0
    for number in range(max(request["counts"])):
        if side == "veneer":
            engine.create_adapter(f"a{number}", LoraConfig(rank=1, seed=number))
        elif model is None:
            model = get_peft_model(plain, peft_config(1), adapter_name="a0")
        else:
            model.add_adapter(f"a{number}", peft_config(1))
        if number + 1 in request["counts"]:
            took = (time.perf_counter() - clock) / (number + 1 - counted)
            found[str(number + 1)] = {"grown_mb": resident_mb() - before, "add_ms": 1e3 * took}
            clock, counted = time.perf_counter(), number + 1
        if side == "peft" and time.monotonic() - begun > PATIENCE:
            found["stopped_at"] = number + 1
            break
    return {"parameters": parameters, "adapters": found}


# ---------------------------------------------------------------- the command


def switch_of(raw: Json) -> Json:
    """One side's rounds as figures."""
    cost = [a - b for a, b in zip(raw["switched"], raw["same"], strict=True)]
    return {
        "first_token_ms": {"same_adapter": spread(raw["same"]), "another_adapter": spread(raw["switched"])},
        "switch_ms": spread(cost),
        "load_ms": spread(raw["load"]),
    }


def measure(settings: Settings) -> Json:
    raw = in_worker(__file__, request_of(settings, job="latency"))
    found: Json = {side: switch_of(raw[side]) for side in ("veneer", "peft")}
    found["peft_to_veneer"] = {
        "first_token_same_adapter": ratios(raw["peft"]["same"], raw["veneer"]["same"]),
        "first_token_another_adapter": ratios(raw["peft"]["switched"], raw["veneer"]["switched"]),
        "load": ratios(raw["peft"]["load"], raw["veneer"]["load"]),
    }
    say(f"{settings.threads} thread(s): switch {shown(found['veneer']['switch_ms'])} ms, PEFT {shown(found['peft']['switch_ms'])} ms")
    found["memory"] = {}
    wanted: Sequence[int] = COUNTS[:2] if settings.quick else COUNTS
    for side in ("veneer", "peft"):
        found["memory"][side] = in_worker(__file__, request_of(settings, job="memory", side=side, counts=wanted))
        say(f"{side}: {found['memory'][side]['adapters']}")
    return found


def table(result: Json) -> list[str]:
    sides, ratio = [result["veneer"], result["peft"]], result["peft_to_veneer"]
    rows = [
        ["first token after a request of the same adapter", *(shown(s["first_token_ms"]["same_adapter"]) for s in sides)],
        ["first token after a request of another adapter", *(shown(s["first_token_ms"]["another_adapter"]) for s in sides)],
        ["the switch: their difference", *(shown(s["switch_ms"]) for s in sides)],
        ["loading a rank-8 checkpoint from memory", *(shown(s["load_ms"]) for s in sides)],
    ]
    keys = ("first_token_same_adapter", "first_token_another_adapter", None, "load")
    rows = [[*row, "-" if key is None else shown(ratio[key])] for row, key in zip(rows, keys, strict=True)]
    lines = table_of(["milliseconds", "Veneer", "PEFT", "PEFT / Veneer"], rows)
    ours, theirs = (result["memory"][side]["adapters"] for side in ("veneer", "peft"))
    rows = []
    for count, one in ours.items():
        peer = theirs.get(count)
        rows.append([count, *(f"{one[key]:.1f}" for key in ("grown_mb", "add_ms"))])
        rows[-1] += ["-", "-"] if peer is None else [f"{peer[key]:.1f}" for key in ("grown_mb", "add_ms")]
    header = ["adapters of rank 1", "Veneer: grown by, MiB", "to add one, ms", "PEFT: grown by, MiB", "to add one, ms"]
    lines += table_of(header, rows)
    parameters = result["memory"]["veneer"]["parameters"]
    stopped = f" PEFT was stopped at {theirs['stopped_at']} adapters." if "stopped_at" in theirs else ""
    return [*lines, f"An adapter has {parameters:,} parameters: {parameters * 4 / 2**20:.2f} MiB per float32 copy.{stopped}", ""]


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "switching, loading and keeping adapters, beside PEFT", doc, measure, work, table, threads=(1,)))
