"""The layers of the Llama family, written out: fewer and larger products than Hugging Face's modules, and a backward pass
that knows that the base is frozen.

A layer is RMSNorm, attention with rotary positions (and, in Qwen 3, normed heads), RMSNorm, SwiGLU. Queries, keys and
values share one product, gate and up another: their weights are joined in memory, and the modules' parameters become views
into the joined ones, so nothing is held twice. ``FusedModel.of`` compares the result with Hugging Face's own run of the
model and returns None where they differ: then the modules themselves are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.engine import compiled, pointwise
from veneer.engine.attention import Layout, Ragged, Row, Score
from veneer.engine.base import PROBE, Base
from veneer.engine.cache import StepLayout
from veneer.engine.decoding import Steps
from veneer.engine.flat import Flat
from veneer.engine.thin import RowWise
from veneer.engine.update import Active, Lows, Updates, propagate

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference to Hugging Face's hidden states, in units of the largest."""
FIXED_TURNS = {"default", "linear", "llama3", "yarn"}
"""Rotary positions that depend on the position alone, not on the longest of the pass."""
LONGEST_TABLE = 2**17
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Joined:
    """Linear maps of one input as one product, known by the name of the first. Their parameters become views of the joined weight."""

    def __init__(self, named: Sequence[tuple[str, nn.Linear]]) -> None:
        self.names = [name for name, _ in named]
        self.weight = torch.cat([m.weight for _, m in named]).detach().T.contiguous()
        """[d_in, d_out]: in this order a product of few rows is up to a third faster."""
        self.bias = None if named[0][1].bias is None else torch.cat([m.bias for _, m in named]).detach()
        at = 0
        for _, module in named:
            stop = at + module.out_features
            module.weight.data = self.weight[:, at:stop].T
            if self.bias is not None:
                module.bias.data = self.bias[at:stop]
            at = stop

    def forward(self, x: Tensor, active: Updates, residual: Tensor | None = None) -> tuple[Tensor, Lows]:
        """[line, d_in] -> [line, d_out], plus ``residual``; and what ``backward`` needs."""
        y = torch.mm(x, self.weight) if residual is None else torch.addmm(residual, x, self.weight)
        if self.bias is not None:
            y += self.bias
        return y, active.add(x, y, self.names[0])

    def backward(self, x: Tensor, dy: Tensor, lows: Lows, active: Active, *, input_too: bool = True) -> Tensor | None:
        """Gradients of the adapters, and of x if wanted."""
        dx = torch.mm(dy, self.weight.T) if input_too else None
        propagate(x, dy, dx, lows, active, self.names[0])
        return dx


@dataclass
class Norm:
    weight: Tensor
    eps: float


@dataclass
class HeadNorm:
    """Of queries and keys, where a model has one."""

    weight: Tensor | None
    """[heads, dim], queries' heads first."""
    eps: float


@dataclass
class Kept:
    """What the backward pass of a layer needs."""

    x: Tensor
    rms1: Tensor
    qkv_lows: Lows
    qkv: Tensor
    """Queries and keys before their norms and rotation."""
    qk_rms: Tensor | None
    leaves: tuple[Tensor, Tensor, Tensor]
    """Queries, keys, values as attention read them; roots of its own small graph."""
    attended: Tensor
    o_lows: Lows
    middle: Tensor
    rms2: Tensor
    gate_up_lows: Lows
    gate_up: Tensor
    act: Tensor
    down_lows: Lows


