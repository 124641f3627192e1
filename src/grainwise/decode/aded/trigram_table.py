"""What may follow two tokens: tri-gram scores in flat arrays, counted from a corpus and sharpened while decoding.

A context is a pair of tokens; its row lists successors with scores, highest first. Counted rows lie behind one another
in compressed form, found by binary search over the sorted contexts. A row that changes at run time is first copied
behind them, and a small open-addressing hash (context -> row) takes precedence over the counted rows: the overlay.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_VOCABULARY = 2**31  # two tokens are packed into the 64 bits of a signed integer
ARRAYS = ("keys", "offsets", "tokens", "scores")
EMPTY = -1
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: multiplying by it scatters neighbouring keys


class Rows(NamedTuple):
    """The arrays that compiled code works on.

    keys: sorted contexts (w1 << 32 | w2), int64 (contexts,). offsets: int64 (contexts + 1,). tokens int32 and scores
    float32: counted rows, then the overlay's. slot_*: the hash; a row of the overlay is its start, length and capacity.
    used: int64 (3,): filled part of `tokens`, filled slots, longest row.
    """

    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    scores: NDArray[np.float32]
    slot_keys: NDArray[np.int64]
    slot_starts: NDArray[np.int64]
    slot_lengths: NDArray[np.int64]
    slot_capacities: NDArray[np.int64]
    used: NDArray[np.int64]


class TrigramTable:
    """Scores of the third token after two, as ADED drafts from them.

    Build it with `from_token_lists` or `from_rows`, keep it with `save` and `load`. `reinforce` raises scores while
    decoding; `reset` drops everything learned that way, `snapshot` and `restore` bring a state back.
    """

    def __init__(
        self,
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
        tokens: NDArray[np.int32],
        scores: NDArray[np.float32],
        vocab_size: int,
        *,
        top_k: int = 12,
        tokens_seen: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        check_vocabulary(vocab_size)
        lengths = np.diff(offsets)
        if len(offsets) != len(keys) + 1 or len(tokens) != len(scores) or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise ValueError("the table's arrays do not fit one another: is its file complete?")
        if (np.diff(keys) <= 0).any() or (lengths < 1).any():
            raise ValueError("the table's contexts must be sorted, distinct and have successors: is its file damaged?")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"the table holds token {tokens.max()}, outside the vocabulary of {vocab_size}")
        self.vocab_size, self.top_k, self.tokens_seen, self.tokenizer = vocab_size, top_k, tokens_seen, tokenizer
        self._counted = (keys, offsets, tokens, scores)
        self.reset()

    @classmethod
    def empty(cls, vocab_size: int) -> TrigramTable:
        """A table that has seen no corpus: it learns from the text it helps to decode."""
        none = np.zeros(0, dtype=np.int64)
        return cls(none, np.zeros(1, dtype=np.int64), none.astype(np.int32), none.astype(np.float32), vocab_size)

    @classmethod
    def from_token_lists(
        cls,
        lists: Iterable[Sequence[int]],
        vocab_size: int,
        top_k: int = 12,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> TrigramTable:
        """Count the tri-grams of every list (shorter ones than 3 have none) and keep each context's `top_k` likeliest.

        Scores are the relative frequencies before the cut; ties go to the smaller token id. O(n log n) in tokens.
        Raises ValueError for no tri-gram at all, a token outside the vocabulary or a `top_k` below 1.
        """
        check_vocabulary(vocab_size)
        if top_k < 1:
            raise ValueError(f"top_k, the successors kept for each context, must be at least 1, got {top_k}")
        arrays = [np.asarray(tokens, dtype=np.int64) for tokens in lists if len(tokens) >= 3]
        if not arrays:
            raise ValueError("the corpus has no list of three or more tokens: give more text")
        stream = np.concatenate(arrays)
        if not 0 <= stream.min() <= stream.max() < vocab_size:
            raise ValueError(
                f"the corpus holds token ids from {stream.min()} to {stream.max()}, outside the vocabulary of {vocab_size}: "
                "was it encoded by another tokenizer?"
            )
        keys, offsets, tokens, scores = count_trigrams(stream, np.cumsum([len(a) for a in arrays]), vocab_size, top_k)
        name = tokenizer_identity(tokenizer) if tokenizer is not None else None
        return cls(keys, offsets, tokens, scores, vocab_size, top_k=top_k, tokens_seen=len(stream), tokenizer=name)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, top_k: int = 12) -> TrigramTable:
        """Count the text of data rows (`text`, or `prompt` and `response`), one list for each row."""
        from grainwise.data import row_text

        texts = [row_text(row) for row in rows]
        lists = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return cls.from_token_lists(lists, len(tokenizer), top_k, tokenizer=tokenizer)

    def __len__(self) -> int:
        """Number of contexts."""
        return len(self.merged()[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the counted rows, as on disk."""
        return sum(a.nbytes for a in self._counted)

    def row(self, first: int, second: int) -> dict[int, float]:
        """Successors of a context and their scores, highest first; empty if the context is unknown."""
        start, length = find_row(self.rows, pack(first, second))
        part = slice(start, start + length)
        return dict(zip(self.rows.tokens[part].tolist(), self.rows.scores[part].tolist()))

    def reinforce(self, window: NDArray[np.int64], increment: float, cap: float) -> None:
        """Raise the score of every tri-gram inside `window`, int64 (w,), by `increment`, at most to `cap`.

        Contexts and successors that are missing are created. Only verified text belongs here.
        """
        if len(window) < 3 or increment == 0:
            return
        if not 0 <= window.min() <= window.max() < self.vocab_size:
            raise ValueError(f"the text holds token ids outside the table's vocabulary of {self.vocab_size}: {window.tolist()}")
        self._make_room(len(window))
        raise_scores(self.rows, window, np.float32(increment), np.float32(cap))

    def reset(self) -> None:
        """Back to the counted table: what was learned while decoding is dropped."""
        keys, offsets, tokens, scores = self._counted
        longest = int(np.diff(offsets).max(initial=1))
        self.rows = Rows(
            keys, offsets, tokens.copy(), scores.copy(), *_empty_slots(256), used=np.array([len(tokens), 0, longest])
        )

    def snapshot(self) -> Rows:
        """A copy of the present state, for `restore`."""
        return Rows._make(a.copy() for a in self.rows)

    def restore(self, state: Rows) -> None:
        """Return to a state of this table that `snapshot` gave."""
        self.rows = Rows._make(a.copy() for a in state)

    def merged(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """(keys, offsets, tokens, scores) with the overlay's rows in place of the counted ones."""
        rows = self.rows
        slots = np.flatnonzero(rows.slot_keys != EMPTY)
        counted = ~np.isin(rows.keys, rows.slot_keys[slots])
        keys = np.concatenate([rows.keys[counted], rows.slot_keys[slots]])
        starts = np.concatenate([rows.offsets[:-1][counted], rows.slot_starts[slots]])
        lengths = np.concatenate([np.diff(rows.offsets)[counted], rows.slot_lengths[slots]])
        order = np.argsort(keys)
        keys, starts, lengths = keys[order], starts[order], lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        at = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return keys, offsets, rows.tokens[at], rows.scores[at]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `table.safetensors` and `table.json` to `folder`, what was learned while decoding merged in."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": "grainwise trigram table",
            "vocab_size": self.vocab_size,
            "top_k": self.top_k,
            "tokens_seen": self.tokens_seen,
            "tokenizer": self.tokenizer,
        }
        save_file(dict(zip(ARRAYS, self.merged())), folder / "table.partial", metadata={"format": "np"})
        (folder / "json.partial").write_text(json.dumps(about, indent=1) + "\n")
        os.replace(folder / "table.partial", folder / "table.safetensors")
        os.replace(folder / "json.partial", folder / "table.json")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> TrigramTable:
        """Read what `save` wrote. Raises ValueError if it is missing, damaged, or made with another tokenizer."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / "table.json").read_text())
            arrays = load_file(folder / "table.safetensors")
            keys, offsets, tokens, scores = (arrays[name] for name in ARRAYS)
        except (OSError, json.JSONDecodeError, SafetensorError, KeyError) as error:
            raise ValueError(f"{folder} holds no readable tri-gram table (table.safetensors, table.json): {error}") from error
        if tokenizer is not None and about["tokenizer"] not in (None, tokenizer_identity(tokenizer)):
            raise ValueError(
                f"the table in {folder} was built with tokenizer {about['tokenizer']}, not with "
                f"{tokenizer_identity(tokenizer)}: build it anew with the model's own tokenizer"
            )
        return cls(
            keys, offsets, tokens, scores, about["vocab_size"],
            top_k=about["top_k"], tokens_seen=about["tokens_seen"], tokenizer=about["tokenizer"],
        )  # fmt: skip

    def _make_room(self, window: int) -> None:
        """Grow the arrays so that `raise_scores` over `window` tokens cannot run out of space."""
        rows = self.rows
        need = int(rows.used[0]) + window * (2 * int(rows.used[2]) + 8)
        if need > len(rows.tokens):
            tokens, scores = (np.concatenate([a, np.zeros(need, a.dtype)]) for a in (rows.tokens, rows.scores))
            rows = rows._replace(tokens=tokens, scores=scores)
        if 2 * (int(rows.used[1]) + window) > len(rows.slot_keys):
            slots = _empty_slots(2 * len(rows.slot_keys) + 4 * window)
            old = np.flatnonzero(rows.slot_keys != EMPTY)
            where = place_slots(rows.slot_keys[old], slots[0])
            for new, values in zip(slots[1:], (rows.slot_starts, rows.slot_lengths, rows.slot_capacities)):
                new[where] = values[old]
            rows = Rows(*rows[:4], *slots, used=rows.used)
        self.rows = rows


def check_vocabulary(vocab_size: int) -> None:
    """Raises ValueError unless two token ids fit into one 64-bit key."""
    if not 1 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(f"vocab_size must be from 1 to {LARGEST_VOCABULARY} (two ids share a 64-bit key), got {vocab_size}")


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Class, size and a hash of a tokenizer's vocabulary: equal for tokenizers that give the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
    return f"{type(tokenizer).__name__}({len(vocabulary)} tokens, {digest})"


def count_trigrams(
    stream: NDArray[np.int64], ends: NDArray[np.int64], vocab_size: int, top_k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """(keys, offsets, tokens, scores) of the tri-grams inside lists that lie end to end in `stream`; ends: where each ends."""
    starts = np.ones(len(stream), dtype=bool)  # where a tri-gram may start: not in the last two places of a list
    starts[ends - 1] = starts[ends - 2] = False
    first = np.flatnonzero(starts)
    keys, context = np.unique((stream[first] << 32) | stream[first + 1], return_inverse=True)
    pairs, counts = np.unique(context * vocab_size + stream[first + 2], return_counts=True)
    context, tokens = np.divmod(pairs, vocab_size)
    scores = counts / np.bincount(context, weights=counts)[context]
    order = np.lexsort((tokens, -counts, context))
    begin = np.searchsorted(context, np.arange(len(keys)))  # the sort keeps each context's rows in place
    kept = order[np.arange(len(order)) - begin[context] < top_k]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(context[kept], minlength=len(keys)))])
    return keys, offsets, tokens[kept].astype(np.int32), scores[kept].astype(np.float32)


def pack(first: int, second: int) -> int:
    """The key of a context."""
    return (first << 32) | second


def _empty_slots(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    power = 1 << (size - 1).bit_length()
    return (np.full(power, EMPTY), *(np.zeros(power, dtype=np.int64) for _ in range(3)))  # type: ignore[return-value]


@numba.njit(cache=True)
def find_slot(slot_keys, key):  # type: ignore[no-untyped-def]
    """The slot that holds `key`, or the free one where it belongs."""
    at = np.int64((np.uint64(key) * SPREAD) >> np.uint64(24)) & (len(slot_keys) - 1)
    while slot_keys[at] != EMPTY and slot_keys[at] != key:
        at = (at + 1) & (len(slot_keys) - 1)
    return at


@numba.njit(cache=True)
def place_slots(keys, slot_keys):  # type: ignore[no-untyped-def]
    """Enter keys into an empty hash; returns the slot of each."""
    where = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        where[i] = find_slot(slot_keys, keys[i])
        slot_keys[where[i]] = keys[i]
    return where


@numba.njit(cache=True)
def find_counted(keys, key):  # type: ignore[no-untyped-def]
    """Index of `key` among the sorted contexts, or -1."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) >> 1
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low if low < len(keys) and keys[low] == key else -1


