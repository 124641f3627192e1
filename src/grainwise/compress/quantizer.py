"""The frame of the quantisers: how a stored-in-few-bits linear layer enters transformers, is saved, and comes back.

A method is a config, a subclass of `LinearQuantConfig`, and the layer that it names in `layer`, a subclass of
`QuantizedLinear`. `@quantization_method("name")` makes both known to transformers, after which these work:

    AutoModelForCausalLM.from_pretrained(path, quantization_config=MyConfig(...))   # quantises while loading
    quantize_model(model, MyConfig(...)).save_pretrained(folder)                    # quantises in place
    AutoModelForCausalLM.from_pretrained(folder)                                    # finds the method in config.json

The output head and layers tied to the embedding stay as they are unless the config says `quantize_head=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from grainwise.compress.registration import register

TRAINING_REFUSED = (
    "weights held in few bits cannot be trained: attach an adapter (get_peft_model), or dequantise the model first"
)

Config = TypeVar("Config", bound="type[LinearQuantConfig]")


class QuantizedLinear(nn.Linear):
    """A linear layer whose `weight` is packed integers. Being an `nn.Linear`, it is a target of PEFT's "all-linear".

    Subclasses define `empty`, `fill`, `fill_stored`, `stored_tensors`, `dequantize` and `forward`, keep the packed integers
    in `weight` (a parameter without gradient) and everything else in buffers named in `CONSTANTS`.
    PARTS: names on disk behind `weight.`; a stored layer has some of them.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()
    CONSTANTS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def empty(cls, linear: nn.Linear, config: Any) -> QuantizedLinear:
        """A layer without weights, of the sizes and with the bias of `linear`."""
        raise NotImplementedError

    def fill(self, weight: Tensor, name: str) -> None:
        """Quantise `weight` (out, in) into this layer. name: for error messages."""
        raise NotImplementedError

    def fill_stored(self, packed: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Take over what `stored_tensors` gave; raises ValueError if it does not fit this layer."""
        raise NotImplementedError

    def stored_tensors(self) -> dict[str, Tensor]:
        """What is saved behind `weight.`, beside the packed integers; {} while the layer is empty."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as floats, (out, in)."""
        raise NotImplementedError

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedLinear:
        """As in torch, for the bias only; raises ValueError when asked to train the packed weight."""
        if requires_grad:
            raise ValueError(TRAINING_REFUSED)
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moving follows the device only: casting scales to half precision would change the weights."""
        kept = {name: self._buffers[name] for name in self.CONSTANTS}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination.update({f"{prefix}weight.{key}": value for key, value in self.stored_tensors().items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = f"{prefix}weight."
        parts = {key[len(own) :]: value for key, value in state_dict.items() if key.startswith(own)}
        if prefix + "weight" not in state_dict or not parts:
            missing_keys.append(prefix + "weight")
            return
        try:
            self.fill_stored(state_dict[prefix + "weight"], parts)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        if self.bias is not None:
            if prefix + "bias" in state_dict:
                self.bias.data.copy_(state_dict[prefix + "bias"])
            else:
                missing_keys.append(prefix + "bias")


class LinearQuantConfig(QuantizationConfigMixin):
    """What every quantiser of linear layers is told.

    skip: names (or regular expressions from the start of a name) of layers to leave alone, beside the head and tied layers.
    quantize_head: quantise the output head as well; refused where it shares its weights with the embedding.
    """

    method: ClassVar[str]
    layer: ClassVar[type[QuantizedLinear]]

    def __init__(self, *, skip: list[str] | None = None, quantize_head: bool = False, **unknown: Any) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {sorted(unknown)[0]!r}; its options are {sorted(self.__dict__)}"
            )
        self.quant_method = self.method
        self.skip, self.quantize_head = skip, quantize_head


def quantization_method(name: str) -> Callable[[Config], Config]:
    """Register a config class (and the quantiser for its layer) under `name`, which config.json will carry."""

    def enter(config_cls: Config) -> Config:
        config_cls.method = name
        if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(name)(config_cls)
            register_quantizer(name)(type(f"{config_cls.__name__}Quantizer", (LinearQuantizer,), {"config_cls": config_cls}))
        return config_cls

    return enter


class LinearQuantizer(HfQuantizer):
    """Replaces linear layers before weights are loaded and fills them while they are."""

    requires_calibration = False
    config_cls: ClassVar[type[LinearQuantConfig]]

    def __init__(self, quantization_config: LinearQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.serialized_names = {"weight": ["weight", *(f"weight.{part}" for part in self.config_cls.layer.PARTS)]}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, linear in linear_layers(model, self.quantization_config):
            with torch.device("meta"):
                model.set_submodule(name, self.config_cls.layer.empty(linear, self.quantization_config))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.requires_grad_(False)
        loading = getattr(model, "_weight_conversions", None) or []  # saving would try to undo them; packed parts need none
        model._weight_conversions = [
            c for c in loading if not any(isinstance(o, _Restore) for o in getattr(c, "operations", ()))
        ]
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Restore}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_model(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """Float weight from a checkpoint -> filled layer."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        result = {}
        for name, value in input_dict.items():
            layer, _ = get_module_from_name(model, name)
            layer.fill(value[0] if isinstance(value, list) else value, name)
            layer._is_hf_initialized = True
            result[name] = layer.weight
        return result


class _Restore(ConversionOps):
    """Stored parts -> filled layer."""

    def __init__(self, hf_quantizer: LinearQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        layer, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, QuantizedLinear):
            return input_dict
        parts = {key.removeprefix("weight."): v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        if "weight" not in parts:
            raise ValueError(f"{full_layer_name}: the packed weight is missing from the checkpoint")
        layer.fill_stored(parts.pop("weight"), parts)
        layer._is_hf_initialized = True
        return {"weight": layer.weight}


def linear_layers(model: nn.Module, config: LinearQuantConfig) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the linear layers that `config` quantises. Raises ValueError for a tied head or if there is none."""
    protected = list(get_keys_to_not_convert(model)) if hasattr(model, "get_output_embeddings") else []
    if config.quantize_head and hasattr(model, "get_output_embeddings"):
        head, source = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and (getattr(model.config, "tie_word_embeddings", False) or head.weight is source.weight):
            raise ValueError(
                "the output head shares its weights with the input embedding, which stays in floats: leave quantize_head off, "
                "or untie them first (tie_word_embeddings=False and a copy of the weights)"
            )
        protected = [name for name in protected if head is None or model.get_submodule(name) is not head]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, protected + (config.skip or []))
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer left to quantise (skip = {config.skip})")
    yield from found


def quantize_model(
    model: nn.Module, config: LinearQuantConfig, progress: Callable[[int, int, str], None] | None = None
) -> nn.Module:
    """Quantise the linear layers of a model in place, freeze everything, and return the model.

    Save it with `save_pretrained`, load it with `from_pretrained`, train adapters on it with PEFT. progress: called as
    progress(done, total, layer name). Raises what `linear_layers` and the layer's `fill` raise; ValueError if the model is
    quantised already.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model is quantised already: quantising twice only adds error. Load the original weights")
    layers = list(linear_layers(model, config))
    for done, (name, linear) in enumerate(layers):
        layer = config.layer.empty(linear, config)
        layer.fill(linear.weight.data, f"{name}.weight")
        layer.train(linear.training)
        model.set_submodule(name, layer)
        if progress is not None:
            progress(done + 1, len(layers), name)
    model.requires_grad_(False)
    if hasattr(model, "config"):
        _mark(model, config)
    return model


def _mark(model: nn.Module, config: LinearQuantConfig) -> None:
    """Leave a model as `from_pretrained` of a quantised folder does."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    quantizer = AUTO_QUANTIZER_MAPPING[config.method](config, pre_quantized=True)
    model.is_quantized, model.quantization_method, model.hf_quantizer = True, config.method, quantizer
    quantizer.postprocess_model(model)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantised layer back into an ordinary one, in place; what was rounded away stays lost."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            weight = layer.dequantize(dtype)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.data.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, plain)
    return model


COMPLETE = True  # every name above can be imported now
register()
