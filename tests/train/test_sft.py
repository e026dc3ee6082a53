"""Supervised fine-tuning: the loss falls, on answers alone, and an interrupted run goes on to the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from training_helpers import final_weights, open_session, run_session

from veneer.envs.calculator import CALCULATOR
from veneer.render import load_renderer
from veneer.train.config import RunConfig, make_config
from veneer.train.rows import batch_indices
from veneer.train.session import Interrupted
from veneer.train.sft import load_rows
from veneer.types import AttestationError, DataError

NANO = load_renderer("nano")
LINES = [json.dumps({"prompt": f"colour of {i}?", "completion": "blue" if i % 2 else "green"}) for i in range(24)]


def config_for(data: Path, **sft: Any) -> RunConfig:
    settings = {"data": str(data), "steps": 4, "batch_size": 5, "held_out": 0.2, **sft}
    return make_config(
        {"kind": "sft", "name": "small", "lora": {"rank": 2}, "sft": settings, "eval": {"every": 2}, "checkpoint_every": 100}
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def test_loss_falls(tmp_path: Path, data: Path) -> None:
    """On rows that were trained on and on rows that were not."""
    session = open_session(config_for(data, steps=16, batch_size=8, learning_rate=5e-3), tmp_path / "run")
    run_session(session)
    metrics = session.run.metrics()
    assert [m["step"] for m in metrics] == list(range(17))
    assert metrics[-1]["train_mean_nll"] < 0.5 * metrics[1]["train_mean_nll"]
    assert metrics[-1]["eval/mean_nll"] < 0.5 * metrics[0]["eval/mean_nll"]
    assert len({m["adapter/digest"] for m in metrics}) == 17


def test_first_loss_is_the_mean_over_answer_tokens(tmp_path: Path, data: Path) -> None:
    """The number in the log is what it says: nats per answer token of the base."""
    session = open_session(config_for(data, steps=1), tmp_path / "run")
    run_session(session)
    rows = [row for (row,) in load_rows(data, NANO, 0.2, 2048)[0]]
    batch = [rows[i] for i in batch_indices(len(rows), 5, 1, 0)]
    output = session.engine.forward(None, batch, "cross_entropy").result()
    by_hand = -sum(float(lp[d.mask == 1].sum()) for lp, d in zip(output.logprobs_D, batch, strict=True)) / sum(d.mask.sum() for d in batch)
    assert session.run.metrics()[1]["train_mean_nll"] == pytest.approx(by_hand, rel=1e-4)


def test_only_answers_have_weight(data: Path) -> None:
    """Training on questions is the classic mistake of SFT."""
    rows, held_out = load_rows(data, NANO, 0.2, 2048)
    answers = sorted(NANO.decode(d.targets[d.mask == 1]) for (d,) in rows + held_out)
    expected = [
        NANO.build_supervised_example([{"role": "user", "content": "?"}, {"role": "assistant", "content": c}])[1] for c in ("blue", "green")
    ]
    assert answers == sorted([NANO.decode(a) for a in expected] * 12)
    assert all("colour" not in a for a in answers)


def trained(path: Path, row: dict[str, Any], **how: Any) -> list[str]:
    """What is trained of a line, a text for each row of tokens."""
    path.write_text("\n\n" + json.dumps(row) + "\n\n")
    ((data,), held_out) = load_rows(path, NANO, 0.0, 2048, **how)
    assert held_out == []
    return [NANO.decode(d.targets[d.mask == 1]) for d in data]


CALL = {"name": "calculator", "arguments": {"expression": "2*3"}}
ASKED = {"role": "assistant", "content": "", "reasoning_content": "use the tool", "tool_calls": [CALL]}
WITH_A_TOOL = [{"role": "user", "content": "2*3=?"}, ASKED, {"role": "tool", "content": "6"}, {"role": "assistant", "content": "6"}]
SAID = "<think>\nuse the tool\n</think>\n\n<tool_call>\n" + json.dumps(CALL) + "\n</tool_call><|im_end|>"


def test_every_turn_with_tools_is_trained_in_one_row(tmp_path: Path) -> None:
    """Else the model learns to answer and not to call; and what the tool said is not to be learned."""
    found = trained(tmp_path / "rows.jsonl", {"messages": WITH_A_TOOL, "tools": [CALCULATOR]})
    assert found == [SAID + "<think>\n\n</think>\n\n6<|im_end|>"]
    last = trained(tmp_path / "rows.jsonl", {"messages": WITH_A_TOOL, "tools": [CALCULATOR]}, train_on="last_assistant_message")
    assert last == ["<think>\n\n</think>\n\n6<|im_end|>"]


def test_a_turn_that_the_template_shows_otherwise_later_has_a_row_of_its_own(tmp_path: Path) -> None:
    """Qwen3's template drops thinking before the newest question: each answer is trained as it is sampled, behind what is shown then."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    messages.append({"role": "assistant", "content": "d"})
    path = tmp_path / "rows.jsonl"
    empty = "<think>\n\n</think>\n\n"
    assert trained(path, {"messages": messages}) == [f"{empty}b<|im_end|>", f"{empty}d<|im_end|>"]
    ((data,), _) = load_rows(path, NANO, 0.0, 2048)
    for datum, history in zip(data, (messages[:1], messages[:3]), strict=True):
        prompt = NANO.build_generation_prompt(history)  # type: ignore[arg-type]
        assert datum.tokens[: len(prompt)].tolist() == prompt.tolist()
        assert not datum.mask[: len(prompt) - 1].any()
        assert datum.mask[len(prompt) - 1 :].all()
    assert trained(path, {"messages": messages}, train_on="last_assistant_message") == [f"{empty}d<|im_end|>"]
    assert trained(path, {"prompt": messages[:3], "completion": messages[3:]}) == [f"{empty}d<|im_end|>"]


