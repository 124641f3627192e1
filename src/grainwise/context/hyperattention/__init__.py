"""HyperAttention: Long-context Attention in Near-Linear Time (arXiv 2310.05869).

Queries and keys are hashed by angle and sorted; each query reads exactly one block of keys near it in that order, and a
sample of the other keys that stands for all of them. Causal attention splits the sequence in halves: exact squares on
the diagonal, sorted and sampled attention in the rectangles below it. Gradients are exact for the drawn keys.

Where this departs from the paper, and why:
- A query finds its block through its own bucket instead of its rank among all queries. The rank of a query depends on
  later queries, which would leak the future into causal attention; the bucket is also more accurate when queries and
  keys fall differently into buckets. A bucket wider than a block is spread over its blocks by position.
- The sample is drawn for each block anew, from the keys outside it, one from each of `samples` strata of the sorted
  order. The row sums stay unbiased, with less variance and no mask of size (queries, samples).
- Keys that do not fill the last block move it back over its neighbour; nothing is padded.
- A rectangle whose keys the budget would read completely is computed exactly.
- `sinks` and `window`, ours and off by default: first keys and recent keys that are always read exactly.
"""

from grainwise.context.attention_registration import patch_attention, unpatch_attention
from grainwise.context.hyperattention.attention import hyper_attention
from grainwise.context.hyperattention.hardness import Hardness, attention_hardness
from grainwise.context.hyperattention.step import recipe_step

__all__ = ["Hardness", "attention_hardness", "hyper_attention", "patch_attention", "recipe_step", "unpatch_attention"]
