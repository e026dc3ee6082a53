"""Tokens to text: what a stream shows must be what others get whole, and never what has to be taken back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.render import load_renderer
from veneer.render.reading import Reader
from veneer.server.openai.writing import ChatWriter, TextWriter, chat_logprobs, text_logprobs
from veneer.types import Piece, TopLogprobs

NANO = load_renderer("nano")
VOCABULARY = NANO.vocabulary
END = int(NANO.encode("<|im_end|>")[0])
ORDINARY = [token for token in range(328) if token not in VOCABULARY.special]
TOKENS = st.lists(st.one_of(st.sampled_from(ORDINARY), st.sampled_from(NANO.encode("aab abba").tolist())), max_size=30)
STOPS = st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3)


def drawn(tokens: list[int], stops: list[str], closed: bool) -> tuple[list[int], str]:
    """As far as the engine would have drawn, and why it ended: a stop text counts when a token completes it."""
    for end in range(1, len(tokens) + 1):
        if any(stop in NANO.decode(np.array(tokens[:end])) for stop in stops):
            return tokens[:end], "stop"
    return ([*tokens, END], "stop") if closed else (tokens, "length")


def expected(tokens: list[int], stops: list[str], reason: str) -> str:
    text = NANO.decode(np.array([t for t in tokens if t != END], np.int64))
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if reason == "stop" and places else text


@settings(max_examples=400, deadline=None)
@given(TOKENS, STOPS, st.booleans(), st.data())
def test_a_stream_joined_is_the_answer(tokens: list[int], stops: list[str], closed: bool, data: st.DataObject) -> None:
    """Wherever the engine's steps cut, with stop texts across tokens, half characters and bytes that are none."""
    tokens, reason = drawn(tokens, stops, closed)
    cuts = sorted(data.draw(st.lists(st.integers(0, max(len(tokens) - 1, 0)), max_size=6)))
    edges = list(zip([0, *cuts], [*cuts, len(tokens)], strict=True))
    writer, shown = TextWriter(VOCABULARY, stops), list[str]()
    wanted = expected(tokens, stops, reason)
    for i, (start, end) in enumerate(edges):
        last = i == len(edges) - 1
        shown.append(writer.feed(Piece(0, tokens[start:end], [0.0] * (end - start), None, reason if last else None)))  # type: ignore[arg-type]
        assert wanted.startswith("".join(shown)), "it showed what it would have to take back"
    assert "".join(shown) == wanted
    assert len(writer.offsets) == len(tokens)


def feed(text: str, stops: list[str], reason: str | None, tokens: list[int] | None = None) -> str:
    ids = NANO.encode(text).tolist() if tokens is None else tokens
    return TextWriter(VOCABULARY, stops).feed(Piece(0, ids, [0.0] * len(ids), None, reason))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "stops", "reason", "wanted"),
    [
        ("12<|im_end|>", [], "stop", "12"),
        ("12<|im_end|>", ["|>"], "stop", "12"),
        ("1 2 3", ["3"], "stop", "1 2 "),
        ("1 2 3", [" 2 3", "3"], "stop", "1"),
        ("ab", ["abc"], "length", "ab"),
        ("ab", ["abc"], None, ""),
        ("xab", ["abc"], None, "x"),
        ("ab<|im_end|>", ["abc"], "stop", "ab"),
        ("a<|im_start|>b", [], "length", "a<|im_start|>b"),
    ],
)
def test_ends(text: str, stops: list[str], reason: str | None, wanted: str) -> None:
    """The end of a turn is not shown, a stop text is not part of the answer, and its beginning alone is."""
    assert feed(text, stops, reason) == wanted


def test_half_a_character_at_the_end_is_shown_as_unreadable() -> None:
    """The tokens ran out in the middle of an emoji."""
    tokens = NANO.encode("a😀").tolist()
    assert feed("", [], None, tokens[:-1]) == "a"
    assert feed("", [], "length", tokens[:-1]) == "a\ufffd"


def test_offsets_count_characters() -> None:
    """The legacy form of log-probabilities says where each token begins in the text."""
    tokens = NANO.encode("é1😀2").tolist()
    writer = TextWriter(VOCABULARY, [], 10)
    writer.feed(Piece(0, tokens, [0.0] * len(tokens), None, "length"))
    whole = [len(b"".join(map(VOCABULARY.bytes_of, tokens[:i])).decode(errors="ignore")) + 10 for i in range(len(tokens))]
    assert writer.offsets == whole


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_a_message_in_pieces(size: int) -> None:
    """Thinking, content and a call, token by token or at once."""
    tokens = NANO.encode(f"<think>\nhm\n</think>\n\nlet me see\n{CALL}<|im_end|>").tolist()
    writer = ChatWriter(TextWriter(VOCABULARY, []), Reader(thinking=False, calls=True))
    deltas = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        piece = Piece(0, part, [0.0] * len(part), None, "stop" if start + size >= len(tokens) else None)
        deltas += writer.feed(piece)
    assert "".join(delta.reasoning_content or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "let me see"
    assert [(call.function.name, call.function.arguments) for call in writer.calls] == [("add", '{"a": "é"}')]
    assert writer.finish_reason(piece) == "tool_calls"
    assert deltas[-1].tool_calls == writer.calls


def test_log_probabilities_in_both_forms() -> None:
    """One for each token, with what was likeliest; a place with fewer likely tokens than asked for shows those there are."""
    first, second = NANO.encode("😀").tolist()[:2]
    top = TopLogprobs(np.array([[second, first], [first, 0]]), np.array([[-0.5, -1.0], [0.0, -np.inf]], np.float32))
    piece = Piece(0, [first, first], [-1.0, 0.0], top)
    chat = chat_logprobs(VOCABULARY, piece)
    assert [len(entry.top_logprobs) for entry in chat] == [2, 1]
    assert bytes(chat[0].bytes) == "😀".encode()[:1]
    assert chat[0].token == "bytes:\\xf0"
    text = text_logprobs(VOCABULARY, Piece(0, [first, first], [float("nan"), -1.0], top), [0, 0])
    assert text.token_logprobs == [None, -1.0]
    assert text.top_logprobs is not None
    assert text.top_logprobs[0] is None
    assert text.top_logprobs[1] == {"bytes:\\xf0": -1.0}
