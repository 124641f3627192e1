"""The estimator that the paper proves near-linear: row sums with capping, and a product sampled by row norms.

It differs from the practical algorithm: two independent samples serve the denominator and the numerator, single
entries are capped, and values are sampled in proportion to their squared norms. At practical sample counts it is less
accurate than the practical algorithm; it is here to study the theory. HyperAttention (arXiv 2310.05869), Algorithms 2, 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grainwise.context.hyperattention.pieces import PiecewiseAttention, Sorted, Whole
from grainwise.context.hyperattention.plan import Budget, Planner

ACCURACY = 1.0  # epsilon, the wanted relative error of the row sums, which sets how high single entries may rise


def own_block(q: Tensor, k: Tensor, budget: Budget, generator: torch.Generator) -> Sorted:
    """The mask M of the paper: every query with the keys of its block, nothing sampled."""
    size = k.shape[2]
    if size <= budget.block + 1:
        raise ValueError(f"{size} keys fit into one block of {budget.block}: attention is exact, take a smaller block")
    reduced = Budget(block=budget.block, samples=1, projections=budget.projections)
    with torch.no_grad():
        planner = Planner(q, k, reduced, generator, causal=False)
        (piece,) = planner.approximate([Whole(0, q.shape[2], 0, size, causal=False)])
    assert isinstance(piece, Sorted)
    columns = piece.key_rows[:, : budget.block].contiguous()
    return Sorted(piece.query_rows, piece.bounds, columns, piece.bias[: budget.block])


def theoretical_attention(
    q: Tensor, k: Tensor, v: Tensor, budget: Budget, *, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """D~^-1 A S^T S v (B, H, n, d) and log D~ (B, H, n); shapes as in `hyper_attention`.

    Works in float64 with (n, samples) logits per head, whose exponentials must not overflow (logits below about 700).
    """
    piece = own_block(q, k, budget, generator)
    _, masked_lse = PiecewiseAttention.apply(q, k, v, [piece], scale)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).flatten(0, 1).double() for x in (k, v))
    flat_q, masked = q.flatten(0, 1).double() * scale, masked_lse.flatten(0, 1).double().exp()
    member = block_members(piece, q.shape[:3], k.shape[1], groups)
    outs, sums = [], []
    for h in range(len(flat_q)):
        row_sums = approximate_row_sums(flat_q[h], k[h], masked[h], member[h], budget.samples, generator)
        outs.append(sampled_product(flat_q[h], k[h], v[h], budget.samples, generator) / row_sums[:, None])
        sums.append(row_sums)
    shape = q.shape[:3]
    out = torch.stack(outs).view(*shape, -1).to(q.dtype)
    return out, torch.stack(sums).log().view(shape).to(masked_lse.dtype)


def block_members(piece: Sorted, shape: torch.Size, keys: int, groups: int) -> list[Tensor]:
    """For each (batch, head): bool (n, keys), True where the query's block holds the key. Size n * keys: for study only."""
    batch, heads, n = shape
    member = torch.zeros(batch * heads * n, keys, dtype=torch.bool, device=piece.bounds.device)
    segment = torch.repeat_interleave(piece.bounds.diff())
    member[piece.query_rows] = member[piece.query_rows].scatter(1, piece.key_rows[segment] % keys, True)
    return list(member.view(batch * heads, n, keys))


def approximate_row_sums(
    q: Tensor, k: Tensor, masked: Tensor, member: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """ApproxD: row sums of A = exp(q k^T), (n,), from the exact masked part `masked` (n,) and sampled, capped columns.

    tau: the largest unmasked row sum among `samples` rows; kappa: its ratio to the smallest one. An entry of row i counts
    at most C_i = epsilon^2 samples / (n log n) * (masked_i + tau / kappa), and a row's unmasked sum at least tau / kappa.
    """
    n = len(k)
    rows = torch.randint(len(q), (samples,), generator=generator, device=q.device)
    unmasked = ((q[rows] @ k.T).exp() * ~member[rows]).sum(1).detach()
    tau, kappa = unmasked.max(), unmasked.max() / unmasked.min().clamp(min=torch.finfo(q.dtype).tiny)
    cap = ACCURACY**2 * samples / (n * math.log(n)) * (masked + tau / kappa)
    columns = torch.randint(n, (samples,), generator=generator, device=q.device)
    entries = (q @ k[columns].T).exp().minimum(cap[:, None]) * ~member[:, columns]
    return masked + (entries.sum(1) * (n / samples)).clamp(min=tau / kappa)


def sampled_product(q: Tensor, k: Tensor, v: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """A v (n, d) from `samples` columns drawn with probability proportional to the squared norm of the value."""
    chance = v.detach().square().sum(1)
    chance = chance / chance.sum()
    columns = torch.multinomial(chance, samples, replacement=True, generator=generator)
    return (q @ k[columns].T).exp() @ (v[columns] / (samples * chance[columns, None]))
