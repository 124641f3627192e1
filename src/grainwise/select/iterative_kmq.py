"""Iterative kMQ: the budget is spent in rounds, and clusters are re-weighted by what the model still has to learn.

Yu, Chen, Ahmadian, Fadaee: "Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement",
arXiv 2409.11378, section on iterative refinement. Each round draws a part of the budget by the cluster weights, trains a
copy of the base model on everything drawn so far, lets it answer the drawn prompts, and scores how much better the
reference answers are than its own. Clusters whose references are no better (noise, or learned already) lose weight.

Departures: the paper's update w ∝ s · w_prev (`update="ratio"`) is not defined for negative scores, which occur; the
default multiplies by softmax(s / temperature) instead, and `clip` by max(s, 0). The released code's update without the
previous weights is `softmax_only`. Clusters with nothing drawn yet count with the mean score, so a round says nothing
about them. Every round's model starts from the base model, so the last one has seen what a static baseline would see.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from grainwise.data import CompletionCollator
from grainwise.naming import did_you_mean
from grainwise.select.embedded_pool import EmbeddedPool
from grainwise.select.kmq import KMQ
from grainwise.select.quality import RewardScorer, gold_minus_generated
from grainwise.select.selection import Selection, checked_budget
from grainwise.select.text_encoder import padded
from grainwise.training import train_lm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from numpy.typing import ArrayLike
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UPDATES = ("softmax", "clip", "ratio", "softmax_only")
Train = Callable[[Any, "Dataset"], Any]  # (a copy of the base model, the rows drawn so far) -> the trained model
Generate = Callable[[Any, Sequence[str]], list[str]]  # (model, prompts) -> its answers


@dataclass(frozen=True)
class History:
    """What happened to the clusters. weights: (rounds + 1, k), the start first. scores: (rounds, k), NaN where nothing was
    drawn. counts: int (rounds, k), rows drawn."""

    weights: np.ndarray
    scores: np.ndarray
    counts: np.ndarray

    def flagged_clusters(self, threshold: float) -> list[int]:
        """Clusters whose last weight is below `threshold`: probably junk, or learned. Start from 0.2 / k."""
        return np.flatnonzero(self.weights[-1] < threshold).tolist()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report of weights, scores and counts per round as JSON."""
        scores = [[None if np.isnan(s) else s for s in row] for row in self.scores.tolist()]
        record = {"weights": self.weights.tolist(), "scores": scores, "counts": self.counts.tolist()}
        temporary = Path(f"{os.fspath(path)}.partial")
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(path)


@dataclass(frozen=True)
class IterativeResult:
    """The model of the last round, the whole selection (details: `cluster`, `round`), and the clusters' history."""

    model: Any
    selection: Selection
    history: History


class IterativeKMQ(BaseEstimator):
    """kMQ in rounds, with cluster weights that follow the model's progress.

    clusters: the static selector that gives clusters and the drawing inside them. rounds: N, each spends 1/N of the
    budget. update: how scores change weights: `softmax` (default), `clip`, `ratio` (the paper's equation), or
    `softmax_only` (the released code); temperature: of the softmax, in units of the score.

    After `fit`: `clusters_`, the fitted static selector. The start gives all clusters the same weight.
    """

    def __init__(
        self, clusters: KMQ | None = None, *, rounds: int = 3, update: str = "softmax", temperature: float = 1.0
    ) -> None:
        self.clusters = clusters
        self.rounds = rounds
        self.update = update
        self.temperature = temperature

    def fit(self, pool: EmbeddedPool | ArrayLike, quality: ArrayLike | None = None) -> Self:
        """Cluster the pool once; cluster numbers stay the same in all rounds."""
        if self.update not in UPDATES:
            raise ValueError(f"unknown update {self.update!r}. {did_you_mean(self.update, UPDATES)}")
        if self.rounds < 1 or not self.temperature > 0:
            raise ValueError(f"rounds must be at least 1 and temperature positive, got {self.rounds} and {self.temperature}")
        self.clusters_ = clone(self.clusters if self.clusters is not None else KMQ()).fit(pool, quality)
        return self

    def run(
        self,
        model: PreTrainedModel,
        dataset: Dataset,
        *,
        budget: int,
        scorer: RewardScorer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train: Train | None = None,
        generate: Generate | None = None,
        seed: int = 0,
    ) -> IterativeResult:
        """Spend the budget in rounds. The base `model` stays as it is; every round trains a copy of it.

        dataset: the pool's rows, with `prompt` and `response`. scorer: rewards of answers. train: default `fine_tune`
        for one epoch; generate: default `greedy_answers`; both defaults need the tokenizer. Warns when the scores are
        the same for all clusters, so that the weights cannot change. Raises ValueError for a budget below the number of
        clusters or of rounds, or above the pool.
        """
        check_is_fitted(self)
        assignment = self.clusters_.clustering_.assignment
        budget = checked_budget(budget, len(assignment), max(self.clusters_.clustering_.k, self.rounds))
        if len(dataset) != len(assignment):
            raise ValueError(f"the pool has {len(assignment)} rows, the data set {len(dataset)}: give the embedded rows")
        train, generate = _defaults(train, generate, tokenizer, seed)
        generator = np.random.default_rng(seed)
        weights = [np.full(self.clusters_.clustering_.k, 1 / self.clusters_.clustering_.k)]
        scores: list[np.ndarray] = []
        drawn: list[np.ndarray] = []
        trained: Any = model
        for size in np.diff(np.linspace(0, budget, self.rounds + 1).round().astype(int)):
            taken = np.concatenate(drawn) if drawn else np.empty(0, np.int64)
            drawn.append(self.clusters_.draw_rows(weights[-1], int(size), generator, taken))
            chosen = np.concatenate(drawn)
            rows = dataset.select(chosen.tolist())
            trained = train(copy.deepcopy(model), rows)
            answers = generate(trained, rows["prompt"])
            gains = gold_minus_generated(scorer, rows["prompt"], rows["response"], answers)
            scores.append(cluster_scores(gains, assignment[chosen], len(weights[0])))
            weights.append(updated_weights(weights[-1], scores[-1], update=self.update, temperature=self.temperature))
        return IterativeResult(trained, self._selection(drawn, weights, seed), _history(drawn, assignment, weights, scores))

    def _selection(self, drawn: list[np.ndarray], weights: list[np.ndarray], seed: int) -> Selection:
        chosen = np.concatenate(drawn)
        cluster = self.clusters_.clustering_.assignment[chosen]
        rounds = np.repeat(np.arange(len(drawn)), [len(d) for d in drawn])
        provenance = {"selector": "iterative_kmq", "seed": seed, "k": self.clusters_.clustering_.k, "rounds": self.rounds}
        provenance |= {"update": self.update, "temperature": self.temperature}
        given = np.stack(weights)[rounds, cluster]
        return Selection(chosen, given, {"cluster": cluster, "round": rounds}, provenance)


