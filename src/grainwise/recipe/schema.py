"""Reading a recipe, and saying exactly what is wrong with it before any work starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from grainwise.catalog import Card, Option, cards
from grainwise.catalog.reading import OPTION_TYPES, STEP_KINDS, TASKS
from grainwise.naming import did_you_mean
from grainwise.recipe.fields import RECIPES, FolderPictures, Recipe, Strict, VisionRecipe, WorldPictures

EMBEDDED = Path(__file__).parent / "embedded.yaml"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names file, line, field and the nearest valid name."""


@dataclass(frozen=True)
class PlannedStep:
    """One checked step: its card and the values of all its options."""

    kind: str
    card: Card
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """For example `adapt-kasa`."""
        return f"{self.kind}-{self.card.slug}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of `data` that the step reads and not every recipe has."""
        return self.card.step.needs if self.card.step is not None else ()


@dataclass(frozen=True)
class Plan:
    """A checked recipe. name: the file's stem; text: its YAML."""

    name: str
    text: str
    recipe: Recipe | VisionRecipe
    steps: tuple[PlannedStep, ...]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the work, not with comments or layout."""
        work = [self.recipe.model_dump(), [(s.name, s.options) for s in self.steps]]
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]


def embedded() -> Plan:
    """The recipe inside the package."""
    return read(EMBEDDED)


def read(path: Path) -> Plan:
    """Read and check a recipe file. Raises RecipeError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {path} is not UTF-8 text: {error}") from error
    return parse(text, str(path), name=Path(path).stem)


