"""Scores of prompt/response pairs: how good a row is before training, how good an answer is during it.

A `PairScorer` gives one float for each (prompt, response). Called on rows it is a `QualityScorer`, which kMQ turns into
probabilities inside a cluster; called on answers it is a `RewardScorer`, and the iterative form compares the reference
answer with the model's own by `gold_minus_generated`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from grainwise.data import CompletionCollator
from grainwise.naming import did_you_mean
from grainwise.select.text_encoder import padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCALES = ("probability", "log")


class QualityScorer(Protocol):
    """Rows of `prompt` and `response` (or `text`) to a value each, float64 (rows,); higher is better."""

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> np.ndarray: ...


class RewardScorer(Protocol):
    """Prompts and responses to a reward each, float64 (pairs,); higher is better."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """float64 (pairs,)."""


class PairScorer:
    """Base of scorers: a subclass defines `score(prompts, responses)` and can be called on rows as well."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """float64 (pairs,); higher is better."""
        raise NotImplementedError

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
        """Scores of rows; a row of plain text is a response to nothing."""
        pairs = [(str(r["prompt"]), str(r["response"])) if "prompt" in r else ("", str(r["text"])) for r in rows]
        return self.score([p for p, _ in pairs], [r for _, r in pairs])


def gold_minus_generated(
    scorer: RewardScorer, prompts: Sequence[str], gold: Sequence[str], generated: Sequence[str]
) -> np.ndarray:
    """How much better the reference answers are than the model's own, float64 (pairs,): the instance score of kMQ."""
    if not len(prompts) == len(gold) == len(generated):
        raise ValueError(f"got {len(prompts)} prompts, {len(gold)} references and {len(generated)} generated answers")
    scores = np.asarray(scorer.score([*prompts, *prompts], [*gold, *generated]), dtype=np.float64)
    if scores.shape != (2 * len(prompts),):
        raise ValueError(f"the scorer must give one value for each of {2 * len(prompts)} pairs, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        bad = sorted({int(i) % len(prompts) for i in np.flatnonzero(~np.isfinite(scores))})
        raise ValueError(f"the scorer gave NaN or infinite values for pairs {bad[:10]}")
    return scores[: len(prompts)] - scores[len(prompts) :]


class LengthScorer(PairScorer):
    """Words in the response, up to `cap`: crude, free, and a baseline that learned scorers must beat."""

    def __init__(self, cap: int = 512) -> None:
        self.cap = cap

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """float64 (pairs,), from 0 to `cap`."""
        return np.array([min(len(r.split()), self.cap) for r in responses], dtype=np.float64)


class LikelihoodScorer(PairScorer):
    """How likely a language model finds the response after the prompt.

    scale: `probability` gives the geometric mean of the token probabilities (0 to 1, fit for drawing in proportion);
    `log` gives their mean logarithm (nats per token, negative, fit for differences). Prompts and responses are cut as
    `CompletionCollator` cuts them; the end-of-text token counts as part of the response.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scale: str = "probability",
        prompt_length: int = 256,
        response_length: int = 256,
        batch_tokens: int = 4096,
        autocast: torch.dtype | None = None,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale!r}. {did_you_mean(scale, SCALES)}")
        self.model, self.scale, self.batch_tokens, self.autocast = model, scale, batch_tokens, autocast
        self.collate = CompletionCollator(tokenizer, prompt_length, response_length)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """float64 (pairs,)."""
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        means = np.empty(len(prompts))
        for chosen in _alike([self._tokens(p, r) for p, r in zip(prompts, responses)], self.batch_tokens):
            pairs = [{"prompt": prompts[i], "response": responses[i]} if prompts[i] else {"text": responses[i]} for i in chosen]
            batch = {k: v.to(device) for k, v in self.collate(pairs).items()}
            labels = batch.pop("labels")
            with torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                logits = self.model(**batch, use_cache=False).logits
            means[chosen] = _mean_log_likelihood(logits, labels).cpu().numpy()
        self.model.train(was_training)
        return np.exp(means) if self.scale == "probability" else means

    def _tokens(self, prompt: str, response: str) -> int:
        """About how many tokens a pair has, for batching: three characters each."""
        return min(1 + len(prompt) // 3, self.collate.prompt_length) + min(1 + len(response) // 3, self.collate.response_length)


class RatingScorer(PairScorer):
    """A rating that a language model trained to print it would give: the expected value of the digit it prints next.

    template: the question, with `{prompt}` and `{response}`. ratings: what may be printed, each a single token; their
    numbers are averaged by their probabilities among themselves (Liu et al., DEITA, arXiv 2312.15685).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        ratings: Sequence[str] = ("1", "2", "3", "4", "5", "6"),
        length: int = 1024,
        batch_tokens: int = 4096,
    ) -> None:
        encoded = [tokenizer(r, add_special_tokens=False)["input_ids"] for r in ratings]
        long = [r for r, ids in zip(ratings, encoded) if len(ids) != 1]
        if long:
            raise ValueError(f"each rating must be one token of this tokenizer; {long} are not")
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.length, self.batch_tokens = length, batch_tokens
        self.tokens = torch.tensor([ids[0] for ids in encoded])
        self.values = torch.tensor([float(r) for r in ratings])

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """float64 (pairs,), between the lowest and the highest rating."""
        texts = [self.template.format(prompt=p, response=r) for p, r in zip(prompts, responses)]
        found = np.empty(len(texts))
        for chosen, logits in _last_logits(self.model, self.tokenizer, texts, self.length, self.batch_tokens):
            chances = logits[:, self.tokens.to(logits.device)].softmax(-1)
            found[chosen] = (chances @ self.values.to(logits.device)).cpu().numpy()
        return found


class RewardModelScorer(PairScorer):
    """The scalar output of a reward model (`AutoModelForSequenceClassification` with one label).

    template: how prompt and response are put together; cut from the left to `length` tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "{prompt}\n{response}",
        length: int = 1024,
        batch_tokens: int = 4096,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one output, this model has {model.config.num_labels}")
        if model.config.pad_token_id is None:
            raise ValueError("the reward model needs config.pad_token_id to find the last token of padded rows: set it")
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.length, self.batch_tokens = length, batch_tokens

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """float64 (pairs,)."""
        texts = [self.template.format(prompt=p, response=r) for p, r in zip(prompts, responses)]
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        found = np.empty(len(texts))
        for chosen, ids, mask in _text_batches(
            self.tokenizer, texts, self.length, self.batch_tokens, self.model.config.pad_token_id
        ):
            rewards = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0]
            found[chosen] = rewards.float().cpu().numpy()
        self.model.train(was_training)
        return found


def _alike(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers of similar length together, at most `budget` padded units a batch (one row at least)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _mean_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of the labelled tokens, float (batch,); logits (batch, length, vocabulary)."""
    targets = labels[:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return -losses.sum(1) / (targets != -100).sum(1).clamp(min=1)


def _text_batches(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int, budget: int, pad: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(row numbers, token ids, mask) of texts cut from the left to `length` tokens."""
    encoded = [ids[-length:] for ids in tokenizer(texts, verbose=False)["input_ids"]]
    for chosen in _alike([len(ids) for ids in encoded], budget):
        yield chosen, *padded([encoded[i] for i in chosen], pad)


@torch.no_grad()
def _last_logits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int, budget: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(row numbers, logits of the next token, float (rows, vocabulary))."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for chosen, ids, mask in _text_batches(tokenizer, texts, length, budget, tokenizer.pad_token_id or 0):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        yield chosen, logits[torch.arange(len(ids), device=device), mask.to(device).sum(1) - 1].float()
    model.train(was_training)
