"""ComPEFT: the ternary form, its arithmetic, its files and its step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from grainwise.merge import compeft_baselines as baselines
from grainwise.merge import golomb
from grainwise.merge.compeft import TernaryDelta, adapter_loss, compress_to_file, recipe_step, sweep, tune
from grainwise.merge.delta_sum import DeltaSum
from grainwise.merge.task_delta import TaskDelta
from grainwise.recipe_state import RecipeState

Make = Callable[..., dict[str, Tensor]]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[k].double().flatten() for k in sorted(tensors)])


def pack(tensors: dict[str, Tensor], **options: object) -> TernaryDelta:
    return TernaryDelta.compress(tensors, reference="zero", **options)  # type: ignore[arg-type]


# The ternary form


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.1, 0.3, 0.5, 1.0]), st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=20, deadline=None)
def test_values_count_and_signs(seed: int, density: float, alpha: float) -> None:
    """Exactly floor(k d) entries are +-alpha sigma, sigma the deviation of the dense update, signs those of tau."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(n, generator=generator) * n**0.5 for name, n in (("a", 67), ("b", 128), ("c", 1))}
    delta = pack(tensors, density=density, alpha=alpha)
    tau, compressed = flat(tensors), flat(delta.to_dense())
    sigma = float(tau.std())
    assert delta.scale.sigma == pytest.approx(sigma, rel=1e-7)
    chosen = compressed != 0
    assert int(chosen.sum()) == math.floor(density * tau.numel()) == delta.scale.nonzeros
    assert torch.allclose(compressed[chosen].abs(), torch.tensor(alpha * sigma, dtype=torch.float64), rtol=1e-7)
    assert torch.equal(compressed[chosen].sign(), tau[chosen].sign())
    assert tau[chosen].abs().min() >= (tau[~chosen].abs().max() if not chosen.all() else 0)


def test_the_nearest_alpha_is_the_mean_kept_magnitude(update: Make) -> None:
    tensors = update(1)
    best = pack(tensors, density=0.2, alpha="least_squares")
    tau = flat(tensors)
    kept = flat(best.to_dense()) != 0
    assert best.scale.alpha == pytest.approx(float(tau[kept].abs().mean() / tau.std()), rel=1e-6)

    def error(alpha: float) -> float:
        return float((tau - flat(best.with_alpha(alpha).to_dense())).square().sum())

    for shift in (0.99, 1.01):
        assert error(best.scale.alpha) < error(best.scale.alpha * shift)
    stc = baselines.stc(TaskDelta.of(tensors, "zero"), 0.2)
    assert torch.equal(flat(stc.delta.to_dense()), flat(best.to_dense()))


def test_with_alpha_shares_the_signs(update: Make) -> None:
    one = pack(update(), density=0.3)
    three = one.with_alpha(3.0)
    assert three.masks is one.masks
    torch.testing.assert_close(flat(three.to_dense()), 3 * flat(one.to_dense()))
    assert three.decode("a", torch.bfloat16).dtype == torch.bfloat16


# Arithmetic on the masks


@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
@settings(max_examples=20, deadline=None)
def test_mask_arithmetic_equals_dense_arithmetic(seed: int, k1: float, k2: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = [{"a": torch.randn(67, generator=generator), "b": torch.randn(5, 40, generator=generator)} for _ in range(2)]
    x, y = pack(pair[0], density=k1, alpha=2.0), pack(pair[1], density=k2, alpha=0.7)
    dx, dy = flat(x.to_dense()), flat(y.to_dense())
    close = {"rel": 1e-6, "abs": 1e-6}
    assert x.dot(y) == pytest.approx(float(dx @ dy), **close)
    assert x.norm() == pytest.approx(float(dx.norm()), **close)
    assert x.distance(y) == pytest.approx(float((dx - dy).norm()), **close)
    assert x.distance(x) == 0
    both = (dx != 0) & (dy != 0)
    if both.any():
        assert x.sign_agreement(y) == pytest.approx(float((dx.sign() == dy.sign())[both].double().mean()))
    total = 0.5 * (x + y) - y
    dense = 0.5 * (dx + dy) - dy
    torch.testing.assert_close(flat(total.to_dense()), dense, rtol=1e-6, atol=1e-6)
    assert isinstance(total, DeltaSum)
    assert total.norm() == pytest.approx(float(dense.norm()), rel=1e-6, abs=1e-5)
    assert y.dot(total) == pytest.approx(float(dy @ dense), rel=1e-6, abs=1e-5)


def test_cosine_of_related_updates(update: Make) -> None:
    base = update(0)
    near = {k: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) for k, t in base.items()}
    a, b, far = (pack(t, density=0.3) for t in (base, near, update(9)))
    assert a.dot(b) / (a.norm() * b.norm()) > 0.9 > a.sign_agreement(far)
    assert a.sign_agreement(b) == 1.0
    nothing = pack({"x": torch.tensor([1.0, 0.0, 0.0])}, density=0.4)
    other = pack({"x": torch.tensor([0.0, 1.0, 0.0])}, density=0.4)
    assert math.isnan(nothing.sign_agreement(other))


