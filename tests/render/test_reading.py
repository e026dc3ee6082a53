"""Answers taken apart while they arrive: a stream must tell what the whole text tells."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.render import load_renderer
from veneer.render.reading import Part, Reader

NANO = load_renderer("nano")
CALLS = ['{"name": "add", "arguments": {"a": 1}}', ' \n{"name": "x", "arguments": {}}\n', "not json", '{"name": 3}', "[" * 9]
ONE = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "\n\n", "<", "</", "<tool", "a", " b", "é"]
TEXTS = st.lists(st.sampled_from([*MARKS, *(f"<tool_call>{call}</tool_call>" for call in CALLS)]), max_size=12).map("".join)


def joined(parts: list[Part]) -> tuple[str, str, list]:
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts), [p.call for p in parts if p.call is not None]


def whole(text: str, thinking: bool, calls: bool) -> tuple[str, str, list]:
    return joined(Reader(thinking=thinking, calls=calls).feed(text, last=True))


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.booleans(), st.booleans(), st.data())
def test_pieces_do_not_matter(text: str, thinking: bool, calls: bool, data: st.DataObject) -> None:
    """A client that streams must see what another one gets at once, wherever the network cuts."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, parts = Reader(thinking=thinking, calls=calls), list[Part]()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += reader.feed(text[start:end])
    parts += reader.feed("", last=True)
    assert joined(parts) == whole(text, thinking, calls)
    assert all((bool(p.reasoning), bool(p.content), p.call is not None).count(True) == 1 for p in parts)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.booleans())
def test_nothing_is_made_up(text: str, thinking: bool) -> None:
    """What is told stands in the text, in its order; where there is nothing to take apart, all of it."""
    reasoning, content, _ = whole(text, thinking, True)
    rest = iter(text)
    assert all(character in rest for character in reasoning + content)
    if not thinking and not text.startswith("<think>"):
        assert whole(text, False, False) == ("", text, [])


@settings(max_examples=200, deadline=None)
@given(
    st.none() | st.sampled_from(["", "hm", "2+2\n\n=4", "a < b"]),
    st.sampled_from(["", "x", "see\nthis", "é€"]),
    st.lists(st.sampled_from([{"name": "add", "arguments": {"a": 1}}, {"name": "é", "arguments": {"s": "</think> \n"}}]), max_size=3),
)
def test_what_the_template_writes_is_read_back(thinking: str | None, content: str, calls: list[dict]) -> None:
    """The template's own form of a message, taken apart, is that message."""
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    if thinking is not None:
        message["reasoning_content"] = thinking
    _, answer = NANO.build_supervised_example([{"role": "user", "content": "?"}, message])
    reasoning, told, called = whole(NANO.decode(answer[:-1]), False, True)
    assert (reasoning, told.rstrip("\n"), called) == ((thinking or "").strip("\n"), content, calls)


@pytest.mark.parametrize(
    ("text", "thinking", "calls", "expected"),
    [
        ("hm</think>\n\n3", True, False, ("hm", "3", [])),
        ("hm</think>\n\n3", False, False, ("", "hm</think>\n\n3", [])),
        ("<think>\nhm", False, False, ("hm", "", [])),
        (
            '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            False,
            False,
            ("", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', []),
        ),
        (f"a\n{ONE}\n", False, True, ("", "a", [{"name": "f", "arguments": {}}])),
        ('<tool_call>no</tool_call><tool_call>{"name"', False, True, ("", '<tool_call>no</tool_call><tool_call>{"name"', [])),
        ("a\n\n", False, True, ("", "a\n\n", [])),
        ("<thi", False, False, ("", "<thi", [])),
    ],
)
def test_the_edges(text: str, thinking: bool, calls: bool, expected: tuple) -> None:
    """Each is a state in which a real answer has ended."""
    assert whole(text, thinking, calls) == expected


def test_a_call_that_is_nested_too_deeply_stays_text() -> None:
    """Ten thousand brackets end no stream."""
    body = json.dumps({"name": "f", "arguments": {}})[:-2] + '"a": ' + "[" * 100_000
    text = f"<tool_call>{body}</tool_call>"
    assert whole(text, False, True) == ("", text, [])


def test_a_template_that_opens_the_thought() -> None:
    """Then the answer goes on inside of it, and its first words are no content."""
    assert not NANO.opens_thinking(NANO.build_generation_prompt([{"role": "user", "content": "<think>"}]))
    assert NANO.opens_thinking(NANO.encode("<|im_start|>assistant\n<think>\n"))
    assert not NANO.opens_thinking(NANO.build_generation_prompt([{"role": "user", "content": "?"}], (), {"enable_thinking": False}))


def test_options_of_the_template() -> None:
    """One that the template does not read would be ignored without a word."""
    closed = NANO.build_generation_prompt([{"role": "user", "content": "?"}], (), {"enable_thinking": False})
    assert NANO.decode(closed).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert NANO.turn_start([{"role": "user", "content": "?"}], (), {"enable_thinking": False}) == len(
        NANO.encode("<|im_start|>user\n?<|im_end|>\n")
    )
    assert "enable_thinking" in NANO.template_options
    for name in ("messages", "chat_template", "tokenize", "effort"):
        with pytest.raises(Exception, match=f"no option '{name}'"):
            NANO.build_generation_prompt([{"role": "user", "content": "?"}], (), {name: "x"})


def test_text_that_is_no_unicode() -> None:
    """JSON can spell half a surrogate pair; no tokenizer can read it."""
    with pytest.raises(Exception, match="no Unicode"):
        NANO.build_generation_prompt([{"role": "user", "content": "\ud800"}])
    assert np.array_equal(NANO.encode("a", framed=True), NANO.encode("a"))
