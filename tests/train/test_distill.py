"""Distillation: the student comes nearer to its teacher by both ways, also to one that is told more or has another base."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import final_weights, open_session, run_session
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.assets import NANO_FOLDER
from veneer.cli.assemble import execute, load_teacher, start
from veneer.store.registry import Registry
from veneer.train.config import RunConfig, make_config
from veneer.train.distill import Teacher, distances, seen_with, with_gaps
from veneer.train.rollouts import Policy, do_rollout, with_system
from veneer.train.session import Interrupted, Session
from veneer.types import AdapterError, AttestationError, Checkpoint, ConfigError, Datum, SamplingParams, Trajectory


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"sort {i * 7919 % 100000:05}"}) + "\n" for i in range(60)))
    return path


def config_for(questions: Path | str = "", **distill: Any) -> RunConfig:
    settings = {"data": str(questions), "steps": 4, "groups_per_batch": 4, "group_size": 2, "max_tokens": 12, "held_out": 0.3, **distill}
    tree = {"kind": "distill", "name": "small", "lora": {"rank": 4}, "env": {"name": "sort"}, "distill": settings}
    return make_config(tree | {"eval": {"every": 100, "problems": 16}, "checkpoint_every": 100})


@pytest.fixture(scope="module")
def wise(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An adapter that takes the smallest digit away until none is left, which the base does now and then."""
    folder = tmp_path_factory.mktemp("wise")
    rows = []
    for i in range(48):
        digits = f"{i * 104729 % 100000:05}"
        ordered = sorted(digits)
        lines, left = [], digits
        for digit in ordered:
            left = left.replace(digit, "", 1)
            lines.append(f"{digit}:{left}")
        answer = {"role": "assistant", "reasoning_content": "\n".join(lines), "content": "".join(ordered)}
        rows.append({"prompt": [{"role": "user", "content": f"sort {digits}"}], "completion": [answer]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {"data": str(folder / "rows.jsonl"), "steps": 16, "batch_size": 8, "learning_rate": 2e-3}
    session = open_session(make_config({"kind": "sft", "name": "wise", "sft": sft}), folder / "run")
    run_session(session)
    return session.engine.save_state("wise", "sampler").result()


def with_teacher(session: Session, wise: Checkpoint, prompt: str = "") -> Teacher:
    """On the student's engine."""
    session.engine.load_state("(teacher)", wise).result()
    return Teacher(session.engine, "(teacher)", wise.adapter.digest, prompt)


WAYS = {"on": {}, "off": {"on_policy": False}, "soft": {"on_policy": False, "top_k": 8}}


@pytest.mark.parametrize("way", WAYS)
def test_the_student_comes_nearer(tmp_path: Path, questions: Path, wise: Checkpoint, way: str) -> None:
    """Measured the same whatever the way: the reverse KL on questions that were never trained on."""
    config = config_for(questions, steps=16, groups_per_batch=8, learning_rate=2e-3, **WAYS[way])
    session = open_session(config, tmp_path / "run")
    summary = run_session(session, with_teacher(session, wise))
    before, after = summary["kl_before"], summary["kl_after"]
    assert after["high"] < before["low"]
    metrics = session.run.metrics()
    assert "eval/solved" not in metrics[0], "a file's questions earn nothing"
    assert "reward/total" not in metrics[1]
    assert "env" not in summary
    kl = [m["kl/student_teacher" if way == "on" else "kl/teacher_student"] for m in metrics[1:]]
    assert sum(kl[-3:]) < 0.7 * sum(kl[:3])
    assert summary["episodes"] == 16 * 16
    trained = [m["tokens"] for m in metrics[1:]]
    assert all(16 <= tokens <= 16 * (m["tokens/mean"] + 1) for tokens, m in zip(trained, metrics[1:], strict=True))
    if way == "on":
        assert "bits" not in summary
    else:
        assert summary["bits"] == pytest.approx(sum(map(operator.mul, kl, trained)) / math.log(2))
        assert summary["saturation"] == pytest.approx(summary["bits"] / session.trainable)


def test_an_environment_is_scored_and_never_trained_on(tmp_path: Path, wise: Checkpoint) -> None:
    """The score tells whether the teacher's skill arrived; the teacher's own stands beside it."""
    session = open_session(config_for(steps=1), tmp_path / "run")
    summary = run_session(session, with_teacher(session, wise))
    assert (summary["env"], session.facts()["env"]) == ("sort", "sort")
    assert {"reward_before", "reward_after", "reward_teacher", "kl_before", "kl_after"} <= set(summary)
    assert "reward/total" in session.run.metrics()[1]


# ---------------------------------------------------------------- two readers


def play(session: Session, index: int = 0, system: str = "", env: str = "sort") -> Trajectory:
    from veneer.envs import load_env

    policy = Policy(session.engine, session.renderer, None, SamplingParams(max_tokens=40), system=system)
    return asyncio.run(do_rollout(policy, load_env(env), "train", index, seed=index))


def test_a_teacher_that_is_told_more_reads_the_same_answers_behind_another_beginning(tmp_path: Path, questions: Path) -> None:
    """Prompt distillation is nothing else; shifted by one token it would train noise."""
    session = open_session(config_for(questions), tmp_path / "run")
    teacher = Teacher(session.engine, None, None, "be terse")
    episode = play(session, env="calculator")
    (turn, *_) = episode.transitions
    assert episode.observation is not None
    told = session.renderer.build_generation_prompt(with_system("be terse", episode.observation.messages), episode.observation.tools)
    seen = seen_with(episode, session.renderer, "be terse")
    assert seen.transitions[0].prompt.tolist() == told.tolist()
    assert "be terse" in session.renderer.decode(told)
    assert seen_with(seen, session.renderer, "").transitions[0].prompt.tolist() == turn.prompt.tolist()
    gaps = np.concatenate(asyncio.run(distances(session.renderer, teacher, [episode])))
    wanted = []
    for own, other in zip(episode.transitions, seen.transitions, strict=True):
        row = np.concatenate([other.prompt, own.sample.tokens])
        (scored,) = session.engine.sample(row, None, SamplingParams(max_tokens=0), prompt_logprobs=True).result()
        assert scored.prompt_logprobs is not None
        wanted.append(own.sample.logprobs - scored.prompt_logprobs[len(other.prompt) :])
    np.testing.assert_allclose(gaps, np.concatenate(wanted), atol=2e-5)
    assert np.abs(gaps).max() > 0.01
    session.run.close()


def test_several_turns_are_read_behind_another_beginning_too(tmp_path: Path, questions: Path) -> None:
    """History stays token for token what it was."""
    session = open_session(config_for(questions), tmp_path / "run")
    episode = next(e for e in (play(session, i, env="calculator") for i in range(40)) if len(e.transitions) > 1)
    seen = seen_with(episode, session.renderer, "be terse")
    more = len(seen.transitions[0].prompt) - len(episode.transitions[0].prompt)
    assert more > 0
    for own, other in zip(episode.transitions, seen.transitions, strict=True):
        assert len(other.prompt) == len(own.prompt) + more
        assert other.prompt[more + 40 :].tolist() == own.prompt[40:].tolist()
        assert other.sample is own.sample
    session.run.close()


def test_a_system_message_joins_one_that_is_there() -> None:
    """Templates refuse a second one, or show it where nobody was trained to read it."""
    user = {"role": "user", "content": "a"}
    assert with_system("", [user]) == [user]  # type: ignore[list-item]
    assert with_system("x", [user]) == [{"role": "system", "content": "x"}, user]  # type: ignore[list-item]
    assert with_system("x", [{"role": "system", "content": "y"}]) == [{"role": "system", "content": "x\n\ny"}]


def test_advantages_are_minus_the_gap_on_what_was_sampled() -> None:
    """By hand; what the environment said has none."""
    i, zeros = np.arange(4), np.zeros(4, np.float32)
    datum = Datum(i, i, zeros, zeros, np.array([0, 1, 0, 1], np.float32))
    judged = with_gaps(datum, np.array([0.5, -2.0], np.float32), 0.1)
    np.testing.assert_allclose(judged.advantages, [0, -0.05, 0, 0.2])


# ---------------------------------------------------------------- going on, and what is refused


@pytest.mark.parametrize("way", WAYS)
def test_resume_gives_the_same_bytes(tmp_path: Path, questions: Path, wise: Checkpoint, way: str) -> None:
    """An interruption must not change a result."""
    config = config_for(questions, **WAYS[way])
    whole = open_session(config, tmp_path / "whole")
    run_session(whole, with_teacher(whole, wise, "be terse"))
    first = open_session(config, tmp_path / "cut")
    first.on_step = lambda metrics: first.stop.set() if metrics["step"] == 2 else None
    with pytest.raises(Interrupted, match="the state is saved"):
        run_session(first, with_teacher(first, wise, "be terse"))
    second = open_session(config, tmp_path / "cut")
    run_session(second, with_teacher(second, wise, "be terse"))
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert final_weights(second) == final_weights(whole)


def test_a_teacher_like_the_student_teaches_nothing_and_is_caught(tmp_path: Path, questions: Path, wise: Checkpoint) -> None:
    """A run that trains nothing fails at once."""
    session = open_session(config_for(questions, learning_rate=0.0), tmp_path / "run")
    with pytest.raises(AttestationError, match="learning rate is 0"):
        run_session(session, with_teacher(session, wise))


def test_samples_of_another_teacher_are_caught(tmp_path: Path, questions: Path, wise: Checkpoint) -> None:
    """A sampler that lost the teacher's adapter would distill the base into itself."""
    session = open_session(config_for(questions, on_policy=False), tmp_path / "run")
    teacher = dataclasses.replace(with_teacher(session, wise), adapter=None)
    with pytest.raises(AttestationError, match="comes from the base alone"):
        run_session(session, teacher)


def second_base(folder: Path) -> Path:
    """Another model with nano's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(NANO_FOLDER)
    model.model.norm.weight.data.mul_(0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO_FOLDER).save_pretrained(folder)
    return folder


def test_another_base_teaches(tmp_path: Path, questions: Path) -> None:
    """A larger model of the same family; the student's own base stays the student's."""
    other = second_base(tmp_path / "other")
    config = config_for(questions, steps=2, teacher_base=str(other))
    summary, machine, run = execute(config, lambda metrics: None)
    assert summary["kl_before"]["low"] > 0  # a flatter distribution
    machine_digest = machine.engine.base_digest
    assert summary["base_digest_after"] == machine_digest
    teacher, parents = load_teacher(config, machine)
    assert teacher.engine is not machine.engine
    assert teacher.engine.base_digest != machine_digest
    assert parents == ()
    assert len(run.metrics()) == 3


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path, questions: Path) -> None:
    """Token 17 would mean one thing to the one and something else to the other."""
    other = second_base(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] += "!"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"distill\.teacher_base: .* has another tokenizer") as caught:
        execute(config_for(questions, teacher_base=str(other)), lambda metrics: None)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_is_nobody_is_refused(questions: Path) -> None:
    """Before anything is loaded twice or sampled."""
    with pytest.raises(ConfigError, match="the teacher would be the student"):
        load_teacher(config_for(questions), start("nano", 1))
    with pytest.raises(AdapterError, match="nobody"):
        load_teacher(config_for(questions, teacher="nobody"), start("nano", 1))


def test_the_student_knows_what_its_teacher_knew(tmp_path: Path, questions: Path, wise: Checkpoint) -> None:
    """Whoever must forget the teacher has to find its students: the lineage names it."""
    machine = start("nano", 1)
    session = Session(machine.engine, machine.renderer, config_for(questions), open_session(config_for(questions), tmp_path / "x").run)
    version = Registry().put("wise", wise, session.facts())
    summary, _, _ = execute(config_for(questions, steps=1, teacher="wise"), lambda metrics: None, machine)
    entry = Registry().resolve(summary["adapter"])
    assert [(p.reference, p.digest) for p in entry.parents] == [(f"wise@{version}", wise.adapter.digest)]
    assert [a.reference for a in Registry().lineage(summary["adapter"])] == [summary["adapter"], "wise@1", "nano"]
    config = (Path(summary["run_folder"]) / "config.toml").read_text()
    assert 'teacher = "wise@1"' in config, "the resolved copy goes on meaning the same teacher"
