"""From a configuration to a running engine: the one place where base, renderer, engine, store and loop meet."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.cli.interrupts import check_interrupted
from veneer.cli.loops import LOOPS
from veneer.engine import FullEngine, LocalEngine, LoraEngine, load_base, set_threads
from veneer.envs import load_env
from veneer.measure.anatomy import anatomy, thin_updates, updates_of
from veneer.measure.canary import canary_tokens, check_loaded, with_canary
from veneer.measure.subspaces import compare_directions, directions_of, in_short
from veneer.render import Renderer
from veneer.store.adapters import ALORA, read_manifest
from veneer.store.entry import Entry, Parent, Score, check_compatible, now
from veneer.store.files import veneer_home
from veneer.store.registry import Registry, is_path
from veneer.store.run import REPORT, SUMMARY, Run, other_seeds
from veneer.train.config import EnvSettings, LoraSettings, RunConfig, make_config
from veneer.train.distill import Teacher
from veneer.train.pipeline import Stage
from veneer.train.report import render_report
from veneer.train.rollouts import Policy, closing
from veneer.train.scorecard import measure_scorecard
from veneer.train.session import Session, stop_signals
from veneer.types import AdapterError, Checkpoint, ConfigError, EnvDataset, SamplingParams, Tokens, VeneerError

PATIENCE = 600.0
"""Seconds that a pass through the base may take."""
TEACHER = "(teacher)"
"""What a teacher's adapter is called in its engine; no run can have this name."""
START = "(start)"
"""And what a run began with, while it is compared with what came of it."""
OTHERS = 3
"""Runs of other seeds that an update is compared with."""


@dataclass
class Machine:
    """A base in memory with what reads and writes its tokens."""

    engine: LocalEngine
    renderer: Renderer

    def load(self, reference: str) -> str:
        """Load an adapter from the registry or a folder, after checking that it was made for this base. Returns its name here.

        Raises:
            AdapterError: it is missing, damaged, or made for another base, tokenizer or template.
            AttestationError: it does not do here what it did where it was saved.
        """
        checkpoint = self.read(reference)
        name = checkpoint.adapter.name
        self.engine.load_state(name, checkpoint).result()
        check_loaded(self.engine, name, checkpoint, self.canary)
        return name

    @property
    def canary(self) -> Tokens:
        """The row of tokens that a fresh record is made of."""
        return canary_tokens(self.renderer.vocab_size)

    def read(self, reference: str) -> Checkpoint:
        checkpoint, entry = Registry().read(reference)
        self.check(entry, f"adapter {reference!r}")
        if read_manifest(entry.folder).get(ALORA):
            raise AdapterError(f"adapter {reference!r} acts from its invocation tokens on ({ALORA}); it cannot be put on a whole context")
        return checkpoint

    def check(self, made: Entry | Mapping[str, Any], what: str) -> None:
        """Raises:
        AdapterError: it was made for another base, tokenizer or template.
        """
        mine = (self.engine.base_digest, self.renderer.tokenizer_digest, self.renderer.template_digest)
        check_compatible(made, *mine, what=what)

    def has_weight(self, name: str, array: NDArray[np.float32]) -> bool:
        """Whether the base has a parameter of this name with these very numbers."""
        found = dict(self.engine.base.model.named_parameters(remove_duplicate=False)).get(name)
        return found is not None and np.array_equal(found.detach().float().cpu().numpy(), array)


def start(
    base: str,
    threads: int,
    weights: str = "lora",
    device: str = "auto",
    *,
    gradient_checkpointing: bool = False,
    beside: LocalEngine | None = None,
) -> Machine:
    """Load a base. ``beside``: an engine whose threads a low-rank one shares."""
    set_threads(1)
    loaded = load_base(base, device)
    assert loaded.tokenizer is not None
    if weights == "lora":
        engine = LoraEngine(loaded, gradient_checkpointing=gradient_checkpointing, patience=PATIENCE, threads=threads, beside=beside)
    else:
        engine = FullEngine(loaded, patience=PATIENCE, threads=threads)
    check_interrupted()  # while all of this was loaded
    gc.freeze()  # what is loaded by now stays: a full collection would walk all of torch and transformers, 0.2 s at a time
    return Machine(engine, Renderer(loaded.tokenizer))


def start_for(adapter: str | None, base: str, threads: int, device: str) -> tuple[Machine, str | None]:
    """Load a base and, if one is named, an adapter, on the kind of engine that it was trained on. Returns the adapter's name there."""
    full = adapter is not None and Registry().resolve(adapter).rank is None
    machine = start(base, threads, "full" if full else "lora", device)
    return machine, None if adapter is None else machine.load(adapter)


@dataclass(frozen=True)
class Home:
    """Where an adapter was trained: an environment, its arguments, and the limit of one turn there."""

    env: EnvSettings
    max_tokens: int

    def dataset(self) -> EnvDataset:
        return load_env(self.env.name, self.env.args)


