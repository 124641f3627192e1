"""kMQ's claim on a small machine: at equal budget and equal steps, clusters and quality beat random choice.

The pool holds instructions in 25 latent skills with a long-tailed size distribution. A skill picks two of five symbols;
the base model knows all of them from pre-training under internal names (`op7`), but the instructions name them by words it
has never seen, so fine-tuning has to show which words mean which skill. Some skills are full of junk (wrong answers,
shuffled answers, copies of one row), and two groups of prompts have nothing but noise. Skills and junk are known to the
measurement only. The judge that gives quality and reward is a copy of the base model fine-tuned on a few clean held-out
examples of each skill.
"""

from __future__ import annotations

import copy
import functools
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
GIVEN = 5  # symbols in a prompt
PICKS = np.array([(i, j) for i in range(GIVEN) for j in range(GIVEN)])  # (skill, 2): which symbols a skill picks
SKILLS = len(PICKS)
NOISE_GROUPS = 2  # groups of prompts whose answers are random
FILLERS = ["please", "now", "kindly", "just", "do", "the", "quickly", "then"]
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|unknown|>")


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    pool: int = 3000
    budget: int = 150
    pretraining_steps: int = 500
    epochs: int = 10
    guide_epochs: int = 2  # of the models that guide the rounds of the iterative form
    test_per_skill: int = 20
    judge_per_skill: int = 16
    k: int = 32
    rounds: int = 3
    restarts: int = 2  # runs of each arm on one pool, with different selection and training seeds, averaged


FULL = Scale()
SMOKE = Scale(
    pool=300, budget=40, pretraining_steps=3, epochs=1, guide_epochs=1, test_per_skill=1, judge_per_skill=1, k=8, restarts=1
)
LEARNING_RATE = 1e-2


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
    """The two symbols that the skill picks."""
    return [symbols[i] for i in PICKS[skill]]


def spoken(symbols: list[int]) -> str:
    return " ".join(SYMBOLS[s] for s in symbols)


def instruction(group: int, symbols: list[int], rng: np.random.Generator) -> str:
    """A request in words, with fillers, about five symbols."""
    verb, noun = names_of(group)
    first, second = rng.choice(FILLERS, 2)
    return f"{first} {verb} {second} {noun} {spoken(symbols)} :"


def clean_row(skill: int, rng: np.random.Generator) -> dict[str, Any]:
    symbols = rng.integers(len(SYMBOLS), size=GIVEN).tolist()
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
        symbols = rng.integers(len(SYMBOLS), size=GIVEN).tolist()
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
        symbols = rng.integers(len(SYMBOLS), size=GIVEN).tolist()
        other = rng.integers(len(SYMBOLS), size=2).tolist()
        group = SKILLS + i % NOISE_GROUPS
        rows.append({"prompt": instruction(group, symbols, rng), "response": spoken(other), "skill": group, "junk": True})
    return Dataset.from_list([rows[i] for i in rng.permutation(len(rows))])


def tuned(base: LlamaForCausalLM, words: PreTrainedTokenizerFast, rows: Dataset, epochs: int, seed: int) -> LlamaForCausalLM:
    """A copy of the base model with its word vectors trained on the rows; the rest of so small a model would memorise."""
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name)
    return fine_tune(model, words, rows, epochs=epochs, lr=LEARNING_RATE, seed=seed)


