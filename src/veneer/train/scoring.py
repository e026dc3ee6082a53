"""Held-out problems in the course of a run: played, checked, kept."""

from __future__ import annotations

from veneer.measure.canary import check_drawn
from veneer.train.evaluate import Evaluation, evaluate
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy
from veneer.train.session import Session
from veneer.types import Adapter, EnvDataset


async def score(session: Session, policy: Policy, dataset: EnvDataset, problems: int, step: int, published: Adapter) -> Evaluation:
    """``evaluate``, with every episode in the run's folder.

    Raises:
        RunError: too many rollouts failed.
        AttestationError: samples come from other weights than those published last.
    """
    found = await evaluate(policy, dataset, problems, session.config.seed)
    check_failures([found.group()], session.config.env.max_failed_share)
    check_drawn([turn.sample for t in found.trajectories for turn in t.transitions], published.digest, published.base_digest)
    session.run.save_rollouts(step, [found.group()], [None], kind="eval")
    return found
