"""From rows of text to batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


def row_text(row: Mapping[str, Any]) -> str:
    """The whole text of one row: `text`, or prompt and response joined by a newline."""
    if "text" in row:
        return str(row["text"])
    return f"{row['prompt']}\n{row['response']}"


def blocks(rows: Dataset | Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int = 256) -> torch.Tensor:
    """Token blocks, long tensor (count, length): the rows in order, joined by the end-of-text token, the tail dropped.

    Raises ValueError if the text does not fill a single block.
    """
    texts = [row_text(r) for r in rows]
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []:
        ids.extend(encoded)
        if end is not None:
            ids.append(end)
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one block of {length}: give more text or a shorter block")
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


class CompletionCollator:
    """Batch prompt/response rows with the loss on the response only; usable as `Trainer(data_collator=...)`.

    Rows with a `text` column count as a response without a prompt. Prompts are cut from the left to `prompt_length` tokens,
    responses from the right to `response_length`; padding is on the right with label -100.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int = 256, response_length: int = 256) -> None:
        self.tokenizer, self.prompt_length, self.response_length = tokenizer, prompt_length, response_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels`, each a long tensor (batch, longest row)."""
        encoded = [self._encode(r) for r in rows]
        width = max(len(ids) for ids, _ in encoded)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (ids, start) in enumerate(encoded):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, start : len(ids)] = torch.tensor(ids[start:])
            mask[i, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def _encode(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        prompt = f"{row['prompt']}\n" if "prompt" in row else ""
        response = row["response"] if "prompt" in row else row_text(row)
        head = self.tokenizer(prompt, add_special_tokens=False)["input_ids"][-self.prompt_length :] if prompt else []
        tail = self.tokenizer(str(response), add_special_tokens=False)["input_ids"][: self.response_length - 1]
        if self.tokenizer.eos_token_id is not None:
            tail.append(self.tokenizer.eos_token_id)
        return head + tail, len(head)
