"""PEFT adapters as named tensors: opening them, what their update is relative to, and writing them back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grainwise.merge.tensor_store import ADAPTER_FILE, DictStore, FileStore, TensorStore, differences, fingerprint

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
REFERENCES = {"LORA": "zero", "ADALORA": "zero", "LOHA": "zero", "LOKR": "zero", "IA3": "ones"}
KEPT = ("*lora_magnitude_vector*",)  # DoRA's norms start far from zero: they are no update


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: its tensors, its configuration (None for a plain checkpoint), and the fingerprint of its base."""

    store: TensorStore
    config: dict[str, Any] | None
    base: Callable[[], str] | None


def open_adapter(source: Any) -> Adapter:
    """Open a `PeftModel`, an adapter folder, or any other safetensors file or folder. Raises TypeError for other things."""
    if isinstance(source, (str, os.PathLike)):
        config = Path(source) / CONFIG_FILE
        is_adapter = config.is_file() and (Path(source) / ADAPTER_FILE).is_file()
        return Adapter(FileStore(source), json.loads(config.read_text()) if is_adapter else None, None)
    if hasattr(source, "peft_config"):
        return Adapter(DictStore(adapter_tensors(source), "the adapter"), config_of(source), lambda: base_fingerprint(source))
    raise TypeError(f"expected a state dict, a path or a PeftModel, got {type(source).__name__}")


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the active adapter's tensors, named as in its file."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


def config_of(model: PeftModel) -> dict[str, Any]:
    """The active adapter's configuration as plain JSON values."""
    config = model.peft_config[model.active_adapter].to_dict()
    return json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def load_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Replace the active adapter's weights. Raises ValueError that lists names if they are not the adapter's."""
    from peft import set_peft_model_state_dict

    apart = differences(tensors, adapter_tensors(model))
    if apart:
        raise ValueError(f"the update (first) and the model's adapter (second) have different tensors: {apart}")
    set_peft_model_state_dict(model, dict(tensors), adapter_name=model.active_adapter)


def default_reference(config: Mapping[str, Any] | None, keys: Iterable[str]) -> str:
    """ "zero" or "ones", by the adapter's kind or the names of its tensors. Raises ValueError for an unknown kind."""
    kind = str(config["peft_type"]).rsplit(".", 1)[-1] if config else None
    if kind is None:
        names = list(keys)
        if names and all("lora_" in k for k in names):
            kind = "LORA"
        elif names and all("ia3_" in k for k in names):
            kind = "IA3"
    if kind not in REFERENCES:
        what = f"adapters of type {kind}" if kind else "these tensors"
        raise ValueError(
            f"it is not known what the update in {what} is relative to: pass reference='zero' (the tensors are the update), "
            "'ones' (scales that start at one), or the tensors before training"
        )
    return REFERENCES[kind]


def saved_modules(config: Mapping[str, Any]) -> Sequence[str]:
    """Name patterns of whole modules that the adapter carries (heads)."""
    return [f"*.{name}.*" for name in config.get("modules_to_save") or ()]


@torch.no_grad()
def base_fingerprint(model: PeftModel) -> str:
    """Fingerprint of the frozen weights under an adapter, the same as that of the bare model's state dict."""
    prefix = getattr(model.base_model, "prefix", None)
    frozen = {}
    for name, tensor in model.get_base_model().state_dict(keep_vars=True).items():
        if (prefix and prefix in name) or ".modules_to_save." in name:
            continue
        frozen[name.replace(".base_layer", "").replace(".original_module", "")] = tensor
    return fingerprint(DictStore(frozen, "the base model"))


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write `adapter_config.json`, marked for inference as PEFT does."""
    temporary = folder / (CONFIG_FILE + ".partial")
    temporary.write_text(json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / CONFIG_FILE)


def to_metadata(config: Mapping[str, Any] | None) -> dict[str, str]:
    """The configuration as safetensors metadata."""
    return {} if config is None else {"adapter_config": json.dumps(config)}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration in safetensors metadata, or None."""
    return json.loads(metadata["adapter_config"]) if "adapter_config" in metadata else None
