"""Mathematical answers: equal is equal however it is written, a problem repeated is no answer, and no answer stops a run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from veneer.envs import math_grading
from veneer.envs.apart import Apart, Broken, Ended, Refused
from veneer.envs.math_reward import MathReward
from veneer.envs.rows import Row
from veneer.train.timebox import alarm, in_env
from veneer.types import Message

BOMB = "\\boxed{9^{99999999}}"
"""A dozen characters whose digits fill megabytes."""

RIGHT = [
    ("The answer is 72.", "72"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("1/2", "\\frac{1}{2}"),
    ("first \\boxed{1}, no: \\boxed{2}", "2"),
    ("$x=5$", "5"),
    ("a\nb\n#### 1,234", "1234"),
    ("130", "Add them.\n#### 130"),
    ("\\boxed{[2,5)}", "[2,5)"),
    ("\\boxed{2x+1}", "1+2x"),
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("50%", "0.5"),
    ("(A)", "A"),
    ("The final answer is $\\frac{3}{4}$.", "0.75"),
    ("It costs $5,400.", "5400"),
    ("12 apples", "12"),
    ("27+94+38=159", "159"),
    ("5.4 \\times 10^3", "5400"),
    ("\\boxed{-3}", "-3"),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}"),
    ("**159**", "159"),
    ("2\\cdot 2", "2+2"),
    ("1\n2\n\n3\n", "3"),
    ("\\boxed{3", "3"),
    ("Paris", "paris"),
]
WRONG = [
    ("131", "130"),
    ("", "130"),
    ("no idea", "130"),
    ("first \\boxed{1}, no: \\boxed{2}", "1"),
    ("\\boxed{[2,5]}", "[2,5)"),
    ("-3", "3"),
    ("5 or 6", "5"),
    ("27+94+38", "159"),
    ("x=2+2", "4"),
    ("6/2", "3"),
    ("\\boxed{\\frac{6}{2}}", "3"),
    ("3\\times 4", "12"),
    ("\\boxed{2^5}", "32"),
    ("The sum of 12 and 7", "19"),
    ("2+2", "4.0"),
    ("London", "Paris"),
    ("9" * 5000, "9"),
]


@pytest.mark.parametrize(("said", "reference"), RIGHT)
def test_the_same_answer_is_right(said: str, reference: str) -> None:
    assert math_grading.answer(said, reference) == {"correct": 1.0, "parsed": 1.0}


@pytest.mark.parametrize(("said", "reference"), WRONG)
def test_another_answer_is_wrong(said: str, reference: str) -> None:
    """Among them problems that are repeated and not worked out, which math-verify alone would take."""
    assert math_grading.answer(said, reference)["correct"] == 0.0


@pytest.fixture
def reward() -> Generator[MathReward, None, None]:
    made = MathReward()
    yield made
    asyncio.run(made.close())


def row(answer: str) -> Row:
    return Row({"answer": answer}, "data.jsonl, line 1", "?", answer)


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def test_an_answer_that_cannot_be_worked_out_is_wrong_and_costs_nobody_else(reward: MathReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process all other rollouts would wait for its digits."""
    monkeypatch.setattr("veneer.envs.math_reward.GRADE", 1)

    async def both() -> list[dict[str, float]]:
        graded = await asyncio.gather(reward.score(row("2\\pi"), said(BOMB)), reward.score(row("2\\pi"), said("$2\\pi$")))
        return [dict(metrics) for _, metrics in graded]

    assert asyncio.run(both()) == [{"correct": 0.0, "ungraded": 1.0}, {"correct": 1.0, "parsed": 1.0}]
    assert asyncio.run(reward.score(row("\\frac12"), said("0.5")))[0] == 1.0


def test_it_works_in_every_thread_and_leaves_our_alarm_alone(reward: MathReward) -> None:
    """math-verify's own time limits are alarms: they fail outside of the main thread, and put out an alarm that is set there."""
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(asyncio.run(reward.score(row("0.5"), said("1/2")))[0]))
    thread.start()
    thread.join()
    assert scores == [1.0]
    with alarm(30.0):
        asyncio.run(reward.score(row("0.5"), said("\\frac12")))
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


# ---------------------------------------------------------------- processes apart

