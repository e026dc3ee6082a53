"""A model as a judge, over real HTTP: what it says is a reward, and what it does not costs one rollout."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, die, hang, judging, no_json

from veneer.engine import LoraEngine, load_base
from veneer.envs import load_env
from veneer.envs.judge import Judge, JudgeError, JudgeSpec
from veneer.envs.rows import Row
from veneer.render import load_renderer
from veneer.train.rollouts import Policy, closing, do_group_rollout
from veneer.types import ConfigError, Message, SamplingParams, TrajectoryGroup

ROW = Row({"prompt": "1+1=?", "answer": "2", "level": 3}, "data.jsonl, line 7", "1+1=?", "2")


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def ask(server: JudgeServer, *contents: str, **spec: Any) -> list[Any]:
    """What each of the contents is worth, asked at once; an error in its place."""

    async def asked() -> list[Any]:
        judge = Judge("tone", JudgeSpec(base_url=server.url, model="m", **{"retries": 0, "seconds": 2.0, **spec}), "env.args.rewards[0]")
        try:
            return await asyncio.gather(*(judge.score(ROW, said(c)) for c in contents), return_exceptions=True)
        finally:
            await judge.close()

    return asyncio.run(asked())


def test_a_score_is_read_from_the_end_and_scaled() -> None:
    """The judge may reason first and name other numbers; the last score counts."""
    for reply, low, high, expected in (
        ("Score: 7", 0, 10, 0.7),
        ("I first thought Score: 2.\nBut it is right.\n**Score: 9.5**", 0, 10, 0.95),
        ('{"score": 3, "why": "so"}', 1, 5, 0.5),
        ("score = -1", -1, 1, 0.0),
    ):
        with judging(JudgeServer(lambda n, q, reply=reply: reply)) as server:
            assert ask(server, "2", low=low, high=high) == [(pytest.approx(expected), {})]


@pytest.mark.parametrize("reply", ["", "good", "Score: eleven", "Score: 11", "Score: -1", "Score: nan"])
def test_nonsense_is_no_score(reply: str) -> None:
    """A judge that says nothing of use must not become a reward of 0."""
    with judging(JudgeServer(lambda n, q: reply)) as server:
        (error,) = ask(server, "2")
    assert isinstance(error, JudgeError)
    assert "judge 'tone' on data.jsonl, line 7: no score from 0 to 10 in" in str(error)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda n, q: hang, "no answer within 0.5 s"),
        (lambda n, q: die, "Error"),
        (lambda n, q: no_json, "Error"),
        (lambda n, q: 500, "InternalServerError"),
        (lambda n, q: 401, "AuthenticationError"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_without_the_key(reply: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This endpoint even repeats the key in its error."""
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    clock = time.monotonic()
    with judging(JudgeServer(reply)) as server:
        (error,) = ask(server, "2", seconds=0.5, api_key_env="JUDGE_KEY")
        assert server.keys == ["Bearer sk-very-secret"]
    assert isinstance(error, JudgeError)
    assert words in str(error)
    assert "line 7" in str(error)
    assert "secret" not in str(error)
    assert "\n" not in str(error)
    assert time.monotonic() - clock < 5


def test_it_is_asked_again_with_patience() -> None:
    """A busy or restarting endpoint is usual; a refusal is final."""
    replies: list[Any] = [500, 429, die, "Score: 10"]
    with judging(JudgeServer(lambda n, q: replies[n])) as server:
        assert ask(server, "2", retries=3, seconds=20.0) == [(1.0, {})]
        assert len(server.questions) == 4
    with judging(JudgeServer(lambda n, q: 400)) as server:
        assert isinstance(ask(server, "2", retries=3)[0], JudgeError)
        assert len(server.questions) == 1
    with judging(JudgeServer(lambda n, q: 503)) as server:  # for ever: the time is up before the tries are
        clock = time.monotonic()
        (error,) = ask(server, "2", retries=100, seconds=1.0)
        assert "no answer within 1 s" in str(error)
        assert time.monotonic() - clock < 3


def test_nobody_listens() -> None:
    with judging(JudgeServer()) as server:
        pass
    (error,) = ask(server, "2")
    assert "Connection" in str(error)


