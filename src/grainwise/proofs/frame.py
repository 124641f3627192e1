"""The form of a proof: an experiment that is run per seed, and a verdict that is computed from its figures."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grainwise.naming import did_you_mean

RESULTS = Path(__file__).parent / "results"
NOT_PROOFS = {"frame", "__init__"}


def no_conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """The default: nothing beyond the margin."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A claim, what it is shown on, and the experiment.

    margin: relative; |ours_mean - baseline_mean| / |baseline_mean| must reach it, and every seed must have the right sign.
    modules: dotted names of the modules that count; `prove --stale` compares their hash with the recorded one.
    run: `run(seed, smoke)` returns at least `baseline` and `ours`; other figures are recorded beside them. `smoke` asks
        for the same path in seconds.
    conditions: further verdicts computed from the per-seed rows, name -> bool, all needed for the claim to hold.
    note: what a reader must know, for example why a claim does not show at this scale.
    """

    system: str
    claim: str
    substrate: str
    baseline: str
    metric: str
    higher_is_better: bool
    margin: float
    modules: tuple[str, ...]
    run: Callable[[int, bool], dict[str, Any]]
    conditions: Callable[[list[dict[str, Any]]], dict[str, bool]] = no_conditions
    note: str = ""

    def verdict(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Means, relative gain, conditions and `holds`, from the per-seed figures alone."""
        for row in rows:
            bad = [k for k in ("baseline", "ours") if not math.isfinite(row[k])]
            if bad:
                raise FloatingPointError(f"{self.system}: {bad[0]} is {row[bad[0]]} at seed {row['seed']}")
        baseline = sum(r["baseline"] for r in rows) / len(rows)
        ours = sum(r["ours"] for r in rows) / len(rows)
        sign = 1.0 if self.higher_is_better else -1.0
        difference = sign * (ours - baseline)
        gain = difference / (abs(baseline) or abs(difference) or 1.0)  # from a baseline of zero any difference is 100%
        conditions = {k: bool(v) for k, v in self.conditions(rows).items()}
        every_seed = all(sign * (r["ours"] - r["baseline"]) > 0 for r in rows)
        return {
            "baseline_mean": baseline,
            "ours_mean": ours,
            "relative_gain": gain,
            "margin": self.margin,
            "conditions": conditions,
            "holds": every_seed and gain >= self.margin and all(conditions.values()),
        }

    def code_hash(self) -> str:
        """A hash of the source of the proof and of the modules that count."""
        return source_hash((*self.modules, f"grainwise.proofs.{self.system}"))


def source_hash(modules: Iterable[str]) -> str:
    """sha256 over the source of modules (a package counts with all its files), first 16 digits.

    Docstrings, comments, layout and a proof's note don't count: rewording a sentence leaves a proof as it is.
    """
    digest = hashlib.sha256()
    for name in sorted(set(modules)):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"no module {name!r} to hash")
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            digest.update(f"{name}/{file.name}\n{code_of(file.read_text(encoding='utf-8'))}".encode())
    return digest.hexdigest()[:16]


def code_of(source: str) -> str:
    """What a source text does: its syntax tree without docstrings and without the `note` of a proof."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "note"]
    return ast.dump(tree)


def available() -> list[str]:
    """Slugs with a proof."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_PROOFS)


def get(slug: str) -> Proof:
    """The proof of a system. Raises ValueError naming the nearest ones."""
    if slug not in available():
        raise ValueError(f"no proof for {slug!r}. {did_you_mean(slug, available())}")
    return importlib.import_module(f"grainwise.proofs.{slug}").PROOF


def run(
    slug: str,
    *,
    seeds: int = 3,
    first_seed: int = 0,
    smoke: bool = False,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a proof on `seeds` seeds and return its result as one JSON-able object. each: called with every finished row."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    proof = get(slug)
    started = time.perf_counter()
    rows = []
    for seed in range(first_seed, first_seed + seeds):
        rows.append({"seed": seed, **{k: _plain(v) for k, v in proof.run(seed, smoke).items()}})
        if each is not None:
            each(rows[-1])
    return {
        "system": proof.system,
        "claim": proof.claim,
        "substrate": proof.substrate,
        "baseline": proof.baseline,
        "metric": proof.metric,
        "higher_is_better": proof.higher_is_better,
        "per_seed": rows,
        **proof.verdict(rows),
        **({"note": proof.note} if proof.note else {}),
        "smoke": smoke,
        "seconds": round(time.perf_counter() - started, 1),
        "device": _device(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")},
        "code": proof.code_hash(),
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def record(result: dict[str, Any]) -> Path:
    """Keep a full result as `results/<slug>.json`, written whole or not at all. Refuses a smoke result."""
    if result["smoke"]:
        raise ValueError("a smoke result is no proof and is not recorded")
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{result['system']}.json"
    temporary = target.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, target)
    return target


def recorded(slug: str) -> dict[str, Any] | None:
    """The recorded result of a system, or None."""
    file = RESULTS / f"{slug}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def stale(slugs: Iterable[str]) -> dict[str, str]:
    """Built systems whose record does not fit their code: slug -> reason."""
    reasons = {}
    for slug in slugs:
        result = recorded(slug)
        if slug not in available():
            reasons[slug] = "no proof"
        elif result is None:
            reasons[slug] = "no recorded result"
        elif result["code"] != get(slug).code_hash():
            reasons[slug] = "code has changed since the recorded result"
    return reasons
