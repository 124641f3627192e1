"""`compress(model, config, calibration) -> (model, report)`: the one call of every structural compression method.

A method is a config dataclass that derives from `StructuralConfig`; its `apply` does the work. This module holds what all
of them share: checking the model, reading calibration data in the forms people have it, and counting what was saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grainwise.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_ROWS = 8  # rows of a LongTensor of blocks that are run together
TEXT_BLOCKS, TEXT_LENGTH = 128, 256  # what text rows are cut into
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ModelSize:
    """Parameters (shared ones once), bytes as stored, and floating-point operations for each token.

    FLOPs count two for each weight of a linear module; attention scores, whose cost depends on the length, are left out.
    """

    parameters: int
    bytes: int
    flops_per_token: int


@dataclass(frozen=True)
class CompressionReport:
    """What a structural method saved: the size of the model before and after."""

    system: str
    before: ModelSize
    after: ModelSize

    def figures(self) -> dict[str, float]:
        """Flat numbers for a recipe's report; ratios are after / before."""
        flops = self.after.flops_per_token / self.before.flops_per_token
        return {
            "parameters_before": self.before.parameters,
            "parameters_after": self.after.parameters,
            "bytes_before": self.before.bytes,
            "bytes_after": self.after.bytes,
            "flops_ratio": round(flops, 4),
        }

    def table(self) -> str:
        """Three lines of text: before, after and ratio of each size."""
        lines = [f"{'':20}{'before':>16}{'after':>16}{'ratio':>8}"]
        for name in ("parameters", "bytes", "flops_per_token"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{name:20}{old:16,}{new:16,}{new / old:8.3f}")
        return "\n".join(lines)


class StructuralConfig(ABC):
    """The settings of one structural method. Members are frozen dataclasses that check themselves when they are made."""

    @abstractmethod
    def apply(self, model: PreTrainedModel, calibration: Any, progress: Progress | None) -> tuple[PreTrainedModel, Any]:
        """Compress a model that `compress` has checked."""


def compress(
    model: PreTrainedModel, config: StructuralConfig, calibration: Any = None, *, progress: Progress | None = None
) -> tuple[PreTrainedModel, Any]:
    """Compress a model by the method that `config` belongs to; returns the smaller model and a `CompressionReport`.

    model: an ordinary, unquantised transformers model; whether it is changed is the method's to say.
    calibration: what `calibration_batches` reads, or None for methods that need no data.
    progress: called with (done, total, what) as the work goes on.
    Raises TypeError for a config of no structural method or a model that is wrapped by PEFT, ValueError for a quantised model.
    """
    from transformers import PreTrainedModel as Model

    if not isinstance(config, StructuralConfig):
        known = sorted(c.__name__ for c in StructuralConfig.__subclasses__())
        raise TypeError(f"config must belong to a structural method ({', '.join(known)}), got {type(config).__name__}")
    if hasattr(model, "peft_config"):
        raise TypeError("the model carries an adapter: merge it first (model.merge_and_unload()), then compress")
    if not isinstance(model, Model):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantised: compress the original model, then quantise the result")
    return config.apply(model, calibration, progress)


def calibration_batches(calibration: Any, *, vocabulary: int, longest: int) -> list[Batch]:
    """Calibration data as a list of {`input_ids`, `attention_mask`}, long tensors (batch, length).

    calibration: token blocks (a long tensor (count, length)); or batches, each a long tensor or a mapping with `input_ids`
    and, where there is padding, `attention_mask`; or a pair (rows of text, tokenizer), of which the first 128 blocks of
    256 tokens are taken. vocabulary, longest: the model's, for checking.
    Raises ValueError or TypeError for empty data, a batch of padding only, wrong shapes or token ids the model lacks.
    """
    if calibration is None:
        raise ValueError("this method needs calibration data: token blocks, batches, or a pair (rows of text, tokenizer)")
    if isinstance(calibration, tuple) and len(calibration) == 2 and callable(calibration[1]):
        calibration = _text_blocks(*calibration, length=min(TEXT_LENGTH, longest))
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2:
            raise ValueError(f"token blocks must have shape (count, length), got {tuple(calibration.shape)}")
        calibration = calibration.split(BATCH_ROWS) if calibration.numel() else ()
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(f"cannot calibrate on {type(calibration).__name__}: give token blocks or a list of batches")
    batches = [_batch(b, i, vocabulary, longest) for i, b in enumerate(calibration)]
    if not batches:
        raise ValueError("the calibration data is empty: give at least one block of tokens")
    return batches


def _text_blocks(rows: Iterable[Mapping[str, Any]], tokenizer: Any, length: int) -> Tensor:
    from grainwise.data import blocks

    return blocks(rows, tokenizer, length)[:TEXT_BLOCKS]


def _batch(batch: Tensor | Mapping[str, Tensor], index: int, vocabulary: int, longest: int) -> Batch:
    where = f"calibration batch {index}"
    if isinstance(batch, Mapping) and "input_ids" not in batch:
        raise ValueError(f"{where} has {sorted(batch)}, expected input_ids (and attention_mask)")
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
        raise TypeError(f"{where} must hold token ids (batch, length) of an integer type, got {_described(ids)}")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(f"{where}: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    if not mask.any():
        raise ValueError(f"{where} is all padding: leave it out")
    if ids.shape[1] > longest:
        raise ValueError(f"{where} has {ids.shape[1]} tokens a row, the model reads at most {longest}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"{where} has token ids {int(ids.min())} to {int(ids.max())}, the vocabulary has {vocabulary}")
    return {"input_ids": ids.long(), "attention_mask": mask.long()}


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def model_size(model: nn.Module) -> ModelSize:
    """Count parameters, bytes and FLOPs per token of a model."""
    parameters: Sequence[nn.Parameter] = list(model.parameters())  # shared parameters appear once
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return ModelSize(
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        flops_per_token=sum(2 * m.weight.numel() for m in linears),
    )
