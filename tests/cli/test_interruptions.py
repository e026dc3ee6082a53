"""Ctrl-C, kill -9, full disks and two processes at once: the same command goes on, to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Veneer, differences, evidence, forking_veneer, leftovers, plain, small_run, until

pytestmark = pytest.mark.xdist_group("cli")
WAIT = 0.1


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's TOML file."""
    return small_run(tmp_path_factory.mktemp("run") / "files", WAIT)


@pytest.fixture(scope="module")
def whole(veneer: Veneer, files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    home = tmp_path_factory.mktemp("whole")
    result = veneer(home, "train", files, "--json")
    assert result.code == 0, result.err
    found = evidence(home)
    assert len(found) == 2 + 6 + 3 + 2 + 2
    return found


def lines(home: Path) -> int:
    path = home / "runs/small/metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def test_ctrl_c_in_a_fresh_process(files: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """As a user does it: python -m veneer, Ctrl-C in the middle, the same command again."""
    process = plain(tmp_path, "train", files, "--json")
    until(lambda: lines(tmp_path) >= 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted after step" in err
    assert '"exit_code": 130' in out
    assert 4 <= lines(tmp_path) < 7
    again = plain(tmp_path, "train", files, "--json")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert differences(evidence(tmp_path), whole) == []


@pytest.mark.parametrize(("signum", "after"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_signals_save_the_state(
    veneer: Veneer, files: Path, whole: dict[str, bytes], tmp_path: Path, signum: signal.Signals, after: int
) -> None:
    """The step at hand is finished and nothing of it is lost, at a step that has no checkpoint of its own too."""
    running = veneer.start(tmp_path, "train", files, "--json")
    until(lambda: lines(tmp_path) >= after)
    running.kill(signum)
    result = running.wait()
    assert (result.code, result.document["exit_code"]) == (130, 130)
    assert "Traceback" not in result.err
    kept = (tmp_path / "runs/small/metrics.jsonl").read_bytes()
    running = veneer.start(tmp_path, "train", files, "--json")
    until(lambda: lines(tmp_path) > kept.count(b"\n"))
    assert (tmp_path / "runs/small/metrics.jsonl").read_bytes().startswith(kept)
    assert running.wait().code == 0
    assert differences(evidence(tmp_path), whole) == []


def test_ctrl_c_while_it_loads(files: Path, tmp_path: Path) -> None:
    """Somebody sees the mistake at once and presses Ctrl-C."""
    process = plain(tmp_path, "train", files, "--json")
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert process.returncode in (
        130,
        -signal.SIGINT,
    )  # Python ends itself by the signal if it came inside exec(); a shell says 130 to both


SWALLOWED = """
import importlib.abc, os, signal, sys
from veneer.cli.main import main

class Presses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers":
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                pass  # as some libraries do around an import that may fail

sys.meta_path.insert(0, Presses())
main(sys.argv[1:])
"""


def test_ctrl_c_that_a_library_swallows(files: Path, tmp_path: Path) -> None:
    """It is not lost: the run ends once all is loaded."""
    environment = {**os.environ, "VENEER_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SWALLOWED, "train", files, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "veneer: interrupted")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_at_any_moment(veneer: Veneer, files: Path, whole: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    """Power cuts: killed again and again at random moments, it ends with the same bytes and no litter."""
    rng, kills = random.Random(seed), 0
    for _ in range(8):
        running = veneer.start(tmp_path, "train", files, "--json")
        already, more = lines(tmp_path), rng.randint(0, 3)
        until(lambda already=already, more=more: lines(tmp_path) >= min(already + more, 7))
        time.sleep(rng.random() * 1.2 * WAIT)
        running.kill(signal.SIGKILL)
        kills += running.wait().code == -signal.SIGKILL
        if lines(tmp_path) >= 7:
            break
    result = veneer(tmp_path, "train", files, "--json")
    assert result.code == 0, result.err
    assert kills >= 2
    assert differences(evidence(tmp_path), whole) == []
    assert leftovers(tmp_path) == []


def test_two_processes_on_one_run(veneer: Veneer, files: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The second says so and leaves; the first does not notice."""
    first = veneer.start(tmp_path, "train", files, "--json")
    until(lambda: lines(tmp_path) >= 1)
    second = veneer(tmp_path, "train", files, "--json")
    assert second.code == 1
    assert "another process is working on" in second.document["error"]
    assert second.err.count("\n") == 1
    assert first.wait().code == 0
    assert differences(evidence(tmp_path), whole) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("used_kb", [100, 700, 995])
def test_full_disk(veneer: Veneer, files: Path, whole: dict[str, bytes], tmp_path: Path, small_disk: Path, used_kb: int) -> None:
    """One line that names the path, and with some space the same command goes on. It fills up in checkpoints and in records."""
    (small_disk / "other").write_bytes(b"x" * used_kb * 1024)
    command = ("train", files, "--set", f"folder={small_disk / 'run'}", "--set", "checkpoint_every=1", "--json")
    result = veneer(tmp_path / "home", *command)
    assert "Traceback" not in result.err, result.err
    assert result.code == 1
    assert "No space" in result.document["error"]
    assert str(small_disk / "run") in result.document["error"]
    assert [line.split(":")[0] for line in result.err.splitlines() if not line.startswith("step ")] == ["veneer"]  # behind the progress
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    again = veneer(tmp_path / "home", *command)
    assert again.code == 0, again.err
    assert (small_disk / "run/metrics.jsonl").read_bytes() == whole["runs/small/metrics.jsonl"]
    assert leftovers(small_disk) == []


def test_full_home(veneer: Veneer, files: Path, small_disk: Path, tmp_path: Path) -> None:
    """The run fits elsewhere and the registry does not: the adapter is not lost."""
    (small_disk / "other").write_bytes(b"x" * 1016 * 1024)
    command = ("train", files, "--set", f"folder={tmp_path / 'run'}", "--set", "rl.steps=1", "--json")
    result = veneer(small_disk, *command)
    assert "Traceback" not in result.err, result.err
    assert result.code == 1
    assert "No space" in result.document["error"]
    (small_disk / "other").unlink()
    again = veneer(small_disk, *command)
    assert again.code == 0
    assert again.document["adapter"] == "small@1"
