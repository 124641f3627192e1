"""What each zoo model is: its shape, its text and its training, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModelSpec:
    """A Llama-class causal LM of the zoo. Lengths in tokens; `tokens` is how many it is trained on."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    tokens: int
    matrix_lr: float  # rate of Muon, for the matrices inside the blocks
    other_lr: float  # rate of AdamW, for embeddings and norms
    batch_tokens: int = 8192
    length: int = 512
    long_length: int = 2048
    long_share: float = 0.15  # the last share of the steps reads longer blocks, so that long contexts mean something
    seed: int = 0


VOCABULARY = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|image|>")
LIBRARIES = ("numpy", "scipy", "sklearn", "pandas", "torch")  # docstrings of dependencies, beside the standard library's
PYDOC_REPEATS = 4  # epochs over the standard library's text for each one over the libraries'

SPECS: dict[str, LanguageModelSpec] = {
    s.name: s
    for s in (
        LanguageModelSpec("llama-mini", 256, 6, 4, 704, tokens=9_000_000, matrix_lr=6e-3, other_lr=3e-3),
        LanguageModelSpec("llama-draft", 128, 3, 2, 352, tokens=5_000_000, matrix_lr=8e-3, other_lr=5e-3),
        LanguageModelSpec("llama-nano", 32, 2, 2, 96, tokens=3_000_000, matrix_lr=1e-2, other_lr=1e-2),
    )
}
