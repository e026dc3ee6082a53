"""Memory of a run, by what holds it: the base, adapters with their optimizer, activations of a training pass, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.measure.plan.figure import Figure
from veneer.shapes import LinearMap, ModelShape

BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
ROWS = ("published", "weights", "gradient", "first moment", "second moment")
"""What the engine holds of an adapter that is trained, each in float32."""
USUAL_FULL, USUAL_ADAPTER = 16, 16
"""Bytes a trained parameter in mixed precision: weight and gradient 2 each, master copy and two moments 4 each."""
HERE = "src/veneer/engine/rows.py and fused.py; checked by tests/measure/test_plan_memory.py on the bundled base"


@dataclass(frozen=True)
class Passes:
    """How much is computed at a time."""

    dtype: str
    tokens: int
    """Of a training pass."""
    side_by_side: int = 1
    """Training passes at a time."""
    checkpointing: bool = False
    logits: int = 0
    """Float32 logits held at a time."""

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype]


def plan_base(shape: ModelShape, dtype: str) -> Figure:
    each = BYTES[dtype]
    note = "one copy for sampling and training; buffers such as rotary tables apart"
    return Figure("base", shape.parameters * each, "bytes", f"{shape.parameters:,} parameters x {each} ({dtype})", "exact", note=note)


def plan_adapter(parameters: int, widest: int) -> Figure:
    """``widest``: the largest d_in, by which a row is longer than its numbers."""
    value = len(ROWS) * 4 * (parameters + widest)
    formula = f"{len(ROWS)} rows ({', '.join(ROWS)}) x 4 x ({parameters:,} + {widest:,})"
    transient = value + 4 * 6 * (parameters + widest)
    note = "the upper end while gradients are added up and Adam makes new rows; each further adapter as much again"
    return Figure("an adapter in training", value, "bytes", formula, HERE, value, transient, note)


def plan_full(shape: ModelShape) -> Figure:
    """What a full copy takes beside the base, in Veneer's engine."""
    value = len(ROWS) * 4 * shape.parameters
    formula = f"{len(ROWS)} rows x 4 x {shape.parameters:,}"
    return Figure("a full copy in training", value, "bytes", formula, HERE, value, value + 24 * shape.parameters, "as an adapter")


def kept_numbers(shape: ModelShape, maps: Sequence[LinearMap] = (), rank: int = 0) -> float:
    """Numbers that a training pass keeps of one token in all layers: each map's output, the inputs of those that close a block, the rotated
    queries and keys, and the adapters' rank-wide middles."""
    inner = [m for m in shape.maps if m.kind in ("attention", "mlp", "expert")]
    kept = sum(m.active * (m.d_out + m.closes * m.d_in) for m in inner)
    turned = sum(a.layers * (a.heads + a.kv_heads) * a.qk_dim for a in shape.attention)
    return kept + turned + sum(m.active * m.rank(rank) for m in maps)


def layer_numbers(shape: ModelShape) -> float:
    """Numbers of one token that one layer's backward pass makes beside: as much as the layer keeps."""
    return kept_numbers(shape) / max(1, shape.layers)


def plan_activations(shape: ModelShape, passes: Passes, maps: Sequence[LinearMap], rank: int) -> Figure:
    """Of the training passes that run at a time."""
    kept = kept_numbers(shape, maps, rank)
    layer = layer_numbers(shape)
    if passes.checkpointing:
        numbers, formula = shape.layers * shape.hidden + 2 * layer, "layers x hidden + twice a layer"
    else:
        numbers, formula = kept + layer, "outputs of maps, inputs of closing maps, rotated queries and keys, A x; and one layer's gradients"
    logits = 4 * min(passes.logits, passes.tokens * shape.vocab) if passes.logits else 0
    value = passes.side_by_side * (numbers * passes.tokens * passes.bytes + 2 * logits)
    formula = (
        f"{passes.side_by_side} x ({passes.tokens:,} tokens x {numbers:,.0f} numbers x {passes.bytes} + logits twice); numbers: {formula}"
    )
    note = "attention's own buffers are within the range"
    return Figure("activations", value, "bytes", formula, HERE, 0.75 * value, 1.35 * value, note)


def plan_cache_token(shape: ModelShape, dtype: str) -> Figure:
    value = shape.cache_numbers * BYTES[dtype]
    formula = f"{shape.cache_numbers:,} keys and values in all layers x {BYTES[dtype]}"
    note = "windows would make it less; the engine keeps all" if any(a.window for a in shape.attention) else ""
    return Figure("cache of a token", value, "bytes", formula, "exact", note=note)


def plan_cache(shape: ModelShape, dtype: str, rows: int, row_places: int, prompts: int, prompt_places: int) -> Figure:
    """Of the completions that run together: places of each, and of each prompt that they share (0: every completion has its own copy,
    within ``row_places``)."""
    each = shape.cache_numbers * BYTES[dtype]
    value = each * (rows * row_places + prompts * prompt_places)
    formula = f"({rows:,} completions x {row_places:,} places + {prompts:,} prompts x {prompt_places:,}) x cache of a token"
    note = "places are rounded up to what a bank holds; banks grow by half, and the shorter ones that a completion outgrew are kept a while"
    return Figure("cache", value, "bytes", formula, "src/veneer/engine/cache.py", 0.5 * value, 2.0 * value, note)


def plan_total(parts: Sequence[Figure], name: str) -> Figure:
    """The sum of what is held."""
    value = sum(part.value or 0.0 for part in parts)
    low = sum((part.value or 0.0) if part.low is None else part.low for part in parts)
    high = sum((part.value or 0.0) if part.high is None else part.high for part in parts)
    note = "the process's own libraries, a few hundred MiB, apart"
    return Figure(name, value, "bytes", " + ".join(part.name for part in parts), "as its parts", low, high, note)


def plan_usual(shape: ModelShape, parameters: int) -> tuple[Figure, Figure]:
    """What the weights take in trainers with mixed precision: an adapter, and full fine-tuning; without activations."""
    source = "ZeRO, https://arxiv.org/abs/1910.02054, section 3.1"
    adapter = 2.0 * shape.parameters + USUAL_ADAPTER * parameters
    full = float(USUAL_FULL * shape.parameters)
    rule = "bfloat16 weights and gradients, float32 master weights and moments; activations apart"
    return (
        Figure("usual LoRA trainer", adapter, "bytes", f"2 x {shape.parameters:,} + 16 x {parameters:,}", source, note=rule),
        Figure("usual full trainer", full, "bytes", f"16 x {shape.parameters:,}", source, note=rule),
    )
