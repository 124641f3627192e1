"""Fixtures of the room: a character tokenizer for the tiny Llama, and separated blobs."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def characters():
    """A tokenizer with one token per printable character; 97 entries: begin 0, end 1, padding 2."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = ["\n"] + [chr(c) for c in range(32, 125)]
    words = ["<s>", "</s>", "<pad>", *letters]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges=[]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def blobs():
    """(embeddings float32 (240, 8), which of 6 blobs each row is from); sizes 10 to 80."""
    rng = np.random.default_rng(0)
    sizes = [80, 60, 40, 30, 20, 10]
    labels = np.repeat(np.arange(6), sizes)
    centers = np.concatenate([10 * np.eye(8)[:6]])
    order = rng.permutation(240)
    return (centers[labels] + 0.3 * rng.standard_normal((240, 8)))[order].astype(np.float32), labels[order]