def parse(text: str, source: str = "recipe", *, name: str = "recipe") -> Plan:
    """Check the text of a recipe. Raises RecipeError naming line, field and nearest valid name."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if tree is None or not isinstance(value, dict):
        raise RecipeError(f"{source}: a recipe is a mapping with model, data and steps, got {type(value).__name__}")
    checker = _Checker(source, tree)
    recipe = checker.recipe(value)
    steps = tuple(checker.step(i, step, recipe.task) for i, step in enumerate(recipe.steps))
    checker.order(steps)
    checker.base_model(recipe)
    if isinstance(recipe, VisionRecipe):
        checker.pictures(recipe, steps)
    else:
        checker.text(recipe)
    return Plan(name, text, recipe, steps)


class _Checker:
    """Turns what pydantic and the catalogue find into messages with line numbers."""

    def __init__(self, source: str, tree: yaml.Node) -> None:
        self.source, self.tree = source, tree

    def line(self, place: tuple[str | int, ...]) -> int:
        """The line of the deepest node on the path that exists."""
        node, found = self.tree, self.tree
        for key in place:
            step = _child(node, key)
            if step is None:
                break
            found, node = step
        return found.start_mark.line + 1

    def fail(self, place: tuple[str | int, ...], message: str) -> RecipeError:
        field = ".".join(str(p) for p in place) or "recipe"
        return RecipeError(f"{self.source}:{self.line(place)}: {field}: {message}")

    def model(self, model: type[Any], value: Any, place: tuple[str | int, ...]) -> Any:
        """`model` built from `value`, or a RecipeError for the first thing wrong."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            # an unknown field first: a mistyped name also shows as a missing one
            problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            where = place + tuple(problem["loc"])
            raise self.fail(where, _explain(problem, model, where[-1] if where else "")) from None

    def recipe(self, value: dict[str, Any]) -> Recipe | VisionRecipe:
        """The fields of the recipe's task; pictures come from a world or from folders, told apart by `world`."""
        task = value.get("task", "language")
        if task not in RECIPES:
            raise self.fail(("task",), f"no task {task!r}. {did_you_mean(str(task), RECIPES)}")
        data = value.get("data")
        if task == "vision" and isinstance(data, dict):
            folders = "world" not in data and any(isinstance(data.get(name), str) for name in ("train", "test"))
            kind = FolderPictures if folders else WorldPictures
            value = value | {"data": self.model(kind, data, ("data",))}
        return self.model(RECIPES[task], value, ())

    def step(self, index: int, step: dict[str, dict[str, Any]], task: str) -> PlannedStep:
        """Check one step against its system's card."""
        place: tuple[str | int, ...] = ("steps", index)
        if len(step) != 1:
            raise self.fail(place, f"a step has one kind, such as `adapt: {{system: kasa}}`; got {sorted(step)}")
        kind, given = next(iter(step.items()))
        if kind in STEP_KINDS and kind not in TASKS[task]:
            other = next(name for name, kinds in TASKS.items() if kind in kinds)
            words = f"a {task} recipe has steps {', '.join(TASKS[task])}; `{kind}` is for recipes with task: {other}"
            raise self.fail((*place, kind), words)
        if kind not in TASKS[task]:
            raise self.fail((*place, kind), f"no such kind of step. {did_you_mean(kind, TASKS[task])}")
        place = (*place, kind)
        slug = given.get("system")
        usable = {c.slug for c in cards().values() if c.step is not None and c.step.kind == kind}
        if slug is None:
            raise self.fail(place, f"name its system. {did_you_mean('', usable)}")
        card = self.card(slug, kind, usable, (*place, "system"))
        assert card.step is not None
        options = self.model(_options_model(card.step.options), {k: v for k, v in given.items() if k != "system"}, place)
        return PlannedStep(kind, card, options.model_dump())

    def card(self, slug: Any, kind: str, usable: set[str], place: tuple[str | int, ...]) -> Card:
        if slug in usable:
            return cards()[slug]
        if slug not in cards():
            raise self.fail(place, f"no system {slug!r}. {did_you_mean(slug, cards())}")
        card = cards()[slug]
        why = "is still planned" if card.state == "planned" else "is not a step of this kind"
        raise self.fail(place, f"{slug} {why}. Systems for `{kind}`: {', '.join(sorted(usable)) or 'none yet'}")

    def order(self, steps: tuple[PlannedStep, ...]) -> None:
        """Weights change before an adapter is attached, and only an attached adapter can be compressed."""
        attached = False
        for i, step in enumerate(steps):
            place = ("steps", i, step.kind)
            if step.kind in ("compress", "attend") and attached:
                raise self.fail(place, f"{step.name} changes the base model: put it before the adapt step")
            if step.kind == "merge" and not attached:
                raise self.fail(place, f"{step.name} works on a trained adapter: put an adapt step before it")
            attached = attached or step.kind == "adapt"

    def base_model(self, recipe: Recipe | VisionRecipe) -> None:
        """The model, as far as it can be checked without loading it."""
        folder = Path(recipe.model).expanduser()
        if recipe.model.startswith("zoo/"):
            from grainwise import zoo

            short = recipe.model.removeprefix("zoo/")
            if short not in zoo.names():
                raise self.fail(("model",), f"no zoo model {recipe.model!r}. {did_you_mean(short, zoo.names())}")
            folder = Path(zoo.path(short))
        elif recipe.model.startswith(("/", ".", "~")) and not folder.is_dir():
            raise self.fail(("model",), f"no such folder: {recipe.model}")
        try:
            family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError):  # a hub id, or a folder whose loading will say what is wrong with it
            return
        if (family == "clip") != (recipe.task == "vision"):
            wanted = "a CLIP model" if recipe.task == "vision" else "a causal language model"
            raise self.fail(("model",), f"{recipe.model} is a {family} model; a {recipe.task} recipe needs {wanted}")

    def text(self, recipe: Recipe) -> None:
        """Text sources that can be checked without loading anything."""
        from grainwise.data.sources import check

        for split in ("train", "test"):
            try:
                check(getattr(recipe.data, split))
            except ValueError as error:
                raise self.fail(("data", split), str(error)) from None

    def pictures(self, recipe: VisionRecipe, steps: tuple[PlannedStep, ...]) -> None:
        """The world or the folders, and whether they have what the steps and the measures need."""
        data = recipe.data
        if isinstance(data, WorldPictures):
            from grainwise.world import World

            try:
                World(**data.world.model_dump()).species  # noqa: B018
            except ValueError as error:
                raise self.fail(("data", "world"), str(error)) from None
        else:
            for name in ("train", "test", "near", "far", "outliers"):
                if data.has(name) and not any(Path(getattr(data, name)).expanduser().glob("*/*")):
                    raise self.fail(("data", name), f"no folder with <class>/<picture> in it: {getattr(data, name)}")
            if "{}" not in data.template:
                raise self.fail(("data", "template"), f"{data.template!r} has no {{}} where the class name goes")
        for i, step in enumerate(steps):
            for name in (n for n in step.needs if not data.has(n)):
                raise self.fail(("steps", i, step.kind, "system"), f"{step.card.slug} needs data.{name}")
        for i, measure in enumerate(recipe.measure):
            if measure.startswith("ood_") and not data.has(measure.removeprefix("ood_")):
                raise self.fail(("measure", i), f"{measure} needs data.{measure.removeprefix('ood_')}")


def _child(node: yaml.Node, key: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """(node that carries the line, node to go on from) under `key`."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return name, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key], node.value[key]
    return None


def _options_model(options: dict[str, Option]) -> type[BaseModel]:
    """A strict pydantic model of a step's options, from its card."""
    fields: dict[str, Any] = {}
    for name, o in options.items():
        kind: Any = Literal[o.choices] if o.choices else OPTION_TYPES[o.type]
        fields[name] = (Annotated[kind, Field(ge=o.min, le=o.max)], ... if o.default is None else o.default)
    return create_model("Options", __base__=Strict, **fields)


def _owner(model: type[BaseModel], place: tuple[str | int, ...]) -> type[BaseModel]:
    """The model that the place inside `model` belongs to."""
    for name in place:
        inner = model.model_fields[str(name)].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model


def _explain(problem: Any, model: type[BaseModel], name: str | int) -> str:
    """pydantic's finding in plain words, with the nearest valid names."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _owner(model, problem["loc"][:-1])
        known = [*owner.model_fields, *(["system"] if owner.__name__ == "Options" else [])]
        return f"unknown field. {did_you_mean(str(name), known)}"
    if kind == "missing":
        return "this field is required"
    if kind == "literal_error":
        return f"got {problem['input']!r}, expected {context['expected']}"
    return f"{problem['msg'].lower()}, got {problem['input']!r}"
