"""ADED: drafts from a tri-gram table searched by MCTS, verified as a tree, learned from as they are verified.

Paper: "Adaptive Draft-Verification for Efficient Large Language Model Decoding", AAAI 2025, arXiv 2407.12021. A sparse
table of tri-gram scores stands for the language model; a Monte-Carlo tree search over it proposes continuations, which
the model checks in one forward pass over their prefix tree. What is verified raises the table's scores, so drafting
improves while it runs; the output stays that of plain decoding.

Departures from the published code, and why:
- siblings share one sample at their parent (the code samples for each path, which distorts the law of the output), and
  temperature, top-p and all other logits processors apply to every token, the first of a step included;
- a full draft tree keeps the paths by their visits and cuts the last; the code drops the longest paths first, which
  throws away what the search explored deepest;
- successors are visited in order of their scores, where the code takes the order of a hash map: same seed, same drafts;
- where the table knows nothing, nothing is drafted (the code drafts a dummy token that is always rejected).
"""

from grainwise.decode.aded.decoder import AdaptiveDraftDecoder, MCTSDrafter, recipe_restore, recipe_step
from grainwise.decode.aded.trigram_table import TrigramTable

__all__ = ["AdaptiveDraftDecoder", "MCTSDrafter", "TrigramTable", "recipe_restore", "recipe_step"]
