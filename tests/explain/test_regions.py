from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.explain import check_partition, split_by_masks, split_by_saliency, split_grid, split_superpixels
from grainwise.explain.regions import from_numbers


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 40), st.integers(6, 40), st.integers(2, 6), st.integers(1, 9), st.integers(0, 99))
def test_saliency_regions_are_a_partition_also_with_left_over_patches(height, width, grid, per_region, seed):
    heat = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    masks = split_by_saliency(heat, grid, per_region)
    check_partition(masks, height, width)
    assert len(masks) == -(-grid * grid // per_region)
    check_partition(split_grid(height, width, grid), height, width)


def test_the_most_salient_patches_come_first():
    heat = torch.zeros(20, 20)
    heat[8:12, 12:16], heat[0:4, 0:4] = 2.0, 1.0  # patches of a 5 x 5 grid
    masks = split_by_saliency(heat, 5, 2)
    assert masks[0, 8:12, 12:16].all()
    assert masks[0, 0:4, 0:4].all()
    assert int(masks[0].sum()) == 32
    assert int(masks[-1].sum()) == 16  # 25 patches: the last region has one


def test_overlapping_masks_become_disjoint_with_small_ones_on_top():
    large, small, hidden = (torch.zeros(6, 6, dtype=torch.bool) for _ in range(3))
    large[:4], small[1:3, 1:3], hidden[0, 0] = True, True, True
    masks = split_by_masks(torch.stack([large, small, hidden]))
    check_partition(masks, 6, 6)
    assert int(masks[1].sum()) == 4
    assert masks[-1, 4:].all()
    covered = split_by_masks(torch.stack([small, small]))
    assert len(covered) == 2  # the first is hidden under the second, the rest is a region


def test_superpixels_are_a_partition():
    pytest.importorskip("skimage")
    picture = torch.zeros(3, 32, 32)
    picture[0, :, 16:] = 1.0
    masks = split_superpixels(picture, 8)
    check_partition(masks, 32, 32)
    sides = masks[:, :, 16:].flatten(1).sum(1) / masks.flatten(1).sum(1)
    assert 4 <= len(masks) <= 12
    assert ((sides < 0.2) | (sides > 0.8)).all()  # they follow the edge


def test_bad_regions_are_named():
    masks = split_grid(8, 8, 2)
    with pytest.raises(ValueError, match=r"regions \[1\] are empty"):
        check_partition(masks & torch.tensor([True, False, True, True])[:, None, None], 8, 8)
    double = masks.clone()
    double[2, 0, 0] = True
    with pytest.raises(ValueError, match=r"regions \[0, 2\] overlap.*row 0, column 0"):
        check_partition(double, 8, 8)
    with pytest.raises(ValueError, match="16 pixels belong to no region"):
        check_partition(masks[:3], 8, 8)
    with pytest.raises(ValueError, match="the image"):
        check_partition(masks, 9, 8)
    with pytest.raises(ValueError, match="bool"):
        check_partition(masks.float(), 8, 8)
    with pytest.raises(ValueError, match="bool"):
        split_by_masks(masks.int())


def test_bad_divisions_are_refused():
    with pytest.warns(UserWarning, match="constant"):
        split_by_saliency(torch.ones(8, 8), 2, 1)
    with pytest.raises(ValueError, match="finite"):
        split_by_saliency(torch.full((8, 8), torch.nan), 2, 1)
    with pytest.raises(ValueError, match="grid must lie in 1..8"):
        split_grid(8, 8, 9)
    with pytest.raises(ValueError, match="at least 1"):
        split_by_saliency(torch.rand(8, 8), 2, 0)
    with pytest.raises(ValueError, match="one image"):
        split_superpixels(torch.rand(1, 3, 8, 8))
    assert len(from_numbers(torch.tensor([[7, 7], [2, -1]]))) == 3
