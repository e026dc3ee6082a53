"""Is an environment fit to be trained on? Its solution earns 1, its grader is pure and quick, its problems stay what they are, its splits
share none, its prompts fit, and the base sometimes solves it and sometimes not.

Answers are given through the loop of training itself: a script takes the engine's place and says what it is told.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from veneer.measure.intervals import Mean
from veneer.measure.pass_at_k import mean_share, pass_at_k, useful_share
from veneer.render import Renderer
from veneer.train.metrics import commonest
from veneer.train.rollouts import Policy, closing, derive_seed, do_rollouts
from veneer.train.script import Played, Speech, play, say
from veneer.train.timebox import EnvFailure, expect, in_env
from veneer.types import (
    Closable,
    Engine,
    Env,
    EnvDataset,
    Finite,
    Message,
    Observation,
    RunError,
    SamplingParams,
    Solvable,
    Split,
    Trajectory,
)

Verdict = Literal["ok", "warning", "failed", "unknown"]
"""unknown: it could not be looked at."""
SPLITS: tuple[Split, ...] = ("train", "eval")
QUICK_MS = 100.0
"""A grader that mostly takes longer shows in the time of a step of 64 episodes."""
DRAWN, DRAWING_SECONDS = 500, 5.0
"""Problems of each split that are compared, as far as this time reaches."""
TRIES = 8
"""Least number of tries at a problem: pass@8 needs them."""
WORDS = ("", "0", "I do not know.")
"""Said where nothing better is known."""


EXACT = 1e-6
ENOUGH = 3
"""Solutions that fail, rather than being graded as wrong: each may have cost the whole of a time limit."""
ENDLESS = 2**17
"""Tokens of context that a script has: how long prompts are is looked at by itself, and an episode without an end is to have one."""
REPEATED = 4
"""Problems of each split at which everything is said twice."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Subject:
    """What is checked, and for which base."""

    dataset: EnvDataset
    renderer: Renderer
    context_length: int
    problems: int
    max_tokens: int
    env_seconds: float
    max_failed_share: float
    """As a run has it: a larger share of failed rollouts would end it."""

    def size(self, split: Split, limit: int) -> int:
        return min(limit, self.dataset.problem_count(split)) if isinstance(self.dataset, Finite) else limit

    async def play(self, split: Split, index: int, speech: Speech) -> Played:
        return await play(self.dataset, self.renderer, ENDLESS, self.env_seconds, split, index, speech)


async def check_env(subject: Subject, engine: Engine | None, group_size: int, seed: int) -> list[Finding]:
    """Every check; those of the base only with an engine. The dataset is closed behind it."""
    async with closing(subject.dataset):
        drawn = await _draw(subject)
        findings = [_shows(drawn), _repeats(drawn), _disjoint(drawn), _fits(subject, drawn)]
        if drawn.failed:
            return findings
        findings += await _gold(subject)
        findings += await _grading(subject)
        if engine is not None:
            findings += await _difficulty(subject, engine, group_size, seed)
    return findings


def passed(findings: Sequence[Finding]) -> bool:
    return not any(finding.verdict == "failed" for finding in findings)


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Drawn:
    texts: Mapping[Split, Sequence[str]]
    """Of the problems of each split, by index."""
    changed: Sequence[str]
    """Problems that were others when they were asked for again."""
    tokens: Sequence[int]
    """Lengths of the prompts that were rendered."""
    failed: Sequence[str]
    """Problems that could not be shown, and why."""


async def _draw(subject: Subject) -> Drawn:
    texts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    tokens, failed, changed = list[int](), list[str](), list[str]()
    for split in SPLITS:
        started = time.perf_counter()
        for index in range(subject.size(split, max(DRAWN, subject.problems))):
            closely = index < subject.problems
            if not closely and time.perf_counter() - started > DRAWING_SECONDS:
                break
            try:
                first = await shown(subject.dataset, split, index, subject.env_seconds)
                texts[split].append(_text(first))
                if closely:
                    tokens.append(len(subject.renderer.build_generation_prompt(first.messages, first.tools)))
                    if _text(await shown(subject.dataset, split, index, subject.env_seconds)) != texts[split][index]:
                        changed.append(f"{split} {index}")
            except Exception as error:  # the user's own messages may be anything
                failed.append(f"problem {index} of the {split} split: {error}")
                break
    return Drawn(texts, changed, tokens, failed)


async def shown(dataset: EnvDataset, split: Split, index: int, env_seconds: float) -> Observation:
    """What an environment shows first; it is thrown away behind that.

    Raises:
        EnvFailure: it raised, hung or returned nonsense.
    """

    async def made() -> Env:
        return dataset.env(split, index)

    env = await in_env(made, "env", env_seconds)
    try:
        return expect(await in_env(env.initial_observation, "initial_observation", env_seconds), Observation, "initial_observation")
    finally:
        if isinstance(env, Closable):
            await in_env(env.close, "close", env_seconds)


