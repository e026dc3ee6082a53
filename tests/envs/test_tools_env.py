"""``tools``: what the tools answer, what the model is shown, and what an episode is worth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandboxes import BOTH, LINUX, WALLED

from veneer.engine import LoraEngine, load_base
from veneer.envs import calculator, load_env
from veneer.envs.tools import ToolError
from veneer.envs.tools.calculator import CALCULATOR, evaluate
from veneer.envs.tools.python import Python
from veneer.envs.tools.sandbox import Limits, Sandbox
from veneer.render import load_renderer
from veneer.train.rollouts import Policy, closing, do_group_rollout
from veneer.types import ConfigError, DataError, Message, SamplingParams, StepResult, TrajectoryGroup

NANO = load_renderer("nano")

# ---------------------------------------------------------------- calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        ("1+2*3", "7"),
        ("(1+2)*3", "9"),
        (" 2 ** 3 ** 2 ", "512"),
        ("2^10", "1024"),
        ("-2**2", "-4"),
        ("2**-2", "0.25"),
        ("--3 - +2", "1"),
        ("0.1+0.2", "0.3"),
        (".5 * 4.", "2"),
        ("10/4", "2.5"),
        ("1/3", "0.333333333333"),
        ("1/3*3", "1"),
        ("-7/2", "-3.5"),
        ("123456789*987654321", "121932631112635269"),
        ("1/8/1000000000000", "1.25e-13"),
    ],
)
def test_calculator_is_right(expression: str, value: str) -> None:
    """A tool that is wrong punishes its use."""
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "a number is missing"),
        ("1+", "a number is missing"),
        ("2*(3", "a parenthesis is not closed"),
        ("2 3", "unexpected '3'"),
        ("1e9", "unexpected 'e9'"),
        ("__import__('os')", "unexpected '__import__'"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("9**9**9", "an exponent must be a whole number"),
        ("2**0.5", "an exponent must be a whole number"),
        ("99999999**64", "too large"),
        ("9" * 201, "longer than 200"),
        ("(" * 90 + "1" + ")" * 90, "in each other"),
        ("2**" * 60 + "1", "in each other"),
        ("٣+1", "unexpected"),
    ],
)
def test_calculator_says_what_it_does_not_take(expression: str, words: str) -> None:
    """The model reads this; each of these would run, or never end, when evaluated by Python."""
    with pytest.raises(ToolError, match=re.escape(words)):
        evaluate(expression)


EXPRESSIONS = st.recursive(
    st.integers(0, 999).map(lambda n: (str(n), Fraction(n))) | st.decimals(0, 99, places=2).map(lambda d: (str(d), Fraction(d))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda t: (f"({t[0][0]}{t[1]}{t[2][0]})", {"+": t[0][1] + t[2][1], "-": t[0][1] - t[2][1], "*": t[0][1] * t[2][1]}[t[1]])
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_calculator_agrees_with_exact_fractions(expression: tuple[str, Fraction]) -> None:
    """Written out by rule, computed by Python's own fractions."""
    text, value = expression
    if len(text) <= 200 and (value * 10**12).denominator == 1:
        assert Fraction(evaluate(text)) == value


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("0123456789+-*/^(). e_x"))
def test_calculator_answers_a_number_or_refuses(expression: str) -> None:
    """Whatever the model writes."""
    with contextlib.suppress(ToolError):
        assert re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", evaluate(expression))


def test_calculator_is_shown_as_the_base_knows_it() -> None:
    """The bundled base has learned to call a tool that looks exactly so."""
    assert CALCULATOR.schema() == calculator.CALCULATOR
    ours, known = (asyncio.run(load_env(name).env("train", 3).initial_observation()) for name in ("tools", "calculator"))
    question: list[Message] = [{"role": "user", "content": "12*34=?"}]
    tokens = [NANO.build_generation_prompt(question, shown.tools).tolist() for shown in (ours, known)]
    assert tokens[0] == tokens[1]


# ---------------------------------------------------------------- python


def run_python(code: str, bare: bool, limits: Limits | None = None) -> tuple[str, dict[str, float]]:
    python = Python(Sandbox(limits or Limits(cpu=1, wall=4.0, memory=128 * 2**20, processes=8, output=1000), unsafe_no_sandbox=bare))
    return asyncio.run(python.tool().call({"code": code})), python.metrics()


