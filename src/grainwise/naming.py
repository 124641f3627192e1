"""Words for error messages: the nearest valid name to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The `count` options most like `name`, best first (empty when none is close)."""
    return difflib.get_close_matches(str(name), sorted(options), n=count, cutoff=0.4)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A sentence to append to an error: the nearest names, or all of them when none is close."""
    names = sorted(options)
    close = nearest(name, names)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "Known: " + ", ".join(names) + "."
