"""A pipeline: transforms in a row, all random ones fed from one generator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class Pipeline:
    """`Pipeline(step, ...)`, then `pipeline(images, generator)`.

    A step is a function of images, or of images and a generator, with its options bound by `functools.partial`:
    `Pipeline(partial(random_resized_crop, size=48), random_flip, normalise)`. Raises TypeError for a step that lacks an
    option (it would fail only at the first batch), and when a random step gets no generator.
    """

    def __init__(self, *steps: Callable[..., Tensor]) -> None:
        self.steps = steps
        self.random = [_takes_generator(step) for step in steps]

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for step, random in zip(self.steps, self.random):
            if random and generator is None:
                raise TypeError(f"{_name(step)} is random: pass a torch.Generator")
            images = step(images, generator) if random else step(images)
        return images

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(_name(s) for s in self.steps)})"


def _takes_generator(step: Callable[..., Tensor]) -> bool:
    if not callable(step):
        raise TypeError(f"a step must be callable, got {step!r}")
    if isinstance(step, Pipeline):
        return any(step.random)
    parameters = inspect.signature(step).parameters
    missing = [
        name
        for i, (name, p) in enumerate(parameters.items())
        if p.default is p.empty and name != "generator" and i > 0 and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise TypeError(f"{_name(step)} needs {', '.join(missing)}: bind it with functools.partial")
    return "generator" in parameters


def _name(step: Callable[..., Tensor]) -> str:
    if isinstance(step, partial):
        options = ", ".join(f"{k}={v!r}" for k, v in step.keywords.items())
        return f"{_name(step.func)}({options})"
    return getattr(step, "__name__", repr(step))
