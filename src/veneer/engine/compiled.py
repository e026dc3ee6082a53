"""What a CPU does in float32 between two matrix products, compiled by numba: one walk over memory each, where torch takes five to
ten operations of some microseconds. The functions with the names of ``pointwise`` do what those do.

Every row is computed by itself, in the same order whatever the other rows are. The loops release the interpreter lock, so
that passes run side by side. Their machine code is kept beside this file, or in numba's own folder if that is read-only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from veneer.engine.attention import Score

_HOW: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
"""Sums may be reordered, but NaN and infinity stay what they are."""


def _loop(function: Any) -> Any:
    """Without numba's memory management (_nrt) a loop cannot allocate, which is why it is handed room to work in, and does not count
    references to every slice, which took a fifth of the time."""
    options: dict[str, Any] = {"nogil": True, "_nrt": False}
    try:
        return njit(**_HOW, **options, cache=True)(function)
    except RuntimeError:  # there is no folder that numba may write to: compiled anew by every process
        return njit(**_HOW, **options)(function)


def _inner(function: Any) -> Any:
    return njit(inline="always", **_HOW)(function)


THIN = 16
"""Rank of the thickest adapter that is added row by row; above, a product over all rows of an adapter is faster."""
_one, _zero, _least = np.float32(1), np.float32(0), np.float32(-3e38)


def _room(*shape: int) -> np.ndarray:
    return np.empty(shape, np.float32)


def runs_on(x: Tensor) -> bool:
    """Whether this is work for the functions here."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


