"""Softmax attention as a sum of pieces: each piece lets some queries attend some keys, merged by log-sum-exp.

A piece is either *whole* (a rectangle or a causal square, exact) or *sorted* (queries in segments that share a list of
keys, some of which stand for many and carry a weight). The forward pass merges the pieces. The backward pass gives each
piece the merged output and log-sum-exp, which yields the exact gradient of the merged result, so that neither pass
keeps anything of size (queries, keys).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grainwise.kernels import hyper_blocks

GATHERED_ROWS = 16384  # key rows gathered at a time, which bounds the extra memory to a few MB


@dataclass(frozen=True)
class Whole:
    """Queries [q0, q1) attend keys [k0, k1) exactly; `causal`: a square whose rows see the keys up to their own place."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


@dataclass(frozen=True)
class Sorted:
    """Queries [q0, q1) of every head, in segments; segment s attends the keys `key_rows[s]` with `bias` on their logits.

    order: long (Q,), segment after segment, indices into the flattened (batch, head, q1 - q0).
    bounds: long (S + 1,), where each segment begins in `order`; it ends where the next begins.
    key_rows: long (S, t), indices into the flattened (batch, key head, keys). bias: float32 (t,).
    """

    q0: int
    q1: int
    order: Tensor
    bounds: Tensor
    key_rows: Tensor
    bias: Tensor

    def query_rows(self, length: int) -> Tensor:
        """`order` as indices into the flattened (batch, head, length)."""
        span = self.q1 - self.q0
        head = self.order.div(span, rounding_mode="floor")
        return self.order + head * (length - span) + self.q0


