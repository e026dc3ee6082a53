"""Run folders: one writer, one configuration, and nothing that a crash can tear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from veneer.digest import digest_adapter
from veneer.store.files import ASIDE, new_folder, veneer_home, write_text
from veneer.store.run import Run
from veneer.types import (
    Adapter,
    Checkpoint,
    ConfigError,
    LoraConfig,
    RunError,
    Sample,
    StorageError,
    Trajectory,
    TrajectoryGroup,
    Transition,
)

CONFIG = 'name = "x"\nseed = 0\n\n[rl]\nsteps = 3\n'


def checkpoint(value: float) -> Checkpoint:
    weights = {"q.lora_A.weight": np.full((1, 3), value, np.float32), "q.lora_B.weight": np.zeros((2, 1), np.float32)}
    return Checkpoint("sampler", Adapter("x", 1, digest_adapter(weights, LoraConfig(rank=1)), "b", "d"), LoraConfig(rank=1), weights)


def fill(run: Run, steps: int) -> None:
    """Metrics, rollouts and a checkpoint for every step."""
    for step in range(steps):
        run.log({"step": step, "reward/total": step / 10}, {"sample": 0.5})
        run.save_rollouts(step, [], [])
        run.save_checkpoint(step, checkpoint(step), {})


def test_second_opener_is_refused(tmp_path: Path) -> None:
    """Two processes on one folder would mix their lines."""
    run = Run(tmp_path / "r", CONFIG)
    with pytest.raises(RunError, match="another process"):
        Run(tmp_path / "r", CONFIG)
    code = f"from veneer.store.run import Run; from pathlib import Path; Run(Path({str(tmp_path / 'r')!r}), {CONFIG!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RunError: another process is working on" in other.stderr
    run.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    Run(tmp_path / "r", CONFIG).close()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    """Half a run with one learning rate and half with another is no run. Before its first checkpoint a run may be corrected."""
    Run(tmp_path / "r", CONFIG.replace("3", "99999")).close()
    run = Run(tmp_path / "r", CONFIG)
    fill(run, 1)
    run.close()
    with pytest.raises(ConfigError, match="steps = 4"):
        Run(tmp_path / "r", CONFIG.replace("3", "4"))
    Run(tmp_path / "r", CONFIG).close()  # and the refused one holds no lock
    assert (tmp_path / "r/config.toml").read_text() == CONFIG


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    """``folder`` names a file, or something below one."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="file"):
            Run(folder, CONFIG)


def test_rewind(tmp_path: Path) -> None:
    """Whatever lies behind the checkpoint will be made again; two copies of a step would be a false record."""
    run = Run(tmp_path / "r", CONFIG)
    fill(run, 5)
    run.rewind(2)
    assert [m["step"] for m in run.metrics()] == [0, 1, 2]
    assert [m["step"] for m in run.timings()] == [0, 1, 2]
    assert sorted(p.name for p in (run.folder / "rollouts").iterdir()) == [f"step-00000{i}.jsonl" for i in range(3)]
    run.log({"step": 3}, {})
    assert [m["step"] for m in run.metrics()] == [0, 1, 2, 3]
    run.rewind(-1)
    assert run.metrics() == run.timings() == []
    run.close()


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    """A crash in the middle of a write."""
    run = Run(tmp_path / "r", CONFIG)
    fill(run, 3)
    for name in ("metrics.jsonl", "timings.jsonl"):
        with (run.folder / name).open("a") as file:
            file.write('{"step": 3, "rew')
    assert [m["step"] for m in run.metrics()] == [0, 1, 2]
    run.rewind(3)
    run.log({"step": 3}, {})
    assert [m["step"] for m in run.metrics()] == [0, 1, 2, 3]
    assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    run.close()


