"""A study's runs: side by side they are what each is alone, none is made twice, and one that is killed goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from processes import SLOW_ENV, until
from veneer.assets import NANO_FOLDER
from veneer.engine import FullEngine, LoraEngine, load_base
from veneer.render import load_renderer
from veneer.store.adapters import read_adapter
from veneer.studies.lab import Lab, Outcome, Place
from veneer.train.config import RunConfig, make_config
from veneer.train.session import Interrupted
from veneer.types import ConfigError, RunError

RL = {"steps": 3, "groups_per_batch": 2, "group_size": 4, "max_tokens": 16}


def small(**more: Any) -> RunConfig:
    rl = {**RL, **more.pop("rl", {})}
    return make_config({"env": {"name": "sort"}, "lora": {"rank": 1}, "rl": rl, "eval": {"problems": 8, "every": 3}, **more})


class Counted:
    """Opens places, and counts them."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __call__(self, config: RunConfig) -> Place:
        self.opened.append(config.weights)
        engine = LoraEngine(load_base("nano")) if config.weights == "lora" else FullEngine(load_base("nano"))
        return Place(engine, load_renderer("nano"))


def lab(folder: Path, opener: Callable[[RunConfig], Place] | None = None, **more: Any) -> Lab:
    """It says of every run what the command says of it."""
    return Lab(folder / "runs", opener or Counted(), **{"told": lambda outcome, done, of: print(outcome, done, of), **more})


CONFIGS = [
    small(seed=0),
    small(seed=1, rl={"learning_rate": 6e-3}),
    small(seed=0, lora={"rank": 8}),
    small(seed=2, weights="full", rl={"learning_rate": 1e-4}),
    small(seed=3, weights="full", rl={"learning_rate": 1e-4}),
]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return asyncio.run(lab(tmp_path_factory.mktemp("together")).run(CONFIGS))


def test_side_by_side_is_alone(together: list[Outcome], tmp_path: Path) -> None:
    """Five arms of three kinds, and each again in a lab of its own: the same curves and the same weights, bit for bit."""
    for place, config in enumerate(CONFIGS):
        (alone,) = asyncio.run(lab(tmp_path / str(place), side_by_side=1).run([config]))
        assert alone.metrics == together[place].metrics
        mine, theirs = (read_adapter(outcome.folder / "adapter")[0].adapter.digest for outcome in (alone, together[place]))
        assert mine == theirs


def test_a_run_begins_from_the_adapter_that_it_names(tmp_path: Path) -> None:
    """It begins with the weights that the other ended with. Another adapter is another run, the same one at another place is not, and one
    of another shape is refused."""
    here = lab(tmp_path)
    first, other = asyncio.run(here.run([small(seed=0, rl={"learning_rate": 6e-3}), small(seed=1)]))
    moved = tmp_path / "moved"
    shutil.copytree(first.folder / "adapter", moved)
    inits = [str(first.folder / "adapter"), str(moved), str(other.folder / "adapter")]
    begun, again, another, fresh = asyncio.run(here.run([small(seed=7, init=init) for init in (*inits, "")]))
    assert begun.folder == again.folder
    assert len({begun.folder, another.folder, fresh.folder}) == 3
    assert begun.metrics[0]["adapter/digest"] == first.metrics[-1]["adapter/digest"]
    parents = json.loads((begun.folder / "adapter/veneer.json").read_text())["parents"]
    assert [parent["digest"] for parent in parents] == [read_adapter(moved)[0].adapter.digest]
    with pytest.raises(ConfigError, match=r"init: the adapter in .* has the shape .*rank=1.*, and the run is to have .*rank=2"):
        asyncio.run(here.run([small(init=inits[0], lora={"rank": 2})]))


def test_a_base_is_known_by_its_weights(tmp_path: Path) -> None:
    """A folder that was moved is the same base; one with a number changed is another."""
    bases = [tmp_path / name for name in ("here", "moved", "changed")]
    for base in bases:
        shutil.copytree(NANO_FOLDER, base)
    weights = load_file(bases[-1] / "model.safetensors")
    weights[min(weights)].flat[0] += 1
    save_file(weights, bases[-1] / "model.safetensors", metadata={"format": "pt"})
    here, moved, changed = asyncio.run(lab(tmp_path).run([small(base=str(base)) for base in bases]))
    assert here.folder == moved.folder != changed.folder


