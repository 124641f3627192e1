"""The one training loop: next-token training of a causal LM, for proofs, recipes and the zoo.

It exists because a proof compares methods under one schedule and one clock; users train with `transformers.Trainer`,
with which every method of this library works as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass
class TrainingRecord:
    """What a run did: the loss of each step (nats) and the wall-clock seconds."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients. Raises ValueError if there is none."""
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError("the model has no trainable parameter: attach an adapter or unfreeze weights first")
    return found


def batches_of(blocks: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """`steps` batches from token blocks (count, length), reshuffled every epoch by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(blocks), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        ids = blocks[chosen]
        yield {"input_ids": ids, "labels": ids}


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Multiplier of the base rate at `step` (from 0): linear warm-up, then `linear`, `cosine` or `constant`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}; expected linear, cosine or constant")


def train_lm(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float = 3e-4,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    warmup: float = 0.06,
    schedule: str = "linear",
    clip: float | None = 1.0,
    penalty: Callable[[], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> TrainingRecord:
    """Train a causal LM on `steps` batches and return its losses.

    batches: mappings that the model accepts, with `labels`. optimizers: default AdamW (no weight decay) on the trainable
    parameters at rate `lr`; with several, each group's own rate is scheduled. penalty: added to the loss each step.
    autocast: compute type, for example `torch.bfloat16`; weights keep theirs. Raises FloatingPointError at a loss that is
    not finite, naming the step, and ValueError when the batches run out before `steps`.
    """
    parameters = trainable(model)
    optimizers = list(optimizers or [torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)])
    groups = [(g, g["lr"]) for o in optimizers for g in o.param_groups]
    device = parameters[0].device
    record, started = TrainingRecord(), time.perf_counter()
    was_training = model.training
    model.train()
    stream = iter(batches)
    for step in range(steps):
        batch = next(stream, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step} of {steps} steps")
        for group, base in groups:
            group["lr"] = base * learning_rate_factor(step, steps, warmup, schedule)
        with torch.autocast(device.type, autocast) if autocast is not None else nullcontext():
            loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
        total = loss if penalty is None else loss + penalty()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss became {total.item()} at step {step}: lower the learning rate or check the data and the weights"
            )
        total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        record.losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, f"loss {record.losses[-1]:.3f}")
    for group, base in groups:
        group["lr"] = base
    model.train(was_training)
    record.seconds = time.perf_counter() - started
    return record
