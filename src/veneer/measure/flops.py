"""Floating-point operations of matrix products: a multiplication and an addition each. Norms, activations and the optimizer, a few in a
hundred of a small model and fewer of a large one, are not counted, and neither are they by torch's own counter.

For a linear map of W = d_in d_out products a token, full fine-tuning makes 3 W (the output, the gradient of the input, that of the
weights); with a frozen base the last is not made, and an adapter of rank r adds 3 r (d_in + d_out): 2 W + 3 r P1 against 3 W ("LoRA Without
Regret", section on compute, https://thinkingmachines.ai/blog/lora/). Here the gradient of an input that leads to nothing trainable is not
counted either: that of the first layer's queries, keys and values, and of all below the first adapted map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.shapes import LinearMap, ModelShape


@dataclass(frozen=True)
class Trained:
    """What is trained: an adapter of one rank on some maps, or everything."""

    maps: Sequence[LinearMap] = ()
    rank: int = 0
    """0: all weights of the model, without an adapter."""

    def adds(self, m: LinearMap) -> int:
        """Products a token of the adapter on this map in a forward pass."""
        return m.active * m.rank(self.rank) * (m.d_in + m.d_out) if self.rank and m in self.maps else 0

    def wants_input(self, m: LinearMap) -> bool:
        """Whether the gradient of the map's input leads to something that is trained."""
        return not self.rank or m.stage > min(a.stage for a in self.maps)


FULL = Trained()


def forward_flops(shape: ModelShape, tokens: float, head_tokens: float | None = None, trained: Trained = FULL) -> float:
    """Of the linear maps in a forward pass over ``tokens``, with the adapter's own; ``head_tokens``: of how many the logits are made, None:
    of all."""
    return sum(2.0 * _tokens(m, tokens, head_tokens) * (m.products + trained.adds(m)) for m in shape.maps)


def backward_flops(shape: ModelShape, tokens: float, head_tokens: float | None = None, trained: Trained = FULL) -> float:
    """Of the linear maps in a backward pass."""
    total = 0.0
    for m in shape.maps:
        through = trained.wants_input(m)
        each = m.products * (through + (not trained.rank))
        if trained.rank and m in trained.maps:  # of B and its input: twice d_out; of A, and of the input if that is wanted
            each += m.active * m.rank(trained.rank) * (2 * m.d_out + m.d_in * (1 + through))
        total += 2.0 * _tokens(m, tokens, head_tokens) * each
    return total


def train_flops(
    shape: ModelShape, tokens: float, head_tokens: float | None = None, trained: Trained = FULL, *, checkpointing: bool = False
) -> float:
    """Of the linear maps in a training pass; ``checkpointing``: the layers' forward pass is made twice (the head's is not)."""
    again = forward_flops(shape, tokens, 0.0, trained) if checkpointing else 0.0
    both = forward_flops(shape, tokens, head_tokens, trained) + backward_flops(shape, tokens, head_tokens, trained)
    return both + again


def _tokens(m: LinearMap, tokens: float, head_tokens: float | None) -> float:
    return tokens if head_tokens is None or m.kind != "unembedding" else head_tokens


def attention_flops(shape: ModelShape, length: int, *, causal: bool = True) -> float:
    """Of the products of queries with keys and of their weights with values, forward, in a sequence of ``length`` tokens. ``causal``: pairs
    that a query sees; otherwise all pairs, which torch's counter takes. Backward it is twice as much."""
    total = 0.0
    for layers in shape.attention:
        pairs = length * length if not causal else _seen(length, layers.window)
        total += 2.0 * layers.layers * layers.heads * (layers.qk_dim + layers.v_dim) * pairs
    return total


def _seen(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    near = min(length, window or length)
    return near * (near + 1) // 2 + (length - near) * near


def decode_attention_flops(shape: ModelShape, prompt: int, drawn: int) -> float:
    """Of attention while ``drawn`` tokens are drawn behind a prompt, one at a time."""
    return attention_flops(shape, prompt + drawn) - attention_flops(shape, prompt)


def formula_ratio(maps: Sequence[LinearMap], adapted: Sequence[LinearMap], rank: int) -> float:
    """(2 W + 3 r P1) / 3 W of a training pass, over ``maps``: without attention, and with every input's gradient."""
    adapter = Trained(adapted, rank)
    frozen = sum(m.products for m in maps)
    return (2 * frozen + 3 * sum(adapter.adds(m) for m in maps)) / (3 * frozen)


def break_even_rank(maps: Sequence[LinearMap], adapted: Sequence[LinearMap]) -> float:
    """The rank from which on an adapter's training pass costs more than full fine-tuning's: W / (3 P1)."""
    return sum(m.products for m in maps) / (3 * sum(m.active * (m.d_in + m.d_out) for m in adapted))


@dataclass(frozen=True)
class StepFlops:
    """Of one reinforcement-learning step, or, without sampling, of one step of supervised training."""

    prompts: float
    """Reading prompts before sampling."""
    sampling: float
    old_logprobs: float
    """A forward pass over the episodes before training, where a program makes one."""
    training: float
    attention: float
    """Attention's own products in all of these."""

    @property
    def linear(self) -> float:
        return self.prompts + self.sampling + self.old_logprobs + self.training

    @property
    def total(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class StepWork:
    """What a step reads, draws and trains on."""

    groups: int
    group_size: int
    prompt_tokens: float
    drawn_tokens: float
    """An episode, on average."""
    longest: float
    """Tokens drawn of the longest: until then the others of its wave have ended, and a step goes on."""
    old_logprobs: bool = False
    """Whether the trainer computes the sampler's log-probabilities again; Veneer's sampler brings them."""
    prompts_once: bool = True
    """Whether a group's prompt is read once, for sampling and for training, as Veneer does, or once an episode."""
    samples: bool = True
    """False: supervised training, in which the answers are given."""

    @property
    def episodes(self) -> int:
        return self.groups * self.group_size

    @property
    def drawn(self) -> float:
        return self.episodes * self.drawn_tokens

    @property
    def prompts(self) -> float:
        """Tokens of prompts that are read."""
        return (self.groups if self.prompts_once else self.episodes) * self.prompt_tokens


def step_flops(shape: ModelShape, work: StepWork, trained: Trained = FULL, *, checkpointing: bool = False) -> StepFlops:
    """Logits are made where a token is drawn or trained on, not in prompts."""
    tokens = work.prompts + work.drawn
    sampled = forward_flops(shape, work.drawn, None, trained) if work.samples else 0.0
    prompts = forward_flops(shape, work.prompts, 0.0, trained) if work.samples else 0.0
    old = forward_flops(shape, tokens, work.drawn, trained) if work.old_logprobs else 0.0
    prompt, drawn = round(work.prompt_tokens), round(work.drawn_tokens)
    reading = attention_flops(shape, prompt) * (work.groups if work.prompts_once else work.episodes)
    drawing = decode_attention_flops(shape, prompt, drawn) * work.episodes
    passes = 3 + work.samples + work.old_logprobs + checkpointing
    training = train_flops(shape, tokens, work.drawn, trained, checkpointing=checkpointing)
    return StepFlops(prompts, sampled, old, training, passes * (reading + drawing))
