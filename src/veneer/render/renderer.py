"""A renderer over the tokenizer's own chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, cast

import jinja2
import jinja2.meta
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from veneer.assets import resolve_base
from veneer.render.reading import THINK, THOUGHT, Reader
from veneer.render.vocabulary import Vocabulary
from veneer.types import BaseError, DataError, Message, Tokens, in_one_line

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""For a base without a chat template: the contents, a line each, for the model to go on from."""

KEPT, LONG = 256, 2**16
"""Conversations whose tokens are remembered: the members of a group all begin with the same one. Longer ones, in characters, are not."""
TAIL = 16
"""Tokens at the end of a prompt in which a template may open the thinking."""
_MARK = "\x02answer\x03"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of transformers' own."""
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
"""What a template reads that is no option."""


class Renderer:
    """Renders with the template of one tokenizer and parses what Qwen3 and its kin answer: thinking, tool calls, content."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template or PLAIN_TEMPLATE
        self.template = template if isinstance(template, str) else str(template["default"])
        self.template_digest = hashlib.sha256(self.template.encode()).hexdigest()
        self.tokenizer_digest = hashlib.sha256(_definition(tokenizer).encode()).hexdigest()
        self._encode_dialogue = lambda key: self.encode(self._text(*json.loads(key)))
        self._remembered = lru_cache(KEPT)(self._encode_dialogue)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @cached_property
    def template_options(self) -> frozenset[str]:
        """Names that the template reads beside messages and tools, such as ``enable_thinking``."""
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        names = jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", self.template)))
        return frozenset(names - _GIVEN - set(self.tokenizer.special_tokens_map))

    @cached_property
    def shows_tools(self) -> bool:
        return "tools" in self.template

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        generate: bool = True,
    ) -> str:
        if unknown := set(options or {}) - self.template_options:
            there = ", ".join(sorted(self.template_options)) or "none"
            raise DataError(f"the chat template has no option {sorted(unknown)[0]!r}; it has: {there}")
        try:
            text = self.tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", [dict(m) for m in messages]),
                tools=[dict(t) for t in tools] or None,
                chat_template=self.template,
                add_generation_prompt=generate,
                tokenize=False,
                **(options or {}),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:  # it is a program
            raise DataError(f"the chat template refuses these messages ({in_one_line(error)})") from error
        assert isinstance(text, str)
        return text

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; a base may have room for more."""
        return len(self.tokenizer)

    def encode(self, text: str, *, framed: bool = False) -> Tokens:
        """``framed``: with the tokens that the tokenizer puts around a document, such as one for its beginning.

        Raises:
            DataError: the text cannot be written in UTF-8.
        """
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=framed, verbose=False), np.int64)
        except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair, which JSON can spell
            raise DataError(f"the text is no Unicode ({in_one_line(error)})") from error

    def decode(self, tokens: Tokens) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    def build_generation_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), options: Mapping[str, Any] | None = None
    ) -> Tokens:
        """Token ids of the conversation up to where the assistant speaks next. ``options`` are the template's own.

        Raises:
            DataError: the template refuses the messages, or has no such option.
        """
        return self._dialogue(messages, tools, options, generate=True)

    def turn_start(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), options: Mapping[str, Any] | None = None
    ) -> int:
        """Position in the generation prompt from which on it is the assistant's turn: what the template adds for it."""
        whole, before = (self._dialogue(messages, tools, options, generate) for generate in (True, False))
        same = whole[: len(before)] == before[: len(whole)]
        return int(np.argmin(same)) if not same.all() else min(len(whole), len(before))

    def _dialogue(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None, generate: bool
    ) -> Tokens:
        try:
            key = json.dumps([[dict(m) for m in messages], [dict(t) for t in tools], dict(options or {}), generate])
        except RecursionError as error:
            raise DataError("the messages are nested too deeply") from error
        return (self._remembered if len(key) <= LONG else self._encode_dialogue)(key).copy()

    def opens_thinking(self, prompt: Tokens) -> bool:
        """Whether the prompt ends with the beginning of a thought, so that the answer goes on with it."""
        return self.decode(prompt[-TAIL:]).rstrip().endswith(THINK)

    def extend(self, prompt: Tokens, sampled: Tokens, messages: Sequence[Message]) -> Tokens:
        """The next turn's prompt: every token that the model saw and wrote, as it was, then ``messages`` and the generation prompt.

        History is never tokenised again, so the sampler's log-probabilities stay those of the row that is trained.

        Raises:
            DataError: the template cannot continue a conversation behind an assistant turn.
        """
        text = self._text([{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, *messages], ())
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
        prompt, whole = self._text(messages[:-1], tools), self._text(messages, tools, generate=False)
        if not whole.startswith(prompt):
            raise DataError("the chat template renders this prompt otherwise once it is answered")
        answer, end = self.encode(whole[len(prompt) :].rstrip("\n")), self.tokenizer.eos_token_id
        if isinstance(end, int) and (len(answer) == 0 or answer[-1] != end):  # a template without an end of turn
            answer = np.append(answer, end)
        return self.encode(prompt), answer

    def written(self, sampled: Tokens, stopped: bool) -> str:
        """The text of a completion. ``stopped``: the last token ended the turn and is no part of it."""
        return self.decode(sampled[:-1] if stopped else sampled)

    def parse_response(self, sampled: Tokens, stopped: bool) -> Message:
        """The assistant message in a completion. ``stopped``: the last token ended the turn and is no part of the content.
        Thinking that never closes leaves an empty content; a tool call that is not valid JSON stays text, and is named as invalid."""
        text = self.written(sampled, stopped)
        reader = Reader(thinking=THINK in text or THOUGHT in text, calls=True)
        parts = reader.feed(text, last=True)
        message: Message = {"role": "assistant", "content": "".join(part.content for part in parts)}
        if reader.thought:
            message["reasoning_content"] = "".join(part.reasoning for part in parts)
        if calls := [part.call for part in parts if part.call is not None]:
            message["tool_calls"] = calls
        if reader.broken:
            message["invalid_tool_calls"] = reader.broken
        return message


def _definition(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides how text is cut: the fast tokenizer's own serialisation, or the vocabulary of a slow one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))


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
