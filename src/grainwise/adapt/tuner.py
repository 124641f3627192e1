"""The frame of this package's PEFT methods: what every adapter on linear layers needs besides its own formula.

A member defines a config (fields), a layer (`init`, `delta`, `get_delta_weight`) and a tuner (its prefix and layer class),
and registers the three. `AdapterLayer` and `Tuner` bring names, seeds, placement, several adapters, merging and
restoring; injection, saving and loading are PEFT's own.
"""

from __future__ import annotations

import warnings
import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn


@dataclass
class AdapterConfig(PeftConfig):
    """What every member's config has: where the adapter goes, which modules train beside it, and its seed.

    target_modules: names (or their ends) of linear layers, a regular expression, or "all-linear"; by default the
    query and value projections where PEFT knows the architecture. seed: fixes the start values of each layer by its name,
    whatever else draws random numbers.
    """

    method: ClassVar[str]

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole and saved"})
    seed: int = field(default=0, metadata={"help": "seed of the start values"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer with named adapters that add to its output.

    A member sets `adapter_layer_names` (its parameters, beginning with its prefix) and defines `init`, `delta` and
    `get_delta_weight`; one that changes the base weight also sets `changes_base` and defines `restore_base`.
    """

    other_param_names: tuple[str, ...] = ("configs", "dropouts")
    changes_base: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.configs: dict[str, Any] = {}
        self.dropouts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    @abstractmethod
    def init(self, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Start values, float32 on the CPU, by the names in `adapter_layer_names`."""

    @abstractmethod
    def delta(self, x: Tensor, name: str) -> Tensor:
        """What adapter `name` adds to the output: x (..., in) -> (..., out)."""

    @abstractmethod
    def get_delta_weight(self, name: str) -> Tensor:
        """The same as a change of the weight, (out, in)."""

    @classmethod
    def check_target(cls, target: nn.Module, key: str, config: Any) -> None:
        """Raise ValueError or TypeError, naming the layer, if this method cannot adapt it. Nothing has been changed yet."""
        if isinstance(target, BaseTunerLayer) and not isinstance(target, cls):
            raise ValueError(
                f"{key} already carries a {type(target).__name__}: unload or merge that adapter before adding {config.method}"
            )
        base = target.get_base_layer() if isinstance(target, cls) else target
        if not isinstance(base, nn.Linear):
            hint = " (its weight is stored transposed)" if type(base).__name__ == "Conv1D" else ""
            raise TypeError(f"{config.method} adapts torch.nn.Linear layers; {key} is {type(base).__name__}{hint}")
        if not base.weight.is_floating_point():
            raise ValueError(f"{config.method} needs floating-point weights; those of {key} are {base.weight.dtype}")
        if base.weight.is_meta:
            raise ValueError(f"{key} is on the meta device: load the model's weights before adding an adapter")

    def add(self, name: str, config: Any, generator: torch.Generator) -> None:
        """Give the layer an adapter `name`."""
        device, dtype = self._place()
        for parameter, start in self.init(config, generator).items():
            getattr(self, parameter)[name] = nn.Parameter(start.to(device, dtype))
        rate = getattr(config, "dropout", 0.0)
        self.dropouts[name] = nn.Dropout(rate) if rate else nn.Identity()
        self.configs[name] = config

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Device and type of new parameters: those of a floating-point base weight, else float32."""
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.device, weight.dtype
        return next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu")), torch.float32

    def restore_base(self) -> None:
        """Undo what adding adapters changed in the base weight; by default there is nothing to undo."""

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The frozen part's output."""
        return self.base_layer(x, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out): the frozen part plus every active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_output(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.configs:
                y = y + self.delta(x, name).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters into the base weight. safe_merge: refuse, changing nothing, if the result is not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.configs:
                continue
            merged = self._shifted(name, 1.0)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"merging adapter {name!r} gives values that are not finite: the adapter is broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to take out", stacklevel=2)
        while self.merged_adapters:
            self.set_base_weight(self._shifted(self.merged_adapters.pop(), -1.0))

    def _shifted(self, name: str, sign: float) -> Tensor:
        """Base weight plus or minus one adapter, summed in float32 at least, in the weight's own type."""
        weight = self.get_base_weight()
        delta = self.get_delta_weight(name).detach()
        wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        return (weight.to(wide) + sign * delta.to(wide)).to(weight.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; with the last one gone the base weight is as it was."""
        super().delete_adapter(adapter_name)
        if not self.configs:
            self.restore_base()


class Tuner(BaseTuner):
    """PEFT's tuner for `AdapterLayer`s. A member sets `prefix` and `tuner_layer_cls`."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target before the first one is changed, so that an error leaves the model as it was."""
        config = _maybe_include_all_linear_layers(peft_config, model)
        owners: dict[int, list[str]] = {}
        for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(parameter_name)
        inside: tuple[str, ...] = ()
        for key, module in model.named_modules():
            if not key or key.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (key + ".",)
            if self._check_target_module_exists(config, key):
                self.tuner_layer_cls.check_target(module, key, config)
                shared = owners.get(id(getattr(module, "weight", None)), [])
                if self.tuner_layer_cls.changes_base and len(shared) > 1:
                    raise ValueError(
                        f"{config.method} changes the base weight, but that of {key} is shared by {', '.join(shared)}: "
                        "leave it out of target_modules or untie the weights"
                    )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, self.tuner_layer_cls) else self.tuner_layer_cls(target)
        layer.add(adapter_name, peft_config, start_generator(peft_config.seed, current_key))
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # the layer placed itself; PEFT's version wants a `weight`

    def layers(self) -> list[tuple[str, AdapterLayer]]:
        """(name in the base model, layer) of every adapted layer."""
        return adapter_layers(self.model, self.tuner_layer_cls)

    def unload(self, restore: bool = True) -> nn.Module:
        """The base model without adapters. restore: give back the weights from before the adapters came."""
        for _, layer in self.layers():
            if restore:
                if layer.merged:
                    layer.unmerge()
                layer.restore_base()
        return super().unload()


def adapter_layers(model: nn.Module, kind: type[AdapterLayer]) -> list[tuple[str, AdapterLayer]]:
    """(name, layer) of every adapted layer of a method; names as in the base model, without PEFT's wrappers.

    Raises ValueError if the model has none.
    """
    found = [(n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if isinstance(m, kind)]
    if not found:
        raise ValueError(f"the model has no {kind.__name__}: attach the adapter first (get_peft_model)")
    return found


def start_generator(seed: int, key: str) -> torch.Generator:
    """The generator of one layer's start values: by the seed and the layer's name, on the CPU."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))


def start_state(model: PeftModel, adapter_name: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors as they were before training, by their names in its file: what its update is relative to.

    adapter_name: default the first active one. They are computed again from the seed; nothing is stored. Modules that
    are trained whole (`modules_to_save`) are not among them.
    """
    adapter = adapter_name or model.active_adapters[0]
    found = {}
    for name, layer in adapter_layers(model, AdapterLayer):  # type: ignore[type-abstract]
        if adapter in layer.configs:
            config = layer.configs[adapter]
            for parameter, start in layer.init(config, start_generator(config.seed, name)).items():
                found[f"base_model.model.{name}.{parameter}"] = start.to(getattr(layer, parameter)[adapter].dtype)
    return found
