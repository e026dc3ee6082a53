"""Planned memory against the bytes that the engine holds: every tensor that is alive, counted when torch makes it and when it goes."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.engine import Base, FullEngine, LoraEngine, load_base
from veneer.engine.cache import capacity_for
from veneer.engine.engine import LocalEngine
from veneer.engine.shapes import count_shape
from veneer.measure.plan import memory
from veneer.measure.plan.memory import Passes
from veneer.shapes import ModelShape, adapter_parameters
from veneer.types import AdamParams, Datum, LoraConfig, SamplingParams


class Alive(TorchDispatchMode):
    """Bytes of storages that were made while it looks, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or any(storage is known for known in self._known):
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return count_shape("nano")