def test_runs_that_differ_differ(together: list[Outcome]) -> None:
    assert len({outcome.folder for outcome in together}) == len(CONFIGS)
    digests = [outcome.metrics[-1]["adapter/digest"] for outcome in together]
    assert len(set(digests)) == len(CONFIGS)
    assert all(outcome.diverged is None and outcome.seconds > 0 for outcome in together)


def test_scores_are_those_of_the_held_out_problems(together: list[Outcome]) -> None:
    for outcome in together:
        assert outcome.score == outcome.metrics[-1]["eval/reward"]
        assert outcome.score_before == outcome.metrics[0]["eval/reward"]


def test_no_run_is_made_twice(tmp_path: Path) -> None:
    """Not in one call, not by another, and what nobody goes on from is not kept."""
    told: list[tuple[int, int]] = []
    first, opener = Counted(), Counted()
    one, same = asyncio.run(lab(tmp_path, first, told=lambda outcome, done, of: told.append((done, of))).run([small(), small()]))
    assert one == same
    assert told == [(1, 1)]
    assert first.opened == ["lora"]
    again, other = asyncio.run(lab(tmp_path, opener).run([small(), small(seed=1)]))
    assert again == one
    assert other.folder != one.folder
    assert opener.opened == ["lora"]
    assert asyncio.run(lab(tmp_path, never).run([small(seed=1), small()])) == [other, one]
    assert sorted(path.name for path in one.folder.iterdir() if path.name != ".lock") == [
        "adapter",
        "config.toml",
        "metrics.jsonl",
        "outcome.json",
        "timings.jsonl",
    ]


def test_a_run_that_somebody_else_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """Two commands may want the same: the second has asked for it before the first was done."""
    here = lab(tmp_path)
    (one,) = asyncio.run(here.run([small()]))
    files = {path: path.read_bytes() for path in one.folder.rglob("*") if path.is_file()}
    asyncio.run(here.make(small(device="cpu")))
    assert {path: path.read_bytes() for path in one.folder.rglob("*") if path.is_file()} == files
    assert asyncio.run(lab(tmp_path, never).run([small()])) == [one]


def never(config: RunConfig) -> Place:
    raise AssertionError("a run was made again")


def test_what_decides_nothing_makes_no_new_run(tmp_path: Path) -> None:
    (one,) = asyncio.run(lab(tmp_path).run([small(name="a")]))
    (same,) = asyncio.run(lab(tmp_path, never).run([small(name="b", folder="elsewhere")]))
    assert one.folder == same.folder


def test_another_veneer_makes_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of an older engine are not handed out as this one's."""
    (one,) = asyncio.run(lab(tmp_path).run([small()]))
    monkeypatch.setattr("veneer.studies.lab.origin", lambda: "another")
    (other,) = asyncio.run(lab(tmp_path).run([small()]))
    assert one.folder != other.folder
    assert one.metrics == other.metrics


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_run_that_diverges_is_kept(tmp_path: Path, weights: str) -> None:
    """With its reason, a score of 0, and its neighbour unharmed."""
    wild, sound = small(weights=weights, rl={"learning_rate": 1e30}), small(weights=weights, seed=1, rl={"learning_rate": 1e-4})
    bad, good = asyncio.run(lab(tmp_path).run([wild, sound]))
    assert bad.diverged is not None
    assert "learning rate 1e+30" in bad.diverged
    assert bad.score == 0.0
    assert bad.score_before > 0
    (alone,) = asyncio.run(lab(tmp_path / "alone").run([sound]))
    assert good.diverged is None
    assert good.metrics == alone.metrics
    assert asyncio.run(lab(tmp_path, never).run([wild])) == [bad]


