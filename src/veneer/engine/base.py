"""The frozen base: any Hugging Face causal language model, loaded once and never written to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from veneer.assets import resolve_base
from veneer.types import BaseError, in_one_line


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in name order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Base(nn.Module):
    """A Hugging Face model that is frozen, with the two calls that the engine needs: next-token logits and chosen logits."""

    def __init__(
        self, base_id: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | None = None
    ) -> None:
        """The base's identity is the digest of its parameters as given; ``dtype`` is what it computes in."""
        super().__init__()
        self.base_id, self.tokenizer = base_id, tokenizer
        self.model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 2**31
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = config.eos_token_id if eos is None else eos
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self.digest = self.measure_digest()
        for parameter in self.model.parameters() if dtype is not None else ():
            parameter.data = parameter.data.to(
                dtype
            )  # not model.to(dtype): rotary frequencies and other buffers stay as precise as they are
        self.head_is_plain = self._measure_head()

    @property
    def device(self) -> torch.device:
        return self.model.device

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

    def measure_digest(self) -> str:
        return tensor_digest(self.model.named_parameters())

    def forward(self, input_ids: Tensor, selected: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Float32 logits.

        Args:
            input_ids: [rows, columns].
            selected: bool [rows, columns]: the positions whose logits are wanted; None means the last one of each row.

        Returns:
            [n_selected, vocab] in row-major order, or [rows, vocab].
        """
        if selected is None:
            logits = self.model(input_ids=input_ids, logits_to_keep=1, **kwargs).logits[:, -1]
        elif self.head_is_plain:
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
            logits = self.head(hidden[selected])
        else:
            logits = self.model(input_ids=input_ids, use_cache=False, **kwargs).logits[selected]
        return logits.float()

    @torch.no_grad()
    def _measure_head(self) -> bool:
        """Whether logits are just head(hidden). Some models scale or cap them (Gemma 2, Granite, Cohere): those take the long way."""
        probe = torch.tensor([[0, 1, 2]], device=self.device)
        hidden = self.model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        return torch.equal(self.head(hidden), self.model(input_ids=probe, use_cache=False).logits)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> Base:
    """Load a base by hub name or folder; ``nano`` is bundled. float32 on CPU and bfloat16 on a GPU unless said otherwise.

    Raises:
        BaseError: it cannot be found or read, or is not a causal language model.
    """
    device = default_device() if device in (None, "auto") else device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BaseError(f"device {device!r}: there is no CUDA device here; use cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
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
    return Base(Path(name).name if Path(source).is_dir() else name, model, tokenizer, dtype).to(device)
