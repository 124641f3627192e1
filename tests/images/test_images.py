"""Image transforms: every batched one equals a loop over single images, and the identities hold."""

import colorsys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from grainwise import images as im

H, W = 10, 14


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    return torch.rand(5, 3, H, W, generator=seeded())


def sub_box(crop, image):
    """The place (top, left) of a crop in an image, by search."""
    h, w = crop.shape[1:]
    places = [(t, x) for t in range(image.shape[1] - h + 1) for x in range(image.shape[2] - w + 1)]
    return [p for p in places if torch.equal(image[:, p[0] : p[0] + h, p[1] : p[1] + w], crop)]


def test_from_uint8_takes_both_layouts():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    found = im.from_uint8(pixels)
    np.testing.assert_allclose(found.numpy(), pixels.transpose(0, 3, 1, 2) / 255, atol=1e-7)
    assert torch.equal(im.from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2)), found)
    assert found.is_contiguous()


def test_resize(batch):
    assert torch.equal(im.resize(batch, (H, W)), batch)
    expected = interpolate(batch, (7, 20), mode="bilinear", antialias=False)
    assert torch.equal(im.resize(batch, (7, 20), antialias=False), expected)
    halved = im.resize(torch.tensor([0.0, 1.0]).repeat(4)[None, None, None].expand(1, 1, 4, 8), (2, 4))
    torch.testing.assert_close(halved[0, 0, :, 1:3], torch.full((2, 2), 0.5))  # stripes average out


def test_centre_crop(batch):
    assert torch.equal(im.centre_crop(batch, (4, 6)), batch[:, :, 3:7, 4:10])


def test_random_crop_is_a_part_of_each_image(batch):
    crops = im.random_crop(batch, seeded(), size=(6, 7))
    places = [sub_box(c, i) for c, i in zip(crops, batch)]
    assert all(len(p) == 1 for p in places)
    assert len({p[0] for p in places}) > 1  # each image has a place of its own
    padded = im.random_crop(torch.ones(40, 1, 4, 4), seeded(), size=4, padding=2)
    assert padded.shape == (40, 1, 4, 4)
    assert padded.mean() < 1
    assert (padded.sum((1, 2, 3)) >= 4).all()


def test_flips(batch):
    many = batch[:1].expand(200, -1, -1, -1)
    for flip, dim in ((im.random_flip, 3), (im.random_vertical_flip, 2)):
        out = flip(many, seeded())
        mirrored = torch.tensor([torch.equal(o, batch[0].flip(dim - 1)) for o in out])
        plain = torch.tensor([torch.equal(o, batch[0]) for o in out])
        assert (mirrored ^ plain).all()
        assert 70 < mirrored.sum() < 130
        assert torch.equal(flip(batch, seeded(), p=0.0), batch)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_crop_resize_equals_a_loop_of_interpolate(seed, size):
    rng = np.random.default_rng(seed)
    batch = torch.rand(4, 2, H, W, generator=seeded(seed))
    x0, y0 = rng.integers(0, W, 4), rng.integers(0, H, 4)
    boxes = torch.tensor(np.stack([x0, y0, rng.integers(x0 + 1, W + 1), rng.integers(y0 + 1, H + 1)], 1))
    loop = [
        interpolate(i[None, :, b[1] : b[3], b[0] : b[2]], size, mode="bilinear", align_corners=True)
        for i, b in zip(batch, boxes.tolist())
    ]
    torch.testing.assert_close(im.crop_resize(batch, boxes, size), torch.cat(loop), rtol=0, atol=1e-5)


def test_crop_resize_of_everything_changes_nothing(batch):
    boxes = torch.tensor([[0, 0, W, H]]).expand(5, 4)
    assert torch.equal(im.crop_resize(batch, boxes, (H, W)), batch)


def test_crop_resize_carries_gradients_to_the_images_inside_the_box_only(batch):
    batch.requires_grad_()
    boxes = torch.tensor([[2.0, 3, 9, 8]]).expand(5, 4)
    im.crop_resize(batch, boxes, 20).sum().backward()
    touched = batch.grad[:, 0] != 0
    assert torch.equal(touched, im.inside(boxes, H, W))
    small = torch.rand(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: im.crop_resize(x, torch.tensor([[0.5, 0, 4.2, 3]]), 3), small)