@functools.lru_cache(maxsize=2)
def base_and_judge(scale: Scale) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base model, pre-trained on the skills under their internal names, and the judge. The same for all seeds."""
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    base = LlamaForCausalLM(config)
    matrices = [p for n, p in base.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in base.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0),
    ]
    train_lm(base, pretraining_batches(words, scale), steps=scale.pretraining_steps, optimizers=optimizers)
    rng = np.random.default_rng(1)
    held_out = Dataset.from_list([clean_row(s, rng) for s in range(SKILLS) for _ in range(scale.judge_per_skill)])
    judge = tuned(base, words, held_out, scale.epochs, seed=0)
    return base.eval(), judge.eval(), words


def pretraining_batches(words: PreTrainedTokenizerFast, scale: Scale) -> Iterator[dict[str, torch.Tensor]]:
    """Skills under their internal names, and instructions without answers.

    `please now just op7 c a b d a : b d <end>` has the loss on what follows the colon; an instruction, on every token.
    """
    rng = np.random.default_rng(0)
    fillers = np.array(words.convert_tokens_to_ids(FILLERS))
    first_symbol, colon, first_op, first_name = words.convert_tokens_to_ids(["a", ":", "op0", "verb0"])
    solved, asked = 64, 32
    for _ in range(scale.pretraining_steps):
        skill = rng.integers(SKILLS, size=solved)
        group = rng.integers(SKILLS + NOISE_GROUPS, size=asked)
        symbols = rng.integers(len(SYMBOLS), size=(solved + asked, GIVEN))
        picked = np.take_along_axis(symbols[:solved], PICKS[skill], 1)
        head = rng.choice(fillers, size=(solved + asked, 4))
        head[np.arange(solved), rng.choice([1, 3], solved)] = first_op + skill
        head[solved:, [1, 3]] = first_name + 2 * group[:, None] + np.arange(2)
        tail = np.full((solved + asked, 3), words.eos_token_id)
        tail[:solved, :2] = first_symbol + picked
        ids = np.concatenate([head, first_symbol + symbols, np.full((solved + asked, 1), colon), tail], 1)
        labels = ids.copy()
        labels[:solved, : 4 + GIVEN + 1] = -100
        labels[solved:, 4 + GIVEN + 1 :] = -100
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def balanced_accuracy(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, test: Dataset) -> float:
    """Mean over the skills of the share of answers that are exactly right."""
    answers = greedy_answers(model, words, test["prompt"], max_new_tokens=3, batch_size=256)
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

    def guide(model: Any, chosen: Dataset) -> Any:
        return tuned(model, of.words, chosen, scale.guide_epochs, seed)

    def answers(model: Any, prompts: Sequence[str]) -> list[str]:
        return greedy_answers(model, of.words, prompts, max_new_tokens=3, batch_size=256)

    choices = static_choices(scale, seed, of)
    rounds = IterativeKMQ(KMQ(scale.k, random_state=seed), rounds=scale.rounds).fit(of.pool, of.quality)
    result = rounds.run(
        of.base, of.rows, budget=scale.budget, scorer=of.reward, train=guide, generate=answers, tokenizer=of.words, seed=seed
    )
    choices["iterative"] = result.selection.indices
    figures = {}
    for name, chosen in choices.items():
        model = tuned(of.base, of.words, of.rows.select(chosen.tolist()), scale.epochs, seed)
        figures[name] = balanced_accuracy(model, of.words, of.test)
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


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What quality is for: the selection holds less junk than chance brings."""
    return {"kMQ selects less junk than random on every seed": all(r["kmq_junk"] < r["random_junk"] for r in rows)}


PROOF = Proof(
    system="kmq",
    claim="at equal budget and steps, kMQ's selection gives a higher accuracy averaged over skills than random selection",
    substrate="3,000 generated instructions in 25 long-tailed skills with 15% junk; 2-layer Llama, d = 64; 150 rows selected",
    baseline="random selection of as many rows, trained for as many steps",
    metric="accuracy averaged over skills",
    higher_is_better=True,
    margin=0.05,
    modules=tuple(
        f"grainwise.select.{name}"
        for name in ("kmq", "selection", "clustering", "quality", "iterative_kmq", "embedded_pool", "text_encoder")
    ),
    run=experiment,
    conditions=conditions,
    note="Not shown: the selection holds no less junk than chance. The student barely learns at this budget (accuracies near "
    "0.1), so the differences are small. Choosing by quality alone is ahead of kMQ on average, and the iterative form is not "
    "ahead of the static one.",
)
