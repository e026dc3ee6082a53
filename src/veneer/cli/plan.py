"""``veneer plan``: what a run will need, how to set it up, and what each figure rests on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.output import emit, json_option, print_table

if TYPE_CHECKING:
    from veneer.measure.plan.cost import Device
    from veneer.measure.plan.figure import Figure
    from veneer.measure.plan.memory import Passes
    from veneer.measure.plan.signal import PassRates
    from veneer.measure.plan.whole import Budget, Plan, Wish
    from veneer.train.pass_rates import Tried

TRIES = 8
"""At a problem."""
CPU_FLOPS, CPU_BANDWIDTH = (0.05, 0.5), (0.05, 0.5)
"""Shares of what is measured that a run reaches on a CPU."""
Option = Callable[[Callable[..., Any]], Callable[..., Any]]
TASK: tuple[Option, ...] = (
    click.option("--kind", type=click.Choice(["rl", "sft"]), default="rl", show_default=True),
    click.option("--env", help="A task: its pass rates and lengths are measured where MODEL's weights are here."),
    click.option("--env-arg", "env_args", multiple=True, metavar="KEY=VALUE", help="An argument of the environment. Repeatable."),
    click.option("--pass-rates", metavar="LIST|FILE", help="Shares of tries that solve each problem: 0,0.1,0.5 or a file of them."),
    click.option("--tries", type=click.IntRange(1), help="At each problem of --pass-rates, or to make: 8 then."),
    click.option("--problems", type=click.IntRange(1), default=64, show_default=True, help="To try."),
    click.option("--prompt-tokens", type=click.FloatRange(0), help="Of a prompt, where it is not measured: 256."),
    click.option("--drawn-tokens", type=click.FloatRange(1), help="Of an episode or an answer, where it is not measured: 512."),
    click.option("--max-tokens", type=click.IntRange(1), help="Limit of one turn; 72, or twice --drawn-tokens."),
    click.option("--tokens", type=click.FloatRange(1), help="sft: on which is trained, each once."),
    click.option("--first-loss", type=click.FloatRange(0, min_open=True), help="sft: of the first epoch, in nats a token."),
    click.option("--data", help="sft: the file that the TOML is to name."),
)
RUN: tuple[Option, ...] = (
    click.option("--steps", type=click.IntRange(1)),
    click.option("--groups", type=click.IntRange(1), help="Problems a step: 8."),
    click.option("--batch-size", type=click.IntRange(1), help="sft: sequences a step: 16."),
    click.option("--group-size", type=click.IntRange(2)),
    click.option("--useful", type=click.FloatRange(0, 0.999), default=0.6, show_default=True, help="Share of groups that teach something."),
    click.option("--old-logprobs", is_flag=True, help="The trainer computes the sampler's log-probabilities again."),
    click.option("--checkpointing", is_flag=True, help="Gradient checkpointing."),
    click.option("--budget", metavar="2h|30m|$20|5000episodes", help="What may be used up; it sets the steps."),
)
ADAPTER: tuple[Option, ...] = (
    click.option("--rank", type=click.IntRange(1)),
    click.option("--alpha", type=click.FloatRange(0, min_open=True)),
    click.option("--attn/--no-attn", default=True),
    click.option("--mlp/--no-mlp", default=True),
    click.option("--unembed/--no-unembed", default=False),
    click.option("--target", "targets", multiple=True, help="Ending of a module's name; replaces the three switches. Repeatable."),
    click.option("--full-lr", type=click.FloatRange(0, min_open=True), help="A tuned learning rate of full fine-tuning."),
    click.option("--lr", type=click.FloatRange(0, min_open=True), help="A learning rate of adapters: this one, or --from's."),
    click.option(
        "--range-test", is_flag=True, help="Try five to ten rates on the task for a few steps, some minutes on nano: an estimate."
    ),
    click.option("--range-steps", type=click.IntRange(1), default=32, show_default=True),
    click.option(
        "--range-seeds", type=click.IntRange(1), default=3, show_default=True, help="On which each rate is tried, from --seed on."
    ),
    click.option("--from", "library", metavar="LIBRARY", help="Whose rule of alpha and rank --lr belongs to: trl, verl, ..."),
    click.option("--from-rank", type=click.IntRange(1), help="There, if not its default."),
    click.option("--from-alpha", type=click.FloatRange(0, min_open=True), help="There, if not its default."),
)
MACHINE: tuple[Option, ...] = (
    click.option("--device", help="h200, h100, a100-80gb, l4, or cpu: this one, measured."),
    click.option("--price", type=click.FloatRange(0), help="Of an hour of the device, in any currency."),
    click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads."),
    click.option("--seed", type=int, default=0, show_default=True),
)


def _all(*groups: tuple[Option, ...]) -> Option:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@click.command("plan", short_help="Plan a run: rank, learning rate, group size, memory, FLOPs, time.")
@click.argument("model")
@_all(TASK, RUN, ADAPTER, MACHINE)
@click.option("--write", type=click.Path(path_type=Path), help="Write the run's TOML here.")
@click.option("--explain", is_flag=True, help="Also print formula, source and doubt of every figure.")
@json_option
def command(model: str, write: Path | None, explain: bool, as_json: bool, **options: Any) -> None:
    """Plan a run on MODEL: nano, a name such as Qwen/Qwen3-8B, a folder, or a config.json. No weights are read unless a task is tried.

    Each figure has a range, a formula and a source (--explain). docs/plan.md says what was checked.
    """
    from dataclasses import replace

    from veneer.engine.shapes import count_shape
    from veneer.measure.plan.whole import make_plan

    shape = count_shape(model)
    tried = _try(model, options)
    wish = _wish(model, options, tried)
    plan = make_plan(shape, wish)
    if options["range_test"]:
        plan = make_plan(shape, replace(wish, rate=_range_test(model, plan, options)))
    toml = _toml(model, plan, options) if write is not None else None
    if write is not None:
        _write(write, toml or {})
    document = _document(plan) | ({} if toml is None else {"toml": toml, "written": str(write)})
    emit(document, as_json, lambda: _show(plan, explain, write))


# ---------------------------------------------------------------- what is asked


def _try(model: str, options: Mapping[str, Any]) -> Tried | None:
    """Of the task, by the base itself; None: there is none, its rates are given, or the weights are not here."""
    if options["kind"] != "rl" or options["env"] is None:
        return None
    import asyncio

    from veneer.envs import load_env
    from veneer.train.config import make_config

    settings = make_config({"env": {"name": options["env"]}}, [f"env.args.{argument}" for argument in options["env_args"]]).env
    dataset = load_env(settings.name, settings.args)
    if options["pass_rates"] is not None or not _has_weights(model):
        return None
    from veneer.cli.assemble import start
    from veneer.train.pass_rates import try_problems
    from veneer.train.rollouts import Policy
    from veneer.types import SamplingParams

    machine = start(model, options["threads"])
    policy = Policy(machine.engine, machine.renderer, None, SamplingParams(max_tokens=_max_tokens(options)), settings.seconds)
    return asyncio.run(try_problems(policy, dataset, options["problems"], options["tries"] or TRIES, options["seed"]))


def _has_weights(model: str) -> bool:
    from veneer.assets import resolve_base

    folder = Path(resolve_base(model))
    return folder.is_dir() and any(folder.glob("*.safetensors"))


def _max_tokens(options: Mapping[str, Any]) -> int:
    return int(options["max_tokens"] or 2 * (options["drawn_tokens"] or 36))


def _wish(model: str, options: Mapping[str, Any], tried: Tried | None) -> Wish:
    from veneer.engine.cache import AHEAD, capacity_for, places_of
    from veneer.engine.sampler import ROWS
    from veneer.measure.plan.signal import PassRates
    from veneer.measure.plan.whole import Text, Wish
    from veneer.types import LoraConfig

    kind = "cpu" if options["device"] == "cpu" or (options["device"] is None and _on_cpu(model)) else "cuda"
    prompt = tried.prompt_tokens if tried is not None and options["prompt_tokens"] is None else options["prompt_tokens"]
    drawn = tried.drawn_tokens if tried is not None and options["drawn_tokens"] is None else options["drawn_tokens"]
    prompt, drawn = 256.0 if prompt is None else prompt, drawn or 512.0
    longest = round(drawn) if tried is None else tried.longest
    rates = PassRates(tuple(tried.rates_P), tried.tries) if tried is not None else _rates(options)
    text = None
    if options["kind"] == "sft":
        text = Text(options["tokens"] or 0.0, options["batch_size"] or 16, drawn, prompt, options["first_loss"])
    lora = LoraConfig(1, 32.0, options["attn"], options["mlp"], options["unembed"], options["targets"], options["seed"])
    return Wish(
        lora,
        _passes(kind, options),
        options["kind"],
        options["rank"],
        options["alpha"],
        rates,
        options["useful"],
        options["groups"],
        options["group_size"],
        options["steps"],
        prompt,
        drawn,
        longest,
        options["old_logprobs"],
        text,
        options["full_lr"],
        _given_rate(options),
        ROWS[kind],
        places_of(min(AHEAD, longest), longest) if kind == "cpu" else places_of(round(prompt) + AHEAD, round(prompt) + longest),
        capacity_for(round(prompt)) if kind == "cpu" else 0,
        _device(options),
        options["price"],
        _budget(options),
    )


def _on_cpu(model: str) -> bool:
    from veneer.assets import NANO

    return model == NANO


def _passes(kind: str, options: Mapping[str, Any]) -> Passes:
    from veneer.engine.logprobs import LOGITS_AT_ONCE
    from veneer.engine.packing import WHOLE
    from veneer.engine.trainer import TOKENS_PER_PASS
    from veneer.measure.plan.memory import Passes

    dtype = "float32" if kind == "cpu" else "bfloat16"
    side_by_side = options["threads"] if kind == "cpu" else 1
    return Passes(dtype, TOKENS_PER_PASS[kind], side_by_side, options["checkpointing"], LOGITS_AT_ONCE[kind], WHOLE)


def _rates(options: Mapping[str, Any]) -> PassRates | None:
    """From the command line or a file: numbers between commas, spaces or lines."""
    from veneer.measure.plan.signal import PassRates
    from veneer.types import ConfigError

    given = options["pass_rates"]
    if given is None:
        return None
    try:
        text = Path(given).read_text() if Path(given).is_file() else given
        return PassRates(tuple(float(word) for word in re.split(r"[\s,\[\]]+", text) if word), options["tries"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--pass-rates {given!r}: give shares from 0 to 1, such as 0,0.25,0.5, or a file of them") from error


def _given_rate(options: Mapping[str, Any]) -> Figure | None:
    """A learning rate that the user knows, under our rule."""
    from veneer.measure.plan.figure import Figure
    from veneer.measure.plan.libraries import rate_from_library
    from veneer.measure.plan.rate import Rule

    if options["library"] is None:
        return None if options["lr"] is None else Figure("learning rate", options["lr"], "", "given", "--lr")
    here = Rule(options["rank"] or 8, options["alpha"] or 32.0)
    return rate_from_library(options["library"], options["lr"], here, options["from_rank"], options["from_alpha"])


def _range_test(model: str, plan: Plan, options: Mapping[str, Any]) -> Figure:
    """The learning rate by the runs of ``studies/range_test.py``."""
    import asyncio
    import sys

    from veneer.cli.assemble import start
    from veneer.engine import default_device
    from veneer.measure.plan.figure import Figure
    from veneer.store.files import veneer_home
    from veneer.studies.lab import Lab, Outcome, Place
    from veneer.studies.range_test import PROBLEMS, RUNG, find_rate
    from veneer.train.config import make_config
    from veneer.train.session import stop_signals
    from veneer.types import ConfigError

    if plan.wish.kind != "rl" or options["env"] is None or not _has_weights(model):
        raise ConfigError("--range-test: it trains on a task; name one with --env, and give a MODEL whose weights are here")
    known, seeds = plan.figure("learning rate"), options["range_seeds"]
    guessed = plan.wish.rate is None and (known.low is None or known.high is None or known.high > RUNG * known.low)
    config = make_config(_run(model, plan, options, known.value or 0.0))

    def open_place(config: Any) -> Place:
        machine = start(config.base, options["threads"], config.weights, config.device)
        return Place(machine.engine, machine.renderer)

    def told(outcome: Outcome, done: int, of: int) -> None:
        print(f"range test {done} of {of}: {outcome.config.rl.learning_rate:.3g} -> {outcome.score:.3f}", file=sys.stderr, flush=True)

    lab = Lab(veneer_home() / "studies" / "runs", open_place, default_device(), told=told)
    with stop_signals(lab.stop):
        found = asyncio.run(find_rate(lab, config, None if guessed else known.value, options["range_steps"], seeds))
    ends = ", ".join(f"{one.rate:.2g}: {'diverged' if one.diverged else f'{one.after:.3f}'}" for one in found.tried)
    formula = f"the vertex of the parabola through the rate that ends best and its neighbours ({found.tried[0].before:.3f} before; {ends})"
    source = f"measured: {options['range_steps']} steps each, {PROBLEMS} held-out problems, {seeds} seed{'s' * (seeds > 1)}"
    note = "an estimate: short runs bear larger rates than long ones" + (f"; {found.edge}: it may lie further out" if found.edge else "")
    if found.value is None:
        note = "no rate improved on the base: an easier task, or demonstrations first"
    return Figure("learning rate", found.value, "", formula, source, found.low, found.high, note)


def _device(options: Mapping[str, Any]) -> Device | None:
    from veneer.measure.plan.cost import Device, find_device

    if options["device"] is None:
        return None
    if options["device"] != "cpu":
        return find_device(options["device"])
    from veneer.engine.speed import measure_cpu

    speed = measure_cpu(options["threads"])
    sheet = f"measured: a product of matrices and a copy, on {options['threads']} threads"
    return Device("cpu", speed.flops, speed.bandwidth, speed.memory, "float32", sheet, CPU_FLOPS, CPU_BANDWIDTH)


def _budget(options: Mapping[str, Any]) -> Budget:
    from veneer.measure.plan.whole import Budget
    from veneer.types import ConfigError

    text = options["budget"]
    if text is None:
        return Budget()
    found = re.fullmatch(r"(\$?)\s*([\d.,]+)\s*([a-z]*)", text.strip().lower())
    units = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    try:
        number = float(found[2].replace(",", "")) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0 or (found[3] and found[3] not in (*units, "episodes")) or bool(found[1]) == bool(found[3]):
        raise ConfigError(f"--budget {text!r}: write 2h, 30m, $20 or 5000episodes")
    if found[3] == "episodes":
        return Budget(episodes=int(number))
    if found[3]:
        return Budget(seconds=number * units[found[3]])
    if not options["price"]:
        raise ConfigError(f"--budget {text}: give --price, of an hour of the device")
    return Budget(seconds=number / options["price"] * 3600)


# ---------------------------------------------------------------- what is told


def _run(model: str, plan: Plan, options: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
    """A run's configuration as a file has it; ``rate``: in place of the planned one."""
    from dataclasses import replace

    from veneer.train.config import make_config

    values = {"base": model, "seed": options["seed"], "threads": options["threads"]}
    values |= (plan if rate is None else replace(plan, learning_rate=rate)).settings()
    if plan.wish.kind == "rl":
        args = [f"env.args.{argument}" for argument in options["env_args"]]
        values["env"] = {"name": options["env"], "args": make_config({}, args).env.args}
        values["rl"]["max_tokens"] = _max_tokens(options)
    else:
        values["sft"]["data"] = options["data"]
    if options["checkpointing"]:
        values["gradient_checkpointing"] = True
    return values


