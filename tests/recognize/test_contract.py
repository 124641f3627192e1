"""What every image classifier of this room promises. A new model is tested by adding its line to CASES."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

import grainwise  # noqa: F401  (importing it registers the models)
from grainwise.recognize import registration
from grainwise.recognize.glsim import GLSimForImageClassification
from grainwise.recognize.training import ArrayImages, accuracy, train_recogniser

VIT = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4)
LABELS = 3
CASES = {  # system -> a tiny untrained classifier for 16 x 16 images
    "glsim": lambda: GLSimForImageClassification.from_encoder(copy.deepcopy(VIT), num_labels=LABELS, top_k=4),
}
SIZES = {"glsim": [(16, 16), (24, 16), (8, 8)]}  # (height, width) a member must take


@pytest.fixture(params=registration.MODELS)
def member(request):
    return request.param


@pytest.fixture
def model(member):
    torch.manual_seed(0)
    made = CASES[member]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))  # heads may start at zero
    return made


def pixels(count=3, size=(16, 16), seed=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_every_member_is_listed():
    assert set(CASES) == set(SIZES) == set(registration.MODELS)
    assert set(registration.register()) == set(registration.MODELS)


def test_save_and_load(model, member, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again).__name__ == registration.MODELS[member][1]
    config = AutoConfig.from_pretrained(tmp_path)
    assert (type(config), config.num_labels) == (type(model.config), LABELS)
    torch.testing.assert_close(again(pixels()).logits, model(pixels()).logits, rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(third(pixels()).logits, again(pixels()).logits, rtol=1e-4, atol=1e-5)


def test_every_size_that_the_config_allows(model, member):
    for size in SIZES[member]:
        assert model(pixels(2, size)).logits.shape == (2, LABELS)


def test_an_image_does_not_depend_on_its_batch(model):
    together = model(pixels()).logits
    alone = torch.cat([model(x[None]).logits for x in pixels()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_mixed_precision(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels(), labels=torch.tensor([0, 1, 2]))
    assert output.loss.dtype == torch.float32
    expected = model(pixels()).logits
    assert (output.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_every_parameter_learns(model):
    model.train()
    model(pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_soft_labels_give_the_same_loss_as_hard_ones(model):
    labels = torch.tensor([0, 2, 1])
    hard = model(pixels(), labels=labels).loss
    soft = model(pixels(), labels=torch.nn.functional.one_hot(labels, LABELS).float()).loss
    torch.testing.assert_close(hard, soft)


def test_export(model):
    exported = torch.export.export(model, (pixels(),)).module()
    torch.testing.assert_close(exported(pixels(seed=5)).logits, model(pixels(seed=5)).logits, rtol=1e-4, atol=1e-5)


def test_training_with_trainer(member):
    torch.manual_seed(0)
    labels = torch.arange(48) % LABELS
    images = 0.3 * torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images[torch.arange(48), labels] += 0.5  # the class is the strongest colour
    data = ArrayImages(images, labels)
    fresh = CASES[member]()
    record = train_recogniser(fresh, data, epochs=12, lr=3e-3, batch_size=16)
    assert record.losses[-1] < 0.5 * record.losses[0]
    assert accuracy(fresh, data) > 0.9
    torch.manual_seed(0)
    twin = CASES[member]()
    assert train_recogniser(twin, data, epochs=12, lr=3e-3, batch_size=16).losses == record.losses
