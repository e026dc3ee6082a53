"""Messages to tokens and back: what is sampled and trained must be the template's own tokens."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.assets import NANO_FOLDER
from veneer.envs.calculator import CALCULATOR
from veneer.render import Renderer, load_renderer
from veneer.types import BaseError, DataError, Message

NANO = load_renderer("nano")
END = "<|im_end|>"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "<|object_ref_start|>", "<|vision_pad|>", "<|fim_prefix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),
)
USER: Message = {"role": "user", "content": "12*34=?"}
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12*34"}}\n</tool_call>'
CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "12*34"}}]}
CONVERSATIONS: list[list[Message]] = [
    [USER],
    [{"role": "system", "content": "Be terse."}, USER],
    [USER, {"role": "assistant", "content": "408"}, {"role": "user", "content": "and 2+2?"}],
    [USER, {"role": "assistant", "content": "408", "reasoning_content": "12*34=408"}, {"role": "user", "content": "sure?"}],
    [USER, CALLING, {"role": "tool", "content": "408"}],
    [USER, CALLING, {"role": "tool", "content": "408"}, {"role": "tool", "content": "error"}],
    [{"role": "user", "content": "héllo \U0001f600 <|im_end|>\n\n <think> \u0000 é 汉字"}],
    [{"role": "user", "content": ""}],
]


@pytest.mark.parametrize("tools", [(), (CALCULATOR,), (CALCULATOR, CALCULATOR)])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_generation_prompt_is_the_tokenizers_own(messages: list[Message], tools: tuple) -> None:
    """A prompt that differs by one token from what the base was trained on costs accuracy silently."""
    ours = NANO.build_generation_prompt(messages, tools)
    raw = [dict(m) for m in messages]
    theirs = NANO.tokenizer.apply_chat_template(
        raw, tools=list(tools) or None, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ours.dtype == np.int64
    assert ours.tolist() == list(theirs)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL), st.sampled_from(["<|im_", "end|>", "<think", "</", ">"]))))
def test_any_text_round_trips(parts: list[str]) -> None:
    """Text that comes back changed breaks stop texts, graders and the report."""
    text = "".join(parts)
    tokens = NANO.encode(text)
    assert NANO.decode(tokens).encode() == text.encode()
    assert all(0 <= t < NANO.tokenizer.vocab_size + len(NANO.tokenizer.get_added_vocab()) for t in tokens.tolist())


def test_nano_tokenizer_is_small_and_has_qwen3s_tokens() -> None:
    """Thinking and tools rest on tokens of their own; arithmetic rests on one token a digit."""
    assert len(NANO.tokenizer) < 512
    ids = [NANO.encode(token).tolist() for token in SPECIAL]
    assert all(len(i) == 1 for i in ids)
    assert len({i[0] for i in ids}) == len(SPECIAL)
    digits = NANO.encode("0123456789").tolist()
    assert len(digits) == 10
    assert [NANO.decode(np.array([t])) for t in digits] == list("0123456789")
    assert NANO.encode("7777777777").tolist() == [digits[7]] * 10


def test_nano_is_a_plain_hugging_face_folder() -> None:
    """The bundled base must open with stock transformers and stay small enough for the wheel."""
    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(NANO_FOLDER)
    ids = tokenizer("sort 312", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape[-1] >= len(tokenizer)
    assert torch.isfinite(logits).all()
    assert model.config.model_type == "qwen3"
    assert sum(p.stat().st_size for p in NANO_FOLDER.iterdir()) < 10_000_000


@pytest.mark.parametrize("answer", [CALL, f"<think>\nuse the tool\n</think>\n\n{CALL}", "plain text"])
@pytest.mark.parametrize("tools", [(), (CALCULATOR,)])
@pytest.mark.parametrize("stopped_by_text", [False, True])
def test_extend_keeps_every_token_and_the_templates_text(answer: str, tools: tuple, stopped_by_text: bool) -> None:
    """A turn that is tokenised again would be trained with log-probabilities of other tokens."""
    prompt = NANO.build_generation_prompt([USER], tools)
    sampled = NANO.encode(answer + ("" if stopped_by_text else END))
    results: list[Message] = [{"role": "tool", "content": "408"}, {"role": "tool", "content": "error"}]
    extended = NANO.extend(prompt, sampled, results)
    before = np.concatenate([prompt, sampled])
    assert np.array_equal(extended[: len(before)], before)
    action = NANO.parse_response(NANO.encode(answer), stopped=False)
    whole = NANO.tokenizer.apply_chat_template(
        [dict(m) for m in [USER, action, *results]], tools=list(tools) or None, tokenize=False, add_generation_prompt=True
    )
    assert NANO.decode(extended) == whole


def test_extend_keeps_tokens_that_text_would_merge_otherwise() -> None:
    """The model may spell a text in tokens that the tokenizer would not choose; they must survive."""
    prompt = NANO.build_generation_prompt([USER])
    odd = np.array([NANO.encode(c)[0] for c in "<think>x"] + NANO.encode(END).tolist())
    assert odd.tolist() != NANO.encode("<think>x" + END).tolist()
    extended = NANO.extend(prompt, odd, [{"role": "user", "content": "go on"}])
    assert extended[len(prompt) : len(prompt) + len(odd)].tolist() == odd.tolist()


def test_extend_twice_is_the_text_of_three_turns() -> None:
    """Errors of one turn add up over a long episode."""
    prompt = NANO.build_generation_prompt([USER])
    first = NANO.extend(prompt, NANO.encode("a" + END), [{"role": "user", "content": "b"}])
    second = NANO.extend(first, NANO.encode("c" + END), [{"role": "user", "content": "d"}])
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    turns = [("user", "12*34=?"), ("assistant", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    assert NANO.decode(second) == "".join(turn.format(*t) for t in turns) + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "stopped", "expected"),
    [
        ("21345<|im_end|>", True, {"content": "21345"}),
        ("21345", False, {"content": "21345"}),
        ("<think>\n1+2=3\n</think>\n\n3<|im_end|>", True, {"content": "3", "reasoning_content": "1+2=3"}),
        ("<think>\n\n</think>\n\n3<|im_end|>", True, {"content": "3", "reasoning_content": ""}),
        ("<think>\n1+2=3 1+2=3", False, {"content": "", "reasoning_content": "1+2=3 1+2=3"}),
        ("late</think>\n\n3<|im_end|>", True, {"content": "3", "reasoning_content": "late"}),
        ("", False, {"content": ""}),
        (
            f"{CALL}<|im_end|>",
            True,
            {"content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "12*34"}}]},
        ),
        (
            f"<think>\nhm\n</think>\n\nsee {CALL}\n{CALL}<|im_end|>",
            True,
            {
                "content": "see ",
                "reasoning_content": "hm",
                "tool_calls": [{"name": "calculator", "arguments": {"expression": "12*34"}}] * 2,
            },
        ),
        (
            '<tool_call>\n{"name": "calculator", "arguments": {\n</tool_call><|im_end|>',
            True,
            {
                "content": '<tool_call>\n{"name": "calculator", "arguments": {\n</tool_call>',
                "invalid_tool_calls": ['<tool_call>\n{"name": "calculator", "arguments": {\n</tool_call>'],
            },
        ),
        (
            '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
            False,
            {
                "content": '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
                "invalid_tool_calls": ['<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>'],
            },
        ),
        (
            '<tool_call>\n{"name": "x", "arguments": "y"}\n</tool_call>',
            False,
            {
                "content": '<tool_call>\n{"name": "x", "arguments": "y"}\n</tool_call>',
                "invalid_tool_calls": ['<tool_call>\n{"name": "x", "arguments": "y"}\n</tool_call>'],
            },
        ),
        (
            "<tool_call>\n[1]\n</tool_call>",
            False,
            {"content": "<tool_call>\n[1]\n</tool_call>", "invalid_tool_calls": ["<tool_call>\n[1]\n</tool_call>"]},
        ),
        ('<tool_call>\n{"name": "x"', False, {"content": '<tool_call>\n{"name": "x"', "invalid_tool_calls": ['<tool_call>\n{"name": "x"']}),
    ],
)
def test_parse_response(text: str, stopped: bool, expected: dict) -> None:
    """Graders see this message; a lost thought or an invented tool call changes rewards."""
    assert NANO.parse_response(NANO.encode(text), stopped) == {"role": "assistant", **expected}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(NANO.tokenizer) - 1), max_size=30), st.booleans())
def test_parse_response_never_raises(tokens: list[int], stopped: bool) -> None:
    """A young policy samples any tokens at all; parsing must not end the run."""
    message = NANO.parse_response(np.array(tokens, np.int64), stopped)
    assert message["role"] == "assistant"
    assert all(isinstance(call["arguments"], dict) for call in message.get("tool_calls", []))


@pytest.mark.parametrize(
    "last", [{"role": "assistant", "content": "408"}, {**CALLING}, {"role": "assistant", "content": "408", "reasoning_content": "12*34"}]
)
@pytest.mark.parametrize("before", [[USER], CONVERSATIONS[4], CONVERSATIONS[2]])
def test_supervised_example_is_the_templates_text(before: list[Message], last: Message) -> None:
    """SFT on another text than the one that is sampled later teaches the wrong thing."""
    prompt, answer = NANO.build_supervised_example([*before, last], (CALCULATOR,))
    raw = [dict(m) for m in [*before, last]]
    whole = NANO.tokenizer.apply_chat_template(raw, tools=[CALCULATOR], tokenize=False)
    assert NANO.decode(np.concatenate([prompt, answer])) == whole.rstrip("\n")
    assert prompt.tolist() == NANO.build_generation_prompt(before, (CALCULATOR,)).tolist()
    assert answer[-1] == NANO.encode(END)[0]


@pytest.mark.parametrize("messages", [[], [USER]])
def test_supervised_example_must_end_with_the_assistant(messages: list[Message]) -> None:
    """Otherwise the loss would be on the user's words."""
    with pytest.raises(DataError, match="assistant"):
        NANO.build_supervised_example(messages)


