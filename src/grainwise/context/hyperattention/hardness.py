"""How hard an input is for hyper attention: the two parameters of the paper's bound, and what the blocks catch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grainwise.context.hyperattention.attention import check_tensors
from grainwise.context.hyperattention.plan import Budget
from grainwise.context.hyperattention.theory import own_block

ROWS = 1024  # query rows measured at a time


@dataclass(frozen=True)
class Hardness:
    """Per batch entry and head, float32 (B, H).

    alpha: keys * the largest squared column norm of the softmax matrix; 1 when all columns weigh the same, about
        keys * queries when all rows look at one key. Attention sinks make it large.
    kappa: largest over smallest row sum of exp(scale q k^T) outside the query's block.
    heavy_mass: mean share of a row's attention that its block catches; sampling must guess the rest.
    """

    alpha: Tensor
    kappa: Tensor
    heavy_mass: Tensor


@torch.no_grad()
def attention_hardness(
    q: Tensor, k: Tensor, *, scale: float | None = None, block: int = 256, projections: int = 7, seed: int = 0
) -> Hardness:
    """Measure alpha, kappa and the heavy mass of non-causal attention, exactly: quadratic time, linear memory.

    q: (B, H, n, d), k: (B, Hkv, m, d). Raises ValueError when all keys fit into one block.
    """
    check_tensors(q, k, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    budget = Budget(block=block, projections=projections)
    piece = own_block(q, k, budget, torch.Generator(q.device).manual_seed(seed))
    heads, n, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    flat_q, flat_k = q.float().reshape(-1, q.shape[-1]), k.float().flatten(0, 1)
    squares = torch.zeros(heads, keys, device=q.device)
    caught, outside = (torch.zeros(heads * n, device=q.device) for _ in range(2))
    bounds = piece.bounds.tolist()
    for segment, own in enumerate(piece.key_rows):
        group = int(own[0]) // keys
        for rows in piece.query_rows[bounds[segment] : bounds[segment + 1]].split(ROWS):
            logits = flat_q[rows] @ flat_k[group].T * scale
            lse = logits.logsumexp(1, keepdim=True)
            weights = (logits - lse).exp()
            squares.index_add_(0, rows // n, weights.square())
            caught[rows] = weights[:, own % keys].sum(1)
            rest = logits.index_fill(1, own % keys, -torch.inf)
            outside[rows] = rest.logsumexp(1)
    outside = outside.view(heads, n)
    shape = q.shape[:2]
    return Hardness(
        alpha=(keys * squares.amax(1)).view(shape),
        kappa=(outside.amax(1) - outside.amin(1)).exp().view(shape),
        heavy_mass=caught.view(heads, n).mean(1).view(shape),
    )
