"""Image transforms on batches of tensors: geometry, colour, mixing, and a pipeline of them.

An image batch is a float tensor (batch, channels, height, width), in [0, 1] until it is normalised; `from_uint8` makes one
from pixels. Every transform works on the whole batch at once and draws for each image by itself; a random one takes a
`torch.Generator`, and the same generator state gives the same images. Boxes are float tensors (batch, 4) of x0, y0, x1, y1
in pixels, the far edges excluded. All of it runs where the images are, keeps gradients to the images, and needs no
other library than torch.
"""

from grainwise.images.colour import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour_jitter,
    denormalise,
    normalise,
)
from grainwise.images.geometry import (
    centre_crop,
    crop_resize,
    from_uint8,
    inside,
    random_crop,
    random_flip,
    random_resized_crop,
    random_vertical_flip,
    resize,
)
from grainwise.images.mixing import blend, cut_boxes, cutmix, draw_beta, kept_share, mixup, paste, random_erasing, soft_labels
from grainwise.images.pipeline import Pipeline

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Pipeline",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "blend",
    "centre_crop",
    "colour_jitter",
    "crop_resize",
    "cut_boxes",
    "cutmix",
    "denormalise",
    "draw_beta",
    "from_uint8",
    "inside",
    "kept_share",
    "mixup",
    "normalise",
    "paste",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_resized_crop",
    "random_vertical_flip",
    "resize",
    "soft_labels",
]
