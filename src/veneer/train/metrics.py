"""What a batch of episodes looks like, in numbers; and when a run should stop for what they say."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence

from veneer.measure.bits import corrected_bits, reward_bits
from veneer.measure.habits import habit_metrics
from veneer.train.advantages import is_constant
from veneer.train.session import Metrics
from veneer.types import RunError, TrajectoryGroup


def rollout_metrics(groups_P: Sequence[TrajectoryGroup]) -> Metrics:
    """Under the cookbook's names where it has one; what the policy does about its own work under ``habits/``."""
    trajectories = [t for group in groups_P for t in group.trajectories_G]
    finished = [t for t in trajectories if t.error is None]
    samples = [turn.sample for t in trajectories for turn in t.transitions]
    tokens = sum(len(s.tokens) for s in samples)
    constant = [group.rewards_G for group in groups_P if is_constant(group.rewards_G)]
    names = sorted({name for t in finished for name in t.metrics})
    metrics: Metrics = {
        "episodes": len(trajectories),
        "failed": len(trajectories) - len(finished),
        "truncated": sum(t.truncated for t in finished),
        "reward/total": statistics.fmean(t.reward for t in finished) if finished else 0.0,
        "by_group/frac_mixed": 1 - len(constant) / len(groups_P),
        "by_group/frac_all_good": sum(bool(rewards) and min(rewards) >= 1 for rewards in constant) / len(groups_P),
        "by_group/frac_all_bad": sum(not rewards or min(rewards) < 1 for rewards in constant) / len(groups_P),
        "groups": len(groups_P),
        "bits": sum(reward_bits(group.rewards_G) for group in groups_P),
        "bits/corrected": sum(corrected_bits(group.rewards_G) for group in groups_P),
        "optim/entropy": -sum(float(s.logprobs.sum(dtype="float64")) for s in samples) / max(tokens, 1),
        "tokens/mean": tokens / len(trajectories),
    }
    metrics |= {f"env/all/{name}": statistics.fmean(t.metrics.get(name, 0.0) for t in finished) for name in names}
    return metrics | habit_metrics(trajectories)


def why_stop(history: Sequence[Metrics], patience: int) -> str | None:
    """In words, why nothing can be learned any more: the last ``patience`` steps had no group with a signal."""
    tail = [m for m in history if m["step"] > 0][-patience:]
    if len(tail) < patience or any(m["groups/dropped"] < m["groups"] for m in tail):
        return None
    good = statistics.fmean(m["by_group/frac_all_good"] for m in tail)
    if good > 0.5:
        return f"every group of the last {patience} steps was solved: there is nothing left to learn here; use harder problems"
    advice = "lower the learning rate, or start from easier problems or SFT"
    return f"no group of the last {patience} steps had two different rewards: no bits arrive; {advice}"


def check_failures(groups_P: Sequence[TrajectoryGroup], limit: float) -> None:
    """Raises:
    RunError: a larger share than ``limit`` of the rollouts failed; names the three commonest causes.
    """
    errors = [t.error for group in groups_P for t in group.trajectories_G if t.error is not None]
    total = sum(len(group.trajectories_G) for group in groups_P)
    if len(errors) > limit * total:
        causes = "; ".join(f"{count} times: {error}" for count, error in commonest(errors))
        raise RunError(f"{len(errors)} of {total} rollouts failed, more than env.max_failed_share = {limit:g}; {causes}")


def commonest(errors: Sequence[str], most: int = 3) -> list[tuple[int, str]]:
    """How often the commonest causes occurred, with an example of each: errors that differ in numbers alone are one."""
    kinds = [re.sub(r"\d+", "N", error) for error in errors]
    return [(count, errors[kinds.index(kind)]) for kind, count in Counter(kinds).most_common(most)]
