"""The paged optimizer: same arithmetic, a kept budget, and taking up saved state."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from grainwise.compress.paged_optimizer import INDEX, FileStore, PagedOptimizer


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("store", ["file", "host"])
@pytest.mark.parametrize(("kind", "budget"), [(torch.optim.Adam, 2200), (torch.optim.AdamW, 2200), (torch.optim.Adagrad, 1200)])
def test_paged_and_plain_give_identical_parameters_after_50_steps(store, kind, budget):
    plain, paged = network(), network()
    optimizer = PagedOptimizer(kind(paged.parameters(), lr=1e-2), budget_bytes=budget, store=store)
    run(plain, kind(plain.parameters(), lr=1e-2), range(50))
    largest = 0
    for step in range(50):
        run(paged, optimizer, range(step, step + 1))
        largest = max(largest, optimizer.resident_bytes)
    assert equal(plain, paged)
    assert optimizer.evictions >= 50
    assert 0 < largest <= budget


def test_paged_state_leaves_memory():
    model = network()
    optimizer = PagedOptimizer(torch.optim.Adam(model.parameters()), budget_bytes=2200)
    run(model, optimizer, range(2))
    held = sum(t.numel() * 4 for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    assert held == optimizer.resident_bytes <= 2200
    whole = sum(2 * p.numel() + 1 for p in model.parameters()) * 4
    assert whole > 2200


def test_with_room_for_everything_nothing_moves():
    model = network()
    optimizer = PagedOptimizer(torch.optim.Adam(model.parameters()), budget_bytes=2**20)
    run(model, optimizer, range(3))
    assert optimizer.evictions == 0


def test_saved_state_is_taken_up(tmp_path):
    straight, resumed = network(), network()
    optimizer = PagedOptimizer(torch.optim.AdamW(straight.parameters(), lr=1e-2), budget_bytes=2200)
    run(straight, optimizer, range(20))
    optimizer.save(tmp_path / "state")
    resumed.load_state_dict(straight.state_dict())
    run(straight, optimizer, range(20, 30))
    second = PagedOptimizer(torch.optim.AdamW(resumed.parameters(), lr=5.0), budget_bytes=2200, folder=tmp_path / "pages")
    second.resume(tmp_path / "state")
    assert second.param_groups[0]["lr"] == 1e-2
    run(resumed, second, range(20, 30))
    assert equal(straight, resumed)
    assert not list((tmp_path).glob("*.partial"))


def test_state_dict_is_interchangeable_with_the_plain_optimizer():
    plain, paged = network(), network()
    first = PagedOptimizer(torch.optim.Adam(paged.parameters(), lr=1e-2), budget_bytes=2200)
    run(paged, first, range(10))
    plain.load_state_dict(paged.state_dict())
    second = torch.optim.Adam(plain.parameters(), lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(paged, first, range(10, 15))
    run(plain, second, range(10, 15))
    assert equal(plain, paged)
    third_model = network()
    third_model.load_state_dict(plain.state_dict())
    third = PagedOptimizer(torch.optim.Adam(third_model.parameters(), lr=1e-2), budget_bytes=2200)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    assert third.resident_bytes <= 2200
    run(plain, second, range(15, 20))
    run(third_model, third, range(15, 20))
    assert equal(plain, third_model)


def test_schedulers_and_closures_and_missing_gradients():
    model = network()
    optimizer = PagedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), budget_bytes=4000)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model[4].requires_grad_(False)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 8)).sum()
        loss.backward()
        return loss.item()

    assert isinstance(optimizer.step(closure), float)
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.5


def test_wrong_requests_are_refused(tmp_path):
    model = network()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="budget_bytes must be positive"):
        PagedOptimizer(adam, budget_bytes=0)
    with pytest.raises(TypeError, match="torch optimizer"):
        PagedOptimizer(model, budget_bytes=10)
    with pytest.raises(ValueError, match="LBFGS"):
        PagedOptimizer(torch.optim.LBFGS(model.parameters()), budget_bytes=10)
    with pytest.raises(ValueError, match="store must be"):
        PagedOptimizer(adam, budget_bytes=10, store="disk")
    small = PagedOptimizer(adam, budget_bytes=100)
    with pytest.raises(ValueError, match="raise budget_bytes"):
        run(model, small, range(1))
    with pytest.raises(ValueError, match="before wrapping"):
        small.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_resuming_checks_what_was_saved(tmp_path):
    model = network()
    optimizer = PagedOptimizer(torch.optim.Adam(model.parameters()), budget_bytes=2200)
    run(model, optimizer, range(1))
    optimizer.save(tmp_path / "state")
    with pytest.raises(FileNotFoundError):
        optimizer.resume(tmp_path / "elsewhere")
    other = PagedOptimizer(torch.optim.Adam(nn.Linear(3, 3).parameters()), budget_bytes=2200)
    with pytest.raises(ValueError, match="other parameters or of another budget"):
        other.resume(tmp_path / "state")
    assert json.loads((tmp_path / "state" / INDEX).read_text())["groups"][0]["lr"] == 1e-3
    assert FileStore(tmp_path / "state").get(0)