@LINUX
@pytest.mark.parametrize("bare", BOTH)
@pytest.mark.parametrize(
    ("code", "answer", "failed", "stopped"),
    [
        ("print(6 * 7)", "42", 0, 0),
        ("x = 1", "(it printed nothing)", 0, 0),
        ("print('so far')\n1 / 0", "so far\nZeroDivisionError: division by zero", 1, 0),
        ("print(", "SyntaxError: '(' was never closed", 1, 0),
        ("import sys; sys.exit(3)", "exit status 3", 1, 0),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9", 1, 0),
        ("input()", "EOFError: EOF when reading a line", 1, 0),
        ("bytearray(10**9)", "MemoryError", 1, 0),
        ("while True: print('x' * 9)", ("xxxxxxxxx\n" * 100) + "\n[cut at 1000 bytes]\nstopped: it wrote too much", 1, 1),
        ("import time; time.sleep(60)", "stopped: it took too long", 1, 1),
    ],
)
def test_python_shows_what_happened(bare: bool, code: str, answer: str, failed: int, stopped: int) -> None:
    """The output and the last line of an error, or why it was stopped; and both are counted on the episode."""
    assert run_python(code, bare) == (answer, {"python_runs": 1.0, "python_failed": failed, "python_stopped": stopped})


@WALLED
def test_harm_is_reported_on_the_rollout() -> None:
    """A fork bomb, and everything else that is stopped, ends in a metric of its episode and not of its neighbours."""
    dataset: Any = load_env("tools", {"tools": ["python"], "python_seconds": 1.0})
    bomb = "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)"

    async def both() -> list[StepResult]:
        harmful, honest = dataset.env("train", 0), dataset.env("train", 1)
        steps = (harmful.step(called("python", code=bomb)), honest.step(called("python", code="print('fine')")))
        shown = [result.next_messages[0]["content"] for result in await asyncio.gather(*steps)]
        assert shown == ["stopped: it took too long", "fine"] or shown == ["stopped: it started too many processes", "fine"]
        return [await env.step(env.gold()) for env in (harmful, honest)]

    bad, good = asyncio.run(both())
    assert (bad.metrics["python_stopped"], good.metrics["python_stopped"], bad.reward, good.reward) == (1.0, 0.0, 1.0, 1.0)


@LINUX
def test_many_programs_in_one_turn_share_its_time() -> None:
    """Else a turn full of calls that sleep would outlast ``env.seconds``: a failed rollout where there should be a bad one."""
    dataset: Any = load_env("tools", {"tools": ["python"], "python_seconds": 0.5, "unsafe_no_sandbox": True})
    sleeping: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": called("python", code="import time; time.sleep(9)")["tool_calls"] * 9,
    }
    first, second = play(dataset.env("train", 0), sleeping, called("python", code="print('again')"))
    answers = [message["content"] for message in first.next_messages]
    assert answers == ["stopped: it took too long", *["error: no time is left in this turn; call again in the next"] * 8]
    assert second.next_messages[0]["content"] == "again"


# ---------------------------------------------------------------- episodes


def called(name: str, content: str = "", **arguments: Any) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": [{"name": name, "arguments": arguments}]}


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def play(env: Any, *actions: Message) -> list[StepResult]:
    async def episode() -> list[StepResult]:
        await env.initial_observation()
        return [await env.step(action) for action in actions]

    return asyncio.run(episode())


def test_products() -> None:
    """The built-in questions: gold is worth 1, the tool's answer leads there, and a wrong answer is worth nothing."""
    dataset: Any = load_env("tools")
    env = dataset.env("eval", 0)
    prompt, gold = env.task.problem.prompt, env.gold()
    assert play(dataset.env("eval", 0), gold)[0].reward == 1.0
    looked_up, last = play(dataset.env("eval", 0), called("calculator", expression=prompt.removesuffix("=?")), gold)
    assert looked_up.next_messages[0]["content"] == gold["content"]
    assert (last.reward, last.metrics["tool_calls"], last.metrics["correct"]) == (1.0, 1.0, 1.0)
    assert play(dataset.env("eval", 0), said(gold["content"] + "1"))[0].reward == 0.0
    calls = play(dataset.env("eval", 0), *[called("calculator", expression="1+1")] * 4)
    assert [r.episode_done for r in calls] == [False] * 3 + [True]
    assert (calls[-1].reward, calls[-1].metrics["answered"]) == (0.0, 0.0)
    prompts = {split: {dataset.env(split, i).task.problem.prompt for i in range(500)} for split in ("train", "eval")}
    assert not prompts["train"] & prompts["eval"]


def test_questions_from_a_file(tmp_path: Path) -> None:
    """Prompts and answers of one's own, numbers among them; each row is met once a pass."""
    rows = [{"prompt": f"question {n}", "answer": n if n % 2 else f" {n} "} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset: Any = load_env("tools", {"data": str(tmp_path / "data.jsonl")})
    met = [dataset.env("train", i).task.problem for i in range(70)]
    count = len({p.prompt for p in met})
    assert len({p.prompt for p in met[:count]}) == count
    assert all(p.answer == p.prompt.split()[1] for p in met)
    assert not {p.prompt for p in met} & {dataset.env("eval", i).task.problem.prompt for i in range(40)}


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"tools": ["calculater"]}, ConfigError, "there is no 'calculater'; there are calculator, python"),
        ({"tools": []}, ConfigError, "there are no tools"),
        ({"tools": ["calculator", "calculator"]}, ConfigError, "two tools named calculator"),
        ({"max_turns": 0}, ConfigError, "max_turns is 0"),
        ({"data": "no-such-file.jsonl"}, DataError, "no-such-file.jsonl cannot be read"),
        ({"mcp": [{"command": ["x"], "url": "y"}]}, ConfigError, "either a command or a url"),
    ],
)
def test_mistakes_are_told_at_the_start(args: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        load_env("tools", args)


def test_python_without_a_sandbox_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And no other tool needs one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="unsafe_no_sandbox = true"):
        load_env("tools", {"tools": ["python"]})
    load_env("tools", {"tools": ["calculator"]})


