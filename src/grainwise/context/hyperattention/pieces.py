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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grainwise.kernels import hyper_blocks

GATHERED_ROWS = 65536  # rows of keys or queries gathered at a time: few large steps, and a bound on the extra memory
QUERY_STEP = 32  # segments are filled up to a multiple of this, so that many of them have equal length and run together


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
    """Queries in segments; every query of segment s attends the keys `key_rows[s]` with `bias` on their logits.

    query_rows: long (Q,), segment after segment, indices into the flattened (batch, head, queries), each at most once.
    bounds: long (S + 1,), where each segment begins in `query_rows`; it ends where the next begins.
    key_rows: long (S, t), indices into the flattened (batch, key head, keys). bias: float32 (t,).
    """

    query_rows: Tensor
    bounds: Tensor
    key_rows: Tensor
    bias: Tensor

    def batches(self, nowhere: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Segments of about equal length together: query rows (s, l), filled up with `nowhere`, and key rows (s, t)."""
        lengths = self.bounds.diff()
        filled = lengths.add(QUERY_STEP - 1).div(QUERY_STEP, rounding_mode="floor") * QUERY_STEP
        for length in filled.unique().tolist():
            if not length:
                continue
            together = max(1, GATHERED_ROWS // max(length, self.key_rows.shape[1]))
            step = torch.arange(length, device=filled.device)
            for segments in (filled == length).nonzero().flatten().split(together):
                place = (self.bounds[segments, None] + step).clamp(max=len(self.query_rows) - 1)
                rows = self.query_rows[place].masked_fill(step >= lengths[segments, None], nowhere)
                yield rows, self.key_rows[segments]


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
    wide, count, dim = lse_dtype(q.dtype), q.shape[:3].numel(), q.shape[3]
    all_out = torch.zeros(count + 1, dim, dtype=wide, device=q.device)  # the last row takes what fills segments up
    all_lse = torch.full((count + 1,), -math.inf, dtype=wide, device=q.device)
    out, lse = all_out[:count].view(q.shape), all_lse[:count].view(q.shape[:3])
    covered = 0
    for piece in pieces:
        if isinstance(piece, Sorted):
            for rows, more, more_lse in _run_sorted(q, k, v, piece, scale):
                before = all_out.index_select(0, rows), all_lse.index_select(0, rows)
                merged, merged_lse = merge(*before, more.to(wide), more_lse.to(wide))
                all_out.index_copy_(0, rows, merged)
                all_lse.index_copy_(0, rows, merged_lse)
            covered = q.shape[2]
            continue
        here, keys = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
        more, more_lse = attend(q[:, :, here], k[:, :, keys], v[:, :, keys], scale=scale, causal=piece.causal)
        if piece.q0 < covered:
            more, more_lse = merge(out[:, :, here], lse[:, :, here], more.to(wide), more_lse.to(wide))
        out[:, :, here], lse[:, :, here] = more, more_lse
        covered = max(covered, piece.q1)
    return out.to(q.dtype), lse.contiguous()


def _run_sorted(q: Tensor, k: Tensor, v: Tensor, piece: Sorted, scale: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(query rows, their outputs, their log-sum-exps) over a sorted piece's keys; rows = all rows of q: nowhere."""
    queries, keys, values = (x.view(-1, q.shape[-1]) for x in (q, k, v))
    if _by_triton(q):
        chosen = queries.index_select(0, piece.query_rows)
        segments = piece.bounds, piece.key_rows, piece.bias
        yield piece.query_rows, *hyper_blocks.segment_attention(chosen, keys, values, *segments, scale=scale)
        return
    for rows, key_rows in piece.batches(nowhere=len(queries)):
        gathered = _gather(queries, rows.clamp(max=len(queries) - 1)), _gather(keys, key_rows), _gather(values, key_rows)
        out, lse = attend(*gathered, scale=scale, bias=piece.bias)
        yield rows.flatten(), out.flatten(0, 2), lse.flatten()


def _gather(rows: Tensor, chosen: Tensor) -> Tensor:
    """rows (N, d) at chosen (s, t), as (s, 1, t, d)."""
    return rows.index_select(0, chosen.flatten()).view(len(chosen), 1, -1, rows.shape[-1])


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
        if isinstance(piece, Sorted):
            _backward_sorted(grad, (q, k, v), out, lse, piece, scale, sums)
            continue
        here, keys = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
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
    """Add the gradients of a sorted piece to `sums`, those of q, k and v."""
    dim = grad.shape[-1]
    queries, keys, values, grads, outs = (x.reshape(-1, dim) for x in (*tensors, grad, out))
    for rows, key_rows in piece.batches(nowhere=len(queries)):
        real, rows = (rows < len(queries))[:, None, :, None], rows.clamp(max=len(queries) - 1)
        found = attend_backward(
            _gather(grads, rows) * real,  # a query without a gradient gives its keys none
            (_gather(queries, rows), _gather(keys, key_rows), _gather(values, key_rows)),
            _gather(outs, rows),
            lse.reshape(-1)[rows][:, None],
            scale=scale,
            bias=piece.bias,
        )
        for total, part, at in zip(sums, found, (rows, key_rows, key_rows), strict=True):
            total.view(-1, dim).index_add_(0, at.flatten(), part.reshape(-1, dim).to(total.dtype))
