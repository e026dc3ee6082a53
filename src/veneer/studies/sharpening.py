"""The runs of the studies that look at what a policy becomes, not at which arm is best: one adapter trained by reward, seed after seed, and
beside each what the base and the trained policy do with the same problems when both may try often."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.envs import load_env
from veneer.store.adapters import read_adapter
from veneer.studies.contest import Terms, overridden
from veneer.studies.lab import ADAPTER, Lab, Outcome
from veneer.train.config import RunConfig, ScorecardSettings, make_config
from veneer.train.rollouts import Policy, closing
from veneer.train.scorecard import Played, measure_scorecard
from veneer.types import AdapterError, EnvDataset, SamplingParams

SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic", "args": {"min_terms": 4, "max_terms": 6}},
    "lora": {"rank": 4},
    "rl": {"steps": 60, "groups_per_batch": 8, "group_size": 8, "learning_rate": 1.5e-3},
    "eval": {"problems": 256, "every": 60},
}
"""The rate is the one that the study of ranks found best for rank 4. Sums of more terms than in training of the base, so that it does not
solve all of them in a few tries."""


async def trained(lab: Lab, terms: Terms) -> list[Outcome]:
    """A run for each seed.

    Raises:
        ConfigError: an override that cannot be applied.
        Interrupted, VeneerError: as ``Lab.run``.
    """
    tree = overridden(SHARED, (), terms)
    return await lab.run([make_config({**tree, "seed": seed}) for seed in range(terms.seeds)])


async def scorecards(lab: Lab, outcomes: Sequence[Outcome], settings: ScorecardSettings) -> list[dict[str, Any]]:
    """Of each run, beside what it began from: ``Measured.document()``, made once and kept.

    Raises:
        Interrupted, VeneerError: as ``Lab.measured``.
    """

    starts: dict[str, Played] = {}  # many runs of a study begin from one policy

    async def measure(outcome: Outcome, config: RunConfig) -> dict[str, Any]:
        async with both(lab, outcome, config) as (start, end, dataset):
            known = starts.setdefault(f"{config.base} {config.init} {config.env.model_dump_json()} {start.params}", {})
            limit = config.env.max_failed_share
            found = await measure_scorecard(start, end, dataset, settings, limit, config.seed, known=known)
        return found.document()

    what = f"scorecard {settings.model_dump_json()}"
    return [await lab.measured(what, outcome.config, lambda config, outcome=outcome: measure(outcome, config)) for outcome in outcomes]


@asynccontextmanager
async def both(lab: Lab, outcome: Outcome, config: RunConfig) -> AsyncGenerator[tuple[Policy, Policy, EnvDataset], None]:
    """What a run began from, the base or an adapter, and what it came to, as they act in the run's environment.

    Raises:
        VeneerError: an adapter cannot be read.
    """
    engine, renderer = (place := lab.place(config)).engine, place.renderer
    folders = {TRIED: outcome.folder / ADAPTER, **({BEFORE: Path(config.init)} if config.init else {})}
    checkpoints = {who: read_adapter(folder)[0] for who, folder in folders.items()}
    params = SamplingParams(max_tokens=config.max_tokens if config.plays else config.rl.max_tokens)
    start, end = (Policy(engine, renderer, who, params, config.env.seconds) for who in (BEFORE if config.init else None, TRIED))
    try:
        for who, checkpoint in checkpoints.items():
            await engine.load_state(who, checkpoint)
        async with closing(load_env(config.env.name, config.env.args)) as dataset:
            yield start, end, dataset
    finally:
        for who in checkpoints:
            with suppress(AdapterError):  # it could not be loaded
                engine.remove_adapter(who)


BEFORE, TRIED = "(before)", "(tried)"
"""The adapters that are looked at; no run can have these names."""
