"""SliceGPT: principal axes of every sub-layer's input lose far less than other ways to delete the same coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grainwise.proofs.frame import Proof

LEVELS = (0.25, 0.5)  # shares of the residual width that are deleted; widths 192 and 128 of 256
JUDGED = 0.25  # the level of the verdict
RECOVERED = 0.5  # the level that recovery fine-tuning starts from
STEPS = 100


def run(seed: int, smoke: bool) -> dict[str, Any]:
    """Loss increases (nats) over the dense model on held-out text, for each way to choose the kept coordinates."""
    from grainwise import zoo
    from grainwise.compress.structural import calibration_batches
    from grainwise.evaluate.language import mean_loss

    model, tokenizer = zoo.load("llama-mini")
    calibration, training, held_out = _text(tokenizer, seed, smoke)
    batches = calibration_batches(calibration, vocabulary=model.config.vocab_size, longest=model.config.max_position_embeddings)
    dense = mean_loss(model, held_out)
    ways = _ways(model, batches, torch.Generator().manual_seed(seed))
    figures: dict[str, Any] = {"dense_loss": dense}
    for level in (JUDGED,) if smoke else LEVELS:
        for name, way in ways.items():
            sliced = _slice(model, batches, way, level)
            figures[f"{name}_{level}"] = mean_loss(sliced, held_out) - dense
    naive = [figures[f"{name}_{JUDGED}"] for name in ("axis_aligned", "random_rotation")]
    figures |= {"ours": figures[f"slicegpt_{JUDGED}"], "baseline": min(naive)}
    return figures | _recovery(model, batches, training, held_out, ways["slicegpt"], seed, smoke)


def _text(tokenizer: Any, seed: int, smoke: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration, training and held-out blocks; the seed chooses which."""
    from grainwise.data import blocks, load

    length, count, tested = (64, 6, 4) if smoke else (256, 32, 32)
    generator = torch.Generator().manual_seed(seed)

    def drawn(split: str, wanted: int) -> Tensor:
        all_blocks = blocks(load("pydoc", split), tokenizer, length)
        return all_blocks[torch.randperm(len(all_blocks), generator=generator)[:wanted]]

    train = drawn("train", count + 8 * count)
    return train[:count], train[count:, :128], drawn("test", tested)


Way = Callable[[], Callable[[Tensor, int], Tensor]]  # () -> a fresh chooser of bases


def _ways(model: Any, batches: Any, generator: torch.Generator) -> dict[str, Way]:
    """SliceGPT, two naive choices of coordinates, and two weaker forms of SliceGPT."""
    from grainwise.compress.slicegpt.rotation import principal_axes, random_rotation
    from grainwise.compress.slicegpt.slicing import slice_with_bases

    width = model.config.hidden_size
    identity = torch.eye(width, dtype=torch.float64)
    moments: list[Tensor] = []

    def keep(moment: Tensor, kept: int) -> Tensor:
        moments.append(moment)
        return identity

    slice_with_bases(model, batches, keep, width=width)  # the dense model's signals
    strongest = identity[:, sum(m.diagonal() for m in moments).argsort(descending=True)]  # type: ignore[union-attr]
    rotation = random_rotation(width, generator)
    shared = principal_axes(torch.stack(moments).sum(0))[1]

    def from_dense() -> Callable[[Tensor, int], Tensor]:
        signals = iter(moments)
        return lambda moment, kept: principal_axes(next(signals))[1]

    return {
        "slicegpt": lambda: lambda moment, kept: principal_axes(moment)[1],
        "axis_aligned": lambda: lambda moment, kept: strongest,
        "random_rotation": lambda: lambda moment, kept: rotation,
        "one_global_basis": lambda: lambda moment, kept: shared,
        "axes_of_dense_signals": from_dense,
    }


def _slice(model: Any, batches: Any, way: Way, level: float) -> Any:
    from grainwise.compress.slicegpt.slicing import kept_width, slice_with_bases

    return slice_with_bases(model, batches, way(), width=kept_width(model.config, level, 32))


def _recovery(
    model: Any, batches: Any, training: Tensor, held_out: Tensor, way: Way, seed: int, smoke: bool
) -> dict[str, float]:
    """Loss of the sliced and of the dense model after the same LoRA tuning; the gap between them is what is left to recover."""
    from peft import get_peft_model

    from grainwise.compress.slicegpt import recovery_config
    from grainwise.evaluate.language import mean_loss
    from grainwise.training import batches_of, train_lm

    steps = 3 if smoke else STEPS
    sliced = _slice(model, batches, way, RECOVERED)
    losses = {"sliced": mean_loss(sliced, held_out), "dense": mean_loss(model, held_out)}
    for name, start in (("sliced", sliced), ("dense", model)):
        torch.manual_seed(seed)  # of the adapter's initialisation and dropout
        tuned = get_peft_model(start, recovery_config(start))
        train_lm(tuned, batches_of(training, 4, steps, seed), steps=steps, lr=RATE)
        losses[f"{name}_tuned"] = mean_loss(tuned, held_out)
    left = losses["sliced_tuned"] - losses["dense_tuned"]
    return {f"loss_{k}": v for k, v in losses.items()} | {"recovered": 1 - left / (losses["sliced"] - losses["dense"])}


RATE = 2e-3  # of LoRA, for the sliced and the dense model alike


def _conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    def mean(name: str) -> float:
        return sum(r[name] for r in rows) / len(rows)

    return {
        "no worse than one global basis": mean("ours") <= mean(f"one_global_basis_{JUDGED}"),
        "no worse than the axes of dense signals": mean("ours") <= 1.02 * mean(f"axes_of_dense_signals_{JUDGED}"),
        "recovery tuning closes half of the gap on every seed": all(r["recovered"] >= 0.5 for r in rows),
    }


PROOF = Proof(
    system="slicegpt",
    claim="At equal width, rotating to principal axes before cutting costs a fraction of the loss that naive cuts cost",
    substrate="zoo/llama-mini on pydoc text, residual width 256 cut to 192",
    baseline="the better of the coordinates of largest energy and a random rotation, same width and calibration text",
    metric="increase of held-out loss over the dense model, nats",
    higher_is_better=False,
    margin=0.9,
    modules=("grainwise.compress.slicegpt", "grainwise.compress.block_walker", "grainwise.compress.architecture"),
    run=run,
    conditions=_conditions,
    note="The rotation's claim shows on every seed. Recovery falls short of half of the gap: 100 steps of LoRA on 51,000 "
    "tokens close about a third of it at half the width, measured against the dense model tuned alike.",
)
