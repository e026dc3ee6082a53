"""jsonl and math: any data file, TRL's and verl's reward functions unchanged, and mistakes that name the line and the function."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from veneer.engine import LoraEngine, load_base
from veneer.envs import load_env
from veneer.envs.questions import QuestionDataset
from veneer.envs.rows import read_rows, split_rows
from veneer.render import load_renderer
from veneer.train.rollouts import Policy, closing, do_group_rollout
from veneer.train.script import play, say
from veneer.types import ConfigError, DataError, RequestError, SamplingParams, Solvable, Trajectory, TrajectoryGroup

RENDERER = load_renderer("nano")


def sums(count: int) -> list[dict[str, Any]]:
    return [{"question": f"{n}+{n + 1}=?", "answer": f"Add.\n#### {2 * n + 1}"} for n in range(count)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    """The same problems, whatever they are kept in: a byte order mark, quoted newlines and separators within a string are no lines."""
    rows = [{"problem": f'{n}: a,\u2028b\n"c"?', "solution": str(n), "level": "1"} for n in range(20)]
    as_lines = write(tmp_path / "a.jsonl", rows)
    as_list, table = tmp_path / "b.json", tmp_path / "c.csv"
    as_list.write_text("\ufeff" + json.dumps(rows), "utf-8")
    cells = ['"' + r["problem"].replace('"', '""') + f'",{r["solution"]},{r["level"]}' for r in rows]
    table.write_text("\ufeffproblem,solution,level\r\n" + "\r\n".join(cells) + "\r\n", "utf-8", newline="")
    read = [read_rows(path, need_answer=True) for path in (as_lines, as_list, table)]
    assert [[(r.prompt, r.answer, dict(r.columns)) for r in rows] for rows in read] == [
        [(r["problem"], r["solution"], r) for r in rows],
    ] * 3
    assert read[0][4].place == f"{as_lines}, line 5"
    assert read[1][4].place == f"{as_list}, item 5"
    assert read[2][1].place == f"{table}, line 4"


GOOD = '{"prompt": "1+1=?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", GOOD + "\n{broken", "a.jsonl, line 3: no JSON"),
        ("a.jsonl", GOOD + "[1]", "a.jsonl, line 2: a row must be an object"),
        ("a.jsonl", GOOD + '{"prompt": "", "answer": "2"}', "line 2: a prompt is a text or a list of messages, not ''"),
        ("a.jsonl", '{"prompt": [{"role": "bot", "content": "?"}], "answer": "2"}', "line 1: each message of a prompt needs a role"),
        ("a.jsonl", GOOD + '{"prompt": "?", "answer": " "}', "line 2: the answer in column 'answer' is empty"),
        ("a.jsonl", GOOD + '{"prompt": "?"}', "line 2: none of answer, solution, ground_truth is a column"),
        (
            "a.jsonl",
            '{"query": "?", "answer": "2"}',
            "none of prompt, problem, question is a column; say which one it is with",
        ),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.jsonl", b"\xff\xfe", "is no UTF-8 text"),
        ("a.json", '[{"prompt": "?",\n]', "a.json, line 2: no JSON"),
        ("a.json", '{"prompt": "?"}', "must hold a list of objects"),
        ("a.csv", 'prompt,answer\n"1\n2",3\n4\n', "a.csv, line 4: 1 cells under 2 columns"),
        ("a.csv", 'prompt,answer\n1,2\n"3,4\n', "a.csv, line 3: no CSV"),
        ("a.parquet", "PAR1", "data files are .jsonl, .json, .csv"),
        (None, "", "there is no file"),
    ],
)
def test_a_line_that_does_not_parse_is_named(tmp_path: Path, name: str | None, text: str | bytes, words: str) -> None:
    """One line, with the place: a data file is long."""
    path = tmp_path / (name or "missing.jsonl")
    if name is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        load_env("math", {"data": str(path)})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    """A column of another name is one argument away, and a typing mistake is answered with the column that was meant."""
    path = write(tmp_path / "a.jsonl", [{"Query": f"{n}=?", "label": n, "prompt": "no"} for n in range(40)])
    rows = read_rows(path, "Query", "label", need_answer=True)
    assert (rows[3].prompt, rows[3].answer) == ("3=?", 3)
    with pytest.raises(DataError, match="no column 'query'; did you mean 'Query'"):
        read_rows(path, "query", "label", need_answer=True)


def test_splits_are_by_text_and_disjoint(tmp_path: Path) -> None:
    """A problem that stands in a file twice is on one side, and no seed moves one across."""
    rows = read_rows(write(tmp_path / "a.jsonl", sums(300) * 2), need_answer=True)
    first, second = split_rows(rows, None, 0), split_rows(rows[::-1], None, 7)
    texts = [{split: {row.text for row in held} for split, held in splits.items()} for splits in (first, second)]
    assert texts[0] == texts[1]
    assert not texts[0]["train"] & texts[0]["eval"]
    assert 20 <= len(texts[0]["eval"]) <= 60
    assert [r.text for r in first["train"]] != [r.text for r in second["train"]]


def test_an_eval_file_of_its_own(tmp_path: Path) -> None:
    """What is held out is what the file says, and a problem in both files is a mistake that is named with both places."""
    data, held = write(tmp_path / "train.jsonl", sums(30)), write(tmp_path / "eval.jsonl", [{"question": "9+9=?", "answer": "18"}])
    made = load_env("math", {"data": str(data), "eval_data": str(held)})
    assert isinstance(made, QuestionDataset)
    assert (made.problem_count("train"), made.problem_count("eval")) == (30, 1)
    assert made.row("eval", 5).prompt == "9+9=?"
    write(held, sums(3))
    with pytest.raises(DataError, match=r"train.jsonl, line 1: the same problem is held out in .*eval.jsonl, line 1"):
        load_env("math", {"data": str(data), "eval_data": str(held)})
    with pytest.raises(DataError, match="none of its 1 problems is in the"):
        load_env("math", {"data": str(write(tmp_path / "one.jsonl", sums(1)))})


def test_system_and_suffix_stand_around_the_problem(tmp_path: Path) -> None:
    """How an answer is to be written is said once, for a text and for a conversation."""
    conversation = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "1+1"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": conversation, "answer": 2}] + [{"prompt": f"{n}", "answer": n} for n in range(40)])
    made = load_env("math", {"data": str(path), "system": "Be brief.", "suffix": "In \\boxed{}."})
    assert isinstance(made, QuestionDataset)
    rows = {row.text: row for split in ("train", "eval") for row in made.rows[split]}
    assert [m["content"] for m in made.framing.messages(rows["7"].prompt)] == ["Be brief.", "7\nIn \\boxed{}."]
    told = next(row for row in rows.values() if not isinstance(row.prompt, str))
    assert [m["content"] for m in made.framing.messages(told.prompt)] == ["Be brief.", "hm", "yes?", "1+1\nIn \\boxed{}."]
    assert told.prompt == conversation


def test_math_plays_end_to_end(tmp_path: Path) -> None:
    """Gold earns 1 and something else 0, through the loop that trains."""
    made = load_env("math", {"data": str(write(tmp_path / "a.jsonl", sums(40)))})

    async def rewards() -> list[float]:
        async with closing(made):
            env = made.env("train", 0)
            assert isinstance(env, Solvable)
            speeches = [lambda env: env.gold(), say("0.5"), say(""), say("<think>\n7\n</think>\n\nhm")]
            return [(await play(made, RENDERER, 2048, 30.0, "train", 0, speech)).trajectory.reward for speech in speeches]

    assert asyncio.run(rewards()) == [1.0, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- TRL's contract

TRL_FILE = '''
"""As it is written for TRL's GRPOTrainer."""
import re