def test_demonstrations_are_scored_by_their_loss(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"sort {i}21", "completion": f"12{i}"}) + "\n" for i in range(3, 10)))
    sft = {"data": str(data), "steps": 3, "batch_size": 2, "held_out": 0.4, "learning_rate": 3e-3}
    sound = make_config({"kind": "sft", "lora": {"rank": 1}, "sft": sft})
    wild = make_config({"kind": "sft", "lora": {"rank": 1}, "sft": {**sft, "learning_rate": 1e30}})
    good, bad = asyncio.run(lab(tmp_path).run([sound, wild]))
    assert good.score == -good.metrics[-1]["eval/mean_nll"] > good.score_before
    assert bad.diverged is not None
    assert bad.score == bad.score_before == good.score_before
    whole = make_config({"kind": "sft", "lora": {"rank": 1}, "sft": {**sft, "held_out": 0.0}})
    [known] = asyncio.run(lab(tmp_path).run([whole]))
    assert known.score == -known.metrics[-1]["train_mean_nll"] > known.score_before, "where nothing is held out, that of its batches"


def test_imitation_is_scored_like_reward(tmp_path: Path) -> None:
    """Also one that spoils everything in its first round: it has been evaluated behind it."""
    rejection = {"rounds": 2, "problems": 8, "group_size": 4, "steps": 3, "batch_size": 4}
    tree = {"kind": "rejection", "env": {"name": "sort"}, "lora": {"rank": 1}, "eval": {"problems": 8}}
    sound, wild = (make_config({**tree, "rejection": {**rejection, "learning_rate": rate}}) for rate in (1e-3, 0.3))
    good, bad = asyncio.run(lab(tmp_path).run([sound, wild]))
    assert good.score == good.metrics[-1]["eval/reward"]
    assert [m["step"] for m in good.metrics] == list(range(7))
    assert [m["step"] for m in bad.metrics] == list(range(4))
    assert bad.score == bad.metrics[-1]["eval/reward"] == 0.0
    assert bad.score_before == good.score_before > 0
    assert asyncio.run(lab(tmp_path, never).run([wild])) == [bad]


def test_the_same_rows_are_the_same_run_wherever_they_lie(tmp_path: Path) -> None:
    """A home that was moved keeps its runs; other rows in the same place are another run."""
    rows = [json.dumps({"prompt": f"sort {i}21", "completion": f"12{i}"}) + "\n" for i in range(3, 10)]
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    here.write_text("".join(rows))
    there.write_text("".join(rows))
    sft = {"steps": 2, "batch_size": 2, "held_out": 0.4}
    one, moved = (make_config({"kind": "sft", "lora": {"rank": 1}, "sft": {**sft, "data": str(path)}}) for path in (here, there))
    (first,) = asyncio.run(lab(tmp_path).run([one]))
    (same,) = asyncio.run(lab(tmp_path, never).run([moved]))
    assert same.metrics == first.metrics
    there.write_text("".join(rows[:-1]))
    (other,) = asyncio.run(lab(tmp_path).run([moved]))
    assert other.folder != first.folder


def test_other_loops_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a study's runs are rl, rejection or sft"):
        asyncio.run(lab(tmp_path).run([make_config({"kind": "dpo"})]))


def test_one_that_fails_loses_nothing_of_the_others(tmp_path: Path) -> None:
    """Its neighbours save their state; the next call goes on with them."""
    (tmp_path / "broken.py").write_text("def make():\n    raise RuntimeError('no such world')\n")
    broken = small(env={"name": f"{tmp_path / 'broken.py'}:make"})
    with pytest.raises(Exception, match="no such world"):
        asyncio.run(lab(tmp_path).run([small(rl={"steps": 6}), broken]))
    (one,) = asyncio.run(lab(tmp_path).run([small(rl={"steps": 6})]))
    (plain,) = asyncio.run(lab(tmp_path / "alone").run([small(rl={"steps": 6})]))
    assert one.metrics == plain.metrics