# Back to weights and adapters


def test_applying_and_subtracting_the_base_gives_the_update_back(update: Make) -> None:
    base = {k: torch.round(t * 4) for k, t in update(0).items()}  # sums with powers of two are then exact
    tuned = {k: base[k] + t for k, t in update(1).items()}
    delta = TernaryDelta.compress(tuned, reference=base, density=0.3, alpha=1.0)
    applied = delta.apply(base)
    for key, ternary in delta.items():
        torch.testing.assert_close(applied[key] - base[key], ternary, rtol=0, atol=1e-5)


def test_scales_that_did_not_move_stay_ones(ia3: PeftModel) -> None:
    with pytest.warns(UserWarning, match="no entry to keep"):
        delta = TernaryDelta.compress(ia3, density=0.5)
    assert delta.reference == "ones"
    assert all((t == 1).all() for t in delta.apply().values())
    assert delta.scale.nonzeros == 0


def test_ia3_is_compressed_around_one(ia3: PeftModel) -> None:
    for name, parameter in ia3.named_parameters():
        if "ia3_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    delta = TernaryDelta.compress(ia3, density=0.2, alpha=2.0)
    values = flat(delta.apply())
    assert float((values == 1).double().mean()) == pytest.approx(0.8, abs=0.01)
    assert values.min() > 0.5
    delta.load_into(ia3)
    for key, tensor in get_peft_model_state_dict(ia3).items():
        assert torch.equal(tensor, delta.apply()[key])


def test_the_adapter_folder_gives_the_same_logits(lora: Callable, llama: Callable, tmp_path: Path) -> None:
    model: PeftModel = lora()
    ids = torch.arange(12)[None] % 97
    packed = compress_to_file(model, tmp_path / "e.tern", density=0.3, alpha=1.0)
    packed.to_peft(tmp_path / "adapter")
    packed.load_into(model)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == model.peft_config["default"].lora_alpha  # the scaling stays in the config, folded nowhere
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {float(v) for v in torch.cat([t.flatten() for t in stored.values()]).abs().unique()} <= {
        0.0,
        float(torch.tensor(packed.scale.value, dtype=torch.float32)),
    }