def test_split_is_by_text(tmp_path: Path, data: Path) -> None:
    """Sorting or growing a file must not move a held-out row into training."""
    shuffled = tmp_path / "shuffled.jsonl"
    lines = [*LINES, *LINES, *[json.dumps({"prompt": f"new {i}", "completion": "x"}) for i in range(40)]]
    random.Random(0).shuffle(lines)
    shuffled.write_text("\n".join(lines))

    def texts(path: Path) -> tuple[set[str], set[str]]:
        kept, held = load_rows(path, NANO, 0.3, 2048)
        return {NANO.decode(d.tokens) for (d,) in kept}, {NANO.decode(d.tokens) for (d,) in held}

    train, held = texts(data)
    more_train, more_held = texts(shuffled)
    assert train
    assert held
    assert not more_train & more_held
    assert train <= more_train
    assert held <= more_held


def test_batches_cover_each_epoch_once() -> None:
    """Every row is seen once before any is seen twice, and each epoch in a new order."""
    drawn = [i for step in range(1, 13) for i in batch_indices(12, 5, step, seed=3)]
    epochs = [drawn[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert drawn[:12] != [i for step in range(1, 4) for i in batch_indices(12, 5, step, seed=4)][:12]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resume_in_mid_epoch_gives_the_same_bytes(tmp_path: Path, data: Path, stop_after: int) -> None:
    """An interruption must not change a result."""
    whole = open_session(config_for(data, steps=6), tmp_path / "whole")
    run_session(whole)
    first = open_session(config_for(data, steps=6), tmp_path / "cut")
    first.on_step = lambda metrics: first.stop.set() if metrics["step"] == stop_after else None
    with pytest.raises(Interrupted, match="the state is saved"):
        run_session(first)
    assert first.run.metrics()[-1]["step"] == stop_after
    second = open_session(config_for(data, steps=6), tmp_path / "cut")
    run_session(second)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert final_weights(second) == final_weights(whole)


def test_learning_rate_zero_is_caught(tmp_path: Path, data: Path) -> None:
    """A run that trains nothing fails at once."""
    with pytest.raises(AttestationError, match="learning rate is 0"):
        run_session(open_session(config_for(data, learning_rate=0.0), tmp_path / "run"))


@pytest.mark.parametrize(
    "bad",
    [
        "{not json",
        "[]",
        "3",
        '"text"',
        "null",
        "{}",
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": null}',
        '{"prompt": null, "completion": "a"}',
        '{"prompt": 3, "completion": "a"}',
        '{"messages": []}',
        '{"messages": "hello"}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}',
        '{"messages": ["a", {"role": "assistant", "content": "b"}]}',
        json.dumps({"prompt": "a" * 3000, "completion": "b"}),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: str) -> None:
    """Line 3 of a file of a million, in one line and not in a traceback."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES[0]}\n\n{bad}\n{LINES[1]}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: ") as caught:
        load_rows(path, NANO, 0.0, 2048)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    """Each is a mistake of the request."""
    with pytest.raises(DataError, match=r"sft\.data"):
        load_rows(tmp_path / "none.jsonl", NANO, 0.0, 2048)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        load_rows(empty, NANO, 0.0, 2048)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.jsonl"):
        load_rows(binary, NANO, 0.0, 2048)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_lines_end_at_newlines_alone(tmp_path: Path, separator: str) -> None:
    """JSON strings may hold Unicode's other line ends as they are; scraped text does."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": f"a{separator}b", "completion": "c"}, ensure_ascii=False) + "\n")
    (((row,),), _) = load_rows(path, NANO, 0.0, 2048)
    assert f"a{separator}b" in NANO.decode(row.tokens)
