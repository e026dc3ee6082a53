"""Protobuf messages of the Tinker protocol, and their way to and from arrays.

The messages are built from the table below: package ``tinker_public``, proto3. Bytes hold little-endian arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from veneer.server.tinker.pieces import check_pieces
from veneer.types import DataError, Datum, Floats, ForwardBackwardOutput, RequestError, Sample, Tokens, TopLogprobs

PROTOBUF = "application/x-protobuf"
SCHEMA = """
ForwardBackwardRequest: 1 model_id string, 2 seq_id int32, 3 data repeated Datum, 4 loss_fn string, 5 loss_fn_config map double,
    6 forward_only bool, 7 loss_fn_config_v2 map LossConfigValue
LossConfigValue: 1 number double of value, 2 text string of value
Datum: 1 model_input repeated Chunk, 2 loss_fn_inputs map Tensor
Chunk: 1 encoded_text EncodedTextChunk of chunk, 2 image Opaque of chunk, 3 dmel Opaque of chunk
EncodedTextChunk: 1 tokens bytes
Opaque:
Tensor: 1 dense bytes of encoding, 2 sparse_csr SparseCsr of encoding, 3 dtype int32, 4 shape repeated int64
SparseCsr: 1 values bytes, 2 crow_indices bytes, 3 col_indices bytes
ForwardBackwardOutput: 1 loss_fn_output_type string, 2 loss_fn_outputs repeated ArrayRecord, 3 metrics map double
ArrayRecord: 1 type_tag string, 2 fields map BatchedTensor, 3 num_datums int64
BatchedTensor: 1 data bytes, 2 offsets bytes, 3 dtype int32, 4 trailing_shape repeated int64
SampleResponse: 1 sequences repeated SampledSequence, 2 prompt_logprobs optional bytes, 3 topk_prompt_logprobs optional TopkLogprobs,
    4 prompt_cache_hit_tokens int32, 5 target_prompt_logprobs optional Tensor
