"""ADED's claim on a small machine: an adapting tri-gram table drafts more tokens per target forward than prompt look-up.

The target continues prompts of 64 tokens by 128 tokens, drawn at temperature 0.7 and top-p 0.8, and greedily. The table is
counted from other documents of the prompts' corpus; "shifted" figures use a table of the wrong domain instead, counted
from program code without its documentation. All drafters have the same budget of nodes and the same verifier.

Which drafts are accepted depends on the drafts and on the text that plain decoding gives, on nothing else. So the text is
made once and every drafter is replayed on it; some prompts are really decoded as well, by plain decoding, ADED and prompt
look-up under one seed, and must give the same text and the counts of their replays.
"""

from __future__ import annotations

import ast
import functools
import heapq
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grainwise.decode.aded import MCTSDrafter, TrigramTable
from grainwise.decode.generation import Drafter, TreeDecoder
from grainwise.decode.token_tree import Integers, TokenTree
from grainwise.proofs.frame import Proof

BUDGET = 64
PROMPTS, PROMPT, NEW = 30, 64, 128  # prompts, tokens of each, new tokens
CHECKED = 2  # prompts that are really decoded
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
GREEDY = {"do_sample": False}
DEPTH = 8
TUNED = {"depth": DEPTH, "paths": 48, "increment": 0.08}  # the best of as many trials as the baseline had, see the note
CODE_PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")


@dataclass
class PromptLookupDrafter:
    """Copies what followed earlier occurrences of the last two tokens, or of the last one (as `prompt_lookup_num_tokens`).

    The latest occurrences come first, each as a path of up to `length` tokens, until `budget` nodes are full; the form in
    transformers copies a single one.
    """

    budget: int = BUDGET
    length: int = 20
    ngram: int = 2
    copies: int = BUDGET

    def begin(self, text: Integers, vocabulary: int) -> None:
        """Nothing is kept between texts."""

    def draft(self, text: Integers, depth: int) -> TokenTree:
        """A tree of copies."""
        length = min(self.length, depth)
        paths = np.full((self.copies, max(0, length)), -1)
        found = 0
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text, size)[:-1]
            for start in np.flatnonzero((windows == text[-size:]).all(axis=1))[::-1] + size:
                if found == self.copies:
                    break
                copy = text[start : start + length]
                paths[found, : len(copy)] = copy
                found += 1
        return TokenTree.from_paths(int(text[-1]), paths[:found], self.budget)


@dataclass
class BeamDrafter:
    """The `budget` continuations of greatest probability under the table as it was counted, by products over their path."""

    table: TrigramTable
    depth: int
    budget: int = BUDGET

    def begin(self, text: Integers, vocabulary: int) -> None:
        """Nothing is kept between texts."""

    def draft(self, text: Integers, depth: int) -> TokenTree:
        """Best-first expansion."""
        depth = min(depth, self.depth)
        tokens, parents = [int(text[-1])], [-1]
        before = [int(text[-2])]  # for each node the token in front of it
        depths = [0]
        heap: list[tuple[float, int, int]] = []  # (-probability, parent, token)

        def open_up(node: int, probability: float) -> None:
            if depths[node] < depth:
                for token, score in self.table.row(before[node], tokens[node]).items():
                    heapq.heappush(heap, (-probability * score, node, token))

        open_up(0, 1.0)
        while heap and len(tokens) <= self.budget:
            negative, parent, token = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            before.append(tokens[parent])
            depths.append(depths[parent] + 1)
            open_up(len(tokens) - 1, -negative)
        return TokenTree(np.array(tokens), np.array(parents))


def replay(drafter: Drafter, text: Integers, start: int) -> list[int]:
    """Tokens that each verification emits if plain decoding gives `text`; the token at `start` comes with the prompt."""
    emitted = []
    end = start + 1
    while end < len(text):
        tree = drafter.draft(text[:end], len(text) - end - 1)
        node, count = 0, 1
        while (child := tree.child(node, int(text[end + count - 1]))) is not None:
            node, count = child, count + 1
        emitted.append(count)
        end += count
    return emitted