@_inner
def _exp(x):
    """e^x to about 2 ulp, 0 below -87: Cephes' polynomial (https://www.netlib.org/cephes/), without a branch."""
    n = np.floor(max(min(x, np.float32(88)), np.float32(-87)) * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _one
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return _zero if x < np.float32(-87) else p * power


@_inner
def _copy(x, y):
    for j in range(x.shape[0]):
        y[j] = x[j]


@_inner
def _dot(x, y):
    total = _zero
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@_inner
def _inverse_rms(x, eps):
    return _one / np.float32(math.sqrt(_dot(x, x) / np.float32(x.shape[0]) + eps))


# ---------------------------------------------------------------- norms


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rms = torch.empty_like(x), x.new_empty(len(x), 1)
    _norm(x.numpy(), weight.numpy(), np.float32(eps), y.numpy(), rms.numpy())
    return y, rms


@_loop
def _norm(x, weight, eps, y, rms):
    for i in range(x.shape[0]):
        xi, yi = x[i], y[i]
        r = _inverse_rms(xi, eps)
        rms[i, 0] = r
        for j in range(xi.shape[0]):
            yi[j] = xi[j] * r * weight[j]


def norm_backward(x: Tensor, rms: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    _norm_backward(x.numpy(), rms.numpy(), weight.numpy(), dy.numpy(), dx.numpy())
    return dx


@_loop
def _norm_backward(x, rms, weight, dy, dx):
    for i in range(x.shape[0]):
        _norm_slope(x[i], rms[i, 0], weight, dy[i], dx[i])


@_inner
def _norm_slope(x, r, weight, dy, dx):
    inner = _zero
    for j in range(x.shape[0]):
        inner += dy[j] * weight[j] * x[j]
    inner *= r * r / np.float32(x.shape[0])
    for j in range(x.shape[0]):
        dx[j] = (dy[j] * weight[j] - x[j] * inner) * r


def renorm(x: Tensor, rms: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _renorm(x.numpy(), rms.numpy(), weight.numpy(), y.numpy())
    return y


@_loop
def _renorm(x, rms, weight, y):
    for i in range(x.shape[0]):
        xi, yi, r = x[i], y[i], rms[i, 0]
        for j in range(xi.shape[0]):
            yi[j] = xi[j] * r * weight[j]


# ---------------------------------------------------------------- heads


def turn(qkv: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
    line, dim = len(qkv), cos.shape[-1]
    turned, rms = qkv.new_empty(line, heads, dim), None if weight is None else qkv.new_empty(line, heads, 1)
    tables = cos.view(line, dim).numpy(), sin.view(line, dim).numpy()
    if weight is None or rms is None:
        _turn(qkv.numpy(), *tables, turned.numpy())
    else:
        _turn_normed(qkv.numpy(), weight.numpy(), np.float32(eps), *tables, turned.numpy(), rms.numpy(), _room(dim))
    return turned, rms


@_inner
def _rotate(x, cos, sin, y):
    half = x.shape[0] // 2
    for j in range(half):
        y[j] = x[j] * cos[j] + x[j + half] * sin[j]
    for j in range(half):
        y[j + half] = x[j + half] * cos[j + half] + x[j] * sin[j + half]


@_loop
def _turn(qkv, cos, sin, turned):
    line, heads, dim = turned.shape
    for i in range(line):
        for h in range(heads):
            _rotate(qkv[i, h * dim : (h + 1) * dim], cos[i], sin[i], turned[i, h])


@_loop
def _turn_normed(qkv, weight, eps, cos, sin, turned, rms, normed):
    line, heads, dim = turned.shape
    for i in range(line):
        for h in range(heads):
            x, w = qkv[i, h * dim : (h + 1) * dim], weight[h]
            r = _inverse_rms(x, eps)
            rms[i, h, 0] = r
            for j in range(dim):
                normed[j] = x[j] * r * w[j]
            _rotate(normed, cos[i], sin[i], turned[i, h])


def turn_backward(
    qkv: Tensor, rms: Tensor | None, weight: Tensor | None, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> Tensor:
    d_qkv, shape = torch.empty_like(qkv), (len(qkv), cos.shape[-1])
    grads = [d.contiguous().numpy() for d in (dq, dk, dv)]
    tables = cos.view(shape).numpy(), sin.view(shape).numpy()
    if weight is None or rms is None:
        _turn_backward(*tables, *grads, d_qkv.numpy())
    else:
        _turn_normed_backward(qkv.numpy(), rms.numpy(), weight.numpy(), *tables, *grads, d_qkv.numpy(), _room(cos.shape[-1]))
    return d_qkv


@_inner
def _rotate_back(dy, cos, sin, dx):
    half = dy.shape[0] // 2
    for j in range(half):
        dx[j] = dy[j] * cos[j] - dy[j + half] * sin[j]
    for j in range(half):
        dx[j + half] = dy[j + half] * cos[j + half] - dy[j] * sin[j + half]


@_loop
def _turn_backward(cos, sin, dq, dk, dv, d_qkv):
    (line, heads, dim), kv_heads = dq.shape, dk.shape[1]
    for i in range(line):
        for h in range(heads):
            _rotate_back(dq[i, h], cos[i], sin[i], d_qkv[i, h * dim : (h + 1) * dim])
        for h in range(kv_heads):
            at = (heads + h) * dim
            _rotate_back(dk[i, h], cos[i], sin[i], d_qkv[i, at : at + dim])
            at += kv_heads * dim
            _copy(dv[i, h], d_qkv[i, at : at + dim])


@_loop
def _turn_normed_backward(qkv, rms, weight, cos, sin, dq, dk, dv, d_qkv, straight):
    (line, heads, dim), kv_heads = dq.shape, dk.shape[1]
    for i in range(line):
        for h in range(heads + kv_heads):
            if h < heads:
                _rotate_back(dq[i, h], cos[i], sin[i], straight)
            else:
                _rotate_back(dk[i, h - heads], cos[i], sin[i], straight)
            at = h * dim
            _norm_slope(qkv[i, at : at + dim], rms[i, h, 0], weight[h], straight, d_qkv[i, at : at + dim])
        for h in range(kv_heads):
            at = (heads + kv_heads + h) * dim
            _copy(dv[i, h], d_qkv[i, at : at + dim])


# ---------------------------------------------------------------- the MLP's middle


def swiglu(gate_up: Tensor) -> Tensor:
    act = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _swiglu(gate_up.numpy(), act.numpy())
    return act


@_loop
def _swiglu(gate_up, act):
    width = act.shape[1]
    for i in range(act.shape[0]):
        gate, up, y = gate_up[i, :width], gate_up[i, width:], act[i]
        for j in range(width):
            y[j] = gate[j] / (_one + _exp(-gate[j])) * up[j]


def swiglu_backward(gate_up: Tensor, d_act: Tensor) -> Tensor:
    d_gate_up = torch.empty_like(gate_up)
    _swiglu_backward(gate_up.numpy(), d_act.numpy(), d_gate_up.numpy())
    return d_gate_up


@_loop
def _swiglu_backward(gate_up, d_act, d_gate_up):
    width = d_act.shape[1]
    for i in range(d_act.shape[0]):
        gate, up, dy = gate_up[i, :width], gate_up[i, width:], d_act[i]
        d_gate, d_up = d_gate_up[i, :width], d_gate_up[i, width:]
        for j in range(width):
            s = _one / (_one + _exp(-gate[j]))
            d_gate[j] = dy[j] * up[j] * s * (_one + gate[j] * (_one - s))
            d_up[j] = dy[j] * gate[j] * s


# ---------------------------------------------------------------- attention to a cache


def attend_cached(q: Tensor, k: Tensor, v: Tensor, *cache: Any, out: Tensor) -> None:
    """Put k and v of some rows of a line into a cache, and let q attend to what is there. q, out [line, heads, dim]; k, v [line,
    kv_heads, dim]. ``cache`` are keys and values [slots, kv_heads, capacity, dim] of what rows have for themselves; the same of
    what rows share; then, int64 [n] each, the rows' places in the line, their slots, their positions, the slots of what they
    share, and the number of keys there; then a score's scale, window and softcap. Softmax in one go over exactly the keys that are seen."""
    _attend_cached(*(t.contiguous().numpy() for t in (q, k, v)), *cache, out.numpy(), room_to_attend(cache[0], cache[2]))


def room_to_attend(keys: np.ndarray, shared_keys: np.ndarray) -> np.ndarray:
    """For the weights of all keys that a row may see, in whole vectors."""
    return _room(keys.shape[2] + shared_keys.shape[2] + _VECTOR)


def scoring(score: Score) -> tuple[np.float32, int, np.float32]:
    """Scale, window and softcap as the loops want them."""
    return np.float32(score.scale), 2**62 if score.window is None else score.window, np.float32(score.softcap or 0)


@_loop
def _attend_cached(
    q, k, v, keys, values, shared_keys, shared_values, rows, slots, positions, shared_slots, shared, scale, window, softcap, out, weights
):  # fmt: skip
    for n in range(rows.shape[0]):
        i, slot, ours = rows[n], slots[n], shared_slots[n]
        for h in range(keys.shape[1]):
            _copy(k[i, h], keys[slot, h, positions[n] - shared[n]])
            _copy(v[i, h], values[slot, h, positions[n] - shared[n]])
        _attend(
            q[i], keys[slot], values[slot], shared_keys[ours], shared_values[ours], positions[n] + 1, shared[n],
            weights, scale, window, softcap, out[i],
        )  # fmt: skip


_VECTOR = 16


@_inner
def _attend(q, keys, values, shared_keys, shared_values, end, shared, weights, scale, window, softcap, out):
    """Of one token at position end - 1: q, out [heads, dim]; keys, values [kv_heads, capacity, dim], the first ``shared`` positions
    apart from the others."""
    group = q.shape[0] // keys.shape[0]
    begin = max(0, end - window)
    first = max(0, shared - begin)
    own_begin, own_end = max(0, begin - shared), end - shared
    count = first + own_end - own_begin
    weights = weights[: (count + _VECTOR - 1) // _VECTOR * _VECTOR]
    theirs, own = weights[:first], weights[first:count]
    for h in range(q.shape[0]):
        query, y, kv = q[h], out[h], h // group
        _score(query, shared_keys[kv, begin : begin + first], scale, theirs)
        _score(query, keys[kv, own_begin:own_end], scale, own)
        if softcap > 0:
            for t in range(count):
                weights[t] = softcap * (_one - np.float32(2) / (_exp(np.float32(2) / softcap * weights[t]) + _one))
        for t in range(count, weights.shape[0]):
            weights[t] = _least
        top, total = _least, _zero
        for t in range(weights.shape[0]):
            top = max(top, weights[t])
        for t in range(weights.shape[0]):
            weights[t] = _exp(weights[t] - top)
            total += weights[t]
        for j in range(y.shape[0]):
            y[j] = _zero
        _weigh(theirs, shared_values[kv, begin : begin + first], y)
        _weigh(own, values[kv, own_begin:own_end], y)
        for j in range(y.shape[0]):
            y[j] /= total


@_inner
def _score(query, keys, scale, weights):
    for t in range(keys.shape[0]):
        weights[t] = _dot(query, keys[t]) * scale


@_inner
def _weigh(weights, values, y):
    """y += weights values."""
    t, count = 0, values.shape[0]
    while t + 4 <= count:
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        for j in range(y.shape[0]):
            y[j] += (w0 * v0[j] + w1 * v1[j]) + (w2 * v2[j] + w3 * v3[j])
        t += 4
    while t < count:
        w0, v0 = weights[t], values[t]
        for j in range(y.shape[0]):
            y[j] += w0 * v0[j]
        t += 1


@_loop
def copy_positions(keys, values, places, to_keys, to_values, to, length):
    """Keys and values [slots, kv_heads, capacity, dim] of ``length`` positions each. Places int64 [n, 2]: slot and first position."""
    for i in range(places.shape[0]):
        slot, first, to_slot, to_first = places[i, 0], places[i, 1], to[i, 0], to[i, 1]
        for h in range(keys.shape[1]):
            for t in range(length):
                _copy(keys[slot, h, first + t], to_keys[to_slot, h, to_first + t])
                _copy(values[slot, h, first + t], to_values[to_slot, h, to_first + t])


# ---------------------------------------------------------------- thin adapters


def add_thin(x: Tensor, y: Tensor, *thin: np.ndarray) -> None:
    """y [line, d_out] += scale x A^T B^T with x [line, d_in], every row with its own adapter. ``thin`` are the line of adapters;
    each row's slot, -1 for none; where A [rank, d_in] and B^T [rank, columns of the output] of each output begin in the line
    [slots, outputs], -1 where there is none; where outputs begin in y [outputs + 1]; and rank and scale by slot."""
    _add_thin(x.numpy(), y.numpy(), *thin, _room(THIN))


@_loop
def _add_thin(x, y, adapters, slots, at_a, at_b, columns, ranks, scales, low):
    for i in range(slots.shape[0]):
        _add_thin_row(x[i], y[i], adapters, slots[i], at_a, at_b, columns, ranks, scales, low)


@_inner
def _add_thin_row(x, y, adapters, slot, at_a, at_b, columns, ranks, scales, low):
    if slot >= 0:
        rank, d_in = ranks[slot], x.shape[0]
        for o in range(at_a.shape[1]):
            begin, stop, a, b = columns[o], columns[o + 1], at_a[slot, o], at_b[slot, o]
            if a >= 0:
                width = stop - begin
                _project(x, adapters[a : a + rank * d_in].reshape(rank, d_in), scales[slot], low)
                _expand(low, adapters[b : b + rank * width].reshape(rank, width), y[begin:stop])


@_inner
def _project(x, a, scale, low):
    k = 0
    while k + 4 <= a.shape[0]:
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        s0, s1, s2, s3 = _zero, _zero, _zero, _zero
        for j in range(x.shape[0]):
            s0 += a0[j] * x[j]
            s1 += a1[j] * x[j]
            s2 += a2[j] * x[j]
            s3 += a3[j] * x[j]
        low[k], low[k + 1], low[k + 2], low[k + 3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale
        k += 4
    while k < a.shape[0]:
        low[k] = _dot(a[k], x) * scale
        k += 1


@_inner
def _expand(low, bt, y):
    k = 0
    while k + 4 <= bt.shape[0]:
        l0, l1, l2, l3 = low[k], low[k + 1], low[k + 2], low[k + 3]
        b0, b1, b2, b3 = bt[k], bt[k + 1], bt[k + 2], bt[k + 3]
        for j in range(y.shape[0]):
            y[j] += (l0 * b0[j] + l1 * b1[j]) + (l2 * b2[j] + l3 * b3[j])
        k += 4
    while k < bt.shape[0]:
        l0, b0 = low[k], bt[k]
        for j in range(y.shape[0]):
            y[j] += l0 * b0[j]
        k += 1


# ---------------------------------------------------------------- the stages of a decoding step


@_loop
def attention_stage(
    x, qkv, weight, eps, cos, sin, keys, values, shared_keys, shared_values, rows, cache_slots, positions, shared_slots, shared,
    scale, window, softcap, out, weights, turned, adapters, slots, at_a, at_b, columns, ranks, scales, low,
):  # fmt: skip
    """From the product qkv of x to attention's output [line, heads * dim], for ``rows`` of the line: their thin adapters, ``turn`` with
    tables cos and sin [context, dim], and ``attend_cached``. Room to work in: weights as of ``room_to_attend``, turned
    [heads + 1, dim], and low [THIN]."""
    kv_heads, dim = keys.shape[1], keys.shape[3]
    heads = turned.shape[0] - 1
    normed = turned[heads]
    for n in range(rows.shape[0]):
        i, slot, ours, position = rows[n], cache_slots[n], shared_slots[n], positions[n]
        y, c, s, own = qkv[i], cos[position], sin[position], position - shared[n]
        if i < slots.shape[0]:
            _add_thin_row(x[i], y, adapters, slots[i], at_a, at_b, columns, ranks, scales, low)
        for h in range(heads + kv_heads):
            head = y[h * dim : (h + 1) * dim]
            if weight.shape[0] > 0:
                r, w = _inverse_rms(head, eps), weight[h]
                for j in range(dim):
                    normed[j] = head[j] * r * w[j]
            else:
                _copy(head, normed)
            if h < heads:
                _rotate(normed, c, s, turned[h])
            else:
                _rotate(normed, c, s, keys[slot, h - heads, own])
        for h in range(kv_heads):
            at = (heads + kv_heads + h) * dim
            _copy(y[at : at + dim], values[slot, h, own])
        _attend(
            turned[:heads], keys[slot], values[slot], shared_keys[ours], shared_values[ours], position + 1, shared[n],
            weights, scale, window, softcap, out[i].reshape(heads, dim),
        )  # fmt: skip


@_loop
def norm_stage(x, y, weight, eps, out, adapters, slots, at_a, at_b, columns, ranks, scales, low):
    """Thin adapters' part in the product y of x, and its ``norm``."""
    for i in range(y.shape[0]):
        yi, o = y[i], out[i]
        if i < slots.shape[0]:
            _add_thin_row(x[i], yi, adapters, slots[i], at_a, at_b, columns, ranks, scales, low)
        r = _inverse_rms(yi, eps)
        for j in range(yi.shape[0]):
            o[j] = yi[j] * r * weight[j]


@_loop
def swiglu_stage(x, y, out, adapters, slots, at_a, at_b, columns, ranks, scales, low):
    """Thin adapters' part in the product y of x, gate and up, and its ``swiglu``."""
    width = out.shape[1]
    for i in range(y.shape[0]):
        if i < slots.shape[0]:
            _add_thin_row(x[i], y[i], adapters, slots[i], at_a, at_b, columns, ranks, scales, low)
        gate, up, o = y[i, :width], y[i, width:], out[i]
        for j in range(width):
            o[j] = gate[j] / (_one + _exp(-gate[j])) * up[j]


# ---------------------------------------------------------------- drawing


def choose(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the token at which the cumulative distribution passes ``uniform`` [rows] in [0, 1), or the likeliest where that is
    negative, and its log-probability. logits [rows, vocab], -inf for what is left out."""
    tokens, logprobs = torch.empty(len(logits), dtype=torch.long), logits.new_empty(len(logits))
    vocab = logits.shape[1]
    room = _room(vocab), _room(-(-vocab // _BLOCK))
    _choose(logits.contiguous().numpy(), uniform.contiguous().numpy(), tokens.numpy(), logprobs.numpy(), *room)
    return tokens, logprobs


_BLOCK = 64


@_inner
def _masses(row, masses, totals):
    """e^(x - top) of a row's logits and their sums by block: the top and where it is, and the sum of all."""
    vocab, top, best = row.shape[0], -np.inf, 0
    for v in range(vocab):
        if row[v] > top:
            top, best = row[v], v
    for b in range(totals.shape[0]):
        piece, mass, total = row[b * _BLOCK : (b + 1) * _BLOCK], masses[b * _BLOCK : (b + 1) * _BLOCK], _zero
        for v in range(piece.shape[0]):
            mass[v] = _exp(piece[v] - np.float32(top))
            total += mass[v]
        totals[b] = total
    total = np.float64(0)
    for b in range(totals.shape[0]):
        total += totals[b]
    return top, best, total


@_loop
def _choose(logits, uniform, tokens, logprobs, masses, totals):
    vocab, blocks = logits.shape[1], totals.shape[0]
    for i in range(logits.shape[0]):
        row = logits[i]
        top, best, total = _masses(row, masses, totals)
        token = best
        if uniform[i] >= 0:
            target, passed, b = uniform[i] * total, np.float64(0), 0
            while b < blocks - 1 and passed + totals[b] <= target:
                passed += totals[b]
                b += 1
            for v in range(b * _BLOCK, min(vocab, (b + 1) * _BLOCK)):
                if masses[v] > 0:
                    token = v
                    passed += masses[v]
                    if passed > target:
                        break
        tokens[i] = token
        logprobs[i] = row[token] - top - math.log(total)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of some tokens int64 [rows, k] of each row of logits [rows, vocab], as ``choose`` gives them."""
    found, vocab = logits.new_empty(tokens.shape), logits.shape[1]
    room = _room(vocab), _room(-(-vocab // _BLOCK))
    _logprobs_of(logits.contiguous().numpy(), tokens.contiguous().numpy(), found.numpy(), *room)
    return found


@_loop
def _logprobs_of(logits, tokens, found, masses, totals):
    for i in range(logits.shape[0]):
        row = logits[i]
        top, _, total = _masses(row, masses, totals)
        for j in range(tokens.shape[1]):
            found[i, j] = row[tokens[i, j]] - top - math.log(total)
