"""Self-supervised pretraining for selection: SimCLR, BYOL and MAE on tensors of images, and features before any head.

SimCLR: Chen, Kornblith, Norouzi, Hinton: "A Simple Framework for Contrastive Learning of Visual Representations", arXiv
2002.05709. BYOL: Grill et al.: "Bootstrap Your Own Latent", arXiv 2006.07733. MAE: He et al.: "Masked Autoencoders Are
Scalable Vision Learners", arXiv 2111.06377. SimCore needs an encoder of the target, and a fair comparison trains every union
for the same number of steps. An objective is a module whose output has a `loss`, so all are trained by the one loop.

Departures, for small pictures and short runs: AdamW in place of LARS; weaker colours than the papers'; MAE's decoder learns
its positions.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, unfold

from grainwise.data.batching import shuffled_rows
from grainwise.images import adjust_saturation, colour_jitter, random_flip, random_resized_crop
from grainwise.naming import did_you_mean
from grainwise.training import train_lm

Augment = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image, mirrored half of the time."""
    size = (images.shape[2], images.shape[3])
    return random_flip(random_resized_crop(images, generator, size=size, scale=(0.3, 1.0)), generator)


def two_view_augmentation(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, flip and colours for each image, as SimCLR does on small pictures."""
    seen = crop_and_flip(images, generator)
    seen = colour_jitter(seen, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05)
    grey = (torch.rand(len(images), generator=generator) < 0.1).to(images)
    return adjust_saturation(seen, 1 - grey)


class Objective(nn.Module):
    """A backbone and what its loss needs. `batch` makes what `forward` takes; `forward` returns an object with the `loss`.

    sample: a few images like those of the training; width: of the backbone's features; steps: how many are to come.
    """

    augment = staticmethod(two_view_augmentation)  # the default, of one view

    def __init__(self, backbone: nn.Module, sample: Tensor, steps: int) -> None:
        super().__init__()
        self.backbone, self.steps = backbone, steps
        with torch.no_grad():
            self.width = pooled_features(backbone.eval(), sample).shape[1]

    def batch(self, images: Tensor, augment: Augment, generator: torch.Generator) -> dict[str, Tensor]:
        """views: (2n, 3, H, W), of which i and n + i show image i."""
        return {"views": torch.cat([augment(images, generator), augment(images, generator)])}


class SimCLR(Objective):
    """Two views of an image attract each other and repel the batch's other views.

    temperature: the paper's 0.5 and SimCore's 0.07 enclose the default; head_width: of the two-layer projection.
    """

    def __init__(
        self, backbone: nn.Module, sample: Tensor, steps: int, *, temperature: float = 0.2, head_width: int = 128
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(backbone, sample, steps)
        self.temperature = temperature
        self.head = nn.Sequential(nn.Linear(self.width, head_width), nn.ReLU(), nn.Linear(head_width, head_width))

    def forward(self, views: Tensor) -> SimpleNamespace:
        """views: (2n, 3, H, W)."""
        found = self.head(pooled_features(self.backbone, views))
        return SimpleNamespace(loss=nt_xent(found, self.temperature))


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of projections (2n, width) whose rows i and n + i show one image: a scalar."""
    with torch.autocast(projections.device.type, enabled=False):
        unit = normalize(projections.float(), dim=1)
        logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    half = len(unit) // 2
    return cross_entropy(logits, torch.arange(2 * half, device=unit.device).roll(half))


class BYOL(Objective):
    """From one view, predict what a moving average of the network, the target, makes of the other; nothing repels.

    momentum: of the target at the start; it rises to 1 along a cosine. The paper's 0.996 is for runs a hundred times as long.
    head_width, hidden_width: of the projection and the prediction, two layers each with batch normalisation between.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sample: Tensor,
        steps: int,
        *,
        momentum: float = 0.97,
        head_width: int = 128,
        hidden_width: int = 256,
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
        super().__init__(backbone, sample, steps)
        self.momentum, self.step = momentum, 0
        self.online = nn.ModuleList([backbone, projection(self.width, hidden_width, head_width)])
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = projection(head_width, hidden_width, head_width)

    @torch.no_grad()
    def follow(self) -> None:
        """target <- m target + (1 - m) online, with m = 1 - (1 - momentum) (cos(pi step / steps) + 1) / 2."""
        away = (1 - self.momentum) * (math.cos(math.pi * self.step / self.steps) + 1) / 2
        for old, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
            old.lerp_(new, away)
        self.step += 1

    def forward(self, views: Tensor) -> SimpleNamespace:
        """views: (2n, 3, H, W). The target moves at the start of a step, to what the last one left (not at all at first)."""
        self.follow()
        backbone, head = self.online
        predicted = normalize(self.predictor(head(pooled_features(backbone, views))).float(), dim=1)
        with torch.no_grad():
            backbone, head = self.target
            wanted = normalize(head(pooled_features(backbone, views)).float(), dim=1).roll(len(views) // 2, 0)
        return SimpleNamespace(loss=2 * (2 - 2 * (predicted * wanted).sum(1)).mean())  # the sum of both directions


def projection(before: int, hidden: int, after: int) -> nn.Sequential:
    """BYOL's two-layer head."""
    return nn.Sequential(nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, after))


