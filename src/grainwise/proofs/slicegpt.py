"""SliceGPT: principal axes of every sub-layer's input lose far less than other ways to delete the same coordinates.

Beside the comparison at equal width, recovery: LoRA on the sliced model, 100 steps of 6 blocks of the calibration text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grainwise.proofs.frame import Proof

JUDGED = 0.25  # share of the residual width that is deleted for the verdict; 192 of 256 are left
RECOVERED = 0.5  # the same for recovery
NAIVE = ("axis_aligned", "random_rotation")
STEPS, BATCH = 100, 6
RATE = 8e-3  # of LoRA, chosen on seeds 10 and 11


def run(seed: int, smoke: bool) -> dict[str, Any]:
    """Loss increases (nats) over the dense model on held-out text, for each way to choose the kept coordinates."""
    from grainwise import zoo
    from grainwise.compress.structural import calibration_batches
    from grainwise.evaluate.language import mean_loss

    model, _ = zoo.load("llama-mini")
    calibration, training, held_out = _text(seed, smoke)
    batches = calibration_batches(calibration, vocabulary=model.config.vocab_size, longest=model.config.max_position_embeddings)
    dense = mean_loss(model, held_out)
    ways = _ways(model, batches, torch.Generator().manual_seed(seed))
    figures: dict[str, Any] = {"dense_loss": dense}
    for name, way in ways.items():
        for level in (JUDGED, RECOVERED) if name in NAIVE and not smoke else (JUDGED,):
            sliced = _slice(model, batches, way, level)
            figures[f"{name}_{level}"] = mean_loss(sliced, held_out) - dense
    naive = [figures[f"{name}_{JUDGED}"] for name in NAIVE]
    figures |= {"ours": figures[f"slicegpt_{JUDGED}"], "baseline": min(naive)}
    sliced = _slice(model, batches, ways["slicegpt"], RECOVERED)
    return figures | _recovery(sliced, dense, training, held_out, seed, 3 if smoke else STEPS)


@functools.lru_cache(maxsize=2)
def _blocks(split: str, length: int) -> Tensor:
    from grainwise import zoo
    from grainwise.data import blocks, load

    return blocks(load("pydoc", split), zoo.load("llama-mini")[1], length)


def _text(seed: int, smoke: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration, training and held-out blocks; the seed chooses which."""
    length, count, trained, tested = (64, 6, 8, 4) if smoke else (256, 16, STEPS * BATCH, 16)
    generator = torch.Generator().manual_seed(seed)

    def drawn(split: str, wanted: int) -> Tensor:
        all_blocks = _blocks(split, length)
        return all_blocks[torch.randperm(len(all_blocks), generator=generator)[:wanted]]

    train = drawn("train", count + trained)
    return train[:count], train[count:], drawn("test", tested)


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


def _recovery(sliced: Any, dense: float, training: Tensor, held_out: Tensor, seed: int, steps: int) -> dict[str, float]:
    """Loss of a sliced model before and after LoRA tuning, and the share of what slicing cost that comes back."""
    from peft import get_peft_model

    from grainwise.compress.slicegpt import recovery_config
    from grainwise.evaluate.language import mean_loss
    from grainwise.training import batches_of, train_lm

    before = mean_loss(sliced, held_out)
    torch.manual_seed(seed)  # of the adapter's initialisation and dropout
    tuned = get_peft_model(sliced, recovery_config(sliced))
    train_lm(tuned, batches_of(training, BATCH, steps, seed), steps=steps, lr=RATE, autocast=torch.bfloat16)
    after = mean_loss(tuned, held_out)
    return {
        f"slicegpt_{RECOVERED}": before - dense,
        "loss_sliced": before,
        "loss_recovered": after,
        "recovered": (before - after) / (before - dense),
    }


def _conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    def mean(name: str) -> float:
        return sum(r[name] for r in rows) / len(rows)

    return {
        "no worse than one global basis": mean("ours") <= mean(f"one_global_basis_{JUDGED}"),
        "no worse than the axes of dense signals": mean("ours") <= 1.02 * mean(f"axes_of_dense_signals_{JUDGED}"),
        "recovery tuning brings half of the loss back on every seed": all(r["recovered"] >= 0.5 for r in rows),
    }


PROOF = Proof(
    system="slicegpt",
    claim="At equal width, rotating to principal axes before cutting costs a fraction of the loss that naive cuts cost",
    substrate="zoo/llama-mini on pydoc text, residual width 256 cut to 192",
    baseline="the better of the coordinates of largest energy and a random rotation, same width and calibration text",
    metric="increase of held-out loss over the dense model, nats",
    higher_is_better=False,
    margin=0.9,
    modules=tuple(f"grainwise.compress.{name}" for name in ("slicegpt", "block_walker", "architecture", "structural")),
    run=run,
    conditions=_conditions,
    note="Recovery is shown at half the width, where 100 steps on 154,000 tokens bring about half of the loss back, but not "
    "half on every seed (0.51, 0.47, 0.59); from a quarter cut, where little is lost, they brought back at most 0.39 of it "
    "(seed 10). The dense model gains little from the same tuning (at most 0.023 nats, seed 10).",
)
