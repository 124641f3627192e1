"""ComPEFT: task vectors shrunk to sparse signs and one scalar (Yadav et al., TMLR, arXiv 2311.13171).

Of the flattened update tau the k largest magnitudes keep their sign, everything else becomes zero, and every sign stands
for the one value alpha * sigma, sigma being the standard deviation of the whole dense update. alpha is chosen on a few
held-out examples; nothing is trained. The signs are stored Golomb-coded (0.34 bits per parameter at k = 5%) or as two bit
masks (2 bits), on which dot products, distances and sign agreement are counted without decompressing.

Departures: exactly floor(k * d) entries are kept, ties by position (the paper's code keeps one more, and all ties); the
STC baseline (`alpha="least_squares"`) takes the mean magnitude, where that code takes the signed mean, which is near zero;
the files are really encoded, where that code only simulates their size; and the recipe's step first gives the two factors of
a LoRA one magnitude (`TaskDelta.balanced`), since after short training a global choice would take nothing from the smaller.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from grainwise.merge import bit_masks, golomb
from grainwise.merge.bit_masks import Masks
from grainwise.merge.delta_sum import DeltaSum
from grainwise.merge.selection import Selection, select
from grainwise.merge.task_delta import Delta, TaskDelta, Tensors, as_delta
from grainwise.merge.tensor_store import (
    UNKNOWN_LENGTH,
    Entry,
    TensorInfo,
    differences,
    open_store,
    read_metadata,
    write_safetensors,
)
from grainwise.merge.tern_file import CodedMasks, PlainMasks, pack_layout, unpack_layout
from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel

    from grainwise.recipe_state import RecipeState

FORMAT = "grainwise.tern 1"
CODINGS = ("golomb", "masks")
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
KEPT_PREFIX = "kept."
Coding = Literal["golomb", "masks"]


@dataclass(frozen=True)
class Scale:
    """What one sign stands for: alpha * sigma. density: the share k that was asked for; nonzeros: the signs there are."""

    alpha: float
    sigma: float
    density: float
    nonzeros: int

    @property
    def value(self) -> float:
        """alpha * sigma."""
        return self.alpha * self.sigma


class TernaryDelta(Delta):
    """An update with entries in {-alpha sigma, 0, alpha sigma}; two bits per entry in memory, or less when read from a file.

    Made by `compress`, `tune` or `load`. Deltas of the same layout can be compared and added without decompressing.
    """

    def __init__(
        self,
        layout: Mapping[str, TensorInfo],
        masks: Mapping[str, Masks],
        scale: Scale,
        *,
        reference: str,
        base: str | None = None,
        kept: Mapping[str, Tensor] | None = None,
        adapter_config: dict[str, Any] | None = None,
        coding: Coding = "golomb",
    ) -> None:
        """masks: name -> (positive, negative) words. coding: of the file it came from, or that its size is counted in."""
        self.layout, self.masks, self.scale = dict(layout), masks, scale
        self.reference, self.base, self.kept, self.adapter_config = reference, base, kept or {}, adapter_config
        self.coding = coding

    @classmethod
    def compress(
        cls,
        source: Tensors | PeftModel | Delta,
        *,
        reference: str | Tensors | None = None,
        density: float = 0.1,
        alpha: float | Literal["least_squares"] = 1.0,
        keep: Sequence[str] = (),
        base: Tensors | None = None,
    ) -> TernaryDelta:
        """Compress an adapter, a checkpoint, a state dict or any other delta; source, reference, keep, base: `TaskDelta.of`.

        density: k, the share of entries that keep their sign, in (0, 1]. alpha: the scale in units of sigma, or
        "least_squares" for the one nearest to the update, mean(|kept|) / sigma (STC's choice). An update without a single
        non-zero gives an empty delta and a warning.
        """
        lazy = cls._selected(as_delta(source, reference, keep, base), density, alpha)
        lazy.masks = dict(lazy.masks)
        return lazy

    @classmethod
    def _selected(cls, delta: Delta, density: float, alpha: float | Literal["least_squares"]) -> TernaryDelta:
        """The compressed form of a delta, its masks still to be computed, one tensor at a time when they are asked for."""
        selection = select(delta, density)
        if not selection.nonzeros:
            warnings.warn("the update has no entry to keep: the compressed delta is empty", stacklevel=3)
        scale = Scale(check_alpha(alpha, selection), selection.sigma, density, selection.nonzeros)
        return cls(
            delta.layout,
            SelectedMasks(delta, selection),
            scale,
            reference=delta.reference,
            base=delta.base,
            kept=delta.kept,
            adapter_config=delta.adapter_config,
        )

    def with_alpha(self, alpha: float) -> TernaryDelta:
        """The same signs at another scale; the masks are shared."""
        scale = replace(self.scale, alpha=check_alpha(alpha, None))
        return TernaryDelta(self.layout, self.masks, scale, **self._belongings())

    def _belongings(self) -> dict[str, Any]:
        names = ("reference", "base", "kept", "adapter_config", "coding")
        return {name: getattr(self, name) for name in names}

    def read(self, key: str) -> Tensor:
        """The update of one tensor, float32, in the tensor's shape."""
        return self.decode(key, torch.float32)

    def decode(self, key: str, dtype: torch.dtype) -> Tensor:
        """The update of one tensor in a 16- or 32-bit floating-point type."""
        info = self.layout[key]
        return bit_masks.decode(*self.masks[key], info.numel, self.scale.value, dtype).view(info.shape)

    # Arithmetic on the masks

    def counts(self, other: TernaryDelta) -> tuple[int, int]:
        """(entries where both have the same sign, entries where they have opposite signs)."""
        apart = differences(self.layout, other.layout)
        if apart or any(self.layout[k].shape != other.layout[k].shape for k in self.layout):
            raise ValueError(f"deltas of different models cannot be compared: {apart or 'their shapes differ'}")
        pairs = [bit_masks.agreements(self.masks[key], other.masks[key]) for key in self.layout]
        return sum(same for same, _ in pairs), sum(opposite for _, opposite in pairs)

    def dot(self, other: TernaryDelta | DeltaSum) -> float:
        """The inner product of two updates."""
        if isinstance(other, DeltaSum):
            return other.dot(self)
        same, opposite = self.counts(other)
        return self.scale.value * other.scale.value * (same - opposite)

    def norm(self) -> float:
        """The Euclidean norm."""
        return abs(self.scale.value) * math.sqrt(self.scale.nonzeros)

    def distance(self, other: TernaryDelta) -> float:
        """The Euclidean distance of two updates."""
        same, opposite = self.counts(other)
        shared = same + opposite
        a, b = self.scale.value, other.scale.value
        alone = (self.scale.nonzeros - shared) * a**2 + (other.scale.nonzeros - shared) * b**2
        return math.sqrt(same * (a - b) ** 2 + opposite * (a + b) ** 2 + alone)

    def sign_agreement(self, other: TernaryDelta) -> float:
        """Among the entries that are non-zero in both, the share with equal signs; NaN if there are none."""
        same, opposite = self.counts(other)
        return same / (same + opposite) if same + opposite else math.nan

    def __add__(self, other: TernaryDelta | DeltaSum) -> DeltaSum:
        return DeltaSum([(1.0, self)]) + other

    def __sub__(self, other: TernaryDelta | DeltaSum) -> DeltaSum:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> DeltaSum:
        return DeltaSum([(float(factor), self)])

    __rmul__ = __mul__

    # Size and files

    def size(self, coding: Coding | None = None) -> int:
        """Bytes of the file, everything counted, in its own or another coding."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "size.tern"
            self.save(path, coding or self.coding)
            return path.stat().st_size

    @property
    def bits_per_param(self) -> float:
        """Bits of the file for each entry of the update."""
        return 8 * self.size() / self.numel

    def ratio(self, bits: int = 16) -> float:
        """How many times smaller the file is than the fine-tuned tensors at `bits` bits an entry."""
        return (self.numel * bits / 8 + self.kept_bytes) / self.size()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors carried beside the update."""
        return sum(t.numel() * t.element_size() for t in self.kept.values())

    def save(self, path: str | os.PathLike[str], coding: Coding = "golomb") -> None:
        """Write a `.tern` file: a safetensors container with the coded signs, the scalar, the layout and what is kept.

        coding: "golomb" (smallest) or "masks" (2 bits an entry, used without decoding). Tensors are coded one at a time.
        """
        if coding not in CODINGS:
            raise ValueError(f"unknown coding {coding!r}. {did_you_mean(coding, CODINGS)}")
        length = UNKNOWN_LENGTH
        if coding == "masks":
            length = sum(16 * bit_masks.words_for(info.numel) for info in self.layout.values())
        layout = np.frombuffer(pack_layout(self.layout, self.adapter_config), dtype=np.uint8).copy()
        entries = [
            Entry("signs", TensorInfo((length,), torch.uint8), lambda: self._coded(coding)),
            Entry.of("scale", torch.tensor([self.scale.value], dtype=torch.float32)),
            Entry.of("layout", torch.from_numpy(layout)),
            *(Entry.of(KEPT_PREFIX + key, tensor) for key, tensor in self.kept.items()),
        ]
        s = self.scale
        metadata = {
            "format": FORMAT, "coding": coding, "density": repr(s.density), "alpha": repr(s.alpha), "sigma": repr(s.sigma),
            "nonzeros": str(s.nonzeros), "reference": self.reference, **({"base": self.base} if self.base else {}),
        }  # fmt: skip
        write_safetensors(path, entries, metadata)

    def _coded(self, coding: Coding) -> Iterator[bytes]:
        if coding == "masks":
            for key in self.layout:
                for words in self.masks[key]:
                    yield words.astype("<u8", copy=False).tobytes()
            return
        writer = golomb.GolombWriter(self.scale.nonzeros / max(1, self.numel))
        for key, info in self.layout.items():
            yield writer.write(*self.masks[key], info.numel)
        yield writer.finish()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TernaryDelta:
        """Open a `.tern` file. The signs stay in the file's own form and are decoded tensor by tensor when they are used.

        Raises ValueError for a file of another kind, and for a damaged one.
        """
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no .tern file of this version (format {metadata.get('format')!r}, not {FORMAT!r})")
        store = open_store(path)
        try:
            layout, config = unpack_layout(store.read("layout").numpy().tobytes())
            alpha, sigma, density = (float(metadata[name]) for name in ("alpha", "sigma", "density"))
            scale = Scale(alpha, sigma, density, int(metadata["nonzeros"]))
            coding, reference = metadata["coding"], metadata["reference"]
            signs = store.read("signs").numpy()
        except (KeyError, ValueError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        kept = {k.removeprefix(KEPT_PREFIX): k for k in store.infos if k.startswith(KEPT_PREFIX)}
        return cls(
            layout,
            PlainMasks(signs, layout) if coding == "masks" else CodedMasks(signs, layout, scale.nonzeros),
            scale,
            reference=reference,
            base=metadata.get("base"),
            kept={name: store.read(key) for name, key in kept.items()},
            adapter_config=config,
            coding=coding,  # type: ignore[arg-type]
        )


class SelectedMasks(Mapping[str, Masks]):
    """The masks of a selection, computed from the dense update when they are asked for."""

    def __init__(self, delta: Delta, selection: Selection) -> None:
        self._delta, self._selection = delta, selection

    def __getitem__(self, key: str) -> Masks:
        return self._selection.masks(key, self._delta.read(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta.layout)

    def __len__(self) -> int:
        return len(self._delta.layout)


def check_alpha(alpha: float | str, selection: Selection | None) -> float:
    """A usable scale in units of sigma; "least_squares" is computed from the selection. Raises ValueError for others."""
    if selection is not None and selection.nonzeros and not selection.sigma:
        raise ValueError("all entries of the update are equal: their standard deviation is zero and cannot be its scale")
    if alpha == "least_squares" and selection is not None:
        return selection.mean / selection.sigma if selection.nonzeros else 1.0
    if isinstance(alpha, str) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a positive number or 'least_squares', got {alpha!r}")
    return float(alpha)


def compress_to_file(
    source: Tensors | PeftModel | Delta,
    path: str | os.PathLike[str],
    *,
    reference: str | Tensors | None = None,
    density: float = 0.1,
    alpha: float | Literal["least_squares"] = 1.0,
    keep: Sequence[str] = (),
    base: Tensors | None = None,
    coding: Coding = "golomb",
) -> TernaryDelta:
    """`TernaryDelta.compress` straight into a file, for models that do not fit into memory; the file is opened and returned.

    One tensor is in memory at a time: the source is read three times, twice to find the threshold and once to code.
    """
    TernaryDelta._selected(as_delta(source, reference, keep, base), density, alpha).save(path, coding)
    return TernaryDelta.load(path)


@dataclass(frozen=True)
class Trial:
    """One point of the grid: the compressed delta and its score."""

    delta: TernaryDelta
    score: float


def sweep(
    source: Tensors | PeftModel | Delta,
    *,
    evaluate: Callable[[TernaryDelta], float],
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
    reference: str | Tensors | None = None,
    keep: Sequence[str] = (),
) -> list[Trial]:
    """Every density with every alpha, scored by `evaluate`; compression happens once per density."""
    delta = as_delta(source, reference, keep)
    trials = []
    for density in densities:
        signs = TernaryDelta.compress(delta, density=density)
        trials += [Trial(d, float(evaluate(d))) for d in map(signs.with_alpha, alphas)]
    return trials


def tune(
    source: Tensors | PeftModel | Delta,
    *,
    evaluate: Callable[[TernaryDelta], float],
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
    reference: str | Tensors | None = None,
    keep: Sequence[str] = (),
    higher_is_better: bool = False,
) -> TernaryDelta:
    """The best point of the grid of density and alpha by `evaluate`, which scores a delta on held-out data.

    evaluate: a loss by default; a score with `higher_is_better=True`. The first of equals wins. Raises ValueError if no
    point has a finite score.
    """
    trials = sweep(source, evaluate=evaluate, densities=densities, alphas=alphas, reference=reference, keep=keep)
    usable = [t for t in trials if math.isfinite(t.score)]
    if not usable:
        raise ValueError(f"evaluate gave no finite score in {len(trials)} trials: check the model and the held-out data")
    sign = -1.0 if higher_is_better else 1.0
    return min(usable, key=lambda t: sign * t.score).delta


def adapter_loss(model: PeftModel, blocks: Tensor, init: Tensors | None = None) -> Callable[[TernaryDelta], float]:
    """An `evaluate` for `tune`: the mean next-token loss of `model` over token blocks (count, length) with the delta loaded.

    init: the adapter as it was initialised, for updates relative to it. The model is left with the delta tried last.
    """
    from grainwise.evaluate.language import mean_loss

    def evaluate(delta: TernaryDelta) -> float:
        delta.load_into(model, init, force=True)  # the model is the one the delta was made from; hashing it each time is waste
        return mean_loss(model, blocks)

    return evaluate


TUNING_BLOCKS = 24  # of the training text, each of `TUNING_LENGTH` tokens, to choose alpha (and density) on
TUNING_LENGTH = 256
FACTORED = ("LORA", "ADALORA")  # adapters whose update depends on their factors' product alone


def start_of(model: PeftModel) -> tuple[str, Tensors]:
    """What an adapter's update is relative to: its start values where its method can compute them again, else zero or ones."""
    from grainwise.adapt.tuner import AdapterLayer, start_state
    from grainwise.merge.peft_adapters import config_of

    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        return "init", start_state(model)
    kind = str(config_of(model)["peft_type"]).rsplit(".", 1)[-1]
    return ("ones", "ones") if kind == "IA3" else ("zero", "zero")


def recipe_step(
    state: RecipeState, *, density: float = 0.1, alpha: float = 0.0, coding: Coding = "golomb"
) -> dict[str, float | int | str]:
    """Shrink the recipe's adapter to `expert.tern` and put what the file holds in its place.

    density: share of signs kept; 0: chosen too. alpha: scale; 0: chosen. Both are chosen by the loss on blocks of the
    training text. The update is taken relative to `start_of` the adapter. Raises ValueError if the model carries none.
    """

    if not hasattr(state.model, "peft_config"):
        raise ValueError("compeft shrinks an adapter, and the model has none: put an adapt step before it")
    model: PeftModel = state.model  # type: ignore[assignment]
    name, start = start_of(model)
    update = TaskDelta.of(model, start)
    init = None if isinstance(start, str) else start
    blocks = state.train_blocks(TUNING_LENGTH)
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(state.seed))[:TUNING_BLOCKS]
    densities = (density,) if density else DENSITIES
    alphas = (alpha,) if alpha else ALPHAS
    loss = adapter_loss(model, blocks[chosen], init)
    done, total = 0, len(densities) * len(alphas)

    def evaluate(delta: TernaryDelta) -> float:
        nonlocal done
        done += 1
        value = loss(delta) if total > 1 else 0.0
        state.progress(done, total, f"density {delta.scale.density:g}, alpha {delta.scale.alpha:g}, loss {value:.3f}")
        return value

    path = state.folder / "expert.tern"
    tune(update, evaluate=evaluate, densities=densities, alphas=alphas).save(path, coding)
    packed = TernaryDelta.load(path)
    packed.load_into(model, init)
    before, after = 2 * packed.numel + packed.kept_bytes, path.stat().st_size
    return {
        "bytes_16_bit": before,
        "bytes": after,
        "ratio": round(before / after, 2),
        "alpha": packed.scale.alpha,
        "density": packed.scale.density,
        "reference": name,
    }
