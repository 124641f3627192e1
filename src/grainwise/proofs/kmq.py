"""kMQ's claim on a small machine: at equal budget and equal steps, clusters and quality beat random choice.

The pool holds instructions in 25 latent skills with a long-tailed size distribution. A prompt names a skill in words and
gives five attributes of a thing; the skill reports two of them. The base model knows all skills from pre-training under
internal names (`op7`), but the instructions name them by words that it has only seen without answers, so fine-tuning has
to show which words mean which skill. Some skills are full of junk (wrong answers, shuffled answers, copies of one row), and
two groups of prompts have nothing but noise. Skills and junk are known to the measurement only. The judge that gives
quality and reward is a copy of the base model fine-tuned on a few clean held-out examples of each skill.

The student trains the vectors of the naming words and nothing else, so many students share one frozen model and train as
one batch (`tuned`), each as it would alone. One row of a selection is one row of its training, copies included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grainwise.proofs.frame import Proof
from grainwise.select.clustering import choose_k
from grainwise.select.embedded_pool import EmbeddedPool
from grainwise.select.iterative_kmq import IterativeKMQ, greedy_answers
from grainwise.select.kmq import KMQ, KCenter
from grainwise.select.quality import LikelihoodScorer
from grainwise.select.text_encoder import TransformerEncoder
from grainwise.training import train_lm

ATTRIBUTES = ("colour", "size", "shape", "matter", "place")
VALUES = 6  # of each attribute
PICKS = np.array([(i, j) for i in range(len(ATTRIBUTES)) for j in range(len(ATTRIBUTES))])  # (skill, 2): what it reports
SKILLS = len(PICKS)
NOISE_GROUPS = 2  # groups of prompts whose answers are random
GROUPS = SKILLS + NOISE_GROUPS
NAMES = ("verb", "noun", "aim")  # each group of prompts has its own of each
FILLERS = ("please", "now", "kindly", "just", "do", "the", "quickly", "then")
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|unknown|>")
PROMPT, ANSWER = 10, 3  # tokens: four words, five attributes and a colon; two attributes and the end
WORDS_OF_A_ROW = np.delete(np.arange(PROMPT + ANSWER - 1), PROMPT - 1)  # all but colon and end
LEARNING_RATE = 3e-2
BATCH = 16


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    pool: int = 3000
    budget: int = 150
    pretraining_steps: int = 300
    steps: int = 300  # of every student, the judge included
    guide_steps: int = 100  # of the models that guide the rounds of the iterative form
    test_per_skill: int = 20
    judge_per_skill: int = 16
    grid: tuple[int, ...] = (8, 16, 32, 64)  # of K, chosen by the silhouette; at most two rows of the budget for each
    rounds: int = 3
    restarts: int = 3  # runs of each arm on one pool, with different selection and training seeds, averaged


FULL = Scale()
SMOKE = Scale(
    pool=300, budget=40, pretraining_steps=3, steps=3, guide_steps=2, test_per_skill=1, judge_per_skill=1, grid=(4, 8),
    restarts=1,
)  # fmt: skip


def vocabulary() -> list[str]:
    """Words by token id; the words that name skills come last."""
    words = [*SPECIALS, ":", *(f"{a}{v}" for a in ATTRIBUTES for v in range(VALUES)), *FILLERS]
    return [*words, *(f"op{s}" for s in range(SKILLS)), *(f"{n}{g}" for g in range(GROUPS) for n in NAMES)]


WORDS = vocabulary()
END, COLON, FIRST_VALUE, FIRST_FILLER, FIRST_OP, FIRST_NAME = map(
    WORDS.index, (SPECIALS[0], ":", "colour0", FILLERS[0], "op0", "verb0")
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per space-separated word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=SPECIALS[2]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIALS[0], bos_token=SPECIALS[0], pad_token=SPECIALS[1], unk_token=SPECIALS[2]
    )


def attributes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids of `count` things, int (count, 5)."""
    return FIRST_VALUE + VALUES * np.arange(len(ATTRIBUTES)) + rng.integers(VALUES, size=(count, len(ATTRIBUTES)))


def reported(skills: np.ndarray, things: np.ndarray) -> np.ndarray:
    """What the skills say of the things, int (count, 2)."""
    return np.take_along_axis(things, PICKS[skills], 1)


