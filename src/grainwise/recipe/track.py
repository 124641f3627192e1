"""What a recipe does in its own way for language and for vision; the runner owns order, timing, folders and resuming."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from grainwise.recipe.schema import Plan, PlannedStep

S = TypeVar("S")  # the state that flows through the steps
TRACKS = {"language": "language_track:LanguageTrack", "vision": "vision_track:VisionTrack"}


class Track(ABC, Generic[S]):
    """A recipe in flight. `state` is what its steps work on, once `load` has made it."""

    unchanged: ClassVar[dict[str, tuple[str, ...]]] = {}  # kind of step -> measures that it cannot change
    state: S

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out

    @abstractmethod
    def load(self, folders: list[Path]) -> None:
        """Make the state as the finished steps, which left these folders, left it."""

    @abstractmethod
    def start(self) -> dict[str, Any]:
        """Before the first step: `figures`, and what the report compares with. Kept as JSON."""

    @abstractmethod
    def measure(self, keep: dict[str, Any] | None = None) -> dict[str, float]:
        """The recipe's measures of the present state. keep: figures that the last step, of a kind in `unchanged`, kept."""

    @abstractmethod
    def mark(self) -> Any:
        """What `save` compares with to see what a step has changed."""

    @abstractmethod
    def save(self, step: PlannedStep, folder: Path, before: Any) -> None:
        """Write what a step changed into its folder. before: `mark()` from before the step."""

    @abstractmethod
    def finish(self, folders: list[Path]) -> None:
        """Put the results where others look for them."""

    @abstractmethod
    def report(self, file: Path, metrics: dict[str, Any], start: dict[str, Any], folders: list[Path]) -> None:
        """Write the page. start: as `start` gave it."""

    def restore(self, step: PlannedStep) -> None:
        """Let a finished step's system put back what it left in the state's folder."""
        importlib.import_module(step.card.module).recipe_restore(self.state, **step.options)


def track_of(plan: Plan, out: Path) -> Track[Any]:
    """The track of the plan's task."""
    module, name = TRACKS[plan.recipe.task].split(":")
    return getattr(importlib.import_module(f"grainwise.recipe.{module}"), name)(plan, out)
