"""What clients send: OpenAI's names, vLLM's where OpenAI has none, and ``lora``. A field that nothing here acts on is refused unless
it says what would happen anyway; so is one that nobody knows: it might have been meant to change the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from veneer.server.openai.fields import Arguments, Content, Count, Probability, Prompts, Scale, Seed, Span, Stops, Temperature, Tool, only
from veneer.types import Message, ToolCall

MOST_CHOICES = 1024
"""Answers to one request."""
MOST_ADAPTERS = 16
"""Entries of one ``lora`` list."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class LoraEntry(Body):
    """An adapter of a request, and where it acts. Entries that act at the same place are added."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """NAME, NAME@VERSION or NAME@LABEL."""
    scale: Scale = 1.0
    activated: bool | Span | None = None
    """Where in the prompt it begins to act. true: where the assistant's turn begins. A text: where that text stands last, its first
    token included. false: with the first token. null: as the adapter's manifest says, which mostly is false."""
    since: Span | None = Field(None, alias="from")
    """It begins to act once this text was drawn, and decides every token behind it; it reads no token of the prompt."""
    until: Span | None = None
    """It acts until this text was drawn; every token behind it is decided without it."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Nothing is ever padded here."""
    continuous_usage_stats: Annotated[Any, only(False)] = None


class Drawing(Body):
    """What chat and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A base, or an adapter: NAME, NAME@VERSION or NAME@LABEL."""
    lora: Annotated[list[LoraEntry], Field(max_length=MOST_ADAPTERS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 keep all tokens."""
    seed: Seed | None = None
    stop: Stops = []
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    repetition_penalty: Annotated[Any, only(1)] = None
    length_penalty: Annotated[Any, only(1)] = None
    logit_bias: Annotated[Any, only({})] = None
    best_of: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    min_p: Annotated[Any, only(0)] = None
    min_tokens: Annotated[Any, only(0)] = None
    stop_token_ids: Annotated[Any, only([])] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    skip_special_tokens: Annotated[Any, only()] = None
    user: Any = None

    @model_validator(mode="after")
    def _check_stream(self) -> Drawing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams: set stream")
        return self

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CalledFunction(Body):
    name: str
    arguments: Arguments
    """A JSON object, written as a text."""


class Call(Body):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError(f"tool_calls and reasoning_content are the assistant's, not those of role {self.role!r}")
        return self

    def to_message(self) -> Message:
        """As chat templates read it."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.tool_calls:
            calls: list[ToolCall] = [{"name": c.function.name, "arguments": json.loads(c.function.arguments)} for c in self.tool_calls]
            message["tool_calls"] = calls
        for key in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, key) is not None:
                message[key] = getattr(self, key)
        return message  # type: ignore[return-value]


class ChatRequest(Drawing):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(True)] = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Options of the base's chat template, such as enable_thinking."""
    reasoning_effort: str | None = None
    """The same as an option of that name of the chat template."""
    echo: Annotated[Any, only(False)] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only("medium")] = None
    moderation: Annotated[Any, only()] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: bool | None = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def template_options(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}


class CompletionRequest(Drawing):
    prompt: Prompts
    max_tokens: Count | None = None
    """16, unless said otherwise, as OpenAI has it."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    """Whether a text begins with what the tokenizer puts before documents, if it puts anything there. It does, unless said otherwise."""
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionRequest:
        if len(self.prompt) * self.count > MOST_CHOICES:
            raise ValueError(f"{len(self.prompt)} prompts times n = {self.count} are more than {MOST_CHOICES} answers")
        return self


class LoadRequest(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder inside of the one that the server was started with (--lora-dir)."""
    load_inplace: bool = False
    """Whether a name that is there gets a new version."""
    base_model: str | None = None
    """Which of several bases; by the name in the folder, unless said otherwise."""


class UnloadRequest(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
    lora_int_id: Annotated[Any, only()] = None


class Promotion(Body):
    version: Annotated[int, Field(ge=1, lt=10**9)]
    label: Annotated[str, Field(min_length=1, max_length=64)] = "live"


class Rollback(Body):
    label: Annotated[str, Field(min_length=1, max_length=64)] = "live"