def home_of(reference: str, env: str | None = None, env_args: Sequence[str] = (), max_tokens: int | None = None) -> Home | None:
    """As an adapter's manifest says it, each part replaced by what is given; None: it was trained in no environment, and none is given.

    Raises:
        AdapterError, ConfigError: there is no such adapter, or the arguments cannot be read.
    """
    manifest = read_manifest(Registry().resolve(reference).folder)
    scores = manifest.get("scores") or []
    settings = scores[0]["settings"] if scores and env in (None, manifest.get("env")) else {}
    name = env or manifest.get("env")
    if not name:
        return None
    chosen = make_config({"env": {"name": name, "args": settings.get("args", {})}}, [f"env.args.{argument}" for argument in env_args])
    return Home(chosen.env, max_tokens or settings.get("max_tokens", chosen.rl.max_tokens))


def start_run(config: RunConfig) -> Machine:
    """Load what a run trains on."""
    return start(config.base, config.threads, config.weights, config.device, gradient_checkpointing=config.gradient_checkpointing)


def run_folder(config: RunConfig) -> Path:
    return Path(config.folder) if config.folder else veneer_home() / "runs" / config.name


def pinned(reference: str) -> str:
    """An adapter reference that goes on meaning the same weights: NAME and NAME@LABEL become NAME@VERSION."""
    return reference if not reference or is_path(reference) else Registry().resolve(reference).reference


def execute(
    config: RunConfig, on_step: Callable[[Mapping[str, Any]], None], machine: Machine | None = None, *, once: bool = False
) -> tuple[dict[str, Any], Machine, Run]:
    """Run a configuration to its end, or go on with it, and register the adapter. Returns the summary.

    ``machine``: one that was started for the same base, kind of weights and device. ``once``: a run that is finished is left as it is,
    and the engine is left without its adapter."""
    started = time.perf_counter()
    dataset = load_env(config.env.name, config.env.args) if config.plays else None
    machine = machine or start_run(config)
    config = config.model_copy(update={"device": machine.engine.base.device.type, "init": pinned(config.init)})
    init = machine.read(config.init) if config.init else None
    if init is not None and init.config is not None:  # the adapter brings its own shape
        shape = {key: value for key, value in dataclasses.asdict(init.config).items() if key != "seed"}
        config = config.model_copy(update={"lora": LoraSettings(**shape)})
    teacher, parents = None, ()
    if config.kind == "distill":
        distill = config.distill.model_copy(update={"teacher": pinned(config.distill.teacher)})
        config = config.model_copy(update={"distill": distill})
        teacher, parents = load_teacher(config, machine)
    run = Run(run_folder(config), config.to_toml())
    try:
        if once and (run.folder / SUMMARY).is_file():
            return json.loads((run.folder / SUMMARY).read_text()), machine, run
        session = Session(machine.engine, machine.renderer, config, run, init, on_step, parents)
        saved = run.newest_checkpoint()
        earlier = sum(sum(t.values()) - t["step"] for t in run.timings() if saved is not None and t["step"] <= saved[0])
        with stop_signals(session.stop):
            summary = asyncio.run(LOOPS[config.kind](session, dataset, teacher))
        if config.scorecard.problems:
            summary["scorecard"] = _scorecard(session)
        saved = machine.engine.save_state(session.adapter, "sampler").result()
        checkpoint = with_canary(machine.engine, session.adapter, saved, session.canary)
        weights = machine.engine.base.weights()
        update = anatomy(weights, updates_of(weights, checkpoint.weights, checkpoint.config), checkpoint.config)
        if update is not None:
            summary["anatomy"] = update.in_short() | {"other_seeds": _beside_others(checkpoint, config)}
        version = Registry().put(session.adapter, checkpoint, session.facts(**_scores(config, summary)))
        summary |= {
            "run_folder": str(run.folder),
            "adapter": f"{session.adapter}@{version}",
            "adapter_digest": checkpoint.adapter.digest,
            "adapter_bytes": sum(array.nbytes for array in checkpoint.weights.values()),
            "trainable_parameters": session.trainable,
            "base": machine.engine.base_id,
            "base_digest_before": session.base_before,
            "base_digest_after": machine.engine.measure_base_digest(),
            "seconds": round(time.perf_counter() - started + earlier, 1),
        }
        run.write(REPORT, render_report(f"Veneer run {config.name}", summary, run.metrics(), config.to_toml()))
        run.write(SUMMARY, json.dumps(summary, indent=1) + "\n")
        if once:
            machine.engine.remove_adapter(session.adapter)
        return summary, machine, run
    finally:
        run.close()


