"""A base of another width with weights that nobody has trained, for what is claimed of widths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from veneer.engine.base import read_model
from veneer.types import BaseError, in_one_line


def write_random(base: str, folder: Path, width: int, layers: int, seed: int) -> None:
    """Fill a folder with a model of the base's architecture, head width, ratio of MLP to width and tokenizer. Weights are drawn as the
    architecture draws them.

    Raises:
        BaseError: the base cannot be read, or its architecture cannot be had in this width.
    """
    model, tokenizer = read_model(base)
    config: Any = copy.deepcopy(model.config)
    try:
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        groups = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        heads = width // dim
        config.intermediate_size = config.intermediate_size * width // config.hidden_size
        config.hidden_size, config.num_hidden_layers = width, layers
        config.num_attention_heads, config.num_key_value_heads = heads, max(heads // groups, 1)
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # every architecture checks its configuration in its own way
        raise BaseError(f"base {base!r}: there is none of {width} and {layers} layers of its kind ({in_one_line(error)})") from error
    drawn.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
