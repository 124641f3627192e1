"""Grainwise: one hundred published systems for fine-grained work with foundation models, as one library.

Importing it is quick and imports neither torch nor transformers: rooms load when they are first used, and what they
register with PEFT and transformers (methods, quantizers, models, attention functions) is registered as soon as those
libraries are imported, in either order.
"""

from __future__ import annotations

import importlib
from typing import Any

from grainwise import on_import

__version__ = "0.1.0"

ROOMS = (
    "adapt", "merge", "compress", "kernels", "select", "annotate", "pretrain", "decode", "context", "serve", "parallel",
    "recognize", "segment", "detect", "retrieve", "converse", "explain", "evaluate",
)  # fmt: skip
_MODULES = frozenset({*ROOMS, "bench", "catalog", "data", "images", "proofs", "recipe", "training", "world", "zoo"})

on_import.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        try:
            return importlib.import_module(f"grainwise.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"grainwise.{name}":
                raise
            raise AttributeError(f"the room grainwise.{name} holds no built system yet") from None
    raise AttributeError(f"module 'grainwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
