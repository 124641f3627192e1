"""What choosing the crop costs: the similarity against attention rollout, and a whole GLSim forward against single passes.

Selection alone is timed on random tensors of ViT-B at 448 px (784 patches). Rollout is given both forms: the product of
whole matrices, as published, and the product of the class token's row only, which gives the same crop. Its hidden price, that
attention weights must be kept and fused kernels cannot run, is measured on the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ViTConfig, ViTModel

from grainwise.bench import Benchmark, Setting, Timing, alternate
from grainwise.images import crop_resize
from grainwise.recognize.glsim import GLSimForImageClassification, attention_rollout, global_local_similarity, topk_box

WIDTH, LAYERS, HEADS, PATCH = 768, 12, 12, 16
ENCODER = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}  # ViT-Ti


def rollout_of_matrices(attentions: tuple[Tensor, ...]) -> Tensor:
    """(batch, patches): the published form, whole matrices multiplied layer by layer."""
    eye = torch.eye(attentions[0].shape[-1])
    product = (attentions[0].mean(1) + eye) / 2
    for attention in attentions[1:]:
        product = (attention.mean(1) + eye) / 2 @ product
    return product[:, 0, 1:]


def selection(side: int, runs: int) -> tuple[Setting, dict[str, Timing]]:
    """One image of side x side patches."""
    generator = torch.Generator().manual_seed(0)
    tokens = side * side + 1
    hidden = torch.randn(1, tokens, WIDTH, generator=generator)
    attentions = tuple(torch.randn(1, HEADS, tokens, tokens, generator=generator).softmax(-1) for _ in range(LAYERS))

    def boxed(scores: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: topk_box(scores(), 8, (side, side), PATCH, side * PATCH, inclusive=False)

    times = alternate(
        {
            "ours": boxed(lambda: global_local_similarity(hidden)),
            "rollout": boxed(lambda: rollout_of_matrices(attentions)),
            "rollout, one row": boxed(lambda: attention_rollout(attentions)),
            "limit": lambda: hidden.sum(),
        },
        runs=max(runs, 10),
        warmup=2,
    )
    setting = Setting(
        name=f"selection, {side * side} patches of width {WIDTH}",
        ours=times["ours"].median * 1e3,
        naive=times["rollout"].median * 1e3,
        peers={"rollout, one row": times["rollout, one row"].median * 1e3},
        limit={"what": "ms to read the hidden states once", "figure": times["limit"].median * 1e3},
    )
    return setting, times


def forward(size: int, batch: int, runs: int) -> tuple[list[Setting], dict[str, Timing]]:
    """A ViT-Ti encoder on `batch` images: both looks, single passes, and the parts in between."""
    config = ViTConfig(**ENCODER, image_size=size, patch_size=PATCH)
    fused = GLSimForImageClassification.from_encoder(ViTModel(config), num_labels=200).eval()
    rolled = GLSimForImageClassification.from_encoder(ViTConfig(**ENCODER, image_size=size, patch_size=PATCH), num_labels=200)
    rolled.encoder.load_state_dict(fused.encoder.state_dict())
    rolled.encoder.set_attn_implementation("eager")
    rolled.config.selector = "rollout"
    rolled.eval()
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    hidden, scores, _ = fused.first_look(images)
    boxes = fused.select(scores, images)

    def between() -> Tensor:
        similarity = global_local_similarity(hidden)
        return crop_resize(images, fused.select(similarity, images), size)

    def loop() -> Tensor:
        crops = [image[None, :, y0:y1, x0:x1] for image, (x0, y0, x1, y1) in zip(images, boxes.tolist())]
        return torch.cat([interpolate(c, (size, size), mode="bilinear", align_corners=True) for c in crops])

    times = alternate(
        {
            "ours": lambda: fused(images),
            "rollout": lambda: rolled(images),
            "one pass": lambda: fused.encoder(images),
            "one pass, eager, with weights": lambda: rolled.encoder(images, output_attentions=True),
            "selection and crop": between,
            "crop": lambda: crop_resize(images, boxes, size),
            "crop in a loop": loop,
        },
        runs=runs,
    )
    ms = {name: t.median * 1e3 for name, t in times.items()}
    whole = Setting(
        name=f"forward, ViT-Ti, {batch} images of {size} px",
        ours=ms["ours"],
        naive=ms["rollout"],
        peers={"one ViT pass": ms["one pass"]},
        limit={"what": "ms of two encoder passes", "figure": 2 * ms["one pass"]},
        extra={
            "selection_and_crop_share": round(ms["selection and crop"] / ms["ours"], 4),
            "eager_penalty": round(ms["one pass, eager, with weights"] / ms["one pass"], 3),
        },
    )
    crop = Setting(name=f"crop alone, {batch} images of {size} px", ours=ms["crop"], naive=ms["crop in a loop"])
    return [whole, crop], times


@torch.no_grad()
def run(runs: int) -> Benchmark:
    """Selection at 196 and 784 patches; forwards at 224 and 448 px."""
    settings, spread = [], {}
    for side in (14, 28):
        setting, times = selection(side, runs)
        settings.append(setting)
        spread |= {f"{setting.name} {who}": round(t.spread, 3) for who, t in times.items()}
    for size, batch in ((224, 8), (448, 2)):
        found, times = forward(size, batch, runs)
        settings += found
        spread |= {f"{found[0].name} {who}": round(t.spread, 3) for who, t in times.items()}
    return Benchmark(
        system="glsim",
        unit="ms",
        settings=settings,
        runs=runs,
        spread=spread,
        note=f"float32, {torch.get_num_threads()} threads; against one ViT pass the ratio is the price of the second look",
    )