SampledSequence: 1 stop_reason int32, 2 tokens bytes, 3 logprobs optional bytes, 4 topk_sampled_logprobs optional TopkLogprobs
TopkLogprobs: 1 token_ids bytes, 2 logprobs bytes, 3 k uint32, 4 length uint32
"""
FLOAT32, INT64 = 1, 2
"""Of the enum DType, which lies on the wire as an int32."""
NUMPY = {FLOAT32: np.dtype("<f4"), INT64: np.dtype("<i8")}
EMPTY_CELL = -99999.0
"""The log-probability of a place in a top-k table that holds no token."""
STOP, LENGTH = 0, 1


def _build(schema: str) -> dict[str, Any]:
    """Message classes by name."""
    package, field_type = "tinker_public", descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="veneer/tinker_public.proto", package=package, syntax="proto3")
    pattern = re.compile(r"(?P<number>\d+) (?P<name>\w+) (?:(?P<label>repeated|map|optional) )?(?P<kind>\w+)(?: of (?P<oneof>\w+))?")

    def set_kind(field: Any, kind: str) -> None:
        scalar = getattr(field_type, f"TYPE_{kind.upper()}", None)
        field.type = field_type.TYPE_MESSAGE if scalar is None else scalar
        if scalar is None:
            field.type_name = f".{package}.{kind}"

    for line in re.sub(r",\s+", ", ", schema.strip()).splitlines():
        name, _, fields = line.partition(":")
        message = file.message_type.add(name=name)
        for found in pattern.finditer(fields):
            field = message.field.add(name=found["name"], number=int(found["number"]), label=field_type.LABEL_OPTIONAL)
            set_kind(field, found["kind"])
            if found["label"] == "repeated":
                field.label = field_type.LABEL_REPEATED
            elif found["label"] == "map":
                entry_name = "".join(part.capitalize() for part in found["name"].split("_")) + "Entry"
                entry = message.nested_type.add(name=entry_name)
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, type=field_type.TYPE_STRING, label=field_type.LABEL_OPTIONAL)
                set_kind(entry.field.add(name="value", number=2, label=field_type.LABEL_OPTIONAL), found["kind"])
                field.label, field.type, field.type_name = (
                    field_type.LABEL_REPEATED,
                    field_type.TYPE_MESSAGE,
                    f".{package}.{name}.{entry_name}",
                )
            elif found["oneof"]:
                if found["oneof"] not in [declared.name for declared in message.oneof_decl]:
                    message.oneof_decl.add(name=found["oneof"])
                field.oneof_index = [declared.name for declared in message.oneof_decl].index(found["oneof"])
        for field in message.field:  # the oneofs of optional fields come behind the real ones
            if f" {field.name} optional " in fields:
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field.name}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {m.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{m.name}")) for m in file.message_type}


MESSAGES = _build(SCHEMA)


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Pass:
    """A ``ForwardBackwardRequest``."""

    model_id: str
    seq_id: int
    data: Sequence[Any]
    """Undecoded: what is wrong with them is told through the future."""
    loss_fn: str
    loss_config: dict[str, float | str]
    forward_only: bool


def parse_pass(body: bytes) -> Pass:
    """
    Raises:
        DataError: the bytes are no such message, or one of too many parts.
    """
    check_pieces(body)
    message = MESSAGES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise DataError(f"the body is no ForwardBackwardRequest of the Tinker protocol ({error})") from error
    config: dict[str, float | str] = {
        key: value.text if value.WhichOneof("value") == "text" else value.number for key, value in message.loss_fn_config_v2.items()
    } or dict(message.loss_fn_config)
    return Pass(message.model_id, message.seq_id, message.data, message.loss_fn, config, message.forward_only)


PER_TOKEN = ("sequence_ratio_mask", "clip_low_threshold", "clip_high_threshold")
POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "gspo")
"""Losses in which a token without an advantage adds nothing to value or gradient."""
CLIPPING = ("clip_low_threshold", "clip_high_threshold")
SETTINGS = {"cross_entropy": (), "importance_sampling": (), "ppo": CLIPPING, "cispo": CLIPPING, "dro": ("beta",), "gspo": CLIPPING}
"""What ``loss_fn_config`` may set by the protocol, which is less than the engine's losses have: a client that runs here runs there."""


def loss_settings(loss_fn: str, config: Mapping[str, float | str]) -> dict[str, float]:
    """
    Raises:
        RequestError: a setting is no number, or none of the protocol's.
    """
    for name, value in config.items():
        if isinstance(value, str):
            raise RequestError(f"loss_fn_config: {name} = {value!r} is no number; losses defined by the client run on the client's side")
        if loss_fn in SETTINGS and name not in SETTINGS[loss_fn]:
            raise RequestError(f"loss {loss_fn!r} has no setting {name!r}; it has {', '.join(SETTINGS[loss_fn]) or 'none'}")
    return {name: float(value) for name, value in config.items()}


def to_data(data: Sequence[Any], loss_fn: str) -> list[Datum]:
    """Datums of the protocol as the engine's. Inputs and targets come shifted; a token's weight is 1 where ``weights`` are absent.

    Raises:
        DataError: an input is missing, of the wrong kind or shape; the message names the datum and the input.
    """
    datums: list[Datum] = []
    sparse = [t for item in data for t in item.loss_fn_inputs.values() if t.WhichOneof("encoding") == "sparse_csr"]
    cells = sum(math.prod(tensor.shape) for tensor in sparse if min(tensor.shape, default=0) >= 0)
    if cells > MOST_CELLS:
        raise DataError(f"CSR tensors with {cells} cells in one request; at most {MOST_CELLS} can be read: send fewer datums at once")
    for i, item in enumerate(data):
        try:
            datums.append(_datum(item, loss_fn))
        except (DataError, ValueError) as error:
            raise DataError(f"datum {i}: {error}") from error
    return datums


