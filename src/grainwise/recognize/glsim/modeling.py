"""The GLSim model: one encoder, two looks, one block that joins them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from grainwise.images.geometry import crop_resize
from grainwise.recognize.glsim.configuration import GLSimConfig
from grainwise.recognize.glsim.selection import (
    attention_rollout,
    global_local_similarity,
    placed_at_centre,
    placed_at_random,
    topk_box,
)
from grainwise.recognize.vit_layout import encode, layout_of, tower
from grainwise.zoo import resolve


@dataclass
class GLSimOutput(ModelOutput):
    """loss: cross-entropy, if labels were given. logits: (batch, labels). boxes: (batch, 4), x0 y0 x1 y1 in pixels, the crop
    that was looked at. similarity: (batch, patches) to the global token. global_token, crop_token: (batch, width).
    looked_again: bool (batch), only with `skip_if_confident`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    boxes: Tensor | None = None
    similarity: Tensor | None = None
    global_token: Tensor | None = None
    crop_token: Tensor | None = None
    looked_again: Tensor | None = None


class GLSimForImageClassification(PreTrainedModel):
    """A ViT that classifies from the image and from the crop that its own tokens point at."""

    config_class = GLSimConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GLSimConfig, encoder: PreTrainedModel | None = None) -> None:
        """encoder: used as it is; None builds one from `config.encoder_config`."""
        super().__init__(config)
        self.encoder: Any = tower(AutoModel.from_config(config.encoder_config)) if encoder is None else None
        width = config.encoder_config.hidden_size
        heads = config.aggregator_heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"aggregator_heads must divide the encoder's width {width}, got {heads}")
        self.aggregator = nn.ModuleList(
            AggregatorBlock(width, heads, eps=config.layer_norm_eps, drop_path=config.drop_path)
            for _ in range(config.aggregator_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_labels)
        self.post_init()
        if encoder is not None:  # only now: post_init must not touch trained weights
            self.encoder = encoder
        self.layout = layout_of(self.encoder)
        if config.global_pool == "cls" and not self.layout.has_class_token:
            raise ValueError(
                f"GLS needs a global token and {type(self.encoder).__name__} has none; "
                "pass global_pool='mean' to use the patch mean"
            )
        if config.selector == "rollout":
            self.encoder.set_attn_implementation("eager")  # fused kernels keep no attention weights to roll out

    @classmethod
    def from_encoder(
        cls, encoder: PreTrainedModel | PreTrainedConfig | str, *, num_labels: int, **options: Any
    ) -> GLSimForImageClassification:
        """A classifier around an encoder: a model (used, not copied), a config (random weights), hub id, folder or zoo name.

        options: those of `GLSimConfig`. Of a classifier or an image-text model, the vision encoder is taken.
        """
        if isinstance(encoder, str):
            encoder = AutoModel.from_pretrained(resolve(encoder))
        elif isinstance(encoder, PreTrainedConfig):
            encoder = AutoModel.from_config(encoder)
        encoder = tower(encoder)
        attention = {"attn_implementation": encoder.config._attn_implementation}  # or the encoder's would be unset by ours
        config = cls.config_class(encoder_config=encoder.config, num_labels=num_labels, **attention | options)
        return cls(config, encoder=encoder)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> GLSimOutput:
        """pixel_values: (batch, channels, H, W), whole patches. labels: class indices (batch,) or soft rows (batch, labels).
        boxes: (batch, 4) to look at instead of the selector's. generator: for the `random` selector."""
        hidden, scores, similarity = self.first_look(pixel_values)
        token = self.global_token(hidden)
        if boxes is None:
            boxes = self.select(scores, pixel_values, generator)
        if self.config.skip_if_confident is None or self.training:
            crop_token, looked_again = self.look_at(pixel_values, boxes), None
        else:
            crop_token, looked_again = self._look_where_unsure(pixel_values, boxes, token)
        logits = self.classify(token, crop_token)
        if self.config.flip_at_test and not self.training:
            logits = (logits + self._mirrored_logits(pixel_values, generator)) / 2
        loss = functional.cross_entropy(logits.float(), labels) if labels is not None else None
        return GLSimOutput(loss, logits, boxes, similarity, token, crop_token, looked_again)

    def first_look(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states after the final norm, patch scores that choose the crop, similarity), no gradient in the last two."""
        rollout = self.config.selector == "rollout"
        hidden, attentions = self.encode(pixel_values, attentions=rollout)
        prefix = self.layout.prefix
        with torch.no_grad():
            similarity = global_local_similarity(
                hidden, self.config.metric, prefix=prefix, global_token=self.global_token(hidden)
            )
            scores = attention_rollout(attentions, prefix=prefix) if rollout else similarity
        return hidden, scores, similarity

    @torch.no_grad()
    def select(self, scores: Tensor, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(batch, 4): the crop of each image, from the scores (batch, patches)."""
        layout, size = self.layout, tuple(pixel_values.shape[-2:])
        inclusive = self.config.box == "inclusive"
        boxes = topk_box(scores, self.config.top_k, layout.grid(pixel_values), layout.patch, size, inclusive=inclusive)
        if self.config.selector == "random":
            return placed_at_random(boxes, size, generator)
        return placed_at_centre(boxes, size) if self.config.selector == "centre" else boxes

    def look_at(self, pixel_values: Tensor, boxes: Tensor) -> Tensor:
        """(batch, width): the global token of the crops, enlarged to the size of the image."""
        crops = crop_resize(pixel_values, boxes, tuple(pixel_values.shape[-2:]))
        return self.global_token(self.encode(crops)[0])

    def classify(self, token: Tensor, crop_token: Tensor) -> Tensor:
        """(batch, labels) from the global tokens of image and crop, (batch, width) each."""
        pair = torch.stack([token, crop_token], 1)
        for block in self.aggregator:
            pair = block(pair)
        return self.head(self.norm(pair)[:, 0])

    def global_token(self, hidden: Tensor) -> Tensor:
        """(batch, width): the class token, or the mean of the patches."""
        return hidden[:, 0] if self.config.global_pool == "cls" else hidden[:, self.layout.prefix :].mean(1)

    def encode(self, pixel_values: Tensor, *, attentions: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(hidden states (batch, tokens, width) after the final norm, attention weights of each layer if asked for)."""
        layout = self.layout
        rows, columns = layout.grid(pixel_values)
        if attentions and self.encoder.config._attn_implementation != "eager":
            raise ValueError("rollout reads attention weights: call model.encoder.set_attn_implementation('eager') first")
        output = encode(self.encoder, pixel_values, **({"output_attentions": True} if attentions else {}))
        hidden = output.last_hidden_state
        if hidden.shape[1] != layout.prefix + rows * columns:
            raise ValueError(
                f"{type(self.encoder).__name__} returned {hidden.shape[1]} tokens for {rows} x {columns} patches and "
                f"{layout.prefix} others: an encoder that keeps every patch is needed"
            )
        return layout.norm(hidden) if layout.norm is not None else hidden, output.attentions if attentions else ()

    def _look_where_unsure(self, pixel_values: Tensor, boxes: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """(crop tokens, which images were looked at again). The first look alone is judged as if its crop were the image."""
        probability = self.classify(token, token).float().softmax(-1).amax(-1)
        unsure = probability <= self.config.skip_if_confident
        crop_token = token.clone()
        if bool(unsure.any()):
            crop_token[unsure] = self.look_at(pixel_values[unsure], boxes[unsure])
        return crop_token, unsure

    def _mirrored_logits(self, pixel_values: Tensor, generator: torch.Generator | None) -> Tensor:
        mirrored = pixel_values.flip(-1)
        hidden, scores, _ = self.first_look(mirrored)
        boxes = self.select(scores, mirrored, generator)
        return self.classify(self.global_token(hidden), self.look_at(mirrored, boxes))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.head:  # logits start at zero: the first steps move the head, not the encoder
            init.zeros_(module.weight)


class AggregatorBlock(nn.Module):
    """A pre-norm transformer block over the two tokens, with stochastic depth."""

    def __init__(self, width: int, heads: int, *, eps: float, drop_path: float) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm_before = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_after = nn.LayerNorm(width, eps=eps)
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, count, width)."""
        batch, count, width = tokens.shape
        query, key, value = self.qkv(self.norm_before(tokens)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + self._sometimes(self.project(mixed))
        return tokens + self._sometimes(self.fall(functional.gelu(self.rise(self.norm_after(tokens)))))

    def _sometimes(self, branch: Tensor) -> Tensor:
        """In training, drop the branch of an image with probability `drop_path` and scale the others up."""
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)
