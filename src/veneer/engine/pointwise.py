"""What the layers of the Llama family do between two products, in torch: for a GPU, for low precision, and as the definition of
``compiled``, which does the same on a CPU in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension (https://arxiv.org/abs/1910.07467), rounded where Hugging Face's rounds: y like x, and
    1 / rms [..., 1] in float32."""
    wide = x if x.dtype == torch.float32 else x.float()
    rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = wide * rms
    return (y if y.dtype == x.dtype else y.to(x.dtype)).mul_(weight), rms


def norm_backward(x: Tensor, rms: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """dx = rms (g - xhat mean(g xhat)) with g = dy w and xhat = x rms, in float32."""
    xhat = x.float() * rms
    g = dy * weight if dy.dtype == torch.float32 else (dy * weight).float()
    inner = (g * xhat).mean(-1, keepdim=True)
    return g.addcmul_(xhat, inner, value=-1).mul_(rms).to(x.dtype)


def renorm(x: Tensor, rms: Tensor, weight: Tensor) -> Tensor:
    """The output of ``norm`` once more."""
    return (x.float() * rms).to(x.dtype).mul_(weight)


def turn(qkv: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
    """The first ``heads`` heads of qkv [line, all heads * dim], normed each with its weight [heads, dim] if there is one, and turned
    by their positions (https://arxiv.org/abs/2104.09864) in Hugging Face's half-split order: [line, heads, dim], and 1 / rms
    [line, heads, 1]. cos, sin [line, 1, dim], sin with the sign of the half that it multiplies."""
    plain, rms = qkv.view(len(qkv), -1, cos.shape[-1])[:, :heads], None
    if weight is not None:
        plain, rms = norm(plain, weight, eps)
    return rotate(plain, cos, sin), rms


def turn_backward(
    qkv: Tensor, rms: Tensor | None, weight: Tensor | None, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> Tensor:
    """Gradient of qkv from those of turned queries and keys and of values, each [line, its heads, dim]."""
    d_qk = rotate(torch.cat([dq, dk], 1), cos, -sin)
    if weight is not None:
        assert rms is not None
        plain = qkv.view(len(qkv), -1, cos.shape[-1])[:, : len(weight)]
        d_qk = norm_backward(plain, rms, weight, d_qk)
    return torch.cat([d_qk, dv], 1).view(len(qkv), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [line, heads, dim] turned; the inverse is the rotation by -sin."""
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) up (https://arxiv.org/abs/2002.05202) of [line, 2 * width], gate first: [line, width]."""
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate_up: Tensor, d_act: Tensor) -> Tensor:
    """Gradient of gate_up; d_act is used up."""
    (gate, up), width = gate_up.chunk(2, 1), d_act.shape[1]
    d_gate_up = torch.empty_like(gate_up)
    torch.mul(d_act, F.silu(gate), out=d_gate_up[:, width:])
    torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate_up[:, :width])
    return d_gate_up
