"""Task vectors: what fine-tuning changed, as named tensors that are read one at a time.

The flattened task vector tau = theta_fine_tuned - theta_reference runs over the tensors in sorted order of their names.
`TaskDelta` never holds it: a tensor of the difference exists while it is being read, and what needs the whole vector goes
over its tensors several times (`selection`), so memory is bounded by the largest tensor. The reference is "zero" (the
tensors are themselves the update: LoRA factors, ready-made deltas), "ones" (IA3's scales) or "given" (base weights, or the
adapter as it was initialised).
"""

from __future__ import annotations

import fnmatch
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from grainwise.merge import bit_masks, peft_adapters
from grainwise.merge.selection import select
from grainwise.merge.tensor_store import (
    Entry,
    TensorInfo,
    Tensors,
    TensorStore,
    differences,
    fingerprint,
    open_store,
    raw_bytes,
    read_metadata,
    write_safetensors,
)

if TYPE_CHECKING:
    from peft import PeftModel

QUANTIZED_PARTS = (".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", "weight_format")


class Delta(ABC):
    """An update of named tensors, read one at a time. The forms of a delta differ in how `read` gets its values.

    layout: name -> shape and type of the fine-tuned tensors, in sorted order. kept: tensors that belong to the fine-tuned
    model but not to the update (heads, buffers), carried as they are. base: fingerprint of the weights the update belongs to.
    """

    layout: dict[str, TensorInfo]
    kept: Mapping[str, Tensor]
    reference: str
    base: str | None
    adapter_config: dict[str, Any] | None

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The update of one tensor, float32, in the tensor's shape."""

    @property
    def numel(self) -> int:
        """d, the length of the flattened update."""
        return sum(info.numel for info in self.layout.values())

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 update) in sorted order, one in memory at a time."""
        return ((key, self.read(key)) for key in self.layout)

    def to_dense(self) -> dict[str, Tensor]:
        """The whole update in memory, float32."""
        return dict(self.items())

    def own_reference(self) -> TensorStore | None:
        """The reference tensors, where the delta still has them."""
        return None

    def apply(self, base: Tensors | None = None, *, force: bool = False) -> dict[str, Tensor]:
        """The fine-tuned state dict: base + update where there is an update, the base's own tensors elsewhere.

        base: may be left out for the references "zero" and "ones", and where the delta still has its reference. Types are
        the base's, else the fine-tuned tensors'. Raises ValueError if the base lacks tensors, has others' shapes, or is not
        the one that the update was made for (`force=True` lets it pass).
        """
        store = self._checked_base(base, force)
        found = {key: self._applied(key, store) for key in self.layout} | dict(self.kept)
        if store is not None:
            found |= {k: store.read(k) for k in store.infos if k not in found}
            found |= {alias: found[name] for alias, name in store.aliases.items()}
        return found

    def apply_to_file(self, path: str | os.PathLike[str], base: Tensors | None = None, *, force: bool = False) -> None:
        """Like `apply`, written to a safetensors file tensor by tensor."""
        store = self._checked_base(base, force)

        def entry(key: str) -> Entry:
            info = self.layout[key] if store is None else store.infos[key]
            return Entry(key, info, lambda: [raw_bytes(self._applied(key, store))])

        entries = {key: entry(key) for key in self.layout}
        entries |= {key: Entry.of(key, tensor) for key, tensor in self.kept.items()}
        if store is not None:
            entries |= {k: Entry(k, i, _reader(store, k)) for k, i in store.infos.items() if k not in entries}
        write_safetensors(path, entries.values(), {"format": "pt"})

    def _applied(self, key: str, store: TensorStore | None) -> Tensor:
        update = self.read(key)
        if store is not None:
            start = store.read(key)
            return update.add_(start.to("cpu", torch.float32)).to(start.dtype)
        return (update + 1.0 if self.reference == "ones" else update).to(self.layout[key].dtype)

    def _checked_base(self, base: Tensors | None, force: bool) -> TensorStore | None:
        if base is None:
            own = self.own_reference()
            if own is None and self.reference == "given":
                raise ValueError("this update is relative to given weights: pass them as `base`")
            return own
        store = open_store(base, "the base")
        _same_form(self.layout, store, "the update", subset=True)
        if self.base is not None and not force and fingerprint(store) != self.base:
            raise ValueError(
                f"{store.name} is not the base that this update was made for (fingerprint {fingerprint(store)[:12]}, "
                f"expected {self.base[:12]}): give the right base, or pass force=True to apply it all the same"
            )
        return store

    def to_peft(self, folder: str | os.PathLike[str], init: Tensors | None = None) -> Path:
        """Write a standard PEFT adapter folder that `PeftModel.from_pretrained` loads in place of the original.

        init: the adapter as it was initialised, for an update relative to it. Raises ValueError without an adapter's
        configuration, that is for a delta that was not made from a PEFT adapter.
        """
        if self.adapter_config is None:
            raise ValueError("this update was not made from a PEFT adapter, so it has no adapter configuration: use apply()")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.apply_to_file(target / "adapter_model.safetensors", init)
        peft_adapters.write_config(self.adapter_config, target)
        return target

    def load_into(self, model: PeftModel, init: Tensors | None = None, *, force: bool = False) -> None:
        """Put the adapter into a `PeftModel` that has one of the same form, in place of its active adapter's weights."""
        if self.reference != "given" and self.base is not None and not force:
            found = peft_adapters.base_fingerprint(model)
            if found != self.base:
                raise ValueError(
                    f"the model under this adapter is not the one the update was made for (fingerprint {found[:12]}, "
                    f"expected {self.base[:12]}): load the right base, or pass force=True"
                )
        peft_adapters.load_adapter(model, self.apply(init))