MISCHIEF = """
import os, sys, time

def answer(do, **more):
    if do == "spin":
        while True:
            pass
    if do == "eat":
        return len(bytearray(8 << 30))
    if do == "die":
        os._exit(3)
    if do == "raise":
        raise KeyError("two\\nlines")
    if do == "print":
        print("noise"); sys.stdout.flush(); os.write(1, b"more noise")
    if do == "litter":
        open("litter.txt", "w").write("x")
        return os.getcwd()
    if do == "nap":
        time.sleep(0.5)
    if do == "environment":
        return sorted(os.environ)
    return [do, os.getpid()]
"""


@pytest.fixture
def mischief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Apart, None, None]:
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    apart = Apart("mischief", processes=1)
    yield apart
    apart.close()


@pytest.mark.parametrize(
    ("do", "kind", "words"),
    [
        ("spin", Ended, "took more than 1 s of CPU time"),
        ("eat", Refused, "MemoryError"),
        ("die", Ended, "exited with 3"),
        ("raise", Refused, "KeyError: 'two\\nlines'"),
    ],
)
def test_what_goes_wrong_apart_stays_there(mischief: Apart, do: str, kind: type[Exception], words: str) -> None:
    """The next question is answered, by a new process if it must be."""
    with pytest.raises(kind) as error:
        mischief.ask_now(1, do=do)
    assert words in str(error.value)
    assert mischief.ask_now(1, do="fine")[0] == "fine"


def test_waiting_for_a_free_process_is_not_the_environments_own_time(mischief: Apart) -> None:
    """Six answers of half a second from one process: the last is there after three."""

    async def naps() -> list[Any]:
        return await asyncio.gather(*(in_env(lambda: mischief.ask(1, do="nap"), "step", 2.0) for _ in range(6)))

    assert [answer[0] for answer in asyncio.run(naps())] == ["nap"] * 6


def test_noise_is_no_answer_and_keys_stay_here(mischief: Apart) -> None:
    """Libraries print; and what a model wrote may be evaluated there, so that it must not read the judge's key."""
    assert mischief.ask_now(1, do="print")[0] == "print"
    assert "JUDGE_KEY" not in mischief.ask_now(1, do="environment")


def test_what_it_writes_is_cleared_away(mischief: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of a task that writes files where it runs once littered a repository."""
    monkeypatch.chdir(tmp_path)
    folder = Path(mischief.ask_now(1, do="litter"))
    assert (folder / "litter.txt").is_file()
    assert not (tmp_path / "litter.txt").exists()
    mischief.close()
    assert not folder.exists()


def test_questions_that_come_at_once_start_in_one_folder(mischief: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each made its own, and of two one was dropped, from under a process that was about to start in it."""

    class Slow(tempfile.TemporaryDirectory):
        def __init__(self, **named: Any) -> None:
            time.sleep(0.1)
            super().__init__(**named)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Slow)
    several = Apart("mischief", processes=4)

    async def ask() -> list[Any]:
        return await asyncio.gather(*(several.ask(1, do="litter") for _ in range(4)))

    try:
        assert len(set(asyncio.run(ask()))) == 1
    finally:
        several.close()


def test_a_module_that_is_not_there_is_no_wrong_answer() -> None:
    """Taken for an answer's fault, a broken installation would grade everything as wrong."""
    apart = Apart("no_such_module")
    with pytest.raises(Broken, match="no_such_module"):
        apart.ask_now(1, do="fine")
    apart.close()


def test_closing_gives_up_what_is_asked(mischief: Apart) -> None:
    """The end of a run must not wait for a grader that spins."""
    errors: list[Exception] = []

    def spin() -> None:
        try:
            mischief.ask_now(60, do="spin")
        except Ended as error:
            errors.append(error)

    mischief.ask_now(1, do="fine")
    thread = threading.Thread(target=spin)
    thread.start()
    time.sleep(0.2)
    mischief.close()
    thread.join(20)
    assert "died of SIGKILL" in str(errors[0])
    assert mischief.ask_now(1, do="fine")[0] == "fine"


def gone(pid: int) -> bool:
    """Ended, though perhaps not yet collected by whoever inherited it."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_nothing_is_left_behind(mischief: Apart) -> None:
    """Neither when it is closed, nor when the run that asked is killed."""
    pid = mischief.ask_now(1, do="fine")[1]
    mischief.close()
    until_gone(pid)
    program = (
        "from veneer.envs.apart import Apart\nprint(Apart('mischief').ask_now(1, do='fine')[1], flush=True)\nimport time\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    until_gone(pid)
