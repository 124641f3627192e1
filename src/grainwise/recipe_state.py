"""What flows through a recipe: the model, its data, and what the steps left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase


def silent(done: int, total: int, what: str) -> None:
    """A progress callback that shows nothing."""


@dataclass
class RecipeState:
    """One recipe in flight. A step changes `model`, `train` or `decode` and returns its figures.

    model: a `PreTrainedModel` or a `PeftModel`, as `save_pretrained` and `from_pretrained` round-trip it.
    train, test: `datasets.Dataset` with `text`, or with `prompt` and `response`.
    folder: the running step's output folder; it gets its final name when the step is finished.
    progress: call as `progress(done, total, what)` to move the progress bar.
    decode: a callable for `generate(custom_generate=...)`, or None for plain decoding.
    """

    model: Module
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    test: Dataset
    seed: int
    folder: Path
    progress: Callable[[int, int, str], None] = silent
    decode: Callable[..., Any] | None = None
    measure_blocks: Tensor | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def train_blocks(self, length: int = 256) -> Tensor:
        """Token blocks of the training rows, long tensor (count, length)."""
        from grainwise.data import blocks

        return blocks(self.train, self.tokenizer, length)