Piece = Whole | Sorted


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Log-sum-exps and merged outputs are kept in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention and its log-sum-exp: (B, H, n, d) and (B, H, n), from q (B, H, n, d) and k, v (B, Hkv, m, d).

    bias: (m,), added to the logits of each key. causal: query i sees the keys 0..i.
    """
    mask = None if bias is None else bias.to(lse_dtype(q.dtype))[None, None, None]
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if bias is None and _by_triton(q):
        return hyper_blocks.whole_attention(q, k, v, scale=scale, causal=causal)
    return _attend_plain(q, k, v, scale, causal, mask)


def _by_triton(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype != torch.float64 and hyper_blocks.available()


def attend_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for `tensors` = (q, k, v) of `attend`; `out` and `lse` may belong to a larger attention this is a piece of."""
    q, k, v = tensors
    mask = None if bias is None else bias.to(lse_dtype(q.dtype))[None, None, None]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        dq, dk, dv = _backward_plain(grad, (q, k, v), out, lse, scale, causal, mask)
    if groups > 1:
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _logits(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    logits = (q @ k.transpose(-1, -2)).to(lse_dtype(q.dtype)) * scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return logits if mask is None else logits + mask


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    logits = _logits(q, k.repeat_interleave(groups, 1), scale, causal, mask)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v.repeat_interleave(groups, 1), lse


def _backward_plain(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors
    weights = (_logits(q, k, scale, causal, mask) - lse[..., None]).exp()
    inner = (grad * out).sum(-1, keepdim=True)
    d_logits = (weights * (grad @ v.transpose(-1, -2) - inner) * scale).to(q.dtype)
    return d_logits @ k, d_logits.transpose(-1, -2) @ q, weights.to(q.dtype).transpose(-1, -2) @ grad


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the outputs (..., d) and log-sum-exps (...) over each.

    A side with lse = -inf has no keys and counts nothing; its output must be finite, for example zero.
    """
    share = torch.sigmoid(more_lse - lse).nan_to_num(0.0)  # NaN only where neither side has keys
    return torch.lerp(out, more, share[..., None].to(out.dtype)), torch.logaddexp(lse, more_lse)


def run_pieces(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float) -> tuple[Tensor, Tensor]:
    """Merged output (B, H, n, d) in the dtype of q and log-sum-exp (B, H, n), from contiguous q, k, v."""
    wide = lse_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
    covered = 0
    for piece in pieces:
        here = slice(piece.q0, piece.q1)
        if isinstance(piece, Whole):
            keys = slice(piece.k0, piece.k1)
            more, more_lse = attend(q[:, :, here], k[:, :, keys], v[:, :, keys], scale=scale, causal=piece.causal)
        else:
            more, more_lse = _run_sorted(q, k, v, piece, scale)
        more, more_lse = more.to(wide), more_lse.to(wide)
        if piece.q0 < covered:
            more, more_lse = merge(out[:, :, here], lse[:, :, here], more, more_lse)
        out[:, :, here], lse[:, :, here] = more, more_lse
        covered = max(covered, piece.q1)
    return out.to(q.dtype), lse


def _run_sorted(q: Tensor, k: Tensor, v: Tensor, piece: Sorted, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, q1 - q0, d) and log-sum-exp (B, H, q1 - q0) of one sorted piece."""
    length, dim = q.shape[2:]
    queries = q.view(-1, dim).index_select(0, piece.query_rows(length))
    flat_k, flat_v = k.view(-1, dim), v.view(-1, dim)
    if _by_triton(q):
        out, lse = hyper_blocks.segment_attention(
            queries, flat_k, flat_v, piece.bounds, piece.key_rows, piece.bias, scale=scale
        )
    else:
        out, lse = torch.empty_like(queries), queries.new_empty(len(queries), dtype=lse_dtype(q.dtype))
        for part, rows in _segments(piece):
            keys, values = (_gather(x, rows) for x in (flat_k, flat_v))
            got, got_lse = attend(queries[part].view(len(rows), 1, -1, dim), keys, values, scale=scale, bias=piece.bias)
            out[part], lse[part] = got.flatten(0, 2), got_lse.flatten()
    place = torch.empty_like(piece.order)
    place[piece.order] = torch.arange(len(place), device=place.device)
    shape = (*q.shape[:2], piece.q1 - piece.q0)
    return out.index_select(0, place).view(*shape, dim), lse.index_select(0, place).view(shape)


def _gather(rows: Tensor, chosen: Tensor) -> Tensor:
    """rows (N, d) at chosen (S, t), as (S, 1, t, d)."""
    return rows.index_select(0, chosen.flatten()).view(len(chosen), 1, -1, rows.shape[-1])


def _segments(piece: Sorted) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the sorted queries, their key rows (S', t)): equal segments together, unequal ones one at a time."""
    bounds = piece.bounds.tolist()
    step = max(1, GATHERED_ROWS // piece.key_rows.shape[1])
    sizes = {b - a for a, b in pairwise(bounds)}
    step = step if len(sizes) == 1 else 1
    for s in range(0, len(bounds) - 1, step):
        rows = piece.key_rows[s : s + step]
        part = slice(bounds[s], bounds[s + len(rows)])
        if part.start < part.stop:
            yield part, rows


class PiecewiseAttention(torch.autograd.Function):
    """`run_pieces` with a gradient for q, k, v through both results; the pieces' indices are constants."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = run_pieces(q, k, v, pieces, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = pieces, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dim = q.shape[-1]
        grad = torch.zeros_like(out) if grad is None else grad
        if grad_lse is not None:
            # d lse / d logits is the softmax itself: a value column of ones carries it through the same formula
            q, k, out = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, out))
            v = torch.nn.functional.pad(v, (0, 1), value=1.0)
            grad = torch.cat([grad, grad_lse[..., None].to(grad.dtype)], -1)
        gradients = _backward_pieces(grad.contiguous(), (q, k, v), out, lse, ctx.pieces, ctx.scale)
        return *(x[..., :dim] for x in gradients), None, None


def _backward_pieces(
    grad: Tensor, tensors: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, pieces: Sequence[Piece], scale: float
) -> list[Tensor]:
    wide = lse_dtype(grad.dtype)
    q, k, v = (x.contiguous() for x in tensors)
    sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    for piece in pieces:
        here = slice(piece.q0, piece.q1)
        if isinstance(piece, Sorted):
            _backward_sorted(grad, (q, k, v), out, lse, piece, scale, sums)
            continue
        keys = slice(piece.k0, piece.k1)
        dq, dk, dv = attend_backward(
            grad[:, :, here],
            (q[:, :, here], k[:, :, keys], v[:, :, keys]),
            out[:, :, here],
            lse[:, :, here],
            scale=scale,
            causal=piece.causal,
        )
        sums[0][:, :, here] += dq
        sums[1][:, :, keys] += dk
        sums[2][:, :, keys] += dv
    return [x.to(q.dtype) for x in sums]


def _backward_sorted(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    piece: Sorted,
    scale: float,
    sums: list[Tensor],
) -> None:
    length, dim = grad.shape[2:]
    rows = piece.query_rows(length)
    queries, grads, outs = (x.reshape(-1, dim).index_select(0, rows) for x in (tensors[0], grad, out))
    lses = lse.reshape(-1).index_select(0, rows)
    flat_k, flat_v = (x.view(-1, dim) for x in tensors[1:])
    dq_sum, dk_sum, dv_sum = (x.view(-1, dim) for x in sums)
    for part, key_rows in _segments(piece):
        shape = (len(key_rows), 1, -1, dim)
        dq, dk, dv = attend_backward(
            grads[part].view(shape),
            (queries[part].view(shape), _gather(flat_k, key_rows), _gather(flat_v, key_rows)),
            outs[part].view(shape),
            lses[part].view(shape[:3]),
            scale=scale,
            bias=piece.bias,
        )
        dq_sum.index_add_(0, rows[part], dq.reshape(-1, dim).to(dq_sum.dtype))
        dk_sum.index_add_(0, key_rows.flatten(), dk.reshape(-1, dim).to(dk_sum.dtype))
        dv_sum.index_add_(0, key_rows.flatten(), dv.reshape(-1, dim).to(dv_sum.dtype))
