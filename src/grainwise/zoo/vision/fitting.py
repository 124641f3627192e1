"""How every vision model of the zoo is trained: the one training loop, with the zoo's optimisers and schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from grainwise.training import Progress, train_lm
from grainwise.zoo.vision.specs import VisionSpec


def fit(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    spec: VisionSpec,
    progress: Progress | None,
    *,
    autocast: torch.dtype | None = torch.bfloat16,
    optimizers: list[torch.optim.Optimizer] | None = None,
) -> None:
    """Train `model`, whose output has a `loss`, on `spec.steps` batches."""
    train_lm(
        model,
        batches,
        steps=spec.steps,
        optimizers=optimizers or optimizers_for(model, spec),
        warmup=0.05,
        schedule="cosine",
        autocast=autocast,
        progress=progress,
    )


def optimizers_for(model: nn.Module, spec: VisionSpec) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for all else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ("layer" in n or "blocks" in n) and p.requires_grad]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    return [
        torch.optim.Muon(matrices, lr=spec.matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=spec.other_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
