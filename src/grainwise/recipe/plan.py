"""`--dry-run`: what a recipe would do, with estimates of time and memory from counted work and a measured speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from grainwise import data, zoo
from grainwise.recipe.fields import VisionRecipe
from grainwise.recipe.measure import NEW_TOKENS, PROMPTS
from grainwise.recipe.schema import Plan, PlannedStep

BYTES_PER_TOKEN = 3.3  # of text, for the estimate only
ACTIVATIONS = 40  # bytes per token and hidden unit and layer that training keeps, a rule of thumb
PROCESS = 600e6  # the libraries themselves


@dataclass(frozen=True)
class Estimate:
    """Seconds and peak bytes of one step, each with its measurement afterwards."""

    name: str
    seconds: float
    memory: float
    why: str


def measured_flops(seconds: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of this machine at a medium product, about half of which small models reach."""
    a = torch.randn(512, 1024, dtype=dtype)
    b = torch.randn(1024, 1024, dtype=dtype)
    a @ b
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 0.5 * count * 2 * 512 * 1024 * 1024 / (time.perf_counter() - started)


def estimate(plan: Plan) -> list[Estimate]:
    """An estimate per step, in order."""
    return _vision(plan, plan.recipe) if isinstance(plan.recipe, VisionRecipe) else _language(plan)


def _language(plan: Plan) -> list[Estimate]:
    assert not isinstance(plan.recipe, VisionRecipe)
    config = AutoConfig.from_pretrained(zoo.resolve(plan.recipe.model))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    rows = data.load(plan.recipe.data.train, "train")
    size = sum(len(data.row_text(r)) for r in rows)
    tokens = size / BYTES_PER_TOKEN
    speed = measured_flops()
    width = 2 if plan.recipe.dtype == "bfloat16" else 4
    found = []
    for step in plan.steps:
        work, memory, why = _work(step, parameters, tokens, config.hidden_size, config.num_hidden_layers)
        if step.kind == "select":
            tokens *= step.options.get("fraction") or 1.0
        measuring = 2 * parameters * (plan.recipe.measure_tokens + 2 * PROMPTS * NEW_TOKENS * 8)
        found.append(Estimate(step.name, (work + measuring) / speed + 1.0, PROCESS + parameters * width + memory, why))
    return found


def _work(step: PlannedStep, parameters: int, tokens: float, hidden: int, layers: int) -> tuple[float, float, str]:
    """(FLOPs, bytes beside the weights, reason) of one step."""
    o = step.options
    if step.kind == "adapt":
        batch = o.get("batch_size", 8) * o.get("length", 256)
        steps = o.get("steps") or max(1, round(o.get("epochs", 1.0) * tokens / batch))
        memory = batch * (hidden * layers * ACTIVATIONS + 12 * 4096)
        return 6.0 * parameters * steps * batch, memory, f"{steps} training steps of {batch} tokens"
    if step.kind == "select":
        return 2.0 * parameters * tokens, tokens / 500 * hidden * 8, f"one pass over {tokens:,.0f} tokens"
    if step.kind == "merge":
        return 2.0 * parameters * 20_000 * 9, parameters * 0.1, "a small grid of held-out evaluations"
    if step.kind == "decode":
        return 1e9, tokens * 16, f"a table over {tokens:,.0f} tokens"
    return 30.0 * parameters * hidden, parameters * 4.0, f"{parameters:,} weights"


def _vision(plan: Plan, recipe: VisionRecipe) -> list[Estimate]:
    """Counted passes through the image tower."""
    from grainwise.recipe.vision_data import counts

    config = AutoConfig.from_pretrained(zoo.resolve(recipe.model)).vision_config
    tokens, width, depth = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size, config.num_hidden_layers
    look = 2.0 * tokens * depth * (4 * width**2 + 2 * width * config.intermediate_size + 2 * tokens * width)
    weights = 4.0 * depth * (4 * width**2 + 2 * width * config.intermediate_size)
    kept = tokens * width * depth * ACTIVATIONS  # bytes that training keeps of one look
    train, measured = counts(recipe)
    speed = measured_flops(dtype=torch.float32)
    looks, found = 1, []
    for step in plan.steps:
        o = step.options
        looks = 2 if "top_k" in o else looks  # a recogniser that looks again, also in the steps after it
        batch, arms = o.get("batch_size", 0), 1 + ("outliers" in step.needs)
        passes, why = _passes(o, train, arms)
        seconds = (passes * looks + measured * looks * (step.kind == "recognize")) * look / speed + 1.0
        found.append(Estimate(step.name, seconds, PROCESS + 4 * weights + batch * arms * looks * kept, why))
    return found


def _passes(o: dict[str, Any], train: int, arms: int) -> tuple[float, str]:
    """(forward passes that a step's work is worth, reason); arms: batches of a training step."""
    if "epochs" in o:
        return 3.0 * o["epochs"] * train * arms, f"{o['epochs']} epochs of {train} pictures"
    if "grid" in o:
        regions = -(-(o["grid"] ** 2) // o["per_region"])
        return o["pictures"] * (regions * (regions + 1) + 70.0), f"{o['pictures']} pictures of {regions} regions"
    views = o.get("views", 1)
    return float(views * train), f"{views} views of {train} pictures"


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as a table; nothing is trained or written."""
    table = Table(title=f"plan of {plan.name}: {plan.recipe.model}, seed {plan.recipe.seed}", title_justify="left")
    for column in ("step", "options", "about", "peak memory", "why"):
        table.add_column(column)
    estimates = estimate(plan)
    for step, e in zip(plan.steps, estimates):
        options = ", ".join(f"{k}={v}" for k, v in step.options.items())
        table.add_row(e.name, options, f"{e.seconds:.0f} s", f"{e.memory / 1e9:.1f} GB", e.why)
    console.print(table)
    console.print(f"in all about {sum(e.seconds for e in estimates):.0f} s; measures: {', '.join(plan.recipe.measure)}")