def test_relative_to_the_initial_adapter(lora: Callable, tmp_path: Path) -> None:
    model: PeftModel = lora()
    init = {k: t.clone() for k, t in get_peft_model_state_dict(model).items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained = {k: t.clone() for k, t in get_peft_model_state_dict(model).items()}
    delta = TernaryDelta.compress(model, reference=init, density=1.0, alpha="least_squares")
    applied = delta.apply(init)
    assert all((applied[k] - init[k]).abs().unique().numel() <= 12 for k in init)  # one value, up to rounding
    near = flat(applied) - flat(trained)
    assert near.norm() < (flat(init) - flat(trained)).norm()
    delta.to_peft(tmp_path / "a", init)
    delta.load_into(model, init)
    with pytest.raises(ValueError, match="pass them as `base`"):
        delta.to_peft(tmp_path / "b")
    with pytest.raises(ValueError, match="is not the base"):
        delta.load_into(model, trained)


def test_kept_heads_travel_along(lora: Callable, tmp_path: Path) -> None:
    model: PeftModel = lora(modules_to_save=["lm_head"])
    head = {k: t.clone() for k, t in get_peft_model_state_dict(model).items() if "lm_head" in k}
    packed = compress_to_file(model, tmp_path / "e.tern", density=0.2)
    assert head
    assert all(torch.equal(packed.apply()[k], t) for k, t in head.items())
    assert packed.kept_bytes == sum(t.nbytes for t in head.values())
    packed.load_into(model)


# Files


@pytest.mark.parametrize("coding", ["golomb", "masks"])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_files_hold_the_same_delta(update: Make, tmp_path: Path, coding: str, density: float) -> None:
    delta = pack(update(), density=density, alpha=3.0)
    delta.save(tmp_path / "x.tern", coding)  # type: ignore[arg-type]
    loaded = TernaryDelta.load(tmp_path / "x.tern")
    assert loaded.scale == delta.scale
    assert loaded.coding == coding
    assert loaded.layout == delta.layout
    assert all(torch.equal(t, delta.read(k)) for k, t in loaded.items())
    for key in reversed(list(delta.layout)):  # in any order
        assert all(np.array_equal(a, b) for a, b in zip(loaded.masks[key], delta.masks[key]))
    other = "masks" if coding == "golomb" else "golomb"
    loaded.save(tmp_path / "y.tern", other)  # type: ignore[arg-type]
    assert loaded.dot(TernaryDelta.load(tmp_path / "y.tern")) == pytest.approx(delta.norm() ** 2)
    assert float(load_file(tmp_path / "x.tern")["scale"]) == pytest.approx(delta.scale.value, rel=1e-6)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_sizes_are_those_of_real_files(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(100, 500, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    delta = pack(tensors, density=0.05)
    delta.save(tmp_path / "g.tern")
    assert delta.size() == (tmp_path / "g.tern").stat().st_size
    assert delta.bits_per_param == 8 * delta.size() / 200_000
    assert delta.bits_per_param == pytest.approx(golomb.expected_bits(0.05), rel=0.1)  # what is beyond the code is the header
    assert delta.ratio(bits=16) == pytest.approx(400_000 / delta.size())
    assert 40 < delta.ratio(16) < 16 / golomb.entropy_bits(0.05)
    assert 7.6 < 400_000 / delta.size("masks") <= 8


def test_compressing_to_a_file_is_the_same_as_in_memory(update: Make, tmp_path: Path) -> None:
    base, tuned = update(0), update(1)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / name)
    streamed = compress_to_file(tmp_path / "tuned", tmp_path / "x.tern", reference=tmp_path / "base", density=0.2, alpha=2.0)
    direct = TernaryDelta.compress(tuned, reference=base, density=0.2, alpha=2.0)
    assert streamed.scale == direct.scale
    assert streamed.base == direct.base
    assert streamed.distance(direct) == 0


# Tuning


def test_the_grid_is_searched_and_the_best_wins(update: Make) -> None:
    tensors = update(2)
    tau = flat(tensors)

    def error(delta: TernaryDelta) -> float:
        return float((flat(delta.to_dense()) - tau).square().sum())

    alphas, densities = (0.5, 1.0, 2.0), (0.1, 0.3, 0.5)
    options = {"densities": densities, "alphas": alphas, "reference": "zero"}
    trials = sweep(tensors, evaluate=error, **options)
    assert [(t.delta.scale.density, t.delta.scale.alpha) for t in trials] == [(k, a) for k in densities for a in alphas]
    best = tune(tensors, evaluate=error, **options)
    assert error(best) == min(t.score for t in trials)
    worst = tune(tensors, evaluate=error, higher_is_better=True, **options)
    assert error(worst) == max(t.score for t in trials)
    calls = iter([math.nan, 2.0, math.inf, 3.0])
    one = {"densities": (0.1,), "alphas": (1, 2, 3, 4), "reference": "zero"}
    assert tune(tensors, evaluate=lambda _: next(calls), **one).scale.alpha == 2
    with pytest.raises(ValueError, match="no finite score in 1 trials"):
        tune(tensors, evaluate=lambda _: math.nan, densities=(0.1,), alphas=(1.0,), reference="zero")


def test_adapter_loss_scores_what_is_loaded(lora: Callable) -> None:
    from grainwise.evaluate.language import mean_loss

    model: PeftModel = lora()
    blocks = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(0))
    loss = adapter_loss(model, blocks)
    delta = TernaryDelta.compress(model, density=0.3)
    value = loss(delta)
    delta.load_into(model)
    assert value == mean_loss(model, blocks)
    assert loss(delta.with_alpha(4.0)) != value


# Baselines


def test_baselines_are_what_they_say(update: Make) -> None:
    tensors = {k: t.repeat(20, *[1] * (t.ndim - 1)) for k, t in update(6).items()}
    delta = TaskDelta.of(tensors, "zero")
    tau = flat(tensors)
    sparse = baselines.pruned(delta, 0.1)
    expected = flat(delta.sparsify(0.1).to_dense())
    torch.testing.assert_close(flat(sparse.delta.to_dense()), expected, rtol=1e-3, atol=1e-6)
    signs = baselines.one_bit(delta).delta.to_dense()
    for key, tensor in tensors.items():
        torch.testing.assert_close(signs[key].abs().max(), tensor.abs().mean(), rtol=1e-3, atol=1e-6)
        assert torch.equal(signs[key] > 0, tensor > 0)
        local = baselines.ternary_per_tensor(delta, 0.2).delta.read(key)
        assert int(local.count_nonzero()) == math.floor(0.2 * tensor.numel())
    errors = [float((flat(baselines.uniform(delta, bits).delta.to_dense()) - tau).norm() / tau.norm()) for bits in (2, 4, 8)]
    assert errors[0] > 4 * errors[1] > 30 * errors[2]
    with pytest.raises(ValueError, match="2, 4 or 8 bits, got 3"):
        baselines.uniform(delta, 3)


def test_sizes_of_baselines_are_in_order() -> None:
    tensors = {f"t{i}": torch.randn(40_000, generator=torch.Generator().manual_seed(i)) for i in range(2)}
    delta = TaskDelta.of(tensors, "zero")
    bits = {
        "16": baselines.original(delta).size, "8": baselines.uniform(delta, 8).size, "4": baselines.uniform(delta, 4).size,
        "2": baselines.uniform(delta, 2).size, "1": baselines.one_bit(delta).size, "stc": baselines.stc(delta, 0.1).size,
    }  # fmt: skip
    per_entry = {name: 8 * size / delta.numel for name, size in bits.items()}
    assert 16 <= per_entry["16"] < 16.1
    assert per_entry["8"] < 8 > 4 > per_entry["4"] > per_entry["2"] > 1
    assert 1 <= per_entry["1"] < 1.1
    assert per_entry["stc"] == pytest.approx(golomb.expected_bits(0.1), rel=0.1)
    pruned_bits = 8 * baselines.pruned(delta, 0.1).size / delta.numel
    assert golomb.expected_bits(0.1) + 0.8 < pruned_bits < golomb.expected_bits(0.1) + 1.6  # the values' 16 bits, compressed


# The step of a recipe


@pytest.fixture
def state(lora: Callable, tmp_path: Path) -> RecipeState:
    blocks = torch.randint(97, (6, 32), generator=torch.Generator().manual_seed(0))
    made = SimpleNamespace(
        model=lora(), seed=0, folder=tmp_path, seen=[], train_blocks=lambda length: blocks, test=None, train=None
    )
    made.progress = lambda done, total, what: made.seen.append((done, total))
    return made  # type: ignore[return-value]


def test_the_step_packs_and_reloads_the_adapter(state: RecipeState) -> None:
    figures = recipe_step(state, density=0.2, alpha=0.0)
    packed = TernaryDelta.load(state.folder / "expert.tern")
    assert figures["bytes"] == (state.folder / "expert.tern").stat().st_size
    assert figures["bytes_16_bit"] == 2 * packed.numel
    assert figures["alpha"] == packed.scale.alpha
    assert packed.scale.density == figures["density"] == 0.2
    assert state.seen[-1] == (9, 9)  # type: ignore[attr-defined]
    applied = packed.apply()
    for key, tensor in get_peft_model_state_dict(state.model).items():
        assert torch.equal(tensor, applied[key])


def test_the_step_with_everything_given_evaluates_nothing(state: RecipeState) -> None:
    figures = recipe_step(state, density=0.1, alpha=2.0, coding="masks")
    packed = TernaryDelta.load(state.folder / "expert.tern")
    assert (packed.coding, packed.scale.alpha, figures["alpha"]) == ("masks", 2.0, 2.0)
    assert len(state.seen) == 1  # type: ignore[attr-defined]


def test_the_step_needs_an_adapter(state: RecipeState, llama: Callable) -> None:
    state.model = llama()
    with pytest.raises(ValueError, match="put an adapt step before it"):
        recipe_step(state)


# Bad input


def test_density_and_alpha_are_checked(update: Make) -> None:
    with pytest.raises(ValueError, match=r"density is a fraction in \(0, 1\], got 5; did you mean 0\.05\?"):
        pack(update(), density=5)
    for density in (0.0, -0.1, 500.0, float("nan")):
        with pytest.raises(ValueError, match="density is a fraction"):
            pack(update(), density=density)
    for alpha in (0.0, -1.0, float("inf"), "best"):
        with pytest.raises(ValueError, match="alpha must be a positive number"):
            pack(update(), alpha=alpha)


def test_an_empty_update_warns_and_survives(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.zeros(70)}
    with pytest.warns(UserWarning, match="compressed delta is empty"):
        delta = pack(tensors, density=0.5)
    delta.save(tmp_path / "x.tern")
    loaded = TernaryDelta.load(tmp_path / "x.tern")
    assert not flat(loaded.to_dense()).any()
    assert loaded.norm() == 0
    with pytest.raises(ValueError, match="standard deviation is zero"):
        pack({"a": torch.ones(5)}, density=0.5)


def test_a_file_of_another_base_is_refused_unless_forced(update: Make, lora: Callable, tmp_path: Path) -> None:
    base, tuned = update(0), update(1)
    TernaryDelta.compress(tuned, reference=base).save(tmp_path / "x.tern")
    loaded = TernaryDelta.load(tmp_path / "x.tern")
    loaded.apply(base)
    with pytest.raises(ValueError, match=r"not the base that this update was made for.*force=True"):
        loaded.apply(update(2))
    loaded.apply(update(2), force=True)
    expert = TernaryDelta.compress(lora(), density=0.1)
    expert.load_into(lora(seed=5))
    with pytest.raises(ValueError, match="model under this adapter is not the one"):
        expert.load_into(lora(base_seed=3))
    expert.load_into(lora(base_seed=3), force=True)


def test_foreign_and_damaged_files_are_errors(update: Make, tmp_path: Path) -> None:
    save_file(update(), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no \.tern file of this version"):
        TernaryDelta.load(tmp_path / "plain")
    path = tmp_path / "x.tern"
    pack(update(), density=0.5).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        TernaryDelta.load(path)
    for coding in ("golomb", "masks"):
        pack(update(), density=0.5).save(path, coding)  # type: ignore[arg-type]
        tensors, metadata = load_file(path), {"format": "grainwise.tern 1"}
        from grainwise.merge.tensor_store import read_metadata

        metadata = read_metadata(path)
        save_file({**tensors, "signs": tensors["signs"][:-8].clone()}, path, metadata)
        with pytest.raises(ValueError, match="damaged"):
            TernaryDelta.load(path)
        save_file({**tensors, "layout": tensors["layout"][:-4].clone()}, path, metadata)
        with pytest.raises(ValueError, match="damaged"):
            TernaryDelta.load(path)
        save_file(tensors, path, {k: v for k, v in metadata.items() if k != "alpha"})
        with pytest.raises(ValueError, match="damaged"):
            TernaryDelta.load(path)
    with pytest.raises(ValueError, match=r"unknown coding 'golom'.*'golomb'"):
        pack(update()).save(path, "golom")  # type: ignore[arg-type]


def test_updates_of_different_models_are_not_mixed(update: Make, lora: Callable) -> None:
    delta = pack(update())
    with pytest.raises(ValueError, match="cannot be compared: only in the first: a"):
        delta.dot(pack({k: t for k, t in update().items() if k != "a"}))
    with pytest.raises(ValueError, match="cannot be joined"):
        delta + pack({**update(), "a": torch.randn(63)})
    with pytest.raises(ValueError, match="different bases"):
        TernaryDelta.compress(lora()) + TernaryDelta.compress(lora(base_seed=1))
    with pytest.raises(ValueError, match="no adapter configuration"):
        delta.to_peft("nowhere")
    with pytest.raises(ValueError, match="different tensors"):
        delta.load_into(lora())