def plain_renderer() -> Renderer:
    tokenizer = copy.deepcopy(NANO.tokenizer)
    tokenizer.chat_template = None
    return Renderer(tokenizer)


def test_base_without_a_chat_template() -> None:
    """Raw bases (GPT-2, Llama base) have no template and must still train."""
    plain = plain_renderer()
    assert plain.decode(plain.build_generation_prompt([{"role": "user", "content": "2+2="}])) == "2+2=\n"
    prompt, answer = plain.build_supervised_example([{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}])
    assert plain.decode(prompt) == "2+2=\n"
    assert plain.decode(answer).startswith("4")
    extended = plain.extend(prompt, plain.encode("4"), [{"role": "user", "content": "3+3="}])
    assert plain.decode(extended) == "2+2=\n4\n3+3=\n"
    assert plain.template_digest != NANO.template_digest
    assert plain.tokenizer_digest == NANO.tokenizer_digest


def test_digests_tell_tokenizers_apart(tmp_path) -> None:
    """An adapter used with a tokenizer that cuts otherwise answers nonsense; the digest is what notices."""
    for source in NANO_FOLDER.iterdir():
        if source.suffix != ".safetensors":
            (tmp_path / source.name).write_bytes(source.read_bytes())
    assert load_renderer(str(tmp_path)).tokenizer_digest == NANO.tokenizer_digest
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["added_tokens"][-1]["content"] += "!"
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert load_renderer(str(tmp_path)).tokenizer_digest != NANO.tokenizer_digest


def test_missing_tokenizer_is_one_line(tmp_path) -> None:
    """A folder without a tokenizer is a common mistake."""
    with pytest.raises(BaseError, match="cannot be loaded") as caught:
        load_renderer(str(tmp_path))
    assert "\n" not in str(caught.value)
