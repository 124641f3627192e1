"""Where text comes from: a short name, a file, a folder, the shared data folder or a hub id."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grainwise.data.docstrings import SPLITS, pydoc_split
from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_FILES = (".txt", ".txt.gz", ".md", ".rst")
TABLE_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SUFFIXES = TEXT_FILES + TABLE_FILES
PROMPT_NAMES = ("prompt", "instruction", "question")
RESPONSE_NAMES = ("response", "output", "completion", "answer")
PASSAGE_CHARACTERS = 4000  # a plain text file is cut into passages of about this size at blank lines


def shared_folder() -> Path | None:
    """The folder of real data for tests and benchmarks: `$GRAINWISE_DATA`, else `../shared/data`; None if absent."""
    folder = Path(os.environ.get("GRAINWISE_DATA", "../shared/data"))
    return folder if folder.is_dir() else None


def load(source: str | os.PathLike[str], split: str = "train") -> Dataset:
    """Rows of real text: a `datasets.Dataset` with a `text` column, or with `prompt` and `response`.

    source: `pydoc`, a file (`.txt .md .rst .jsonl .json .parquet`, text forms also as `.gz`), a folder of such
        files, `shared/<path in the shared data folder>`, or a hub id.
    split: `train`, `validation` or `test`. Local files without a split of their own are divided by a hash of each row
        (14/16, 1/16, 1/16), the same on every machine.
    Raises ValueError for an unknown split, an unknown or empty source, or rows without a usable text column.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}. {did_you_mean(split, SPLITS)}")
    rows = _rows(str(source), split)
    if not len(rows):
        raise ValueError(f"the {split} split of {str(source)!r} has no rows: give a source with more text")
    return rows


def check(source: str) -> None:
    """Raise ValueError if a local source is not there or holds no readable file; a hub id is not looked up."""
    path = None if source == "pydoc" else _local_path(source)
    if path is not None:
        _files(path)


def _rows(source: str, split: str) -> Dataset:
    if source == "pydoc":
        return _pydoc(split)
    path = _local_path(source)
    if path is not None:
        return _local_rows(path, split)
    return _hub_rows(source, split)


@functools.lru_cache(maxsize=3)
def _pydoc(split: str) -> Dataset:
    from datasets import Dataset

    documents = pydoc_split(split)
    return Dataset.from_dict({"text": [d.text for d in documents], "name": [d.name for d in documents]})


def _local_path(source: str) -> Path | None:
    if source.startswith("shared/") and not Path(source).exists():
        folder = shared_folder()
        if folder is None:
            raise ValueError(f"{source!r} needs the shared data folder: set GRAINWISE_DATA to where it is")
        path = folder / source.removeprefix("shared/")
    else:
        path = Path(source).expanduser()
    if path.exists():
        return path
    looks_local = source.startswith(("/", ".", "~", "shared/")) or source.endswith(SUFFIXES)
    if looks_local:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else f"The folder {path.parent} does not exist either."
        raise ValueError(f"no such file or folder: {path}. {hint}")
    return None


def _local_rows(path: Path, split: str) -> Dataset:
    from datasets import Dataset

    records = [r for file in _files(path) for r in _read(file)]
    kept = [r for r in records if _row_split(r) == split]
    if len(records) < 16:  # too few to divide: every split sees the same rows, which suits inputs, not measurements
        raise ValueError(f"{path} has only {len(records)} rows or passages; at least 16 are needed to divide it into splits")
    return Dataset.from_list(kept) if kept else Dataset.from_dict({"text": []})


def _files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    readable = [p for p in files if p.name.endswith(SUFFIXES)]
    if not readable:
        raise ValueError(f"{path} holds no readable file; expected one of {', '.join(SUFFIXES)}")
    return readable


def _row_split(record: dict[str, str]) -> str:
    bucket = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()[0] % 16
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _read(path: Path) -> list[dict[str, str]]:
    try:
        if path.name.endswith(TEXT_FILES):
            return [{"text": p} for p in passages(_open_text(path))]
        return [_record(r, path, i) for i, r in enumerate(_read_table(path))]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}. Is the file complete and UTF-8?") from error


def _open_text(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def _read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet
        from pyarrow import ArrowException

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    text = _open_text(path)
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a JSON list of objects, got {type(rows).__name__}")
    return rows


def _record(row: Any, where: Path | str, index: int) -> dict[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"row {index} of {where} is {type(row).__name__}, expected an object with text fields")
    prompt = next((row[n] for n in PROMPT_NAMES if row.get(n)), None)
    response = next((row[n] for n in RESPONSE_NAMES if row.get(n)), None)
    if prompt is not None and response is not None:
        extra = f"\n{row['input']}" if row.get("input") else ""
        answer = {"answer": str(row["answer"])} if "answer" in row else {}
        return {"prompt": f"{prompt}{extra}", "response": str(response), **answer}
    if row.get("text") is not None:
        return {"text": str(row["text"])}
    raise ValueError(
        f"row {index} of {where} has fields {sorted(row)}; expected `text`, or a prompt "
        f"({', '.join(PROMPT_NAMES)}) with a response ({', '.join(RESPONSE_NAMES)})"
    )


def passages(text: str, size: int = PASSAGE_CHARACTERS) -> list[str]:
    """Cut a long text at blank lines (else line ends) into passages of about `size` characters."""
    separator = "\n\n" if "\n\n" in text else "\n"
    found: list[str] = []
    current: list[str] = []
    length = 0
    for part in text.split(separator):
        current.append(part)
        length += len(part) + len(separator)
        if length >= size:
            found.append(separator.join(current))
            current, length = [], 0
    if current:
        found.append(separator.join(current))
    return [p for p in found if p.strip()]


def _hub_rows(source: str, split: str) -> Dataset:
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(source, split=split)
    except Exception as error:  # the hub client raises many kinds, all meaning "not to be had"
        raise ValueError(
            f"{source!r} is not `pydoc`, not a local path, and could not be loaded as a hub data set: {error}"
        ) from error
    return Dataset.from_list([_record(r, source, i) for i, r in enumerate(rows)])
