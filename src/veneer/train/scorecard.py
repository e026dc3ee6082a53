"""The scorecard of a run: the policy it began with and the one it ended with try the same held-out problems, many times each."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from veneer.envs import load_env
from veneer.measure.scorecard import Change, Scorecard, Tries, bootstrap_mean, compare_problems, make_scorecard
from veneer.train.config import ScorecardSettings
from veneer.train.datums import trajectory_to_data
from veneer.train.kl import ESTIMATORS
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, closing, derive_seed, do_rollouts
from veneer.types import EnvDataset, Finite, Trajectory, TrajectoryGroup

READ = 8
"""Episodes of a problem that the other policy reads, for the KL divergence."""


@dataclass(frozen=True)
class Divergence:
    """KL between the two policies on the problems of the scorecard, in nats, with 95% intervals over problems."""

    forward: dict[str, Any]
    """KL(start || end): what the end has given up of what the start did, which is what predicts forgetting (RL's Razor,
    https://arxiv.org/abs/2509.04259)."""
    reverse: dict[str, Any]
    """KL(end || start): how far the end has moved; at most what its rewards had it learn."""


@dataclass(frozen=True)
class Elsewhere:
    """Another environment, that was not trained on."""

    env: str
    reward: Change


@dataclass(frozen=True)
class Measured:
    card: Scorecard
    divergence: Divergence
    from_base: Divergence | None
    """The same with the base in place of the start; None: it is the start, or was not asked for."""
    elsewhere: Sequence[Elsewhere]
    episodes: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


Played = dict[tuple[str, int, int, int], list[TrajectoryGroup]]
"""What a policy did: by where, "" in the environment of the scorecard and otherwise a name, problems, tries and draws."""


async def measure_scorecard(
    start: Policy,
    end: Policy,
    dataset: EnvDataset,
    settings: ScorecardSettings,
    limit: float,
    seed: int,
    base: Policy | None = None,
    known: Played | None = None,
) -> Measured:
    """Play held-out problems with both. The same seed draws the same numbers for both, and other ones than evaluations do. ``base``: what
    the end's divergence is also measured from, if it is not the start. ``known``: what the start did when others were measured beside it,
    which is not played again; what it does now is added.

    ``limit``: the share of failed episodes above which nothing is said.

    Raises:
        RunError: more of them failed.
        ConfigError: one of ``settings.envs`` is no environment.
    """
    clock = time.perf_counter()
    others = [load_env(name, {}) for name in settings.envs]
    draws = derive_seed("scorecard", seed)

    async def both(dataset: EnvDataset, problems: int, tries: int, where: str) -> list[list[TrajectoryGroup]]:
        problems = min(problems, dataset.problem_count("eval")) if isinstance(dataset, Finite) else problems
        played, key = {} if known is None else known, (where, problems, tries, draws)
        if key not in played:
            played[key] = await do_rollouts(start, dataset, "eval", range(problems), tries, draws)
        found = [played[key], await do_rollouts(end, dataset, "eval", range(problems), tries, draws)]
        for groups in found:
            check_failures(groups, limit)
        return found

    before, after = await both(dataset, settings.problems, settings.tries, "")
    episodes = 2 * sum(len(group.trajectories_G) for group in before)
    elsewhere: list[Elsewhere] = []
    for other in others:
        async with closing(other):
            pair = await both(other, settings.elsewhere, 1, other.name)
        episodes += 2 * len(pair[0])
        rewards = [[group.trajectories_G[0].reward for group in groups] for groups in pair]
        elsewhere.append(Elsewhere(other.name, compare_problems(*rewards)))
    card = make_scorecard([_tries(group) for group in before], [_tries(group) for group in after])
    divergence = Divergence(await _divergence(end, before), await _divergence(start, after))
    from_base = None
    if base is not None:
        first = await do_rollouts(base, dataset, "eval", range(len(before)), min(READ, settings.tries), draws)
        check_failures(first, limit)
        episodes += sum(len(group.trajectories_G) for group in first)
        from_base = Divergence(await _divergence(end, first), await _divergence(base, after))
    return Measured(card, divergence, from_base, elsewhere, episodes, round(time.perf_counter() - clock, 1))


def most_episodes(settings: ScorecardSettings, from_base: bool) -> int:
    """That a scorecard plays; fewer where an environment holds fewer problems out. ``from_base``: it is measured from the base too, as the
    start is an adapter."""
    of_base = settings.problems * min(READ, settings.tries) if from_base else 0
    return 2 * (settings.problems * settings.tries + len(settings.envs) * settings.elsewhere) + of_base


async def check_others(names: Sequence[str], key: str) -> None:
    """Whether a scorecard could play these, before anything is trained or played.

    Raises:
        ConfigError: one is no environment. ``key``: where the user wrote it.
    """
    for name in names:
        async with closing(load_env(name, {}, key=key)):
            pass


def _tries(group: TrajectoryGroup) -> Tries:
    played = group.trajectories_G
    return Tries(
        rewards=[t.reward for t in played],
        answers=[_answer(t) for t in played],
        texts=["\n".join(turn.text for turn in t.transitions) for t in played],
        tokens=[sum(len(turn.sample.tokens) for turn in t.transitions) for t in played],
    )


def _answer(trajectory: Trajectory) -> str:
    """What the last turn says behind its thinking, or the calls that it makes."""
    if not trajectory.transitions:
        return ""
    action = trajectory.transitions[-1].action
    return str(action.get("content") or "").strip() or str(action.get("tool_calls") or "")


async def _divergence(reader: Policy, groups_P: Sequence[TrajectoryGroup]) -> dict[str, Any]:
    """KL from the policy that wrote these episodes to the one that reads them: Schulman's k3 of each token, which is unbiased behind what
    stands before it (http://joschu.net/blog/kl-approx.html), summed over an episode and averaged over a problem's episodes."""
    chosen = [[t for t in group.trajectories_G if t.error is None][:READ] for group in groups_P]
    data_PE = [[[replace(d, adapter=None) for d in trajectory_to_data(t)] for t in played] for played in chosen]
    data = [d for data_E in data_PE for data_D in data_E for d in data_D]
    read = iter((await reader.engine.forward(reader.adapter, data, "cross_entropy")).logprobs_D)
    sums_P, tokens = list[float](), 0
    for data_E in data_PE:
        sums = list[float]()
        for data_D in data_E:
            total = 0.0
            for datum in data_D:
                trained = datum.mask != 0
                own, other = datum.logprobs[trained].astype(np.float64), next(read)[trained].astype(np.float64)
                total += float(ESTIMATORS[3](own, other).sum())
                tokens += int(trained.sum())
            sums.append(total)
        if sums:
            sums_P.append(math.fsum(sums) / len(sums))
    around = bootstrap_mean(np.asarray(sums_P))
    counted = sum(len(data_E) for data_E in data_PE)
    return {**asdict(around), "per_token": math.fsum(sums_P) / len(sums_P) * counted / max(tokens, 1), "episodes": counted}
