"""The report's sections about pictures: the task, the mistakes, what each step looked at, and what is unknown to it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from grainwise.catalog import card
from grainwise.evaluate.ood import ood_scores, threshold_at
from grainwise.recipe.pictures import as_image
from grainwise.recipe.plots import SERIES, curves_plot, histogram_plot, stacked_plot
from grainwise.recipe.report import figure
from grainwise.vision_state import Picture, Pictures, VisionState

PAIRS, NOVELTIES, FOLLOWED, MISTAKES, CLASSES_SHOWN = 6, 4, 7, 6, 12
SMALL_VIEW, TINY_VIEW = 150, 84
KEPT = 0.95  # share of the known pictures that the threshold of the histograms accepts
STYLE = """
img { border-radius: 6px; display: block }
.cards { display: flex; flex-wrap: wrap; gap: 1.2rem 1.4rem; margin: .8rem 0 }
.card { background: #fafaf9; border: 1px solid #e7e5e4; border-radius: 10px; padding: .7rem .8rem }
.card .row { display: flex; gap: .6rem } .card .row > div { width: min-content }
.card p { margin: .5rem 0 0; font-size: .85rem; width: 0; min-width: 100% }
.card small { color: #6b7280; display: block; font-size: .76rem } .narrow figure { max-width: 370px }
.seen { position: relative } .ring { position: absolute; border: 2px solid #fff; border-radius: 50%;
  box-shadow: 0 0 0 1.5px #1f2937, inset 0 0 0 1px #1f2937 }
.steps td { vertical-align: middle; font-size: .86rem; padding: .25rem .6rem } .steps img { border-radius: 4px }
.right { color: #0f766e } .wrong { color: #b45309 } .lead { max-width: 52rem }
"""


@dataclass(frozen=True)
class Stage:
    """The start, or one step: figures and logits after it (none, if it left the recogniser as it was), and its pictures.

    slug, kind: of the step's system; empty for the start.
    """

    name: str
    slug: str
    kind: str
    answers: dict[str, Tensor]
    pictures: list[Picture]


def sections(state: VisionState, stages: Sequence[Stage]) -> tuple[list[str], list[str]]:
    """The sections before and after the table of figures."""
    told = [stage for stage in stages if stage.answers]
    after = [_mistake_kinds(state, told), _followed(state, told)]
    after += [_pictures(stage) for stage in stages if stage.kind == "recognize" and stage.pictures]
    after += [_worst_mistakes(state, told[-1]), _novelty(told)]
    after += [_pictures(stage) for stage in stages if stage.kind == "explain" and stage.pictures]
    return [_task(state), "<h2>What the steps change</h2>"], [section for section in after if section]


def _task(state: VisionState) -> str:
    classes = state.classes
    siblings = len(set(classes.groups)) < len(classes)
    kinds = f"{len(classes)} kinds" + (f" in {len(set(classes.groups))} families" if siblings else "")
    lead = f"Tell {kinds} apart, from {len(state.train)} labelled pictures in all; {len(state.test)} others are the test."
    if siblings and state.test.deciding is not None:
        lead += " Kinds of one family are alike in everything but one small part, which is ringed here."
    shown = _pairs(state) if siblings else _each_class(state)
    return f'<h2>The task</h2><p class="lead">{lead}</p><div class="cards">{shown}</div>{_novelties(state)}'


def _pairs(state: VisionState) -> str:
    """Two siblings of each family, side by side, and what tells them apart."""
    classes, cards = state.classes, []
    for group in sorted(set(classes.groups))[:PAIRS]:
        members = [i for i, g in enumerate(classes.groups) if g == group][:2]
        if len(members) < 2:
            continue
        chosen = [_clearest(state.test, label) for label in members]
        views = state.test.show(chosen)
        names = [classes.names[k] for k in members]
        parts = [_panel(_seen(view, state.test, i, name), name) for view, i, name in zip(views, chosen, names)]
        cards.append(_card(parts, f"{names[0]}: {classes.contrast(*members)}."))
    return "".join(cards)


def _each_class(state: VisionState) -> str:
    chosen = [_clearest(state.test, label) for label in sorted(set(state.test.labels.tolist()))[:CLASSES_SHOWN]]
    names = [state.test.names[i] for i in chosen]
    return "".join(_card([as_image(view, name, SMALL_VIEW)], name) for view, name in zip(state.test.show(chosen), names))


def _novelties(state: VisionState) -> str:
    """Some pictures of unknown classes."""
    found = ""
    kinds = ((state.near, "unknown siblings of the known kinds (near)"), (state.far, "quite other things (far)"))
    for pictures, words in kinds:
        if pictures is not None:
            chosen = np.linspace(0, len(pictures) - 1, min(NOVELTIES, len(pictures))).round().astype(int).tolist()
            row = [as_image(v, pictures.names[i], 120) for v, i in zip(pictures.show(chosen), chosen)]
            found += _card(row, f"{len(pictures)} pictures of {words}")
    lead = '<p class="lead">Pictures of kinds that no training picture shows; the recogniser should be unsure about them:</p>'
    return f'{lead}<div class="cards">{found}</div>' if found else ""


def _panel(image: str, words: str) -> str:
    return f"<div>{image}<small>{html.escape(words)}</small></div>"


def _card(panels: Sequence[str], words: str) -> str:
    """Panels side by side, and words as wide as they are."""
    return f'<div class="card"><div class="row">{"".join(panels)}</div><p>{html.escape(words)}</p></div>'


def _clearest(pictures: Pictures, label: int) -> int:
    """Of the pictures with this label, the one that shows most of the deciding part, or the first."""
    mine = [i for i, found in enumerate(pictures.labels.tolist()) if found == label]
    if pictures.deciding is None:
        return mine[0]
    return max(mine, key=lambda i: int(pictures.deciding[i].sum()))  # type: ignore[index]


def _seen(view: np.ndarray, pictures: Pictures, index: int, name: str, width: int = SMALL_VIEW) -> str:
    """A picture with a ring round the part that decides, where that is known."""
    ring = ""
    if pictures.deciding is not None and pictures.deciding[index].any():
        rows, columns = np.nonzero(pictures.deciding[index])
        side = pictures.deciding.shape[1]
        size = min(1.0, (max(np.ptp(rows), np.ptp(columns)) + 7) / side)
        x, y = (columns.min() + columns.max() + 1) / 2 / side, (rows.min() + rows.max() + 1) / 2 / side
        place = f"left:{x - size / 2:.1%};top:{y - size / 2:.1%};width:{size:.1%};height:{size:.1%}"
        ring = f'<div class="ring" style="{place}"></div>'
    return f'<div class="seen" style="width:{width}px;overflow:hidden">{as_image(view, name, width)}{ring}</div>'


def _mistake_kinds(state: VisionState, told: Sequence[Stage]) -> str:
    """Right, a sibling, or something else: shares after each step."""
    group = np.array(state.classes.groups)
    if len(set(group.tolist())) == len(group):
        return ""
    truth, bars = state.test.labels.numpy(), []
    for stage in told:
        said = stage.answers["test"].argmax(1).numpy()
        right, family = said == truth, group[said] == group[truth]
        bars.append((stage.name, [float(v.mean()) for v in (right, family & ~right, ~family)]))
    plot = stacked_plot(bars, ("right", "a sibling instead", "another family"), (SERIES[0], SERIES[1], SERIES[3]))
    caption = "What the recogniser says about the test pictures. A sibling's name means that the small part was missed."
    return f'<h2>Which mistakes are left</h2><div class="plots">{figure(plot, caption)}</div>'


def _followed(state: VisionState, told: Sequence[Stage]) -> str:
    """Some test pictures and what every stage says about them, those first on which the stages differ most."""
    truth = state.test.labels.numpy()
    said = np.stack([stage.answers["test"].argmax(1).numpy() for stage in told])
    sure = np.stack([stage.answers["test"].softmax(1).amax(1).numpy() for stage in told])
    changes = ((said == truth)[1:] != (said == truth)[:-1]).sum(0)
    chosen: list[int] = []
    for i in np.argsort(-changes, kind="stable").tolist():
        if truth[i] not in truth[chosen] and len(chosen) < FOLLOWED:
            chosen.append(i)
    names, rows = state.classes.names, []
    for view, i in zip(state.test.show(chosen), chosen):
        cells = "".join(
            f'<td class="{"right" if said[s, i] == truth[i] else "wrong"}">{"✓" if said[s, i] == truth[i] else "✗"} '
            f"{html.escape(names[said[s, i]])}<br><span class='quiet'>{sure[s, i]:.0%}</span></td>"
            for s in range(len(told))
        )
        picture = as_image(view, names[truth[i]], TINY_VIEW)
        rows.append(f"<tr><td>{picture}</td><td><b>{html.escape(names[truth[i]])}</b></td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(stage.name)}</th>" for stage in told)
    lead = '<p class="quiet">Test pictures on which the steps disagree, what each says, and how sure it is.</p>'
    table = f'<table class="steps"><tr><th></th><th>it is</th>{head}</tr>{"".join(rows)}</table>'
    return f"<h2>The same pictures, step by step</h2>{lead}{table}"


def _pictures(stage: Stage) -> str:
    """What a step left for the report."""
    title = f"What {stage.name} looks at" if stage.kind == "recognize" else f"Why: {stage.name} explains answers"
    cards = []
    for picture in stage.pictures:
        panels = [_panel(as_image(pixels, what, SMALL_VIEW), what) for what, pixels in picture.panels]
        if picture.curves:
            panels.append(f"<div>{curves_plot(picture.curves, 'share of the pixels')}</div>")
        cards.append(_card(panels, picture.caption))
    lead = f'<p class="quiet lead">{html.escape(card(stage.slug).summary)}</p>'
    return f'<h2>{html.escape(title)}</h2>{lead}<div class="cards">{"".join(cards)}</div>'


def _worst_mistakes(state: VisionState, stage: Stage) -> str:
    """The wrong answers that are given with most confidence, beside a training picture of what was said."""
    sure, said = stage.answers["test"].softmax(1).max(1)
    truth = state.test.labels
    wrong = [i for i in sure.argsort(descending=True, stable=True).tolist() if said[i] != truth[i]][:MISTAKES]
    title = f"<h2>The most confident mistakes of {html.escape(stage.name)}</h2>"
    if not wrong:
        return f"{title}<p>None: every test picture is named rightly.</p>"
    names, cards = state.classes.names, []
    views = state.test.show(wrong)
    others = state.train.show([_clearest(state.train, int(said[i])) for i in wrong])
    for i, view, other in zip(wrong, views, others):
        true, claimed = int(truth[i]), int(said[i])
        sibling = state.classes.groups[true] == state.classes.groups[claimed]
        words = f"says {names[claimed]} ({float(sure[i]):.0%}), is {names[true]}"
        words += f"; {state.classes.contrast(true, claimed)}" if sibling else ""
        mine = _panel(_seen(view, state.test, i, names[true]), names[true])
        cards.append(
            _card([mine, _panel(as_image(other, names[claimed], SMALL_VIEW), f"{names[claimed]}, a training picture")], words)
        )
    return f'{title}<div class="cards">{"".join(cards)}</div>'


def _novelty(told: Sequence[Stage]) -> str:
    """How sure each stage is about known, near and far pictures."""
    if set(told[0].answers) == {"test"}:
        return ""
    plots = []
    for stage in told:
        scores = {name: ood_scores(stage.answers[name]) for name in ("test", "near", "far") if name in stage.answers}
        threshold = threshold_at(scores["test"], KEPT)
        series = [("known" if name == "test" else name, values.tolist()) for name, values in scores.items()]
        refused = [f"{float((v < threshold).mean()):.0%} of the {n}" for n, v in scores.items() if n != "test"]
        name, share = html.escape(stage.name), " and ".join(refused)
        caption = f"<b>{name}</b>: the line keeps {KEPT:.0%} of the known and refuses {share}."
        plots.append(figure(histogram_plot(series, "confidence in the answer", threshold), caption))
    lead = '<p class="quiet lead">The probability of the answer, for pictures of known kinds and of kinds that nobody showed.'
    return f'<h2>Known or unknown?</h2>{lead}</p><div class="plots narrow">{"".join(plots)}</div>'
