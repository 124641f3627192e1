"""Training the language models of the zoo on real text: tokenizer, text mixture, training, metrics.

`grainwise zoo train NAME` runs `train`; what it writes is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grainwise.data.blocks import blocks
from grainwise.data.docstrings import library_documents, pydoc_split, without_overlap
from grainwise.training import Progress, train_lm
from grainwise.zoo.specs import LIBRARIES, PYDOC_REPEATS, SPECIAL_TOKENS, VOCABULARY, LanguageModelSpec

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def training_texts() -> tuple[list[str], list[str]]:
    """(standard-library text, library text): the training split, without any paragraph of the held-out splits."""
    held_out = pydoc_split("test") + pydoc_split("validation")
    libraries = without_overlap(library_documents(LIBRARIES), held_out)
    return [d.text for d in pydoc_split("train")], [d.text for d in libraries]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries; any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end, pad, mask, _ = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, bos_token=end, pad_token=pad, mask_token=mask, model_max_length=2048
    )


def build(spec: LanguageModelSpec, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, weights drawn from `spec.seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(spec.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.heads,
            intermediate_size=spec.intermediate_size,
            max_position_embeddings=spec.long_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=spec.hidden_size**-0.5 / 2,
        )
    )


def optimizers_for(model: LlamaForCausalLM, spec: LanguageModelSpec) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=spec.matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=spec.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batches(stream: Tensor, spec: LanguageModelSpec, steps: int) -> Iterator[dict[str, Tensor]]:
    """`steps` batches of `batch_tokens`: random windows of the stream, longer ones in the last `long_share` of the steps."""
    generator = torch.Generator().manual_seed(spec.seed)
    for step in range(steps):
        length = spec.long_length if step >= steps * (1 - spec.long_share) else spec.length
        starts = torch.randint(len(stream) - length, (spec.batch_tokens // length,), generator=generator)
        ids = stream[starts[:, None] + torch.arange(length)]
        yield {"input_ids": ids, "labels": ids}


def train(
    spec: LanguageModelSpec,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    compiled: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Train `spec`, write it to `out` as bf16 safetensors with its tokenizer and `metrics.json`, and return the metrics.

    tokenizer: the zoo's shared tokenizer; trained on the training text when None. compiled: use `torch.compile`
    (needs a C++ compiler; about 1.5 times faster on CPU).
    """
    started = time.perf_counter()
    standard, libraries = training_texts()
    tokenizer = tokenizer or train_tokenizer(standard + libraries)
    mixture = standard * PYDOC_REPEATS + libraries
    order = torch.randperm(len(mixture), generator=torch.Generator().manual_seed(spec.seed)).tolist()
    stream = blocks(({"text": mixture[i]} for i in order), tokenizer, length=1).flatten()
    model = build(spec, tokenizer)
    steps = spec.tokens // spec.batch_tokens
    record = train_lm(
        torch.compile(model) if compiled else model,
        batches(stream, spec, steps),
        steps=steps,
        optimizers=optimizers_for(model, spec),
        warmup=0.03,
        schedule="linear",
        autocast=torch.bfloat16,
        progress=progress,
    )
    save(model, tokenizer, out)
    metrics = (
        measure(out)
        | ngram_baseline(tokenizer, standard, libraries)
        | {
            "name": spec.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_tokens": steps * spec.batch_tokens,
            "training_seconds": round(time.perf_counter() - started, 1),
            "final_training_loss": round(sum(record.losses[-50:]) / len(record.losses[-50:]), 4),
            "seed": spec.seed,
            "script": f"grainwise zoo train {spec.name}",
            "text": "pydoc train split and docstrings of " + ", ".join(LIBRARIES),
        }
    )
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def ngram_baseline(
    tokenizer: PreTrainedTokenizerFast, standard: list[str], libraries: list[str], order: int = 5
) -> dict[str, float]:
    """Bits per byte of a Kneser-Ney `order`-gram over the same tokens on the pydoc test split.

    The better of two: trained on all the training text, and on the standard library's part alone.
    """
    from grainwise.data import load
    from grainwise.evaluate.ngram import KneserNey

    rows = load("pydoc", "test")
    test = blocks(rows, tokenizer, 1).flatten().numpy()
    size = sum(len(row["text"].encode()) for row in rows)
    figures = []
    for texts in (standard + libraries, standard):
        stream = blocks(({"text": t} for t in texts), tokenizer, 1).flatten().numpy()
        model = KneserNey(order, len(tokenizer)).fit(stream)
        figures.append(-float(model.log2_probabilities(test).sum()) / size)
    return {f"kneser_ney_{order}gram_bits_per_byte": round(min(figures), 4)}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder whole or not at all: to a temporary name first, then renamed."""
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def measure(folder: Path) -> dict:
    """Held-out figures of a saved model: bits per byte and perplexity on the pydoc test split."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grainwise.data import load
    from grainwise.evaluate.language import bits_per_byte, perplexity

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load("pydoc", "test")
    return {
        "test": "pydoc test split",
        "bits_per_byte": round(bits_per_byte(model, rows, tokenizer, autocast=torch.bfloat16), 4),
        "perplexity_512": round(perplexity(model, blocks(rows, tokenizer, 512), autocast=torch.bfloat16), 3),
    }
