"""Public environments of verifiers, unchanged, with the real package (``make bridges``): each pays its full reward to who solves it,
and ``veneer train`` runs on the classic interface and on v1."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playing import HERE, REAL, alive, below, interpreter, say

from veneer.envs import load_env
from veneer.train.rollouts import closing
from veneer.types import ConfigError, Message, StepResult

pytestmark = REAL
PUBLIC = str(HERE / "public")


def dataset_of(identity: str, flavour: str, monkeypatch: pytest.MonkeyPatch, **args: Any) -> Any:
    return load_env(f"verifiers:{identity}", {"python": interpreter(flavour, monkeypatch), "folder": PUBLIC, **args})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """What reverse_text downloads otherwise."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"prompt": f"{a}{b}{c}"}) for a in "abcdefgh" for b in "123456" for c in "xyz"]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def solve(dataset: Any, answers: Any, split: str = "train") -> StepResult:
    """Play one problem with a policy that reads the first message and knows what to say."""

    async def playing() -> StepResult:
        async with closing(dataset):
            env = dataset.env(split, 0)
            first = await env.initial_observation()
            asked, seen = first.messages[-1]["content"], [first.messages[-1]["content"]]
            while True:
                result = await env.step(answers(asked, seen, first.tools))
                if result.episode_done:
                    await env.close()
                    return result
                seen += [m["content"] for m in result.next_messages]

    return asyncio.run(playing())


def test_tool_test_pays_for_the_tools_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classic interface, a ToolEnv: parallel calls of its tools."""

    def answers(asked: str, _seen: list[str], tools: Any) -> Message:
        assert {tool["function"]["name"] for tool in tools} == {"tool_A", "tool_B", "tool_C", "tool_D"}
        return say("", *((name, {"x": 1}) for name in re.findall(r"tool_[A-D]", asked)))

    result = solve(dataset_of("tool-test", "verifiers-v0", monkeypatch), answers)
    assert result.reward == 1.0
    assert result.metrics["total_tool_calls"] >= 1.0


def test_reasoning_gym_env_pays_for_the_right_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classic interface, with data of its own for training and evaluation."""

    def answers(asked: str, _seen: list[str], _tools: Any) -> Message:
        return say(f"<answer>{sum_in(asked)}</answer>")

    dataset = dataset_of(
        "reasoning-gym-env", "verifiers-v0", monkeypatch, args={"gym": "chain_sum", "num_train_examples": 20, "num_eval_examples": 10}
    )
    assert (dataset.facts["train"], dataset.facts["eval"]) == (20, 10)
    assert solve(dataset, answers, "eval").reward == 1.0


def sum_in(asked: str) -> int:
    """The value of the sum in the question."""
    expression = max(re.findall(r"[\d+\- ]+", asked), key=len)
    assert re.fullmatch(r"[\d+\- ]+", expression)
    return sum(int(term.replace(" ", "")) for term in re.findall(r"[+-]?\s*\d+", expression))


def test_reverse_text_pays_for_the_text_reversed(monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    """A taskset of v1 whose stop condition ends the episode."""
    dataset = dataset_of("primeintellect/reverse-text", "verifiers-v1", monkeypatch, args={"dataset_name": str(texts)})
    assert dataset.facts["api"] == "v1"
    result = solve(dataset, lambda asked, _seen, _tools: say(f"<reversed_text>{asked[::-1]}</reversed_text>"))
    assert (result.reward, result.metrics) == (1.0, {"lcs": 1.0})


def test_glossary_pays_who_looks_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A taskset of v1 with a tool server of its own for every rollout; the model must call it to know."""

    def answers(asked: str, seen: list[str], tools: Any) -> Message:
        if len(seen) > 1:
            return say(f"<answer>{seen[-1]}</answer>")
        assert [tool["function"]["name"] for tool in tools] == ["facts_lookup"]
        return say("", ("facts_lookup", {"name": re.findall(r'"(.*?)"', asked)[0]}))

    before = set(below(os.getpid()))
    assert solve(dataset_of("glossary", "verifiers-v1", monkeypatch), answers).reward == 1.0
    assert not any(alive(pid) for pid in set(below(os.getpid())) - before)


def test_the_wrong_verifiers_for_an_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0.4 dropped load_environment; the line says which version has it."""
    with pytest.raises(ConfigError, match=r"another verifiers than 0.4.0: load_environment needs pip install 'verifiers<0.4'"):
        dataset_of("tool-test", "verifiers-v1", monkeypatch)


@pytest.mark.parametrize(
    ("identity", "flavour", "args", "metric"),
    [
        (
            "reasoning-gym-env",
            "verifiers-v0",
            {"gym": "leg_counting", "num_train_examples": 50, "num_eval_examples": 8},
            "format_reward_func",
        ),
        ("reverse-text", "verifiers-v1", None, "lcs"),
    ],
)
def test_veneer_train_runs_on_it(
    identity: str, flavour: str, args: dict[str, Any] | None, metric: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the real command on the bundled base: no rollout fails, the environment's metrics are in the run, nothing is left."""
    python = interpreter(flavour, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    settings = {"python": python, "folder": PUBLIC, "args": args or {"dataset_name": str(texts)}}
    (tmp_path / "run.toml").write_text(
        f'name = "bridge"\nfolder = "{tmp_path}/run"\n[env]\nname = "verifiers:{identity}"\nseconds = 60\n'
        + f"[env.args]\npython = {json.dumps(python)}\nfolder = {json.dumps(PUBLIC)}\n"
        + "[env.args.args]\n"
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings["args"].items())
        + "[rl]\nsteps = 2\ngroups_per_batch = 2\ngroup_size = 4\nmax_tokens = 24\n[eval]\nproblems = 4\n"
    )
    done = subprocess.run([sys.executable, "-m", "veneer", "train", "run.toml"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert [line["failed"] for line in steps] == [0, 0]
    assert all(f"env/all/{metric}" in line for line in steps)
    assert not [pid for pid in below(os.getpid()) if "bridges/player" in Path(f"/proc/{pid}/cmdline").read_text()]
