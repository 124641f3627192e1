"""Running a recipe: each step in a folder of its own, finished by one rename, so that nothing half-written is ever read."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from grainwise import data, zoo
from grainwise.recipe import measure
from grainwise.recipe.report import write_report
from grainwise.recipe.schema import Plan, PlannedStep
from grainwise.recipe_state import RecipeState, silent

UNCHANGED_BY = {"select": ("perplexity", "bytes", "tokens_per_second"), "decode": ("perplexity", "bytes")}


def run_recipe(plan: Plan, out: Path, *, fresh: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run `plan` into the folder `out` and return the metrics, which are also in `out/metrics.json`.

    A run that was interrupted goes on after the last finished step. Raises ValueError if `out` holds another recipe's run
    (`fresh=True` deletes it first).
    """
    console = console or Console(stderr=True)
    _prepare(plan, out, fresh)
    rows = _finished(plan, out)
    if len(rows) == len(plan.steps) and (out / "metrics.json").is_file() and (out / "report.html").is_file():
        console.print(f"{out} is complete already: {out / 'report.html'}", highlight=False)
        return json.loads((out / "metrics.json").read_text())
    if rows:
        console.print(f"resuming after step {len(rows)} of {len(plan.steps)}", highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        whole = bars.add_task("loading", total=len(plan.steps), completed=len(rows))
        torch.manual_seed(plan.recipe.seed)
        state, start = _load(plan, out, rows)
        for index in range(len(rows), len(plan.steps)):
            step = plan.steps[index]
            bars.update(whole, description=f"{index + 1}/{len(plan.steps)} {step.name}")
            before = rows[-1]["after"] if rows else start["figures"]
            rows.append(_run_step(plan, step, state, out, index, before, bars))
            bars.update(whole, completed=index + 1)
        bars.update(whole, description="writing the report")
        metrics = _finish(plan, state, out, start, rows)
    _print_summary(metrics, out, console)
    return metrics


def _prepare(plan: Plan, out: Path, fresh: bool) -> None:
    """Make or take over the output folder; leftovers of an interrupted step are removed."""
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    mark = out / "recipe.json"
    if mark.is_file():
        if json.loads(mark.read_text())["fingerprint"] != plan.fingerprint:
            raise ValueError(f"{out} holds the run of another recipe: give --out another folder, or --fresh to replace it")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no recipe run: give --out another folder")
    (out / "steps").mkdir(parents=True, exist_ok=True)
    for leftover in out.rglob("*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    _write(mark, json.dumps({"fingerprint": plan.fingerprint, "recipe": plan.recipe.model_dump()}, indent=1))
    _write(out / "recipe.yaml", plan.text)


def _step_folder(out: Path, index: int, step: PlannedStep) -> Path:
    return out / "steps" / f"{index + 1:02d}-{step.name}"


def _finished(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """The metrics rows of the steps that are done, in order, up to the first that is not."""
    rows = []
    for index, step in enumerate(plan.steps):
        file = _step_folder(out, index, step) / "step.json"
        if not file.is_file():
            break
        rows.append(json.loads(file.read_text()))
    return rows


def _load(plan: Plan, out: Path, rows: list[dict[str, Any]]) -> tuple[RecipeState, dict[str, Any]]:
    """The state after the finished steps, and the figures and sample from before the first one."""
    folders = [_step_folder(out, i, s) for i, s in enumerate(plan.steps[: len(rows)])]
    source = zoo.resolve(plan.recipe.model)
    model = _load_model(str(_last(folders, "model") or source), getattr(torch, plan.recipe.dtype))
    adapter = _last(folders, "adapter")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train_file = _last(folders, "train.parquet")
    train = Dataset.from_parquet(str(train_file)) if train_file else _rows(plan, "train")
    state = RecipeState(model, tokenizer, train, _rows(plan, "test"), plan.recipe.seed, out)
    state.measure_blocks = measure.test_blocks(state, plan.recipe)
    for folder, step in zip(folders, plan.steps):
        if step.kind == "decode":
            state.folder = folder
            importlib.import_module(step.card.module).recipe_restore(state, **step.options)
    file = out / "start.json"
    if not file.is_file():
        start = {"figures": measure.measure(state, plan.recipe), "sample": measure.sample_text(state)}
        _write(file, json.dumps(start, indent=1))
    return state, json.loads(file.read_text())


def _load_model(source: str, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    except SafetensorError as error:
        raise ValueError(f"the weights of the model in {source} cannot be read: {error}. Is the file complete?") from error


def _rows(plan: Plan, split: str) -> Dataset:
    found = data.load(getattr(plan.recipe.data, split), split)
    limit = getattr(plan.recipe.data, f"{split}_limit")
    return found if limit is None else found.select(range(min(limit, len(found))))


def _last(folders: list[Path], name: str) -> Path | None:
    return next((f / name for f in reversed(folders) if (f / name).exists()), None)


def _run_step(
    plan: Plan, step: PlannedStep, state: RecipeState, out: Path, index: int, before: dict[str, Any], bars: Progress
) -> dict[str, Any]:
    """Run one step into `<folder>.partial`, measure, save what it changed, rename."""
    folder = _step_folder(out, index, step)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    inner = bars.add_task(f"  {step.name}", total=None)
    state.folder = partial
    state.progress = lambda done, total, what: bars.update(inner, completed=done, total=total, description=f"  {what}")
    base, train = _base(state.model), state.train
    torch.manual_seed(state.seed)
    started = time.perf_counter()
    with measure.PeakMemory() as memory:
        figures = importlib.import_module(step.card.module).recipe_step(state, **step.options)
    seconds = time.perf_counter() - started
    state.progress = silent
    state.model.eval()
    bars.update(inner, description=f"  measuring after {step.name}")
    kept = {k: before[k] for k in UNCHANGED_BY.get(step.kind, ()) if k in before}
    after = measure.measure(state, plan.recipe, keep=kept)
    if "peak_memory" in after:
        after["peak_memory"] = memory.peak
    row = {
        "name": f"{index + 1}-{step.name}",
        "system": step.card.slug,
        "seconds": round(seconds, 2),
        "before": before,
        "after": after,
        "figures": figures,
    }
    try:
        _save(step, state, partial, base_changed=_base(state.model) is not base, train_changed=state.train is not train)
        _write(partial / "step.json", json.dumps(row, indent=1))
        os.rename(partial, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save step {step.name} to {folder}: {error}. The steps before it are kept") from error
    state.folder = folder
    bars.remove_task(inner)
    return row


def _save(step: PlannedStep, state: RecipeState, folder: Path, *, base_changed: bool, train_changed: bool) -> None:
    """Write what a step changed: `model/`, `adapter/`, `train.parquet`."""
    if step.kind in ("compress", "attend") or base_changed:
        _base(state.model).save_pretrained(folder / "model")
        state.tokenizer.save_pretrained(folder / "model")
    if step.kind in ("adapt", "merge") and isinstance(state.model, PeftModel):
        state.model.save_pretrained(str(folder / "adapter"))
    if train_changed:
        state.train.to_parquet(str(folder / "train.parquet"))


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _finish(plan: Plan, state: RecipeState, out: Path, start: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the results where others look for them: `model/`, `adapter/`, `metrics.json`, `report.html`."""
    folders = [_step_folder(out, i, s) for i, s in enumerate(plan.steps)]
    for name in ("model", "adapter"):
        source = _last(folders, name)
        if source is not None:
            partial = out / f"{name}.partial"
            shutil.rmtree(out / name, ignore_errors=True)
            shutil.copytree(source, partial)
            os.rename(partial, out / name)
    config_file = out / "adapter" / "adapter_config.json"
    if config_file.is_file():
        base = out / "model"
        config = json.loads(config_file.read_text())
        config["base_model_name_or_path"] = str(base.resolve()) if base.is_dir() else zoo.resolve(plan.recipe.model)
        _write(config_file, json.dumps(config, indent=2, sort_keys=True))
    metrics = {"recipe": plan.recipe.model_dump(), "steps": rows, "environment": environment()}
    samples = {"before": start["sample"], "after": measure.sample_text(state)}
    write_report(out / "report.html", plan.name, metrics, start["figures"], samples)
    _write(out / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "numpy")},
        "command": " ".join(["grainwise", *sys.argv[1:]]),
    }


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _print_summary(metrics: dict[str, Any], out: Path, console: Console) -> None:
    for row in metrics["steps"]:
        changes = []
        for name, after in row["after"].items():
            before = row["before"].get(name)
            if name != "peak_memory" and before is not None and before != after:
                changes.append(f"{name} {before:.6g} -> {after:.6g}")
        console.print(f"{row['name']:24} {row['seconds']:6.1f} s  {', '.join(changes)}", highlight=False, markup=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False)
