"""Supervised fine-tuning of one adapter on conversations, with the loss on answers alone.

The same datums, engine and run folder as reinforcement learning. Left out: packing, schedules, several epochs of a fixed
order (rows are drawn in a new seeded order each epoch). The loss is the mean over the answer tokens of a batch.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.render import Renderer
from veneer.train.datums import supervised_datum
from veneer.train.session import Metrics, Session
from veneer.types import AdamParams, DataError, Datum, Message, in_one_line


@dataclass(frozen=True)
class SftResult:
    steps: int
    rows: int
    held_out_rows: int


async def train(session: Session) -> SftResult:
    """Run or go on with a run until its last step.

    Raises:
        DataError: the data file is missing or a line is wrong.
        AttestationError: a step changed nothing, or the base changed.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, sft = session.engine, session.config.sft
    rows, held_out = load_rows(Path(sft.data), session.renderer, sft.held_out, engine.context_length)
    adam = AdamParams(sft.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=sft.grad_clip_norm)
    first = await session.resume()
    published = await engine.publish(session.adapter)
    if first == 0:
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest, **await held_out_loss(session, held_out)}
        await session.record(metrics, {}, last=sft.steps == 0)
    for step in range(max(first, 1), sft.steps + 1):
        clock = time.perf_counter()
        batch = [rows[i] for i in batch_indices(len(rows), sft.batch_size, step, session.config.seed)]
        tokens = sum(float(d.mask.sum()) for d in batch)
        scaled = [dataclasses.replace(d, mask=d.mask / tokens) for d in batch]
        passed = engine.forward_backward(session.adapter, scaled, "cross_entropy")
        stepped = engine.optim_step(session.adapter, adam)
        nll, norm = (await passed).metrics["loss:sum"], (await stepped)["grad_norm"]
        published = await session.publish_changed(published)
        metrics = {"step": step, "train_mean_nll": nll, "tokens": tokens, "optim/grad_norm": norm, "optim/lr": sft.learning_rate}
        metrics |= {"adapter/version": published.version, "adapter/digest": published.digest}
        if step == sft.steps or step % session.config.eval.every == 0:
            metrics |= await held_out_loss(session, held_out)
        await session.record(metrics, {"train": time.perf_counter() - clock}, last=step == sft.steps)
    return SftResult(sft.steps, len(rows), len(held_out))


async def held_out_loss(session: Session, held_out: Sequence[Datum]) -> Metrics:
    """Mean negative log-likelihood per answer token, in nats."""
    if not held_out:
        return {}
    output = await session.engine.forward(session.adapter, held_out, "cross_entropy")
    return {"eval/mean_nll": output.metrics["loss:sum"] / output.metrics["tokens:sum"]}


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of a step: epochs are seeded permutations, laid end to end."""
    positions = range((step - 1) * batch_size, step * batch_size)
    orders = {epoch: _permutation(rows, f"{seed}/{epoch}") for epoch in {p // rows for p in positions}}
    return [orders[p // rows][p % rows] for p in positions]


def _permutation(rows: int, seed: str) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


def load_rows(path: Path, renderer: Renderer, share: float, context: int) -> tuple[list[Datum], list[Datum]]:
    """Datums to train on and datums held out; a line belongs to one or the other by its text.

    Raises:
        DataError: names the file and the line.
    """
    if not path.is_file():
        raise DataError(f"sft.data: there is no file {str(path)!r}")
    rows: list[Datum] = []
    held_out: list[Datum] = []
    try:
        lines = path.read_text().split("\n")  # not splitlines: a JSON string may hold other line separators
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({in_one_line(error)})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages, tools = _conversation(json.loads(line))
            prompt, answer = renderer.build_supervised_example(messages, tools)
        except (ValueError, KeyError, TypeError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}; a line needs 'messages', or 'prompt' and 'completion'") from error
        if len(prompt) + len(answer) > context:
            raise DataError(f"{path}, line {number}: {len(prompt) + len(answer)} tokens; the base's context is {context}")
        kept = zlib.crc32(line.encode()) / 2**32 >= share
        (rows if kept else held_out).append(supervised_datum(prompt, answer))
    if not rows:
        raise DataError(f"{path} has no rows to train on")
    return rows, held_out


def _conversation(row: Any) -> tuple[list[Message], list[dict[str, Any]]]:
    if "messages" not in row:
        row = {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for message in row["messages"]:
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"unknown role {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"the content of a message must be text, not {message['content']!r}")
    return row["messages"], row.get("tools", [])
