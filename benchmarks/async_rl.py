"""Sampling that goes on while training does, beside steps that wait for their slowest episode: seconds to the same reward.

    python benchmarks/async_rl.py           # JSON on stdout; --write also puts it into benchmarks/RESULTS.md

The same runs for both, seed by seed: rank 1 on all linear maps of nano, questions about a website whose every answer takes a second,
8 problems x 8 episodes a step. One side is ``rl.max_lag = 0``; the other has groups in flight up to a step behind the weights that
they train, with truncated importance weights. A side has reached the reward when the mean over three steps is at least 0.8; its
seconds are counted from the first step on. A round is a seed, and runs both sides in processes of their own, one after the other. Seeds
are 10 and on: latency, learning rate and lag were chosen on 0 to 9 (LOG.md).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import Command, Json, Settings, in_worker, ratios, request_of, run, say, shown, spread, table_of

SIDES: dict[str, Json] = {"synchronous": {}, "asynchronous": {"max_lag": 1, "correction": "truncated"}}
STEPS, REWARD, OVER = 24, 0.8, 3
"""Steps of a run at most; the reward to be reached, as a mean over so many steps."""
LATENCY = 1.0
"""Seconds."""
FIRST_SEED = 10


class Reached(Exception):
    """There is nothing more to be measured."""


def work(request: Json) -> Json:
    """One run up to the reward: its rewards, the seconds at which its steps ended, and how far behind its samples were."""
    import asyncio
    import tempfile

    from veneer.engine import LoraEngine, load_base, set_threads
    from veneer.envs import load_env
    from veneer.render import load_renderer
    from veneer.store.run import Run
    from veneer.train import rl
    from veneer.train.config import make_config
    from veneer.train.rollouts import closing
    from veneer.train.session import Session

    set_threads(1)
    env = {"name": "browse", "args": {"latency": LATENCY}}
    settings: Json = {"steps": request["steps"], "learning_rate": 7e-4, **request["rl"]}
    evaluation = {"problems": 1, "every": 10**6}
    tree: Json = {"name": "waiting", "lora": {"rank": 1}, "env": env, "rl": settings, "eval": evaluation, "seed": request["seed"]}
    config = make_config(tree | {"checkpoint_every": 10**6})
    ends: list[float] = []
    rewards: list[float] = []

    def note(metrics: Mapping[str, Any]) -> None:
        ends.append(time.perf_counter())
        rewards.extend([metrics["reward/total"]] if metrics["step"] else [])
        if reached(rewards):
            raise Reached

    with tempfile.TemporaryDirectory() as folder:
        engine = LoraEngine(load_base("nano", "cpu"), patience=600, threads=request["threads"])
        run_folder = Run(Path(folder) / "run", config.to_toml())
        session = Session(engine, load_renderer("nano"), config, run_folder, on_step=note)

        async def trained() -> None:
            async with closing(load_env(config.env.name, config.env.args)) as website:
                await rl.train(session, website)

        with contextlib.suppress(Reached):
            asyncio.run(trained())
        metrics = run_folder.metrics()[1:]
        run_folder.close()
    return {
        "rewards": rewards,
        "seconds": [end - ends[0] for end in ends[1:]],
        "lag": statistics.fmean(m.get("lag/mean", 0.0) for m in metrics),
    }


def reached(rewards: list[float]) -> int | None:
    """The step behind which the reward is reached, from 1."""
    return next((i for i in range(OVER, len(rewards) + 1) if statistics.fmean(rewards[i - OVER : i]) >= REWARD), None)


def measure(settings: Settings) -> Json:
    steps = 4 if settings.quick else STEPS
    found: dict[str, list[Json]] = {side: [] for side in SIDES}
    for seed in range(FIRST_SEED, FIRST_SEED + settings.rounds):
        for side in list(SIDES)[:: 1 if seed % 2 else -1]:
            raw = in_worker(__file__, request_of(settings, steps=steps, seed=seed, rl=SIDES[side]))
            at = reached(raw["rewards"])
            raw |= {"steps": at, "to_reward": raw["seconds"][at - 1] if at else None, "step": raw["seconds"][-1] / len(raw["seconds"])}
            found[side].append(raw)
            say(f"{settings.threads} thread(s), seed {seed}: {side} reaches {REWARD} after {at} steps, {raw['to_reward'] or 0:.1f} s")
    result: Json = {}
    for side, runs in found.items():
        done = [one for one in runs if one["to_reward"] is not None]
        result[side] = {
            "reached": len(done),
            "runs": len(runs),
            "to_reward": spread([one["to_reward"] for one in done]) if done else None,
            "steps": spread([one["steps"] for one in done]) if done else None,
            "step": spread([one["step"] for one in runs]),
            "lag": statistics.fmean(one["lag"] for one in runs),
        }
    both = [(a["to_reward"], b["to_reward"]) for a, b in zip(*found.values(), strict=True) if a["to_reward"] and b["to_reward"]]
    result["faster"] = ratios(*map(list, zip(*both, strict=True))) if both else None
    result["step_faster"] = ratios(*([one["step"] for one in found[side]] for side in SIDES))
    return result


def table(result: Json) -> list[str]:
    rows = []
    for side in SIDES:
        one = result[side]
        reach = f"{one['reached']} of {one['runs']}"
        rows.append([side, reach, shown(one["to_reward"], ".1f"), shown(one["steps"], ".0f"), shown(one["step"]), f"{one['lag']:.2f}"])
    return [
        *table_of(["", f"reached {REWARD}", "seconds to it", "steps to it", "seconds a step", "mean lag"], rows),
        f"Seconds to the reward, synchronous over asynchronous: {shown(result['faster'])}; seconds a step: {shown(result['step_faster'])}.",
        "",
    ]


if __name__ == "__main__":
    doc: Any = __doc__
    run(Command(__file__, "sampling while training", doc, measure, work, table, rounds=10, threads=(1,), packages=("torch",)))