def test_leftovers_of_a_crash_go(tmp_path: Path) -> None:
    """A process that was killed between writing aside and renaming leaves a file with its number; the next one tidies up."""
    run = Run(tmp_path / "r", CONFIG)
    fill(run, 2)
    (run.folder / ".mine.txt").write_text("the user's own")
    for name in (f"{ASIDE}metrics.jsonl-77", f"{ASIDE}report.html-77", f"rollouts/{ASIDE}step-000001.jsonl-77"):
        (run.folder / name).write_text("half")
    for name in (f"checkpoints/{ASIDE}step-000001-abc", f"checkpoints/{ASIDE}step-000001-abc.old"):
        (run.folder / name).mkdir()
    run.rewind(1)
    assert [p.name for p in run.folder.rglob(".*") if p.name != ".lock"] == [".mine.txt"]
    assert [m["step"] for m in run.metrics()] == [0, 1]
    run.close()


def test_newest_checkpoint(tmp_path: Path) -> None:
    """Also past step 999999, where names sort otherwise, and beside leftovers of a crash."""
    run = Run(tmp_path / "r", CONFIG)
    assert run.newest_checkpoint() is None
    for step in (2, 10, 999_999, 1_000_000):
        run.save_checkpoint(step, checkpoint(step), {})
    (run.folder / "checkpoints" / f"{ASIDE}step-1000001-half").mkdir()
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[0] == 1_000_000
    assert newest[1].weights["q.lora_A.weight"][0, 0] == 1_000_000
    run.rewind(1_000_000)
    assert not list((run.folder / "checkpoints").glob(".*"))
    run.close()


def test_rollouts_keep_the_evidence(tmp_path: Path) -> None:
    """Tokens, log-probabilities, reward, advantage and the digest of what was sampled."""
    sample = Sample(np.array([5, 6]), np.array([-0.5, -0.25], np.float32), "stop", "b", Adapter("x", 3, "f" * 64, "b", "d"))
    turn = Transition(np.array([1, 2]), sample, {"role": "assistant", "content": "ok\u2028"}, 1.0, {"correct": 1.0})
    good, bad = Trajectory([turn], 1.0), Trajectory([turn], 0.0, error="step raised")
    run = Run(tmp_path / "r", CONFIG)
    run.save_rollouts(1, [TrajectoryGroup(7, [good, bad, good]), TrajectoryGroup(8, [good])], [[[0.5], [-0.5]], None])
    records = [json.loads(line) for line in (run.folder / "rollouts/step-000001.jsonl").read_text().split("\n")[:-1]]
    run.close()
    assert [(r["problem"], r["member"], [t["advantage"] for t in r["turns"]], r["error"]) for r in records] == [
        (7, 0, [0.5], None),
        (7, 1, [None], "step raised"),
        (7, 2, [-0.5], None),
        (8, 0, [None], None),
    ]
    (kept,) = records[0]["turns"]
    assert (kept["prompt"], kept["tokens"], kept["logprobs"]) == ([1, 2], [5, 6], [-0.5, -0.25])
    assert (kept["adapter"], kept["digest"], kept["stop_reason"]) == ("x@3", "f" * 64, "stop")


@pytest.mark.parametrize("before", [False, True])
def test_new_folder_leaves_nothing_on_failure(tmp_path: Path, before: bool) -> None:
    """Half a checkpoint must never look like one, nor cost the one that was there."""
    target = tmp_path / "deep" / "target"
    if before:
        with new_folder(target) as aside:
            (aside / "a").write_text("old")

    def fail_half_way() -> None:
        with new_folder(target) as aside:
            (aside / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert [p.name for p in target.parent.iterdir()] == (["target"] if before else [])
    if before:
        assert (target / "a").read_text() == "old"
        with new_folder(target) as aside:
            (aside / "b").write_text("newer")
        assert [p.name for p in target.iterdir()] == ["b"]
        assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_write_text_replaces_whole_files(tmp_path: Path) -> None:
    """No leftovers, also when the folder cannot be written."""
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


def test_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """VENEER_HOME is where everything goes."""
    assert veneer_home() == home
    monkeypatch.delenv("VENEER_HOME")
    assert veneer_home() == Path(os.path.expanduser("~")) / ".veneer"


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    """`folder = "."` in a repository must not make a run of it, nor touch a file there."""
    (tmp_path / ".gitlab-ci.yml").write_text("mine")
    with pytest.raises(ConfigError, match="no run's"):
        Run(tmp_path, CONFIG)
    assert (tmp_path / ".gitlab-ci.yml").read_text() == "mine"
    assert not (tmp_path / "config.toml").exists()