class MAE(Objective):
    """Encode a few patches of an image, and from them tell the pixels of the others.

    For vision transformers in the form of transformers' `ViTModel`: `embeddings` make patch tokens, after a class token or
    so. mask_ratio: the share hidden; decoder_width, decoder_layers, decoder_heads: of the small transformer that tells the
    pixels and is then thrown away. An untrained pooler is removed, so features are the mean over tokens, of the whole image.
    """

    augment = staticmethod(crop_and_flip)

    def __init__(
        self,
        backbone: nn.Module,
        sample: Tensor,
        steps: int,
        *,
        mask_ratio: float = 0.75,
        decoder_width: int = 64,
        decoder_layers: int = 2,
        decoder_heads: int = 4,
    ) -> None:
        self.patch, self.patches, prefix = patch_tokens(backbone, sample)
        self.hidden = round(mask_ratio * self.patches)
        if not 0 < self.hidden < self.patches:
            raise ValueError(f"mask_ratio {mask_ratio} hides {self.hidden} of {self.patches} patches: hide some and leave some")
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        super().__init__(backbone, sample, steps)
        layer = nn.TransformerEncoderLayer(
            decoder_width, decoder_heads, 4 * decoder_width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.enter = nn.Linear(self.width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_width))
        self.positions = nn.Parameter(0.02 * torch.randn(prefix + self.patches, decoder_width))
        self.decoder = nn.TransformerEncoder(layer, decoder_layers, nn.LayerNorm(decoder_width), enable_nested_tensor=False)
        self.leave = nn.Linear(decoder_width, 3 * self.patch**2)

    def batch(self, images: Tensor, augment: Augment, generator: torch.Generator) -> dict[str, Tensor]:
        """images: (n, 3, H, W); hidden: bool (n, patches), as many in each row."""
        places = torch.rand(len(images), self.patches, generator=generator).argsort(1)
        return {"images": augment(images, generator), "hidden": places < self.hidden}

    def forward(self, images: Tensor, hidden: Tensor) -> SimpleNamespace:
        """The mean squared error on the hidden patches, each of mean 0 and spread 1. `pixels`: (n, patches, 3 patch^2)."""
        shown = self.encode_shown(images, ~hidden)
        prefix = len(self.positions) - self.patches
        tokens = self.mask_token.to(shown.dtype).repeat(len(images), prefix + self.patches, 1)
        kept = nn.functional.pad(~hidden, (prefix, 0), value=True)
        tokens[kept] = shown.flatten(0, 1)
        pixels = self.leave(self.decoder(tokens + self.positions))[:, prefix:].float()
        wanted = unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        wanted = (wanted - wanted.mean(2, keepdim=True)) / (wanted.var(2, keepdim=True) + 1e-6).sqrt()
        return SimpleNamespace(loss=(pixels - wanted)[hidden].square().mean(), pixels=pixels)

    def encode_shown(self, images: Tensor, shown: Tensor) -> Tensor:
        """(n, prefix + shown, decoder width): the backbone on the tokens of the shown patches alone."""

        def drop_hidden(module: nn.Module, given: Any, tokens: Tensor) -> Tensor:
            kept = nn.functional.pad(shown, (tokens.shape[1] - shown.shape[1], 0), value=True)
            return tokens[kept].view(len(tokens), -1, tokens.shape[2])

        handle = self.backbone.embeddings.register_forward_hook(drop_hidden)
        try:
            return self.enter(self.backbone((images - 0.5) / 0.5).last_hidden_state)
        finally:
            handle.remove()


