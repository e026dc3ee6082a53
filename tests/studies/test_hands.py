"""Runs made by processes beside this one: they come to the same, and whichever process ends, nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_lab import CONFIGS, lab, never, small

from processes import SLOW_ENV, until
from veneer.store.adapters import read_adapter
from veneer.studies.hands import Hands
from veneer.studies.lab import Lab
from veneer.train.config import RunConfig
from veneer.train.session import Interrupted
from veneer.types import ConfigError, RunError


@contextmanager
def spread(home: Path, count: int) -> Iterator[Lab]:
    """A lab that makes no run itself."""
    with Hands([sys.executable, "-m", "veneer", "study", "make", str(home / "runs"), "1", "cpu"], count) as hands:
        yield lab(home, never, hands=hands)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Generator[Lab, None, None]:
    with spread(tmp_path_factory.mktemp("two"), 2) as found:
        yield found


def hands_of(pid: int) -> set[int]:
    """Processes that it has started to make runs, and that still run."""
    found = {int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()}
    return {child for child in found if is_hand(child)}


def is_hand(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[3:5] == [b"study", b"make"]
    except OSError:
        return False


def lives(pid: int) -> bool:
    """Whether it may still hold a file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def slow(folder: Path, seed: int) -> RunConfig:
    """It sleeps half a second in every step, and saves each."""
    (folder / "slow.py").write_text(SLOW_ENV.replace("SECONDS", "0.5"))
    return small(env={"name": f"{folder / 'slow.py'}:make"}, checkpoint_every=1, rl={"steps": 6}, seed=seed)


def test_they_come_to_the_same(two: Lab, tmp_path: Path) -> None:
    """Thin adapters and full weights, over two processes: the curves and the weights that they have here, bit for bit."""
    before = hands_of(os.getpid())
    found = asyncio.run(two.run(CONFIGS))
    assert len(hands_of(os.getpid()) - before) == 2
    for mine, theirs in zip(found, asyncio.run(lab(tmp_path).run(CONFIGS)), strict=True):
        assert mine.folder.name == theirs.folder.name
        assert mine.metrics == theirs.metrics
        assert len({read_adapter(outcome.folder / "adapter")[0].adapter.digest for outcome in (mine, theirs)}) == 1
    assert asyncio.run(lab(two.folder.parent, never).run(CONFIGS)) == found, "the folder is that of any lab"


def test_what_diverges_fails_or_prints_is_told(two: Lab, tmp_path: Path) -> None:
    """A run that diverges is kept; one that fails says so in the words that it has here, and loses nothing of its neighbour; what an
    environment prints is no answer."""
    (wild,) = asyncio.run(two.run([small(rl={"learning_rate": 1e30})]))
    assert wild.diverged is not None
    assert "learning rate 1e+30" in wild.diverged
    (tmp_path / "broken.py").write_text("def make():\n    raise RuntimeError('no such world')\n")
    (tmp_path / "loud.py").write_text("from veneer.envs.digits import sort\n\ndef make():\n    print('{')\n    return sort()\n")
    with pytest.raises(ConfigError, match="no such world"):
        asyncio.run(two.run([small(seed=5, rl={"steps": 6}), small(env={"name": f"{tmp_path / 'broken.py'}:make"})]))
    two.stop.clear()
    (loud,) = asyncio.run(two.run([small(env={"name": f"{tmp_path / 'loud.py'}:make"})]))
    (plain,) = asyncio.run(lab(tmp_path).run([small()]))
    assert loud.metrics == plain.metrics
    (one,) = asyncio.run(two.run([small(seed=5, rl={"steps": 6})]))
    (alone,) = asyncio.run(lab(tmp_path).run([small(seed=5, rl={"steps": 6})]))
    assert one.metrics == alone.metrics


def test_files_that_were_changed_meanwhile_are_told(two: Lab) -> None:
    """The run would have another digest there than here, and nobody would find it."""
    assert isinstance(two.hands, Hands)
    with pytest.raises(RunError, match="Veneer's files were changed since this command began"):
        asyncio.run(two.hands.make("0123456789abcdef", small(), two.stop))


def test_what_is_no_answer_ends_the_process() -> None:
    """And the run is not waited for."""
    odd = [sys.executable, "-c", "import sys; sys.stdin.readline(); print('hello', flush=True); sys.stdin.read()"]
    with Hands(odd, 1) as hands, pytest.raises(RunError, match="was ended by signal 9"):
        asyncio.run(hands.make("a", small(), threading.Event()))


def test_stopped_they_save_and_end(tmp_path: Path) -> None:
    """And start again where a next call needs them."""
    before = hands_of(os.getpid())
    config = slow(tmp_path, 0)
    with spread(tmp_path, 1) as stopped:

        async def stop_soon() -> None:
            runs = asyncio.ensure_future(stopped.run([config, slow(tmp_path, 1)]))
            while not list(stopped.folder.glob("*/checkpoints/step-*")):
                await asyncio.sleep(0.05)
            stopped.stop.set()
            await runs

        with pytest.raises(Interrupted, match="the same command goes on"):
            asyncio.run(stop_soon())
        assert not list(stopped.folder.glob("*/outcome.json"))
        until(lambda: hands_of(os.getpid()) <= before)
        stopped.stop.clear()
        (one,) = asyncio.run(stopped.run([config]))
    (whole,) = asyncio.run(lab(tmp_path / "whole").run([config]))
    assert one.metrics == whole.metrics


def test_one_that_is_killed_is_told_of(tmp_path: Path) -> None:
    """In words that say what to do; the run of the other is saved, and both are gone on with."""
    before = hands_of(os.getpid())
    configs = [slow(tmp_path, 0), slow(tmp_path, 1)]
    with spread(tmp_path, 2) as found:

        async def kill_soon() -> None:
            runs = asyncio.ensure_future(found.run(configs))
            while len(list(found.folder.glob("*/checkpoints/step-000001"))) < 2:
                await asyncio.sleep(0.05)
            os.kill(min(hands_of(os.getpid()) - before), signal.SIGKILL)
            await runs

        with pytest.raises(RunError, match=r"was ended by signal 9.*--processes 1.*the same command goes on from there"):
            asyncio.run(kill_soon())
        assert not list(found.folder.glob("*/outcome.json"))
    one, other = asyncio.run(lab(tmp_path).run(configs))
    for mine, theirs in zip((one, other), asyncio.run(lab(tmp_path / "whole").run(configs)), strict=True):
        assert mine.metrics == theirs.metrics


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = PATHS
from test_hands import slow, spread
folder = Path("FOLDER")
with spread(folder, 2) as lab:
    asyncio.run(lab.run([slow(folder, 0), slow(folder, 1)]))
"""


def test_nobody_goes_on_for_one_who_was_killed(tmp_path: Path) -> None:
    """The processes end with the one that started them, at once: the next finds its runs' folders free."""
    tests = Path(__file__).parent
    script = KILLED.replace("PATHS", repr([str(tests), str(tests.parent)])).replace("FOLDER", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: len(list(tmp_path.glob("runs/*/checkpoints/step-*"))) >= 4, seconds=180)
    left = hands_of(process.pid)
    assert len(left) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(map(lives, left)), seconds=20)
    configs = [slow(tmp_path, 0), slow(tmp_path, 1)]
    (one, _) = asyncio.run(lab(tmp_path).run(configs))
    (whole,) = asyncio.run(lab(tmp_path / "whole").run(configs[:1]))
    assert one.metrics == whole.metrics