async def shown_with_gold(dataset: EnvDataset, split: Split, index: int, env_seconds: float) -> tuple[Observation, Message | None]:
    """What an environment shows first, and what a perfect policy says to it, if it is known.

    Raises:
        RunError: it raised, hung or returned nonsense.
    """
    try:
        first = await shown(dataset, split, index, env_seconds)
        env = dataset.env(split, index)
        await in_env(env.initial_observation, "initial_observation", env_seconds)
        gold = env.gold() if isinstance(env, Solvable) else None
        if isinstance(env, Closable):
            await in_env(env.close, "close", env_seconds)
        return first, gold
    except EnvFailure as failure:
        raise RunError(f"problem {index} of the {split} split of {dataset.name}: {failure}") from failure


def _text(observation: Observation) -> str:
    return json.dumps([list(observation.messages), list(observation.tools)], sort_keys=True, default=str)


def _shows(drawn: Drawn) -> Finding:
    count = sum(map(len, drawn.texts.values()))
    return Finding("problems", "failed", drawn.failed[0]) if drawn.failed else Finding("problems", "ok", f"{count} shown", {"shown": count})


def _repeats(drawn: Drawn) -> Finding:
    if drawn.changed:
        return Finding("repeatable", "failed", f"{len(drawn.changed)} problems are others when asked for again: {drawn.changed[0]}")
    return Finding("repeatable", "ok", f"{len(drawn.tokens)} problems are the same when asked for again")


def _disjoint(drawn: Drawn) -> Finding:
    train, held_out = set(drawn.texts["train"]), set(drawn.texts["eval"])
    shared = train & held_out
    counts = {"train": len(drawn.texts["train"]), "eval": len(drawn.texts["eval"]), "shared": len(shared)}
    counts |= {"train_different": len(train), "eval_different": len(held_out)}
    if not train or not held_out:
        return Finding("disjoint", "unknown", "a split shows no problem", counts)
    detail = f"{len(shared)} shared by {counts['train']} problems of train ({len(train)} different) and {counts['eval']} of eval"
    return Finding("disjoint", "failed" if shared else "ok", f"{detail} ({len(held_out)} different)", counts)


def _fits(subject: Subject, drawn: Drawn) -> Finding:
    if not drawn.tokens:
        return Finding("prompt length", "unknown", "no prompt was rendered")
    longest, context = max(drawn.tokens), subject.context_length
    detail = f"{statistics.median(drawn.tokens):g} tokens, at most {longest}; {subject.max_tokens} more a turn; context {context}"
    verdict: Verdict = "failed" if longest >= context else "warning" if longest + subject.max_tokens > context else "ok"
    return Finding("prompt length", verdict, detail, {"median": statistics.median(drawn.tokens), "longest": longest, "context": context})


# ---------------------------------------------------------------- grading


async def _solvable(subject: Subject, split: Split, index: int) -> bool:
    env = subject.dataset.env(split, index)
    if isinstance(env, Closable):
        await env.close()
    return isinstance(env, Solvable)


def _solution(env: Env) -> Message:
    assert isinstance(env, Solvable)
    return env.gold()


async def _gold(subject: Subject) -> list[Finding]:
    """Every problem's own solution, said to the end."""
    rewards, longest, wrong, failures = list[float](), 0, list[str](), 0
    for split in SPLITS:
        for index in range(subject.size(split, subject.problems)):
            if not await _solvable(subject, split, index):
                continue
            played = await subject.play(split, index, _solution)
            trajectory = played.trajectory
            rewards.append(trajectory.reward)
            longest = max([longest, *(len(turn.sample.tokens) for turn in trajectory.transitions)])
            failures += (failure := _failure(trajectory)) is not None
            if failure or trajectory.reward < 1 - EXACT:
                wrong.append(f"problem {index} of the {split} split: {failure or f'reward {trajectory.reward:g}'}")
            if failures == ENOUGH:
                return [_wrong_gold(wrong, rewards, longest)]
    if not rewards:
        return [Finding("gold", "unknown", "the environment knows no solution: give it gold(), and it is checked that it earns 1")]
    if wrong:
        return [_wrong_gold(wrong, rewards, longest)]
    numbers = {"problems": len(rewards), "wrong": 0, "lowest": min(rewards), "longest": longest}
    above = max(rewards) > 1 + EXACT
    detail = f"{len(rewards)} solutions earn {'1' if not above else f'up to {max(rewards):g}, more than 1'}"
    findings = [Finding("gold", "warning" if above else "ok", detail, numbers)]
    if longest > subject.max_tokens:
        findings.append(Finding("gold length", "warning", f"a solution has {longest} tokens; max_tokens is {subject.max_tokens}"))
    return findings


def _failure(trajectory: Trajectory) -> str | None:
    return trajectory.error or ("it has no end" if trajectory.truncated else None)


def _wrong_gold(wrong: Sequence[str], rewards: Sequence[float], longest: int) -> Finding:
    numbers = {"problems": len(rewards), "wrong": len(wrong), "lowest": min(rewards), "longest": longest}
    return Finding("gold", "failed", f"{len(wrong)} of {len(rewards)} solutions do not earn 1: {wrong[0]}", numbers)