def test_few_at_a_time_and_the_same_once() -> None:
    """Sixty-four answers of a step must not break an endpoint; equal ones are asked about once."""
    with judging(JudgeServer(seconds=0.05)) as server:
        scores = ask(server, *[str(n % 6) for n in range(24)], concurrency=3, seconds=10.0)
    assert scores == [(1.0, {})] * 24
    assert len(server.questions) == 6
    assert server.most_at_once <= 3


def test_answers_are_kept(home: Path, tmp_path: Path) -> None:
    """A run that goes on asks nothing twice; another question, model or limit is another entry, and a torn file is none."""
    with judging(JudgeServer(lambda n, q: f"Score: {n}")) as server:
        assert [ask(server, "2")[0][0] for _ in range(3)] == [0.0] * 3
        kept = list((home / "cache/judge").rglob("*.json"))
        assert len(kept) == 1
        assert json.loads(kept[0].read_text()) == {"said": "Score: 0"}
        assert ask(server, "3")[0][0] == 0.1
        assert ask(server, "2", max_tokens=99)[0][0] == 0.2
        kept[0].write_text('{"sai')
        assert ask(server, "2")[0][0] == 0.3
        assert [ask(server, "2", cache="none")[0][0] for _ in range(2)] == [0.4, 0.5]
        assert ask(server, "2", cache=str(tmp_path / "mine"))[0][0] == 0.6
        assert list((tmp_path / "mine").rglob("*.json"))


def _ask_from_elsewhere(url: str, results: Any) -> None:
    server = JudgeServer(url=url)
    results.put([ask(server, str(n))[0][0] for n in range(5)])


def test_processes_share_what_was_answered(home: Path) -> None:
    """Ten runs at once keep one folder: whoever comes later reads what stands there, whole."""
    with judging(JudgeServer(lambda n, q: f"Score: {q.count('1')}")) as server:
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        workers = [context.Process(target=_ask_from_elsewhere, args=(server.url, results)) for _ in range(3)]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
        assert found[0] == found[1] == found[2]
        asked = len(server.questions)
        assert [ask(server, str(n))[0][0] for n in range(5)] == found[0]
        assert len(server.questions) == asked <= 15
    assert len(list((home / "cache/judge").rglob("*.json"))) == 5
    assert not list((home / "cache/judge").rglob(".*"))


def test_a_rubric_is_a_weighted_mean_of_its_criteria() -> None:
    """Each criterion is a question of its own, with a metric of its own."""
    rubric = [{"name": "right", "criterion": "Is it right?", "weight": 3.0}, {"name": "short", "criterion": "Is it short?"}]
    with judging(JudgeServer(lambda n, q: "Score: 10" if "right?" in q else "Score: 2")) as server:
        ((score, metrics),) = ask(server, "2", rubric=rubric)
    assert score == pytest.approx((3 * 1.0 + 0.2) / 4)
    assert metrics == {"reward/tone/right": 1.0, "reward/tone/short": 0.2}


def test_the_question_is_filled_in_once() -> None:
    """Braces in an answer are the model's, and it cannot ask for the reference by them."""
    with judging(JudgeServer()) as server:
        ask(server, "{reference} {level}", prompt="{prompt}|{answer}|{reference}|{level}|{unknown}|{'a': 1}|{criterion}|{low}-{high}")
    asked = server.questions[0]
    assert asked.startswith("1+1=?|{reference} {level}|2|3|{unknown}|{'a': 1}|")
    assert asked.endswith("|0-10")


def test_the_default_question_holds_all_parts() -> None:
    with judging(JudgeServer()) as server:
        ask(server, "my answer")
    for part in ("1+1=?", "my answer", "<reference>\n2\n", "from 0 to 10"):
        assert part in server.questions[0]


# ---------------------------------------------------------------- in a run


def group(
    tmp_path: Path, server: JudgeServer, seconds: float = 5.0, retries: int = 0, judge_seconds: float = 1.0, **spec: Any
) -> TrajectoryGroup:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"sort {n}21", "answer": f"12{n}"}) + "\n" for n in range(300, 340)))
    judge = {"base_url": server.url, "model": "m", "retries": 0, "seconds": judge_seconds, **spec}
    made = load_env("jsonl", {"data": str(data), "rewards": [{"judge": judge, "weight": 0.5}]})
    policy = Policy(LoraEngine(load_base("nano")), load_renderer("nano"), None, SamplingParams(max_tokens=24), seconds, retries)

    async def played() -> TrajectoryGroup:
        async with closing(made):
            return await do_group_rollout(policy, made, "train", 0, 6, seed=3)

    return asyncio.run(played())


