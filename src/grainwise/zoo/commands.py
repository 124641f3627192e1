"""`grainwise zoo train` and `grainwise zoo check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grainwise import zoo
from grainwise.naming import did_you_mean
from grainwise.zoo.specs import SPECS

TOLERANCE = 0.02  # relative: other processors round bf16 products differently


def train(name: str, out: Path | None, *, compiled: bool, console: Console) -> dict[str, Any]:
    """Train a zoo model with a progress bar; the shared tokenizer is reused when another model has it already."""
    short = name.removeprefix(zoo.PREFIX)
    if short not in SPECS:
        raise ValueError(f"no zoo model {name!r}. {did_you_mean(short, SPECS)}")
    from transformers import AutoTokenizer

    from grainwise.zoo import language

    trained = [n for n in zoo.names() if n in SPECS]
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(trained[0])) if trained else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("reading text", total=None)
        return language.train(
            SPECS[short],
            out or zoo.WEIGHTS / short,
            tokenizer=tokenizer,
            compiled=compiled,
            progress=lambda done, total, what: bars.update(task, completed=done, total=total, description=what),
        )


def check(names: list[str], console: Console) -> None:
    """Measure shipped models again; raises ValueError naming each figure that is off by more than `TOLERANCE`."""
    from grainwise.zoo.language import measure

    wrong = []
    for name in names or zoo.names():
        recorded = zoo.metrics(name)
        for key, value in measure(Path(zoo.path(name))).items():
            if not isinstance(value, float):
                continue
            close = abs(value - recorded[key]) <= TOLERANCE * abs(recorded[key])
            verdict = "ok" if close else "DIFFERS"
            console.print(f"{name} {key}: recorded {recorded[key]}, now {value} {verdict}", highlight=False)
            if not close:
                wrong.append(f"{name} {key}")
    if wrong:
        raise ValueError("measured figures differ from the recorded ones: " + ", ".join(wrong))
