"""How a Hugging Face vision transformer arranges its output: which tokens come first, how large a patch is, where the last
norm sits. Systems that work inside a ViT read this instead of guessing."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CLASS_TOKENS = ("cls_token", "class_embedding")  # what the families call the parameter of the class token
NORMS = ("layernorm", "norm", "post_layernorm")  # ... and the last norm
NORM_NOT_APPLIED = ("clip_vision_model", "clip_vision_transformer")  # model types that norm only the pooled token


@dataclass(frozen=True)
class ViTLayout:
    """patch: side of a patch in pixels. prefix: tokens before the patches (class, distillation, registers).
    has_class_token: whether token 0 stands for the image. norm: a module to apply to the hidden states, or None where the
    encoder has done it."""

    patch: int
    prefix: int
    has_class_token: bool
    norm: nn.Module | None

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches. Raises ValueError for an image that is no whole number of patches."""
        height, width = pixel_values.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} are no whole number of patches of {self.patch}: resize or crop them"
            )
        return height // self.patch, width // self.patch


def layout_of(encoder: PreTrainedModel) -> ViTLayout:
    """The layout of an encoder that returns `last_hidden_state` (batch, tokens, width).

    Raises ValueError for one without square patches; warns where no final norm is found.
    """
    config = encoder.config
    patch = getattr(config, "patch_size", None)
    side = patch[0] if isinstance(patch, (list, tuple)) and len(set(patch)) == 1 else patch
    if not isinstance(side, int):
        raise ValueError(f"a ViT with square patches is needed; {type(encoder).__name__} has patch_size {patch}")
    parameters = [name.rsplit(".", 1)[-1] for name, _ in encoder.named_parameters()]
    has_class_token = any(name in parameters for name in CLASS_TOKENS)
    extra = int("distillation_token" in parameters) + (getattr(config, "num_register_tokens", 0) or 0)
    return ViTLayout(side, int(has_class_token) + extra, has_class_token, _missing_norm(encoder))


def tower(encoder: PreTrainedModel) -> PreTrainedModel:
    """The vision encoder inside a classifier or an image-text model, without the pooler nobody asks for."""
    inner = getattr(encoder, "vision_model", encoder)
    inner = getattr(inner, inner.base_model_prefix, inner) if getattr(inner, "base_model_prefix", "") else inner
    if getattr(inner, "pooler", None) is not None and "add_pooling_layer" in inspect.signature(type(inner).__init__).parameters:
        inner.pooler = None
    return inner


def encode(encoder: PreTrainedModel, pixel_values: Tensor, **options: Any) -> Any:
    """Run an encoder, asking it to stretch its positions where the images are not of the size it was made for."""
    if (
        _other_size(encoder.config, pixel_values)
        and "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
    ):
        options["interpolate_pos_encoding"] = True
    return encoder(pixel_values=pixel_values, **options)


def _other_size(config: PreTrainedConfig, pixel_values: Tensor) -> bool:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return (height, width) != tuple(pixel_values.shape[-2:])


def _missing_norm(encoder: PreTrainedModel) -> nn.Module | None:
    """The last norm where the encoder's hidden states come before it; a warning where there is none."""
    found = next((getattr(encoder, name) for name in NORMS if isinstance(getattr(encoder, name, None), nn.Module)), None)
    if found is None:
        warnings.warn(
            f"{type(encoder).__name__} seems to return hidden states before the final norm: similarities of such tokens are "
            "dominated by a few outlier channels",
            stacklevel=3,
        )
        return None
    return found if encoder.config.model_type in NORM_NOT_APPLIED else None
