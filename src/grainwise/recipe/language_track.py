"""Recipes for language models: a model, an adapter and a decoder, measured on held-out text."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from grainwise import data, zoo
from grainwise.recipe import measure
from grainwise.recipe.fields import Recipe
from grainwise.recipe.folders import last, write_text
from grainwise.recipe.report import write_report
from grainwise.recipe.schema import PlannedStep
from grainwise.recipe.track import Track
from grainwise.recipe_state import RecipeState


class LanguageTrack(Track[RecipeState]):
    """Steps change the model, the adapter on it, the training text or the way of decoding."""

    unchanged: ClassVar[dict[str, tuple[str, ...]]] = {
        "select": ("perplexity", "bytes", "tokens_per_second"),
        "decode": ("perplexity", "bytes"),
    }

    @property
    def recipe(self) -> Recipe:
        """The recipe's fields."""
        assert isinstance(self.plan.recipe, Recipe)
        return self.plan.recipe

    def load(self, folders: list[Path]) -> None:
        source = zoo.resolve(self.recipe.model)
        model = load_model(str(last(folders, "model") or source), getattr(torch, self.recipe.dtype))
        adapter = last(folders, "adapter")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        train_file = last(folders, "train.parquet")
        train = Dataset.from_parquet(str(train_file)) if train_file else self._rows("train")
        self.state = RecipeState(model, tokenizer, train, self._rows("test"), self.recipe.seed, self.out)
        self.state.measure_blocks = measure.test_blocks(self.state, self.recipe)
        for folder, step in zip(folders, self.plan.steps):
            if step.kind == "decode":
                self.state.folder = folder
                self.restore(step)

    def start(self) -> dict[str, Any]:
        return {"figures": self.measure(), "sample": measure.sample_text(self.state)}

    def measure(self, keep: dict[str, Any] | None = None) -> dict[str, float]:
        self.state.model.eval()
        return measure.measure(self.state, self.recipe, keep=keep)

    def mark(self) -> Any:
        return base_of(self.state.model), self.state.train

    def save(self, step: PlannedStep, folder: Path, before: Any) -> None:
        """`model/`, `adapter/`, `train.parquet`."""
        base, train = before
        state = self.state
        if step.kind in ("compress", "attend") or base_of(state.model) is not base:
            base_of(state.model).save_pretrained(folder / "model")
            state.tokenizer.save_pretrained(folder / "model")
        if step.kind in ("adapt", "merge") and isinstance(state.model, PeftModel):
            state.model.save_pretrained(str(folder / "adapter"))
        if state.train is not train:
            state.train.to_parquet(str(folder / "train.parquet"))

    def finish(self, folders: list[Path]) -> None:
        """`model/` and `adapter/`, the adapter pointing at its base."""
        for name in ("model", "adapter"):
            source = last(folders, name)
            if source is not None:
                partial = self.out / f"{name}.partial"
                shutil.rmtree(self.out / name, ignore_errors=True)
                shutil.copytree(source, partial)
                os.rename(partial, self.out / name)
        config_file = self.out / "adapter" / "adapter_config.json"
        if config_file.is_file():
            base = self.out / "model"
            config = json.loads(config_file.read_text())
            config["base_model_name_or_path"] = str(base.resolve()) if base.is_dir() else zoo.resolve(self.recipe.model)
            write_text(config_file, json.dumps(config, indent=2, sort_keys=True))

    def report(self, file: Path, metrics: dict[str, Any], start: dict[str, Any], folders: list[Path]) -> None:
        samples = (
            "<h2>What the model writes after the same prompt</h2>"
            f'<div class="pair"><div><b>before</b><pre>{html.escape(start["sample"])}</pre></div>'
            f"<div><b>after</b><pre>{html.escape(measure.sample_text(self.state))}</pre></div></div>"
        )
        write_report(file, self.plan.name, metrics, start["figures"], subject=self.recipe.data.subject, after=[samples])

    def _rows(self, split: str) -> Dataset:
        found = data.load(getattr(self.recipe.data, split), split)
        limit = getattr(self.recipe.data, f"{split}_limit")
        return found if limit is None else found.select(range(min(limit, len(found))))


def load_model(source: str, dtype: torch.dtype) -> Any:
    """The model in evaluation mode. Raises ValueError for a damaged weight file."""
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    except SafetensorError as error:
        raise ValueError(f"the weights of the model in {source} cannot be read: {error}. Is the file complete?") from error


def base_of(model: Any) -> Any:
    """The model under an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
