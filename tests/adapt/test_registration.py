"""A method defined outside PEFT, through the one function, with everything that PEFT users call."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from grainwise.adapt import registration
from grainwise.adapt.tuner import AdapterConfig, AdapterLayer, Tuner


@dataclass
class GainConfig(AdapterConfig):
    """The smallest method there is: one number per output."""

    method: ClassVar[str] = "gain"
    start: float = field(default=0.0)


class GainLayer(AdapterLayer):
    adapter_layer_names = ("gain_g",)

    def init(self, config, generator):
        return {"gain_g": torch.full((self.out_features,), config.start)}

    def delta(self, x, name):
        return (x @ self.base_layer.weight.T) * self.gain_g[name]

    def get_delta_weight(self, name):
        return self.base_layer.weight * self.gain_g[name][:, None]


class GainTuner(Tuner):
    prefix = "gain_"
    tuner_layer_cls = GainLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, labels=None):
        y = self.outer(torch.tanh(self.inner(x)))
        return SimpleNamespace(loss=None, y=y) if labels is None else {"loss": (y - labels).square().mean(), "y": y}


@pytest.fixture(scope="module", autouse=True)
def registered():
    kind = registration.register_method("gain", GainConfig, GainTuner)
    assert kind is PeftType.GAIN
    assert kind == "GAIN" == kind.value
    assert PeftType("GAIN") is kind is PeftType["GAIN"]
    assert kind in list(PeftType)


def test_round_trip_merge_and_training(tmp_path):
    x, labels = torch.randn(8, 6), torch.randn(8, 3)
    model = get_peft_model(Net(), GainConfig(target_modules=["inner"]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.inner.gain_g.default"]
    before = model(x).y
    args = TrainingArguments(tmp_path / "run", max_steps=4, learning_rate=0.1, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, args, train_dataset=[{"x": a, "labels": b} for a, b in zip(x, labels)]).train()
    after = model.eval()(x).y.detach()
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["peft_type"] == "GAIN"
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "saved"), GainConfig)
    again = PeftModel.from_pretrained(Net(), tmp_path / "saved")
    assert torch.equal(again(x).y, after)
    torch.testing.assert_close(again.merge_and_unload()(x).y, after)


def test_registering_again_changes_nothing():
    count = len(PeftType)
    assert registration.register_method("gain", GainConfig, GainTuner) is PeftType.GAIN
    assert registration.register() == registration.MEMBERS == registration.register()
    assert len(PeftType) == count


@pytest.mark.parametrize("name", ["lora", "gain"])
def test_a_taken_name_is_refused(name):
    with pytest.raises(ValueError, match=f"has a method '{name}' already"):
        registration.register_method(name, PeftConfig, GainTuner)


@pytest.mark.parametrize("name", ["Gain", "two words", "gain_", ""])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ValueError, match="lower-case identifier"):
        registration.register_method(name, GainConfig, GainTuner)


def test_peft_types_of_its_own_are_untouched():
    assert PeftType.LORA.value == "LORA"
    assert isinstance(peft.get_peft_config({"peft_type": "LORA"}), peft.LoraConfig)
