from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grainwise.select.self_supervised import (
    BYOL,
    MAE,
    SSLPretrainer,
    crop_and_flip,
    features,
    nt_xent,
    two_view_augmentation,
)


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2))


def vit(**options):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **small), **options)


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


@pytest.mark.parametrize("objective", ["simclr", "byol", "mae"])
def test_training_lowers_the_loss_and_leaves_the_given_backbone_alone(images, objective):
    fresh = vit() if objective == "mae" else backbone()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    state = torch.get_rng_state()
    trainer = SSLPretrainer(objective, fresh, steps=25, batch_size=16, lr=1e-2).fit(images)
    assert np.mean(trainer.losses[-5:]) < np.mean(trainer.losses[:5])
    assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not trainer.backbone.training
    again = SSLPretrainer(objective, fresh, steps=25, batch_size=16, lr=1e-2).fit(images)
    assert trainer.losses == again.losses
    assert features(trainer.backbone, images, batch_size=7).shape == (20, 8 if objective == "mae" else 12)


def test_low_precision_leaves_the_contrast_in_float32(images):
    z = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(z, 0.07), nt_xent(z.float(), 0.07))
    low = SSLPretrainer("simclr", backbone(), steps=3, batch_size=16, autocast=torch.bfloat16).fit(images)
    assert np.isfinite(low.losses).all()


def test_byols_loss_is_the_distance_of_each_view_from_the_target_of_the_other(images):
    model = BYOL(backbone(), images[:2], 10, momentum=0.9)
    views = torch.cat([images, images.flip(3)])
    unit = nn.functional.normalize
    online, target = (unit(f, dim=1) for f in (model.predictor(project(model.online, views)), project(model.target, views)))
    one, two = (online[:20] - target[20:]).square().sum(1), (online[20:] - target[:20]).square().sum(1)
    torch.testing.assert_close(model(views).loss, (one + two).mean())


def project(network, views):
    module, head = network
    return head(module((views - 0.5) / 0.5).mean((2, 3)))


def test_byols_target_follows_and_is_not_trained(images):
    model = BYOL(backbone(), images[:2], 4, momentum=0.8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        share = 0.2 * (np.cos(np.pi * step / 4) + 1) / 2
        expected = [t + share * (o - t) for t, o in zip(model.target.parameters(), model.online.parameters())]
        model(torch.cat([images, images.flip(3)])).loss.backward()
        assert all(p.grad is None for p in model.target.parameters())
        for found, wanted in zip(model.target.parameters(), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
    assert not all(torch.equal(t, o) for t, o in zip(model.target.parameters(), model.online.parameters()))


def test_mae_counts_hidden_patches_alone(images):
    model = MAE(vit(), images[:2], 1).eval()
    batch = model.batch(images, crop_and_flip, torch.Generator().manual_seed(0))
    hidden = batch["hidden"]
    assert hidden.shape == (20, 16)
    assert (hidden.sum(1) == 12).all()
    found = model(**batch)
    (gradient,) = torch.autograd.grad(found.loss, found.pixels)
    assert (gradient[hidden] != 0).any(1).all()
    assert not gradient[~hidden].any()
    patches = batch["images"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(20, 16, 48)
    wanted = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found.loss, ((found.pixels - wanted) ** 2)[hidden].mean())


def test_mae_encodes_what_it_is_shown(images):
    model = MAE(vit(), images[:2], 1, mask_ratio=0.5).eval()
    hidden = torch.arange(16).expand(20, 16) >= 8  # the lower half
    other = images.clone()
    other[:, :, 8:] = 0
    with torch.no_grad():
        shown = model.encode_shown(images, ~hidden)
        assert shown.shape == (20, 9, 64)  # the class token and eight patches
        torch.testing.assert_close(model.encode_shown(other, ~hidden), shown)
        assert not torch.allclose(model(other, hidden).loss, model(images, hidden).loss)
        whole = model.encode_shown(images, torch.ones(20, 16, dtype=torch.bool))
        tokens = model.backbone((images - 0.5) / 0.5).last_hidden_state
        torch.testing.assert_close(whole, model.enter(tokens))
    np.testing.assert_allclose(features(model.backbone, images), tokens.mean(1).numpy(), atol=1e-6)  # no pooler, nothing hidden


def test_features_of_a_masking_encoder_are_those_of_the_whole_image(images):
    from transformers import ViTMAEConfig, ViTMAEModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = ViTMAEModel(ViTMAEConfig(image_size=16, patch_size=4, mask_ratio=0.75, **small))
    one, two = features(encoder, images), features(encoder, images)
    np.testing.assert_allclose(one, two, atol=1e-6)  # which patches are seen does not depend on chance
    assert encoder.config.mask_ratio == 0.75


def test_features_are_the_pooled_backbone(images):
    model = backbone().eval()
    with torch.no_grad():
        expected = model((images - 0.5) / 0.5).mean((2, 3))
    np.testing.assert_allclose(features(model, images, batch_size=6), expected.numpy(), atol=1e-6)
    for pooler in (True, False):
        assert features(vit(add_pooling_layer=pooler), images).shape == (20, 8)


def test_two_views_of_an_image_differ_and_stay_images(images):
    generator = torch.Generator().manual_seed(0)
    one, two = (two_view_augmentation(images, generator) for _ in range(2))
    assert one.shape == images.shape
    assert (one - two).abs().mean() > 0.01
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1


def test_bad_calls_are_named(images):
    with pytest.raises(ValueError, match="Did you mean 'simclr'"):
        SSLPretrainer("simcrl", backbone(), steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        SSLPretrainer("simclr", backbone(), steps=0)
    with pytest.raises(ValueError, match="at least 2, 3, height"):
        SSLPretrainer("simclr", backbone(), steps=1).fit(images[0])
    with pytest.raises(ValueError, match="byol has no setting 'temperature'"):
        SSLPretrainer("byol", backbone(), steps=1, temperature=0.1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        SSLPretrainer("simclr", backbone(), steps=1, temperature=0).fit(images)
    with pytest.raises(ValueError, match="momentum must lie between 0 and 1"):
        SSLPretrainer("byol", backbone(), steps=1, momentum=1.5).fit(images)
    with pytest.raises(ValueError, match="Sequential has none: give a vision transformer"):
        SSLPretrainer("mae", backbone(), steps=1).fit(images)
    for ratio in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"mask_ratio {ratio} hides"):
            SSLPretrainer("mae", vit(), steps=1, mask_ratio=ratio).fit(images)
    with pytest.raises(FloatingPointError, match="step 0"):
        SSLPretrainer("simclr", backbone(), steps=1, batch_size=4).fit(images * torch.nan)
