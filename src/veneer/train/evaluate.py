"""Held-out problems, one completion each, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.measure.habits import habit_metrics
from veneer.measure.intervals import Mean, Rate, reward_interval, wilson
from veneer.train.rollouts import Policy, derive_seed, do_rollouts
from veneer.types import EnvDataset, Finite, Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Evaluation:
    """``solved`` counts episodes with a reward of 1 or more; a failed episode is not solved."""

    solved: Rate
    reward: Mean
    """The score: where every reward is 0 or 1 it is the share solved, and has its interval."""
    means: dict[str, float]
    """``reward``, ``tokens`` and ``failed``, the environment's own metrics under ``env/``, and what the policy does about its own work
    under ``habits/``."""
    trajectories: Sequence[Trajectory]

    def metrics(self) -> dict[str, float]:
        """Flat, for metrics.jsonl."""
        rate = {"eval/solved": self.solved.value, "eval/solved_low": self.solved.low, "eval/solved_high": self.solved.high}
        rate |= {"eval/reward_low": self.reward.low, "eval/reward_high": self.reward.high}
        return rate | {"eval/problems": self.solved.trials} | {f"eval/{name}": value for name, value in self.means.items()}

    def group(self) -> TrajectoryGroup:
        """As one group, to be saved and checked like those of training."""
        return TrajectoryGroup(0, self.trajectories)


async def evaluate(policy: Policy, dataset: EnvDataset, problems: int, seed: int) -> Evaluation:
    """Play held-out problems 0 to ``problems`` - 1 once each, no more than there are. The same seed draws the same numbers whatever the
    adapter."""
    problems = min(problems, dataset.problem_count("eval")) if isinstance(dataset, Finite) else problems
    groups = await do_rollouts(policy, dataset, "eval", range(problems), 1, derive_seed("eval", seed))
    trajectories = [group.trajectories_G[0] for group in groups]
    names = sorted({name for t in trajectories for name in t.metrics})
    means = {f"env/{name}": sum(t.metrics.get(name, 0.0) for t in trajectories) / problems for name in names}
    rewards = [t.reward for t in trajectories]
    score = reward_interval(rewards)
    means["reward"] = score.value
    means["tokens"] = sum(len(turn.sample.tokens) for t in trajectories for turn in t.transitions) / problems
    means["failed"] = float(sum(t.error is not None for t in trajectories))
    means |= habit_metrics(trajectories)
    return Evaluation(wilson(sum(reward >= 1.0 for reward in rewards), problems), score, means, trajectories)