@pytest.mark.parametrize("box", [[0, 0, W + 1, H], [-1, 0, 3, 3], [2, 2, 2, 5], [5, 5, 4, 8]])
def test_crop_resize_refuses_boxes_outside(batch, box):
    boxes = torch.tensor([[0, 0, W, H]] * 5)
    boxes[3] = torch.tensor(box)
    with pytest.raises(ValueError, match="of image 3 must lie inside 14 x 10"):
        im.crop_resize(batch, boxes, 4)
    with pytest.raises(ValueError, match="one box .* for each of 5 images"):
        im.crop_resize(batch, boxes[:2], 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_random_resized_crop_boxes_obey_their_ranges(seed):
    images = torch.zeros(64, 1, 40, 60)
    from grainwise.images.geometry import random_boxes

    boxes = random_boxes(images, seeded(seed), scale=(0.2, 0.6), ratio=(0.5, 2.0))
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 60).all()
    assert (boxes[:, 3] <= 40).all()
    assert ((wide * high / 2400 > 0.18) & (wide * high / 2400 < 0.63)).all()
    assert ((wide / high > 0.46) & (wide / high < 2.2)).all()
    tall = random_boxes(images[:, :, :, :4], seeded(seed), scale=(0.9, 1.0), ratio=(1.0, 1.0))
    assert torch.equal(tall, torch.tensor([[0.0, 18, 4, 22]]).expand(64, 4))  # nothing fits: the central square
    assert im.random_resized_crop(images, seeded(seed), size=(9, 8)).shape == (64, 1, 9, 8)


def test_adjustments_at_their_ends(batch):
    for adjust in (im.adjust_brightness, im.adjust_contrast, im.adjust_saturation):
        torch.testing.assert_close(adjust(batch, 1.0), batch)
    torch.testing.assert_close(im.adjust_hue(batch, 0.0), batch)
    torch.testing.assert_close(im.adjust_hue(batch, 1.0), batch)
    assert not im.adjust_brightness(batch, 0.0).any()
    flat = im.adjust_contrast(batch, 0.0)
    torch.testing.assert_close(flat.amax((1, 2, 3)), flat.amin((1, 2, 3)))
    dull = im.adjust_saturation(batch, 0.0)
    torch.testing.assert_close(dull[:, 0], dull[:, 2])