class FusedLayer:
    def __init__(self, prefix: str, layer: Any, score: Score) -> None:
        """``score``: how the layer's own code asks for attention."""
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Joined([(f"{prefix}.self_attn.{n}", getattr(attention, n)) for n in ("q_proj", "k_proj", "v_proj")])
        self.o = Joined([(f"{prefix}.self_attn.o_proj", attention.o_proj)])
        self.gate_up = Joined([(f"{prefix}.mlp.{n}", getattr(mlp, n)) for n in ("gate_proj", "up_proj")])
        self.down = Joined([(f"{prefix}.mlp.down_proj", mlp.down_proj)])
        self.norm1, self.norm2 = (
            Norm(n.weight.detach(), n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.dim: int = attention.head_dim
        self.heads, self.kv_heads = (m.out_features // self.dim for m in (attention.q_proj, attention.k_proj))
        self.head_norm = HeadNorm(None, 0)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm, attention.k_norm
            weight = torch.cat([q.weight.detach().expand(self.heads, -1), k.weight.detach().expand(self.kv_heads, -1)])
            self.head_norm = HeadNorm(weight, q.variance_epsilon)
        self.score = score
        self.ops = compiled if compiled.runs_on(self.qkv.weight) else pointwise

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, active: Updates, *, keep: bool) -> tuple[Tensor, Kept | None]:
        """[line, d] -> [line, d]."""
        ops = self.ops
        normed, rms1 = ops.norm(x, self.norm1.weight, self.norm1.eps)
        qkv, qkv_lows = self.qkv.forward(normed, active)
        turned, qk_rms = ops.turn(qkv, self.head_norm.weight, self.head_norm.eps, cos, sin, self.heads + self.kv_heads)
        q, k, v = turned[:, : self.heads], turned[:, self.heads :], qkv.view(len(x), -1, self.dim)[:, self.heads + self.kv_heads :]
        leaves = (q, k, v)
        if keep:
            with torch.enable_grad():
                leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
                attended = layout.attend(*leaves, self.score).reshape(len(x), -1)
        else:
            attended = layout.attend(q, k, v, self.score).reshape(len(x), -1)
        middle, o_lows = self.o.forward(attended.detach(), active, residual=x)
        normed2, rms2 = ops.norm(middle, self.norm2.weight, self.norm2.eps)
        gate_up, gate_up_lows = self.gate_up.forward(normed2, active)
        act = ops.swiglu(gate_up)
        y, down_lows = self.down.forward(act, active, residual=middle)
        if not keep:
            return y, None
        return y, Kept(x, rms1, qkv_lows, qkv, qk_rms, leaves, attended, o_lows, middle, rms2, gate_up_lows, gate_up, act, down_lows)

    def backward(self, dy: Tensor, kept: Kept, cos: Tensor, sin: Tensor, active: Active, *, input_too: bool) -> Tensor | None:
        """Gradients of the layer's adapters, and of its input if wanted."""
        ops, norm1, norm2 = self.ops, self.norm1, self.norm2
        d_act = self.down.backward(kept.act, dy, kept.down_lows, active)
        assert d_act is not None
        d_gate_up = ops.swiglu_backward(kept.gate_up, d_act)
        normed2 = ops.renorm(kept.middle, kept.rms2, norm2.weight)
        d_normed2 = self.gate_up.backward(normed2, d_gate_up, kept.gate_up_lows, active)
        assert d_normed2 is not None
        d_middle = ops.norm_backward(kept.middle, kept.rms2, norm2.weight, d_normed2).add_(dy)
        d_attended = self.o.backward(kept.attended.detach(), d_middle, kept.o_lows, active)
        dq, dk, dv = torch.autograd.grad(kept.attended, kept.leaves, d_attended)
        d_qkv = ops.turn_backward(kept.qkv, kept.qk_rms, self.head_norm.weight, cos, sin, dq, dk, dv)
        normed = ops.renorm(kept.x, kept.rms1, norm1.weight)
        d_normed = self.qkv.backward(normed, d_qkv, kept.qkv_lows, active, input_too=input_too)
        if d_normed is None:
            return None
        return ops.norm_backward(kept.x, kept.rms1, norm1.weight, d_normed).add_(d_middle)


@dataclass
class FusedModel:
    base: Base
    embedding: Tensor
    norm: Norm
    turns: tuple[Tensor, Tensor] | None = None
    """cos and sin by position [context, 1, dim]."""
    layers: list[FusedLayer] = field(default_factory=list[FusedLayer])
    steps: Steps | None = None

    @property
    def products(self) -> list[list[str]]:
        """Names of the linear maps that share a product."""
        return [joined.names for layer in self.layers for joined in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    @classmethod
    def of(cls, base: Base) -> FusedModel | None:
        """The fused form of a model, or None if it is not of the family."""
        body: Any = base.model.base_model
        layers = getattr(body, "layers", None)
        if layers is None or not all(_is_of_the_family(layer) for layer in layers):
            return None
        prefix = next(name for name, module in base.model.named_modules() if module is layers)
        embedding: Any = base.model.get_input_embeddings()
        model = cls(base, embedding.weight.detach(), Norm(body.norm.weight.detach(), body.norm.variance_epsilon))
        with torch.no_grad():
            probe = _probe(base)
            noted = probe.layout = _Noting(probe.layout)
            wanted = base.hidden(probe)
            if any(score.softcap is not None for score in noted.scores.values()):
                return None
            model.layers = [FusedLayer(f"{prefix}.{i}", layer, noted.scores[i]) for i, layer in enumerate(layers)]
            model.keep_turns()
            found = model.hidden(_probe(base), Active([], []))
        gap = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
        return model if gap <= LIMITS[base.dtype] else None

    def _start(self, flat: Flat) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [line, d]; cos and sin [line, 1, dim] for ``rotate``."""
        x = F.embedding(flat.tokens, self.embedding)
        if self.turns is not None:
            cos, sin = self.turns
            return x, cos.index_select(0, flat.positions), sin.index_select(0, flat.positions)
        return x, *self._turns(x, flat.positions)

    def _turns(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        body: Any = self.base.model.base_model
        cos, sin = body.rotary_emb(x[None], positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], -1)

    def keep_turns(self) -> None:
        """Tabulate cos and sin of every position, where they depend on nothing else and the table is small."""
        config = self.base.model.config
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in FIXED_TURNS and self.base.context_length <= LONGEST_TABLE:
            places = torch.arange(self.base.context_length, device=self.base.device)
            self.turns = self._turns(self.embedding[:1], places)
            alike = len({(layer.qkv.weight.shape, layer.gate_up.weight.shape, layer.heads) for layer in self.layers}) == 1
            if compiled.runs_on(self.embedding) and alike:
                self.steps = Steps(self, self.turns)

    def hidden(self, flat: Flat, updates: Updates) -> Tensor:
        """[n, d]: the final hidden states, normed, at the wanted places. Those of a decoding step are good until the next one."""
        if self.steps is not None and isinstance(flat.layout, StepLayout) and isinstance(updates, RowWise):
            return self.steps.hidden(flat, flat.layout, updates)
        x, cos, sin = self._start(flat)
        for layer in self.layers:
            x, _ = layer.forward(x, cos, sin, flat.layout, updates, keep=False)
        if len(flat.wanted) < len(x):
            x = x.index_select(0, flat.wanted)
        return self.layers[0].ops.norm(x, self.norm.weight, self.norm.eps)[0]

    def train(self, flat: Flat, active: Active, finish: Callable[[Tensor], Tensor], gradient_checkpointing: bool) -> None:
        """Run forward, back-propagate the loss that ``finish`` makes of the wanted hidden states, add up the adapters' gradients."""
        with torch.no_grad():
            x, cos, sin = self._start(flat)
            kept: list[Kept | Tensor] = []
            for layer in self.layers:
                y, saved = layer.forward(x, cos, sin, flat.layout, active, keep=not gradient_checkpointing)
                kept.append(x if saved is None else saved)
                x = y
            last = x[flat.wanted]
            hidden, rms = self.layers[0].ops.norm(last, self.norm.weight, self.norm.eps)
        leaf = hidden.requires_grad_()
        with torch.enable_grad():
            loss = finish(leaf)
        loss.backward()
        assert leaf.grad is not None
        with torch.no_grad():
            dx = torch.zeros_like(x).index_add_(0, flat.wanted, self.layers[0].ops.norm_backward(last, rms, self.norm.weight, leaf.grad))
            for number in reversed(range(len(self.layers))):
                saved, layer = kept.pop(), self.layers[number]
                if isinstance(saved, Tensor):
                    _, saved = layer.forward(saved, cos, sin, flat.layout, active, keep=True)
                assert saved is not None
                assert dx is not None
                dx = layer.backward(dx, saved, cos, sin, active, input_too=number > 0)


class _Noting:
    """A layout that notes how each layer asks for attention: scale and window are the modules' own."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.scores = layout, dict[int, Score]()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score: Score) -> Tensor:
        self.scores[score.layer] = score
        return self.layout.attend(q, k, v, score)


def _probe(base: Base) -> Flat:
    length = min(PROBE, base.context_length)
    places = torch.arange(length, device=base.device)
    return Flat(places * 5 % base.vocab_size, places, Ragged([Row(0, length)], base.device, base.window), [], places)


def _is_of_the_family(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    if set(parts) != LAYER:
        return False
    attention, mlp = (dict(parts[n].named_children()) for n in ("self_attn", "mlp"))
    linears = [m for group in (attention, mlp) for n, m in group.items() if n.endswith("_proj")]
    return (
        set(attention) in (ATTENTION, ATTENTION | HEAD_NORMS)
        and set(mlp) == MLP
        and "SiLU" in type(mlp["act_fn"]).__name__
        and all(type(m) is nn.Linear for m in linears)
        and all(hasattr(parts[n], "variance_epsilon") for n in ("input_layernorm", "post_attention_layernorm"))
    )
