"""Fewer forward passes per token: guess ahead, verify the guesses at once, keep what the model would have said.

A member of this room guesses (a `Drafter`); what it shares with the others is everything after the guess:
`TokenTree` merges guessed continuations into a prefix tree with its mask and positions; `TreeVerifier` scores the whole
tree in one pass of any causal LM and compacts its cache; `acceptance` holds the rules that decide which drafts stand
(greedy, shared sample and tree rejection keep the model's law exactly, typical acceptance does not); `TreeDecoder` is the
loop, a callable for `model.generate(custom_generate=...)` that honours lengths, end tokens, stopping criteria, logits
processors, sampling and streamers, and counts tokens per forward.
"""

from grainwise.decode.acceptance import greedy, shared_sample, tree_rejection, typical
from grainwise.decode.generation import DecodingRecord, Drafter, TreeDecoder
from grainwise.decode.token_tree import TokenTree
from grainwise.decode.tree_verifier import TreeVerifier

__all__ = [
    "DecodingRecord",
    "Drafter",
    "TokenTree",
    "TreeDecoder",
    "TreeVerifier",
    "greedy",
    "shared_sample",
    "tree_rejection",
    "typical",
]
