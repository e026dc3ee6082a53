"""The nouns, the Engine protocol and the error tree. Standard library and numpy only.

Ragged lists carry their axes in their names: ``rewards_G`` is a list over the members of a group,
``groups_P`` over prompts, ``data_D`` over datums. Token arrays are int64, float arrays float32.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, Required, TypedDict, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]
T_co = TypeVar("T_co", covariant=True)


# ---------------------------------------------------------------- messages and environments


class ToolCall(TypedDict):
    """A call as the model wrote it; ``arguments`` is the parsed JSON object."""

    name: str
    arguments: dict[str, Any]


class Message(TypedDict, total=False):
    """One turn of a conversation, with the keys that Hugging Face chat templates read."""

    role: Required[Literal["system", "user", "assistant", "tool"]]
    content: Required[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    invalid_tool_calls: NotRequired[list[str]]
    """What was marked as a call and is none, as it was written; it stands in ``content`` too."""


@dataclass(frozen=True)
class Observation:
    """What an environment shows first: the conversation so far and the tools that may be called (JSON schemas)."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class StepResult:
    """What an environment answers to one assistant message."""

    reward: float
    episode_done: bool
    next_messages: Sequence[Message] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class Env(Protocol):
    """One episode. Single use: made, played, thrown away; there is no reset."""

    async def initial_observation(self) -> Observation: ...

    async def step(self, action: Message) -> StepResult: ...


@runtime_checkable
class Closable(Protocol):
    """An environment, or a dataset of them, that holds something to be given back: a process, a connection, a folder."""

    async def close(self) -> None: ...


@runtime_checkable
class Solvable(Protocol):
    """An environment that knows its own solution: what ``veneer env check`` plays."""

    def gold(self) -> Message:
        """What a perfect policy says next. Said to the end, it earns a reward of 1."""
        ...


Split = Literal["train", "eval"]


class EnvDataset(Protocol):
    """A stream of problems: the same split and index always give the same problem, and no problem is in both splits."""

    @property
    def name(self) -> str: ...

    def env(self, split: Split, index: int) -> Env: ...


@runtime_checkable
class Finite(Protocol):
    """A dataset with so many problems and no more."""

    def problem_count(self, split: Split) -> int:
        """How many different indices there are; behind them it begins again."""
        ...


@dataclass(frozen=True)
class Ungraded:
    """In the place of a reward: why there is none."""

    reason: str


@runtime_checkable
class GroupGrader(Protocol):
    """A dataset that grades the episodes of one problem together, when all have ended: judges that compare, rewards of a batch."""

    async def compute_group_rewards(
        self, split: Split, index: int, trajectories_G: Sequence[Trajectory]
    ) -> Sequence[tuple[float, Mapping[str, float]] | Ungraded]:
        """Per finished member a reward, which is added to what its steps brought, and metrics. An ungraded one has failed, alone."""
        ...


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True)
class LoraConfig:
    """W + (alpha / rank) B A, as in "LoRA Without Regret" (https://thinkingmachines.ai/blog/lora/)."""

    rank: int = 8
    """Width of the bottleneck; from 1 up to the smaller side of the narrowest adapted matrix."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank, so that a learning rate carries over between ranks."""
    train_attn: bool = True
    """Adapt every linear map of the attention blocks."""
    train_mlp: bool = True
    """Adapt every linear map of the MLP blocks."""
    train_unembed: bool = False
    """Adapt the unembedding (lm_head). Off: several servers, vLLM among them, cannot apply it."""
    target_modules: tuple[str, ...] = ()
    """Module name endings, such as "q_proj" or "layers.3.mlp.up_proj"; replaces the three switches when given."""
    seed: int = 0
    """Seeds A (uniform in +-1/sqrt(d_in)); B starts at zero."""


@dataclass(frozen=True)
class Adapter:
    """A named, published version of an adapter: what a sample was drawn from."""

    name: str
    version: int
    """Number of optimizer steps behind these weights."""
    digest: str
    """SHA-256 over the tensors, in hex."""
    base_id: str
    base_digest: str