@torch.no_grad()
def patch_tokens(backbone: nn.Module, sample: Tensor) -> tuple[int, int, int]:
    """(side of a patch in pixels, patches in an image, tokens before them). Raises ValueError where there are none."""
    side: Any = getattr(getattr(backbone, "config", None), "patch_size", None)
    side = side[0] if isinstance(side, (list, tuple)) and len(set(side)) == 1 else side
    embeddings = getattr(backbone, "embeddings", None)
    tokens = embeddings((sample - 0.5) / 0.5) if isinstance(side, int) and embeddings is not None else None
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ValueError(
            f"mae hides patch tokens, and {type(backbone).__name__} has none: give a vision transformer such as ViTModel, "
            "or choose simclr or byol"
        )
    patches = (sample.shape[2] // side) * (sample.shape[3] // side)
    return side, patches, tokens.shape[1] - patches


OBJECTIVES: dict[str, type[Objective]] = {"simclr": SimCLR, "byol": BYOL, "mae": MAE}


class SSLPretrainer:
    """Train a backbone on unlabelled images.

    objective: `simclr`, `byol` or `mae`. backbone: a module from images (n, 3, H, W), normalised to mean 0.5 and spread 0.5,
    to features (n, width) or feature maps (n, width, h, w), or a transformers vision model; it is copied, and the copy is
    trained from where it stands, so give a fresh one. steps, batch_size: of training, by AdamW at a rate that rises to lr in
    a tenth of the steps and falls along a cosine. augment: of one view; autocast: compute type. settings: the objective's
    own, see `SimCLR`, `BYOL` and `MAE`.

    After `fit`: `backbone` (in evaluation mode), `losses`.
    """

    def __init__(
        self,
        objective: str,
        backbone: nn.Module,
        *,
        steps: int,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        augment: Augment | None = None,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}. {did_you_mean(objective, OBJECTIVES)}")
        known = inspect.signature(OBJECTIVES[objective]).parameters
        own = [name for name, one in known.items() if one.kind is one.KEYWORD_ONLY]
        for name in settings:
            if name not in own:
                raise ValueError(f"{objective} has no setting {name!r}. {did_you_mean(name, own)}")
        if steps < 1 or batch_size < 2:
            raise ValueError(f"steps must be at least 1 and batch_size 2, got {steps} and {batch_size}")
        self.objective, self.settings = OBJECTIVES[objective], settings
        self.backbone = copy.deepcopy(backbone)
        self.steps, self.batch_size, self.lr, self.weight_decay = steps, batch_size, lr, weight_decay
        self.augment = augment or self.objective.augment
        self.autocast, self.seed = autocast, seed
        self.losses: list[float] = []

    def fit(self, images: Tensor) -> Self:
        """Train on images float (n, 3, H, W) in [0, 1]. Raises FloatingPointError at a loss that is not finite."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(f"images must be (at least 2, 3, height, width), got {tuple(images.shape)}")
        generator = torch.Generator().manual_seed(self.seed)
        device = next(self.backbone.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            objective = self.objective(self.backbone, images[:2].to(device), self.steps, **self.settings).to(device)
            chosen = shuffled_rows(len(images), self.batch_size, self.steps, generator)
            record = train_lm(
                objective,
                (objective.batch(images[rows], self.augment, generator) for rows in chosen),
                steps=self.steps,
                optimizers=[torch.optim.AdamW(objective.parameters(), lr=self.lr, weight_decay=self.weight_decay)],
                warmup=0.1,
                schedule="cosine",
                autocast=self.autocast,
            )
        self.losses += record.losses
        self.backbone.eval()
        return self


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, *, batch_size: int = 512) -> np.ndarray:
    """float32 (images, width): the backbone's output for images (n, 3, H, W) in [0, 1], before any projection head.

    An encoder that masks patches (`ViTMAEModel`) masks none here.
    """
    was_training = encoder.training
    config: Any = getattr(encoder, "config", None)
    mask_ratio = getattr(config, "mask_ratio", None)
    device = next(encoder.parameters()).device
    encoder.eval()
    if mask_ratio is not None:
        config.mask_ratio = 0.0
    try:
        found = torch.cat([pooled_features(encoder, batch.to(device)).float().cpu() for batch in images.split(batch_size)])
    finally:
        encoder.train(was_training)
        if mask_ratio is not None:
            config.mask_ratio = mask_ratio
    return found.numpy()


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """(n, width): a tensor, `pooler_output`, or the mean over positions, of normalised images."""
    output: Any = encoder((images - 0.5) / 0.5)
    if not isinstance(output, Tensor):
        output = output.pooler_output if output.get("pooler_output") is not None else output.last_hidden_state.mean(1)
    return output.mean((2, 3)) if output.ndim == 4 else output
