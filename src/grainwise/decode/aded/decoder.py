"""The drafter and the decoder of ADED, and its step in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from grainwise.decode.aded.tree_search import best_paths, search
from grainwise.decode.aded.trigram_table import TrigramTable
from grainwise.decode.generation import TreeDecoder
from grainwise.decode.token_tree import Integers, TokenTree

if TYPE_CHECKING:
    from grainwise.recipe_state import RecipeState

MEASURED_PROMPTS = 4  # by a recipe step, each of
PROMPT_TOKENS = 64


class MCTSDrafter:
    """Drafts from a tri-gram table by Monte-Carlo tree search, and lets the verified text sharpen the table.

    iterations: of the search at each step. depth: greatest number of drafted tokens in a row (the search itself looks
        depth - 1 ahead; one more is appended greedily). paths: most visited prefixes that are drafted. budget: greatest
        number of drafted nodes. window, increment, cap: the tri-grams inside the last `window` tokens gain `increment`
        before each search, up to `cap`; an increment of 0 freezes the table. c1, c2: constants of PUCT.
        seed: of the rollouts; the search at a given point of a given text is the same whatever was generated before it.
    Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        table: TrigramTable,
        *,
        iterations: int = 150,
        depth: int = 4,
        paths: int = 24,
        budget: int = 64,
        window: int = 16,
        increment: float = 0.04,
        cap: float = 3.0,
        c1: float = 32.0,
        c2: float = 8.0,
        seed: int = 0,
    ) -> None:
        least = {"iterations": 1, "depth": 2, "paths": 1, "budget": 1, "window": 3}
        given = {"iterations": iterations, "depth": depth, "paths": paths, "budget": budget, "window": window}
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if increment < 0 or cap <= increment:
            raise ValueError(f"expected 0 <= increment < cap, got increment {increment} and cap {cap}")
        if c1 < 0 or c2 <= 0:
            raise ValueError(f"PUCT needs c1 >= 0 and c2 > 0, got c1 {c1} and c2 {c2}")
        self.table, self.iterations, self.depth, self.paths, self.budget = table, iterations, depth, paths, budget
        self.window, self.increment, self.cap, self.c1, self.c2, self.seed = window, increment, cap, c1, c2, seed

    def begin(self, text: Integers, vocabulary: int) -> None:
        """Check that the target can score what the table may draft."""
        if self.table.vocab_size > vocabulary:
            raise ValueError(
                f"the table was built for a vocabulary of {self.table.vocab_size}, the model scores {vocabulary} tokens: "
                "build the table with the model's own tokenizer"
            )

    def draft(self, text: Integers, depth: int) -> TokenTree:
        """Reinforce the table with the end of the text, search, and merge the best paths into a tree."""
        self.table.reinforce(text[-self.window :], self.increment, self.cap)
        depth = min(depth, self.depth)
        if len(text) < 2 or depth < 1:  # no context to look up, or nothing left to guess
            return TokenTree.single(int(text[-1]))
        first, second = int(text[-2]), int(text[-1])
        tree = search(
            self.table.rows, first, second,
            iterations=self.iterations, depth=depth, c1=self.c1, c2=self.c2,
            generator=np.random.default_rng((self.seed, len(text))),
        )  # fmt: skip
        return TokenTree.from_paths(second, best_paths(self.table.rows, tree, first, self.paths), self.budget)


class AdaptiveDraftDecoder(TreeDecoder):
    """Decode with drafts from a tri-gram table that learns: `model.generate(ids, custom_generate=decoder, ...)`.

    The output is what plain decoding gives: the same text when greedy, the same law (and under one seed the same text)
    when sampling. The table keeps learning from one prompt to the next; `table.reset()` forgets what it learned, for
    reproducible runs or between users. Other arguments: see `MCTSDrafter`.
    """

    def __init__(self, table: TrigramTable, **search_settings: int | float) -> None:
        drafter = MCTSDrafter(table, **search_settings)  # type: ignore[arg-type]
        super().__init__(drafter)
        self.table = table


def recipe_step(
    state: RecipeState,
    *,
    max_new_tokens: int = 128,
    budget: int = 64,
    paths: int = 24,
    depth: int = 4,
    iterations: int = 150,
    seed: int = 0,
) -> dict[str, float | int | str]:
    """Build a table from the training text, set `state.decode`, save the table to `state.folder/table`.

    Returns its size and what `MEASURED_PROMPTS` test prompts cost: tokens for each target forward, and milliseconds of
    drafting for each.
    """
    from grainwise.data import blocks

    vocabulary = state.model.config.get_text_config().vocab_size
    if len(state.tokenizer) > vocabulary:
        raise ValueError(f"the tokenizer has {len(state.tokenizer)} tokens, the model scores only {vocabulary}")
    table = TrigramTable.from_rows(state.train, state.tokenizer)
    decoder = AdaptiveDraftDecoder(table, budget=budget, paths=paths, depth=depth, iterations=iterations, seed=seed)
    table.save(state.folder / "table")
    decoder.drafter.draft(np.arange(3) % vocabulary, depth)  # compiles the search, so that no prompt is timed with it
    emitted: list[int] = []
    draft_seconds = 0.0
    device = next(state.model.parameters()).device
    was_training = state.model.training
    state.model.eval()
    for i, ids in enumerate(blocks(state.test, state.tokenizer, PROMPT_TOKENS)[:MEASURED_PROMPTS].to(device)):
        state.progress(i, MEASURED_PROMPTS, "decoding test prompts")
        ask = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        state.model.generate(**ask, custom_generate=decoder, max_new_tokens=max_new_tokens, do_sample=False)
        emitted += decoder.record.emitted
        draft_seconds += decoder.record.draft_seconds
    state.model.train(was_training)
    table.reset()  # what was learned from these prompts must not show in later measurements
    state.decode = decoder
    forwards = max(1, len(emitted))
    return {
        "table_contexts": len(table.rows.keys),
        "table_rows": int(table.rows.used[0]),
        "table_bytes": table.nbytes,
        "tokens_per_forward": sum(emitted) / forwards,
        "draft_ms": 1e3 * draft_seconds / forwards,
    }


def recipe_restore(
    state: RecipeState,
    *,
    max_new_tokens: int = 128,
    budget: int = 64,
    paths: int = 24,
    depth: int = 4,
    iterations: int = 150,
    seed: int = 0,
) -> None:
    """Set `state.decode` from the table that a finished `recipe_step` left in `state.folder`."""
    table = TrigramTable.load(state.folder / "table", tokenizer=state.tokenizer)
    state.decode = AdaptiveDraftDecoder(table, budget=budget, paths=paths, depth=depth, iterations=iterations, seed=seed)
