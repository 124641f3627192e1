"""`report.html`: one self-contained page that shows what every step of a recipe did."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grainwise.catalog import card
from grainwise.recipe.folders import write_text
from grainwise.recipe.plots import bar_plot, human, path_plot, percent


@dataclass(frozen=True)
class Words:
    """How the report speaks of a figure."""

    title: str
    caption: str = ""
    unit: str = ""
    lower_is_better: bool = False
    share: bool = False  # a figure between 0 and 1


FIGURES = {  # in the order of the table
    "accuracy": Words("accuracy", "Share of test pictures of the known classes that are named rightly.", share=True),
    "ood_near": Words("near novelties", "AUROC of the confidence: known test pictures against unknown siblings.", share=True),
    "ood_far": Words("far novelties", "AUROC of the confidence: known test pictures against quite other things.", share=True),
    "images_per_second": Words("images per second", "Test pictures through the recogniser of each step."),
    "perplexity": Words("perplexity", lower_is_better=True),
    "bytes": Words("size of the model", "Weights that the model of each step reads.", "bytes", True),
    "peak_memory": Words("peak memory", "Largest resident memory of the process during each step.", "bytes", True),
    "tokens_per_second": Words("tokens per second", "Greedy decoding of held-out prompts after each step."),
    "train_text": Words("training text", "Text that the next step may train on.", "bytes", True),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e5e7eb }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.n { text-align: right }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; margin-top: 1.4rem }
figure { margin: 0 } figcaption { color: #6b7280; font-size: .85rem }
.better { color: #0f766e } .worse { color: #b45309 } .quiet { color: #6b7280 }
pre { background: #f9fafb; border: 1px solid #e5e7eb; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .82rem }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem }
"""


def write_report(
    file: Path,
    name: str,
    metrics: dict[str, Any],
    start: dict[str, float],
    *,
    subject: str,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    style: str = "",
) -> None:
    """Write the page. start: figures before the first step; subject: the data in words; before, after: the task's own
    sections around the table, the plots and the steps' figures; style: further CSS.
    """
    steps = metrics["steps"]
    sections = [
        f"<h1>Recipe “{html.escape(name)}”</h1>",
        f'<p class="quiet">{html.escape(metrics["recipe"]["model"])} on {html.escape(subject)}, '
        f"{len(steps)} steps in {sum(s['seconds'] for s in steps):.0f} s, seed {metrics['recipe']['seed']}</p>",
        *before,
        _table(steps, start),
        '<div class="plots">' + "".join(_plots(steps, start)) + "</div>",
        "<h2>What each step reports</h2>",
        _details(steps),
        *after,
        "<h2>Recipe and environment</h2>",
        f"<pre>{html.escape(json.dumps(metrics['recipe'], indent=1))}</pre>",
        f"<pre>{html.escape(json.dumps(metrics['environment'], indent=1))}</pre>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: Grainwise report</title>'
        f"<style>{STYLE}{style}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    write_text(file, page)


def shown(name: str, value: float) -> str:
    """A figure for people."""
    words = FIGURES[name]
    return percent(value) if words.share else human(value, words.unit)


def _table(steps: list[dict[str, Any]], start: dict[str, float]) -> str:
    names = [n for n in FIGURES if n in start]
    head = "".join(f'<th class="n">{FIGURES[n].title}</th>' for n in names)
    first = "".join(f'<td class="n">{shown(n, start[n])}</td>' for n in names)
    rows = [f"<tr><td>start</td><td></td>{first}</tr>"]
    for step in steps:
        cells = "".join(_cell(n, step["before"].get(n), step["after"][n]) for n in names)
        rows.append(f'<tr><td>{html.escape(step["name"])}</td><td class="n">{step["seconds"]:.1f} s</td>{cells}</tr>')
    return f'<table><tr><th>after</th><th class="n">time</th>{head}</tr>{"".join(rows)}</table>'


def _cell(name: str, before: float | None, after: float) -> str:
    words, mark = FIGURES[name], ""
    if before and before != after:
        better = (after < before) == words.lower_is_better
        change = f"{100 * (after - before):+.1f}" if words.share else f"{(after - before) / before:+.1%}"
        mark = f' <span class="{"better" if better else "worse"}">{change}</span>'
    return f'<td class="n">{shown(name, after)}{mark}</td>'


def _plots(steps: list[dict[str, Any]], start: dict[str, float]) -> list[str]:
    states = [("start", start), *((s["name"], s["after"]) for s in steps)]
    figures = []
    if {"perplexity", "bytes"} <= set(start):
        points = [(n, f["bytes"], f["perplexity"]) for n, f in states]
        plot = path_plot(points, "size of the model", "perplexity", "bytes")
        figures.append(figure(plot, "Quality against size: lower left is better."))
    for name, words in FIGURES.items():
        if words.caption and name in start and len({f[name] for _, f in states}) > 1 and not (name == "bytes" and figures):
            plot = bar_plot([(n, f[name]) for n, f in states], words.title, words.unit, share=words.share)
            figures.append(figure(plot, words.caption))
    return figures


def figure(content: str, caption: str) -> str:
    """A picture or plot with its caption."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _details(steps: list[dict[str, Any]]) -> str:
    rows = []
    for step in steps:
        summary = html.escape(card(step["system"]).summary)
        figures = ", ".join(f"{k.replace('_', ' ')}: <b>{_plain(v)}</b>" for k, v in step["figures"].items())
        rows.append(f'<tr><td>{html.escape(step["name"])}</td><td><span class="quiet">{summary}</span><br>{figures}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))
