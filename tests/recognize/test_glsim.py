"""GLSim: the similarity, the boxes, and a model whose second look is worth what the paper says it is."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from grainwise.images import crop_resize
from grainwise.recognize.glsim import (
    GLSimConfig,
    GLSimForImageClassification,
    attention_rollout,
    global_local_similarity,
    placed_at_centre,
    placed_at_random,
    select_crops,
    topk_box,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
VIT = ViTConfig(**SMALL, intermediate_size=24)


def gls(encoder=None, **options):
    torch.manual_seed(0)
    made = GLSimForImageClassification.from_encoder(encoder or copy.deepcopy(VIT), num_labels=4, **{"top_k": 5, **options})
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(1))
    return made.eval()


def images(count=3, size=24, seed=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# the similarity


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
def test_similarity_equals_a_loop_and_ignores_scale(seed, scale):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((2, 7, 5)).astype(np.float32)
    found = global_local_similarity(torch.from_numpy(hidden)).numpy()
    for b in range(2):
        for i in range(6):
            g, part = hidden[b, 0].astype(float), hidden[b, 1 + i].astype(float)
            assert abs(found[b, i] - g @ part / np.linalg.norm(g) / np.linalg.norm(part)) < 1e-6
    assert np.abs(found).max() <= 1
    scaled = hidden.copy()
    scaled[:, rng.integers(7)] *= scale
    np.testing.assert_allclose(global_local_similarity(torch.from_numpy(scaled)).numpy(), found, atol=1e-6)


def test_difference_metrics_are_negative_distances():
    hidden = torch.randn(2, 5, 3)
    whole, parts = hidden[:, :1], hidden[:, 1:]
    torch.testing.assert_close(global_local_similarity(hidden, "l1"), -(whole - parts).abs().mean(-1))
    torch.testing.assert_close(global_local_similarity(hidden, "l2"), -((whole - parts) ** 2).mean(-1))
    nearest = torch.cat([whole, parts, whole], 1)
    for metric in ("cos", "l1", "l2"):
        assert global_local_similarity(nearest, metric).argmax(1).tolist() == [4, 4]


def test_class_and_register_tokens_are_not_among_the_locals():
    hidden = torch.randn(1, 3 + 4, 6)
    assert torch.equal(global_local_similarity(hidden, prefix=3), global_local_similarity(hidden)[:, 2:])


# the box


@pytest.mark.parametrize("inclusive, box", [(False, [4, 8, 12, 16]), (True, [4, 8, 16, 20])])
def test_box_oracle(inclusive, box):
    scores = torch.zeros(1, 6, 6)
    for row, column in ((2, 3), (4, 1), (3, 2)):  # rows 2..4, columns 1..3, patches of 4 pixels
        scores[0, row, column] = 1
    assert topk_box(scores.flatten(1), 3, (6, 6), 4, 24, inclusive=inclusive).tolist() == [box]


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("cell", [0, 7, 23])
def test_a_single_cell_is_exactly_one_patch(inclusive, cell):
    scores = torch.zeros(1, 24)
    scores[0, cell] = 1
    y, x = divmod(cell, 6)
    assert topk_box(scores, 1, (4, 6), 8, (32, 48), inclusive=inclusive).tolist() == [[8 * x, 8 * y, 8 * x + 8, 8 * y + 8]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.booleans())
def test_boxes_lie_inside_and_hold_the_selected(seed, k, inclusive):
    scores = torch.rand(5, 24, generator=torch.Generator().manual_seed(seed))
    boxes = topk_box(scores, k, (4, 6), 8, (32, 48), inclusive=inclusive)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([48, 32])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
    if inclusive:
        for row, box in zip(scores.topk(k).indices, boxes):
            assert ((row % 6 * 8 >= box[0]) & (row % 6 * 8 + 8 <= box[2]) & (row // 6 * 8 + 8 <= box[3])).all()


def test_everything_selected_is_the_whole_image():
    model = gls(top_k=36, box="inclusive")
    output = model(images())
    assert output.boxes.tolist() == [[0, 0, 24, 24]] * 3
    torch.testing.assert_close(crop_resize(images(), output.boxes, 24), images(), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.crop_token, output.global_token, rtol=0, atol=1e-5)


def test_select_crops_equals_the_model():
    model = gls()
    hidden, _ = model.encode(images())
    assert torch.equal(select_crops(hidden, k=5, patch=4, image_size=24), model(images()).boxes)


def test_shifting_the_object_shifts_the_box():
    model = gls()
    with torch.no_grad():
        model.encoder.embeddings.position_embeddings.zero_()
    thing = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))

    def scores_of(top, left):
        shown = torch.full((1, 3, 24, 24), 0.5)
        shown[0, :, top : top + 8, left : left + 8] = thing
        return model.first_look(shown)[1]

    one, two = scores_of(4, 4), scores_of(12, 8)
    torch.testing.assert_close(two.view(6, 6)[3:5, 2:4], one.view(6, 6)[1:3, 1:3])
    sign = 1 if one.argmax() in (7, 8, 13, 14) else -1  # an untrained class token may shun the object
    k = int((sign * one > sign * one[0, 0] + 1e-4).sum())  # the patches that stand out from the constant background
    assert 1 <= k <= 4
    boxes = [topk_box(sign * s, k, (6, 6), 4, 24, inclusive=True) for s in (one, two)]
    assert (boxes[1] - boxes[0]).tolist() == [[4, 8, 4, 8]]


# controls


def test_random_and_centre_boxes_keep_the_sizes():
    boxes = torch.tensor([[0, 0, 8, 12], [4, 8, 24, 16]]).repeat(100, 1)
    moved = placed_at_random(boxes, 24, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2])
    assert moved.min() == 0
    assert moved.max() == 24
    assert len(moved[::2, 0].unique()) == 17  # every place that fits
    assert placed_at_centre(boxes[:2], 24).tolist() == [[8, 6, 16, 18], [2, 8, 22, 16]]


def test_rollout_equals_the_product_of_matrices():
    attentions = [torch.rand(2, 3, 6, 6).softmax(-1) for _ in range(3)]
    product = torch.eye(6)
    for a in attentions:
        product = (a.mean(1) + torch.eye(6)) / 2 @ product
    torch.testing.assert_close(attention_rollout(attentions), product[:, 0, 1:])


def test_selectors_in_the_model():
    found = {}
    for selector in ("similarity", "rollout", "random", "centre"):
        model = gls(selector=selector)
        found[selector] = model(images(), generator=torch.Generator().manual_seed(5)).boxes
    sizes = {s: b[:, 2:] - b[:, :2] for s, b in found.items()}
    assert torch.equal(sizes["random"], sizes["similarity"])
    assert torch.equal(sizes["centre"], sizes["similarity"])
    again = gls(selector="random")(images(), generator=torch.Generator().manual_seed(5)).boxes
    assert torch.equal(again, found["random"])
    model = gls()
    model.config.selector = "rollout"
    model.encoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation\\('eager'\\)"):
        model(images())


# the model


def test_logits_start_at_zero():
    model = GLSimForImageClassification.from_encoder(copy.deepcopy(VIT), num_labels=4)
    assert not model(images()).logits.any()


def test_no_gradient_through_the_selection_and_both_looks_count():
    model = gls().double()
    pixels, labels = images().double(), torch.tensor([0, 1, 2])
    output = model(pixels, labels=labels)
    assert output.similarity.grad_fn is None
    assert output.boxes.grad_fn is None
    output.loss.backward()
    weight = next(p for n, p in model.encoder.named_parameters() if "layers.0" in n and p.ndim == 2)
    whole = weight.grad[0, 0].item()

    def loss(moved, first, second):
        """The loss with one weight moved in the first look, the second, or both; the boxes stay."""

        def token(x, shift):
            with torch.no_grad():
                weight[0, 0] += shift
                out = model.global_token(model.encode(x)[0])
                weight[0, 0] -= shift
            return out

        crops = crop_resize(pixels, output.boxes, 24)
        logits = model.classify(token(pixels, moved * first), token(crops, moved * second))
        return torch.nn.functional.cross_entropy(logits, labels).item()

    slopes = {k: (loss(1e-5, *k) - loss(-1e-5, *k)) / 2e-5 for k in ((1, 1), (1, 0), (0, 1))}
    assert whole == pytest.approx(slopes[1, 1], rel=1e-4)
    assert whole == pytest.approx(slopes[1, 0] + slopes[0, 1], rel=1e-4)
    assert abs(slopes[0, 1]) > 1e-9  # the crop's path carries gradient


def test_with_silent_branches_the_crop_has_no_influence():
    model = gls()
    with torch.no_grad():
        for layer in (model.aggregator[0].project, model.aggregator[0].fall):
            layer.weight.zero_()
            layer.bias.zero_()
    output = model(images())
    torch.testing.assert_close(output.logits, model.head(model.norm(output.global_token)))
    moved = model(images(), boxes=torch.tensor([[0, 0, 4, 4]] * 3)).logits
    assert torch.equal(moved, output.logits)
    assert not torch.equal(gls()(images(), boxes=torch.tensor([[0, 0, 4, 4]] * 3)).logits, gls()(images()).logits)


@pytest.mark.parametrize(
    "config, prefix",
    [
        (VIT, 1),
        (DeiTConfig(**SMALL, intermediate_size=24), 2),
        (Dinov2Config(**SMALL), 1),
        (Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3), 4),
        (CLIPVisionConfig(**SMALL, intermediate_size=24), 1),
    ],
    ids=lambda c: getattr(c, "model_type", str(c)),
)
def test_encoders(config, prefix):
    model = gls(copy.deepcopy(config))
    output = model(images())
    assert model.layout.prefix == prefix
    assert output.similarity.shape == (3, 36)
    assert (model.layout.norm is not None) == (config.model_type == "clip_vision_model")


def test_encoders_come_as_models_classifiers_and_folders(tmp_path):
    encoder = ViTModel(copy.deepcopy(VIT))
    assert gls(encoder).encoder is encoder
    assert encoder.config._attn_implementation == "sdpa"  # wrapping must not change how it runs
    assert encoder.pooler is None  # nobody asks for it, and it would never learn
    classifier = ViTForImageClassification(copy.deepcopy(VIT))
    assert gls(classifier).encoder is classifier.vit
    encoder.save_pretrained(tmp_path)
    loaded = gls(str(tmp_path)).encoder
    torch.testing.assert_close(loaded.embeddings.cls_token, encoder.embeddings.cls_token)


def test_skip_if_confident():
    model = gls()
    full = model(images())
    first = model.classify(full.global_token, full.global_token).detach().softmax(-1).amax(-1)
    model.config.skip_if_confident = float(first.sort().values[1])
    output = model(images())
    assert full.looked_again is None
    assert torch.equal(output.looked_again, first <= model.config.skip_if_confident)
    torch.testing.assert_close(output.logits[output.looked_again], full.logits[output.looked_again])
    assert torch.equal(output.crop_token[~output.looked_again], output.global_token[~output.looked_again])
    assert model.train()(images()).looked_again is None


def test_flip_at_test_averages_the_mirror():
    model = gls()
    plain, mirrored = model(images()).logits, model(images().flip(-1)).logits
    model.config.flip_at_test = True
    torch.testing.assert_close(model(images()).logits, (plain + mirrored) / 2)
    torch.testing.assert_close(model(images().flip(-1)).logits, model(images()).logits)


def test_stochastic_depth_only_in_training():
    model = gls(drop_path=0.5)
    assert torch.equal(model(images()).logits, gls()(images()).logits)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(images()).logits, model(images()).logits)


# bad input


def test_no_global_token():
    config = SiglipVisionConfig(**SMALL, intermediate_size=24)
    with pytest.raises(ValueError, match="GLS needs a global token .* pass global_pool='mean' to use the patch mean"):
        gls(config)
    model = gls(config, global_pool="mean")
    hidden, _ = model.encode(images())
    torch.testing.assert_close(model(images()).global_token, hidden.mean(1))


def test_errors_teach():
    scores = torch.rand(1, 36)
    with pytest.raises(ValueError, match="k must lie in 1..36 .* got 37"):
        topk_box(scores, 37, (6, 6), 4, 24, inclusive=True)
    with pytest.raises(ValueError, match="k must lie in 1..36 .* got 0"):
        topk_box(scores, 0, (6, 6), 4, 24, inclusive=True)
    with pytest.raises(ValueError, match="do not form a grid of 5 x 6"):
        topk_box(scores, 3, (5, 6), 4, 24, inclusive=True)
    with pytest.raises(ValueError, match="does not cover an image of size 25"):
        topk_box(scores, 3, (6, 6), 4, 25, inclusive=True)
    with pytest.raises(ValueError, match=r"35 patches form no square: pass grid=\(rows, columns\)"):
        select_crops(torch.randn(1, 36, 8), patch=4, image_size=24)
    with pytest.raises(ValueError, match="25 x 24 are no whole number of patches of 4"):
        gls()(torch.rand(1, 3, 25, 24))
    with pytest.raises(ValueError, match="k must lie in 1..36 .* got 40"):
        gls(top_k=40)(images())
    with pytest.raises(ValueError, match="metric 'cosine' is unknown"):
        GLSimConfig(metric="cosine")
    with pytest.raises(ValueError, match="Did you mean 'inclusive'"):
        GLSimConfig(box="inclusiv")
    with pytest.raises(ValueError, match="top_k and aggregator_layers must be at least 1"):
        GLSimConfig(top_k=0)
    with pytest.raises(ValueError, match="must divide the encoder's width 16"):
        gls(aggregator_heads=3)
    with pytest.raises(ValueError, match="probability"):
        GLSimConfig(skip_if_confident=1.5)


def test_states_before_the_norm_are_warned_about():
    hidden = torch.randn(2, 37, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_crops(hidden, patch=4, image_size=24)
    hidden[..., 3] += 30
    with pytest.warns(UserWarning, match="one channel holds .* before the final norm"):
        select_crops(hidden, patch=4, image_size=24)
    encoder = ViTModel(copy.deepcopy(VIT))
    encoder.layernorm = None
    with pytest.warns(UserWarning, match="before the final norm"):
        gls(encoder)
