from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import nn

from grainwise.explain import (
    SMDL,
    Attribution,
    ClassifierScorer,
    ClipScorer,
    entropy_confidence,
    evidential_confidence,
    evidential_loss,
    save_picture,
    split_grid,
)
from grainwise.explain.set_scorer import Scores, caught_input
from grainwise.explain.smdl import SubmodularObjective


@pytest.fixture
def masks():
    return split_grid(16, 16, 3)


def by_hand(scorer, image, masks, target, weights, chosen):
    """F of a set of regions, straight from its definition."""
    seen = masks[list(chosen)].any(0)
    scores = scorer(torch.stack([image * seen, image * ~seen]))
    single = scorer(image * masks[:, None]).features
    distance = [
        [math.acos(min(1.0, float(torch.cosine_similarity(single[i], single[j], dim=0)))) / math.pi for j in chosen]
        for i in chosen
    ]
    effective = sum(min(d for j, d in enumerate(row) if j != i) for i, row in enumerate(distance)) if len(chosen) > 1 else 0.0
    parts = [float(scores.confidence[0]), effective, float(scores.probabilities[0, target])]
    parts.append(1 - float(scores.probabilities[1, target]))
    return sum(w * p for w, p in zip(weights, parts)), parts


def test_the_objective_is_its_definition_and_independent_of_chunks_and_order(small_vit, image, masks):
    weights = (0.5, 1.0, 2.0, 3.0)
    scorers = [ClassifierScorer(small_vit, batch_size=size) for size in (1, 7, 64)]
    objectives = [SubmodularObjective(s, image, masks, 2, weights) for s in scorers]
    for objective in objectives:
        objective.values((), range(9))
    for chosen, candidates in (((4, 1), [0, 3, 8]), ((1, 4), [0, 3, 8]), ((2,), [5])):
        expected = [by_hand(scorers[0], image, masks, 2, weights, [*chosen, c])[0] for c in candidates]
        for objective in objectives:
            torch.testing.assert_close(
                objective.values(chosen, candidates), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5
            )


def test_greedy_equals_exhaustive_re_evaluation(small_vit, image, masks):
    scorer = ClassifierScorer(small_vit)
    found = SMDL(scorer, weights=(1, 1, 1, 1)).explain(image, masks, target=1)
    chosen = []
    for step in range(5):
        left = [i for i in range(9) if i not in chosen]
        values = [by_hand(scorer, image, masks, 1, (1, 1, 1, 1), [*chosen, i]) for i in left]
        best = max(range(len(left)), key=lambda i: values[i][0])
        chosen.append(left[best])
        assert found.order[step] == chosen[-1]
        assert float(found.scores["total"][step]) == pytest.approx(values[best][0], abs=1e-4)
        row = [float(found.scores[n][step]) for n in ("confidence", "effectiveness", "consistency", "collaboration")]
        assert row == pytest.approx(values[best][1], abs=1e-4)
    assert sorted(found.order) == list(range(9))
    assert found.images_seen == 2 + 2 * (9 + 8 + 7 + 6 + 5 + 4 + 3 + 2 + 1)


def test_the_full_set_and_the_ends_are_the_models_answers(small_vit, image, masks):
    scorer = ClassifierScorer(small_vit)
    found = SMDL(scorer).explain(image, masks, target=3)
    full = float(scorer(image[None]).probabilities[0, 3])
    black = float(scorer(torch.zeros(1, 3, 16, 16)).probabilities[0, 3])
    assert float(found.scores["consistency"][-1]) == pytest.approx(full, abs=1e-5)
    assert float(found.scores["collaboration"][-1]) == pytest.approx(1 - black, abs=1e-5)
    from grainwise.explain import deletion_curve, insertion_curve

    stages = found.stages
    torch.testing.assert_close(found.insertion.score, insertion_curve(scorer, image, stages, 3).score, atol=1e-5, rtol=0)
    assert found.deletion_auc == pytest.approx(deletion_curve(scorer, image, stages, 3).area, abs=1e-5)
    part = SMDL(scorer).explain(image, masks, target=3, k=4)
    assert part.order == found.order[:4]
    assert float(part.insertion.share[-1]) == 1.0
    assert float(part.insertion.score[-1]) == pytest.approx(full, abs=1e-5)


def test_a_model_that_looks_at_one_block_selects_it_first(quadrants, image):
    masks = split_grid(16, 16, 4)
    for target, corner in ((0, 0), (3, 15)):
        found = SMDL(quadrants, weights=(0, 0, 1, 1)).explain(image, masks, target=target)
        top, left = (8 if target in (2, 3) else 0), (8 if target in (1, 3) else 0)
        inside = masks[found.order[:4]][:, top : top + 8, left : left + 8].any(0)
        assert inside.all()
        assert corner in found.order[:4]


