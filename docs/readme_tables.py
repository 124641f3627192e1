"""Write the tables of README.md from the records: `python docs/readme_tables.py`.

What lies between `<!-- NAME -->` and `<!-- /NAME -->` is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grainwise import zoo
from grainwise.catalog import cards
from grainwise.proofs import frame

README = Path(__file__).parents[1] / "README.md"
USES = {
    "llama-mini": "target of decoding and compression",
    "llama-draft": "draft model",
    "llama-nano": "tests",
    "vit-mini": "a vision transformer that knows genera",
    "dino-mini": "patch tokens that correspond between individuals, learnt without labels",
    "clip-mini": "pictures and descriptions in one space",
    "sam-mini": "masks from points and boxes",
    "detr-mini": "boxes of the kinds of things",
    "llava-mini": "answers about scenes",
}
FIGURES = {  # recorded figure -> how a reader would say it
    "bits_per_byte": "{:.3f} bits per byte on held-out text",
    "genus_accuracy": "{:.0%} of held-out pictures by genus",
    "part_correspondence": "{:.0%} of patches find the same part in another individual",
    "zero_shot_unseen_species": "{:.0%} of unseen species named by description (chance 1%)",
    "point_iou": "mean IoU {:.2f} for one point",
    "ap50": "AP50 {:.2f}",
    "answers_right": "{:.0%} of questions answered",
}


def proofs() -> str:
    """One row for each system with a recorded proof."""
    rows = ["| system | metric | baseline | baseline's mean | ours | verdict |", "|---|---|---|---|---|---|"]
    for slug in frame.available():
        result = frame.recorded(slug)
        if result is not None:
            means = f"{result['baseline_mean']:.4g} | {result['ours_mean']:.4g}"
            rows.append(f"| {cards()[slug].name} | {result['metric']} | {result['baseline']} | {means} | {verdict(result)} |")
    lead = (
        "What the proofs measured, three seeds each (`src/grainwise/proofs/results/`). A claim holds when every seed and the "
        "margin agree and all that the paper says beside it shows too; in part, when only something beside it fails, which is "
        "then named. The record's note says why."
    )
    return "\n".join([lead, "", *rows])


def verdict(result: dict[str, Any]) -> str:
    """`holds`; `in part`, with what failed beside the claim; or `not shown`."""
    if result["holds"]:
        return "holds"
    sign = 1 if result["higher_is_better"] else -1
    ahead = all(sign * (row["ours"] - row["baseline"]) > 0 for row in result["per_seed"])
    if not ahead or result["relative_gain"] < result["margin"]:
        return "not shown"
    return "in part; not: " + "; ".join(name for name, met in result["conditions"].items() if not met)


def zoo_table() -> str:
    """One row for each shipped model."""
    rows = ["| model | parameters | held out | for |", "|---|---|---|---|"]
    for name in sorted(zoo.names(), key=list(USES).index):
        metrics = zoo.metrics(name)
        figures = ", ".join(text.format(metrics[key]) for key, text in FIGURES.items() if key in metrics)
        rows.append(f"| `zoo/{name}` | {metrics['parameters'] / 1e6:.2f} M | {figures} | {USES[name]} |")
    baseline = zoo.metrics("llama-mini")["kneser_ney_5gram_bits_per_byte"]
    rows += ["", f"A 5-gram model with Kneser-Ney smoothing on the same text needs {baseline:.3f} bits per byte."]
    return "\n".join(
        [*rows, "`grainwise zoo train NAME` makes a model again; `grainwise zoo check` measures all of them again."]
    )


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, table in (("PROOFS", proofs()), ("ZOO", zoo_table())):
        before, rest = text.split(f"<!-- {name} -->")
        text = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
