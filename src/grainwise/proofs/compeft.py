"""The claim of ComPEFT, shown on LoRA experts of a small Llama: ten times smaller at once, and better than what else fits.

Three domains that the base model has not seen: Python source code, text in capitals, and generated records. One LoRA expert
is trained on each. The code expert is compressed by every method, each tuned on the same validation blocks, and compared at
equal bytes of real files; the three experts together are merged, compressed and dense.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grainwise.merge import compeft_baselines as baselines
from grainwise.merge.compeft import TernaryDelta
from grainwise.merge.merging import task_arithmetic, ties_merge
from grainwise.merge.task_delta import Delta, TaskDelta
from grainwise.proofs.frame import Proof

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DOMAINS = ("code", "capitals", "records")
LENGTH = 128  # tokens of a block
SKIPPED = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"})
Loss = Callable[[Delta], float]


@dataclass(frozen=True)
class Plan:
    """How much of everything. The smoke form runs the same path with next to nothing."""

    model: str
    steps: int
    batch: int
    train_blocks: int
    tuning_blocks: int
    test_blocks: int


FULL = Plan("llama-mini", steps=60, batch=8, train_blocks=600, tuning_blocks=24, test_blocks=64)
SMOKE = Plan("llama-nano", steps=3, batch=2, train_blocks=12, tuning_blocks=2, test_blocks=4)
LEARNING_RATE = 3e-3
RANK = 8
ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.lru_cache(maxsize=1)
def source_code() -> dict[str, list[str]]:
    """Split -> Python sources of the standard library, one in three modules, without comments and docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        if SKIPPED.intersection(name.parts) or digest[1] % 3 or not 2_000 < path.stat().st_size < 30_000:
            continue
        split = {0: "test", 1: "validation"}.get(digest[0] % 8, "train")
        found[split].append(without_docstrings(path.read_text(encoding="utf-8")))
    return found


def without_docstrings(source: str) -> str:
    """The code alone, in one formatting: the base model knows docstrings, code is new to it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:  # type: ignore[arg-type]
            node.body = node.body[1:] or [ast.Pass()]  # type: ignore[union-attr]
    return ast.unparse(tree)


def records(split: str) -> Iterator[str]:
    """Generated order records as JSON lines, different in every split."""
    draw = random.Random(split)
    items = ("lamp", "desk", "chair", "shelf", "cable", "screen", "keyboard", "folder")
    for number in range(600):
        yield json.dumps({
            "order": draw.randrange(10**6), "item": draw.choice(items), "count": draw.randint(1, 40),
            "price": round(draw.uniform(1, 500), 2), "paid": draw.random() < 0.7, "line": number,
        })  # fmt: skip


def texts(domain: str, split: str) -> list[dict[str, str]]:
    """The rows of one domain."""
    from grainwise.data import load

    if domain == "code":
        return [{"text": t} for t in source_code()[split]]
    if domain == "records":
        return [{"text": t} for t in records(split)]
    return [{"text": t.upper()} for t in load("pydoc", split)["text"][:150]]


def domain_blocks(domain: str, split: str, count: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
    """`count` blocks of a domain drawn by `seed`, long tensor (count, LENGTH)."""
    from grainwise.data import blocks

    found = blocks(texts(domain, split), tokenizer, LENGTH)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]


def attach(plan: Plan, seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model under a fresh LoRA."""
    from peft import LoraConfig, get_peft_model

    from grainwise import zoo

    base, tokenizer = zoo.load(plan.model)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config), tokenizer


def train_expert(model: PeftModel, init: dict[str, Tensor], blocks: Tensor, plan: Plan, seed: int) -> Delta:
    """Train the LoRA from its initial state on the blocks; the update holds copies."""
    from grainwise.merge.peft_adapters import load_adapter
    from grainwise.training import batches_of, train_lm

    load_adapter(model, init)
    train_lm(model, batches_of(blocks, plan.batch, plan.steps, seed), steps=plan.steps, lr=LEARNING_RATE)
    return TaskDelta.of(model)


def loss_of(model: PeftModel, blocks: Tensor) -> Loss:
    """The mean loss over blocks with an update loaded."""
    from grainwise.evaluate.language import mean_loss

    def measure(delta: Delta) -> float:
        delta.load_into(model, force=True)
        return mean_loss(model, blocks)

    return measure
