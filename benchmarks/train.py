"""Forward and backward passes: Veneer beside PEFT and plain autograd, in seconds and in FLOPs.

    python benchmarks/train.py              # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

64 rows of a 30-token prompt (8 prompts x 8 completions) and 32 completion tokens, a rank-8 adapter on all linear maps, the
importance-sampling loss, no optimizer step. The peer runs the same rows as one batch, makes logits only for completions, and
lets autograd do the rest. ``ragged`` has completions of 4 to 60 tokens, which the peer pads. ``full`` trains all weights, with
Veneer's FullEngine and with plain autograd. FLOPs are counted by torch.utils.flop_counter (src/veneer/engine/counting.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from measure import Command, Json, Settings, in_worker, ratios, request_of, run, say, shown, spread, table_of

PROMPTS, COPIES, PROMPT, COMPLETION, SHORTEST, LONGEST = 8, 8, 30, 32, 4, 60
LABELS = {"equal": "LoRA, equal lengths", "ragged": "LoRA, ragged", "full": "all weights, equal lengths"}


# ---------------------------------------------------------------- counting


def count_flops(work: Callable[[], object]) -> Json:
    """GFLOP of the work, all of it and its products with weights. Runs on this thread alone, as the counter does not see others."""
    from veneer.engine import counting

    flops = counting.count_flops(work)
    return {"gflop": flops.total / 1e9, "linear_gflop": flops.linear / 1e9}


# ---------------------------------------------------------------- in a worker


def data_of(kind: str, vocab: int) -> list[Any]:
    """Datums in groups of COPIES that share a prompt."""
    import numpy as np

    from sides import datums_of, prompts_of

    prompts = [prompt for prompt in prompts_of(PROMPTS, PROMPT) for _ in range(COPIES)]
    lengths = [COMPLETION] * len(prompts)
    if kind == "ragged":
        lengths = np.random.default_rng(1).integers(SHORTEST, LONGEST + 1, len(prompts)).tolist()
    return datums_of(prompts, lengths, vocab)


def work(request: Json) -> Json:
    """One model: LoRA on equal and ragged rows, and full fine-tuning."""
    from measure import matmul_peak, take_turns
    from sides import AutogradBatch, dtype_on, linear_sizes, peft_model, plain_model, prepare, veneer_engine

    device, name = prepare(request), request["model"]
    engine, peft, plain = veneer_engine(name, device, 1), peft_model(name, device, 1).train(), plain_model(name, device).train()
    full = full_engine(name, device)
    vocab, size = plain.config.vocab_size, linear_sizes(plain)
    data = {kind: data_of("ragged" if kind == "ragged" else "equal", vocab) for kind in LABELS}
    batches = {kind: AutogradBatch(data[kind], device) for kind in LABELS}
    for model in (peft, plain):
        model.requires_grad_(model is plain)
    peft.set_adapter("a0")
    sides: dict[str, Callable[[int], float]] = {}
    for kind in LABELS:
        ours, theirs = (full, plain) if kind == "full" else (engine, peft)
        sides[f"veneer {kind}"] = lambda number, kind=kind, ours=ours: run_veneer(ours, data[kind])
        sides[f"torch {kind}"] = lambda number, kind=kind, theirs=theirs: run_torch(theirs, batches[kind])
    losses = {side: call(0) for side, call in sides.items()}
    counted = {side: count_flops(lambda call=call: call(0)) for side, call in sides.items()}
    seconds = take_turns(sides, request["rounds"], device)
    peak = matmul_peak(device, dtype_on(device)) / 1e9
    tokens = {kind: tokens_of(data[kind], batches[kind]) for kind in LABELS}
    forward = {kind: count_flops(lambda kind=kind: run_forward(full if kind == "full" else engine, data[kind])) for kind in LABELS}
    found: Json = {"matmul_peak_gflops": peak}
    for kind in LABELS:
        ours, theirs = f"veneer {kind}", f"torch {kind}"
        found[kind] = {
            "seconds": {"veneer": spread(seconds[ours]), "torch": spread(seconds[theirs])},
            "torch_to_veneer": ratios(seconds[theirs], seconds[ours]),
            "flops": {"veneer": counted[ours], "torch": counted[theirs]},
            "flops_torch_to_veneer": counted[theirs]["gflop"] / counted[ours]["gflop"],
            "share_of_matmul_peak": counted[ours]["gflop"] / peak / statistics.median(seconds[ours]),
            "loss_difference": abs(losses[ours] - losses[theirs]) / abs(losses[theirs]),
            **tokens[kind],
            "positions_run_veneer": (forward[kind]["linear_gflop"] * 5e8 - size[1] * tokens[kind]["trained"]) / size[0],
        }
    for side in ("veneer", "torch"):
        found[f"{side}_lora_to_full"] = {
            "seconds": ratios(seconds[f"{side} equal"], seconds[f"{side} full"]),
            "flops": counted[f"{side} equal"]["gflop"] / counted[f"{side} full"]["gflop"],
        }
    return found


def full_engine(model: str, device: str) -> Any:
    from sides import model_folder
    from veneer.engine import FullEngine, load_base

    engine = FullEngine(load_base(model_folder(model), device))
    engine.create_adapter("a0", None)
    return engine


def run_veneer(engine: Any, data: Sequence[Any]) -> float:
    """The loss; the gradient is added to the adapter's."""
    return engine.forward_backward("a0", data, "importance_sampling").result().metrics["loss:sum"]


