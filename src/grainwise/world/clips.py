"""Clips: individuals that move and act, with what happens when, and where everything is in every frame.

Clip i of a seed is the same on every machine, in every process and in any batch. All frames of all clips of a batch are painted
together. Frames hold the exact truth: who is seen at each pixel, which part, the tight box of everybody, and when each step
begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from grainwise.world.actions import (
    ACTIONS,
    EXPRESSIONS,
    INTENSITIES,
    PHASES,
    Motion,
    expression_edges,
    groups_of,
    schedule,
    total_motion,
)
from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.counter_random import Draws
from grainwise.world.individuals import Nuisance, Pose, boxes_of, finish, ground, light_of, pose_stamps, species_table
from grainwise.world.painter import STYLES, Canvases, Stamps
from grainwise.world.taxonomy import LEVELS, World

PIXELS_AT_ONCE = 1 << 22
KINDS: dict[str, int] = {"action": 0xC11B, "expression": 0xFACE}  # with the key that keeps the random numbers of each apart


@dataclass(frozen=True)
class Moment:
    """One step of one actor: frames start to end (end not included), and captions by granularity."""

    actor: int
    start: int
    end: int
    captions: dict[str, str]


@dataclass
class ClipBatch:
    """n clips of f frames with up to a actors.

    frames: uint8 (n, f, size, size, 3); owners: uint8 (n, f, size, size), 0 on the ground and k where actor k - 1 is seen;
    parts: uint8, which of its parts is seen there (from 1); boxes: float32 (n, a, f, 4), x0 y0 x1 y1 of what is seen, zeros
    when nothing is; species, varieties, actions: int64 (n, a), -1 where there is no actor, and in `actions` where one stands
    still;
    expressions, intensities, face_parts: int64 (n,), indices into `EXPRESSIONS` and `INTENSITIES` and the part that deforms
    (from 1), -1 in action clips; phases: uint8 (n, f), index into `PHASES`; backgrounds: int64 (n,), index into `STUFF_NAMES`;
    moments: what happens when; captions: by granularity.
    """

    indices: np.ndarray
    frames: np.ndarray
    owners: np.ndarray
    parts: np.ndarray
    boxes: np.ndarray
    species: np.ndarray
    varieties: np.ndarray
    actions: np.ndarray
    expressions: np.ndarray
    intensities: np.ndarray
    face_parts: np.ndarray
    phases: np.ndarray
    backgrounds: np.ndarray
    moments: list[tuple[Moment, ...]]
    captions: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.frames)

    def masks(self, actor: int) -> np.ndarray:
        """bool (n, f, size, size): the tube of one actor."""
        return self.owners == actor + 1


@dataclass
class _Plan:
    """What is drawn for a batch before any pixel: arrays as in `ClipBatch`, and times in frames.

    starts, lengths, subs: (n, a, units): when each repetition of a sub-action begins, how long it takes and which it is (-1:
    none).
    edges: (n, 4): the frames where onset, apex and offset begin and where offset ends.
    """

    draws: Draws
    species: np.ndarray
    varieties: np.ndarray
    actions: np.ndarray
    subs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    expressions: np.ndarray
    intensities: np.ndarray
    edges: np.ndarray


class Clips:
    """Clips of a world, by seed and index.

    Args:
        world: whose species act.
        seed: which clips.
        frames: 8 to 64.
        size: side of a frame in pixels, 32 to 512, even (as codecs want it).
        kind: "action" (actors do one of `ACTIONS`) or "expression" (one part of one individual deforms).
        actors: fewest and most individuals, 1 to 3, all of different kinds; expression clips always show one.
        actions: the classes that occur, as indices into `ACTIONS`; all by default.
        species: the species that occur; all by default.
        still: how often an actor after the first only stands there.
        nuisance: backgrounds, light and view; scale and place are the clip's own.

    Raises:
        ValueError: any of these out of range.
    """

    def __init__(
        self,
        world: World,
        seed: int = 0,
        frames: int = 16,
        size: int = 64,
        *,
        kind: str = "action",
        actors: tuple[int, int] = (1, 3),
        actions: Sequence[int] | None = None,
        species: Sequence[int] | None = None,
        still: float = 0.25,
        style: str = "plain",
        nuisance: Nuisance | None = None,
    ) -> None:
        _check(world, frames, size, kind, actors, style, still)
        self.world, self.seed, self.frames, self.size, self.kind, self.style = world, seed, frames, size, kind, STYLES[style]
        self.actors = actors if kind == "action" else (1, 1)
        self.still = still
        self.nuisance = nuisance or Nuisance()
        self.actions = np.array(_chosen("actions", actions, len(ACTIONS)), np.int64)
        self.by_kind = _species_by_kind(world, _chosen("species", species, len(world)))
        if self.actors[1] > len(self.by_kind):
            raise ValueError(
                f"{self.actors[1]} actors of different kinds need as many kinds; the species given have {len(self.by_kind)}"
            )

    def draw(self, indices: Sequence[int] | np.ndarray) -> ClipBatch:
        """The clips of these indices (any integers from 0).

        Raises:
            ValueError: no indices, or a negative one.
        """
        indices = np.atleast_1d(np.asarray(indices, np.int64))
        if indices.ndim != 1 or not len(indices) or indices.min() < 0:
            raise ValueError(f"indices must be one row of integers from 0, got {indices.tolist()}")
        step = max(1, PIXELS_AT_ONCE // (self.frames * self.size * self.size))
        pieces = [self._draw(indices[i : i + step]) for i in range(0, len(indices), step)]
        if len(pieces) == 1:
            return pieces[0]
        joined: dict[str, Any] = {}
        for name in ClipBatch.__dataclass_fields__:
            values = [getattr(piece, name) for piece in pieces]
            joined[name] = [one for value in values for one in value] if isinstance(values[0], list) else np.concatenate(values)
        return ClipBatch(**joined)

    def records(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, object]]:
        """The same clips as plain dictionaries, one each; what the `torch` and `datasets` forms hold."""
        batch = self.draw(indices)
        return [
            {
                "index": int(batch.indices[i]),
                "frames": batch.frames[i],
                "owners": batch.owners[i],
                "parts": batch.parts[i],
                "boxes": batch.boxes[i],
                "species": batch.species[i],
                "actions": batch.actions[i],
                "expression": int(batch.expressions[i]),
                "intensity": int(batch.intensities[i]),
                "phases": batch.phases[i],
                "background": STUFF_NAMES[batch.backgrounds[i]],
                "moments": [
                    {
                        "actor": one.actor,
                        "start": one.start,
                        "end": one.end,
                        **{f"{level}_caption": one.captions[level] for level in LEVELS},
                    }
                    for one in batch.moments[i]
                ],
                **{f"{level}_caption": batch.captions[i][level] for level in LEVELS},
            }
            for i in range(len(batch))
        ]

    def _draw(self, indices: np.ndarray) -> ClipBatch:
        plan = self._plan(indices)
        n, f, size, most = len(indices), self.frames, self.size, self.actors[1]
        canvas_draws = Draws(self.world.seed, self.seed, KINDS[self.kind], np.repeat(indices, f))
        image, backgrounds = ground(plan.draws, self.nuisance, self.style, size)
        canvases = Canvases(np.repeat(image, f, 0))
        light = np.repeat(light_of(plan.draws), f, 0)
        canvases.paint(self._stamps(plan), self.style, light)
        frames = finish(canvases, canvas_draws, light, self.nuisance.light, self.style)
        boxes = (
            np.stack([boxes_of(canvases.owner == actor + 1) for actor in range(most)])
            .reshape(most, n, f, 4)
            .transpose(1, 0, 2, 3)
        )
        acting = self.kind == "expression"
        face = np.array(groups_of(self.world).face_part)[plan.species[:, 0]]
        return ClipBatch(
            indices=indices,
            frames=frames.reshape(n, f, size, size, 3),
            owners=canvases.owner.reshape(n, f, size, size),
            parts=canvases.part.reshape(n, f, size, size),
            boxes=np.ascontiguousarray(boxes),
            species=plan.species,
            varieties=plan.varieties,
            actions=plan.actions,
            expressions=plan.expressions,
            intensities=plan.intensities,
            face_parts=face if acting else np.full(n, -1),
            phases=self._phases(plan),
            backgrounds=backgrounds,
            moments=[self._moments(plan, i) for i in range(n)],
            captions=[self._captions(plan, i, STUFF_NAMES[backgrounds[i]]) for i in range(n)],
        )

    def _plan(self, indices: np.ndarray) -> _Plan:
        draws, n, most = Draws(self.world.seed, self.seed, KINDS[self.kind], indices), len(indices), self.actors[1]
        number = self.actors[0] + draws.integers("actors", most - self.actors[0] + 1)
        present = np.arange(most) < number[:, None]
        kinds = draws.order("kinds", len(self.by_kind))[:, :most]
        counts = np.array([len(one) for one in self.by_kind])
        members = np.array([np.resize(one, counts.max()) for one in self.by_kind])
        which = (draws.uniform("member", size=(most,)) * counts[kinds]).astype(np.int64)
        species = np.where(present, members[kinds, np.minimum(which, counts[kinds] - 1)], -1)
        varieties = np.where(present, draws.integers("variety", self.world.varieties, (most,)), -1)
        acts = present & ~((np.arange(most) > 0) & draws.chance("still", self.still, (most,)))
        expressing = self.kind == "expression"
        actions = np.where(acts & (not expressing), self.actions[draws.integers("action", len(self.actions), (most,))], -1)
        subs, starts, lengths = schedule(draws, actions, self.frames)
        return _Plan(
            draws=draws,
            species=species,
            varieties=varieties,
            actions=actions,
            subs=subs,
            starts=starts,
            lengths=lengths,
            expressions=draws.integers("expression", len(EXPRESSIONS)) if expressing else np.full(n, -1),
            intensities=draws.integers("intensity", len(INTENSITIES)) if expressing else np.full(n, -1),
            edges=expression_edges(draws, self.frames),
        )

    def _stamps(self, plan: _Plan) -> Stamps:
        """The stamps of every actor in every frame."""
        most, f = self.actors[1], self.frames
        clip, actor = np.nonzero(plan.species >= 0)
        rows, labels = len(clip), plan.species[clip, actor]
        time = np.arange(f, dtype=np.float32)[None, :, None] + np.float32(0.5)
        passed = (time - plan.starts[clip, actor][:, None]) / plan.lengths[clip, actor][:, None]
        progress = np.clip(passed, 0, 1).astype(np.float32)
        motion = total_motion(plan.subs[clip, actor], progress)
        stance = self._stance(plan, clip, actor, motion)
        shift, stretch = _articulate(self.world, labels, motion)
        if self.kind == "expression":
            self._deform(plan, labels, shift, stretch)
        rank = plan.draws.order("depth", most)[clip, actor].astype(np.float64)
        frame = np.tile(np.arange(f), rows)
        return pose_stamps(
            self.world,
            np.repeat(labels, f),
            np.repeat(plan.varieties[clip, actor], f),
            stance,
            np.repeat(clip, f) * f + frame,
            np.repeat(actor + 1, f),
            np.repeat(rank, f),
            offsets=shift.reshape(rows * f, -1, 3),
            stretch=stretch.reshape(rows * f, -1, 3),
        )

    def _stance(self, plan: _Plan, clip: np.ndarray, actor: np.ndarray, motion: Motion) -> Pose:
        """Where each actor stands in each frame: side by side, moved by what it does."""
        draws, size, most = plan.draws, np.float32(self.size), self.actors[1]
        number = (plan.species >= 0).sum(1)[clip]
        close_up = self.kind == "expression"
        share = np.array([0.36, 0.25, 0.19, 0.15], np.float32)[number * 0 if close_up else number]
        unit = share * size * draws.uniform("scale", 0.88, 1.06, (most,))[clip, actor]
        wander = np.where((number == 1) & (not close_up), np.float32(0.06), np.float32(0.02)) * size
        x = size * (actor + np.float32(0.5)) / number + wander * draws.uniform("x", -1, 1, (most,))[clip, actor]
        y = size * np.float32(0.53) + wander * 2 * draws.uniform("y", -1, 1, (most,))[clip, actor]
        flip = draws.chance("flip", 0.5, (most,))[clip, actor] & self.nuisance.flip
        lean = draws.uniform("turn", -0.4 * self.nuisance.turn, 0.4 * self.nuisance.turn, (most,))[clip, actor]
        view = draws.uniform("azimuth", -self.nuisance.azimuth, self.nuisance.azimuth, (most,))[clip, actor]
        forward = np.where(flip, np.float32(-1), np.float32(1))[:, None]
        centre = np.stack([x[:, None] + unit[:, None] * motion.dx, y[:, None] + unit[:, None] * motion.dy], -1)
        f = self.frames
        return Pose(
            centre=centre.reshape(-1, 2).astype(np.float32),
            unit=np.repeat(unit, f).astype(np.float32),
            turn=(lean[:, None] + forward * motion.turn).reshape(-1),
            azimuth=(view[:, None] + motion.azimuth).reshape(-1),
            flip=np.repeat(flip, f),
        )

    def _strength(self, plan: _Plan) -> np.ndarray:
        """float32 (n, f): how far the expression has gone in each frame, 0 to its intensity."""
        time = np.arange(self.frames, dtype=np.float32) + np.float32(0.5)
        start, apex, offset, end = (plan.edges[:, k : k + 1].astype(np.float32) for k in range(4))
        rise = np.clip((time - start) / (apex - start), 0, 1)
        fall = np.clip((end - time) / (end - offset), 0, 1)
        full = np.array(list(INTENSITIES.values()), np.float32)[plan.intensities]
        return np.minimum(rise, fall) * full[:, None]

    def _deform(self, plan: _Plan, labels: np.ndarray, shift: np.ndarray, stretch: np.ndarray) -> None:
        """Move and stretch the face part in place."""
        strength = self._strength(plan)[:, :, None]
        face = groups_of(self.world).face[labels][:, None]
        move = np.array([one.shift for one in EXPRESSIONS], np.float32)[plan.expressions]
        scale = np.array([one.scale for one in EXPRESSIONS], np.float32)[plan.expressions]
        for axis in range(2):
            shift[..., axis] += strength * face * move[:, axis, None, None]
            stretch[..., axis] *= 1 + strength * face * (scale[:, axis, None, None] - 1)

    def _phases(self, plan: _Plan) -> np.ndarray:
        """uint8 (n, f): neutral, onset, apex, offset, and neutral again."""
        if self.kind == "action":
            return np.zeros((len(plan.species), self.frames), np.uint8)
        passed = (np.arange(self.frames)[None, :, None] >= plan.edges[:, None]).sum(-1)
        return (passed % len(PHASES)).astype(np.uint8)

    def _moments(self, plan: _Plan, i: int) -> tuple[Moment, ...]:
        """The steps of clip i in order of time."""
        if self.kind == "expression":
            return self._expression_moments(plan, i)
        found = []
        for actor, action in enumerate(plan.actions[i]):
            if action < 0:
                continue
            who = self.world.species[plan.species[i, actor]]
            slot = 0
            for step in ACTIONS[action].steps:
                last = slot + step.count - 1
                start, end = int(plan.starts[i, actor, slot]), int(plan.starts[i, actor, last] + plan.lengths[i, actor, last])
                captions = {
                    "coarse": f"{who.describe('coarse')} {step.phrase(fine=False)}",
                    "medium": f"{who.describe('medium')} {step.phrase(fine=False)}",
                    "fine": f"{who.describe('medium')} {step.phrase()}",
                }
                found.append(Moment(actor, start, end, captions))
                slot = last + 1
        return tuple(sorted(found, key=lambda one: (one.start, one.end, one.actor)))

    def _expression_moments(self, plan: _Plan, i: int) -> tuple[Moment, ...]:
        """Onset, apex and offset of clip i."""
        part, how, look = self._expression(plan, i)
        medium = {"onset": f"is getting {look}", "apex": f"is {look}", "offset": "is going back"}
        fine = {
            "onset": f"is getting {how} {look}",
            "apex": f"is {how} {look}",
            "offset": f"is going back from being {how} {look}",
        }
        return tuple(
            Moment(
                0,
                int(plan.edges[i, k]),
                int(plan.edges[i, k + 1]),
                {"coarse": f"the {part} changes", "medium": f"the {part} {medium[phase]}", "fine": f"the {part} {fine[phase]}"},
            )
            for k, phase in enumerate(PHASES[1:])
        )

    def _expression(self, plan: _Plan, i: int) -> tuple[str, str, str]:
        """The part that deforms in clip i, how much, and how."""
        label = int(plan.species[i, 0])
        part = self.world.species[label].parts[groups_of(self.world).face_part[label] - 1].name
        return part, list(INTENSITIES)[plan.intensities[i]], EXPRESSIONS[plan.expressions[i]].name

    def _captions(self, plan: _Plan, i: int, stuff: str) -> dict[str, str]:
        """What the clip shows at each granularity; coarse and medium captions are shared by clips that differ in detail."""
        result = {}
        for level in LEVELS:
            said = []
            for label, action in zip(plan.species[i], plan.actions[i], strict=True):
                if label < 0:
                    continue
                does = "stands still" if action < 0 else ACTIONS[action].phrase(level)
                if self.kind == "expression":
                    part, how, look = self._expression(plan, i)
                    verb = "change" if part.endswith("s") else "changes"
                    does = {
                        "coarse": "changes",
                        "medium": f"whose {part} {verb}",
                        "fine": f"its {part} gets {how} {look} and goes back",
                    }[level]
                elif level == "fine":
                    does = f"it {does}"
                said.append(f"{self.world.species[label].describe(level)}{':' if level == 'fine' else ''} {does}")
            result[level] = "; ".join(said) + (f"; on {stuff}" if level == "fine" else "")
        return result


def _articulate(world: World, labels: np.ndarray, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """What a motion does to single stamps: shifts and stretches, float32 (rows, frames, copies, 3) each."""
    groups, place = groups_of(world), species_table(world).place[labels][:, None]
    head, legs, face = (group[labels][:, None] for group in (groups.head, groups.legs, groups.face))
    grow = np.stack([motion.grow_x, motion.grow_y, motion.grow_x], -1)[:, :, None]
    shift = place * grow
    shift[..., 0] += head * motion.head_x[..., None] + legs * motion.swing[..., None]
    shift[..., 1] += head * motion.head_y[..., None]
    stretch = np.broadcast_to(1 + grow, shift.shape).copy()
    stretch[..., 1] *= 1 - np.float32(0.85) * face * motion.shut[..., None]
    return shift, stretch


def _chosen(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if given is None else [int(one) for one in given]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"{name} {chosen} must be some of 0..{count - 1}")
    return chosen


def _species_by_kind(world: World, chosen: list[int]) -> list[list[int]]:
    """The chosen species, those of one kind together."""
    kinds = sorted({world.species[index].kind for index in chosen})
    return [[index for index in chosen if world.species[index].kind == kind] for kind in kinds]


def _check(world: World, frames: int, size: int, kind: str, actors: tuple[int, int], style: str, still: float) -> None:
    if not isinstance(world, World):
        raise TypeError(f"world is {type(world).__name__}; give a grainwise.world.World")
    if not 8 <= frames <= 64:
        raise ValueError(f"frames is {frames}; a clip has 8 to 64")
    if not 32 <= size <= 512 or size % 2:
        raise ValueError(f"size is {size} pixels; choose an even number from 32 to 512")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    if not 1 <= actors[0] <= actors[1] <= 3:
        raise ValueError(f"actors is {actors}; give the fewest and the most, from 1 to 3")
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown; choose from {', '.join(STYLES)}")
    if not 0 <= still <= 1:
        raise ValueError(f"still is {still}; it is a probability")


def clip_sheet(seed: int) -> list[tuple[Image.Image, list[str]]]:
    """Film strips for a contact sheet: six clips of actions and two of expressions, each with what happens when."""
    rows: list[tuple[Image.Image, list[str]]] = []
    for kind, count in (("action", 6), ("expression", 2)):
        batch = Clips(World(seed=seed), seed, frames=16, size=96, kind=kind).draw(np.arange(count))
        for k in range(count):
            steps = [f"frames {one.start} to {one.end - 1}: {one.captions['fine']}" for one in batch.moments[k]]
            rows.append((film_strip(batch.frames[k]), [f"{kind} {k}: {batch.captions[k]['coarse']}", *steps]))
    return rows


def film_strip(frames: np.ndarray, shown: int = 8) -> Image.Image:
    """Some frames (f, height, width, 3) side by side, evenly spread over the clip."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(shown, len(frames))).round().astype(int)]
    framed = np.pad(chosen, ((0, 0), (2, 2), (1, 1), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(framed), 1))
