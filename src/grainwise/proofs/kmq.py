"""kMQ's claim on a small machine: at equal budget and equal steps, clusters and quality beat random choice.

The pool holds instructions in 32 latent skills with a long-tailed size distribution. A skill is an operation on four
symbols (a rearrangement, or a shift of each symbol) that the base model knows under an internal name from pre-training;
the instructions name it by words it has never seen, so fine-tuning has to show which words mean which operation. Some
skills are full of junk: wrong answers, shuffled answers, copies of one row; two groups of prompts have nothing but noise.
Skills and junk are known to the measurement only. The judge that gives quality and reward is a copy of the base model
fine-tuned on a few clean held-out examples of each skill.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grainwise.proofs.frame import Proof
from grainwise.select.embedded_pool import EmbeddedPool
from grainwise.select.iterative_kmq import IterativeKMQ, fine_tune, greedy_answers
from grainwise.select.kmq import KMQ, KCenter
from grainwise.select.quality import LikelihoodScorer
from grainwise.select.text_encoder import TransformerEncoder
from grainwise.training import train_lm

SYMBOLS = [chr(ord("a") + i) for i in range(16)]
FILLERS = ["please", "now", "kindly", "just", "do", "the", "a_bit", "then"]
REARRANGEMENTS = list(itertools.permutations(range(4)))[1:21]
SHIFTS = list(range(1, 13))
OPERATIONS = [*(("rearrange", p) for p in REARRANGEMENTS), *(("shift", s) for s in SHIFTS)]
SKILLS = len(OPERATIONS)
NOISE_GROUPS = 2  # groups of prompts whose answers are random
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|unknown|>")


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    pool: int = 4000
    budget: int = 200
    pretraining_steps: int = 1500
    epochs: int = 10
    test_per_skill: int = 12
    judge_per_skill: int = 12
    k: int = 48
    rounds: int = 3
    restarts: int = 2  # trainings of each arm, with different selection and training seeds, averaged


FULL = Scale()
SMOKE = Scale(pool=400, budget=64, pretraining_steps=3, epochs=1, test_per_skill=1, judge_per_skill=2, k=16, restarts=1)
LEARNING_RATE = 1e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per space-separated word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIALS, ":", *SYMBOLS, *FILLERS]
    words += [f"op{i}" for i in range(SKILLS)] + [w for g in range(SKILLS + NOISE_GROUPS) for w in names_of(g)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=SPECIALS[2]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIALS[0], bos_token=SPECIALS[0], pad_token=SPECIALS[1], unk_token=SPECIALS[2]
    )


def names_of(group: int) -> tuple[str, str]:
    """The two words that name a skill in instructions."""
    return f"verb{group}", f"noun{group}"


def answer(skill: int, symbols: list[int]) -> list[int]:
    """What the operation makes of four symbols."""
    kind, how = OPERATIONS[skill]
    if kind == "rearrange":
        return [symbols[i] for i in how]
    return [(s + how) % len(SYMBOLS) for s in symbols]


def spoken(symbols: list[int]) -> str:
    return " ".join(SYMBOLS[s] for s in symbols)


def instruction(group: int, symbols: list[int], rng: np.random.Generator) -> str:
    """A request in words, with fillers, about four symbols."""
    verb, noun = names_of(group)
    first, second = rng.choice(FILLERS, 2)
    return f"{first} {verb} {second} {noun} {spoken(symbols)} :"


def clean_row(skill: int, rng: np.random.Generator) -> dict[str, Any]:
    symbols = rng.integers(len(SYMBOLS), size=4).tolist()
    return {
        "prompt": instruction(skill, symbols, rng),
        "response": spoken(answer(skill, symbols)),
        "skill": skill,
        "junk": False,
    }


def junk_row(skill: int, rng: np.random.Generator, previous: dict[str, Any]) -> dict[str, Any]:
    """A wrong answer, a shuffled answer, or the row before once more."""
    row = clean_row(skill, rng) | {"junk": True}
    kind = rng.integers(3)
    if kind == 0:
        symbols = rng.integers(len(SYMBOLS), size=4).tolist()
        return row | {"response": spoken(answer(int(rng.integers(SKILLS)), symbols))}
    if kind == 1:
        return row | {"response": " ".join(rng.permutation(row["response"].split()))}
    return row | {"prompt": previous["prompt"], "response": previous["response"]}


def pool_rows(scale: Scale, seed: int) -> Dataset:
    """The pool: skill sizes fall as 1/rank in an order drawn by the seed; about 15% junk in a quarter of the skills."""
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(SKILLS)
    noise = round(0.05 * scale.pool)
    sizes = (scale.pool - noise) / (1 + ranks) / (1 / np.arange(1, SKILLS + 1)).sum()
    dirty = set(rng.choice(SKILLS, SKILLS // 4, replace=False).tolist())
    in_dirty = sum(sizes[s] for s in dirty)
    junk_share = min(0.6, 0.10 * scale.pool / in_dirty)
    rows: list[dict[str, Any]] = []
    for skill in range(SKILLS):
        previous = clean_row(skill, rng)
        for _ in range(max(4, round(sizes[skill]))):
            is_junk = skill in dirty and rng.random() < junk_share
            rows.append(junk_row(skill, rng, previous) if is_junk else clean_row(skill, rng))
            previous = rows[-1]
    for i in range(noise):
        symbols, other = rng.integers(len(SYMBOLS), size=(2, 4)).tolist()
        group = SKILLS + i % NOISE_GROUPS
        rows.append({"prompt": instruction(group, symbols, rng), "response": spoken(other), "skill": group, "junk": True})
    return Dataset.from_list([rows[i] for i in rng.permutation(len(rows))])


@functools.lru_cache(maxsize=2)
def base_and_judge(scale: Scale) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base model, pre-trained on operations under their internal names, and the judge. The same for all seeds."""
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    base = LlamaForCausalLM(config)
    train_lm(base, pretraining_batches(words, scale), steps=scale.pretraining_steps, lr=4e-3, schedule="cosine")
    rng = np.random.default_rng(1)
    held_out = Dataset.from_list([clean_row(s, rng) for s in range(SKILLS) for _ in range(scale.judge_per_skill)])
    judge = fine_tune(copy.deepcopy(base), words, held_out, epochs=scale.epochs, lr=LEARNING_RATE)
    return base.eval(), judge.eval(), words