async def _grading(subject: Subject) -> list[Finding]:
    """The same said twice, to fresh environments."""
    times, impure, generous = list[float](), list[str](), list[str]()
    said = 0
    for split in SPLITS:
        for index in range(subject.size(split, REPEATED)):
            speeches = [(f"{words!r}", say(words)) for words in WORDS]
            if await _solvable(subject, split, index):
                speeches.append(("the solution", _solution))
            for what, speech in speeches:
                first = await subject.play(split, index, speech)
                if failure := _failure(first.trajectory):
                    return [Finding("pure", "failed", f"{what} to problem {index} of the {split} split is not graded: {failure}")]
                second = await subject.play(split, index, speech)
                said += 1
                times += [first.grading_ms, second.grading_ms]
                if _verdict(first.trajectory) != _verdict(second.trajectory):
                    impure.append(f"{what} to problem {index} of the {split} split: {_told(first)}, then {_told(second)}")
                if what == repr("") and first.trajectory.reward >= 1:
                    generous.append(f"problem {index} of the {split} split")
    pure = (
        Finding("pure", "failed", f"{len(impure)} of {said} answers were graded otherwise the second time: {impure[0]}")
        if impure
        else Finding("pure", "ok", f"{said} answers were graded alike twice")
    )
    slow = statistics.median(times) > QUICK_MS
    detail = f"{statistics.median(times):.1f} ms an episode, at most {max(times):.1f}" + (f"; over {QUICK_MS:g} ms" if slow else "")
    quick = Finding("quick", "warning" if slow else "ok", detail, {"median_ms": statistics.median(times), "longest_ms": max(times)})
    free = [Finding("empty answer", "warning", f"it earns 1 or more: {generous[0]}")] if generous else []
    return [pure, quick, *free]


def _verdict(trajectory: Trajectory) -> tuple[Any, ...]:
    return trajectory.reward, trajectory.error, sorted(trajectory.metrics.items()), len(trajectory.transitions)


def _told(played: Played) -> str:
    return played.trajectory.error or f"{played.trajectory.reward:g} {played.trajectory.metrics}"


# ---------------------------------------------------------------- difficulty


async def _difficulty(subject: Subject, engine: Engine, group_size: int, seed: int) -> list[Finding]:
    """Training problems, each tried by the base often enough for groups of this size and for pass@8."""
    tries = max(group_size, TRIES)
    problems = subject.size("train", subject.problems)
    policy = Policy(engine, subject.renderer, None, SamplingParams(max_tokens=subject.max_tokens), subject.env_seconds)
    groups_P = await do_rollouts(policy, subject.dataset, "train", range(problems), tries, derive_seed("env check", seed))
    episodes = [t for group in groups_P for t in group.trajectories_G]
    errors = [t.error for t in episodes if t.error is not None]
    whole = [group.rewards_G for group in groups_P if len(group.rewards_G) == tries]
    findings = [_failures(errors, len(episodes), subject.max_failed_share)]
    if not whole:
        return [*findings, Finding("difficulty", "unknown", "no problem was tried without a failure")]
    solved = [sum(reward >= 1 for reward in rewards) for rewards in whole]
    once = mean_share([pass_at_k(tries, count, 1) for count in solved], tries)
    often = mean_share([pass_at_k(tries, count, TRIES) for count in solved], tries)
    useful = mean_share([useful_share(rewards, group_size) for rewards in whole], 1)
    reward = statistics.fmean(reward for rewards in whole for reward in rewards)
    cut = statistics.fmean(t.truncated for t in episodes if t.error is None)
    numbers = {"problems": len(whole), "tries": tries, "group_size": group_size, "mean_reward": reward, "truncated": cut}
    numbers |= {"pass@1": asdict(once), f"pass@{TRIES}": asdict(often), "useful_groups": asdict(useful)}
    detail = f"pass@1 {_share(once)}, pass@{TRIES} {_share(often)}, useful groups of {group_size} {_share(useful)}"
    detail += f"; mean reward {reward:.3f}, {cut:.0%} cut off{_advice(once, useful)}"
    return [*findings, Finding("difficulty", "ok" if useful.value > 0 else "warning", detail, numbers)]


def _failures(errors: Sequence[str], episodes: int, limit: float) -> Finding:
    causes = commonest(errors)
    detail = f"{len(errors)} of {episodes}" + "".join(f"; {count} times: {example}" for count, example in causes)
    verdict: Verdict = "failed" if len(errors) > limit * episodes else "warning" if errors else "ok"
    return Finding("failed rollouts", verdict, detail, {"failed": len(errors), "causes": [list(c) for c in causes]})


def _share(mean: Mean) -> str:
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _advice(once: Mean, useful: Mean) -> str:
    if useful.value > 0:
        return ""
    return "; all is solved: use harder problems" if once.value == 1 else "; no group teaches: use easier problems, or SFT first"