def test_hue_against_colorsys(batch):
    turns = torch.tensor([0.1, -0.3, 0.5, 0.25, 0.0])
    found = im.adjust_hue(batch, turns)
    for i in range(5):
        for y, x in ((0, 0), (3, 7), (9, 13)):
            h, s, v = colorsys.rgb_to_hsv(*batch[i, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb((h + turns[i].item()) % 1.0, s, v)
            np.testing.assert_allclose(found[i, :, y, x].numpy(), expected, atol=1e-5)


def test_per_image_factors_equal_a_loop(batch):
    factors = torch.tensor([0.3, 1.0, 1.7, 0.0, 2.0])
    for adjust in (im.adjust_brightness, im.adjust_contrast, im.adjust_saturation, im.adjust_hue):
        loop = torch.cat([adjust(i[None], f.item()) for i, f in zip(batch, factors)])
        torch.testing.assert_close(adjust(batch, factors), loop)


def test_colour_jitter(batch):
    options = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    one, again, other = (im.colour_jitter(batch, seeded(s), **options) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.min() >= 0
    assert one.max() <= 1
    assert torch.equal(im.colour_jitter(batch, seeded(), brightness=0.0), batch)
    with pytest.raises(ValueError, match="hue at most 0.5"):
        im.colour_jitter(batch, seeded(), hue=0.7)


def test_normalise(batch):
    out = im.normalise(batch, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(out[:, 1], (batch[:, 1] - 0.2) / 0.6)
    torch.testing.assert_close(im.denormalise(out, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), batch)
    with pytest.raises(ValueError, match="3 channels"):
        im.normalise(batch, (0.5,), (0.5,))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_kept_share_counts_the_pixels_that_are_left(seed, weight):
    boxes = im.cut_boxes(torch.full((6,), weight), H, W, seeded(seed))
    counted = (~im.inside(boxes, H, W)).float().mean((1, 2))
    torch.testing.assert_close(im.kept_share(boxes, H, W), counted, rtol=0, atol=1e-6)
    assert (counted >= weight - 1e-6).all()  # the border can only save pixels


def test_cut_boxes_at_the_ends():
    assert (im.kept_share(im.cut_boxes(torch.ones(20), H, W, seeded()), H, W) == 1).all()
    whole = im.kept_share(im.cut_boxes(torch.zeros(200), H, W, seeded()), H, W)
    assert whole.min() == 0
    assert whole.max() > 0.5


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_is_the_same_mix_of_images_and_labels(batch, per_sample):
    labels = torch.tensor([0, 1, 2, 3, 4])
    mixed, targets = im.mixup(batch, labels, seeded(3), num_labels=5, alpha=1.0, per_sample=per_sample)
    torch.testing.assert_close(mixed, torch.einsum("bk,kchw->bchw", targets, batch))  # labels are the images' indices
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    partners = (targets.diagonal() < 1).sum()
    assert (len(set(targets.diagonal()[targets.diagonal() < 1].tolist())) > 1) == (per_sample and partners > 1)


def test_cutmix_shares_the_label_by_area(batch):
    flat = torch.arange(5.0)[:, None, None, None].expand(5, 1, H, W)
    mixed, targets = im.cutmix(flat, torch.arange(5), seeded(1), num_labels=5, per_sample=True)
    for i in range(5):
        counted = torch.bincount(mixed[i].long().flatten(), minlength=5) / (H * W)
        torch.testing.assert_close(targets[i], counted, rtol=0, atol=1e-6)


def test_soft_labels_may_come_in():
    soft = torch.tensor([[0.7, 0.3], [0.1, 0.9]])
    assert im.soft_labels(soft, 2) is soft
    with pytest.raises(ValueError, match="2 classes, expected 3"):
        im.soft_labels(soft, 3)
    with pytest.raises(TypeError, match="class indices"):
        im.soft_labels(torch.tensor([0.5]), 3)
    with pytest.raises(ValueError, match="alpha must be positive"):
        im.draw_beta(0.0, 1, seeded())


def test_draw_beta_has_the_moments_of_beta():
    drawn = im.draw_beta(2.0, 20000, seeded())
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 0.05) < 0.005


def test_random_erasing(batch):
    many = torch.rand(300, 3, 20, 20, generator=seeded()) + 1.0
    out = im.random_erasing(many, seeded(), p=0.5, scale=(0.1, 0.2))
    share = (out == 0).float().mean((1, 2, 3))
    assert ((share == 0) | ((share > 0.07) & (share < 0.23))).all()
    assert 0.4 < (share > 0).float().mean() < 0.6
    kept = out != 0
    assert torch.equal(out[kept], many[kept])
    noisy = im.random_erasing(many, seeded(), p=1.0, fill="noise")
    assert 0.02 < (noisy != many).float().mean() < 0.35


def test_pipeline_feeds_random_steps_only(batch):
    steps = im.Pipeline(partial(im.random_crop, size=8), im.random_flip, partial(im.normalise, mean=(0.5,) * 3, std=(0.5,) * 3))
    generator = seeded(4)
    expected = im.normalise(im.random_flip(im.random_crop(batch, generator, size=8), generator), (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(steps(batch, seeded(4)), expected)
    assert torch.equal(im.Pipeline(steps, partial(im.resize, size=8))(batch, seeded(4)), expected)
    assert "random_crop(size=8)" in repr(steps)
    with pytest.raises(TypeError, match="pass a torch.Generator"):
        steps(batch)
    with pytest.raises(TypeError, match="random_crop needs size"):
        im.Pipeline(im.random_crop)
    with pytest.raises(TypeError, match="must be callable"):
        im.Pipeline(3)


def test_errors_teach():
    with pytest.raises(TypeError, match=r"float tensor .* got torch.uint8 \(1, 3, 4, 4\); pixels go through from_uint8"):
        im.resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match="expected uint8 images"):
        im.from_uint8(torch.zeros(1, 4, 4, 3))
    with pytest.raises(TypeError, match="1, 3 or 4 channels"):
        im.from_uint8(torch.zeros(1, 8, 9, 7, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot crop 5 x 5 from images of 4 x 4"):
        im.centre_crop(torch.zeros(1, 3, 4, 4), 5)
    with pytest.raises(ValueError, match="red, green and blue, got 1"):
        im.adjust_hue(torch.zeros(1, 1, 4, 4), 0.1)
    with pytest.raises(ValueError, match="one shape"):
        im.blend(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5), torch.ones(1))
    with pytest.raises(ValueError, match="at least 1"):
        im.resize(torch.zeros(1, 3, 4, 4), 0)
