"""How well a causal language model predicts held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def mean_loss(model: nn.Module, blocks: Tensor, *, batch_size: int = 16, autocast: torch.dtype | None = None) -> float:
    """Mean next-token loss in nats over token blocks (count, length); each block is read on its own.

    Raises ValueError for no blocks or blocks shorter than two tokens.
    """
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise ValueError(f"blocks must be (count >= 1, length >= 2), got {tuple(blocks.shape)}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in blocks.split(batch_size):
        ids = batch.to(device)
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(input_ids=ids, use_cache=False).logits
        total += functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(blocks) * (blocks.shape[1] - 1))


def perplexity(model: nn.Module, blocks: Tensor, *, batch_size: int = 16, autocast: torch.dtype | None = None) -> float:
    """exp of `mean_loss`."""
    return math.exp(mean_loss(model, blocks, batch_size=batch_size, autocast=autocast))


def bits_per_byte(
    model: nn.Module,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = 512,
    autocast: torch.dtype | None = None,
) -> float:
    """Code length of the rows' text in bits per UTF-8 byte, every token predicted once.

    The rows are joined by the end-of-text token (coded as well, counted as no byte). Windows overlap by half, so that
    each token but the first half window sees at least `window / 2` tokens before it.
    """
    from grainwise.data import row_text

    end = tokenizer.eos_token_id
    ids, size = [end], 0
    for row in rows:
        text = row_text(row)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [end]
        size += len(text.encode())
    stream = torch.tensor(ids)
    return stream_loss(model, stream, window=window, autocast=autocast) / math.log(2) / size


@torch.no_grad()
def stream_loss(
    model: nn.Module, stream: Tensor, *, window: int, autocast: torch.dtype | None = None, batch_size: int = 8
) -> float:
    """Summed loss in nats of tokens 1.. of one long stream (length,), read through half-overlapping windows."""
    half = window // 2
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    starts = list(range(0, max(1, len(stream) - 1 - half), half))
    total = 0.0
    for at in range(0, len(starts), batch_size):
        chunk = starts[at : at + batch_size]
        width = min(window + 1, len(stream))
        padded = torch.full((len(chunk), width), -100)
        for i, start in enumerate(chunk):
            piece = stream[start : start + width]
            padded[i, : len(piece)] = piece
        targets = padded[:, 1:].clone()
        for i, start in enumerate(chunk):
            if start > 0:
                targets[i, :half] = -100  # scored by the window before
        inputs = padded[:, :-1].clamp(min=0).to(device)
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(input_ids=inputs, use_cache=False).logits
        total += functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten().to(device), ignore_index=-100, reduction="sum"
        ).item()
    model.train(was_training)
    return total