def cluster_scores(gains: np.ndarray, clusters: np.ndarray, k: int) -> np.ndarray:
    """Mean instance score of each cluster over its scored rows, float64 (k,); NaN for clusters without any."""
    counts = np.bincount(clusters, minlength=k)
    sums = np.bincount(clusters, weights=gains, minlength=k)
    return np.divide(sums, counts, out=np.full(k, np.nan), where=counts > 0)


def updated_weights(
    previous: np.ndarray, scores: np.ndarray, *, update: str = "softmax", temperature: float = 1.0
) -> np.ndarray:
    """The cluster weights of the next round, float64 (k,), summing to 1.

    scores: (k,), NaN for clusters without scored rows, which count with the mean of the others. Raises ValueError for
    `ratio` with negative scores; warns, and leaves the weights, when the scores do not tell clusters apart.
    """
    seen = ~np.isnan(scores)
    if not seen.any():
        raise ValueError("no cluster has a score: score at least one row")
    score = np.where(seen, scores, scores[seen].mean())
    if len(score) > 1 and np.ptp(score) == 0:
        warnings.warn(f"all clusters have the score {score[0]:.4g}: the weights cannot change", stacklevel=2)
        return previous.copy()
    if update == "ratio":
        if (score < 0).any():
            bad = np.flatnonzero(score < 0)[:10].tolist()
            raise ValueError(f'clusters {bad} have negative scores, so update="ratio" has no meaning: use "softmax" or "clip"')
        factor = score
    elif update == "clip":
        factor = np.maximum(score, 0.0)
    else:
        factor = np.exp((score - score.max()) / temperature)
    weights = factor if update == "softmax_only" else factor * previous
    if not weights.sum() > 0:
        warnings.warn("no cluster has a positive score: the weights stay as they are", stacklevel=2)
        return previous.copy()
    return weights / weights.sum()


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    epochs: int = 1,
    batch_size: int = 16,
    lr: float = 1e-4,
    seed: int = 0,
) -> PreTrainedModel:
    """Train the model in place on prompt/response rows, the loss on the response only; returns it."""
    batch_size = min(batch_size, len(rows))
    steps = epochs * -(-len(rows) // batch_size)

    def batches() -> Iterator[dict[str, Tensor]]:
        collate, generator = CompletionCollator(tokenizer), torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(steps):
            if len(order) < batch_size:
                order += torch.randperm(len(rows), generator=generator).tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            yield collate([rows[i] for i in chosen])

    train_lm(model, batches(), steps=steps, lr=lr)
    return model


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    prompt_length: int = 256,
    batch_size: int = 64,
) -> list[str]:
    """The model's most likely continuation of each prompt, in the form that `CompletionCollator` trains."""
    encoded = [tokenizer(f"{p}\n", add_special_tokens=False)["input_ids"][-prompt_length:] for p in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        ids, mask = padded([encoded[i] for i in chosen], pad, left=True)
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts):
            answers[i] = text
    model.train(was_training)
    return answers


def _defaults(
    train: Train | None, generate: Generate | None, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> tuple[Train, Generate]:
    if tokenizer is None:
        if train is None or generate is None:
            raise ValueError("without `train` and `generate` of your own, give the tokenizer")
        return train, generate
    return (
        train or (lambda model, rows: fine_tune(model, tokenizer, rows, seed=seed)),
        generate or (lambda model, prompts: greedy_answers(model, tokenizer, prompts)),
    )


def _history(drawn: list[np.ndarray], assignment: np.ndarray, weights: list[np.ndarray], scores: list[np.ndarray]) -> History:
    counts = np.stack([np.bincount(assignment[d], minlength=len(weights[0])) for d in drawn])
    return History(np.stack(weights), np.stack(scores), counts)
