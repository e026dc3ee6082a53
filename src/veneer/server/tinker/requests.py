"""JSON bodies of the Tinker protocol. Unknown fields are ignored, as newer clients send more; null is absent, but not in numbers."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from veneer.server.errors import TooLarge
from veneer.types import DataError, RequestError

T = TypeVar("T", bound="Body")
Seq = Annotated[int, Field(ge=0, lt=2**63)]
HOUR, TEN_YEARS = 3600, 3653 * 24 * 3600
Ttl = Annotated[int, Field(ge=HOUR, le=TEN_YEARS)]


MOST_METADATA = 2**16


def _kept(metadata: dict[str, Any]) -> dict[str, Any]:
    """It is given back as JSON, which has no NaN and no endless numbers, and stays in memory until then."""
    if len(json.dumps(metadata, allow_nan=False)) > MOST_METADATA:
        raise ValueError(f"more than {MOST_METADATA} characters")
    return metadata


Metadata = Annotated[dict[str, Any], AfterValidator(_kept)]
Texts = Annotated[list[str], Field(fail_fast=True)]
"""The first wrong entry is enough: a million of them would be a million errors in memory."""


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), str_max_length=2**16)
    max_bytes: ClassVar[int] = 2**20
    """Of such a body: what JSON says in three bytes Python keeps in sixty."""


def parse(kind: type[T], body: bytes) -> T:
    """
    Raises:
        DataError: the body is not of that kind; the message names the first field that is wrong.
        TooLarge: no such body is as large.
    """
    if len(body) > kind.max_bytes:
        raise TooLarge(f"the body has {len(body)} bytes; this request may have {kind.max_bytes}")
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise DataError(f"{where}: {first['msg']}") from error


class ClientConfig(Body):
    sdk_version: str = ""


class CreateSession(Body):
    tags: Texts = []
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    display_name: str | None = None


class Heartbeat(Body):
    session_id: str


class LoraFields(Body):
    rank: Annotated[int, Field(ge=1, le=4096)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Body):
    type: str = "adamw"


class CreateModel(Body):
    session_id: str
    model_seq_id: Seq
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: LoraFields | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class ModelId(Body):
    model_id: str


class AdamFields(Body):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Body):
    model_id: str
    seq_id: Seq
    adam_params: AdamFields | None = None
    optimizer_params: dict[str, Any] | None = None

    def params(self) -> dict[str, float]:
        if self.adam_params is None:
            kind = (self.optimizer_params or {}).get("type")
            raise RequestError(f"optim_step needs adam_params; optimizer {kind!r} is not there, only adamw")
        return self.adam_params.model_dump()


class Operation(Body):
    """What every operation of a model has."""

    model_id: str
    seq_id: Seq


class SaveWeights(Operation):
    path: str
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsForSampler(Operation):
    path: str | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata | None = None


class SaveWeightsExternal(Operation):
    path: str
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: Texts | None = None


class LoadWeights(Body):
    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: Seq | None = None
    session_id: str | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig | None = None


class CreateSamplingSession(Body):
    session_id: str
    sampling_session_seq_id: Seq = 0
    base_model: str | None = None
    model_path: str | None = None


Token = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]


class Chunk(Body):
    type: str = "encoded_text"
    tokens: Tokens = []


class Prompt(Body):
    chunks: Annotated[list[Chunk], Field(fail_fast=True)]

    def tokens(self) -> list[int]:
        for chunk in self.chunks:
            if chunk.type != "encoded_text":
                raise DataError(f"prompt: chunks of type {chunk.type!r} cannot be read: this base sees no images and hears no sound")
        return [token for chunk in self.chunks for token in chunk.tokens]


Few = Field(max_length=1024)
COLDEST = 1e-6


def _warm(temperature: float) -> float:
    """Below this, logits divided by it are beyond what float32 holds."""
    if 0 < temperature < COLDEST:
        raise ValueError(f"at least {COLDEST}, or 0 for the likeliest token")
    return temperature


class Sampling(Body):
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[Texts, Few] | Annotated[Tokens, Few] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6), AfterValidator(_warm)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


Int64s = Annotated[list[Annotated[int, Field(ge=-(2**63), lt=2**63)]], Field(fail_fast=True)]


class TensorFields(Body):
    data: Int64s
    dtype: Literal["int64"] = "int64"
    shape: Int64s | None = None
    sparse_crow_indices: Int64s | None = None
    sparse_col_indices: Int64s | None = None


TopK = Annotated[int, Field(ge=0, le=1000)]


class Sample(Body):
    max_bytes: ClassVar[int] = 2**23
    prompt: Prompt
    sampling_params: Sampling
    num_samples: Annotated[int, Field(ge=1, le=4096)] = 1
    sampling_session_id: str | None = None
    seq_id: Seq | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: TopK = 0
    topk_sample_logprobs: TopK = 0
    target_prompt_logprobs: TensorFields | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None


class RetrieveFuture(Body):
    request_id: str
    allow_metadata_only: bool = False


class CancelFuture(Body):
    request_id: str


class FuturesTarget(Body):
    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Field(ge=0, lt=2**33)] = 0
    """Times a thousand million it is a sequence number."""


class RetrieveFutures(Body):
    target: FuturesTarget
    prev_cursor: Annotated[int, Field(ge=0, lt=2**62)] = 0
    timeout: Annotated[float, Field(ge=0, le=3600)] | None = None


class JoinSamplingSession(Body):
    sampling_session_id: str


class CreateCustomLoss(Body):
    session_id: str
    custom_loss_seq_id: Seq
    name: str = ""


class CopyWeights(Body):
    source_path: str
    session_id: str | None = None
    model_seq_id: Seq | None = None
    destination_project_id: str | None = None
    ttl_seconds: Ttl | None = None


class SetTtl(Body):
    ttl_seconds: Ttl | None


class WeightsInfo(Body):
    tinker_path: str