def run_forward(engine: Any, data: Sequence[Any]) -> None:
    """The base alone, so that every product's FLOPs are known per token."""
    engine.forward(None, data, "importance_sampling").result()


def run_torch(model: Any, batch: Any) -> float:
    loss = batch.backward(model)
    model.zero_grad()
    return loss


def tokens_of(data: Sequence[Any], batch: Any) -> Json:
    """Positions that linear maps must run: all rows' own, and with each prompt's beginning once; and what the peer runs."""
    import numpy as np

    starts = [int(np.flatnonzero(d.mask)[0]) for d in data]
    prompts = {d.tokens[:start].tobytes(): start for d, start in zip(data, starts, strict=True)}
    return {
        "trained": int(sum(d.mask.sum() for d in data)),
        "positions": sum(len(d.tokens) for d in data),
        "distinct_positions": sum(prompts.values()) + sum(len(d.tokens) - start for d, start in zip(data, starts, strict=True)),
        "positions_run_torch": batch.tokens.numel(),
    }


# ---------------------------------------------------------------- the command


def with_padding(case: Json) -> Json:
    """The share of the positions run that none of the rows asked for."""
    veneer, torch = case["positions_run_veneer"], case["positions_run_torch"]
    shares = {"veneer": 1 - case["distinct_positions"] / veneer, "torch": 1 - case["positions"] / torch}
    return case | {"padding_share": shares, "positions_torch_to_veneer": torch / veneer}


def measure(settings: Settings) -> Json:
    models = {}
    for model in settings.models:
        found = in_worker(__file__, request_of(settings, model=model))
        models[model] = {key: with_padding(value) if key in LABELS else value for key, value in found.items()}
        for kind, label in LABELS.items():
            say(f"{model}, {settings.threads} thread(s), {label}: {shown(found[kind]['torch_to_veneer'])} x torch")
    return {"models": models}


def table(result: Json) -> list[str]:
    lines: list[str] = []
    for model, found in result["models"].items():
        rows = []
        for kind, label in LABELS.items():
            case = found[kind]
            flops, padding = case["flops"], case["padding_share"]
            rows.append(
                [
                    label,
                    shown(case["seconds"]["veneer"], ".3f"),
                    shown(case["torch_to_veneer"]),
                    f"{flops['veneer']['gflop']:,.1f} / {flops['torch']['gflop']:,.1f}",
                    f"{case['share_of_matmul_peak']:.0%}",
                    f"{padding['veneer']:.1%} / {padding['torch']:.1%}",
                ]
            )
        header = ["pass", "Veneer, seconds", "times as fast as torch", "GFLOP, Veneer / torch", "share of peak", "padding, Veneer / torch"]
        lines += [f"Base {model}; matmul peak {found['matmul_peak_gflops']:,.0f} GFLOP/s; torch is PEFT for LoRA:", ""]
        lines += table_of(header, rows)
        for side, name in (("veneer", "Veneer"), ("torch", "plain torch")):
            one = found[f"{side}_lora_to_full"]
            lines.append(f"- LoRA over full fine-tuning in {name}: {shown(one['seconds'])} of the time, {one['flops']:.2f} of the FLOPs")
        lines.append("")
    return lines


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "a training pass beside PEFT and plain autograd", doc, measure, work, table, models=("nano", "25m")))