def test_a_duplicate_lowers_effectiveness():
    class Features:
        images_seen = 0

        def __call__(self, images):
            seen = (images.flatten(2).amax(2) > 0).float()[:, :3]  # which channel is visible
            probability = torch.full((len(images), 2), 0.5)
            return Scores(probability, seen + 1e-3, torch.zeros(len(images)))

    picture = torch.zeros(3, 2, 4)
    picture[0, 0, 0], picture[1, 0, 1], picture[0, 0, 2] = 1.0, 1.0, 1.0  # regions 0 and 2 look the same
    masks = torch.zeros(4, 2, 4, dtype=torch.bool)
    for i in range(4):
        masks[i, :, i] = True
    objective = SubmodularObjective(Features(), picture, masks, 0, (0, 1, 0, 0))
    single = objective.values((), range(4))
    assert single.tolist() == [0.0] * 4
    pair = float(objective.values((0,), [1])[0])
    assert pair == pytest.approx(1.0, abs=0.01)  # two orthogonal regions: 1/2 each
    assert float(objective.values((0, 1), [2])[0]) < pair


def test_confidence_of_certain_and_uniform_answers():
    uniform, certain = torch.zeros(1, 4), torch.tensor([[50.0, 0, 0, 0]])
    assert float(entropy_confidence(uniform)) == pytest.approx(0.0, abs=1e-6)
    assert float(entropy_confidence(certain)) == pytest.approx(1.0, abs=1e-6)
    assert float(1 - evidential_confidence(uniform)) == pytest.approx(0.5)
    random = evidential_confidence(5 * torch.randn(100, 7))
    assert ((random >= 0) & (random < 1)).all()


def test_the_evidential_loss_teaches_right_and_humble_answers():
    labels = torch.tensor([0, 1])
    right, wrong, none = torch.tensor([[4.0, -9], [-9, 4]]), torch.tensor([[-9.0, 4], [4, -9]]), torch.full((2, 2), -9.0)
    values = [float(evidential_loss(x, labels, 10)) for x in (right, none, wrong)]
    assert values == sorted(values)
    assert float(evidential_loss(wrong, labels, 0)) < values[2]  # the divergence is phased in
    logits = torch.zeros(2, 2, requires_grad=True)
    evidential_loss(logits, labels, 3).backward()
    assert (logits.grad[[0, 1], labels] < 0).all()


def test_an_evidential_model_is_asked_for_confidence(quadrants, image, masks):
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).eval()
    scorer = ClassifierScorer(quadrants, confidence="evidential", evidential_model=other)
    found = scorer(image[None])
    with torch.no_grad():
        torch.testing.assert_close(found.confidence, evidential_confidence(other((image[None] - 0.5) / 0.5)))
    assert SMDL(scorer).explain(image, masks, 0, k=2).order


def test_features_are_what_the_head_reads(small_vit, image):
    with torch.no_grad():
        hidden = small_vit.vit((image[None] - 0.5) / 0.5).last_hidden_state[:, 0]
    torch.testing.assert_close(ClassifierScorer(small_vit)(image[None]).features, hidden)
    with caught_input(small_vit.classifier) as caught:
        assert caught == []
    assert not small_vit.classifier._forward_pre_hooks


@pytest.mark.parametrize("search", ["lazy", "stochastic"])
def test_faster_searches_see_fewer_images(search, small_vit, image):
    masks = split_grid(16, 16, 5)
    full = SMDL(small_vit, weights=(0, 0, 1, 1)).explain(image, masks, 1, k=12)
    fast = SMDL(small_vit, weights=(0, 0, 1, 1), search=search, block=4).explain(image, masks, 1, k=12)
    assert fast.images_seen < full.images_seen
    assert len(set(fast.order)) == 12
    assert float(fast.scores["total"][-1]) > 0.8 * float(full.scores["total"][-1])


