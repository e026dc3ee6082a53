"""Direct preference optimisation of one adapter on pairs of answers.

The loss of a pair is -log sigmoid(beta (m - m_ref)), where m is log p(chosen) - log p(rejected) under the training weights
and m_ref the same under the reference (https://arxiv.org/abs/2305.18290, equation 7). The engine's losses are sums over tokens,
and this one is not; but its gradient is: with s = beta sigmoid(-beta (m - m_ref)) it is that of a cross-entropy in which every
token of the chosen answer weighs s and every token of the rejected one -s. So a step asks for log-probabilities first, and
trains on the weights that they give. This is exact: nothing moves between the two passes.

The reference is the base with the adapter off, or the adapter that ``init`` names, as it was: no second model. What is left out, and why:

- no other pair losses (IPO, conservative labels), no SFT term: one loss that is understood;
- no division by the answers' length: the equation has none;
- no reference log-probabilities on disk: a pass of the reference rides along with the policy's.

Metrics have TRL's names. The loss is the mean over the pairs of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veneer.measure.canary import check_loaded
from veneer.render import Renderer
from veneer.train.datums import weighed
from veneer.train.rows import answer_data, batch_indices, preference, read_rows
from veneer.train.session import Metrics, Session
from veneer.types import AdamParams, Datum, Floats

Sums = NDArray[np.float64]
REFERENCE = "(reference)"
"""What the adapter that ``init`` names is called in the engine; no run can have this name."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each as the datums of its turns."""

    chosen: Sequence[Datum]
    rejected: Sequence[Datum]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of whole answers, in nats; each [pairs]."""

    chosen: Sums
    rejected: Sums
    ref_chosen: Sums
    ref_rejected: Sums

    @property
    def margins(self) -> Sums:
        """m - m_ref."""
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)


@dataclass(frozen=True)
class DpoResult:
    steps: int
    pairs: int
    held_out_pairs: int


async def train(session: Session) -> DpoResult:
    """Run or go on with a run until its last step.

    Raises:
        DataError: the data file is missing or a line is wrong.
        AttestationError: a step changed nothing, or the base changed.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, dpo = session.engine, session.config.dpo
    pairs, held_out = load_pairs(Path(dpo.data), session.renderer, dpo.held_out, engine.context_length)
    adam = AdamParams(dpo.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=dpo.grad_clip_norm)
    first = await session.resume()
    if session.init is not None:
        await engine.load_state(REFERENCE, session.init)
        check_loaded(engine, REFERENCE, session.init, session.canary)
    published = await engine.publish(session.adapter)
    if first == 0:
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest, **await held_out_metrics(session, held_out)}
        await session.record(metrics, {}, last=dpo.steps == 0)
    for step in range(max(first, 1), dpo.steps + 1):
        clock = time.perf_counter()
        batch = [pairs[i] for i in batch_indices(len(pairs), dpo.batch_size, step, session.config.seed)]
        scores = await score(session, batch)
        passed = engine.forward_backward(session.adapter, pair_data(batch, scores.margins, dpo.beta), "cross_entropy")
        stepped = engine.optim_step(session.adapter, adam)
        await passed
        norm = (await stepped)["grad_norm"]
        published = await session.publish_changed(published)
        metrics = {"step": step, **pair_metrics(scores, dpo.beta), "optim/grad_norm": norm, "optim/lr": dpo.learning_rate}
        metrics |= {"adapter/version": published.version, "adapter/digest": published.digest}
        if step == dpo.steps or step % session.config.eval.every == 0:
            metrics |= await held_out_metrics(session, held_out)
        await session.record(metrics, {"train": time.perf_counter() - clock}, last=step == dpo.steps)
    if session.init is not None:
        engine.remove_adapter(REFERENCE)
    return DpoResult(dpo.steps, len(pairs), len(held_out))


async def score(session: Session, pairs: Sequence[Pair]) -> Scores:
    """Both answers of every pair under the training weights and under the reference."""
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    data = [datum for answer in answers for datum in answer]
    reference = None if session.init is None else REFERENCE
    asked = [session.engine.forward(name, data, "cross_entropy") for name in (session.adapter, reference)]
    policy, frozen = [answer_sums(answers, (await future).logprobs_D) for future in asked]
    return Scores(policy[0::2], policy[1::2], frozen[0::2], frozen[1::2])


def answer_sums(answers: Sequence[Sequence[Datum]], logprobs_D: Sequence[Floats]) -> Sums:
    """The log-probability of every answer, from those of the tokens of all their datums in order."""
    rows = iter(logprobs_D)
    return np.array([sum(float(next(rows)[datum.mask != 0].sum(dtype=np.float64)) for datum in answer) for answer in answers])


def pair_losses(margins: Sums, beta: float) -> tuple[Sums, Sums]:
    """-log sigmoid(beta m) and minus its derivative by m, beta sigmoid(-beta m)."""
    losses = np.logaddexp(0.0, -beta * margins)
    return losses, beta * np.exp(-np.logaddexp(0.0, beta * margins))


def pair_data(pairs: Sequence[Pair], margins: Sums, beta: float) -> list[Datum]:
    """Datums whose cross-entropy has the gradient of the pairs' mean loss."""
    weights = pair_losses(margins, beta)[1] / len(pairs)
    return [
        weighed(datum, weight)
        for pair, s in zip(pairs, weights, strict=True)
        for answer, weight in ((pair.chosen, s), (pair.rejected, -s))
        for datum in answer
    ]


def pair_metrics(scores: Scores, beta: float) -> Metrics:
    """TRL's: means over the pairs. A reward is beta times what the policy adds to the reference's log-probability."""
    chosen, rejected = beta * (scores.chosen - scores.ref_chosen), beta * (scores.rejected - scores.ref_rejected)
    numbers = {
        "loss": pair_losses(scores.margins, beta)[0],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": scores.chosen,
        "logps/rejected": scores.rejected,
    }
    return {name: float(np.mean(values)) for name, values in numbers.items()}


async def held_out_metrics(session: Session, held_out: Sequence[Pair]) -> Metrics:
    if not held_out:
        return {}
    found = pair_metrics(await score(session, held_out), session.config.dpo.beta)
    return {f"eval/{name}": value for name, value in found.items()} | {"eval/pairs": len(held_out)}


def load_pairs(path: Path, renderer: Renderer, held_out: float, context: int) -> tuple[list[Pair], list[Pair]]:
    """To train on and held out.

    Raises:
        DataError: names the file and the line.
    """

    def pair(row: object) -> Pair:
        return Pair(*(answer_data(talk, renderer, context) for talk in preference(row)))

    return read_rows(path, "dpo.data", "'prompt', 'chosen' and 'rejected'", held_out, pair)