def _reader(store: TensorStore, key: str) -> Callable[[], list[memoryview]]:
    return lambda: [raw_bytes(store.read(key))]


class TaskDelta(Delta):
    """The dense update, read lazily from wherever the fine-tuned tensors and their reference are.

    `TaskDelta.of` opens adapters and state dicts, `TaskDelta.between` pairs of checkpoints, `TaskDelta.load` saved deltas.
    """

    def __init__(
        self,
        layout: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
        *,
        reference: str = "zero",
        kept: Mapping[str, Tensor] | None = None,
        base: str | Callable[[], str] | None = None,
        adapter_config: dict[str, Any] | None = None,
        reference_store: TensorStore | None = None,
    ) -> None:
        """read: name -> float32 update. base: the fingerprint, or a function that computes it when it is needed."""
        self.layout = {key: layout[key] for key in sorted(layout)}
        self.reference, self.kept, self.adapter_config = reference, kept or {}, adapter_config
        self._read, self._base, self._reference_store = read, base, reference_store

    @cached_property
    def base(self) -> str | None:  # type: ignore[override]
        """Fingerprint of the weights that the update belongs to; None if unknown."""
        return self._base() if callable(self._base) else self._base

    def read(self, key: str) -> Tensor:
        """The update of one tensor, float32, in the tensor's shape."""
        return self._read(key)

    def own_reference(self) -> TensorStore | None:
        """The reference tensors of a delta with the reference "given"."""
        return self._reference_store

    @classmethod
    def of(
        cls,
        source: Tensors | PeftModel,
        reference: str | Tensors | None = None,
        keep: Sequence[str] = (),
        base: Tensors | None = None,
    ) -> TaskDelta:
        """The update in an adapter (a `PeftModel`, its folder), a state dict or a checkpoint.

        reference: "zero", "ones", or the tensors to subtract. By default that of the adapter's kind: zero for LoRA and its
        kin, ones for IA3. keep: name patterns (`*.classifier.*`) to carry as they are, outside the update.
        base: the model the adapter sits on, to be recognised by its fingerprint; a `PeftModel` brings its own.
        Raises ValueError for an adapter of a kind whose reference is not known.
        """
        opened = peft_adapters.open_adapter(source) if not isinstance(source, Mapping) else None
        store = opened.store if opened else open_store(source)
        config = opened.config if opened else None
        if reference is None:
            reference = peft_adapters.default_reference(config, store.infos)
        kept = [*keep, *peft_adapters.KEPT, *(peft_adapters.saved_modules(config) if config else ())]
        if not isinstance(reference, str) or reference not in ("zero", "ones"):
            return cls.between(store, reference, keep=kept, adapter_config=config)
        _refuse_quantized(store, adapter=config is not None)
        parts = _parts(store, kept)
        shift = 1.0 if reference == "ones" else 0.0
        known = opened.base if opened else None
        if base is not None:
            owner = open_store(base, "the base")
            known = lambda: fingerprint(owner)  # noqa: E731 - a thunk, so that the hash costs nothing until it is needed
        return cls(
            parts.layout,
            lambda key: _float(store.read(key)).sub_(shift),
            reference=reference,
            kept=parts.kept,
            base=known,
            adapter_config=config,
        )

    @classmethod
    def between(
        cls,
        fine_tuned: Tensors,
        reference: Tensors,
        *,
        keep: Sequence[str] = (),
        adapter_config: dict[str, Any] | None = None,
    ) -> TaskDelta:
        """fine_tuned - reference, for two state dicts, files or folders with the same names and shapes.

        keep: name patterns of tensors that only the fine-tuned side needs to have (new heads). Raises ValueError that lists
        names or shapes that differ, and for quantised weights, which cannot be subtracted.
        """
        ours, theirs = open_store(fine_tuned, "the fine-tuned state dict"), open_store(reference, "the reference")
        for store in (ours, theirs):
            _refuse_quantized(store, adapter=False)
        parts = _parts(ours, keep)
        _same_form(parts.layout, theirs, ours.name, ignored=[*parts.kept, *parts.not_float])
        return cls(
            parts.layout,
            lambda key: _float(ours.read(key)).sub_(theirs.read(key).to("cpu")),
            reference="given",
            kept=parts.kept,
            base=lambda: fingerprint(theirs),
            adapter_config=adapter_config,
            reference_store=theirs,
        )

    def sparsify(self, density: float) -> TaskDelta:
        """The floor(density * d) entries largest in magnitude over the whole update, with their values; zero elsewhere."""
        selection = select(self, density)

        def read(key: str) -> Tensor:
            update = self.read(key)
            positive, negative = selection.masks(key, update)
            chosen = bit_masks.decode(positive | negative, np.zeros_like(negative), update.numel(), 1.0)
            return update.mul_(chosen.view(update.shape))

        return self._with(read)

    def scaled(self, factor: float) -> TaskDelta:
        """factor * update."""
        return self._with(lambda key: self.read(key).mul_(factor))

    def balanced(self) -> TaskDelta:
        """The update with each pair of LoRA factors rescaled to one root mean square, A c and B / c: their product is the same.

        A starts random and B at zero, so B is the smaller one after short training, and a choice by magnitude over both
        would take little or nothing of it. Raises ValueError for an update that is not relative to zero.
        """
        if self.reference != "zero":
            raise ValueError(f"only factors themselves can be rescaled; this update is relative to {self.reference!r}")
        factors: dict[str, float] = {}
        for key in self.layout:
            partner = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if partner != key and partner in self.layout:
                sizes = [float(self.read(k).square().mean().sqrt()) for k in (key, partner)]
                if all(sizes):
                    factors[key], factors[partner] = math.sqrt(sizes[1] / sizes[0]), math.sqrt(sizes[0] / sizes[1])
        return self._with(lambda key: self.read(key).mul_(factors.get(key, 1.0)))

    def _with(self, read: Callable[[str], Tensor]) -> Self:
        return type(self)(
            self.layout,
            read,
            reference=self.reference,
            kept=self.kept,
            base=self._base,
            adapter_config=self.adapter_config,
            reference_store=self._reference_store,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the update (float32) and what is kept beside it to one safetensors file, tensor by tensor."""
        metadata = peft_adapters.to_metadata(self.adapter_config) | {"format": "pt", "reference": self.reference}
        if self.base is not None:
            metadata["base"] = self.base
        metadata["kept"] = "\n".join(self.kept)
        entries = [
            Entry(key, TensorInfo(info.shape, torch.float32), lambda key=key: [raw_bytes(self.read(key))])  # type: ignore[misc]
            for key, info in self.layout.items()
        ]
        write_safetensors(path, entries + [Entry.of(k, t) for k, t in self.kept.items()], metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskDelta:
        """A delta written by `save`, read from its file as it is needed. Raises ValueError for another kind of file."""
        metadata = read_metadata(path)
        if "reference" not in metadata or "kept" not in metadata:
            raise ValueError(f"{path} was not written by TaskDelta.save: open checkpoints and adapters with TaskDelta.of")
        store = open_store(path)
        kept = metadata["kept"].split("\n") if metadata["kept"] else []
        return cls(
            {k: i for k, i in store.infos.items() if k not in kept},
            lambda key: _float(store.read(key)),
            reference=metadata["reference"],
            kept=LazyTensors(store, kept),
            base=metadata.get("base"),
            adapter_config=peft_adapters.from_metadata(metadata),
        )


class LazyTensors(Mapping[str, Tensor]):
    """Some tensors of a store as a read-only dict that reads when asked."""

    def __init__(self, store: TensorStore, keys: Iterable[str]) -> None:
        self._store, self._keys = store, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._store.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class Parts:
    """A store divided: tensors of the update, and tensors kept as they are (by pattern, or because they are not floats)."""

    layout: dict[str, TensorInfo]
    kept: LazyTensors
    not_float: list[str]


def _parts(store: TensorStore, keep: Sequence[str]) -> Parts:
    not_float = [k for k, info in store.infos.items() if not info.dtype.is_floating_point]
    by_name = [k for k in store.infos if any(fnmatch.fnmatchcase(k, pattern) for pattern in keep)]
    apart = {*not_float, *by_name}
    layout = {k: info for k, info in store.infos.items() if k not in apart}
    if not layout:
        raise ValueError(f"{store.name} has no floating-point tensor to take an update from")
    return Parts(layout, LazyTensors(store, sorted(apart)), not_float)


def _same_form(
    layout: Mapping[str, TensorInfo], store: TensorStore, name: str, *, ignored: Iterable[str] = (), subset: bool = False
) -> None:
    """Raise ValueError unless the store has the layout's tensors (and, without `subset`, no others)."""
    ignored = set(ignored)
    theirs = set(store.infos) - ignored
    apart = differences(layout, theirs & set(layout) if subset else theirs)
    if apart:
        raise ValueError(
            f"{name} (first) and {store.name} (second) do not have the same tensors: {apart}. "
            "Give the matching reference; tensors that only the fine-tuned model has go into `keep`"
        )
    wrong = [f"{k} {i.shape} against {store.infos[k].shape}" for k, i in layout.items() if store.infos[k].shape != i.shape]
    if wrong:
        raise ValueError(f"{name} and {store.name} differ in shape: {'; '.join(wrong[:5])}")


def _refuse_quantized(store: TensorStore, *, adapter: bool) -> None:
    marks = [k for k in store.infos if k.endswith(QUANTIZED_PARTS) or ".quant_state" in k]
    if not adapter:
        small = (torch.uint8, torch.int8)
        marks += [k for k, i in store.infos.items() if k.endswith(".weight") and i.dtype in small]
    if marks:
        raise ValueError(
            f"{store.name} holds quantised weights ({', '.join(marks[:3])}): a difference of packed codes means nothing. "
            "Load the checkpoint dequantised, or compress the adapter alone"
        )


def _float(tensor: Tensor) -> Tensor:
    """A fresh contiguous float32 copy on the CPU, which the caller may change."""
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())


def as_delta(
    source: Tensors | PeftModel | Delta,
    reference: str | Tensors | None = None,
    keep: Sequence[str] = (),
    base: Tensors | None = None,
) -> Delta:
    """`TaskDelta.of`, with deltas of any kind given back as they are. Raises ValueError for a delta and a reference."""
    if not isinstance(source, Delta):
        return TaskDelta.of(source, reference, keep, base)
    if reference is not None:
        raise ValueError(f"a {type(source).__name__} has its reference already: leave `reference` out")
    return source
