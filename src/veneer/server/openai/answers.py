"""What clients get: OpenAI's objects, with vLLM's ``token_ids`` and ``parent``, and ``veneer``, which says what weights answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """Written as far as its fields were set."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_unset=True, by_alias=True).encode()


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorDetail


# ---------------------------------------------------------------- what weights answered


class Acting(Answer):
    """An adapter that acted."""

    name: str
    version: int
    digest: str
    """SHA-256 of its weights and their scale, in hex."""
    scale: float
    """By which the request took it."""


class Switched(Answer):
    position: int
    """Of the first token that was read with them, in prompt and answer."""
    adapters: list[Acting]
    """None: the base alone."""


class Attestation(Answer):
    base: str
    base_digest: str
    """SHA-256 of the base's parameters, in hex."""
    adapters: list[Acting]
    """Those that acted first; those that came later are with each choice."""
    seed: int
    """The request again with this seed gives the same answer, as long as bases and adapters are these."""


class ChoiceAttestation(Answer):
    switches: list[Switched]


# ---------------------------------------------------------------- usage and log-probabilities


class PromptTokensDetails(Answer):
    cached_tokens: int
    """Whose keys and values were there already."""


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Answer):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """Of the distribution that was sampled: after temperature, top_k and top_p; with temperature 0 of that at temperature 1."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    """One for each token that was drawn: also for thinking, tool calls, stop texts and the end of the turn."""


class TextLogprobs(Answer):
    """Of drawn tokens as in a chat; of the prompt's (``echo``) at temperature 1, with null for the first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


# ---------------------------------------------------------------- chat


class CalledFunction(Answer):
    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(ToolCall):
    index: int


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None
    veneer: ChoiceAttestation | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = None
    veneer: ChoiceAttestation | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | None = None
    veneer: Attestation


class ChatChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
    prompt_token_ids: list[int] | None = None
    veneer: Attestation | None = None


# ---------------------------------------------------------------- completions


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    veneer: ChoiceAttestation | None = None


class TextCompletion(Answer):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str
    veneer: Attestation | None = None


# ---------------------------------------------------------------- models and adapters


class ModelDigests(Answer):
    base_digest: str
    version: int | None = None
    digest: str | None = None


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """What the name means now: NAME@VERSION for an adapter, the base's own name for an alias."""
    parent: str | None
    """Of an adapter: its base."""
    max_model_len: int
    veneer: ModelDigests


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class AdapterVersion(Answer):
    version: int
    digest: str
    stage: str
    created: str
    rank: int | None
    parents: list[dict[str, Any]]
    """Adapters that it was made from: reference, digest and scale."""
    scores: list[dict[str, Any]]
    labels: list[str]
    loaded: bool
    """Whether it is in memory."""


class AdapterCard(Answer):
    name: str
    base: str | None
    """By the name under which the server holds it. null: it does not."""
    base_digest: str
    labels: dict[str, int]
    versions: list[AdapterVersion]


class AdapterList(Answer):
    object: Literal["list"]
    data: list[AdapterCard]


class ForgetReceipt(Answer):
    """What was deleted. The server keeps the receipt, signed."""

    receipt: str
    """Its name in adapters/receipts of the server's home."""
    signed_by: str
    at: str
    reason: str
    forgotten: list[dict[str, Any]]
    """Reference, digest, labels, and files with their SHA-256."""
    left: list[dict[str, Any]]
    """Versions that hold something of it still, as far as the caller may see them, and why."""
