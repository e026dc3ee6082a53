"""The frozen base: any Hugging Face causal language model, loaded once and never written to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from veneer.assets import resolve_base
from veneer.engine.attention import IMPLEMENTATION, Ragged, Row
from veneer.engine.flat import TILE, Flat
from veneer.types import BaseError, in_one_line


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in name order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


T = TypeVar("T")

PROBE = 24
"""Tokens of the pass that checks, on loading, that a model gives the logits that transformers gives."""
PROBE_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference of a logit, in units of the largest logit."""


class Head(Protocol):
    """Hidden states to logits, with whatever adapts the unembedding."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def frozen_weight(self) -> Tensor | None:
        """[vocab, d] where logits are hidden states times this, and no gradient reaches it."""
        ...

    def __call__(self, hidden: Tensor, start: int) -> Tensor:
        """Float32 logits [n, vocab] of the wanted hidden states from number ``start`` on, [n, d]."""
        ...


class _Weights(Mapping[str, NDArray[np.float32]]):
    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        array = self._parameters[name].detach().float().cpu().numpy()
        array.flags.writeable = False  # on a CPU it is the base's own memory
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class Base(nn.Module):
    """A Hugging Face model that is frozen, run over tokens in one line: final hidden states, and logits from those."""

    def __init__(
        self, base_id: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None = None
    ) -> None:
        """The base's identity is the digest of its parameters as given; ``dtype`` is what it computes in.

        Raises:
            BaseError: the model's attention or unembedding is of a kind that the engine cannot run.
        """
        super().__init__()
        self.base_id, self.tokenizer = base_id, tokenizer
        self.model = model.eval().requires_grad_(False)
        self._any_parameter = next(model.parameters())  # transformers walks the whole model to tell its device
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 2**31
        self.layers: int = config.num_hidden_layers
        self.window: int | None = getattr(config, "sliding_window", None)
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache_numbers = 2 * self.layers * heads * dim
        """Keys and values of one token in all layers."""
        self.logit_scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = config.eos_token_id if eos is None else eos
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self.digest = self.measure_digest()
        for parameter in self.model.parameters() if dtype is not None else ():
            parameter.data = parameter.data.to(
                dtype
            )  # not model.to(dtype): rotary frequencies and other buffers stay as precise as they are
        self._take_over_attention()

    @property
    def device(self) -> torch.device:
        return self._any_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        return self._any_parameter.dtype

    @property
    def head(self) -> nn.Module:
        """The unembedding."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise BaseError(f"{type(self.model).__name__} has no unembedding: it is no causal language model")
        return head

    def decode(self, tokens: list[int]) -> str:
        """Text with special tokens spelled out; needs the tokenizer."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def weights(self) -> Mapping[str, NDArray[np.float32]]:
        """The parameters by name, each read as float32 when it is asked for, and not to be written to."""
        return _Weights(dict(self.model.named_parameters(remove_duplicate=False)))  # a tied unembedding has its own name too

    def measure_digest(self) -> str:
        return tensor_digest(self.model.named_parameters())

    def forward(self, flat: Flat, finish: Callable[[Tensor, Head], T]) -> T:
        """``finish`` of the wanted hidden states [n, d] and the head."""
        return finish(self.hidden(flat), PlainHead(self))

    def hidden(self, flat: Flat) -> Tensor:
        """[n, d]: the final hidden states, normed, at the wanted places."""
        line = {"input_ids": flat.tokens[None], "position_ids": flat.positions[None]}
        return self.model.base_model(**line, use_cache=False, layout=flat.layout).last_hidden_state[0][flat.wanted]

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab]: the unembedding alone, of hidden states [n, d]."""
        rows = len(hidden)
        return self.head(hidden if rows >= TILE else F.pad(hidden, (0, 0, 0, TILE - rows)))[:rows]

    def shaped(self, raw: Tensor) -> Tensor:
        """Float32 logits, scaled and capped as the model's configuration says."""
        logits = raw.float()
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    @property
    def plain_weight(self) -> Tensor | None:
        """The unembedding [vocab, d] where logits are hidden states times this and nothing else."""
        head = self.head
        if not isinstance(head, nn.Linear) or head.bias is not None or self.logit_scale != 1 or self.logit_softcap is not None:
            return None
        return head.weight

    @torch.no_grad()
    def _take_over_attention(self) -> None:
        """Let the model ask our layouts what sees what, and check its logits against transformers' own run of it."""
        kind, text = type(self.model).__name__, self.model.config.get_text_config()
        odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if odd:
            raise BaseError(f"{kind} has layers of the kind {sorted(odd)[0]!r}; only plain and sliding attention can be run")
        length = min(PROBE, self.context_length)
        ids = torch.arange(length, device=self.device) * 7 % self.vocab_size
        wanted = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        layout = Ragged([Row(0, length)], self.device, self.window)
        flat = Flat(ids, torch.arange(length, device=self.device), layout, [], torch.arange(length, device=self.device))
        try:
            self.model.set_attn_implementation(IMPLEMENTATION)
            found = self.forward(flat, lambda hidden, head: head(hidden, 0))
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise BaseError(f"{kind} cannot be run over tokens in one line ({in_one_line(error)})") from error
        gap = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
        if not gap <= PROBE_LIMITS[self.dtype]:
            raise BaseError(f"{kind} gives other logits here than in transformers (by {gap:.1e} of the largest): it cannot be served")


@dataclass(frozen=True)
class PlainHead:
    """The base's own unembedding."""

    base: Base

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def frozen_weight(self) -> Tensor | None:
        weight = self.base.plain_weight
        return None if weight is None or weight.requires_grad else weight

    def __call__(self, hidden: Tensor, start: int) -> Tensor:
        return self.base.shaped(self.base.raw_logits(hidden))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> Base:
    """Load a base by hub name or folder; ``nano`` is bundled. float32 on CPU and bfloat16 on a GPU unless said otherwise.

    Raises:
        BaseError: it cannot be found or read, or is not a causal language model.
    """
    device = default_device() if device in (None, "auto") else device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise BaseError(f"device {device!r}: there are cpu, cuda and auto")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise BaseError(f"device {device!r}: there is no such CUDA device here; use cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    model, tokenizer = read_model(name)
    return Base(Path(name).name if Path(resolve_base(name)).is_dir() else name, model, tokenizer, dtype).to(device)


def read_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer as they are on the disk, in the dtype that they are stored in, on the CPU.

    Raises:
        BaseError: it cannot be found or read, or is not a causal language model.
    """
    source = resolve_base(name)
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise BaseError(f"base {name!r}: there is no such folder")
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if missing := sorted(loading["missing_keys"]):  # transformers would make them up
            raise ValueError(f"{missing[0]} has no weights")
        if not tokenizer.encode("a1", add_special_tokens=False):  # transformers would take an empty one
            raise ValueError("it has no tokenizer")
    except Exception as error:  # transformers, safetensors, json and the hub each raise their own
        raise BaseError(
            f"base {name!r} cannot be loaded ({in_one_line(error)}); give a Hugging Face name or a folder with "
            f"config.json, *.safetensors and a tokenizer"
        ) from error
    return model, tokenizer
