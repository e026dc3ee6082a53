"""Dataset files in TRL's columns: what is prompt, what is answer, and what is said of a line that is wrong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.envs.calculator import CALCULATOR
from veneer.render import load_renderer
from veneer.train.dpo import load_pairs
from veneer.train.questions import load_questions
from veneer.train.rows import answer_data, conversation, preference, question
from veneer.types import DataError

NANO = load_renderer("nano")


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


A, B, C = says("user", "a"), says("assistant", "b"), says("assistant", "c")


def test_text_and_messages_are_the_same_row() -> None:
    """TRL's two types of each format."""
    assert conversation({"prompt": "a", "completion": "b"}) == conversation({"prompt": [A], "completion": [B]})
    assert conversation({"prompt": [A], "completion": [B]}).given == 1
    assert conversation({"messages": [A, B]}).given == 0
    assert preference({"prompt": "a", "chosen": "b", "rejected": "c"}) == preference({"prompt": [A], "chosen": [B], "rejected": [C]})


def test_an_implicit_prompt_is_what_both_begin_with() -> None:
    """TRL's datasets with whole conversations on both sides (``extract_prompt``)."""
    explicit = preference({"prompt": [A], "chosen": [B], "rejected": [C]})
    assert preference({"chosen": [A, B], "rejected": [A, C]}) == explicit
    longer = preference({"chosen": [A, B, A, C], "rejected": [A, B, A, B]})
    assert [talk.given for talk in longer] == [3, 3]
    text = preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})[0]
    assert [m["content"] for m in text.messages] == ["The sky is", " blue."]
    same = preference({"chosen": [A, B], "rejected": [A, B]})
    assert same[0] == same[1]
    assert same[0].given == 1


@pytest.mark.parametrize("arguments", [{"expression": "1+1"}, '{"expression": "1+1"}'])
def test_calls_in_openais_form(arguments: object) -> None:
    """Most tool datasets have ``function`` around a call, arguments as JSON text, and no content; Datasets fills in nulls."""
    call = {"type": "function", "id": "x", "function": {"name": "calculator", "arguments": arguments}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    row = {"messages": [A, asked, says("tool", "2"), B], "tools": json.dumps([CALCULATOR])}
    talk = conversation(row)
    assert talk.tools == [CALCULATOR]
    assert talk.messages[1] == says("assistant", "", tool_calls=[{"name": "calculator", "arguments": {"expression": "1+1"}}])
    data = answer_data(talk, NANO, 2048)
    texts = [NANO.decode(d.targets[d.mask == 1]) for d in data]
    assert '{"name": "calculator", "arguments": {"expression": "1+1"}}' in "".join(texts)
    assert "<tool_response>" not in "".join(texts)


def test_a_completion_of_several_turns_is_trained_and_its_prompt_is_not() -> None:
    """An agent's trajectory behind a prompt that has answers of its own."""
    talk = conversation({"prompt": [A, B, A], "completion": [C, A, C]})
    texts = [NANO.decode(d.targets[d.mask == 1]) for d in answer_data(talk, NANO, 2048)]
    assert "".join(texts).count("c<|im_end|>") == 2
    assert "b" not in "".join(texts).replace("<think>", "")


def test_questions_end_where_an_answer_would_begin() -> None:
    """A file of conversations is a file of questions too."""
    assert question({"prompt": "a", "completion": "x"}).messages == [A]
    assert question({"messages": [A, B]}).messages == [A]
    assert question({"messages": [A, B, A]}).messages == [A, B, A]


def test_questions_are_all_asked_before_any_is_asked_twice(tmp_path: Path) -> None:
    """As SFT's rows are; and held-out ones are never trained on."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(40)))
    questions = load_questions(path, 0.2)
    size = len(questions.train)
    assert 0 < len(questions.held_out) == 40 - size
    epochs = [[questions.env("train", e * size + i).asked.messages[0]["content"] for i in range(size)] for e in (0, 1, 2**40)]  # type: ignore[attr-defined]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert not set(epochs[0]) & {talk.messages[0]["content"] for talk in questions.held_out}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "a", "chosen": "b"}', "rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "neither text nor"),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', "neither text nor"),
        ('{"chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}', "both be text or both lists"),
        ('{"chosen": "b", "rejected": "c"}', "no common beginning"),
        ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]}', "assistant's"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "tools": "calc"}', "line 3"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "tools": [3]}', "tools must be"),
        ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "tool_calls": [{"name": "x"}]}]}', "arguments"),
        (json.dumps({"prompt": "a", "chosen": "b", "rejected": "c" * 3000}), "context is 2048"),
        ("[" * 100_000, "line 3"),
        ('"prompt"', "line 3"),
    ],
)
def test_a_wrong_pair_is_named_by_its_line(tmp_path: Path, bad: str, words: str) -> None:
    """Line 3 of a million, in one line and not in a traceback."""
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 3: ") as caught:
        load_pairs(path, NANO, 0.0, 2048)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


KEYS = st.sampled_from(
    ["messages", "prompt", "completion", "chosen", "rejected", "tools", "role", "content", "tool_calls", "function", "name"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(row=JSON)
def test_no_line_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    """Whatever JSON a line holds: a row, or one line that names it."""
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for load in (lambda: load_pairs(path, NANO, 0.0, 2048), lambda: load_questions(path, 0.0)):
        said = f"{path}, line 1: "
        with contextlib.suppress(DataError):
            try:
                load()
            except DataError as error:
                said = str(error)
                raise
        assert "line 1: " in said
        assert "\n" not in said
