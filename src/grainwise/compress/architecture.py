"""The architecture map: which module of a decoder is a norm, which reads the residual stream, which writes to it.

Structural methods (slicing the residual width, pruning feed-forward channels, removing sub-layers) and layer-wise
calibration need to know this; they ask here instead of knowing the names of one model class. A decoder layer is a list
of pre-norm sub-layers: stream <- skip(stream) + writer(inner(readers(norm(stream)))).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from grainwise.naming import did_you_mean

Context = Mapping[str, Any]  # what the model passes to each layer beside the stream: masks, positions
Branch = Callable[[nn.Module, Tensor, Context], Tensor]  # (layer, normed stream, context) -> what is added to the stream


@dataclass(frozen=True)
class SubLayer:
    """One residual sub-layer; module names are relative to the decoder layer.

    readers: linear modules whose input is the normed stream. writer: the linear module whose output is added to it.
    skip: a linear module on the skip path, or "" when the stream passes unchanged.
    """

    kind: str  # "attention" or "feed_forward"
    norm: str
    readers: tuple[str, ...]
    writer: str
    branch: Branch
    skip: str = ""


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a causal LM are; names are relative to the model.

    embeddings: embedding modules whose outputs are summed into the first stream. centred: the norms are LayerNorms, which
    subtract the mean over the stream's coordinates (RMSNorms do not).
    """

    embeddings: tuple[str, ...]
    layers: str
    sublayers: tuple[SubLayer, ...]
    final_norm: str
    head: str
    centred: bool

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, in order."""
        return model.get_submodule(self.layers)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Last parts of the names of all readers and writers, as PEFT's `target_modules` takes them."""
        names = [n.rpartition(".")[2] for s in self.sublayers for n in (*s.readers, s.writer)]
        return tuple(dict.fromkeys(names))


def _attention(layer: nn.Module, normed: Tensor, context: Context) -> Tensor:
    return layer.self_attn(hidden_states=normed, **context)[0]


def _gated(layer: nn.Module, normed: Tensor, context: Context) -> Tensor:
    return layer.mlp(normed)


def _two_layers(layer: nn.Module, normed: Tensor, context: Context) -> Tensor:
    return layer.fc2(layer.activation_fn(layer.fc1(normed)))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LLAMA = Architecture(
    embeddings=("model.embed_tokens",),
    layers="model.layers",
    sublayers=(
        SubLayer("attention", "input_layernorm", _QKV, "self_attn.o_proj", _attention),
        SubLayer("feed_forward", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", _gated),
    ),
    final_norm="model.norm",
    head="lm_head",
    centred=False,
)
OPT = Architecture(
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    layers="model.decoder.layers",
    sublayers=(
        SubLayer("attention", "self_attn_layer_norm", _QKV, "self_attn.out_proj", _attention),
        SubLayer("feed_forward", "final_layer_norm", ("fc1",), "fc2", _two_layers),
    ),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    centred=True,
)


def _with_shortcuts(source: Architecture) -> Architecture:
    """The map of the sliced form of `source`: rotations on the skip paths, norms that never subtract a mean."""
    skips = {"attention": "attn_shortcut", "feed_forward": "mlp_shortcut"}
    return replace(source, sublayers=tuple(replace(s, skip=skips[s.kind]) for s in source.sublayers), centred=False)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "opt": OPT,
    "sliced_llama": _with_shortcuts(LLAMA),
    "sliced_opt": _with_shortcuts(OPT),
}


def architecture_of(model: nn.Module) -> Architecture:
    """The map of a causal LM. Raises ValueError, listing what is known, when the model does not fit any."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(f"no architecture map for model type {kind!r}. {did_you_mean(kind, ARCHITECTURES)}")
    if not hasattr(model, ARCHITECTURES[kind].head):
        raise ValueError(f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM")
    if kind.endswith("opt"):
        _check_opt(config)
    return ARCHITECTURES[kind]


def _check_opt(config: Any) -> None:
    if config.word_embed_proj_dim != config.hidden_size:
        raise ValueError(
            "OPT models with embedding projections (facebook/opt-350m: word_embed_proj_dim "
            f"{config.word_embed_proj_dim}, hidden_size {config.hidden_size}) are not supported: take another OPT size"
        )
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise ValueError(
            "only pre-norm OPT models with a final norm are supported, this one has do_layer_norm_before="
            f"{config.do_layer_norm_before}, _remove_final_layer_norm={config._remove_final_layer_norm}"
        )
