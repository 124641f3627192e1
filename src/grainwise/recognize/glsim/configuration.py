"""The config of GLSim models."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.auto.configuration_auto import AutoConfig

from grainwise.naming import did_you_mean
from grainwise.recognize.registration import RecognitionConfig

METRICS = ("cos", "l1", "l2")
BOXES = ("reference", "inclusive")
SELECTORS = ("similarity", "rollout", "random", "centre")
POOLS = ("cls", "mean")


class GLSimConfig(RecognitionConfig):
    """An encoder, how its crop is chosen, and the block that joins both looks.

    encoder_config: config, or its dict, of a ViT-like encoder. top_k: patches that span the crop. metric: `cos`, or the mean
    absolute (`l1`) or squared (`l2`) difference. box: `reference` leaves the last selected row and column of patches out,
    as the authors' code does; `inclusive` keeps them. global_pool: `cls`, or `mean` of the patches for encoders without a
    class token. selector: `similarity`, or a control: `rollout` (runs the encoder with eager attention), `random` or
    `centre` (boxes of the similarity's sizes elsewhere). aggregator_layers, aggregator_heads (None: width / 64), drop_path:
    the joining block and its stochastic depth. skip_if_confident: at test time, leave out the second look where the largest
    probability of the first exceeds this. flip_at_test: average the logits of image and mirror image.
    """

    model_type = "glsim"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["boxes", "similarity", "global_token", "crop_token", "looked_again"]

    encoder_config: Any = None
    top_k: int = 8
    metric: str = "cos"
    box: str = "reference"
    global_pool: str = "cls"
    selector: str = "similarity"
    aggregator_layers: int = 1
    aggregator_heads: int | None = None
    drop_path: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    skip_if_confident: float | None = None
    flip_at_test: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None:
            self.encoder_config = AutoConfig.for_model("vit")
        elif isinstance(self.encoder_config, dict):
            options = dict(self.encoder_config)
            self.encoder_config = AutoConfig.for_model(options.pop("model_type", "vit"), **options)
        for name, known in (("metric", METRICS), ("box", BOXES), ("selector", SELECTORS), ("global_pool", POOLS)):
            given = getattr(self, name)
            if given not in known:
                raise ValueError(f"{name} {given!r} is unknown. {did_you_mean(str(given), known)}")
        if self.top_k < 1 or self.aggregator_layers < 1:
            raise ValueError(f"top_k and aggregator_layers must be at least 1, got {self.top_k} and {self.aggregator_layers}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")
        if self.skip_if_confident is not None and not 0 < self.skip_if_confident <= 1:
            raise ValueError(f"skip_if_confident is a probability in (0, 1], or None; got {self.skip_if_confident}")
        super().__post_init__(**kwargs)
