"""Joining experts: task arithmetic, TIES and gradient-free composition, over compressed and dense deltas alike.

Task arithmetic (Ilharco et al., arXiv 2212.04089) adds updates: theta + lambda sum tau_i. TIES (Yadav et al., arXiv
2306.01708) trims each update to its largest entries, elects for each entry the sign with the larger summed magnitude, and
averages only the entries that agree with it. LoraHub (Huang et al., arXiv 2307.13269) searches the weights of a sum on a few
examples of a new task without gradients; here the search is SciPy's COBYLA instead of Nevergrad's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grainwise.merge.compeft import TernaryDelta
from grainwise.merge.delta_sum import check_alike
from grainwise.merge.task_delta import Delta, TaskDelta


def _joined(deltas: Sequence[Delta], read: Callable[[str], Tensor]) -> TaskDelta:
    first = deltas[0]
    return TaskDelta(
        first.layout,
        read,
        reference=first.reference,
        base=first.base,
        adapter_config=first.adapter_config,
        reference_store=first.own_reference(),
        kept={
            key: tensor
            for key, tensor in first.kept.items()
            if all(key in d.kept and torch.equal(tensor, d.kept[key]) for d in deltas[1:])
        },
    )


def _check(deltas: Sequence[Delta]) -> None:
    if not deltas:
        raise ValueError("nothing to merge: give at least one delta")
    for other in deltas[1:]:
        check_alike(deltas[0], other)


def task_arithmetic(deltas: Sequence[Delta], lam: float = 1.0, weights: Sequence[float] | None = None) -> TaskDelta:
    """lam * sum_i weights_i tau_i (weights: all one by default), summed as tensors are read. Apply it to the base.

    Tensors kept outside the updates stay if all experts have them alike. Raises ValueError for experts of different bases.
    """
    _check(deltas)
    factors = [lam * w for w in (weights if weights is not None else [1.0] * len(deltas))]
    if len(factors) != len(deltas):
        raise ValueError(f"{len(factors)} weights for {len(deltas)} deltas")

    def read(key: str) -> Tensor:
        total = deltas[0].read(key).mul_(factors[0])
        for delta, factor in zip(deltas[1:], factors[1:]):
            total.add_(delta.read(key), alpha=factor)
        return total

    return _joined(deltas, read)


def ties_merge(deltas: Sequence[Delta], lam: float = 1.0, density: float | None = None) -> TaskDelta:
    """lam times the TIES merge, computed as tensors are read.

    density: share of entries that dense deltas are trimmed to; compressed deltas are sparse already, leave it out for them.
    Raises ValueError for experts of different bases, and for dense deltas without a density.
    """
    _check(deltas)
    dense = [d for d in deltas if not isinstance(d, TernaryDelta)]
    if dense and density is None:
        raise ValueError("TIES trims dense deltas to a share of their entries: give `density` (0.2 is usual; 1 keeps all)")
    if density is not None and len(dense) < len(deltas):
        raise ValueError("compressed deltas are trimmed already: `density` is for dense ones")
    trimmed = [d.sparsify(density) if density is not None and isinstance(d, TaskDelta) else d for d in deltas]

    def read(key: str) -> Tensor:
        mass = torch.zeros(deltas[0].layout[key].shape)
        for delta in trimmed:
            mass.add_(delta.read(key))
        elected = mass.sign_()
        total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
        for delta in trimmed:
            update = delta.read(key)
            agrees = (update * elected) > 0
            total.add_(update.mul_(agrees))
            agreeing.add_(agrees)
        return total.div_(agreeing.clamp_(min=1.0)).mul_(lam)

    return _joined(deltas, read)


@dataclass(frozen=True)
class Composition:
    """What `compose` found: the merged update, its weights, its loss on the examples, and the evaluations spent."""

    delta: TaskDelta
    weights: tuple[float, ...]
    loss: float
    evaluations: int


def compose(
    deltas: Sequence[Delta],
    evaluate: Callable[[TaskDelta], float],
    *,
    budget: int = 40,
    penalty: float = 0.05,
    bound: float = 1.5,
    step: float = 0.5,
) -> Composition:
    """Search weights w in [-bound, bound] that minimise evaluate(sum w_i tau_i) + penalty * mean |w_i|, without gradients.

    evaluate: a loss on a few examples of the new task. budget: evaluations, at least two more than there are deltas. The
    search starts at zero, the base model, with steps of `step`, and the best point seen is returned.
    """
    from scipy.optimize import minimize

    _check(deltas)
    if budget < len(deltas) + 2:
        raise ValueError(f"a search over {len(deltas)} weights needs a budget of at least {len(deltas) + 2}, got {budget}")
    seen: list[tuple[float, float, np.ndarray]] = []  # (objective, loss, weights)

    def objective(weights: np.ndarray) -> float:
        clipped = np.clip(weights, -bound, bound)
        loss = float(evaluate(task_arithmetic(deltas, weights=clipped.tolist())))
        seen.append((loss + penalty * float(np.abs(clipped).mean()), loss, clipped))
        return seen[-1][0]

    limits = [(-bound, bound)] * len(deltas)
    options = {"rhobeg": step, "maxiter": budget, "tol": 1e-3}
    minimize(objective, np.zeros(len(deltas)), method="COBYLA", bounds=limits, options=options)
    _, loss, weights = min(seen, key=lambda entry: entry[0])
    chosen = tuple(weights.tolist())
    return Composition(task_arithmetic(deltas, weights=chosen), chosen, loss, len(seen))