def _datum(item: Any, loss_fn: str) -> Datum:
    tokens = _text_tokens(item.model_input)
    inputs = {name: _array(name, tensor) for name, tensor in item.loss_fn_inputs.items()}
    if "target_tokens" not in inputs:
        raise DataError("loss_fn_inputs must have target_tokens")
    targets = inputs["target_tokens"]
    if targets.dtype != np.int64:
        raise DataError("target_tokens must be int64")

    def floats(name: str) -> Floats:
        if name not in inputs:
            return np.ones(targets.shape, np.float32)
        if inputs[name].shape != targets.shape:
            raise DataError(f"{name} has shape {list(inputs[name].shape)} and target_tokens {list(targets.shape)}; they must be the same")
        return inputs[name].astype(np.float32, copy=False)

    weights = floats("weights")
    if loss_fn == "cross_entropy":
        return Datum(tokens, targets, np.zeros(targets.shape, np.float32), np.zeros(targets.shape, np.float32), weights)
    if missing := [name for name in ("logprobs", "advantages") if name not in inputs]:
        raise DataError(f"loss {loss_fn!r} needs {' and '.join(missing)} in loss_fn_inputs")
    advantages = floats("advantages")
    if loss_fn in POLICY_LOSSES:
        weights = np.where(advantages == 0, np.float32(0), weights)
    per_token = {name: floats(name) for name in PER_TOKEN if name in inputs}
    return Datum(tokens, targets, floats("logprobs"), advantages, weights, per_token=per_token)


def _text_tokens(chunks: Sequence[Any]) -> Tokens:
    parts: list[Tokens] = []
    for chunk in chunks:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise DataError("only text chunks can be read: this base sees no images and hears no sound")
        if len(chunk.encoded_text.tokens) % 4:
            raise DataError("the tokens of a chunk must be int32 numbers")
        parts.append(np.frombuffer(chunk.encoded_text.tokens, "<i4").astype(np.int64))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _array(name: str, tensor: Any) -> NDArray[Any]:
    """A dense or CSR tensor, dense; entries that CSR leaves out are 0."""
    if tensor.dtype not in NUMPY:
        raise DataError(f"{name} must be float32 or int64")
    dtype, shape = NUMPY[tensor.dtype], tuple(tensor.shape)
    if min(shape, default=0) < 0:
        raise DataError(f"{name} has shape {list(shape)}")
    try:
        if tensor.WhichOneof("encoding") != "sparse_csr":
            flat = np.frombuffer(tensor.dense, dtype)
            return flat.reshape(shape or len(flat))
        csr = tensor.sparse_csr
        return from_csr(
            np.frombuffer(csr.values, dtype), np.frombuffer(csr.crow_indices, "<i8"), np.frombuffer(csr.col_indices, "<i8"), shape
        )
    except ValueError as error:
        raise DataError(f"{name} cannot be read ({error})") from error


MOST_CELLS = 2**24
"""Of all CSR tensors of a request: one of a few bytes could ask for any amount of memory."""


def from_csr(values: NDArray[Any], crow: NDArray[Any], col: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """A matrix in compressed sparse rows (https://docs.pytorch.org/docs/stable/sparse.html), dense.

    Raises:
        DataError: the indices do not fit together.
    """
    if len(shape) != 2 or min(shape) < 0 or len(crow) != shape[0] + 1 or shape[0] * shape[1] > MOST_CELLS:
        raise DataError(f"a CSR tensor needs a shape of two and a row pointer more than rows, got {list(shape)} and {len(crow)}")
    counts = np.diff(crow)
    fits = crow[0] == 0 and (counts >= 0).all() and crow[-1] == len(values) == len(col)
    if not fits or (len(col) and (col.min() < 0 or col.max() >= shape[1])):
        raise DataError("the indices of a CSR tensor do not fit its values and shape")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), col] = values
    return dense


