"""Multiple choice by answer letters, the MMLU protocol of QLoRA (arXiv 2305.14314, section 5): which letter is likeliest?

A question is asked after a few solved examples; the logits of the tokens of the letters A, B, C, D at the answer position
are compared, and nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """A question with 2 to 10 choices; answer: index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(LETTERS):
            raise ValueError(f"a question needs 2 to {len(LETTERS)} choices, got {len(self.choices)}: {self.text!r}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer must be an index into {len(self.choices)} choices, got {self.answer}: {self.text!r}")


def prompt_for(question: Question, examples: Sequence[Question] = ()) -> str:
    """The text up to `Answer:`, after the solved examples."""
    return "\n\n".join([*(_asked(q) + f" {LETTERS[q.answer]}" for q in examples), _asked(question)])


def _asked(question: Question) -> str:
    lines = [question.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices)), "Answer:"]
    return "\n".join(lines)


def letter_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The token that follows `Answer:` for each of the first `count` letters.

    Raises ValueError where two letters begin with the same token, which would make them indistinguishable.
    """
    base = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    found = []
    for letter in LETTERS[:count]:
        ids = tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(base, ids)) if a != b), len(base))
        found.append(ids[min(shared, len(ids) - 1)])
    if len(set(found)) < count:
        raise ValueError(f"the tokenizer gives several answer letters one token ({found}): letters cannot be compared")
    return found


@torch.no_grad()
def letter_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> Tensor:
    """Logits of the first `count` letters after `prompt`, float32 (count,)."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=device)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the model takes {longest}: give fewer or shorter examples")
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    model.train(was_training)
    return logits[letter_tokens(tokenizer, count)].float()


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], examples: Sequence[Question] = ()
) -> float:
    """Share of questions whose right letter has the largest logit. Raises ValueError for no questions."""
    if not questions:
        raise ValueError("no questions to answer")
    right = 0
    for question in questions:
        logits = letter_logits(model, tokenizer, prompt_for(question, examples), len(question.choices))
        right += int(logits.argmax().item() == question.answer)
    return right / len(questions)
