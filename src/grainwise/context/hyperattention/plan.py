"""Which keys each query reads: the causal recursion, the sorted blocks and the sampled keys, as pieces.

All choices that a later token could influence are avoided: in the causal recursion a query's block depends on the
query's own bucket and on keys before it, never on other queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grainwise.context.hyperattention.lsh import bucket_numbers, bucket_starts, random_directions, stable_order
from grainwise.context.hyperattention.pieces import Piece, Sorted, Whole

GOLDEN = 0.6180339887498949  # multiples of it modulo 1 spread evenly over [0, 1)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many keys a query reads exactly (its block, the sinks, the window) and by sampling; see `hyper_attention`."""

    block: int = 256
    samples: int = 256
    projections: int = 7
    min_seq_len: int = 2048
    sinks: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("samples", 1), ("projections", 1), ("min_seq_len", 1), ("sinks", 0), ("window", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.projections > 16:
            raise ValueError(f"projections must be at most 16, which makes 65536 buckets, got {self.projections}")


def rectangles(queries: int, keys: int, causal: bool, longest: int) -> Iterator[Whole]:
    """Exact causal squares of at most `longest` tokens on the diagonal, then the all-visible rectangles below them.

    Causal queries are the last `queries` of the `keys` positions. Squares halve the length until they fit; each level's
    rectangles join the second half of a span to its first half.
    """
    past = keys - queries if causal else keys
    if causal:
        levels = max(0, math.ceil(math.log2(queries / longest)))
        square = math.ceil(queries / 2**levels)
        for a in range(0, queries, square):
            b = min(a + square, queries)
            yield Whole(a, b, past + a, past + b, causal=True)
        while square < queries:
            for a in range(square, queries, 2 * square):
                yield Whole(a, min(a + square, queries), past + a - square, past + a, causal=False)
            square *= 2
    if past:
        yield Whole(0, queries, 0, past, causal=False)


class Planner:
    """Turns rectangles into sorted pieces: hashes every query and key once, then sorts and samples per rectangle."""

    def __init__(self, q: Tensor, k: Tensor, budget: Budget, generator: torch.Generator, *, causal: bool) -> None:
        self.budget, self.generator, self.causal = budget, generator, causal
        self.batch, self.heads, self.length, dim = q.shape
        self.key_heads, self.keys = k.shape[1:3]
        directions = random_directions(dim, budget.projections, generator, q.device)
        self.query_buckets, self.key_buckets = bucket_numbers(q, directions), bucket_numbers(k, directions)

    def pieces(self) -> list[Piece]:
        """The whole plan, squares first."""
        found: list[Piece] = []
        for whole in rectangles(self.length, self.keys, self.causal, self.budget.min_seq_len):
            found.append(whole if whole.causal else self.approximate(whole))
        return found

    def approximate(self, whole: Whole) -> Piece:
        """The rectangle by blocks and samples, or the rectangle itself when those would read all of its keys anyway."""
        budget, size = self.budget, whole.k1 - whole.k0
        sinks = min(budget.sinks, size) if whole.k0 == 0 else 0
        window = min(budget.window, size - sinks)
        core = size - sinks - window
        if core <= budget.block + budget.samples:
            return whole
        device = self.key_buckets.device
        groups = self.batch * self.key_heads
        first = torch.arange(groups, device=device) * self.keys + whole.k0  # row of each group's first key
        key_order, starts = self._sort_keys(whole.k0 + sinks, whole.k1 - window)
        # the last block is moved back so that all are full
        start_of = torch.arange(0, core, budget.block, device=device).clamp(max=core - budget.block)
        chosen = self._query_blocks(whole, starts, len(start_of))
        ranks = self._ranks(groups, core, start_of)
        columns = key_order.gather(1, ranks.flatten(1)).view_as(ranks) + sinks
        always = torch.cat([torch.arange(sinks, device=device), torch.arange(size - window, size, device=device)])
        columns = torch.cat([always.expand(*columns.shape[:2], -1), columns], -1) + first[:, None, None]
        bias = torch.zeros(columns.shape[-1], device=device)
        bias[len(always) + budget.block :] = math.log((core - budget.block) / budget.samples)
        order, bounds = group_by(chosen, len(start_of))
        return Sorted(whole.q0, whole.q1, order, bounds, columns.flatten(0, 1), bias)

    def _sort_keys(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Stable order (groups, b - a) of the keys [a, b) by bucket, and each bucket's start (groups, buckets + 1)."""
        numbers = self.key_buckets[:, :, a:b].flatten(0, 1)
        return stable_order(numbers), bucket_starts(numbers, 2**self.budget.projections)

    def _query_blocks(self, whole: Whole, starts: Tensor, blocks: int) -> Tensor:
        """The block that each query attends, long (groups, heads per group * queries), from its bucket alone.

        The target is the middle of the keys in the query's bucket. A bucket wider than a block is spread over its
        blocks by the query's position, evenly and without regard to other queries.
        """
        size = self.budget.block
        buckets = self.query_buckets[:, :, whole.q0 : whole.q1].reshape(starts.shape[0], -1).long()
        low, high = starts.gather(1, buckets), starts.gather(1, buckets + 1)
        turn = torch.arange(whole.q0, whole.q1, device=buckets.device, dtype=torch.float64) * GOLDEN % 1.0
        turn = turn.repeat(buckets.shape[1] // (whole.q1 - whole.q0))
        middle = (low + high) / 2 + (turn - 0.5) * (high - low - size).clamp(min=0)
        return (middle / size).long().clamp(0, blocks - 1)

    def _ranks(self, groups: int, core: int, start_of: Tensor) -> Tensor:
        """Ranks that each block reads, long (groups, blocks, block + samples): its own, then one per stratum of the rest.

        Outside the block, core - block ranks are cut into `samples` equal strata and one is drawn in each: every key
        has the same chance samples / (core - block), which makes the weighted row sum unbiased.
        """
        block, samples, device = self.budget.block, self.budget.samples, start_of.device
        width = (core - block) / samples
        draws = torch.rand(groups, len(start_of), samples, generator=self.generator, device=device, dtype=torch.float64)
        outside = ((torch.arange(samples, device=device) + draws) * width).long().clamp(max=core - block - 1)
        outside += (outside >= start_of[:, None]) * block
        own = start_of[:, None] + torch.arange(block, device=device)
        return torch.cat([own.expand(groups, -1, -1), outside], -1)


def group_by(chosen: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Order (N,) of all entries of `chosen` (groups, n) by (group, block), and where each pair begins, with the end."""
    groups, n = chosen.shape
    order = stable_order(chosen) + torch.arange(groups, device=chosen.device)[:, None] * n
    labels = chosen + torch.arange(groups, device=chosen.device)[:, None] * blocks
    counts = torch.bincount(labels.flatten(), minlength=groups * blocks)
    return order.flatten(), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
