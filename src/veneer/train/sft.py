"""Supervised fine-tuning of one adapter on conversations, with the loss on answers alone.

The same datums, engine and run folder as reinforcement learning. What is left out, and why:

- no packing: the engine's passes are lines without padding anyway;
- no schedule and no warm-up: the rate is constant, as in https://thinkingmachines.ai/blog/lora/;
- no epochs of a fixed order: rows are drawn in a new seeded order each time all have been seen;
- no loss on what the user or a tool says: the model is not to learn to write it.

The loss is the mean over the answer tokens of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.render import Renderer
from veneer.train.config import RunConfig
from veneer.train.datums import weighed
from veneer.train.rows import TrainOn, answer_data, batch_indices, conversation, read_rows
from veneer.train.session import Metrics, Session
from veneer.types import AdamParams, Datum


@dataclass(frozen=True)
class SftResult:
    steps: int
    rows: int
    held_out_rows: int


Rows = tuple[list[list[Datum]], list[list[Datum]]]
"""The datums of every conversation, to train on and held out."""


async def train(session: Session, rows: Rows | None = None) -> SftResult:
    """Run or go on with a run until its last step. ``rows``: what ``rows_of`` gives, where many runs share it.

    Raises:
        DataError: the data file is missing or a line is wrong.
        AttestationError: a step changed nothing, or the base changed.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, sft = session.engine, session.config.sft
    trained, held_out = rows or rows_of(session.config, session.renderer, engine.context_length)
    adam = AdamParams(sft.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=sft.grad_clip_norm)
    first = await session.resume()
    published = await engine.publish(session.adapter)
    if first == 0:
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest, **await held_out_loss(session, held_out)}
        await session.record(metrics, {}, last=sft.steps == 0)
    for step in range(max(first, 1), sft.steps + 1):
        clock = time.perf_counter()
        batch = [datum for i in batch_indices(len(trained), sft.batch_size, step, session.config.seed) for datum in trained[i]]
        tokens = sum(float(d.mask.sum()) for d in batch)
        passed = engine.forward_backward(session.adapter, [weighed(d, 1 / tokens) for d in batch], "cross_entropy")
        stepped = engine.optim_step(session.adapter, adam)
        nll, norm = (await passed).metrics["loss:sum"], (await stepped)["grad_norm"]
        published = await session.publish_changed(published)
        metrics = {"step": step, "train_mean_nll": nll, "tokens": tokens, "optim/grad_norm": norm, "optim/lr": sft.learning_rate}
        metrics |= {"adapter/version": published.version, "adapter/digest": published.digest}
        if step == sft.steps or step % session.config.eval.every == 0:
            metrics |= await held_out_loss(session, held_out)
        await session.record(metrics, {"train": time.perf_counter() - clock}, last=step == sft.steps)
    return SftResult(sft.steps, len(trained), len(held_out))


async def held_out_loss(session: Session, held_out: Sequence[Sequence[Datum]]) -> Metrics:
    """Mean negative log-likelihood per answer token, in nats."""
    if not held_out:
        return {}
    data = [datum for row in held_out for datum in row]
    output = await session.engine.forward(session.adapter, data, "cross_entropy")
    return {"eval/mean_nll": output.metrics["loss:sum"] / output.metrics["tokens:sum"]}


def rows_of(config: RunConfig, renderer: Renderer, context: int) -> Rows:
    """What a run reads.

    Raises:
        DataError: as ``load_rows``.
    """
    return load_rows(Path(config.sft.data), renderer, config.sft.held_out, context, config.sft.train_on)


def load_rows(path: Path, renderer: Renderer, held_out: float, context: int, train_on: TrainOn = "all_assistant_messages") -> Rows:
    """
    Raises:
        DataError: names the file and the line.
    """
    needs = "'messages', or 'prompt' and 'completion'"
    return read_rows(path, "sft.data", needs, held_out, lambda row: answer_data(conversation(row), renderer, context, train_on))
