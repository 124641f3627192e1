"""Attention of query segments to gathered keys: the hot loop of HyperAttention (arXiv 2310.05869) on a GPU.

Queries come sorted so that each segment shares one list of keys: its block, and sampled keys whose logits carry a bias.
The kernel gathers the keys by index while it runs, so no copy of them is made; one program serves one tile of a
segment and returns output and log-sum-exp. `segment_attention_reference` is the same in plain torch. The kernel was
compared with it under Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # platforms without Triton use the plain form
    triton = None

TILE = 64  # queries served by one program
KEY_STEP = 64  # keys read at a time
SMALLEST_DOT = 16  # Triton's matrix product needs sides of at least 16


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def segment_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor,
    key_rows: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `segment_attention` computes, segment by segment in plain torch."""
    out, lse = torch.zeros_like(queries), torch.full(queries.shape[:1], -torch.inf, device=queries.device)
    for s, rows in enumerate(key_rows):
        here = slice(int(bounds[s]), int(bounds[s + 1]))
        logits = queries[here].float() @ keys[rows].float().T * scale
        logits = logits if bias is None else logits + bias
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        lse[here] = logits.logsumexp(1)
        out[here] = (logits.softmax(1) @ values[rows].float()).to(out.dtype)
    return out, lse


def segment_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bounds: Tensor,
    key_rows: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output (Q, d) in the dtype of `queries` and float32 log-sum-exp (Q,), by the Triton kernel.

    queries: (Q, d), segment after segment. keys, values: (N, d). bounds: long (S + 1,), where segments begin.
    key_rows: long (S, t), the rows of keys that segment s attends. bias: float32 (t,), added to their logits, or None.
    causal: the i-th query of a segment sees the first i + 1 keys of its list. All tensors contiguous, on one device.
    Raises ImportError without Triton.
    """
    if triton is None:
        raise ImportError("segment_attention needs Triton: use segment_attention_reference, or install triton")
    out, lse = torch.empty_like(queries), torch.empty(len(queries), dtype=torch.float32, device=queries.device)
    segments, listed = key_rows.shape
    tiles = bounds.diff().add(TILE - 1).div(TILE, rounding_mode="floor")
    last_tile = tiles.cumsum(0)  # programs beyond the last one find no rows; a bound spares waiting for the true count
    programs = len(queries) // TILE + segments
    _kernel[(programs,)](
        queries, keys, values, bounds, last_tile, key_rows, queries if bias is None else bias, out, lse,
        segments, listed, scale, queries.shape[1],
        WIDTH=max(SMALLEST_DOT, triton.next_power_of_2(queries.shape[1])), TILE_ROWS=TILE, STEP=KEY_STEP,
        SEARCH=max(1, segments.bit_length()), BIASED=bias is not None, CAUSAL=causal,
    )  # fmt: skip
    return out, lse


def whole_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Exact attention and its log-sum-exp by the same kernel: (B, H, n, d), (B, H, n), from k, v (B, Hkv, m, d).

    causal: query i sees the keys 0..i.
    """
    batch, heads, n, dim = q.shape
    key_heads, m = k.shape[1:3]
    head = torch.arange(batch * heads, device=q.device)
    groups = heads // key_heads
    key_rows = (head // groups * m)[:, None] + torch.arange(m, device=q.device)
    bounds = torch.arange(batch * heads + 1, device=q.device) * n
    queries, keys, values = (x.reshape(-1, dim) for x in (q, k, v))
    out, lse = segment_attention(queries, keys, values, bounds, key_rows, None, scale=scale, causal=causal)
    return out.view(q.shape), lse.view(q.shape[:3])


def _segment_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations: only constexpr may stand here
    queries, keys, values, bounds, last_tile, key_rows, bias, out, lse, segments, listed, scale, dim,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, STEP: tl.constexpr, SEARCH: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    low = 0  # binary search: the first segment whose last tile lies beyond this program
    high = segments
    for _ in range(SEARCH):
        middle = (low + high) // 2
        beyond = tl.load(last_tile + tl.minimum(middle, segments - 1)) > program
        searching = low < high
        high = tl.where(searching & beyond, middle, high)
        low = tl.where(searching & (beyond == 0), middle + 1, low)
    if low < segments:
        before = tl.load(last_tile + tl.maximum(low - 1, 0))
        before = tl.where(low > 0, before, 0)
        first = tl.load(bounds + low)
        row = first + (program - before) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        real_row = row < tl.load(bounds + low + 1)
        place = row - first  # of the query in its segment
        column = tl.arange(0, WIDTH)
        real_column = column < dim
        rows = row[:, None] * dim + column[None, :]
        inside = real_row[:, None] & real_column[None, :]
        q = tl.load(queries + rows, mask=inside, other=0.0)
        top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        sums = tl.zeros([TILE_ROWS, WIDTH], tl.float32)
        for start in range(0, listed, STEP):
            entry = start + tl.arange(0, STEP)
            real = entry < listed
            chosen = tl.load(key_rows + low * listed + entry, mask=real, other=0)
            cells = chosen[:, None] * dim + column[None, :]
            there = real[:, None] & real_column[None, :]
            k = tl.load(keys + cells, mask=there, other=0.0)
            v = tl.load(values + cells, mask=there, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if BIASED:
                logits += tl.load(bias + entry, mask=real, other=0.0)[None, :]
            seen = real[None, :]
            if CAUSAL:
                seen = seen & (entry[None, :] <= place[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp(logits - new_top[:, None])
            kept = tl.exp(top - new_top)
            total = total * kept + tl.sum(weights, 1)
            sums = sums * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        tl.store(out + rows, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
        tl.store(lse + row, top + tl.log(total), mask=real_row)


_kernel: Any = triton.jit(_segment_kernel) if triton is not None else None