@pytest.mark.parametrize(
    "fault", [lambda: hang, lambda: die, lambda: 500, lambda: "hm", lambda: no_json], ids=["hang", "die", "500", "nonsense", "no_json"]
)
def test_a_faulty_judge_costs_its_own_rollout(tmp_path: Path, fault: Callable[[], Any]) -> None:
    """The other five of the group are graded and trained on."""
    with judging(JudgeServer(lambda n, q: fault() if n == 2 else "Score: 8")) as server:
        played = group(tmp_path, server, cache="none")
    assert played.rewards_G == [0.4] * 5
    errors = [t.error for t in played.trajectories_G if t.error]
    assert len(errors) == 1
    assert "judge 'judge' on" in errors[0]
    assert "data.jsonl, line" in errors[0]
    assert all(t.metrics == {"reward/judge": 0.8} for t in played.trajectories_G if not t.error)


def test_a_rollout_that_its_judge_lost_is_played_anew_as_configured(tmp_path: Path) -> None:
    with judging(JudgeServer(lambda n, q: 500 if n == 2 else "Score: 8")) as server:
        assert group(tmp_path, server, retries=1, cache="none").rewards_G == [0.4] * 6


def test_the_rollouts_own_time_limit_holds_too(tmp_path: Path) -> None:
    """env.seconds is the outer limit, whatever the judge may take."""
    with judging(JudgeServer(lambda n, q: hang if n == 0 else "Score: 8")) as server:
        played = group(tmp_path, server, seconds=0.8, cache="none", judge_seconds=2.5)
    assert len(played.rewards_G) == 5


def test_waiting_for_a_busy_judge_is_not_the_rollouts_own_time(tmp_path: Path) -> None:
    """Six answers of 0.3 s, one at a time: the last is there after two seconds, and none had a second of its own."""
    with judging(JudgeServer(seconds=0.3)) as server:
        played = group(tmp_path, server, seconds=0.8, cache="none", concurrency=1, judge_seconds=2.5)
    assert [t.error for t in played.trajectories_G] == [None] * 6


# ---------------------------------------------------------------- keys and mistakes


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither logs nor the cache nor rollouts hold it; and a key that is meant for another service is not sent."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    with judging(JudgeServer()) as server:
        ask(server, "2")
        assert server.keys == ["Bearer none"]
        monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
        ask(server, "3", api_key_env="JUDGE_KEY")
        assert server.keys[1:] == ["Bearer sk-very-secret"]
    assert "secret" not in caplog.text
    assert "somebody" not in caplog.text
    assert all("sk-" not in path.read_text() for path in home.rglob("*.json"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"api_key_env": "NOT_SET"}, "env.args.rewards[0].judge.api_key_env: the environment variable NOT_SET is not set"),
        ({"base_url": "localhost:8000"}, "judge.base_url: write an address such as"),
        ({"base_url": "https://me:sk-secret@host/v1"}, "judge.base_url: no password or key belongs in an address"),
        ({"base_url": "https://host/v1?key=sk-secret"}, "judge.base_url: no password or key belongs in an address"),
        ({"pattern": "("}, "judge.pattern: no regular expression"),
        ({"pattern": "score"}, "judge.pattern: put the score in brackets"),
        ({"low": 5, "high": 5}, "low = 5 must be below high = 5"),
        ({"api_key": "sk-secret"}, "unknown key env.args.rewards[0].judge.api_key"),
        ({"rubric": [{"name": "a", "criterion": "x"}, {"name": "a", "criterion": "y"}]}, "two criteria have one name"),
        ({"rubric": [{"name": "a", "criterion": "x", "weight": 0}]}, "rubric[0].weight"),
    ],
)
def test_mistakes_are_one_line_and_hide_what_was_put_in(tmp_path: Path, spec: dict[str, Any], words: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(40)))
    with pytest.raises(ConfigError) as error:
        load_env("jsonl", {"data": str(data), "rewards": [{"judge": {"base_url": "http://h/v1", "model": "m", **spec}}]})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
