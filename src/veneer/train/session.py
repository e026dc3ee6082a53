"""What every loop needs around its algorithm: start or resume, stop in good order, check that something was trained."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from veneer.measure.canary import ask_sampled, ask_trained, base_row, canary_tokens, check_loaded, judge, make_canary
from veneer.render import Renderer
from veneer.store.entry import Parent, check_compatible
from veneer.store.registry import is_path
from veneer.store.run import Run
from veneer.train.config import RunConfig
from veneer.types import Adapter, AttestationError, Checkpoint, Engine, Floats, RunError, Tokens

Metrics = dict[str, Any]


class Interrupted(RunError):
    """The user asked to stop; the state is saved."""

    exit_code = 130


@dataclass
class Session:
    """One run of one adapter on an engine."""

    engine: Engine
    renderer: Renderer
    config: RunConfig
    run: Run
    init: Checkpoint | None = None
    on_step: Callable[[Metrics], None] = lambda metrics: None
    """Told of every line of metrics.jsonl as it is written."""
    teachers: Sequence[Parent] = ()
    """Adapters beside ``init`` that this one learns from: it may know what they know."""
    trainable: int = 0
    base_before: str = ""
    """The base's digest in memory when the session began."""
    stop: threading.Event = field(default_factory=threading.Event)
    canary: Tokens = field(init=False)
    _base_logprobs: Floats = field(init=False)
    """Of the canary, when the session began."""

    def __post_init__(self) -> None:
        self.base_before = self.engine.measure_base_digest()
        self.canary = canary_tokens(self.renderer.vocab_size)
        self._base_logprobs = base_row(self.engine, self.canary)

    @property
    def adapter(self) -> str:
        return self.config.name

    def facts(self, **more: Any) -> Mapping[str, Any]:
        """What an adapter's manifest says beside its weights."""
        return {
            "tokenizer_digest": self.renderer.tokenizer_digest,
            "template_digest": self.renderer.template_digest,
            "stage": self.config.kind,
            "env": self.config.env.name if self.config.plays else None,
            "seed": self.config.seed,
            "parents": [dataclasses.asdict(parent) for parent in self._parents()],
            "run": self.config.name,
            **more,
        }

    def _parents(self) -> list[Parent]:
        if self.init is None:
            return [*self.teachers]
        reference = self.init.adapter.name if is_path(self.config.init) else self.config.init
        first = Parent(reference, self.init.adapter.digest)
        return [first, *(teacher for teacher in self.teachers if teacher != first)]

    async def resume(self) -> int:
        """Bring the adapter to where the run stands and return the next step: 0 for a new run, 1 behind the first evaluation."""
        saved = self.run.newest_checkpoint()
        self.trainable = self.engine.create_adapter(self.adapter, self.config.lora_config())
        if saved is not None:
            step, checkpoint, manifest = saved
            mine = (self.engine.base_digest, self.renderer.tokenizer_digest, self.renderer.template_digest)
            check_compatible(manifest, *mine, what=f"the run in {self.run.folder}")
            await self.engine.load_state(self.adapter, checkpoint)
            check_loaded(self.engine, self.adapter, checkpoint, self.canary)
            self.run.rewind(step)  # only now: a refused resume has lost nothing
            return step + 1
        self.run.rewind(-1)
        if self.init is not None:
            await self.engine.load_state(self.adapter, self.init)
            check_loaded(self.engine, self.adapter, self.init, self.canary)
        return 0

    async def publish_changed(self, before: Adapter) -> Adapter:
        """Publish after an optimizer step.

        Raises:
            AttestationError: the step left every byte of the adapter as it was, or what is sampled now does not do what was trained.
        """
        after = await self.engine.publish(self.adapter)
        if after.digest == before.digest:
            raise AttestationError(
                f"the optimizer step to version {after.version} changed nothing that is sampled: the learning rate is 0 or too small "
                "for the weights' precision, no gradient arrived, or the new weights were not published"
            )
        await self._check_published(after)
        return after

    async def _check_published(self, published: Adapter) -> None:
        """Sample the canary: with the adapter it must have the log-probabilities of the training weights, without it those it had when
        the session began."""
        engine, row = self.engine, self.canary
        trained, base, adapted = (
            ask_trained(engine, self.adapter, row),
            ask_sampled(engine, None, row),
            ask_sampled(engine, self.adapter, row),
        )
        canary = make_canary(row, self._base_logprobs, (await trained).logprobs_D[0], published, engine.dtype)
        judge(canary, (await base)[0], (await adapted)[0], engine.dtype)

    def check_base(self) -> str:
        """The base's digest as it is in memory now.

        Raises:
            AttestationError: it is not what was loaded.
        """
        now = self.engine.measure_base_digest()
        if now != self.base_before:
            raise AttestationError(f"the base changed: {self.base_before[:16]} when the run began, {now[:16]} now")
        return now

    async def record(self, metrics: Metrics, timings: Mapping[str, float], last: bool) -> None:
        """Log a step, checkpoint if it is time, and stop here if the user asked for it.

        Raises:
            AttestationError: the base changed; nothing is saved.
            Interrupted: after the state was saved.
        """
        step = metrics["step"]
        save = last or step % self.config.checkpoint_every == 0 or self.stop.is_set()
        if save:
            self.check_base()  # before anything that a changed base produced is kept
        self.run.log(metrics, timings)
        self.on_step(metrics)
        if save:
            self.run.save_checkpoint(step, await self.engine.save_state(self.adapter), self.facts())
        if self.stop.is_set() and not last:
            raise Interrupted(f"interrupted after step {step}; the state is saved, the same command goes on from here")


@contextmanager
def stop_signals(*stops: threading.Event) -> Generator[None, None, None]:
    """Ctrl-C and SIGTERM set all ``stops``, so that the step at hand is finished; a second one interrupts at once."""

    def handle(signum: int, _frame: object) -> None:
        if all(stop.is_set() for stop in stops):
            raise KeyboardInterrupt
        for stop in stops:
            stop.set()

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
