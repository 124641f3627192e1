"""Attention functions of this room, entered into transformers' attention interface.

`register()` makes every kind below valid for `attn_implementation=...`. `patch_attention` switches a model's chosen
layers to one, with options that live in the model's config, so that `save_pretrained` and `from_pretrained` keep both;
`unpatch_attention` undoes it. Layers that are not chosen, and single-token decoding, stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

UNSUPPORTED = ("softcap", "position_bias", "s_aux", "sliding_window")  # what some models pass that only exact attention knows
CONFIG_KEY = "grainwise_attention"  # in config.json: {"kind", "layers", "options", "replaced"}

Attend = Callable[..., Tensor]  # (query, key, value, *, scale, causal, key_padding, layer, options) -> (B, H, n, d)
Check = Callable[[dict[str, Any]], None]  # raises ValueError or TypeError at wrong options


@dataclass(frozen=True)
class Kind:
    """A way to compute attention over a prompt: `attend`, and `check` for its options."""

    attend: Attend
    check: Check


def _hyper_attend(query: Tensor, key: Tensor, value: Tensor, *, layer: int, options: dict[str, Any], **request: Any) -> Tensor:
    from grainwise.context.hyperattention.attention import hyper_attention

    options = {**options, "seed": options.get("seed", 0) + layer}  # layers must not share their sampling errors
    out: Tensor = hyper_attention(query, key, value, return_lse=False, **request, **options)
    return out


def _hyper_check(options: dict[str, Any]) -> None:
    from grainwise.context.hyperattention.plan import Budget

    known = [*Budget.__dataclass_fields__, "seed"]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of hyper attention. {did_you_mean(name, known)}")
    Budget(**{n: v for n, v in options.items() if n != "seed"})
    if not isinstance(options.get("seed", 0), int):
        raise TypeError(f"seed must be an integer, got {options['seed']!r}")


KINDS: dict[str, Kind] = {"hyper": Kind(_hyper_attend, _hyper_check)}


def register() -> None:
    """Enter every kind, with its mask function, into transformers. Calling it again changes nothing."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("cache_kit", _cache_kit_forward)
    AttentionMaskInterface.register("cache_kit", sdpa_mask)
    for name in KINDS:
        AttentionInterface.register(name, _forward_of(name))
        AttentionMaskInterface.register(name, padding_or_mask)


def _cache_kit_forward(*args: Any, **request: Any) -> tuple[Tensor, None]:
    from grainwise.context.cache_kit import cache_kit_forward  # late: it needs all of transformers, this module must not

    return cache_kit_forward(*args, **request)


