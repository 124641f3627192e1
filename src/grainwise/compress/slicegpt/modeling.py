"""Sliced Llama and OPT: ordinary dense models whose residual stream has its own width and basis at every sub-layer.

A decoder layer is the original one with two more matrices: `attn_shortcut` and `mlp_shortcut` carry the skip path from one
sub-layer's basis to the next. Heads, head size, rotary positions, feed-forward width and cache are those of the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, OPTForCausalLM, OPTModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)
from transformers.models.opt.modeling_opt import (
    ACT2FN,
    OPTAttention,
    OPTDecoder,
    OPTDecoderLayer,
    OPTLearnedPositionalEmbedding,
    OPTPreTrainedModel,
)

from grainwise.compress.slicegpt.configuration import SlicedLlamaConfig, SlicedOPTConfig
from grainwise.compress.slicegpt.norm_fusion import SlicedRMSNorm
from grainwise.compress.structural import CompressionReport, ModelSize, model_size


@dataclass(frozen=True)
class SlicingReport(CompressionReport):
    """Sizes before and after, and the widths: of the unsliced stream and of each signal (see `SlicedLlamaConfig`)."""

    original_width: int
    widths: tuple[int, ...]


class _Sliced:
    """What both sliced models can tell about themselves."""

    config: Any

    def slicing_report(self) -> SlicingReport:
        """The sizes of the source (as recorded when it was sliced) and of this model."""
        slicing = _slicing(self.config)
        return SlicingReport(
            system="slicegpt",
            before=ModelSize(**slicing["source"]),
            after=model_size(self),  # type: ignore[arg-type]
            original_width=slicing["original_hidden_size"],
            widths=tuple(slicing["widths"]),
        )


def _slicing(config: Any) -> dict[str, Any]:
    slicing = config.slicing
    signals = 2 * config.num_hidden_layers + 1
    if slicing is None or len(slicing["widths"]) != signals:
        raise ValueError(
            f"{type(config).__name__} needs `slicing` with {signals} widths, got {slicing}: sliced models are made by "
            "grainwise.compress.slicegpt.slice_model"
        )
    return slicing


def _attention(kind: type[nn.Module], config: Any, index: int, read: int, write: int, out_name: str, out_bias: bool) -> Any:
    """The source's attention with projections between the sliced stream and the unchanged heads."""
    with torch.device("meta"):  # the full-width projections are replaced below
        attention = kind(config=config, layer_idx=index)
    for name in ("q_proj", "k_proj", "v_proj"):
        full = getattr(attention, name)
        setattr(attention, name, nn.Linear(read, full.out_features, bias=full.bias is not None))
    setattr(attention, out_name, nn.Linear(getattr(attention, out_name).in_features, write, bias=out_bias))
    return attention


