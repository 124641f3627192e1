"""`report.html`: one self-contained page that shows what every step of a recipe did."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from grainwise.catalog import card
from grainwise.recipe.plots import bar_plot, human, path_plot

UNITS = {"bytes": "bytes", "peak_memory": "bytes", "train_text": "bytes"}
TITLES = {
    "perplexity": "perplexity",
    "bytes": "size of the model",
    "peak_memory": "peak memory",
    "tokens_per_second": "tokens per second",
    "train_text": "training text",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e5e7eb }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.n { text-align: right }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem }
figure { margin: 0 } figcaption { color: #6b7280; font-size: .85rem }
.better { color: #0f766e } .worse { color: #b45309 } .quiet { color: #6b7280 }
pre { background: #f9fafb; border: 1px solid #e5e7eb; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .82rem }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem }
"""
LOWER_IS_BETTER = {"perplexity", "bytes", "peak_memory", "train_text"}


def write_report(file: Path, name: str, metrics: dict[str, Any], start: dict[str, float], samples: dict[str, str]) -> None:
    """Write the page. start: figures before the first step; samples: model text before and after."""
    steps = metrics["steps"]
    sections = [
        f"<h1>Recipe “{html.escape(name)}”</h1>",
        f'<p class="quiet">{html.escape(metrics["recipe"]["model"])} on {html.escape(metrics["recipe"]["data"]["train"])}, '
        f"{len(steps)} steps in {sum(s['seconds'] for s in steps):.0f} s, seed {metrics['recipe']['seed']}</p>",
        _table(steps, start),
        '<div class="plots">' + "".join(_plots(steps, start)) + "</div>",
        "<h2>What each step reports</h2>",
        _details(steps),
        "<h2>What the model writes after the same prompt</h2>",
        f'<div class="pair"><div><b>before</b><pre>{html.escape(samples["before"])}</pre></div>'
        f"<div><b>after</b><pre>{html.escape(samples['after'])}</pre></div></div>",
        "<h2>Recipe and environment</h2>",
        f"<pre>{html.escape(json.dumps(metrics['recipe'], indent=1))}</pre>",
        f"<pre>{html.escape(json.dumps(metrics['environment'], indent=1))}</pre>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: Grainwise report</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, file)


def _table(steps: list[dict[str, Any]], start: dict[str, float]) -> str:
    names = [n for n in TITLES if n in start]
    head = "".join(f'<th class="n">{TITLES[n]}</th>' for n in names)
    first = "".join(f'<td class="n">{human(start[n], UNITS.get(n, ""))}</td>' for n in names)
    rows = [f"<tr><td>start</td><td></td>{first}</tr>"]
    for step in steps:
        cells = "".join(_cell(n, step["before"].get(n), step["after"][n]) for n in names)
        rows.append(f'<tr><td>{html.escape(step["name"])}</td><td class="n">{step["seconds"]:.1f} s</td>{cells}</tr>')
    return f'<table><tr><th>after</th><th class="n">time</th>{head}</tr>{"".join(rows)}</table>'


def _cell(name: str, before: float | None, after: float) -> str:
    text, mark = human(after, UNITS.get(name, "")), ""
    if before and before != after:
        better = (after < before) == (name in LOWER_IS_BETTER)
        mark = f' <span class="{"better" if better else "worse"}">{(after - before) / before:+.1%}</span>'
    return f'<td class="n">{text}{mark}</td>'


def _plots(steps: list[dict[str, Any]], start: dict[str, float]) -> list[str]:
    states = [("start", start), *((s["name"], s["after"]) for s in steps)]
    figures = []
    if {"perplexity", "bytes"} <= set(start):
        points = [(n, f["bytes"], f["perplexity"]) for n, f in states]
        plot = path_plot(points, "size of the model", "perplexity", "bytes")
        figures.append(_figure(plot, "Quality against size: lower left is better."))
    for name in ("tokens_per_second", "peak_memory", "train_text"):
        if name in start and len({f[name] for _, f in states}) > 1:
            plot = bar_plot([(n, f[name]) for n, f in states], TITLES[name], UNITS.get(name, ""))
            figures.append(_figure(plot, _CAPTIONS[name]))
    return figures


_CAPTIONS = {
    "tokens_per_second": "Greedy decoding of held-out prompts after each step.",
    "peak_memory": "Largest resident memory of the process during each step.",
    "train_text": "Text that the next step may train on.",
}


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


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