def prompts(tokenizer: Any, count: int, seed: int) -> Tensor:
    """`count` prompts (count, PROMPT) from the test split, chosen by `seed`."""
    from grainwise.data import blocks, load

    pool = blocks(load("pydoc", "test"), tokenizer, PROMPT)
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]


def generate(model: PreTrainedModel, ids: Tensor, seed: int, **options: Any) -> Tensor:
    """NEW more tokens for each row; the end-of-text token does not stop it, so that all texts are equally long."""
    torch.manual_seed(seed)
    fixed = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **options)


def mean(runs: list[list[int]]) -> float:
    """Tokens per forward over all prompts."""
    return sum(map(sum, runs)) / sum(map(len, runs))


def program_code(packages: tuple[str, ...]) -> list[str]:
    """The modules of standard packages without docstrings and comments: text of another kind, on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(p for name in packages for p in (root / name).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
                node.body[:1] = [ast.Pass()]
        texts.append(ast.unparse(tree))
    return texts


@functools.cache
def substrate(smoke: bool) -> tuple[PreTrainedModel, Any, TrigramTable, TrigramTable]:
    """Model in double precision (no rounding decides between two tokens), tokenizer, right and wrong table."""
    from grainwise import zoo
    from grainwise.data import load

    model, tokenizer = zoo.load("llama-nano" if smoke else "llama-mini", dtype=torch.float64)
    table = TrigramTable.from_rows(load("pydoc", "validation" if smoke else "train"), tokenizer)
    code = program_code(CODE_PACKAGES[-1:] if smoke else CODE_PACKAGES)
    return model, tokenizer, table, TrigramTable.from_rows(({"text": t} for t in code), tokenizer)


@dataclass
class Check:
    """Whether real decoding gave plain decoding's text and its replay's counts; milliseconds of drafting and verifying."""

    identical: bool = True
    agrees: bool = True
    draft_ms: float = 0.0
    target_ms: float = 0.0


def check(model: PreTrainedModel, drafter: Drafter, table: TrigramTable, texts: Tensor, seed: int, **options: Any) -> Check:
    """Decode the prompts of `texts` (count, PROMPT + NEW), which plain decoding made under the same seed."""
    decoder, found = TreeDecoder(drafter), Check()
    counts = []
    table.reset()
    for text in texts:
        got = generate(model, text[None, :PROMPT], seed, custom_generate=decoder, **options)[0]
        found.identical &= torch.equal(got, text)
        counts.append(decoder.record.emitted)
        found.draft_ms += 1e3 * decoder.record.draft_seconds
        found.target_ms += 1e3 * decoder.record.target_seconds
    table.reset()
    found.agrees = counts == [replay(drafter, text, PROMPT) for text in texts.numpy()]
    found.draft_ms /= sum(map(len, counts))
    found.target_ms /= sum(map(len, counts))
    return found


def run(seed: int, smoke: bool) -> dict[str, Any]:
    """One choice of prompts and one seed of sampling and search."""
    model, tokenizer, table, wrong = substrate(smoke)
    ids = prompts(tokenizer, 4 if smoke else PROMPTS, seed)

    def adaptive(use: TrigramTable = table, **changed: Any) -> MCTSDrafter:
        return MCTSDrafter(use, **{"budget": BUDGET, "seed": seed, **TUNED, **changed})

    def replays(drafter: Drafter, texts: Tensor) -> list[list[int]]:
        table.reset()
        wrong.reset()
        return [replay(drafter, text, PROMPT) for text in texts.numpy()]

    texts, greedy = generate(model, ids, seed, **SAMPLED), generate(model, ids, seed, **GREEDY)
    ours, frozen = replays(adaptive(), texts), replays(adaptive(increment=0.0), texts)
    half = len(ids) // 2
    figures: dict[str, Any] = {
        "baseline": mean(replays(PromptLookupDrafter(), texts)),
        "ours": mean(ours),
        "paper_settings": mean(replays(MCTSDrafter(table, budget=BUDGET, seed=seed), texts)),
        "lookup_single_copy_of_10": mean(replays(PromptLookupDrafter(copies=1, length=10), texts)),
        "frozen_mcts": mean(frozen),
        "frozen_beam": mean(replays(BeamDrafter(table, DEPTH), texts)),
        "empty_table_adaptive": mean(replays(adaptive(TrigramTable.empty(table.vocab_size)), texts)),
        "shifted_adaptive": mean(replays(adaptive(wrong), texts)),
        "shifted_frozen_mcts": mean(replays(adaptive(wrong, increment=0.0), texts)),
        "shifted_frozen_beam": mean(replays(BeamDrafter(wrong, DEPTH), texts)),
        "second_half_over_first": mean(ours[half:]) / mean(ours[:half]),
        "second_half_over_first_frozen": mean(frozen[half:]) / mean(frozen[:half]),
        "greedy_ours": mean(replays(adaptive(), greedy)),
        "greedy_lookup": mean(replays(PromptLookupDrafter(), greedy)),
        "greedy_lookup_single_copy_of_10": mean(replays(PromptLookupDrafter(copies=1, length=10), greedy)),
        "greedy_frozen_mcts": mean(replays(adaptive(increment=0.0), greedy)),
    }
    return figures | checked(model, adaptive(), table, ids[: 2 if smoke else CHECKED], seed)


def checked(model: PreTrainedModel, drafter: MCTSDrafter, table: TrigramTable, ids: Tensor, seed: int) -> dict[str, Any]:
    """Real decoding of a few prompts, sampled and greedy, by plain decoding, ADED and prompt look-up."""
    found = []
    for options in (SAMPLED, GREEDY):
        plain = torch.cat([generate(model, prompt[None], seed, **options) for prompt in ids])
        found += [check(model, d, table, plain, seed, **options) for d in (drafter, PromptLookupDrafter())]
    return {
        "identical": all(c.identical for c in found),
        "replays_agree": all(c.agrees for c in found),
        "draft_ms": found[0].draft_ms,
        "target_ms": found[0].target_ms,
    }


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What else must hold on every seed."""
    return {
        "output identical to plain decoding, greedy and sampled": all(r["identical"] for r in rows),
        "replays agree with real runs": all(r["replays_agree"] for r in rows),
        "at least 0.15 tokens per forward more than prompt look-up": all(r["ours"] - r["baseline"] >= 0.15 for r in rows),
        "shifted domain: at least 10% more than frozen": all(
            r["shifted_adaptive"] >= 1.1 * r["shifted_frozen_mcts"] for r in rows
        ),
    }