class SlicedLlamaDecoderLayer(LlamaDecoderLayer):
    """widths: of the stream at this layer's attention, at its feed-forward, and at the next layer."""

    def __init__(self, config: SlicedLlamaConfig, index: int, widths: list[int]) -> None:
        GradientCheckpointingLayer.__init__(self)
        first, second, third = widths
        full, inner = config.hidden_size, config.intermediate_size
        self.hidden_size = full
        self.self_attn = _attention(LlamaAttention, config, index, first, second, "o_proj", config.attention_bias)
        with torch.device("meta"):
            self.mlp = LlamaMLP(config)
        self.mlp.gate_proj = nn.Linear(second, inner, bias=config.mlp_bias)
        self.mlp.up_proj = nn.Linear(second, inner, bias=config.mlp_bias)
        self.mlp.down_proj = nn.Linear(inner, third, bias=config.mlp_bias)
        self.input_layernorm = SlicedRMSNorm(full, config.rms_norm_eps)
        self.post_attention_layernorm = SlicedRMSNorm(full, config.rms_norm_eps)
        self.attn_shortcut = nn.Linear(first, second, bias=False)
        self.mlp_shortcut = nn.Linear(second, third, bias=False)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """hidden_states: (batch, length, width of this layer) -> (batch, length, width of the next)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **context)
        hidden_states = self.attn_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class SlicedLlamaModel(LlamaModel):
    """Llama without its head; the forward pass is the source's own."""

    config: SlicedLlamaConfig

    def __init__(self, config: SlicedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # not LlamaModel's: that would build the full-width modules
        widths = _slicing(config)["widths"]
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, widths[0], self.padding_idx)
        self.layers = nn.ModuleList(
            SlicedLlamaDecoderLayer(config, i, widths[2 * i : 2 * i + 3]) for i in range(config.num_hidden_layers)
        )
        self.norm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SlicedLlamaForCausalLM(_Sliced, LlamaForCausalLM):
    """A sliced Llama with its language-model head; made by `slice_model`, reloaded by `AutoModelForCausalLM`."""

    config: SlicedLlamaConfig
    config_class = SlicedLlamaConfig
    _tied_weights_keys: dict[str, str] = {}  # embedding and head are rotated differently

    def __init__(self, config: SlicedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = SlicedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(_slicing(config)["widths"][-1], config.vocab_size, bias=False)
        self.post_init()


class SlicedOPTDecoderLayer(OPTDecoderLayer):
    """widths: of the stream at this layer's attention, at its feed-forward, and at the next layer."""

    def __init__(self, config: SlicedOPTConfig, index: int, widths: list[int]) -> None:
        GradientCheckpointingLayer.__init__(self)
        first, second, third = widths
        self.embed_dim = config.hidden_size
        self.dropout = config.dropout
        self.activation_fn = ACT2FN[config.activation_function]
        self.self_attn = _attention(OPTAttention, config, index, first, second, "out_proj", config.enable_bias)
        self.fc1 = nn.Linear(second, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, third)
        self.self_attn_layer_norm = SlicedRMSNorm(config.hidden_size, LAYER_NORM_EPS)
        self.final_layer_norm = SlicedRMSNorm(config.hidden_size, LAYER_NORM_EPS)
        self.attn_shortcut = nn.Linear(first, second, bias=False)
        self.mlp_shortcut = nn.Linear(second, third, bias=False)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """hidden_states: (batch, length, width of this layer) -> (batch, length, width of the next)."""
        attended, _ = self.self_attn(hidden_states=self.self_attn_layer_norm(hidden_states), **context)
        hidden_states = self.attn_shortcut(hidden_states) + self._dropped(attended)
        inner = self.activation_fn(self.fc1(self.final_layer_norm(hidden_states)))
        return self.mlp_shortcut(hidden_states) + self._dropped(self.fc2(inner))

    def _dropped(self, branch: Tensor) -> Tensor:
        return nn.functional.dropout(branch, p=self.dropout, training=self.training)


LAYER_NORM_EPS = 1e-5  # OPT's LayerNorms are built with torch's default


class SlicedOPTDecoder(OPTDecoder):
    """OPT's decoder stack; the forward pass is the source's own."""

    config: SlicedOPTConfig

    def __init__(self, config: SlicedOPTConfig) -> None:
        OPTPreTrainedModel.__init__(self, config)
        widths = _slicing(config)["widths"]
        self.dropout, self.layerdrop = config.dropout, config.layerdrop
        self.padding_idx = config.pad_token_id
        self.max_target_positions = config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, widths[0], self.padding_idx)
        self.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, widths[0])
        self.project_in = self.project_out = None
        self.final_layer_norm = SlicedRMSNorm(config.hidden_size, LAYER_NORM_EPS)
        self.layers = nn.ModuleList(
            SlicedOPTDecoderLayer(config, i, widths[2 * i : 2 * i + 3]) for i in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()


class SlicedOPTModel(OPTModel):
    """OPT without its head."""

    config: SlicedOPTConfig

    def __init__(self, config: SlicedOPTConfig) -> None:
        OPTPreTrainedModel.__init__(self, config)
        self.decoder = SlicedOPTDecoder(config)
        self.post_init()


class SlicedOPTForCausalLM(_Sliced, OPTForCausalLM):
    """A sliced OPT with its head, which has a bias: the final norm's shift ends up there."""

    config: SlicedOPTConfig
    config_class = SlicedOPTConfig
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: SlicedOPTConfig) -> None:
        OPTPreTrainedModel.__init__(self, config)
        self.model = SlicedOPTModel(config)
        self.lm_head = nn.Linear(_slicing(config)["widths"][-1], config.vocab_size, bias=True)
        self.post_init()