# ---------------------------------------------------------------- answers


def output_bytes(output: ForwardBackwardOutput) -> bytes:
    """A ``ForwardBackwardOutput``: a record for each run of datums whose arrays have one trailing shape."""
    message = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord")
    runs: list[list[Floats]] = []
    for logprobs in output.logprobs_D:
        if not runs or runs[-1][0].shape[1:] != logprobs.shape[1:]:
            runs.append([])
        runs[-1].append(logprobs)
    for arrays in runs:
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
        batched = record.fields["logprobs"]
        batched.data = b"".join(array.astype("<f4").tobytes() for array in arrays)
        batched.offsets = np.cumsum([0, *(4 * array.size for array in arrays)]).astype("<i8").tobytes()
        batched.dtype = FLOAT32
        batched.trailing_shape.extend(arrays[0].shape[1:])
    for name, value in output.metrics.items():
        message.metrics[name] = value
    return message.SerializeToString()


@dataclass(frozen=True)
class PromptTargets:
    """What ``target_prompt_logprobs`` asked for: tokens [P - 1, K], and the CSR indices if it came so."""

    tokens: Tokens
    """-1 where nothing is asked for."""
    csr: tuple[NDArray[Any], NDArray[Any]] | None = None


def sample_bytes(samples: Sequence[Sample], targets: PromptTargets | None, last: int | None = None) -> bytes:
    """A ``SampleResponse``. ``last``: only so many of the prompt's last log-probabilities were asked for."""
    first = samples[0]
    message = MESSAGES["SampleResponse"](prompt_cache_hit_tokens=first.cached_tokens)
    for sample in samples:
        sequence = message.sequences.add(
            stop_reason=STOP if sample.stop_reason == "stop" else LENGTH,
            tokens=sample.tokens.astype("<i4").tobytes(),
            logprobs=sample.logprobs.astype("<f4").tobytes(),
        )
        if sample.top_logprobs is not None:
            _fill_top(sequence.topk_sampled_logprobs, sample.top_logprobs, 0)
    if first.prompt_logprobs is not None:
        scores = first.prompt_logprobs.astype("<f4")
        if last is not None:
            scores[: max(0, len(scores) - last)] = np.nan
        message.prompt_logprobs = scores.tobytes()
    if first.prompt_top_logprobs is not None:
        places = len(first.prompt_top_logprobs.tokens)
        _fill_top(message.topk_prompt_logprobs, first.prompt_top_logprobs, 1 if last is None else max(1, places - last))
    if first.prompt_target_logprobs is not None and targets is not None:
        _fill_targets(message.target_prompt_logprobs, first.prompt_target_logprobs, targets)
    return message.SerializeToString()


def _fill_top(message: Any, top: TopLogprobs, masked: int) -> None:
    """``masked``: places at the start that hold nothing."""
    tokens, logprobs = top.tokens.astype("<i4"), top.logprobs.astype("<f4")
    tokens[:masked], logprobs[:masked] = 0, EMPTY_CELL
    nothing = ~np.isfinite(logprobs)
    tokens[nothing], logprobs[nothing] = 0, EMPTY_CELL
    message.length, message.k = tokens.shape
    message.token_ids, message.logprobs = tokens.tobytes(), logprobs.tobytes()


def _fill_targets(message: Any, found: Floats, targets: PromptTargets) -> None:
    wanted = np.where(targets.tokens < 0, np.float32(0), found).astype("<f4")
    message.dtype = FLOAT32
    message.shape.extend(wanted.shape)
    if targets.csr is None:
        message.dense = wanted.tobytes()
        return
    crow, col = targets.csr
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    message.sparse_csr.values = wanted[rows, col].tobytes()
    message.sparse_csr.crow_indices, message.sparse_csr.col_indices = crow.astype("<i8").tobytes(), col.astype("<i8").tobytes()


def metric_numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as JSON can hold them."""
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
