"""`EmbeddedPool`: the embeddings of a corpus, in memory or in shards on disk, tied to the encoder that made them.

A pool on disk is a folder of `shard-00000.npy` files (rows, dimension) and a `pool.json` that records the encoder's hash
and the texts' hash. Shards are written under a temporary name and renamed, so an interrupted run continues where it
stopped; a folder made by another encoder, or from other texts, is refused. Readers see batches of float32, one shard
mapped at a time, so memory stays flat however large the pool is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grainwise.naming import did_you_mean
from grainwise.training import Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike

    from grainwise.select.text_encoder import Encoder

SHARD_ROWS = 65_536
ENCODE_ROWS = 256  # texts given to the encoder at once: the step of the progress bar
MANIFEST = "pool.json"
TextSlice = Callable[[int, int], list[str]]  # (start, stop) -> the texts of those rows


class EmbeddedPool:
    """Embeddings (rows, dimension) of a corpus. Build one with `from_array`, `from_texts`, `from_dataset` or `open`."""

    def __init__(self, shards: Sequence[np.ndarray | Path], *, encoder: str = "") -> None:
        """shards: arrays (rows, dimension) or `.npy` files, in order. encoder: hash of what made them, "" if unknown."""
        sizes = [_shape(s) for s in shards]
        if not sizes or not all(rows for rows, _ in sizes):
            raise ValueError("an embedded pool needs at least one row")
        self.shards, self.encoder = list(shards), encoder
        self.dimension = sizes[0][1]
        self.offsets = np.concatenate([[0], np.cumsum([rows for rows, _ in sizes])])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @classmethod
    def from_array(cls, vectors: ArrayLike, *, encoder: str = "") -> EmbeddedPool:
        """A pool over vectors (rows, dimension) that are already there. Raises ValueError for NaN or zero rows."""
        array = np.asarray(vectors)
        if array.ndim != 2 or not array.size:
            raise ValueError(f"embeddings must be (rows >= 1, dimension >= 1), got {array.shape}")
        array = array if array.dtype in (np.float16, np.float32) else array.astype(np.float32)
        _check(array, 0)
        return cls([array], encoder=encoder)

    @classmethod
    def from_batches(
        cls, batches: Iterable[ArrayLike], folder: str | os.PathLike[str], *, encoder: str = "", dtype: str = "float16"
    ) -> EmbeddedPool:
        """Write vectors made elsewhere, batches (rows, dimension), as a pool in `folder`, one shard a batch."""
        home = Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        start, dimension = 0, 0
        for number, batch in enumerate(batches):
            vectors = np.asarray(batch, dtype=dtype)
            _check(vectors, start)
            _write_shard(home / _shard_name(number), vectors)
            start, dimension = start + len(vectors), vectors.shape[1]
        _write_manifest(home, {"rows": start, "dimension": dimension, "shards": number + 1, "encoder": encoder, "texts": ""})
        return cls.open(home)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        *,
        encoder: Encoder,
        text: Sequence[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        dtype: str = "float16",
        progress: Progress | bool = True,
    ) -> EmbeddedPool:
        """Embed the rows of a data set.

        text: the columns to embed, joined by a newline; None reads `text`, or `prompt` and `response`. folder: where to
        keep the pool (stored as `dtype`), continued or reused when it is there already; None keeps it in memory.
        progress: True for a bar on the terminal, or a callable (done, total, what). Raises ValueError for unknown
        columns, empty texts, a folder of another encoder or of other texts.
        """
        plain = ["text"] if "text" in dataset.column_names else ["prompt", "response"]
        columns = list(text) if text is not None else plain
        for column in columns:
            if column not in dataset.column_names:
                raise ValueError(f"the data set has no column {column!r}. {did_you_mean(column, dataset.column_names)}")

        def texts(start: int, stop: int) -> list[str]:
            batch = dataset[start:stop]
            return ["\n".join(str(part) for part in parts) for parts in zip(*(batch[c] for c in columns))]

        return _embedded(texts, len(dataset), encoder, folder, dtype, progress)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        *,
        encoder: Encoder,
        folder: str | os.PathLike[str] | None = None,
        dtype: str = "float16",
        progress: Progress | bool = True,
    ) -> EmbeddedPool:
        """Embed a list of texts; see `from_dataset`."""
        return _embedded(lambda start, stop: list(texts[start:stop]), len(texts), encoder, folder, dtype, progress)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, encoder: Encoder | None = None) -> EmbeddedPool:
        """Read a pool from disk. With `encoder`, raises ValueError unless that encoder made it."""
        home = Path(folder)
        manifest = _read_manifest(home)
        if manifest is None:
            raise ValueError(f"{home} holds no embedded pool (there is no {MANIFEST}); make one with EmbeddedPool.from_dataset")
        if encoder is not None:
            _same_encoder(home, manifest, encoder.fingerprint())
        paths = [home / _shard_name(i) for i in range(manifest["shards"])]
        missing = [p.name for p in paths if not p.exists()]
        if missing:
            raise ValueError(f"{home} is incomplete, {missing[0]} is missing: run EmbeddedPool.from_dataset again to finish it")
        pool = cls(paths, encoder=manifest["encoder"])
        if len(pool) != manifest["rows"] or pool.dimension != manifest["dimension"]:
            raise ValueError(
                f"{home} is damaged: {MANIFEST} promises {manifest['rows']} rows of dimension {manifest['dimension']}, "
                f"the shards hold {len(pool)} of {pool.dimension}"
            )
        return pool

    def batches(self, rows: int = 16_384) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 array (at most `rows`, dimension)) through the whole pool, in order."""
        for shard, offset in zip(self.shards, self.offsets):
            vectors = _opened(shard)
            for start in range(0, len(vectors), rows):
                yield int(offset) + start, np.asarray(vectors[start : start + rows], dtype=np.float32)

    def rows(self, indices: ArrayLike) -> np.ndarray:
        """float32 (len(indices), dimension): the given rows, in the given order."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise ValueError(f"row indices must lie in 0..{len(self) - 1}, got {wanted.min()}..{wanted.max()}")
        found = np.empty((len(wanted), self.dimension), np.float32)
        home = np.searchsorted(self.offsets, wanted, side="right") - 1
        for number in np.unique(home):
            here = np.flatnonzero(home == number)
            found[here] = _opened(self.shards[number])[wanted[here] - self.offsets[number]]
        return found

    @property
    def embeddings(self) -> np.ndarray:
        """The whole pool as one float32 array (rows, dimension); for pools that fit into memory."""
        return np.concatenate([v for _, v in self.batches()])


def as_pool(pool: EmbeddedPool | ArrayLike) -> EmbeddedPool:
    """A pool as it is, or an array (rows, dimension) as a pool."""
    return pool if isinstance(pool, EmbeddedPool) else EmbeddedPool.from_array(pool)


@contextmanager
def reporter(progress: Progress | bool, what: str) -> Iterator[Progress]:
    """A callable (done, total, what): the given one, or a bar on the terminal (True), or nothing (False)."""
    if callable(progress):
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, _: bar.update(task, completed=done, total=total)


def _embedded(
    texts: TextSlice,
    rows: int,
    encoder: Encoder,
    folder: str | os.PathLike[str] | None,
    dtype: str,
    progress: Progress | bool,
) -> EmbeddedPool:
    if rows == 0:
        raise ValueError("there are no rows to embed")
    fingerprint = encoder.fingerprint()
    with reporter(progress, "embedding") as report:

        def encoded(start: int, stop: int) -> np.ndarray:
            parts = []
            for at in range(start, stop, ENCODE_ROWS):
                batch = texts(at, min(at + ENCODE_ROWS, stop))
                empty = [at + i for i, t in enumerate(batch) if not t.strip()]
                if empty:
                    raise ValueError(f"rows {empty[:10]} have no text: drop them first")
                parts.append(encoder.encode(batch))
                report(min(at + ENCODE_ROWS, stop), rows, "embedding")
            return np.concatenate(parts)

        if folder is None:
            vectors = encoded(0, rows)
            _check(vectors, 0)
            return EmbeddedPool([vectors], encoder=fingerprint)
        return _embedded_on_disk(encoded, texts, rows, fingerprint, Path(folder), dtype)


def _embedded_on_disk(
    encoded: Callable[[int, int], np.ndarray], texts: TextSlice, rows: int, fingerprint: str, home: Path, dtype: str
) -> EmbeddedPool:
    home.mkdir(parents=True, exist_ok=True)
    hashed = _texts_hash(texts, rows)
    manifest = _read_manifest(home)
    if manifest is not None:
        _same_encoder(home, manifest, fingerprint)
        if manifest["texts"] != hashed:
            raise ValueError(f"{home} holds the embeddings of other texts: give another folder, or delete this one")
        if manifest["dtype"] != dtype:
            raise ValueError(f"{home} is stored as {manifest['dtype']}, not {dtype}: ask for that, or give another folder")
    else:
        count = -(-rows // SHARD_ROWS)
        manifest = {"rows": rows, "shards": count, "dtype": dtype, "encoder": fingerprint, "texts": hashed}
        _write_manifest(home, manifest)
    for number in range(manifest["shards"]):
        path, start = home / _shard_name(number), number * SHARD_ROWS
        if not path.exists():  # what an interrupted run finished is kept
            vectors = encoded(start, min(start + SHARD_ROWS, rows)).astype(dtype)
            _check(vectors, start)
            _write_shard(path, vectors)
    if "dimension" not in manifest:
        _write_manifest(home, manifest | {"dimension": _shape(home / _shard_name(0))[1]})
    return EmbeddedPool.open(home)


def _check(vectors: np.ndarray, first: int) -> None:
    """Raise ValueError for rows that are not finite or have zero norm, listing their numbers."""
    if vectors.ndim != 2:
        raise ValueError(f"embeddings must be (rows, dimension), got {vectors.shape}")
    broken = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(broken):
        advice = " (float16 ends at 65504: store as float32)" if vectors.dtype == np.float16 else ""
        raise ValueError(f"the embeddings of rows {(broken[:10] + first).tolist()} are NaN or infinite{advice}")
    empty = np.flatnonzero(~vectors.any(1))
    if len(empty):
        raise ValueError(f"the embeddings of rows {(empty[:10] + first).tolist()} are zero: drop those rows or fix the encoder")


def _same_encoder(home: Path, manifest: dict[str, Any], fingerprint: str) -> None:
    if manifest["encoder"] != fingerprint:
        raise ValueError(
            f"{home} was embedded by another encoder (hash {manifest['encoder'] or 'unknown'}, now {fingerprint}): "
            "use that encoder, give another folder, or delete this one"
        )


def _texts_hash(texts: TextSlice, rows: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, rows, ENCODE_ROWS):
        for text in texts(start, min(start + ENCODE_ROWS, rows)):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _opened(shard: np.ndarray | Path) -> np.ndarray:
    return np.load(shard, mmap_mode="r", allow_pickle=False) if isinstance(shard, Path) else shard


def _shape(shard: np.ndarray | Path) -> tuple[int, int]:
    try:
        rows, dimension = _opened(shard).shape
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read the shard {shard}: {error}; delete it and embed again") from error
    return rows, dimension


def _write_shard(path: Path, vectors: np.ndarray) -> None:
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    temporary.replace(path)


def _write_manifest(home: Path, manifest: dict[str, Any]) -> None:
    temporary = home / f"{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(home / MANIFEST)


def _read_manifest(home: Path) -> dict[str, Any] | None:
    path = home / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        return manifest | {"rows": int(manifest["rows"]), "shards": int(manifest["shards"]), "encoder": manifest["encoder"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a pool ({error!r}): delete the folder and embed again") from error
