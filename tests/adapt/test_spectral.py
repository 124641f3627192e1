"""Head and tail of the spectrum, and LoRA folders from factors."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from grainwise.adapt.spectral import Factors, head, save_lora, tail

SHAPES = [(12, 12), (9, 20), (20, 9)]


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split", [head, tail])
def test_components_are_singular(shape, split):
    weight = matrix(shape)
    values = torch.linalg.svdvals(weight.double())
    found = split(weight, 3)
    expected = values[:3] if split is head else values[-3:]
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=0)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.right @ found.right.T, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight.double() @ found.right.T, found.left * found.values, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 10**6), st.data())
def test_head_and_tail_add_up(out, inner, seed, data):
    weight = matrix((out, inner), seed)
    k = min(out, inner)
    r = data.draw(st.integers(1, k - 1))
    low = tail(weight, r).product()
    torch.testing.assert_close(head(weight, k - r).product() + low, weight.double(), rtol=0, atol=1e-9)
    # Eckart-Young: what is dropped weighs as much as the smallest singular values
    dropped = torch.linalg.svdvals(weight.double())[-r:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.matrix_norm(low), dropped, rtol=1e-6, atol=1e-9)


def test_tiny_components_are_found_beside_large_ones():
    q, _ = torch.linalg.qr(matrix((16, 16)).double())
    p, _ = torch.linalg.qr(matrix((16, 16), 1).double())
    values = torch.logspace(3, -3, 16, dtype=torch.float64)  # six orders of magnitude
    found = tail((q * values) @ p, 2)
    torch.testing.assert_close(found.values, values[-2:], rtol=1e-3, atol=0)


def test_a_rank_deficient_weight_has_a_zero_tail():
    weight = matrix((10, 3)) @ matrix((3, 8), 1)
    found = tail(weight, 4)
    assert found.product().abs().max() < 1e-6
    zero = tail(torch.zeros(4, 6), 2)
    assert not zero.right.any()
    assert zero.product().isfinite().all()


def test_low_precision_weights_are_split_in_double():
    weight = matrix((12, 12)).bfloat16()
    assert tail(weight, 2).left.dtype == torch.float64
    torch.testing.assert_close(tail(weight, 2).values, torch.linalg.svdvals(weight.double())[-2:], rtol=1e-8, atol=0)


def test_factors_multiply_to_their_product():
    f = Factors(torch.ones(2, 1), torch.tensor([3.0]), torch.ones(1, 2))
    assert (f.product() == 3).all()


@pytest.mark.parametrize(
    ("weight", "r", "message"),
    [
        (torch.zeros(4, 6), 0, "between 1 and min"),
        (torch.zeros(4, 6), 5, r"= 4 for a weight of shape \(4, 6\), got 5"),
        (torch.zeros(4), 1, "matrix"),
        (torch.zeros(4, 4, dtype=torch.int8), 1, "floating-point"),
        (torch.empty(4, 4, device="meta"), 1, "meta device"),
        (torch.full((4, 4), float("nan")), 1, "not finite"),
    ],
)
def test_bad_input(weight, r, message):
    with pytest.raises(ValueError, match=message):
        tail(weight, r)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7, bias=False), nn.Linear(7, 4)

    def forward(self, x):
        return self.b(self.a(x))


def test_save_lora_loads_with_peft_alone(tmp_path):
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 5)
    factors = {"a": (matrix((7, 3)), matrix((3, 5), 1)), "b": (matrix((4, 2)), matrix((2, 7), 1))}  # ranks differ
    expected = model.b(model.a(x) + x @ (factors["a"][0] @ factors["a"][1]).T)
    expected = expected + (model.a(x) + x @ (factors["a"][0] @ factors["a"][1]).T) @ (factors["b"][0] @ factors["b"][1]).T
    folder = save_lora(tmp_path / "lora", factors, base_model="some/base")
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "some/base"
    torch.testing.assert_close(PeftModel.from_pretrained(model, folder)(x), expected)


def test_save_lora_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no factors"):
        save_lora(tmp_path, {})
    with pytest.raises(ValueError, match="factors of a do not fit"):
        save_lora(tmp_path, {"a": (matrix((7, 3)), matrix((2, 5)))})
