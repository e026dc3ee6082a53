"""From a configuration to a running engine: the one place where base, renderer, engine, store and loop meet."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.engine import FullEngine, LocalEngine, LoraEngine, load_base, set_threads
from veneer.envs import load_env
from veneer.measure.canary import canary_tokens, check_loaded, with_canary
from veneer.render import Renderer
from veneer.store.adapters import read_adapter, read_manifest
from veneer.store.files import veneer_home
from veneer.store.registry import Registry
from veneer.store.run import REPORT, SUMMARY, Run
from veneer.train import rl, sft
from veneer.train.config import LoraSettings, RunConfig
from veneer.train.report import render_report
from veneer.train.session import Session, check_made_for, stop_signals
from veneer.types import AdapterError, Checkpoint, EnvDataset, Tokens

PATIENCE = 600.0
"""Seconds that a pass through the base may take."""


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
        checkpoint, manifest = read_adapter(Registry().find(reference))
        check_made_for(manifest, self.renderer, f"adapter {reference!r}")
        if checkpoint.adapter.base_digest != self.engine.base_digest:
            raise AdapterError(
                f"adapter {reference!r} was made for base {checkpoint.adapter.base_id!r} ({checkpoint.adapter.base_digest[:12]}); "
                f"this one is {self.engine.base_id!r} ({self.engine.base_digest[:12]})"
            )
        return checkpoint


def start(base: str, threads: int, weights: str = "lora", device: str = "auto", *, gradient_checkpointing: bool = False) -> Machine:
    """Load a base."""
    set_threads(threads)
    loaded = load_base(base, device)
    assert loaded.tokenizer is not None
    if weights == "lora":
        engine = LoraEngine(loaded, gradient_checkpointing=gradient_checkpointing, patience=PATIENCE)
    else:
        engine = FullEngine(loaded, patience=PATIENCE)
    gc.freeze()  # what is loaded by now stays: a full collection would walk all of torch and transformers, 0.2 s at a time
    return Machine(engine, Renderer(loaded.tokenizer))


def start_for(adapter: str | None, base: str, threads: int, device: str) -> tuple[Machine, str | None]:
    """Load a base and, if one is named, an adapter, on the kind of engine that it was trained on. Returns the adapter's name there."""
    manifest = {} if adapter is None else read_manifest(Registry().find(adapter))
    machine = start(base, threads, "full" if manifest and manifest.get("lora") is None else "lora", device)
    return machine, None if adapter is None else machine.load(adapter)


def run_folder(config: RunConfig) -> Path:
    return Path(config.folder) if config.folder else veneer_home() / "runs" / config.name


def pinned(reference: str) -> str:
    """An adapter reference that goes on meaning the same weights: NAME becomes NAME@VERSION."""
    if not reference or "/" in reference or "@" in reference:
        return reference
    return f"{reference}@{Registry().find(reference).name}"


def execute(config: RunConfig, on_step: Callable[[Mapping[str, Any]], None]) -> tuple[dict[str, Any], Machine, Run]:
    """Run a configuration to its end, or go on with it, and register the adapter. Returns the summary."""
    started = time.perf_counter()
    dataset = load_env(config.env.name, config.env.args) if config.kind == "rl" else None
    machine = start(config.base, config.threads, config.weights, config.device, gradient_checkpointing=config.gradient_checkpointing)
    init = machine.read(config.init) if config.init else None
    config = config.model_copy(update={"device": machine.engine.base.device.type, "init": pinned(config.init)})
    if init is not None and init.config is not None:  # the adapter brings its own shape
        shape = {key: value for key, value in dataclasses.asdict(init.config).items() if key != "seed"}
        config = config.model_copy(update={"lora": LoraSettings(**shape)})
    run = Run(run_folder(config), config.to_toml())
    try:
        session = Session(machine.engine, machine.renderer, config, run, init, on_step)
        saved = run.newest_checkpoint()
        earlier = sum(sum(t.values()) - t["step"] for t in run.timings() if saved is not None and t["step"] <= saved[0])
        with stop_signals(session.stop):
            summary = asyncio.run(_loop(session, dataset))
        saved = machine.engine.save_state(session.adapter, "sampler").result()
        checkpoint = with_canary(machine.engine, session.adapter, saved, session.canary)
        scores = {key: summary[key] for key in ("reward_before", "reward_after") if key in summary}
        version = Registry().put(session.adapter, checkpoint, dict(session.facts(scores=scores)))
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
        run.write(SUMMARY, json.dumps(summary, indent=1) + "\n")
        run.write(REPORT, render_report(f"Veneer run {config.name}", summary, run.metrics(), config.to_toml()))
        return summary, machine, run
    finally:
        run.close()


async def _loop(session: Session, dataset: EnvDataset | None) -> dict[str, Any]:
    if dataset is None:
        result = await sft.train(session)
        losses = [m["eval/mean_nll"] for m in session.run.metrics() if "eval/mean_nll" in m]
        around = {"nll_before": losses[0], "nll_after": losses[-1]} if losses else {}
        return {"kind": "sft", **dataclasses.asdict(result), **around}
    result = await rl.train(session, dataset)
    evaluations = [m for m in session.run.metrics() if "eval/solved" in m]
    summary: dict[str, Any] = {"kind": "rl", "env": dataset.name, **dataclasses.asdict(result)}
    for name, metrics in (("before", evaluations[0]), ("after", evaluations[-1])):
        summary[f"reward_{name}"] = {
            "value": metrics["eval/solved"],
            "low": metrics["eval/solved_low"],
            "high": metrics["eval/solved_high"],
            "trials": metrics["eval/problems"],
        }
        for share in ("stepwise", "self_corrected", "thought", "called"):
            if f"eval/env/{share}" in metrics:
                summary[f"{share}_{name}"] = metrics[f"eval/env/{share}"]
    return summary