def format_reward_func(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think>\\s*\\S+$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content, re.DOTALL) else 0.0 for content in contents]

def correct(prompts, completions, answer, trainer_state, log_extra, log_metric, **kwargs):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert len(prompts) == len(completions) == len(answer) == len(kwargs["completion_ids"]) == len(kwargs["level"])
    assert "prompt" not in kwargs and "completion" not in kwargs
    assert trainer_state.global_step == 0
    said = [completion[0]["content"].rpartition("</think>")[2].strip() for completion in completions]
    log_extra("said", said)
    log_extra("length", [len(text) for text in said])
    log_metric("asked", 1.0)
    log_metric("asked", 2.0)
    kwargs["level"].clear()
    return [float(text == a) for text, a in zip(said, answer)]

async def easy_only(completions, level, **kwargs):
    return [None if one > 1 else 0.5 for one in level]

def never(completions, **kwargs):
    return [None] * len(completions)

def short(completions, completion_ids, **kwargs):
    return [1.0 - len(ids) / 100 for ids in completion_ids]

def plain(completions, answer):
    assert all(isinstance(text, str) for text in completions)
    return [float(a in text) for text, a in zip(completions, answer)]
'''
FAULTS = """
def nan(completions, **kwargs): return [0.5] * (len(completions) - 1) + [float("nan")]
def high(completions, **kwargs): return [7.0] + [1.0] * (len(completions) - 1)
def text(completions, **kwargs): return ["good"] * len(completions)
def few(completions, **kwargs): return [1.0]
def number(completions, **kwargs): return 1.0
def raises(completions, **kwargs): raise KeyError("solution")
def hangs(completions, **kwargs):
    while True: pass
def verl_raises(data_source, solution_str, ground_truth, extra_info=None): raise ValueError("no number")
"""
SORTS = [{"prompt": [{"role": "user", "content": f"sort {n}21"}], "answer": f"12{n}", "level": n % 3} for n in range(3, 10)] * 30
for number, one in enumerate(SORTS):
    SORTS[number] = {**one, "prompt": [{"role": "user", "content": f"sort {number + 100}21"}]}


def rewarded(tmp_path: Path, *rewards: dict[str, Any], rows: Sequence[Any] = SORTS, **args: Any) -> QuestionDataset:
    (tmp_path / "rewards.py").write_text(TRL_FILE)
    (tmp_path / "faults.py").write_text(FAULTS)
    table = [{**r, "function": f"{tmp_path}/{r['function']}"} if "function" in r else r for r in rewards]
    made = load_env("jsonl", {"data": str(write(tmp_path / "data.jsonl", rows)), "rewards": table, **args})
    assert isinstance(made, QuestionDataset)
    return made


def trajectory_of(made: QuestionDataset, index: int, text: str) -> Trajectory:
    return asyncio.run(play(made, RENDERER, 2048, 1.0, "train", index, say(text))).trajectory


def index_of(made: QuestionDataset, level: int) -> int:
    return next(i for i, row in enumerate(made.rows["train"]) if row.columns["level"] == level)


def test_trl_functions_are_called_as_trl_calls_them(tmp_path: Path) -> None:
    """Columns by name and repeated, conversations in and out, logs kept, None where a function does not apply."""
    made = rewarded(tmp_path, {"function": "rewards.py:correct"}, {"function": "rewards.py:easy_only", "weight": 0.5, "name": "easy"})
    for level, easy in ((0, 0.5), (2, None)):
        index = index_of(made, level)
        answer = made.row("train", index).answer
        trajectory = trajectory_of(made, index, answer)
        assert trajectory.error is None
        assert trajectory.reward == 1.0 + 0.5 * (easy or 0.0)
        metrics = {"reward/correct": 1.0, "length": 3.0, "asked": 1.5} | ({} if easy is None else {"reward/easy": easy})
        assert trajectory.metrics == metrics
        assert trajectory_of(made, index, "no").reward == 0.5 * (easy or 0.0)


def test_a_completion_is_the_text_as_it_was_written(tmp_path: Path) -> None:
    """Format rewards look for the marks of thinking, which a parsed message has no more."""
    made = rewarded(tmp_path, {"function": "rewards.py:format_reward_func"})
    assert trajectory_of(made, 0, "<think>\nhm\n</think>\n\n12").reward == 1.0


def test_text_prompts_give_text_completions(tmp_path: Path) -> None:
    """TRL's standard form; and a function that names only what it reads is called with that alone."""
    rows = [{"prompt": f"sort {n}21", "answer": str(n)} for n in range(100, 180)]
    made = rewarded(tmp_path, {"function": "rewards.py:plain"}, rows=rows)
    assert trajectory_of(made, 0, f"so {made.row('train', 0).answer}").reward == 1.0


def test_a_real_group_is_one_batch(tmp_path: Path) -> None:
    """Sampled by the engine: the ids are those that were drawn, and every member gets its own reward."""
    made = rewarded(tmp_path, {"function": "rewards.py:short"})
    policy = Policy(LoraEngine(load_base("nano")), RENDERER, None, SamplingParams(max_tokens=24), 5.0)
    group: TrajectoryGroup = asyncio.run(do_group_rollout(policy, made, "train", 0, 6, seed=1))
    lengths = [len(t.transitions[0].sample.tokens) for t in group.trajectories_G]
    assert len(set(lengths)) > 1
    assert group.rewards_G == [1.0 - length / 100 for length in lengths]


def test_nothing_that_applies_is_told(tmp_path: Path) -> None:
    """TRL warns and takes 0; here it is a metric."""
    trajectory = trajectory_of(rewarded(tmp_path, {"function": "rewards.py:never"}), 0, "x")
    assert (trajectory.reward, trajectory.metrics) == (0.0, {"unrewarded": 1.0})


def test_verl_functions(tmp_path: Path) -> None:
    """verl's signature and columns, on demand, with a score alone or with more in a dict."""
    (tmp_path / "score.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert (data_source, extra_info) == ('sums', {'index': 1})\n"
        "    return {'score': float(ground_truth in solution_str), 'acc': True, 'note': 'x'}\n"
    )
    rows = [
        {"data_source": "sums", "prompt": f"{n}=?", "reward_model": {"ground_truth": str(n)}, "extra_info": {"index": 1}} for n in range(60)
    ]
    made = rewarded(tmp_path, {"function": "score.py:compute_score", "style": "verl"}, rows=rows)
    truth = made.row("train", 0).columns["reward_model"]["ground_truth"]
    trajectory = trajectory_of(made, 0, f"it is {truth}")
    assert (trajectory.reward, trajectory.metrics) == (1.0, {"reward/compute_score": 1.0, "acc": 1.0})


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"function": "faults.py:nan"}, "faults.py:nan on {place} gave nan; a reward is a finite number"),
        ({"function": "faults.py:high", "range": [0, 1]}, "faults.py:high on {place} gave 7; a reward is a finite number between 0 and 1"),
        ({"function": "faults.py:text"}, "faults.py:text on {place} gave 'good', not a number"),
        ({"function": "faults.py:number"}, "faults.py:number on {place} must return a list of 1 rewards, not 1.0"),
        ({"function": "faults.py:raises"}, "faults.py:raises on {place} raised KeyError: 'solution'"),
        ({"function": "faults.py:hangs"}, "compute_group_rewards took longer than 1 s"),
        ({"function": "faults.py:verl_raises", "style": "verl"}, "faults.py:verl_raises on {place} raised ValueError: no number"),
    ],
)
def test_a_wrong_reward_names_the_function_and_the_row(tmp_path: Path, reward: dict[str, Any], words: str) -> None:
    made = rewarded(tmp_path, reward)
    trajectory = trajectory_of(made, 3, "x")
    assert words.format(place=made.row("train", 3).place) in str(trajectory.error)
    assert "data.jsonl, line" in made.row("train", 3).place


def test_one_wrong_value_fails_its_own_member(tmp_path: Path) -> None:
    """The others of the group were graded, and are trained on."""
    made = rewarded(tmp_path, {"function": "faults.py:nan"})
    policy = Policy(LoraEngine(load_base("nano")), RENDERER, None, SamplingParams(max_tokens=8), 5.0)
    group = asyncio.run(do_group_rollout(policy, made, "train", 0, 4, seed=1))
    assert group.rewards_G == [0.5] * 3
    assert "gave nan" in str(group.trajectories_G[3].error)


# ---------------------------------------------------------------- the table


def test_weights_add_up(tmp_path: Path) -> None:
    """Math, and two functions, each under its own name."""
    table = [{"math": True, "weight": 2.0}, {"function": "rewards.py:correct"}, {"function": "rewards.py:short", "weight": -1.0}]
    made = rewarded(tmp_path, *table)

    async def played() -> Trajectory:
        async with closing(made):
            return (await play(made, RENDERER, 2048, 30.0, "train", 0, lambda env: env.gold())).trajectory  # pyright: ignore[reportAttributeAccessIssue]

    trajectory = asyncio.run(played())
    short = trajectory.metrics["reward/short"]
    assert (trajectory.metrics["reward/math"], trajectory.metrics["reward/correct"]) == (1.0, 1.0)
    assert trajectory.reward == pytest.approx(2.0 + 1.0 - short)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "say what an answer is worth"),
        ([{"function": "rewards.py:correct", "wieght": 2}], "unknown key env.args.rewards[0].wieght; did you mean 'weight'?"),
        ([{"weight": 1}], "env.args.rewards[0]: give one of function, math = true and judge"),
        ([{"math": True, "function": "rewards.py:correct"}], "give one of function, math = true and judge"),
        ([{"math": True, "range": [0, 1]}], "range and style are of a function"),
        ([{"math": True}, {"math": True}], "there are two rewards 'math'"),
        ([{"function": "rewards.py:corect"}], "has no function 'corect'"),
        ([{"function": "gone.py:f"}], "there is no file"),
        ([{"function": "rewards.py:correct", "weight": "much"}], "env.args.rewards[0].weight: input should be a valid number"),
        ([{"judge": {"base_url": "http://x/v1", "modle": "m"}}], "env.args.rewards[0].judge.modle; did you mean 'model'?"),
        ([{"judge": {"base_url": "http://x", "model": "m", "rubric": [{"name": "a", "criterio": "b"}]}}], "rubric[0].criterio"),
        (["rewards.py:correct"], "env.args.rewards[0]: input should be a valid dictionary"),
    ],
)
def test_mistakes_in_the_table(tmp_path: Path, table: Any, words: str) -> None:
    (tmp_path / "rewards.py").write_text(TRL_FILE)
    path = write(tmp_path / "data.jsonl", SORTS)
    placed = [
        {**r, "function": f"{tmp_path}/{r['function']}"} if isinstance(r, dict) and "function" in r and r["function"][0] != "/" else r
        for r in table
    ]
    with pytest.raises(ConfigError) as error:
        load_env("jsonl", {"data": str(path), "rewards": placed})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_gold_may_be_written_as_the_rewards_want_it(tmp_path: Path) -> None:
    """And an environment without an answer column knows none, which env check says."""
    made = rewarded(tmp_path, {"function": "rewards.py:correct"}, gold="<answer>{answer}</answer>")
    env = made.env("train", 0)
    assert isinstance(env, Solvable)
    assert env.gold()["content"] == f"<answer>{made.row('train', 0).answer}</answer>"
    with pytest.raises(RequestError, match="no column 'answr'"):
        rewarded(tmp_path, {"function": "rewards.py:correct"}, gold="{answr}")
    rows = [{"prompt": f"{n}"} for n in range(40)]
    assert not isinstance(rewarded(tmp_path, {"function": "rewards.py:never"}, rows=rows).env("train", 0), Solvable)