def test_attribute_has_captums_shape(small_vit, image, masks):
    inputs = torch.stack([image, image.flip(2)])
    numbers = (masks * torch.arange(9)[:, None, None]).sum(0)
    explainer = SMDL(small_vit)
    maps = explainer.attribute(inputs, [1, 2], masks)
    assert maps.shape == inputs.shape
    first = explainer.explain(image, masks, 1)
    torch.testing.assert_close(maps[0, 2], first.map)
    assert float(first.map.max()) == 1.0
    assert len(first.map.unique()) == 9
    assert torch.equal(explainer.attribute(inputs, torch.tensor([1, 2]), numbers), maps)
    both = torch.stack([numbers, numbers])[:, None]
    assert torch.equal(explainer.attribute(inputs, [1, 2], both), maps)
    with pytest.raises(ValueError, match="2 images and 3 targets"):
        explainer.attribute(inputs, [1, 2, 3], masks)
    with pytest.raises(ValueError, match="fits neither one nor 2"):
        explainer.attribute(inputs, 1, torch.stack([numbers] * 3))
    with pytest.raises(ValueError, match="inputs must be"):
        explainer.attribute(image, 1, masks)


def test_clip_explains_texts(image):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    towers = {
        "text_config": CLIPTextConfig(vocab_size=9, **layers),
        "vision_config": CLIPVisionConfig(image_size=16, patch_size=8, **layers),
    }
    clip = CLIPModel(CLIPConfig(projection_dim=8, **towers)).eval()
    weights = nn.functional.normalize(torch.randn(8, 3), dim=0)
    scorer = ClipScorer(clip, weights, batch_size=5)
    found = SMDL(scorer, weights=(0, 0.05, 1, 1)).explain(image, split_grid(16, 16, 2), target=1)
    assert sorted(found.order) == [0, 1, 2, 3]
    scores = scorer(image[None])
    torch.testing.assert_close(scores.probabilities, (100 * scores.features @ weights).softmax(1))
    with pytest.raises(ValueError, match="training mode"):
        ClipScorer(clip.train(), weights)


def test_saving_reloading_and_a_picture(small_vit, image, masks, tmp_path):
    found = SMDL(small_vit).explain(image, masks, 2, k=6)
    found.save(tmp_path / "why")
    again = Attribution.load(tmp_path / "why")
    assert again.order == found.order
    assert torch.equal(again.masks, found.masks)
    assert torch.equal(again.scores["total"], found.scores["total"])
    assert (again.insertion_auc, again.target) == (found.insertion_auc, 2)
    assert found.explanation == found.order[: len(found.explanation)]
    save_picture(tmp_path / "why.png", image, found)
    with Image.open(tmp_path / "why.png") as sheet:
        assert sheet.size == (896, 224)
        assert len(sheet.getcolors(1 << 20)) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["why", "why.png"]


def test_bad_input_is_named(small_vit, image, masks):
    explainer = SMDL(small_vit)
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.4, got 5"):
        explainer.explain(image, masks, 5)
    with pytest.raises(ValueError, match="between 1 and the 9 regions, got 10"):
        explainer.explain(image, masks, 1, k=10)
    double = masks.clone()
    double[8] |= masks[0]
    with pytest.raises(ValueError, match=r"regions \[0, 8\] overlap"):
        explainer.explain(image, double, 1)
    with pytest.raises(TypeError, match="divide 8-bit images by 255"):
        explainer.explain((255 * image).to(torch.uint8), masks, 1)
    with pytest.raises(ValueError, match=r"in \[0, 1\] before normalisation"):
        explainer.explain(image - 0.5, masks, 1)
    with pytest.raises(ValueError, match=r"\(3, height, width\)"):
        explainer.explain(image[None], masks, 1)
    small_vit.train()
    with pytest.raises(ValueError, match="training mode"):
        SMDL(small_vit)
    small_vit.eval()


def test_bad_options_are_named(quadrants, image):
    with pytest.raises(ValueError, match="Did you mean 'lazy'"):
        SMDL(quadrants, search="lazzy")
    with pytest.raises(ValueError, match="four values"):
        SMDL(quadrants, weights=(1, 1))
    with pytest.raises(ValueError, match="Did you mean 'entropy'"):
        ClassifierScorer(quadrants, confidence="entrpy")
    with pytest.raises(ValueError, match='use confidence="evidential"'):
        ClassifierScorer(quadrants, evidential_model=quadrants)
    with pytest.raises(ValueError, match="give them to your scorer"):
        SMDL(ClassifierScorer(quadrants), batch_size=3)
    with pytest.raises(ValueError, match="no linear layer"):
        ClassifierScorer(nn.Conv2d(3, 3, 1).eval())
    with pytest.warns(UserWarning, match="121 regions need about 956 images"):
        SMDL(quadrants).explain(image, split_grid(16, 16, 11), 0, k=4)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).eval()
    with torch.no_grad():
        broken[1].bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        SMDL(broken).explain(image, split_grid(16, 16, 2), 0)
