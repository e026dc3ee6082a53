"""Memory of a run, by what holds it: the base, adapters with their optimizer, activations of a training pass, keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.measure.plan.figure import Figure
from veneer.shapes import LinearMap, ModelShape, adapter_parameters

BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
ROWS = ("published", "weights", "gradient", "first moment", "second moment")
"""What the engine holds of an adapter that is trained, each in float32."""
STEPPING = 9
"""Rows that an optimizer step makes beside them (``Rows.adam``, ``LocalEngine._optim_steps``)."""
USUAL_FULL, USUAL_ADAPTER = 16, 16
"""Bytes a trained parameter in mixed precision: weight and gradient 2 each, master copy and two moments 4 each."""
LEAST, SHARE = 256, 0.5
"""Tokens of a pass at least; share of the free memory that its activations may take."""
WRITTEN_OUT = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose layers the engine runs itself (``engine/fused.py``)."""
KEPT = "outputs of maps, inputs of those that close a block, rotated queries and keys, attention's copies, A x"
IN_A_LAYER, AT_THE_HEAD = 6, 8
"""Vectors of the model's width that the backward pass of a layer makes beside as much as the layer has kept, and that are alive from the
head on: counted in FusedLayer.backward and FusedModel.train."""
HERE = "src/veneer/engine/rows.py and fused.py; checked by tests/measure/test_plan_memory.py on the bundled base"


