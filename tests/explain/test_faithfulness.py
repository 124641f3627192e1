from __future__ import annotations

import pytest
import torch

from grainwise.explain import (
    ClassifierScorer,
    Curve,
    compare,
    deletion_curve,
    gradcam,
    hsic,
    insertion_curve,
    kernel_shap,
    mu_fidelity,
    occlusion,
    rise,
    split_grid,
    stages_of_map,
)


@pytest.fixture
def scorer(quadrants):
    return ClassifierScorer(quadrants)


def test_curves_start_and_end_at_black_and_full(scorer, image):
    stages = split_grid(16, 16, 4)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    ends = scorer(torch.stack([torch.zeros_like(image), image])).probabilities[:, 1]
    insertion, deletion = insertion_curve(scorer, image, stages, 1), deletion_curve(scorer, image, stages, 1)
    torch.testing.assert_close(insertion.score[[0, -1]], ends)
    torch.testing.assert_close(deletion.score[[0, -1]], ends.flip(0))
    torch.testing.assert_close(insertion.share, torch.linspace(0, 1, 17))


def test_deleting_backwards_mirrors_inserting(scorer, image):
    stages = stages_of_map(torch.rand(16, 16, generator=torch.Generator().manual_seed(1)), 7)
    insertion = insertion_curve(scorer, image, stages, 2)
    deletion = deletion_curve(scorer, image, stages.flip(0), 2)
    torch.testing.assert_close(deletion.score.flip(0), insertion.score)
    torch.testing.assert_close(1 - deletion.share.flip(0), insertion.share, atol=1e-6, rtol=0)
    assert deletion.area == pytest.approx(insertion.area, abs=1e-6)


def test_area_and_highest_score():
    curve = Curve(torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0.0, 0.4, 0.9, 0.2]))
    assert curve.area == pytest.approx(0.05 + 0.1625 + 0.275)
    assert [curve.highest(s) for s in (0.1, 0.25, 0.75)] == pytest.approx([0.0, 0.4, 0.9])


def test_maps_are_cut_into_equal_slices():
    heat = torch.arange(16.0).reshape(4, 4)
    stages = stages_of_map(heat, 5)
    assert stages.flatten(1).sum(1).tolist() == [4, 3, 3, 3, 3]
    assert stages[0].flatten().nonzero()[:, 0].tolist() == [12, 13, 14, 15]
    with pytest.raises(ValueError, match="finite"):
        stages_of_map(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"1\.\.4"):
        stages_of_map(torch.rand(2, 2), 5)


@pytest.mark.parametrize("explainer", [rise, occlusion, kernel_shap, hsic])
def test_every_explainer_finds_the_quadrant_that_decides(explainer, scorer, image):
    heat = explainer(scorer, image, 3, images=200)
    assert heat.shape == (16, 16)
    assert float(heat[9:, 9:].mean()) > max(float(heat[:7, :7].mean()), float(heat[:7, 9:].mean()), float(heat[9:, :7].mean()))
    assert scorer.images_seen <= 202


def test_kernel_shap_is_exact_on_a_sum_of_patches(scorer, image):
    class Sum:
        images_seen = 0

        def __call__(self, images):
            total = images.flatten(1).sum(1, keepdim=True)
            return type("S", (), {"probabilities": total})()

    heat = kernel_shap(Sum(), image, 0, images=60, grid=4)
    patches = image.sum(0).reshape(4, 4, 4, 4).sum((1, 3))
    torch.testing.assert_close(heat[::4, ::4], patches, atol=1e-3, rtol=1e-3)


def test_grad_cam_reads_convolutions_and_vits(small_vit, image):
    assert gradcam(small_vit, image, 2).shape == (16, 16)
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
    model = torch.nn.Sequential(
        convolution, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    ).eval()
    heat = gradcam(model, image, 1)
    with torch.no_grad():
        maps = convolution((image[None] - 0.5) / 0.5)[0]
    weight = model[-1].weight[1] * (maps > 0).float().mean((1, 2))  # the gradient through the pooling, averaged
    torch.testing.assert_close(heat, (weight[:, None, None] * maps).sum(0).relu().detach() / 256, rtol=1e-3, atol=1e-6)
    with pytest.raises(TypeError, match="unknown arguments"):
        gradcam(model, image, 1, men=(0, 0, 0))
    with pytest.raises(ValueError, match="give layer="):
        gradcam(torch.nn.Linear(3, 2), image, 1)


def test_mu_fidelity_prefers_the_true_map(scorer, image):
    regions, truth = split_grid(16, 16, 4), torch.zeros(16, 16)
    truth[8:, 8:] = 1.0
    assert mu_fidelity(scorer, image, truth, regions, 3) > 0.6
    assert mu_fidelity(scorer, image, truth.flip(0), regions, 3) < 0.3
    assert mu_fidelity(scorer, image, torch.zeros(16, 16), regions, 3) == 0.0


def test_all_rankings_are_judged_by_the_same_code(scorer, image):
    truth = torch.zeros(16, 16)
    truth[8:, 8:] = 1.0
    found = compare(scorer, image, {"truth": truth, "wrong": 1 - truth, "regions": split_grid(16, 16, 2).flip(0)}, 3)
    assert found["truth"]["insertion"] > found["wrong"]["insertion"]
    assert found["truth"]["deletion"] < found["wrong"]["deletion"]
    assert set(found["regions"]) == {"insertion", "deletion", "highest_25", "highest_50", "highest_75", "highest_100"}
    assert found["regions"]["highest_25"] > found["wrong"]["highest_25"]


def test_captum_agrees_on_occlusion_of_regions(quadrants, scorer, image):
    captum = pytest.importorskip("captum.attr")
    regions = split_grid(16, 16, 4)
    mask = (regions * torch.arange(16)[:, None, None]).sum(0)[None, None]
    peer = captum.FeatureAblation(lambda x: quadrants((x - 0.5) / 0.5).softmax(1))
    theirs = peer.attribute(image[None], baselines=0.0, target=2, feature_mask=mask)[0, 0]
    full = scorer(image[None]).probabilities[0, 2]
    ours = full - scorer(image * ~regions[:, None]).probabilities[:, 2]
    torch.testing.assert_close((regions * ours[:, None, None]).sum(0), theirs.detach(), atol=1e-5, rtol=1e-4)