def padding_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **request: Any,
) -> Tensor | None:
    """What a layer needs to know beyond "causal" or "everything": nothing, the padding, or a full mask.

    For plain causal or bidirectional attention: None, or bool (batch, keys), True at real keys, cut to the keys that are
    filled. For any other pattern (sliding windows, packed sequences): transformers' bool mask (batch, 1, queries, keys).
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, device=device, **request,
        )  # fmt: skip
    filled = kv_length
    if mask_function is not bidirectional_mask_function:
        filled = min(kv_length, int(q_offset) + q_length - kv_offset)  # a static cache is longer than what it holds
    if attention_mask is None:
        return None if filled == kv_length else torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    real = attention_mask[:, kv_offset : kv_offset + filled].bool()
    return None if filled == kv_length and bool(real.all()) else real


def _forward_of(kind: str) -> Callable[..., tuple[Tensor, None]]:
    """The function in transformers' form for `kind`."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **request: Any,
    ) -> tuple[Tensor, None]:
        setting = getattr(module.config, CONFIG_KEY, None) or {}
        remember(module.config, kind)
        layer = getattr(module, "layer_idx", None) or 0
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
        chosen = setting.get("layers") is None or layer in setting["layers"]
        special = dropout or any(request.get(n) is not None for n in UNSUPPORTED) or getattr(attention_mask, "ndim", 2) != 2
        if query.shape[2] == 1 or (special and not chosen):
            return _exact(module, query, key, value, attention_mask, dropout, scaling, causal, request)
        if chosen:
            _refuse_what_is_missing(kind, layer, attention_mask, dropout, request)
        if attention_mask is not None:
            key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
        options = setting.get("options", {}) if chosen else {"min_seq_len": query.shape[2]}
        device = query.device.type
        if torch.is_autocast_enabled(device):  # rotary positions leave queries and keys wider than values
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            out = KINDS[kind if chosen else "hyper"].attend(
                query, key, value, scale=scaling, causal=causal, key_padding=attention_mask, layer=layer, options=options
            )
        return out.transpose(1, 2).contiguous(), None

    return forward


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    request: dict[str, Any],
) -> tuple[Tensor, None]:
    """transformers' exact attention, for one query, or for a layer that keeps it under a mask that only it knows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.ndim == 2:
        keys = mask.shape[1]
        key, value, mask = key[:, :, :keys], value[:, :, :keys], mask[:, None, None, :]
        if causal:
            ahead = torch.arange(keys, device=mask.device) > torch.arange(query.shape[2], device=mask.device)[:, None] + (
                keys - query.shape[2]
            )
            mask = mask & ~ahead
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **request
    )[0]
    return out, None


def _refuse_what_is_missing(kind: str, layer: int, mask: Tensor | None, dropout: float, request: dict[str, Any]) -> None:
    where = f"layer {layer} with attn_implementation={kind!r}"
    if dropout:
        raise ValueError(f"{where}: attention dropout {dropout} is not supported: set config.attention_dropout = 0.0")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"{where}: a mask of shape {tuple(mask.shape)} is not supported, only causal attention, full attention and "
            "padding: give the 2-d attention_mask of the tokenizer, and keep sliding-window or packed layers exact with "
            "patch_attention(model, layers=[...])"
        )
    for name in UNSUPPORTED:
        if request.get(name) is not None:
            raise ValueError(f"{where}: {name} is not supported: leave this layer out of patch_attention(layers=...)")


def remember(config: PreTrainedConfig, kind: str) -> None:
    """Let `save_pretrained` write the kind, so that `from_pretrained` chooses it again (it forgets it on loading)."""
    if getattr(config, CONFIG_KEY, None):
        config.attn_implementation = kind


def chosen_layers(spec: str | Sequence[int], count: int) -> list[int]:
    """Layer numbers from a list of them or from "all", "odd", "even", "first:N", "last:N". Raises ValueError."""
    numbers = list(range(count))
    if not isinstance(spec, str):
        wrong = [i for i in spec if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count]
        if wrong or not spec:
            raise ValueError(f"layers must be numbers from 0 to {count - 1}, at least one, got {list(spec)}")
        return sorted(set(spec))
    plain = {"all": numbers, "odd": numbers[1::2], "even": numbers[::2]}
    if spec in plain:
        return plain[spec]
    side, _, number = spec.partition(":")
    if side not in ("first", "last") or not number.isdigit() or not 1 <= int(number) <= count:
        raise ValueError(f"layers={spec!r} is none of all, odd, even, first:N, last:N with N from 1 to {count}")
    return numbers[: int(number)] if side == "first" else numbers[count - int(number) :]


def patch_attention(
    model: PreTrainedModel, *, layers: str | Sequence[int] = "all", kind: str = "hyper", **options: Any
) -> None:
    """Compute the prompt's attention in `layers` of `model` by `kind`; the other layers stay exact.

    options: those of the kind; for "hyper": block, samples, projections, min_seq_len, sinks, window, seed. They are kept
    in the model's config. Patching again replaces the earlier setting. Raises ValueError or TypeError at a wrong layer,
    kind or option, before anything is changed, and for a model whose attention cannot be exchanged.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of attention. {did_you_mean(kind, KINDS)}")
    KINDS[kind].check(options)
    config = model.config.get_text_config(decoder=True)
    chosen = chosen_layers(layers, config.num_hidden_layers)
    register()
    old = getattr(config, CONFIG_KEY, None) or {}
    replaced = old.get("replaced") or model.config._attn_implementation
    model.set_attn_implementation(kind)
    if config._attn_implementation != kind:
        raise ValueError(f"{type(model).__name__} does not use transformers' attention interface: its attention stays as it is")
    setattr(config, CONFIG_KEY, {"kind": kind, "layers": chosen, "options": options, "replaced": replaced})
    remember(config, kind)


def unpatch_attention(model: PreTrainedModel) -> None:
    """Put back the attention that `patch_attention` replaced. Raises ValueError for a model that is not patched."""
    config = model.config.get_text_config(decoder=True)
    setting = getattr(config, CONFIG_KEY, None)
    if not setting:
        raise ValueError("this model's attention is not patched: there is nothing to undo")
    delattr(config, CONFIG_KEY)
    if hasattr(config, "attn_implementation"):
        delattr(config, "attn_implementation")
    model.set_attn_implementation(setting["replaced"])
