"""The fields of a recipe, for language and for vision, with their types, bounds and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field

Measure = Literal["perplexity", "bytes", "peak_memory", "tokens_per_second"]
VisionMeasure = Literal["accuracy", "ood_near", "ood_far", "images_per_second", "bytes", "peak_memory"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
VISION_MEASURES: tuple[VisionMeasure, ...] = get_args(VisionMeasure)
Steps: TypeAlias = Annotated[list[dict[str, dict[str, Any]]], Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """No unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Data(Strict):
    """Where text comes from: `pydoc`, a file, a folder, `shared/...` or a hub id; limits count rows."""

    train: str
    test: str
    train_limit: Count | None = None
    test_limit: Count | None = None

    @property
    def subject(self) -> str:
        """The data in words, for the report."""
        return self.train


class Recipe(Strict):
    """The top level of a recipe for a language model."""

    task: Literal["language"] = "language"
    model: str
    data: Data
    steps: Steps
    measure: list[Measure] = list(MEASURES)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: Seed = 0
    measure_tokens: Annotated[int, Field(ge=256)] = 16384
    measure_length: Annotated[int, Field(ge=16)] = 256


class WorldShape(Strict):
    """Which microworld: see `grainwise.world.World`."""

    seed: Seed = 0
    genera: Annotated[int, Field(ge=2)] = 8
    species_per_genus: Annotated[int, Field(ge=2)] = 4


class WorldPictures(Strict):
    """Pictures of the microworld. Some species of every genus (near) and some genera (far) are kept out as novelties.

    shots: labelled training pictures of each known species; test: test pictures of each species, known or not; outliers:
    unlabelled pictures of things from other worlds; describe: how closely the class texts describe a species.
    """

    world: WorldShape
    shots: Count = 8
    test: Count = 20
    outliers: Annotated[int, Field(ge=0)] = 600
    style: Literal["plain", "ink", "felt"] = "plain"
    describe: Literal["coarse", "medium", "fine"] = "fine"

    @property
    def subject(self) -> str:
        """The data in words, for the report."""
        return f"the microworld, seed {self.world.seed}, {self.shots} labelled pictures of each species"

    def has(self, name: str) -> bool:
        """Whether there are `near`, `far` or `outliers`."""
        return name != "outliers" or self.outliers > 0


class FolderPictures(Strict):
    """Folders `<class>/<picture>`; the sub-folders' names are the classes, put into `template` for the zero-shot classifier.

    near, far: pictures of unknown classes, like and unlike the known ones. outliers: unlabelled pictures of anything else.
    """

    train: str
    test: str
    near: str | None = None
    far: str | None = None
    outliers: str | None = None
    template: str = "a photo of a {}."

    @property
    def subject(self) -> str:
        """The data in words, for the report."""
        return self.train

    def has(self, name: str) -> bool:
        """Whether there are `near`, `far` or `outliers`."""
        return getattr(self, name) is not None


class VisionRecipe(Strict):
    """The top level of a recipe for a CLIP model and pictures."""

    task: Literal["vision"]
    model: str
    data: WorldPictures | FolderPictures
    steps: Steps
    measure: list[VisionMeasure] = list(VISION_MEASURES)
    seed: Seed = 0


RECIPES: dict[str, type[Recipe] | type[VisionRecipe]] = {"language": Recipe, "vision": VisionRecipe}
