"""Configs of sliced models: the source's config and the widths of the residual stream."""

from __future__ import annotations

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.opt.configuration_opt import OPTConfig


class SlicedLlamaConfig(LlamaConfig):
    """A Llama whose residual stream is narrower than its `hidden_size`.

    slicing: {"original_hidden_size": D, "widths": [...], ...}. `widths` has one entry a signal, in the order of the stream:
    the input of attention 0, of feed-forward 0, of attention 1, ..., and last what the language-model head reads.
    `hidden_size` stays D: norms divide by it, and heads keep their size.
    """

    model_type = "sliced_llama"

    slicing: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _register_models()


class SlicedOPTConfig(OPTConfig):
    """An OPT whose residual stream is narrower than its `hidden_size`; `slicing` as in `SlicedLlamaConfig`."""

    model_type = "sliced_opt"

    slicing: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _register_models()


def _register_models() -> None:
    """Enter the models with `AutoModelForCausalLM` whenever a config is made.

    A model is always looked up by its config, so this is early enough; and it is late enough, since by then
    transformers' auto classes have been imported whole.
    """
    from transformers import AutoModelForCausalLM

    from grainwise.compress.slicegpt.modeling import SlicedLlamaForCausalLM, SlicedOPTForCausalLM

    AutoModelForCausalLM.register(SlicedLlamaConfig, SlicedLlamaForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(SlicedOPTConfig, SlicedOPTForCausalLM, exist_ok=True)