@dataclass(frozen=True)
class Passes:
    """How a program computes."""

    dtype: str
    tokens: int
    """Of a training pass, at most."""
    side_by_side: int = 1
    """Training passes at a time, at most."""
    checkpointing: bool = False
    logits: int = 0
    """Float32 logits held at a time."""
    whole: int = 512
    """Tokens of a request that are trained on in one piece, with one gradient."""
    fill: int = 32
    """Attention fills rows up to a multiple of this."""

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype]

    def tokens_at_once(self, total: float) -> tuple[int, int, int]:
        """Of a request of so many: tokens of a pass, pieces in it, and passes at a time. A request that is not small is cut into an even
        number of equal pieces, which share a pass as far as they fit (``engine/packing.py``)."""
        total = max(1, math.ceil(total))
        count = 1 if total <= min(self.tokens, self.whole) else 2 * -(-total // (2 * self.tokens))
        joined = min(count, max(1, min(self.tokens, -(-total // self.side_by_side)) * count // total))
        return -(-total * joined // count), joined, min(self.side_by_side, -(-count // joined))


@dataclass(frozen=True)
class Reading:
    """What is trained on in a step."""

    prompts: float
    """Tokens of prompts that are read."""
    drawn: float
    """Tokens behind them."""
    prompt: float
    """Tokens of one prompt."""
    row: float
    """Tokens of one answer."""

    @property
    def total(self) -> float:
        return self.prompts + self.drawn

    def copies(self, fill: int) -> tuple[float, float]:
        """How many numbers attention copies for each that there is: of queries and the output, whose rows are filled up, and of keys and
        values, of which every answer has its prompt's too."""
        more, row = fill / 2, max(self.row, 1)
        prompts = self.prompts * (1 + more / max(self.prompt, 1))
        queries, keys = prompts + self.drawn * (row + more) / row, prompts + self.drawn * (self.prompt + row + more) / row
        return queries / max(self.total, 1), keys / max(self.total, 1)


def plan_base(shape: ModelShape, dtype: str) -> Figure:
    each = BYTES[dtype]
    note = "one copy for sampling and training; buffers such as rotary tables apart"
    return Figure("base", shape.parameters * each, "bytes", f"{shape.parameters:,} parameters x {each} ({dtype})", "exact", note=note)


def plan_adapter(parameters: int, widest: int) -> Figure:
    """``widest``: the largest d_in, by which a row is longer than its numbers."""
    value = len(ROWS) * 4 * (parameters + widest)
    formula = f"{len(ROWS)} rows ({', '.join(ROWS)}) x 4 x ({parameters:,} + {widest:,})"
    transient = value + STEPPING * 4 * (parameters + widest)
    stepping = f"the upper end while Adam makes new rows, {STEPPING} more for a moment"
    note = f"{stepping}; each further adapter as much again, on a CPU without those if it is large"
    return Figure("an adapter in training", value, "bytes", formula, HERE, value, transient, note)


def plan_full(shape: ModelShape) -> Figure:
    """What a full copy takes beside the base, in Veneer's engine."""
    value = len(ROWS) * 4 * shape.parameters
    formula = f"{len(ROWS)} rows x 4 x {shape.parameters:,}"
    return Figure("a full copy in training", value, "bytes", formula, HERE, value, value + STEPPING * 4 * shape.parameters, "as an adapter")


def kept_numbers(shape: ModelShape) -> float:
    """Numbers that a training pass keeps of one token in all layers: each map's output, the inputs of those that close a block, the rotated
    queries and keys."""
    inner = [m for m in shape.maps if m.kind in ("attention", "mlp", "expert")]
    turned = sum(a.layers * (a.heads + a.kv_heads) * a.qk_dim for a in shape.attention)
    return turned + sum(m.active * (m.d_out + m.closes * m.d_in) for m in inner)


def tokens_that_fit(shape: ModelShape, passes: Passes, free: float) -> int:
    """Of a training pass whose activations take half of what is free, as the engine's trainer does it (``engine/trainer.py``)."""
    kept = kept_numbers(shape)
    numbers = (
        shape.layers * shape.hidden + 2 * kept / max(1, shape.layers) if passes.checkpointing else 1.5 * kept
    )  # with attention's copies
    return max(LEAST, int(SHARE * free / (numbers * passes.bytes)))


def plan_activations(shape: ModelShape, passes: Passes, reading: Reading, maps: Sequence[LinearMap], rank: int) -> Figure:
    """Of the training passes that run at a time, at their peak: when the last layer's backward pass is at its end, with all that the layers
    have kept and all that it has made; or at the head, where its logits are more."""
    tokens, pieces, at_once = passes.tokens_at_once(reading.total)
    queries, keys = reading.copies(passes.fill)
    copies = sum(a.layers * (a.qk_dim + a.v_dim) * (queries * a.heads + keys * a.kv_heads) for a in shape.attention)
    plain = kept_numbers(shape)
    kept, layer = plain + copies + sum(m.active * m.rank(rank) for m in maps), plain / max(1, shape.layers)
    if passes.checkpointing:
        kept = shape.layers * shape.hidden + kept / max(1, shape.layers)
    logits = 4 * (4 // passes.bytes) * min(passes.logits, tokens * shape.vocab)  # also in the base's dtype, where that is narrower
    backward, head = layer + (IN_A_LAYER + AT_THE_HEAD) * shape.hidden, AT_THE_HEAD * shape.hidden
    peak = max(backward * tokens * passes.bytes, head * tokens * passes.bytes + logits)
    gradients = 4 * adapter_parameters(maps, rank) * (pieces + 1)
    value = at_once * (kept * tokens * passes.bytes + peak + gradients)
    what = "inputs of layers, and one layer's all" if passes.checkpointing else KEPT
    formula = (
        f"{at_once} x ({tokens:,} tokens x {kept:,.0f} numbers kept ({what}) x {passes.bytes} + a layer's backward pass, or logits, "
        f"{peak:,.0f} + gradients of the adapter {gradients:,})"
    )
    low, high = (0.9 - 0.05 * passes.checkpointing, 1.1) if shape.architecture in WRITTEN_OUT else (0.7, 2.0)
    note = "in layers that autograd runs" if shape.architecture not in WRITTEN_OUT else "in layers that the engine writes out"
    return Figure("activations", value, "bytes", formula, HERE, low * value, high * value, note)


def plan_cache_token(shape: ModelShape, dtype: str) -> Figure:
    value = shape.cache_numbers * BYTES[dtype]
    formula = f"{shape.cache_numbers:,} keys and values in all layers x {BYTES[dtype]}"
    note = "windows would make it less; the engine keeps all" if any(a.window for a in shape.attention) else ""
    return Figure("cache of a token", value, "bytes", formula, "exact", note=note)


def plan_cache(shape: ModelShape, dtype: str, rows: int, row_places: int, prompts: int, prompt_places: int) -> Figure:
    """Of the completions that run together: places of each in all banks that it goes through, and of each prompt that they share (0: every
    completion has its own copy, within ``row_places``)."""
    each = shape.cache_numbers * BYTES[dtype]
    value = each * (rows * row_places + prompts * prompt_places)
    formula = f"({rows:,} completions x {row_places:,} places + {prompts:,} prompts x {prompt_places:,}) x cache of a token"
    note = "places are those of the banks that a completion outgrows one after the other, which are kept; less if few get that long"
    source = "src/veneer/engine/cache.py; checked by tests/measure/test_plan_memory.py"
    return Figure("cache", value, "bytes", formula, source, 0.6 * value, 1.25 * value, note)


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