def pretraining_batches(words: PreTrainedTokenizerFast, scale: Scale) -> Iterator[dict[str, torch.Tensor]]:
    """`op7 c a b d : d b a c <end>`, the operation sometimes after fillers; the loss on what follows the colon."""
    rng = np.random.default_rng(0)
    fillers = np.array(words.convert_tokens_to_ids(FILLERS))
    first_symbol, colon, first_op = words.convert_tokens_to_ids(["a", ":", "op0"])
    rearrange = np.array(REARRANGEMENTS)
    for _ in range(scale.pretraining_steps):
        count = 128
        skill = rng.integers(SKILLS, size=count)
        symbols = rng.integers(len(SYMBOLS), size=(count, 4))
        moved = np.take_along_axis(symbols, rearrange[np.minimum(skill, len(REARRANGEMENTS) - 1)], 1)
        shifted = (symbols + np.array(SHIFTS)[np.maximum(skill - len(REARRANGEMENTS), 0)][:, None]) % len(SYMBOLS)
        result = np.where((skill < len(REARRANGEMENTS))[:, None], moved, shifted)
        head = rng.choice(fillers, size=(count, 4))
        head[np.arange(count), rng.choice([1, 3], count)] = first_op + skill
        ids = np.concatenate(
            [head, first_symbol + symbols, np.full((count, 1), colon), first_symbol + result, np.zeros((count, 1), int)], 1
        )
        labels = ids.copy()
        labels[:, :9] = -100
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def balanced_accuracy(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, test: Dataset) -> float:
    """Mean over the skills of the share of answers that are exactly right."""
    answers = greedy_answers(model, words, test["prompt"], max_new_tokens=5, batch_size=256)
    right = np.array([a.split() == r.split() for a, r in zip(answers, test["response"])])
    skills = np.array(test["skill"])
    return float(np.mean([right[skills == s].mean() for s in range(SKILLS)]))


@dataclass(frozen=True)
class Substrate:
    """What all arms share for one seed. quality: the judge's likelihood of each row's response."""

    base: LlamaForCausalLM
    words: PreTrainedTokenizerFast
    rows: Dataset
    pool: EmbeddedPool
    quality: np.ndarray
    reward: LikelihoodScorer
    test: Dataset


