"""`hyper_attention`: softmax attention over long inputs in near-linear time, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from grainwise.context.hyperattention.pieces import Piece, PiecewiseAttention, lse_dtype
from grainwise.context.hyperattention.plan import Budget, Planner, rectangles
from grainwise.context.hyperattention.theory import theoretical_attention
from grainwise.naming import did_you_mean

VARIANTS = ("practical", "theory")


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    block: int = 256,
    samples: int = 256,
    projections: int = 7,
    min_seq_len: int = 2048,
    sinks: int = 0,
    window: int = 0,
    key_padding: Tensor | None = None,
    variant: str = "practical",
    generator: torch.Generator | None = None,
    seed: int = 0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor] | Tensor:
    """Approximate softmax(scale q k^T) v and, unless `return_lse` is False, the log of each row's sum of exponentials.

    q: (B, H, n, d). k, v: (B, Hkv, m, d) with H a multiple of Hkv. Output (B, H, n, d); log-sum-exp (B, H, n), at least
    float32; gradients flow through both, with the drawn keys and the order held fixed.

    scale: default d ** -0.5. causal: query i stands at position m - n + i and sees the keys up to there.
    block, samples: keys that each query reads exactly and by sampling. projections: hash bits, at most 16.
    min_seq_len: up to this many queries attention is exact (on the CPU by the kernel of `scaled_dot_product_attention`,
    bit for bit); it is also the longest exact square of the causal recursion. sinks: the first keys, always read exactly.
    window: keys before each causal query that are always read exactly. key_padding: bool (B, m), False at padded keys,
    which count nowhere; causal queries at padded places get zeros and a log-sum-exp of -inf.
    variant: "practical", or "theory" for the estimator that the paper analyses (not causal).
    generator: source of the random directions and samples; by default a new one from `seed`, so that a recomputed
    forward pass draws the same. Raises ValueError or TypeError for shapes, types and options that do not fit.
    """
    budget = Budget(block=block, samples=samples, projections=projections, min_seq_len=min_seq_len, sinks=sinks, window=window)
    check_tensors(q, k, v)
    _check_request(q, k, budget, causal, variant)
    if key_padding is not None:
        check_padding(key_padding, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    generator = torch.Generator(q.device).manual_seed(seed) if generator is None else generator
    if variant == "theory":
        if key_padding is not None:
            raise ValueError("variant='theory' takes no key_padding: drop the padded keys first")
        out, lse = theoretical_attention(q, k, v, budget, scale=scale, generator=generator)
    elif key_padding is None or bool(key_padding.all()):
        out, lse = _attention(q, k, v, budget, generator, causal=causal, scale=scale)
    else:
        out, lse = _without_padding(q, k, v, key_padding, budget, generator, causal=causal, scale=scale)
    return (out, lse) if return_lse else out


def _attention(
    q: Tensor, k: Tensor, v: Tensor, budget: Budget, generator: torch.Generator, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    queries, keys = q.shape[2], k.shape[2]
    pieces: list[Piece]
    if queries <= budget.min_seq_len:
        pieces = list(rectangles(queries, keys, causal and queries > 1, longest=queries))
    else:
        with torch.no_grad():
            pieces = Planner(q, k, budget, generator, causal=causal).pieces()
    return PiecewiseAttention.apply(q, k, v, pieces, scale)


def _without_padding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor,
    budget: Budget,
    generator: torch.Generator,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each sequence of the batch on its own, with its padded keys (and, when causal, queries) left out."""
    outs, lses = [], []
    past = k.shape[2] - q.shape[2] if causal else 0
    for i, real in enumerate(key_padding):
        kept = real.nonzero().flatten()
        asked = kept[kept >= past] - past if causal else torch.arange(q.shape[2], device=q.device)
        out, lse = torch.zeros_like(q[i]), q.new_full(q.shape[1:3], -torch.inf, dtype=lse_dtype(q.dtype))
        if len(asked) and len(kept):
            some_q, some_k, some_v = q[i : i + 1, :, asked], k[i : i + 1, :, kept], v[i : i + 1, :, kept]
            got, got_lse = _attention(some_q, some_k, some_v, budget, generator, causal=causal, scale=scale)
            out, lse = out.index_copy(1, asked, got[0]), lse.index_copy(1, asked, got_lse[0])
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless q, k, v are finite and fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise TypeError(f"q, k and v must share one floating-point type, got {q.dtype}, {k.dtype}, {v.dtype}: cast them")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}: move them")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (batch, heads, length, dim), got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k and v must agree, and match q in batch and dim, got {shapes}")
    if not all(x.numel() for x in (q, k)):
        raise ValueError(f"q, k and v must not be empty, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    for name, x in (("q", q), ("k", k), ("v", v)):
        total = x.detach().sum(dtype=lse_dtype(x.dtype))  # one pass; not finite if any entry is not
        if not torch.isfinite(total) and not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity: look for it upstream, before attention")


def check_padding(key_padding: Tensor, k: Tensor) -> None:
    """Raise unless `key_padding` is a bool mask over the keys; other masks are not supported."""
    if key_padding.dtype != torch.bool:
        raise TypeError(f"key_padding must be bool (True at real keys), got {key_padding.dtype}")
    if key_padding.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"key_padding must be (batch, keys) = {(k.shape[0], k.shape[2])}, got {tuple(key_padding.shape)}: hyper attention "
            "supports no mask, the causal mask and padding; keep exact attention where another mask is needed"
        )


def _check_request(q: Tensor, k: Tensor, budget: Budget, causal: bool, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}. {did_you_mean(variant, VARIANTS)}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal attention needs a key for each query, got {q.shape[2]} queries and {k.shape[2]} keys")
    if not causal and budget.window:
        raise ValueError("window means the keys before each query: it needs causal=True")
    if variant == "theory" and (causal or budget.sinks):
        raise ValueError("variant='theory' is neither causal nor has sinks: use variant='practical'")