def _beside_others(checkpoint: Checkpoint, config: RunConfig) -> list[dict[str, Any]]:
    """Which directions an adapter shares with those of the newest finished runs of this home that differ in the seed alone."""
    if checkpoint.config is None:
        return []
    mine = directions_of(thin_updates(checkpoint.weights, checkpoint.config))

    def compared() -> Iterator[dict[str, Any]]:
        for seed, summary in other_seeds(veneer_home() / "runs", config.to_toml()):
            try:
                theirs, _ = Registry().read(summary["adapter"])
                if theirs.adapter.base_digest != checkpoint.adapter.base_digest or theirs.config is None:
                    continue
                common = compare_directions(mine, directions_of(thin_updates(theirs.weights, theirs.config)))
            except (AdapterError, ValueError):  # forgotten or damaged, or nothing was changed
                continue
            yield {"adapter": summary["adapter"], "seed": seed, "common": in_short(common)}

    return list(islice(compared(), OTHERS))


def _scorecard(session: Session) -> dict[str, Any]:
    """Of what the run began with and what it came to."""
    config, engine, start = session.config, session.engine, None
    if session.init is not None:
        start = START
        engine.load_state(start, session.init).result()
        engine.publish(start).result()
    params = SamplingParams(max_tokens=config.max_tokens if config.plays else config.rl.max_tokens)
    policy = Policy(engine, session.renderer, session.adapter, params, config.env.seconds, config.env.retries)

    async def measured() -> dict[str, Any]:
        async with closing(load_env(config.env.name, config.env.args)) as dataset:
            pair = replace(policy, adapter=start), policy
            base = None if start is None else replace(policy, adapter=None)
            found = await measure_scorecard(*pair, dataset, config.scorecard, config.env.max_failed_share, config.seed, base)
            return found.document()

    try:
        return asyncio.run(measured())
    finally:
        if start is not None:
            engine.remove_adapter(start)


def load_teacher(config: RunConfig, machine: Machine) -> tuple[Teacher, tuple[Parent, ...]]:
    """The teacher of a distillation, on the student's engine if it can be, and the adapter that it is.

    Raises:
        ConfigError: there is none, or it has another tokenizer.
        AdapterError, AttestationError: the adapter does not fit its base, or does not do what it did where it was saved.
    """
    told = config.distill
    if not (told.teacher or told.teacher_base or told.teacher_prompt or config.init):
        raise ConfigError("distill: the teacher would be the student; give distill.teacher, teacher_base or teacher_prompt")
    weights = "full" if told.teacher and Registry().resolve(told.teacher).rank is None else "lora"
    there = machine
    if told.teacher_base or (told.teacher and weights != config.weights):
        there = start(told.teacher_base or config.base, config.threads, weights, config.device, beside=machine.engine)
    theirs, mine = there.renderer.tokenizer_digest, machine.renderer.tokenizer_digest
    if theirs != mine:
        raise ConfigError(
            f"distill.teacher_base: {told.teacher_base!r} has another tokenizer ({theirs[:12]}; the student's is {mine[:12]}): a token "
            "must mean the same to both"
        )
    if not told.teacher:
        return Teacher(there.engine, None, None, told.teacher_prompt), ()
    checkpoint = there.read(told.teacher)
    there.engine.load_state(TEACHER, checkpoint).result()
    check_loaded(there.engine, TEACHER, checkpoint, there.canary)
    digest = checkpoint.adapter.digest
    reference = checkpoint.adapter.name if is_path(told.teacher) else told.teacher
    return Teacher(there.engine, TEACHER, digest, told.teacher_prompt), (Parent(reference, digest),)


def execute_stages(
    stages: Sequence[Stage], watch: Callable[[int, RunConfig], AbstractContextManager[Callable[[Mapping[str, Any]], None]]]
) -> list[dict[str, Any]]:
    """Run the stages of a pipeline one after the other, or go on with them. Returns their summaries.

    Raises:
        VeneerError: as a stage has it; the message names the stage.
    """
    summaries: list[dict[str, Any]] = []
    machines: dict[tuple[object, ...], Machine] = {}
    for number, stage in enumerate(stages):
        config = stage.config
        if stage.follows:
            config = config.model_copy(update={"init": summaries[-1]["adapter"]})
        loaded = (config.base, config.threads, config.weights, config.device, config.gradient_checkpointing)
        try:
            if loaded not in machines:
                machines[loaded] = start_run(config)
            with watch(number, config) as on_step:
                summary, _, _ = execute(config, on_step, machines[loaded], once=True)
        except VeneerError as error:
            raise type(error)(f"stage {number} ({config.name}): {error}") from error
        summaries.append(summary)
    return summaries


def _scores(config: RunConfig, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the run measured of its adapter, and of what it began from, for the manifest."""
    if "reward_after" not in summary:
        return {}
    settings = {"args": config.env.args, "max_tokens": config.max_tokens}
    before, after = (score_of(summary["env"], summary[key], config.seed, settings) for key in ("reward_before", "reward_after"))
    return {"scores": [dataclasses.asdict(after)], "score_before": dataclasses.asdict(before)}


def score_of(env: str, rate: Mapping[str, Any], seed: int, settings: Mapping[str, Any]) -> Score:
    """A rate (value, low, high, trials) as the registry keeps it."""
    return Score(env, rate["value"], rate["low"], rate["high"], rate["trials"], seed, now(), settings)