def substrate(scale: Scale, seed: int) -> Substrate:
    """Pool, embeddings (mean hidden state of the base model), quality and test rows."""
    base, judge, words = base_and_judge(scale)
    rows = pool_rows(scale, seed)
    rng = np.random.default_rng(10_000 + seed)
    test = Dataset.from_list([clean_row(s, rng) for s in range(SKILLS) for _ in range(scale.test_per_skill)])
    pool = EmbeddedPool.from_dataset(rows, encoder=TransformerEncoder(base, words), progress=False)
    reward = LikelihoodScorer(judge, words, scale="log")
    return Substrate(base, words, rows, pool, LikelihoodScorer(judge, words)(rows), reward, test)


def static_choices(scale: Scale, seed: int, of: Substrate) -> dict[str, np.ndarray]:
    """Rows that each way of choosing beforehand takes."""
    plain = KMQ(scale.k, random_state=seed).fit(of.pool)
    central = KMQ(scale.k, within="closest", random_state=seed).fit(of.pool)
    weighted = KMQ(scale.k, random_state=seed).fit(of.pool, of.quality)
    return {
        "random": np.random.default_rng(seed).choice(len(of.rows), scale.budget, replace=False),
        "top_quality": np.argsort(-of.quality, kind="stable")[: scale.budget],
        "k_center": KCenter().fit(of.pool).select(scale.budget, seed=seed).indices,
        "km_closest": central.select(scale.budget, seed=seed).indices,
        "km_random": plain.select(scale.budget, seed=seed).indices,
        "kmq": weighted.select(scale.budget, seed=seed).indices,
    }


def one_run(scale: Scale, seed: int, of: Substrate) -> dict[str, float]:
    """Balanced accuracy, junk share and number of skills of every arm; equal rows and equal steps."""
    junk, skill = np.array(of.rows["junk"]), np.array(of.rows["skill"])

    def trained(model: Any, chosen: Dataset) -> Any:
        return fine_tune(model, of.words, chosen, epochs=scale.epochs, lr=LEARNING_RATE, seed=seed)

    def answers(model: Any, prompts: Sequence[str]) -> list[str]:
        return greedy_answers(model, of.words, prompts, max_new_tokens=5, batch_size=256)

    choices = static_choices(scale, seed, of)
    models = {name: trained(copy.deepcopy(of.base), of.rows.select(c.tolist())) for name, c in choices.items()}
    rounds = IterativeKMQ(KMQ(scale.k, random_state=seed), rounds=scale.rounds).fit(of.pool, of.quality)
    result = rounds.run(
        of.base, of.rows, budget=scale.budget, scorer=of.reward, train=trained, generate=answers, tokenizer=of.words, seed=seed
    )
    choices["iterative"], models["iterative"] = result.selection.indices, result.model
    figures = {}
    for name, chosen in choices.items():
        figures[name] = balanced_accuracy(models[name], of.words, of.test)
        figures[f"{name}_junk"] = float(junk[chosen].mean())
        figures[f"{name}_skills"] = float(np.isin(range(SKILLS), skill[chosen]).sum())
    for number in range(scale.rounds):
        here = result.selection.indices[result.selection.details["round"] == number]
        figures[f"iterative_junk_round_{number + 1}"] = float(junk[here].mean())
    return figures


def experiment(seed: int, smoke: bool) -> dict[str, float]:
    """All arms on one pool, averaged over `restarts` selection and training seeds."""
    scale = SMOKE if smoke else FULL
    of = substrate(scale, seed)
    runs = [one_run(scale, 100 * seed + restart, of) for restart in range(scale.restarts)]
    figures = {name: round(sum(r[name] for r in runs) / len(runs), 4) for name in runs[0]}
    return {"baseline": figures.pop("random"), "ours": figures.pop("kmq"), **figures}


PROOF = Proof(
    system="kmq",
    claim="at equal budget and steps, kMQ's selection gives a higher accuracy averaged over skills than random selection",
    substrate="4,000 generated instructions in 32 long-tailed skills with 15% junk; Llama 3 layers, d = 64; 200 rows selected",
    baseline="random selection of as many rows, trained for as many steps",
    metric="accuracy averaged over skills",
    higher_is_better=True,
    margin=0.05,
    modules=("grainwise.select.kmq",),
    run=experiment,
)
