"""Recipes: a YAML file takes a model and data through a chain of systems, measured before and after each step.

`schema` reads and checks a recipe without importing torch; `plan` estimates it; `runner` runs it and resumes after an
interruption; `measure` takes the figures; `report` writes the self-contained `report.html`.
"""

from grainwise.recipe.schema import Plan, PlannedStep, RecipeError, embedded, parse, read

__all__ = ["Plan", "PlannedStep", "RecipeError", "embedded", "parse", "read"]
