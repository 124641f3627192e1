"""Merging: task arithmetic and TIES against oracles, over dense and compressed deltas; gradient-free composition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from grainwise.merge import TaskDelta, TernaryDelta, compose, task_arithmetic, ties_merge
from grainwise.merge.task_delta import Delta

Make = Callable[..., dict[str, Tensor]]


def dense(tensors: dict[str, Tensor]) -> TaskDelta:
    return TaskDelta.of(tensors, "zero")


def ternary(tensors: dict[str, Tensor]) -> TernaryDelta:
    return TernaryDelta.compress(tensors, reference="zero", density=0.4)


def flat(delta: Delta) -> np.ndarray:
    return torch.cat([t.flatten() for _, t in delta.items()]).double().numpy()


def ties_oracle(vectors: np.ndarray, lam: float) -> np.ndarray:
    """TIES for vectors (experts, d) that are trimmed already, written out entry by entry."""
    merged = np.zeros(vectors.shape[1])
    for i, column in enumerate(vectors.T):
        sign = np.sign(column.sum())
        agreeing = column[(np.sign(column) == sign) & (column != 0)]
        merged[i] = lam * agreeing.mean() if sign and agreeing.size else 0.0
    return merged


@pytest.mark.parametrize("form", [dense, ternary])
def test_task_arithmetic_is_the_weighted_sum(update: Make, form: Callable) -> None:
    deltas = [form(update(s)) for s in range(3)]
    merged = task_arithmetic(deltas, lam=0.5, weights=[1.0, 2.0, -1.0])
    a, b, c = (flat(d) for d in deltas)
    np.testing.assert_allclose(flat(merged), 0.5 * (a + 2 * b - c), atol=1e-5)
    np.testing.assert_allclose(flat(task_arithmetic(deltas, lam=2.0)), 2 * (a + b + c), atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_ties_of_compressed_deltas(seed: int, experts: int, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [{name: torch.randn(n, generator=generator) for name, n in (("a", 40), ("b", 25))} for _ in range(experts)]
    deltas = [ternary(t) for t in tensors]
    merged = ties_merge(deltas, lam=lam)
    np.testing.assert_allclose(flat(merged), ties_oracle(np.stack([flat(d) for d in deltas]), lam), atol=1e-5)


def test_ties_trims_dense_deltas(update: Make) -> None:
    deltas = [dense(update(s)) for s in range(3)]
    trimmed = np.stack([flat(d.sparsify(0.2)) for d in deltas])
    np.testing.assert_allclose(flat(ties_merge(deltas, density=0.2)), ties_oracle(trimmed, 1.0), atol=1e-5)


def test_one_expert_merges_to_itself(update: Make) -> None:
    delta = ternary(update())
    for merged in (task_arithmetic([delta]), ties_merge([delta]), ties_merge([delta, delta])):
        np.testing.assert_allclose(flat(merged), flat(delta), atol=1e-6)


def test_merged_adapters_load(lora: Callable, llama: Callable, tmp_path: Path) -> None:
    experts = [TernaryDelta.compress(lora(seed), density=0.3) for seed in range(3)]
    merged = ties_merge(experts)
    merged.to_peft(tmp_path / "merged")
    reloaded = PeftModel.from_pretrained(llama(), tmp_path / "merged")
    model = lora()
    merged.load_into(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    again = TernaryDelta.compress(merged, density=0.2)  # a merge is a delta like any other
    assert again.reference == "zero"
    assert again.base == experts[0].base


def test_merging_full_models(update: Make) -> None:
    base = update(0)
    tuned = [{k: base[k] + t for k, t in update(s).items()} for s in (1, 2)]
    deltas = [TaskDelta.between(t, base) for t in tuned]
    merged = task_arithmetic(deltas, lam=0.5).apply()
    for key in base:
        torch.testing.assert_close(merged[key], 0.5 * (tuned[0][key] + tuned[1][key]))


def test_heads_that_differ_are_left_out_of_a_merge(update: Make) -> None:
    def expert(seed: int, head: float) -> TaskDelta:
        tensors = {**update(seed), "head": torch.full((2,), head), "shared": torch.ones(2)}
        return TaskDelta.of(tensors, "zero", keep=["head", "shared"])

    merged = task_arithmetic([expert(0, 1.0), expert(1, 2.0)])
    assert set(merged.kept) == {"shared"}
    summed = TernaryDelta.compress(expert(0, 1.0)) + TernaryDelta.compress(expert(1, 2.0))
    assert set(summed.kept) == {"shared"}


def test_composition_finds_the_mixture(update: Make) -> None:
    deltas = [dense(update(s)) for s in range(3)]
    target = 0.8 * flat(deltas[0]) - 0.5 * flat(deltas[2])

    def loss(delta: TaskDelta) -> float:
        return float(np.square(flat(delta) - target).mean())

    found = compose(deltas, loss, budget=80, penalty=0.0)
    assert found.evaluations <= 80
    np.testing.assert_allclose(found.weights, [0.8, 0.0, -0.5], atol=0.1)
    assert found.loss == pytest.approx(loss(found.delta), rel=1e-6)
    assert found.loss < 0.05 * loss(task_arithmetic(deltas, lam=0.0))
    bounded = compose(deltas, lambda d: float(-flat(d) @ target), budget=60, bound=0.25, penalty=0.0)
    assert max(abs(w) for w in bounded.weights) <= 0.25
    heavy = compose(deltas, loss, budget=60, penalty=1e3)
    assert sum(abs(w) for w in heavy.weights) < 0.2


def test_bad_input(update: Make) -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        ties_merge([])
    with pytest.raises(ValueError, match="give `density`"):
        ties_merge([dense(update())])
    with pytest.raises(ValueError, match="trimmed already"):
        ties_merge([ternary(update())], density=0.2)
    with pytest.raises(ValueError, match="2 weights for 1 deltas"):
        task_arithmetic([dense(update())], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="cannot be joined: only in the first"):
        task_arithmetic([dense(update()), dense({"a": torch.ones(64)})])
    with pytest.raises(ValueError, match="relative to 'zero' and 'ones'"):
        task_arithmetic([dense(update()), TaskDelta.of(update(), "ones")])
    with pytest.raises(ValueError, match="budget of at least 3"):
        compose([dense(update())], lambda _: 0.0, budget=2)
