"""A run is a folder: config.toml, metrics.jsonl, timings.jsonl, rollouts/, checkpoints/step-000010/, report.html.

metrics.jsonl, rollouts/ and checkpoints/ are functions of the configuration, so an interrupted run that is started again
writes the same bytes there as one that never stopped.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from veneer.store.adapters import read_adapter, write_adapter
from veneer.store.files import ASIDE, remove_asides, storage_errors, sync, write_text
from veneer.types import Checkpoint, ConfigError, RunError, TrajectoryGroup

METRICS, TIMINGS, CONFIG, REPORT, SUMMARY = "metrics.jsonl", "timings.jsonl", "config.toml", "report.html", "summary.json"
OWN = ("name", "folder", "seed")
"""Keys in which runs of one configuration may differ."""


class Run:
    """One run's folder, held by this process alone."""

    def __init__(self, folder: Path, config_toml: str) -> None:
        """Open a new folder, or one that the same configuration made.

        Raises:
            ConfigError: the folder holds a run with other settings.
            RunError: another process has it open.
        """
        self.folder = folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout as error:
                raise RunError(f"another process is working on {folder}; wait for it, or give this run another name") from error
        try:
            existing = self._read_config()
            if existing is None and any(not p.name.startswith((".lock", ASIDE)) for p in folder.iterdir()):
                raise ConfigError(f"{folder} holds files that are no run's; give an empty or new folder")
            if existing is not None and existing != config_toml and any(self.folder.glob("checkpoints/step-*")):
                old, new = set(existing.splitlines()), config_toml.splitlines()
                changed = next((line for line in new if line not in old), "a setting is gone")
                raise ConfigError(
                    f"{folder} holds a run with other settings (now: {changed}); give this one another name, or delete that folder"
                )
            if existing != config_toml:
                write_text(folder / CONFIG, config_toml)
        except BaseException:
            self.close()
            raise

    def _read_config(self) -> str | None:
        path = self.folder / CONFIG
        return path.read_text() if path.is_file() else None

    def close(self) -> None:
        self._lock.release()

    # ------------------------------------------------ checkpoints

    def save_checkpoint(self, step: int, checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Path:
        for path in (self.folder / METRICS, self.folder / TIMINGS):
            if path.is_file():
                sync(path)  # a checkpoint must never be on the disk before the lines that led to it
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        write_adapter(folder, checkpoint, facts)
        return folder

    def newest_checkpoint(self) -> tuple[int, Checkpoint, dict[str, Any]] | None:
        """The last step that was saved, its state and its manifest."""
        steps = {int(folder.name.removeprefix("step-")): folder for folder in (self.folder / "checkpoints").glob("step-*")}
        return (max(steps), *read_adapter(steps[max(steps)])) if steps else None

    def rewind(self, step: int) -> None:
        """Forget whatever was recorded behind the checkpoint at ``step``: it will be made again."""
        with storage_errors(self.folder):
            for name in (METRICS, TIMINGS):
                path = self.folder / name
                if path.is_file():
                    lines = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
                    write_text(path, "".join(line + "\n" for line in lines))
            for path in self.folder.glob("rollouts/*-*.jsonl"):
                if int(path.stem.rpartition("-")[2]) > step:
                    path.unlink()
            for folder in (self.folder, self.folder / "checkpoints", self.folder / "rollouts"):
                remove_asides(folder)

    # ------------------------------------------------ records

    def log(self, metrics: Mapping[str, Any], timings: Mapping[str, float]) -> None:
        """Append a step's metrics, which are reproducible, and its seconds, which are not."""
        for name, record in ((METRICS, metrics), (TIMINGS, {"step": metrics["step"], **timings})):
            with storage_errors(self.folder / name), (self.folder / name).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        return [json.loads(line) for line in _whole_lines(path)] if path.is_file() else []

    def timings(self) -> list[dict[str, float]]:
        path = self.folder / TIMINGS
        return [json.loads(line) for line in _whole_lines(path)] if path.is_file() else []

    def save_rollouts(
        self, step: int, groups_P: Sequence[TrajectoryGroup], advantages_P: Sequence[Sequence[Sequence[float]] | None], kind: str = "step"
    ) -> None:
        """Every trajectory of a step: tokens, log-probabilities, reward, advantage of every turn (null: dropped), error. ``kind`` "eval":
        held out."""
        lines = [json.dumps(record) for record in _rollout_records(groups_P, advantages_P)]
        path = self.folder / "rollouts" / f"{kind}-{step:06d}.jsonl"
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_text(path, "".join(line + "\n" for line in lines))

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """What ``save_rollouts`` has kept of a training step."""
        path = self.folder / "rollouts" / f"step-{step:06d}.jsonl"
        return [json.loads(line) for line in _whole_lines(path)]

    def write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)


def other_seeds(runs: Path, config_toml: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Seeds and summaries of the finished runs in the folder ``runs`` that are configured alike but for OWN: the newest first, one a seed,
    none of the seed that ``config_toml`` has. A run that cannot be read is left out."""
    mine = tomllib.loads(config_toml)
    seen = {mine["seed"]}
    for path in sorted(runs.glob(f"*/{SUMMARY}"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            theirs = tomllib.loads((path.parent / CONFIG).read_text())
            if _shared(theirs) == _shared(mine) and theirs["seed"] not in seen:
                yield theirs["seed"], json.loads(path.read_text())
                seen.add(theirs["seed"])
        except (OSError, ValueError, KeyError):
            continue  # damaged, or of another version: this run loses nothing by it


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in OWN}


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a crash may have torn the last one."""
    return path.read_text().split("\n")[:-1]


def _rollout_records(
    groups_P: Sequence[TrajectoryGroup], advantages_P: Sequence[Sequence[Sequence[float]] | None]
) -> Iterator[dict[str, Any]]:
    for group, advantages_G in zip(groups_P, advantages_P, strict=True):
        finished = iter(advantages_G or ())
        for member, trajectory in enumerate(group.trajectories_G):
            dropped = advantages_G is None or trajectory.error is not None
            advantages_T = [None] * len(trajectory.transitions) if dropped else next(finished)
            yield {
                "problem": group.index,
                "member": member,
                "reward": trajectory.reward,
                "error": trajectory.error,
                "metrics": trajectory.metrics,
                "turns": [
                    {
                        "prompt": t.prompt.tolist(),
                        "tokens": t.sample.tokens.tolist(),
                        "logprobs": [round(float(p), 6) for p in t.sample.logprobs],
                        "stop_reason": t.sample.stop_reason,
                        "adapter": None if t.sample.adapter is None else f"{t.sample.adapter.name}@{t.sample.adapter.version}",
                        "digest": None if t.sample.adapter is None else t.sample.adapter.digest,
                        "action": t.action,
                        "reward": t.reward,
                        "advantage": advantage,
                    }
                    for t, advantage in zip(trajectory.transitions, advantages_T, strict=True)
                ],
            }