def _toml(model: str, plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is written, checked."""
    from veneer.train.config import make_config
    from veneer.types import ConfigError

    if Path(model).is_file():
        raise ConfigError(f"--write: {model} is a configuration and holds no weights; name the model, or a folder with its weights")
    if any(m.kind == "expert" for m in plan.maps):
        raise ConfigError("--write: the engine does not adapt experts yet; give --no-mlp")
    if plan.wish.kind == "rl" and options["env"] is None:
        raise ConfigError("--write: name the task with --env")
    if plan.wish.kind == "sft" and options["data"] is None:
        raise ConfigError("--write: name the file to learn from with --data")
    values = _run(model, plan, options)
    make_config({"name": "plan", **values})
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    import tomli_w

    from veneer.types import ConfigError

    if path.exists():
        raise ConfigError(f"--write: {path} is there already; choose another name, or take it away")
    try:
        path.write_text(tomli_w.dumps(dict(values)))
    except OSError as error:
        raise ConfigError(f"--write: cannot write {path}: {error.strerror}") from error


def _document(plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    shape = plan.shape
    told = {
        "name": shape.name,
        "architecture": shape.architecture,
        "parameters": shape.parameters,
        "tied": shape.tied,
        "layers": shape.layers,
    }
    return {
        "model": told | {"linear_maps": _grouped(plan), "others": [asdict(rest) for rest in shape.rest]},
        "steps": plan.steps,
        "step": asdict(plan.work),
        "sections": {name: [asdict(figure) for figure in figures] for name, figures in plan.sections.items()},
        "elsewhere": _elsewhere(plan),
        "warnings": list(plan.warnings),
    }


def _grouped(plan: Plan) -> list[dict[str, Any]]:
    """The linear maps, those that are alike but for their layer together, with whether they are adapted."""
    adapted, found = {m.name for m in plan.maps}, dict[tuple[Any, ...], dict[str, Any]]()
    for m in plan.shape.maps:
        name = re.sub(r"\.\d+\.", ".*.", m.name)
        entry = {"name": name, "kind": m.kind, "d_in": m.d_in, "d_out": m.d_out, "adapted": m.name in adapted, "active": m.active}
        found.setdefault(tuple(entry.values()), entry | {"count": 0})["count"] += m.copies
    return list(found.values())


def _show(plan: Plan, explain: bool, write: Path | None) -> None:
    shape = plan.shape
    kinds = dict.fromkeys((m.kind for m in plan.maps), 0)
    for m in plan.maps:
        kinds[m.kind] += m.copies
    counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    print(f"{shape.name}: {shape.architecture}, {shape.parameters:,} parameters, {shape.layers} layers; linear maps adapted: {counted}")
    for rest in shape.rest:
        if not rest.known:
            print(f"not adapted, no linear map: {rest.module} ({rest.example}), {rest.parameters:,} parameters")
    print(f"{plan.steps:,} steps of {_step(plan)}")
    if explain:
        columns = ("linear map of a layer", "kind", "in", "out", "how many", "active", "adapted")
        print_table(columns, [_map_row(m) for m in _grouped(plan)], "")
    for section, figures in plan.sections.items():
        if figures and not explain:
            print_table((section, "", "range"), [(figure.name, figure.text, figure.range) for figure in figures], "")
        elif explain:
            print("".join(f"\n{_explained(figure)}" for figure in figures))
    if explain:
        print(f"\nLoRA elsewhere; by how much a learning rate there is to be multiplied here (alpha {plan.config.alpha:g}):")
        rows = [
            (one["library"], one["rank"] or "-", f"{one['alpha']:g}", f"{one['factors'][0]:.2g} to {one['factors'][1]:.2g}", one["targets"])
            for one in _elsewhere(plan)
        ]
        print_table(("library", "rank", "alpha", "factor", "targets"), rows, "")
    for warning in plan.warnings:
        print(f"WARNING  {warning}")
    if write is not None:
        print(f"written: {write}; train: veneer train {write}")


def _map_row(m: Mapping[str, Any]) -> tuple[object, ...]:
    name = m["name"].rpartition(".*.")[2]
    return name, m["kind"], m["d_in"], m["d_out"], m["count"], m["active"], "yes" if m["adapted"] else "-"


def _step(plan: Plan) -> str:
    work = plan.work
    if plan.wish.kind == "sft":
        return f"{work.episodes} rows of {work.drawn_tokens:.0f} trained tokens"
    return f"{work.groups} problems x {work.group_size} episodes; {work.prompt_tokens:.0f} tokens of prompt, {work.drawn_tokens:.0f} drawn"


def _explained(figure: Figure) -> str:
    lines = [f"{figure.name}: {figure.text}" + (f" ({figure.range})" if figure.range else ""), figure.formula, figure.source, figure.note]
    return "\n    ".join(line for line in lines if line)


def _elsewhere(plan: Plan) -> list[dict[str, Any]]:
    from veneer.measure.plan.libraries import conversion_table
    from veneer.measure.plan.rate import Rule

    return conversion_table(Rule(plan.config.rank, plan.config.alpha), plan.config.rank)
