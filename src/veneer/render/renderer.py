"""A renderer over the tokenizer's own chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from veneer.assets import resolve_base
from veneer.types import BaseError, DataError, Message, Tokens, ToolCall, in_one_line

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""For a base without a chat template: the contents, a line each, for the model to go on from."""

KEPT = 256
"""Conversations whose tokens are remembered: the members of a group all begin with the same one."""
_MARK = "\x02answer\x03"
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class Renderer:
    """Renders with the template of one tokenizer and parses what Qwen3 and its kin answer: thinking, tool calls, content."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template or PLAIN_TEMPLATE
        self.template = template if isinstance(template, str) else str(template["default"])
        self.template_digest = hashlib.sha256(self.template.encode()).hexdigest()
        self.tokenizer_digest = hashlib.sha256(_definition(tokenizer).encode()).hexdigest()
        self._encode_dialogue = lru_cache(KEPT)(lambda key: self.encode(self._text(*json.loads(key), generate=True)))

    def _text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", [dict(m) for m in messages]),
                tools=[dict(t) for t in tools] or None,
                chat_template=self.template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses these messages ({in_one_line(error)})") from error
        assert isinstance(text, str)
        return text

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; a base may have room for more."""
        return len(self.tokenizer)

    def encode(self, text: str) -> Tokens:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int64)

    def decode(self, tokens: Tokens) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    def build_generation_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Tokens:
        """Token ids of the conversation up to where the assistant speaks next."""
        return self._encode_dialogue(json.dumps([[dict(m) for m in messages], [dict(t) for t in tools]])).copy()

    def extend(self, prompt: Tokens, sampled: Tokens, messages: Sequence[Message]) -> Tokens:
        """The next turn's prompt: every token that the model saw and wrote, as it was, then ``messages`` and the generation prompt.

        History is never tokenised again, so the sampler's log-probabilities stay those of the row that is trained.

        Raises:
            DataError: the template cannot continue a conversation behind an assistant turn.
        """
        text = self._text([{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, *messages], (), generate=True)
        head, found, tail = text.rpartition(_MARK)
        if not found:
            raise DataError("the chat template does not show an assistant's content, so a turn cannot be continued")
        del head
        rest = self.encode(tail)
        if len(rest) and len(sampled) and rest[0] == sampled[-1]:
            rest = rest[1:]  # the end-of-turn token was sampled
        return np.concatenate([prompt, sampled, rest])

    def build_supervised_example(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[Tokens, Tokens]:
        """Prompt and answer tokens of a conversation that ends with the assistant; the answer ends with its end-of-turn token.

        Raises:
            DataError: it does not end with the assistant, or the template writes the past anew.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("the last message must be the assistant's")
        prompt, whole = self._text(messages[:-1], tools, generate=True), self._text(messages, tools, generate=False)
        if not whole.startswith(prompt):
            raise DataError("the chat template renders this prompt otherwise once it is answered")
        answer, end = self.encode(whole[len(prompt) :].rstrip("\n")), self.tokenizer.eos_token_id
        if isinstance(end, int) and (len(answer) == 0 or answer[-1] != end):  # a template without an end of turn
            answer = np.append(answer, end)
        return self.encode(prompt), answer

    def parse_response(self, sampled: Tokens, stopped: bool) -> Message:
        """The assistant message in a completion. ``stopped``: the last token ended the turn and is no part of the content.
        Thinking that never closes leaves an empty content; a tool call that is not valid JSON stays text."""
        text = self.decode(sampled[:-1] if stopped else sampled)
        message: Message = {"role": "assistant", "content": text}
        if "<think>" in text or "</think>" in text:
            thinking, closed, content = text.partition("</think>")
            message["reasoning_content"] = thinking.removeprefix("<think>").strip("\n")
            message["content"] = content.lstrip("\n") if closed else ""
        calls = [call for body in _TOOL_CALL.findall(message["content"]) if (call := _parse_call(body)) is not None]
        if calls:
            message["tool_calls"] = calls
            message["content"] = _TOOL_CALL.sub("", message["content"]).strip("\n")
        return message


def _definition(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides how text is cut: the fast tokenizer's own serialisation, or the vocabulary of a slow one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))


def _parse_call(body: str) -> ToolCall | None:
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)):
        return None
    return {"name": call["name"], "arguments": call["arguments"]}


def load_renderer(base: str) -> Renderer:
    """The renderer of a base, by hub name, folder or ``nano``.

    Raises:
        BaseError: the tokenizer cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(base), trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers, json and the hub each raise their own
        raise BaseError(f"tokenizer of base {base!r} cannot be loaded ({in_one_line(error)})") from error
    return Renderer(tokenizer)