@numba.njit(cache=True)
def find_row(rows, key):  # type: ignore[no-untyped-def]
    """(start, length) of a context's row; length 0 if there is none."""
    slot = find_slot(rows.slot_keys, key)
    if rows.slot_keys[slot] == key:
        return rows.slot_starts[slot], rows.slot_lengths[slot]
    index = find_counted(rows.keys, key)
    if index < 0:
        return 0, 0
    return rows.offsets[index], rows.offsets[index + 1] - rows.offsets[index]


@numba.njit(cache=True)
def move_row(rows, slot, start, length):  # type: ignore[no-untyped-def]
    """Copy a row to the free end, with room to double, and let `slot` point there."""
    to = rows.used[0]
    for i in range(length):  # slices would compile for seconds
        rows.tokens[to + i] = rows.tokens[start + i]
        rows.scores[to + i] = rows.scores[start + i]
    rows.slot_starts[slot] = to
    rows.slot_lengths[slot] = length
    rows.slot_capacities[slot] = 2 * length + 4
    rows.used[0] = to + 2 * length + 4


@numba.njit(cache=True)
def raise_scores(rows, window, increment, cap):  # type: ignore[no-untyped-def]
    """`TrigramTable.reinforce` on the arrays; a raised successor moves forward so that the row stays sorted."""
    for i in range(len(window) - 2):
        key = (window[i] << 32) | window[i + 1]
        slot = find_slot(rows.slot_keys, key)
        if rows.slot_keys[slot] != key:
            start, length = find_row(rows, key)
            rows.slot_keys[slot] = key
            rows.used[1] += 1
            move_row(rows, slot, start, length)
        length = rows.slot_lengths[slot]
        if length == rows.slot_capacities[slot]:
            move_row(rows, slot, rows.slot_starts[slot], length)
        start = rows.slot_starts[slot]
        token = window[i + 2]
        at = start
        while at < start + length and rows.tokens[at] != token:
            at += 1
        score = increment
        if at == start + length:
            rows.slot_lengths[slot] = length + 1
            rows.used[2] = max(rows.used[2], length + 1)
        else:
            score = rows.scores[at] + increment
        score = min(score, cap)
        while at > start and rows.scores[at - 1] < score:
            rows.tokens[at], rows.scores[at] = rows.tokens[at - 1], rows.scores[at - 1]
            at -= 1
        rows.tokens[at], rows.scores[at] = token, score