@dataclass(frozen=True)
class Canary:
    """What an adapter did to one row of tokens when it was saved. Whoever loads it can see whether it does the same there."""

    tokens: tuple[int, ...]
    base_logprobs: tuple[float, ...]
    """[len(tokens) - 1] of each token but the first, in nats, under the base alone."""
    logprobs: tuple[float, ...]
    """The same with the adapter."""
    digest: str
    """The adapter's."""
    base_digest: str
    dtype: str
    """Of the arithmetic that measured it."""


@dataclass(frozen=True)
class Checkpoint:
    """Adapter weights at rest. ``training`` also holds the optimizer's moments, ``sampler`` the weights alone."""

    kind: Literal["training", "sampler"]
    adapter: Adapter
    config: LoraConfig | None
    """None for full fine-tuning."""
    weights: Mapping[str, NDArray[Any]]
    """PEFT's names, ``<module>.lora_A.weight`` [r, d_in] and ``.lora_B.weight`` [d_out, r]; for full fine-tuning, parameter names."""
    optimizer: Mapping[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    """``m.<name>`` and ``v.<name>`` (Adam's moments) for every weight, and ``step``."""
    canary: Canary | None = None
    """None: it was not measured."""


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions."""

    max_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they stay part of it."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a completion; they stay part of it. None means the model's end-of-sequence tokens, () means none."""
    seed: int = 0
    """Together with the sequence's index and the position this fixes every draw, whoever else is in the batch."""


@dataclass(frozen=True)
class Switch:
    """Another adapter acts on the tokens from some place on: a behaviour for a span of one context (activated LoRA,
    https://arxiv.org/abs/2504.12397). Keys and values before that place stay as they are."""

    adapter: str | None
    """None: the base alone."""
    at: int | None = None
    """The position in the prompt from which it acts."""
    after: tuple[int, ...] = ()
    """Or: it acts from the last of these tokens on, once a completion has drawn them one after the other."""


@dataclass(frozen=True)
class TopLogprobs:
    """The likeliest tokens at some places, sorted by log-probability."""

    tokens: NDArray[np.int64]
    """[places, k]"""
    logprobs: Floats
    """[places, k]"""


@dataclass(frozen=True)
class Piece:
    """What a completion has drawn since the last piece."""

    index: int
    """Of the completion, from 0 to n - 1."""
    tokens: Sequence[int]
    logprobs: Sequence[float]
    top_logprobs: TopLogprobs | None = None
    stop_reason: Literal["stop", "length"] | None = None
    """None: it goes on."""


@dataclass(frozen=True)
class Sample:
    """One completion, with the evidence of what produced it."""

    tokens: Tokens
    logprobs: Floats
    """[len(tokens)] log-probabilities under the distribution that was sampled: after temperature, top-k and top-p."""
    stop_reason: Literal["stop", "length"]
    base_id: str
    adapter: Adapter | None
    """None: the base alone."""
    prompt_logprobs: Floats | None = None
    """[len(prompt)] at temperature 1; the first entry is NaN."""
    top_logprobs: TopLogprobs | None = None
    """[len(tokens), k] of the distribution that was sampled."""
    prompt_top_logprobs: TopLogprobs | None = None
    """[len(prompt), k] at temperature 1; the first row is zeros and NaN."""
    prompt_target_logprobs: Floats | None = None
    """[len(prompt) - 1, K] at temperature 1, of the targets asked for; NaN where the target was -1."""
    switches: tuple[tuple[int, Adapter | None], ...] = ()
    """Which adapter acted from which position of prompt and completion on, beside ``adapter``, which acted first."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there already."""


# ---------------------------------------------------------------- training records


@dataclass(frozen=True)
class Transition:
    """One assistant turn: the tokens it saw, the sample it drew, what the environment said."""

    prompt: Tokens
    sample: Sample
    action: Message
    reward: float
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    text: str = ""
    """What was sampled, as it was written: thinking and calls with their marks, without the token that ended the turn."""


@dataclass(frozen=True)
class Trajectory:
    """One finished episode. A failed one has an error and takes no part in training."""

    transitions: Sequence[Transition]
    reward: float
    error: str | None = None
    truncated: bool = False
    """The last turn ran into max_tokens or the context length."""
    group_metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the dataset said of it when it graded the whole group."""
    observation: Observation | None = None
    """What the environment showed first."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of all turns and of the group; what comes later overrides what came earlier."""
        return {name: value for t in self.transitions for name, value in t.metrics.items()} | dict(self.group_metrics)


@dataclass(frozen=True)
class TrajectoryGroup:
    """Episodes of one problem: what advantages are centred over."""

    index: int
    trajectories_G: Sequence[Trajectory]

    @property
    def rewards_G(self) -> list[float]:
        """Rewards of the members that finished."""
        return [t.reward for t in self.trajectories_G if t.error is None]


@dataclass(frozen=True)
class Datum:
    """One row to train on. Position i reads ``tokens[i]`` and predicts ``targets[i]``: tokens [N], and all other arrays [N], or
    [N, K] for K weighted targets a position (soft targets)."""

    tokens: Tokens
    targets: Tokens
    logprobs: Floats
    """The sampler's log-probability of each target; 0 where mask is 0."""
    advantages: Floats
    mask: Floats
    """The weight of each target: 1 where the model is responsible for it, 0 on all that was not sampled."""
    adapter: Adapter | None = None
    """The published version that was sampled; None for data that no policy of ours produced."""
    per_token: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """Settings of a loss that differ from token to token, by name; each in the shape of the targets."""

    def __post_init__(self) -> None:
        shapes = {a.shape for a in (self.targets, self.logprobs, self.advantages, self.mask, *self.per_token.values())}
        if len(shapes) != 1 or self.targets.shape[:1] != self.tokens.shape or self.targets.ndim > 2 or not self.targets.size:
            raise DataError(
                f"a datum needs tokens [N] and all other arrays in one shape, [N] or [N, K], with at least one entry; "
                f"got tokens {self.tokens.shape} and {sorted(shapes)}"
            )


@dataclass(frozen=True)
class AdamParams:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Scale the gradient down to this global L2 norm; 0 is off."""


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Per datum the log-probability of every target, in request order and in the targets' shape, NaN where none is computed: at
    positions whose mask is 0, unless ``everywhere`` was asked for; and sums or means over the whole request."""

    logprobs_D: Sequence[Floats]
    metrics: Mapping[str, float]


# ---------------------------------------------------------------- the engine


@runtime_checkable
class Future(Awaitable[T_co], Protocol[T_co]):
    """The answer to a queued request. Awaiting it, or asking for its result, runs the engine until it is there."""

    def done(self) -> bool: ...

    def result(self) -> T_co: ...

    def cancel(self) -> bool:
        """Give the request up. False: it is answered already."""
        ...

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call ``callback`` with this future when it is answered, on the thread that runs ``step``; at once if it is."""
        ...

    def __await__(self) -> Generator[Any, None, T_co]: ...


LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]


class Engine(Protocol):
    """One frozen base, many adapters. Every call but ``create_adapter`` and ``remove_adapter`` queues work and returns at once;
    ``step`` merges what is queued into as few forward passes as it can. Requests of one adapter run in the order they were made."""

    @property
    def base_id(self) -> str: ...

    @property
    def base_digest(self) -> str:
        """The base's identity: SHA-256 over its parameters in the dtype they are stored in, whatever they are computed in."""
        ...

    @property
    def dtype(self) -> str:
        """Of the base's arithmetic: "float32", "bfloat16"; decides how closely sampler and trainer must agree."""
        ...

    @property
    def context_length(self) -> int: ...

    def measure_base_digest(self) -> str:
        """SHA-256 over the base's parameters as they are in memory now."""
        ...

    def create_adapter(self, name: str, config: LoraConfig | None) -> int:
        """Make a fresh adapter, equal to the base, and return its number of trainable parameters. None: full fine-tuning."""
        ...

    def remove_adapter(self, name: str) -> None: ...

    def sample(
        self,
        prompt: Tokens,
        adapter: str | None,
        params: SamplingParams,
        n: int = 1,
        *,
        prompt_logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_top_logprobs: int = 0,
        prompt_targets: Tokens | None = None,
        switches: Sequence[Switch] = (),
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Future[list[Sample]]:
        """Draw n completions from the adapter's published version, or from the base if ``adapter`` is None.

        ``top_logprobs`` and ``prompt_top_logprobs``: how many of the likeliest tokens to report at each place. ``prompt_targets``
        int64 [len(prompt) - 1, K]: tokens whose log-probability behind each prompt token but the last is wanted, -1 for none.
        ``switches``: which adapters act from where on, in order. ``on_piece`` is called on the thread that runs ``step``."""
        ...

    def forward(
        self,
        adapter: str | None,
        data: Sequence[Datum],
        loss_fn: LossName,
        loss_config: Mapping[str, float] | None = None,
        *,
        everywhere: bool = False,
    ) -> Future[ForwardBackwardOutput]:
        """Losses and log-probabilities of the training weights, no gradient. ``everywhere``: log-probabilities also where the mask
        is 0."""
        ...

    def forward_backward(
        self,
        adapter: str,
        data: Sequence[Datum],
        loss_fn: LossName,
        loss_config: Mapping[str, float] | None = None,
        *,
        everywhere: bool = False,
    ) -> Future[ForwardBackwardOutput]:
        """As ``forward``, and add the gradient of the summed loss to the adapter's."""
        ...

    def optim_step(self, adapter: str, params: AdamParams, *, need_gradient: bool = True) -> Future[dict[str, float]]:
        """Apply the gathered gradient, clear it, and count the version up by one. Without any ``forward_backward`` since the last step
        it is refused, unless ``need_gradient`` is false: then the moments alone move the weights."""
        ...

    def zero_grad(self, adapter: str) -> Future[float]:
        """Drop the gathered gradient. Returns the L2 norm that it had."""
        ...

    def publish(self, adapter: str) -> Future[Adapter]:
        """Make the training weights the version that ``sample`` draws from."""
        ...

    def save_state(self, adapter: str, kind: Literal["training", "sampler"] = "training") -> Future[Checkpoint]:
        """Copy the training weights, with the optimizer's state for kind ``training``."""
        ...

    def load_state(self, adapter: str, checkpoint: Checkpoint) -> Future[None]:
        """Create ``adapter`` from a checkpoint, or overwrite it; kind ``training`` continues bit for bit on CPU in float32."""
        ...

    def step(self) -> int:
        """Run what is queued; returns the number of requests answered."""
        ...


# ---------------------------------------------------------------- errors


class VeneerError(Exception):
    """Everything that Veneer raises on purpose.

    VeneerError
     ├─ RequestError       the request was wrong: exit code 2
     │   ├─ ConfigError      a configuration key or value
     │   ├─ BaseError        the base model is missing, broken or unsupported
     │   ├─ AdapterError     the adapter is missing, broken, or made for something else
     │   ├─ DataError        a datum, prompt or data file
     │   └─ DivergedError    numbers that left every range; the weights are as they were before
     └─ RunError           it failed on the way: exit code 1
         ├─ AttestationError the weights are not the ones that were promised
         └─ StorageError     the disk or the run folder
    """

    exit_code = 1


class RequestError(VeneerError):
    exit_code = 2


class ConfigError(RequestError):
    pass


class BaseError(RequestError):
    pass


class AdapterError(RequestError):
    pass


class DataError(RequestError):
    pass


class DivergedError(RequestError):
    pass


class RunError(VeneerError):
    pass


class AttestationError(RunError):
    pass


class StorageError(RunError):
    pass


def in_one_line(error: BaseException) -> str:
    """A library's error as kind and first line, to be quoted in ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