PROOF = Proof(
    system="aded",
    claim="a tri-gram table that adapts while decoding drafts more accepted tokens per target forward than prompt look-up, "
    "with the output of plain decoding",
    substrate="zoo/llama-mini on 30 pydoc test prompts (64 tokens, 128 new at temperature 0.7, top-p 0.8), "
    "table from the pydoc train split",
    baseline="prompt look-up that fills the same budget of 64 nodes with copies, same verifier",
    metric="tokens per target forward",
    higher_is_better=True,
    margin=0.05,
    modules=(
        "grainwise.decode.aded",
        "grainwise.decode.acceptance",
        "grainwise.decode.generation",
        "grainwise.decode.token_tree",
        "grainwise.decode.tree_verifier",
    ),
    run=run,
    conditions=conditions,
    note="Greedy text of a model of this size soon falls into loops of a few tokens, where copying twenty tokens at a time is "
    "all that is needed, and look-up wins; the greedy_ figures record it beside the sampled text that the claim is measured "
    "on. Both sides were tuned alike, by the mean over seeds 10 and 11 of the tokens per forward on sampled text, eight trials "
    "each: ours with depth 4 or 8, paths 24 or 48 and increment 0.04 or 0.08 (the paper's values and their doubles; the "
    "largest of each won, 2.91 against 2.60 at the paper's), look-up with n-grams up to 2 or 3, copies of 10 or 20 tokens and "
    "at most 8 or 64 copies (2, 20 and 64 won, 2.55 against 2.48 for the worst).",
)
