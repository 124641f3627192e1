"""A small model at the cost of a large one: widen a Llama-class model without changing what it computes.

A speed claim about decoding or compression needs a model that is slow enough to measure, yet predicts text well enough
to be meaningful. `inflate` tiles the residual stream `width` times: every hidden vector h becomes (h, h, ..., h), whose
root mean square is that of h, so the norms act alike; heads and feed-forward units are repeated likewise. A matrix
product over `width` equal copies is divided by `width`, which is exact in floating point when `width` is a power of two.

The repeated copies make every matrix rank-deficient: use the result to measure time and memory, not compressibility.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch stays unimported here: this module is part of the light `grainwise.zoo`
    from torch import Tensor
    from transformers import PreTrainedModel

LLAMA_CLASS = ("llama", "mistral", "qwen2")
INPUT_REPEATED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


def inflate(model: PreTrainedModel, width: int = 4) -> PreTrainedModel:
    """A new model of `width` times the hidden size, heads and feed-forward units that computes the same function.

    model: a causal LM of Llama class (llama, mistral, qwen2), unquantised; it is not changed. The copy keeps its dtype,
    device, head size, vocabulary, depth and tied embeddings, and costs about `width`**2 times the multiplications.
    Raises ValueError for another architecture, a quantised model or a width below 1.
    """
    import torch

    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in LLAMA_CLASS or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"inflate needs a causal LM of {', '.join(LLAMA_CLASS)}, got {type(model).__name__} (model type {kind!r})"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantised: inflate the original model, then quantise the wide one")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a whole number of at least 1, got {width!r}")
    with torch.device("meta"):
        wide = type(model)(_widened(model.config, width))
    state = {name: _tiled(name, value, width) for name, value in model.state_dict().items()}
    wide.load_state_dict(state, assign=True)
    wide.tie_weights()
    base, source = wide.model, model.model
    base.rotary_emb = copy.deepcopy(source.rotary_emb)  # its buffers are not in the state; the head size is unchanged
    wide.generation_config = copy.deepcopy(model.generation_config)
    wide.config.dtype = model.dtype
    wide.requires_grad_(True)
    return wide.train(model.training)


def _widened(config, width: int):  # type: ignore[no-untyped-def]
    wide = copy.deepcopy(config)
    wide.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(wide, name, getattr(config, name) * width)
    return wide


def _tiled(name: str, value: Tensor, width: int) -> Tensor:
    """One parameter of the wide model, by what it does with the tiled streams."""
    module, leaf = name.split(".")[-2:]
    if leaf == "bias":  # of a projection: every copy of its output gets the same
        return value.repeat(width)
    if module in INPUT_REPEATED:  # reads `width` equal copies, so each column weighs 1 / width
        return value.repeat(width, width) / width
    if module == "norm":  # the final gain: the head (perhaps tied to the embedding) sums over the copies
        return value.repeat(width) / width
    if value.ndim == 1:  # a norm inside a block
        return value.repeat(width)
    return value.repeat(1, width)  # embedding and head: the vocabulary stays
