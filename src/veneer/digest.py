"""The content digest of an adapter: one definition for the engine that computes it and the store that checks it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.types import LoraConfig


def digest_adapter(weights: Mapping[str, NDArray[Any]], config: LoraConfig | None) -> str:
    """The digest of what an adapter does: its weights and the factor alpha / rank that scales them."""
    scale = {} if config is None else {"alpha / rank": np.array(config.alpha / config.rank)}
    return digest_arrays({**weights, **scale})


def digest_arrays(named: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256, in hex, over name, dtype, shape and little-endian bytes of each array, in name order."""
    sha = hashlib.sha256()
    for name in sorted(named):
        array = np.asarray(named[name], order="C")
        sha.update(f"{name} {_name_of(array.dtype)} {array.shape}".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


@cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """numpy makes it anew every time, which takes longer than hashing a thin adapter's matrix."""
    return dtype.name
