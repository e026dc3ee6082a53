"""What a piece of work costs as torch sees it: floating-point operations by its own counter, bytes of the tensors that are alive, seconds.

Torch's counters look at one thread, so engines that are to be counted are opened here: with one thread, which is the caller's. What the
counters do not see: compiled loops (``compiled.py``), which add thin adapters while sampling and attend to what is cached; and what numpy
takes.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from veneer.engine import compiled
from veneer.engine.base import Base, load_base
from veneer.engine.engine import LocalEngine
from veneer.engine.full import FullStack
from veneer.engine.lora import LoraStack
from veneer.engine.shapes import count_shape
from veneer.shapes import ModelShape

Work = Callable[[], object]
LINEAR = ("aten.mm", "aten.addmm", "aten.addmm_")
"""Products of two matrices, which are those with weights: attention multiplies stacks of matrices."""


# ---------------------------------------------------------------- operations


@dataclass(frozen=True)
class Flops:
    """Two for every multiplication and addition of a product, as torch.utils.flop_counter counts."""

    linear: float
    """Of products with weights, the base's and adapters'."""
    total: float
    """And of attention."""


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Of softmax(q k^T) v, all pairs; shapes [batch, heads, tokens, dim]."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
    return attention_flops(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
    return attention_flops(q, k, v) * 5 // 2  # q k^T again, and two products for each of the two before


def _product(_: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


class _NoModules:
    """In place of the counter's tracker of modules, which fails on a module that is called inside an autograd function."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def count_flops(work: Work) -> Flops:
    """By torch's own counter, which is told of what it does not know: attention on a CPU, and a product that is added in place."""
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.addmm_: _product,
    }
    counter = FlopCounterMode(display=False, custom_mapping=known)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with counter:
            work()
    finally:
        torch.set_num_threads(threads)
    found = {str(operation): float(flops) for operation, flops in counter.get_flop_counts()["Global"].items()}
    return Flops(sum(found.get(name, 0.0) for name in LINEAR), float(counter.get_total_flops()))


# ---------------------------------------------------------------- memory


class Alive(TorchDispatchMode):
    """Bytes of the storages that are made while it looks: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return found

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def peak_bytes(work: Work) -> int:
    """Of the tensors that the work makes, when they were most."""
    with Alive() as alive:
        work()
    return alive.most


# ---------------------------------------------------------------- engines


class _Swish(nn.Module):
    """SiLU, by its other name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


@dataclass(frozen=True)
class Opened:
    """A base in memory, to be measured."""

    engine: LocalEngine
    shape: ModelShape
    written_out: bool
    """Its adapters run in layers that the engine writes out, and not through transformers' modules."""
    base_bytes: int
    unseen_rank: int
    """Up to this rank adapters are added by compiled loops while sampling, which no counter here sees; 0: none."""


@dataclass(frozen=True)
class Bench:
    """What a study measures with (``studies/bench.py``)."""

    device: str = "cpu"

    def open(
        self, source: str | Mapping[str, Any], weights: Literal["lora", "full"], *, as_modules: bool = False, exact: bool = False
    ) -> Opened:
        """``source``: a base by name or folder; or the content of a config.json, whose weights are then random. ``as_modules``: its
        activation has another name, so that the engine takes it for none of the families whose layers it writes out; all else is the same.
        ``exact``: a base by name or folder computes in float32 on a GPU too.

        Raises:
            BaseError: there is none, or it cannot be run.
        """
        torch.set_num_threads(1)
        base = load_base(source, self.device, torch.float32 if exact else None) if isinstance(source, str) else self._random(source)
        for module in [*base.model.modules()] if as_modules else []:
            if "SiLU" in type(getattr(module, "act_fn", None)).__name__:
                module.act_fn = _Swish()
        stack = LoraStack(base) if weights == "lora" else FullStack(base)
        thin = isinstance(stack, LoraStack) and stack.thin is not None
        return Opened(
            LocalEngine(base, stack, None, 1),
            count_shape(source),
            isinstance(stack, LoraStack) and stack.fused is not None,
            sum(p.nbytes for p in base.model.parameters()),
            compiled.THIN if thin else 0,
        )

    def _random(self, config: Mapping[str, Any]) -> Base:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), dtype=torch.float32)
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        return Base(str(config["model_type"]), model, None, dtype).to(self.device)

    def shape_of(self, source: str | Mapping[str, Any]) -> ModelShape:
        """Without weights; also of models that are only known by name."""
        return count_shape(source)

    def count_flops(self, work: Work) -> Flops:
        return count_flops(work)

    def peak_bytes(self, work: Work) -> int:
        return peak_bytes(work)

    def seconds(self, work: Work) -> float:
        """Until it is done, on the device too."""
        self._wait()
        begun = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