def instructions(groups: np.ndarray, things: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`please verb7 noun7 aim7 colour1 size4 shape0 matter2 place5 :`, int (count, PROMPT)."""
    filler = rng.integers(FIRST_FILLER, FIRST_FILLER + len(FILLERS), size=(len(groups), 1))
    names = FIRST_NAME + len(NAMES) * groups[:, None] + np.arange(len(NAMES))
    return np.concatenate([filler, names, things, np.full((len(groups), 1), COLON)], 1)


def solved(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Prompts, answers and the end, int (count, PROMPT + ANSWER)."""
    return np.concatenate([prompts, answers, np.full((len(prompts), 1), END)], 1)


def clean_rows(skills: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Instructions with the right answers, int (count, PROMPT + ANSWER)."""
    things = attributes(len(skills), rng)
    return solved(instructions(skills, things, rng), reported(skills, things))


def with_junk(rows: np.ndarray, skill: int, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One skill's rows with about `share` of them replaced, and which: bool (count,).

    In place of a row comes its words shuffled, the row with another skill's answer, or the row before once more.
    """
    rows, junk = rows.copy(), rng.random(len(rows)) < share
    kinds, others = rng.integers(3, size=len(rows)), (skill + rng.integers(1, SKILLS, size=len(rows))) % SKILLS
    junk[0] = False
    for i in np.flatnonzero(junk):
        if kinds[i] == 0:
            rows[i, WORDS_OF_A_ROW] = rng.permutation(rows[i, WORDS_OF_A_ROW])
        elif kinds[i] == 1:
            rows[i, PROMPT:-1] = rows[i, 4 + PICKS[others[i]]]
        else:
            rows[i] = rows[i - 1]
    return rows, junk


def any_answers(count: int, rng: np.random.Generator) -> np.ndarray:
    """Two attributes of nothing in particular, int (count, 2)."""
    return rng.integers(FIRST_VALUE, FIRST_VALUE + VALUES * len(ATTRIBUTES), size=(count, 2))


@dataclass(frozen=True)
class Rows:
    """ids (rows, PROMPT + ANSWER), group (rows,) and junk (rows,) of the pool."""

    ids: np.ndarray
    group: np.ndarray
    junk: np.ndarray

    def dataset(self) -> Dataset:
        """The rows as text: `prompt` and `response`."""
        words = np.array(WORDS)[self.ids]
        prompts = [" ".join(w) for w in words[:, :PROMPT].tolist()]
        return Dataset.from_dict({"prompt": prompts, "response": [" ".join(w) for w in words[:, PROMPT:-1].tolist()]})


def pool_rows(scale: Scale, seed: int) -> Rows:
    """The pool: skill sizes fall as 1/rank in an order drawn by the seed; about 15% junk, in a quarter of the skills and
    the noise groups."""
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(SKILLS)
    noise = round(0.05 * scale.pool)
    sizes = (scale.pool - noise) / (1 + ranks) / (1 / np.arange(1, SKILLS + 1)).sum()
    dirty = rng.choice(SKILLS, SKILLS // 4, replace=False)
    junk_share = min(0.6, 0.10 * scale.pool / sizes[dirty].sum())
    parts = []
    for skill in range(SKILLS):
        group = np.full(max(4, round(sizes[skill])), skill)
        rows, junk = with_junk(clean_rows(group, rng), skill, junk_share if skill in dirty else 0.0, rng)
        parts.append((rows, group, junk))
    group = SKILLS + np.arange(noise) % NOISE_GROUPS
    prompts = instructions(group, attributes(noise, rng), rng)
    parts.append((solved(prompts, any_answers(noise, rng)), group, np.ones(noise, bool)))
    ids, groups, junks = (np.concatenate(p) for p in zip(*parts))
    order = rng.permutation(len(ids))
    return Rows(ids[order], groups[order], junks[order])


def pretraining_batches(scale: Scale, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
    """Skills under their internal names, and instructions without answers.

    `please now just op7 colour1 ... : size4 place0 <end>`, perhaps with a naming word among the fillers, has the loss on
    what follows the colon; an instruction, on its words.
    """
    named, asked = 64, 32
    for _ in range(scale.pretraining_steps):
        skills, groups = rng.integers(SKILLS, size=named), rng.integers(GROUPS, size=asked)
        things = attributes(named + asked, rng)
        prompts = instructions(np.concatenate([skills, groups]), things, rng)
        others = rng.integers(FIRST_NAME, len(WORDS), size=(named, len(NAMES)))
        fillers = rng.integers(FIRST_FILLER, FIRST_FILLER + len(FILLERS), size=others.shape)
        prompts[:named, 1 : 1 + len(NAMES)] = np.where(rng.random(others.shape) < 0.5, others, fillers)
        prompts[np.arange(named), rng.integers(1, 1 + len(NAMES), size=named)] = FIRST_OP + skills
        answers = np.concatenate([reported(skills, things[:named]), np.full((asked, 2), END)])
        ids = solved(prompts, answers)
        labels = ids.copy()
        labels[:named, :PROMPT] = -100
        labels[named:, PROMPT:] = -100
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def pretrained(scale: Scale, seed: int) -> LlamaForCausalLM:
    """The base model, frozen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=1,
    )
    base = LlamaForCausalLM(config)
    matrices = [p for n, p in base.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in base.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0),
    ]
    batches = pretraining_batches(scale, np.random.default_rng(seed))
    train_lm(base, batches, steps=scale.pretraining_steps, optimizers=optimizers)
    return base.eval().requires_grad_(False)


def tuned(base: LlamaForCausalLM, chosen: Sequence[np.ndarray], steps: int, seeds: Sequence[int]) -> Tensor:
    """Train one student on each set of rows; returns their word vectors (students, vocabulary, width).

    Only the vectors of the naming words change. The students' losses are added, so each gets its own gradient and, from
    AdamW, its own step; each sees its rows in an order of its own seed, `BATCH` at a time.
    """
    table = base.get_input_embeddings().weight.detach()
    fixed = table[:FIRST_NAME].expand(len(chosen), -1, -1)
    names = table[FIRST_NAME:].repeat(len(chosen), 1, 1).requires_grad_()
    optimizer = torch.optim.AdamW([names], lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.06 * steps + 1), 1.0 - s / steps))
    batches = torch.stack([shuffled(torch.from_numpy(ids), steps, seed) for ids, seed in zip(chosen, seeds)], 1)
    student = torch.arange(len(chosen))[:, None, None]
    for ids in batches:  # (students, BATCH, length)
        vectors = torch.cat([fixed, names], 1)[student, ids]
        logits = answer_logits(base, vectors.flatten(0, 1))
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[..., PROMPT:].flatten()) * len(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return torch.cat([fixed, names], 1).detach()


def shuffled(ids: Tensor, steps: int, seed: int) -> Tensor:
    """`steps` batches (steps, BATCH, length) of the rows, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // len(ids))
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
    return ids[order[: steps * BATCH]].view(steps, BATCH, -1)


def answer_logits(base: LlamaForCausalLM, vectors: Tensor) -> Tensor:
    """Logits (rows, ANSWER, vocabulary) of the answers' tokens, from the vectors of whole rows."""
    hidden = base.model(inputs_embeds=vectors[:, :-1], use_cache=False).last_hidden_state
    return base.lm_head(hidden[:, PROMPT - 1 :])


@torch.no_grad()
def accuracy(base: LlamaForCausalLM, table: Tensor, test: np.ndarray, skills: np.ndarray) -> float:
    """Mean over the skills of the share of answers that greedy decoding gets exactly right.

    Greedy decoding gives the answer just if each of its tokens is the likeliest after those before it.
    """
    ids = torch.from_numpy(test)
    right = (answer_logits(base, table[ids]).argmax(-1) == ids[:, PROMPT:]).all(1).numpy()
    return float(np.mean([right[skills == s].mean() for s in range(SKILLS)]))


def with_vectors(base: LlamaForCausalLM, table: Tensor) -> LlamaForCausalLM:
    """The base model with other word vectors."""
    model = copy.deepcopy(base)
    model.get_input_embeddings().weight.data = table.clone()
    return model


@dataclass(frozen=True)
class Substrate:
    """What all arms share for one seed. quality: the judge's likelihood of each row's response. k: of the clusterings."""

    base: LlamaForCausalLM
    words: PreTrainedTokenizerFast
    rows: Rows
    texts: Dataset
    pool: EmbeddedPool
    quality: np.ndarray
    reward: LikelihoodScorer
    k: int


def substrate(scale: Scale, seed: int) -> Substrate:
    """Base model, judge, pool, embeddings (mean hidden state of the base model), quality, and K by the silhouette."""
    base, words, rows = pretrained(scale, seed), tokenizer(), pool_rows(scale, seed)
    held_out = clean_rows(np.repeat(np.arange(SKILLS), scale.judge_per_skill), np.random.default_rng(10_000 + seed))
    judge = with_vectors(base, tuned(base, [held_out], scale.steps, [seed])[0])
    texts = rows.dataset()
    pool = EmbeddedPool.from_dataset(texts, encoder=TransformerEncoder(base, words), progress=False)
    reward = LikelihoodScorer(judge, words, scale="log")
    k = choose_k(pool, scale.grid, seed=seed)
    return Substrate(base, words, rows, texts, pool, LikelihoodScorer(judge, words)(texts), reward, k)


def choices(scale: Scale, seed: int, of: Substrate) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Rows that each arm takes, and the junk of the iterative form's rounds."""
    rng, clean = np.random.default_rng(seed), np.flatnonzero(~of.rows.junk)
    static = {
        "k_center": KCenter().fit(of.pool),
        "km_closest": KMQ(of.k, within="closest", random_state=seed).fit(of.pool),
        "km_random": KMQ(of.k, random_state=seed).fit(of.pool),
        "kmq": KMQ(of.k, random_state=seed).fit(of.pool, of.quality),
        "kmq_k_too_large": KMQ(scale.budget, random_state=seed).fit(of.pool, of.quality),
    }
    taken = {
        "random": rng.choice(len(of.rows.ids), scale.budget, replace=False),
        "clean": rng.choice(clean, scale.budget, replace=False),
        "top_quality": np.argsort(-of.quality, kind="stable")[: scale.budget],
    }
    taken |= {name: selector.select(scale.budget, seed=seed).indices for name, selector in static.items()}
    rounds = IterativeKMQ(KMQ(of.k, random_state=seed), rounds=scale.rounds).fit(of.pool, of.quality)
    taken["iterative"], junk = iterative_choice(rounds, scale, seed, of)
    return taken, {f"iterative_junk_round_{i + 1}": share for i, share in enumerate(junk)}


def iterative_choice(rounds: IterativeKMQ, scale: Scale, seed: int, of: Substrate) -> tuple[np.ndarray, list[float]]:
    """The rows of iterative kMQ, and the junk share of each round's."""

    def guide(model: Any, chosen: Dataset) -> Any:
        texts = [f"{p} {r} {SPECIALS[0]}" for p, r in zip(chosen["prompt"], chosen["response"])]
        ids = np.array(of.words(texts)["input_ids"])
        return with_vectors(model, tuned(model, [ids], scale.guide_steps, [seed])[0])

    def answers(model: Any, prompts: Sequence[str]) -> list[str]:
        return greedy_answers(model, of.words, prompts, max_new_tokens=ANSWER, batch_size=256)

    found = rounds.run(
        of.base, of.texts, budget=scale.budget, scorer=of.reward, train=guide, generate=answers, tokenizer=of.words, seed=seed
    ).selection
    return found.indices, [float(of.rows.junk[found.indices[found.details["round"] == i]].mean()) for i in range(scale.rounds)]


def run(seed: int, smoke: bool) -> dict[str, float]:
    """All arms on one pool, averaged over `restarts` selection and training seeds; equal rows and equal steps."""
    scale = SMOKE if smoke else FULL
    of = substrate(scale, seed)
    skills = np.repeat(np.arange(SKILLS), scale.test_per_skill)
    test = clean_rows(skills, np.random.default_rng(20_000 + seed))
    seeds = [100 * seed + restart for restart in range(scale.restarts)]
    found = [choices(scale, s, of) for s in seeds]
    arms = list(found[0][0])
    chosen = [of.rows.ids[taken[arm]] for taken, _ in found for arm in arms]
    tables = tuned(of.base, chosen, scale.steps, [s for s in seeds for _ in arms])
    figures = [dict(rounds) for _, rounds in found]
    for i, table in enumerate(tables):
        arm, taken = arms[i % len(arms)], found[i // len(arms)][0][arms[i % len(arms)]]
        here = figures[i // len(arms)]
        here[arm] = accuracy(of.base, table, test, skills)
        here[f"{arm}_junk"] = float(of.rows.junk[taken].mean())
        here[f"{arm}_skills"] = float(np.isin(range(SKILLS), of.rows.group[taken]).sum())
    means = {name: round(sum(f[name] for f in figures) / len(figures), 4) for name in figures[0]}
    return {"baseline": means.pop("random"), "ours": means.pop("kmq"), "k": of.k, **means}


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """That the task can be learned from so few rows, and what quality is for: less junk than chance brings."""
    return {
        "a clean random selection of the same size scores at least 0.5 on every seed": all(r["clean"] >= 0.5 for r in rows),
        "kMQ selects less junk than random on every seed": all(r["kmq_junk"] < r["random_junk"] for r in rows),
    }


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
    run=run,
    conditions=conditions,
    note="Developed on seeds 10 and 11. The student's 300 steps and rate 0.03 are the best of six settings on clean rows. For "
    "kMQ two things were tried: prompts with two and with three naming words, and a grid of K up to 128 and up to 64 (half the "
    "budget), the second after K = 16 had beaten the silhouette's 128 on one seed of two; random choice has no settings. On "
    "those seeds k-center and random clean rows came close to kMQ or passed it, quality alone was behind random choice, and "
    "the iterative form was not reliably ahead of the static one.",
)