# ---------------------------------------------------------------- through the chat template


def test_turns_extend_as_tokens_to_the_whole_conversation() -> None:
    """Three turns with two kinds of tools: the schemas are shown, and token in, token out is what the template makes of it all."""
    dataset: Any = load_env("tools", {"tools": ["calculator", "python"], "unsafe_no_sandbox": True})

    async def episode() -> None:
        env = dataset.env("train", 0)
        shown = await env.initial_observation()
        prompt = NANO.build_generation_prompt(shown.messages, shown.tools)
        for tool in shown.tools:
            assert json.dumps(tool["function"]["parameters"], separators=(", ", ": ")) in NANO.decode(prompt)
        conversation = list(shown.messages)
        for text in (
            '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12*(3+4)"}}\n</tool_call>',
            'first\n<tool_call>\n{"name": "python", "arguments": {"code": "print(\\"<é>\\\\n2\\")"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1/0"}}\n</tool_call>',
        ):
            sampled = NANO.encode(text + "<|im_end|>")
            action = NANO.parse_response(sampled, stopped=True)
            result = await env.step(action)
            extended = NANO.extend(prompt, sampled, result.next_messages)
            assert np.array_equal(extended[: len(prompt) + len(sampled)], np.concatenate([prompt, sampled]))
            conversation += [action, *result.next_messages]
            prompt = extended
            assert prompt.tolist() == NANO.build_generation_prompt(conversation, shown.tools).tolist()
        assert [m["content"] for m in conversation if m["role"] == "tool"] == ["84", "<é>\n2", "error: division by zero"]
        assert (await env.step(env.gold())).reward == 1.0

    asyncio.run(episode())


def rollouts(dataset: Any, retries: int = 0, size: int = 6, seconds: float = 20.0) -> TrajectoryGroup:
    """The bundled base plays one problem."""
    policy = Policy(LoraEngine(load_base("nano")), NANO, None, SamplingParams(max_tokens=96), seconds, retries)

    async def group() -> TrajectoryGroup:
        async with closing(dataset):
            return await do_group_rollout(policy, dataset, "train", 1, size, seed=3)

    return asyncio.run(group())


def test_the_base_plays_with_the_tool() -> None:
    """Real samples: it calls, it is answered, and every turn's prompt begins with all that was before."""
    played = rollouts(load_env("tools"))
    assert [t.error for t in played.trajectories_G] == [None] * 6
    longer = [t for t in played.trajectories_G if len(t.transitions) > 1]
    assert longer
    assert any(t.metrics["tool_calls"] > 0 for t in longer)
    for trajectory in longer:
        for before, after in zip(trajectory.transitions, trajectory.transitions[1:], strict=False):
            seen = np.concatenate([before.prompt, before.sample.tokens])
            assert np.array_equal(after.prompt[: len(seen)], seen)


MORTAL = """
import anyio, os, sys
import mcp.types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

async def listed(context, parameters):
    schema = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    tool = types.Tool(name="calculator", description="Evaluate an arithmetic expression.", input_schema=schema)
    return types.ListToolsResult(tools=[tool])

async def called(context, parameters):
    try:
        os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return types.CallToolResult(content=[types.TextContent(text="1")])
    os.kill(os.getpid(), 9)

async def main():
    server = Server("mortal", on_list_tools=listed, on_call_tool=called)
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())

anyio.run(main)
"""


@pytest.mark.parametrize("retries", [0, 1])
def test_a_server_that_dies_costs_one_rollout_and_is_replaced(tmp_path: Path, retries: int) -> None:
    """The first call kills its server: one rollout of the group has failed, or has been played anew as configured."""
    program, mark = tmp_path / "mortal.py", tmp_path / "mark"
    program.write_text(MORTAL)
    server = {"command": [sys.executable, str(program), str(mark)], "seconds": 30.0}
    played = rollouts(load_env("tools", {"tools": [], "mcp": [server]}), retries, size=4, seconds=60.0)
    errors = [t.error for t in played.trajectories_G if t.error is not None]
    assert mark.exists(), "the base called nothing"
    assert len(errors) == 1 - retries
    assert all("MCP server" in error and "did not answer calculator" in error for error in errors)
