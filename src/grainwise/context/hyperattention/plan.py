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
        """The whole plan, squares first; rectangles of one shape are sorted and sampled together."""
        squares: list[Piece] = []
        alike: dict[tuple[int, int, int], list[Whole]] = {}
        for whole in rectangles(self.length, self.keys, self.causal, self.budget.min_seq_len):
            if whole.causal:
                squares.append(whole)
            else:
                sinks = self.budget.sinks if whole.k0 == 0 else 0
                alike.setdefault((whole.q1 - whole.q0, whole.k1 - whole.k0, sinks), []).append(whole)
        return squares + [piece for group in alike.values() for piece in self.approximate(group)]

    def approximate(self, wholes: list[Whole]) -> list[Piece]:
        """Rectangles of one shape by blocks and samples; as they are when those would read all of their keys anyway."""
        budget, size = self.budget, wholes[0].k1 - wholes[0].k0
        sinks = min(budget.sinks, size) if wholes[0].k0 == 0 else 0
        window = min(budget.window, size - sinks)
        core = size - sinks - window
        if core <= budget.block + budget.samples:
            return list(wholes)
        device = self.key_buckets.device
        first_key = torch.tensor([w.k0 for w in wholes], device=device)
        key_numbers = self.key_buckets[:, :, first_key[:, None] + sinks + torch.arange(core, device=device)]
        key_numbers = key_numbers.flatten(0, 2)  # a row for each (batch, key head, rectangle), called group from here on
        groups = len(key_numbers)
        # the last block is moved back so that all are full
        start_of = torch.arange(0, core, budget.block, device=device).clamp(max=core - budget.block)
        query_rows, chosen = self._query_blocks(wholes, key_numbers, len(start_of))
        ranks = self._ranks(groups, core, start_of)
        columns = stable_order(key_numbers).gather(1, ranks.flatten(1)).view_as(ranks) + sinks
        always = torch.cat([torch.arange(sinks, device=device), torch.arange(size - window, size, device=device)])
        columns = torch.cat([always.expand(*columns.shape[:2], -1), columns], -1)
        first_row = torch.arange(self.batch * self.key_heads, device=device)[:, None] * self.keys + first_key
        bias = torch.zeros(columns.shape[-1], device=device)
        bias[len(always) + budget.block :] = math.log((core - budget.block) / budget.samples)
        order, bounds = group_by(chosen, len(start_of))
        key_rows = (columns + first_row.view(-1, 1, 1)).flatten(0, 1)
        return [Sorted(query_rows.flatten()[order], bounds, key_rows, bias)]

    def _query_blocks(self, wholes: list[Whole], key_numbers: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Rows of the queries in each group, and the block that each attends, both long (groups, queries of a group).

        A query finds its block from its own bucket: its target is the middle of the keys in that bucket. A bucket wider
        than a block is spread over its blocks by the query's position, evenly and without regard to other queries.
        """
        size, device = self.budget.block, key_numbers.device
        first = torch.tensor([w.q0 for w in wholes], device=device)
        position = first[:, None] + torch.arange(wholes[0].q1 - wholes[0].q0, device=device)
        rows = torch.arange(self.query_buckets.numel(), device=device).view(self.query_buckets.shape)

        def grouped(x: Tensor) -> Tensor:  # (batch, heads, queries) -> (groups, heads of a key head * queries of a rectangle)
            heads = x[:, :, position].unflatten(1, (self.key_heads, -1))
            return heads.transpose(2, 3).reshape(len(key_numbers), -1)

        buckets = grouped(self.query_buckets).long()
        starts = bucket_starts(key_numbers, 2**self.budget.projections)
        low, high = starts.gather(1, buckets), starts.gather(1, buckets + 1)
        turn = torch.arange(self.length, device=device, dtype=torch.float64) * GOLDEN % 1.0
        turn = grouped(turn.expand(self.query_buckets.shape))
        middle = (low + high) / 2 + (turn - 0.5) * (high - low - size).clamp(min=0)
        return grouped(rows), (middle / size).long().clamp(0, blocks - 1)

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