def test_stopped_it_saves_and_goes_on(tmp_path: Path) -> None:
    (whole,) = asyncio.run(lab(tmp_path / "whole").run([small(rl={"steps": 8})]))
    stopped = lab(tmp_path)

    async def stop_soon() -> None:
        runs = asyncio.ensure_future(stopped.run([small(rl={"steps": 8}), small(seed=1, rl={"steps": 8})]))
        while not list((tmp_path / "runs").glob("*/metrics.jsonl")):
            await asyncio.sleep(0)
        stopped.stop.set()
        await runs

    with pytest.raises(Interrupted):
        asyncio.run(stop_soon())
    (one,) = asyncio.run(lab(tmp_path).run([small(rl={"steps": 8})]))
    assert one.metrics == whole.metrics


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, "TESTS")
from test_lab import lab, small
config = small(env={"name": "ENV:make"}, checkpoint_every=1, rl={"steps": 6})
asyncio.run(lab(Path("FOLDER")).run([config, config.model_copy(update={"seed": 1})]))
"""


def test_killed_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_ENV.replace("SECONDS", "0.1"))
    script = KILLED.replace("TESTS", str(Path(__file__).parent)).replace("FOLDER", str(tmp_path)).replace("ENV", str(tmp_path / "slow.py"))
    script = script.replace("from pathlib", f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom pathlib")
    process = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: len(list((tmp_path / "runs").glob("*/checkpoints/step-*"))) >= 4, seconds=180)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "runs").glob("*/outcome.json"))
    config = small(env={"name": f"{tmp_path / 'slow.py'}:make"}, checkpoint_every=1, rl={"steps": 6})
    saved = max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("runs/*/checkpoints/step-*"))
    clocks = [path.read_text().splitlines() for path in tmp_path.glob("runs/*/timings.jsonl")]
    (one, _) = asyncio.run(lab(tmp_path).run([config, config.model_copy(update={"seed": 1})]))
    (whole,) = asyncio.run(lab(tmp_path / "whole").run([config]))
    assert one.metrics == whole.metrics
    now = [path.read_text().splitlines() for path in tmp_path.glob("runs/*/timings.jsonl")]
    assert any(lines[: saved + 1] in [others[: saved + 1] for others in clocks] for lines in now)  # what was saved was not made again


def test_two_labs_do_not_work_on_one_run(tmp_path: Path) -> None:
    async def both() -> None:
        await asyncio.gather(lab(tmp_path).run([small()]), lab(tmp_path).run([small()]))

    with pytest.raises(RunError, match="another process is working"):
        asyncio.run(both())


# ---------------------------------------------------------------- measurements


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    """By another process neither; under another name, with other settings or by another Veneer it is another measurement."""
    calls: list[str] = []

    async def measure(config: RunConfig) -> dict[str, list[float]]:
        calls.append(config.env.name)
        return {"found": [0.5, len(calls)]}

    first = asyncio.run(lab(tmp_path, never).measured("a", small(), measure))
    assert asyncio.run(lab(tmp_path, never).measured("a", small(name="b", folder="elsewhere"), measure)) == first == {"found": [0.5, 1]}
    others = [("b", small()), ("a", small(seed=1)), ("a", small(env={"name": "count"}))]
    assert [asyncio.run(lab(tmp_path, never).measured(*other, measure))["found"][1] for other in others] == [2, 3, 4]
    assert calls == ["sort", "sort", "sort", "count"]
    assert not list(tmp_path.glob("runs/*/outcome.json"))


def test_a_measurement_that_failed_or_was_stopped_is_not_kept(tmp_path: Path) -> None:
    async def fails(config: RunConfig) -> None:
        raise RunError("no such world")

    with pytest.raises(RunError, match="no such world"):
        asyncio.run(lab(tmp_path).measured("a", small(), fails))
    stopped = lab(tmp_path)
    stopped.stop.set()
    with pytest.raises(Interrupted):
        asyncio.run(stopped.measured("a", small(), fails))
    assert not list(tmp_path.glob("runs/*"))


def test_a_place_is_opened_once_and_again_where_it_must_be_fresh(tmp_path: Path) -> None:
    opener = Counted()
    one = lab(tmp_path, opener)
    first = one.place(small())
    assert one.place(small(seed=1)) is first
    assert one.place(small(), fresh=True) is not first
    assert one.place(small(weights="full")) is not first
    assert opener.opened == ["lora", "lora", "full"]
