"""Recipes: a YAML file takes a model and data through a chain of systems, measured before and after each step.

`fields` and `schema` read and check a recipe without importing torch; `plan` estimates it; `runner` runs it and resumes
after an interruption; `report` writes the self-contained `report.html`. What differs between tasks is a `track`:
`language_track` (a causal model on text) and `vision_track` (a CLIP model on pictures).
"""

from grainwise.recipe.schema import Plan, PlannedStep, RecipeError, embedded, parse, read

__all__ = ["Plan", "PlannedStep", "RecipeError", "embedded", "parse", "read"]
