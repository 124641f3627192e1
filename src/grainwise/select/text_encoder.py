"""Texts to vectors by a transformers model: an encoder, or the hidden states of a causal language model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POOLINGS = ("mean", "last", "first")


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into vectors and can say which encoder it is."""

    def fingerprint(self) -> str:
        """A hash of everything that the vectors depend on; equal only for equal encoders."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (len(texts), dimension)."""


class TransformerEncoder:
    """Hidden states of a transformers model, pooled over the tokens of each text.

    model: an encoder (`AutoModel`) or a causal LM; its head is not run. pooling: `mean` over the tokens, the `last` token
    (usual for a causal LM), or the `first` (BERT's classification token). A text longer than `length` tokens is read in
    windows of that length whose vectors are averaged by their token counts; `windows` limits how many are read.
    normalize: divide each vector by its norm, so that k-means compares directions. autocast: compute type, for example
    `torch.bfloat16`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str = "mean",
        length: int = 256,
        windows: int | None = None,
        normalize: bool = True,
        batch_tokens: int = 8192,
        autocast: torch.dtype | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}. {did_you_mean(pooling, POOLINGS)}")
        if length < 1 or (windows is not None and windows < 1):
            raise ValueError(f"length and windows must be at least 1, got length={length}, windows={windows}")
        self.model, self.tokenizer = model, tokenizer
        self.pooling, self.length, self.windows = pooling, length, windows
        self.normalize, self.batch_tokens, self.autocast = normalize, batch_tokens, autocast

    def fingerprint(self) -> str:
        """Hash of the weights, the vocabulary and the pooling; computed anew, since a model may be trained meanwhile."""
        digest = hashlib.blake2b(digest_size=16)
        options = (self.pooling, self.length, self.windows, self.normalize, str(self.autocast))
        digest.update(repr(options).encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, tensor in sorted(headless(self.model).state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (len(texts), hidden size). Raises ValueError for texts without any token, naming them."""
        pieces, owners = self._pieces(texts)
        model = headless(self.model)
        was_training = model.training
        model.eval()
        summed: np.ndarray | None = None
        for chosen in self._batches(pieces):
            vectors = self._pooled(model, [pieces[i] for i in chosen])
            if summed is None:
                summed = np.zeros((len(texts), vectors.shape[1]), np.float32)
            lengths = np.array([len(pieces[i]) for i in chosen], np.float32)
            np.add.at(summed, [owners[i] for i in chosen], vectors * lengths[:, None])
        model.train(was_training)
        if summed is None:
            raise ValueError("there are no texts to encode")
        counts = np.bincount(owners, [len(p) for p in pieces], minlength=len(texts)).astype(np.float32)
        mean = summed / counts[:, None]
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12) if self.normalize else mean

    def _pieces(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Windows of token ids, and which text each belongs to."""
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.length, return_overflowing_tokens=True, verbose=False
        )
        pieces: list[list[int]] = []
        owners: list[int] = []
        taken = [0] * len(texts)
        for ids, owner in zip(encoded["input_ids"], encoded["overflow_to_sample_mapping"]):
            if ids and (self.windows is None or taken[owner] < self.windows):
                pieces.append(ids)
                owners.append(owner)
                taken[owner] += 1
        empty = [i for i, count in enumerate(taken) if count == 0]
        if empty:
            raise ValueError(f"texts {empty[:10]} have no tokens: drop the empty rows first")
        return pieces, owners

    def _batches(self, pieces: list[list[int]]) -> Iterator[list[int]]:
        """Piece numbers of similar length together, at most `batch_tokens` padded tokens a batch."""
        batch: list[int] = []
        for i in sorted(range(len(pieces)), key=lambda i: len(pieces[i])):
            if batch and (len(batch) + 1) * len(pieces[i]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _pooled(self, model: nn.Module, pieces: list[list[int]]) -> np.ndarray:
        """float32 (pieces, hidden size)."""
        ids, mask = padded(pieces, self.tokenizer.pad_token_id or 0)
        device = next(model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "first":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            pooled = hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return pooled.cpu().numpy()


def headless(model: PreTrainedModel) -> nn.Module:
    """The transformer without its head, adapters included."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, long tensors (rows, longest row), padded on the right, or on the left."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask
