"""Tensors by name, one at a time: reading state dicts and safetensors files or folders, and writing them in a stream.

A store lists names, shapes and types without touching the values, and reads one tensor when asked. Merging a model then
needs memory for its largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
TORCH_TYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
UNKNOWN_LENGTH = -1  # the size of a byte stream that is known only when it has been written


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for side in self.shape:
            count *= side
        return count


class DictStore:
    """A state dict in memory. Tied tensors count once, under the name that comes first; `aliases` maps the others to it."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "the state dict") -> None:
        self.name = name
        self.infos: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{key!r}] is {type(tensor).__name__}, expected a tensor")
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and tensor.device.type != "meta" and place in seen:
                self.aliases[key] = seen[place]
                continue
            seen[place] = key
            self._tensors[key] = tensor.detach()
            self.infos[key] = TensorInfo(tuple(tensor.shape), tensor.dtype)

    def read(self, key: str) -> Tensor:
        """The tensor itself, not a copy."""
        return self._tensors[self.aliases.get(key, key)]


class FileStore:
    """A safetensors file, or a folder with a PEFT adapter, one model file, or the index of a sharded model."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.name = str(path)
        self.infos: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._places: dict[str, Any] = {}
        for file in weight_files(self.path):
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a readable safetensors file ({error}): copy or download it again") from error
            for key in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = opened.get_slice(key)
                self.infos[key] = TensorInfo(tuple(part.get_shape()), TORCH_TYPES[part.get_dtype()])
                self._places[key] = opened

    def read(self, key: str) -> Tensor:
        """The tensor, read from its file now."""
        return self._places[key].get_tensor(key)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model file, model folder or adapter folder. Raises ValueError when there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no such file or folder: {path}")
    for single in (ADAPTER_FILE, MODEL_FILE):
        if (path / single).is_file():
            return [path / single]
    indexes = sorted(path.glob("*" + INDEX_SUFFIX))
    if indexes:
        shards = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
        missing = [s for s in shards if not (path / s).is_file()]
        if missing:
            raise ValueError(f"{path}: {indexes[0].name} names shards that are not there: {', '.join(missing[:5])}")
        return [path / s for s in shards]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if any(path.glob("*.bin")):
        raise ValueError(f"{path} has its weights in pickle files, which are not read: save them again as safetensors")
    raise ValueError(f"{path} holds {len(found)} safetensors files and no index; expected {ADAPTER_FILE} or {MODEL_FILE}")


TensorStore = DictStore | FileStore
Tensors = Mapping[str, Tensor] | str | os.PathLike[str] | TensorStore  # what names tensors: a state dict, a file, a folder


def open_store(source: Tensors, name: str = "the state dict") -> TensorStore:
    """A store over a state dict, a safetensors file or a folder (a store is given back)."""
    if isinstance(source, (DictStore, FileStore)):
        return source
    if isinstance(source, Mapping):
        return DictStore(source, name)
    if isinstance(source, (str, os.PathLike)):
        return FileStore(source)
    raise TypeError(f"expected a state dict or a path, got {type(source).__name__}")


def fingerprint(store: TensorStore) -> str:
    """sha256 over names, shapes and values of the floating-point tensors, in sorted order.

    Values count as float32, so that a bf16 checkpoint has one fingerprint whatever type it is loaded in.
    """
    digest = hashlib.sha256()
    for key in sorted(store.infos):
        info = store.infos[key]
        if info.dtype.is_floating_point:
            digest.update(f"{key}{info.shape}".encode())
            digest.update(raw_bytes(store.read(key).to("cpu", torch.float32)))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, form, and a function that gives its bytes in one or more pieces when they are due.

    A one-dimensional uint8 entry may have the length `UNKNOWN_LENGTH`; it then gets the length of what was written.
    """

    name: str
    info: TensorInfo
    pieces: Callable[[], Iterable[Any]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """An entry for a tensor in memory."""
        return cls(name, TensorInfo(tuple(tensor.shape), tensor.dtype), lambda: [raw_bytes(tensor)])


def write_safetensors(path: str | os.PathLike[str], entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file entry by entry, wholly or not at all.

    Entries are stored by falling size of their type, as the format's own writer does, so that every tensor is aligned.
    """
    target = Path(path)
    order = sorted(entries, key=lambda e: (-e.info.dtype.itemsize, e.name))
    room = len(_header(order, [_digits(e) for e in order], metadata))  # numbers at their longest; the rest is padding
    room += -room % 8
    temporary = target.with_name(target.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.seek(8 + room)
            lengths = [_write_entry(file, e) for e in order]
            header = _header(order, lengths, metadata).ljust(room)
            file.seek(0)
            file.write(struct.pack("<Q", room) + header)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _digits(entry: Entry) -> int:
    return 10**11 if UNKNOWN_LENGTH in entry.info.shape else entry.info.numel * entry.info.dtype.itemsize


def _write_entry(file: Any, entry: Entry) -> int:
    written = 0
    for piece in entry.pieces():
        file.write(piece)
        written += memoryview(piece).nbytes
    expected = entry.info.numel * entry.info.dtype.itemsize
    if UNKNOWN_LENGTH not in entry.info.shape and written != expected:
        raise ValueError(f"{entry.name!r} gave {written} bytes, its shape and type ask for {expected}")
    return written


def _header(order: list[Entry], lengths: list[int], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for entry, length in zip(order, lengths):
        shape = [length if s == UNKNOWN_LENGTH else s for s in entry.info.shape]
        header[entry.name] = {
            "dtype": SAFETENSORS_NAMES[entry.info.dtype],
            "shape": shape,
            "data_offsets": [at, at + length],
        }
        at += length
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): copy or download it again") from error


def differences(ours: Iterable[str], theirs: Iterable[str], count: int = 5) -> str:
    """What two sets of names have apart from each other, the first `count` of each side; empty if they are equal."""
    ours, theirs = set(ours), set(theirs)
    parts = []
    for label, missing in (("only in the first", sorted(ours - theirs)), ("only in the second", sorted(theirs - ours))):
        if missing:
            more = f" and {len(missing) - count} more" if len(missing) > count else ""
            parts.append(f"{label}: {', '.join(missing[:count])}{more}")
    return "; ".join(parts)
