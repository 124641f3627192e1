"""What ComPEFT is compared with: other ways to shrink an update after training, each with a real file to count.

Every file holds the layout record of a `.tern` file beside its own values, and positions are Golomb-coded as there, so that
sizes differ only by what a method has to store. General-purpose compression (LZMA, at least as dense as zstd at its highest
level) is applied where it helps the baseline.
"""

from __future__ import annotations

import lzma
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grainwise.merge import bit_masks, golomb
from grainwise.merge.compeft import TernaryDelta
from grainwise.merge.selection import select
from grainwise.merge.task_delta import Delta, TaskDelta
from grainwise.merge.tensor_store import Entry, write_safetensors
from grainwise.merge.tern_file import pack_layout

CLIPS = np.linspace(0.1, 1.0, 19)  # shares of the largest magnitude tried as the range of a uniform quantiser


@dataclass(frozen=True)
class Shrunk:
    """An update after a baseline's compression, and the bytes of its file."""

    delta: Delta
    size: int


def original(delta: Delta, dtype: torch.dtype = torch.float16) -> Shrunk:
    """The update rounded to 16 bits, without compression."""
    return _shrunk(delta, lambda _, u: u.to(dtype).float(), [delta.read(k).to(dtype).flatten() for k in delta.layout])


def stc(delta: Delta, density: float) -> Shrunk:
    """Sparse ternary compression (arXiv 1903.02891): the global top-k at its mean magnitude; ComPEFT without a tuned alpha."""
    packed = TernaryDelta.compress(delta, density=density, alpha="least_squares")
    return Shrunk(packed, packed.size("golomb"))


def pruned(delta: Delta, density: float) -> Shrunk:
    """The global top-k with their own values in 16 bits: coded signs and positions, magnitudes in compressed byte planes."""
    selection = select(delta, density)
    writer = golomb.GolombWriter(selection.nonzeros / delta.numel)
    stream, magnitudes = b"", []
    for key, update in delta.items():
        masks = selection.masks(key, update)
        stream += writer.write(*masks, update.numel())
        chosen = bit_masks.decode(masks[0] | masks[1], np.zeros_like(masks[1]), update.numel(), 1.0).bool()
        magnitudes.append(update.flatten()[chosen].abs().half())
    planes = torch.cat(magnitudes).view(torch.uint8).view(-1, 2).T.contiguous()
    values = [lzma.compress(plane.numpy().tobytes()) for plane in planes]
    sparse = lambda key, update: _ternary(selection.masks(key, update), update, 1.0).mul_(update.abs().half())  # noqa: E731
    return _shrunk(delta, sparse, [stream + writer.finish(), *values])


def ternary_per_tensor(delta: Delta, density: float) -> Shrunk:
    """Top-k, signs and the least-squares scale within each tensor: what a local instead of a global choice gives."""
    chosen = {key: select(_Single(key, update), density) for key, update in delta.items()}
    scales = torch.tensor([c.mean for c in chosen.values()], dtype=torch.float16)
    levels = dict(zip(chosen, scales.tolist()))
    writer = golomb.GolombWriter(sum(c.nonzeros for c in chosen.values()) / delta.numel)
    coded = [writer.write(*chosen[key].masks(key, update), update.numel()) for key, update in delta.items()]
    local = lambda key, update: _ternary(chosen[key].masks(key, update), update, levels[key])  # noqa: E731
    return _shrunk(delta, local, [b"".join(coded) + writer.finish(), scales])


@dataclass(frozen=True)
class _Single:
    """One tensor as an update of its own."""

    key: str
    update: Tensor

    @property
    def numel(self) -> int:
        return self.update.numel()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return iter([(self.key, self.update)])


def one_bit(delta: Delta) -> Shrunk:
    """BitDelta without its distillation (arXiv 2402.10193): every entry's sign, times each tensor's mean magnitude."""

    def signs(_: str, update: Tensor) -> Tensor:
        return torch.where(update < 0, -1.0, 1.0) * update.abs().mean().half().float()

    bits = np.packbits(np.concatenate([(u.flatten() < 0).numpy() for _, u in delta.items()]))
    scales = torch.stack([u.abs().mean().half() for _, u in delta.items()])
    return _shrunk(delta, signs, [bits.tobytes(), scales])


def uniform(delta: Delta, bits: int) -> Shrunk:
    """Symmetric uniform quantisation to `bits` bits, each tensor's range chosen for the least squared error; then LZMA."""
    if bits not in (2, 4, 8):
        raise ValueError(f"uniform quantisation is to 2, 4 or 8 bits, got {bits}")
    top = 2 ** (bits - 1) - 1
    steps = {key: _best_step(update, top) for key, update in delta.items()}
    codes = {key: _codes(update, steps[key], top) for key, update in delta.items()}
    stream = torch.cat([c.flatten() for c in codes.values()]).numpy()
    smallest = min((lzma.compress(stream.tobytes()), lzma.compress(_packed(stream, bits))), key=len)
    scales = torch.tensor(list(steps.values()), dtype=torch.float16)
    return _shrunk(delta, lambda key, _: codes[key].float() * float(torch.tensor(steps[key]).half()), [smallest, scales])


def _best_step(update: Tensor, top: int) -> float:
    largest = float(update.abs().max())
    if largest == 0:
        return 0.0
    steps = [largest * float(clip) / top for clip in CLIPS]
    return min(steps, key=lambda s: float((_codes(update, s, top) * s - update).square().sum()))


def _codes(update: Tensor, step: float, top: int) -> Tensor:
    return torch.zeros_like(update, dtype=torch.int8) if step == 0 else (update / step).round().clamp(-top, top).to(torch.int8)


def _packed(codes: np.ndarray, bits: int) -> bytes:
    fields = np.unpackbits(codes.view(np.uint8)[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(fields).tobytes()


def _ternary(masks: bit_masks.Masks, update: Tensor, scale: float) -> Tensor:
    return bit_masks.decode(*masks, update.numel(), scale).view(update.shape)


def _shrunk(delta: Delta, value: Callable[[str, Tensor], Tensor], parts: Iterable[bytes | Tensor]) -> Shrunk:
    """The delta with every tensor replaced by `value(name, update)`, and the size of a file with the parts and the layout."""
    tensors = [t if isinstance(t, Tensor) else torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in parts if len(t)]
    layout = torch.frombuffer(bytearray(pack_layout(delta.layout, delta.adapter_config)), dtype=torch.uint8)
    entries = [Entry.of(f"part{i}", t) for i, t in enumerate(tensors)] + [Entry.of("layout", layout)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_safetensors(path, entries, {"format": "baseline"})
        size = path.stat().st_size
    dense = TaskDelta(
        delta.layout,
        lambda key: value(key, delta.read(key)),
        reference=delta.reference,
        kept=delta.kept,
        base=lambda: delta.base,  # type: ignore[arg-type,return-value]
        adapter_config=delta.adapter_config,
        reference_store=delta.own_reference(),
    )
    return Shrunk(dense, size)
