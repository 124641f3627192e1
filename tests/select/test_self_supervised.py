from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grainwise.select.self_supervised import (
    SSLPretrainer,
    features,
    knn_probe,
    linear_probe,
    nt_xent,
    shuffled,
    two_view_augmentation,
)


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2))


@pytest.fixture
def images():
    return torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_its_definition():
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    unit = z / z.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T / 0.5).exp()
    terms = []
    for i in range(6):
        others = sum(similarity[i, j] for j in range(6) if j != i)
        terms.append(-torch.log(similarity[i, (i + 3) % 6] / others))
    torch.testing.assert_close(nt_xent(z, 0.5), torch.stack(terms).mean())


def test_training_lowers_the_loss_and_leaves_the_given_backbone_alone(images):
    fresh = backbone()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    trainer = SSLPretrainer("simclr", fresh, steps=25, batch_size=16, lr=1e-2).fit(images)
    assert np.mean(trainer.losses[-5:]) < np.mean(trainer.losses[:5])
    assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())
    assert not trainer.backbone.training
    again = SSLPretrainer("simclr", fresh, steps=25, batch_size=16, lr=1e-2).fit(images)
    assert trainer.losses == again.losses
    assert features(trainer.backbone, images, batch_size=7).shape == (20, 12)


def test_features_are_the_pooled_backbone(images):
    from transformers import ViTConfig, ViTModel

    model = backbone().eval()
    with torch.no_grad():
        expected = model((images - 0.5) / 0.5).mean((2, 3))
    np.testing.assert_allclose(features(model, images, batch_size=6), expected.numpy(), atol=1e-6)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **small), add_pooling_layer=False)
    assert features(vit, images).shape == (20, 8)


def test_two_views_of_an_image_differ_and_stay_images(images):
    generator = torch.Generator().manual_seed(0)
    one, two = (two_view_augmentation(images, generator) for _ in range(2))
    assert one.shape == images.shape
    assert (one - two).abs().mean() > 0.01
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1


def test_every_epoch_shows_every_row_once():
    rows = torch.cat(list(shuffled(12, 4, 6, torch.Generator().manual_seed(0))))
    assert sorted(rows[:12].tolist()) == sorted(rows[12:].tolist()) == list(range(12))
    small = list(shuffled(3, 8, 2, torch.Generator().manual_seed(0)))
    assert [len(b) for b in small] == [8, 8]


def test_probes_read_separable_features():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = np.eye(3)[y] * 3 + 0.3 * rng.standard_normal((90, 3))
    assert linear_probe(x[:60], y[:60], x[60:], y[60:]) == 1.0
    assert knn_probe(x[:60], y[:60], x[60:], y[60:], k=5) == 1.0


def test_bad_calls_are_named(images):
    with pytest.raises(ValueError, match="Did you mean 'simclr'"):
        SSLPretrainer("simcrl", backbone(), steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        SSLPretrainer("simclr", backbone(), steps=0)
    with pytest.raises(ValueError, match="at least 2, 3, height"):
        SSLPretrainer("simclr", backbone(), steps=1).fit(images[0])
    with pytest.raises(FloatingPointError, match="step 0"):
        SSLPretrainer("simclr", backbone(), steps=1, batch_size=4).fit(images * torch.nan)
