"""Joint transforms of an image and its label, on torchvision's v2 transforms.

Both travel as tv_tensors, so one call moves them alike: images with bilinear
interpolation, labels (`Mask`) with nearest-neighbour, whose values never change.
What a transform brings in from outside the picture is void in the label.
"""

from collections.abc import Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from lednet.data.labels import IGNORE_INDEX

VOID_FILL = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
PRESETS = ("paper", "modern")
SHIFT = 2
"""Largest translation of the paper's recipe in pixels (official training code)."""


def _to_tensors(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    """Image to float32 in [0, 1], normalised; label to int64; both plain tensors."""
    types = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    steps: list[v2.Transform] = [v2.ToDtype(types, scale=True)]
    if any(mean) or any(s != 1 for s in std):
        steps.append(v2.Normalize(mean=list(mean), std=list(std)))
    return [*steps, v2.ToPureTensor()]


def training_transform(
    size: tuple[int, int],
    preset: str = "paper",
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> v2.Compose:
    """Augmentation for training.

    Args:
        size: (height, width) of what comes out, in pixels.
        preset: "paper": resize, flip, shift by up to 2 px (the letter's recipe);
            "modern": scale 0.5 to 2, crop, flip, colour jitter.
        mean, std: normalisation of the [0, 1] image; the paper has none.

    The transform takes (Image uint8 (3, H, W), Mask uint8 (H, W)) and returns
    (float32 (3, *size), int64 size).
    """
    flip = v2.RandomHorizontalFlip(0.5)
    if preset == "paper":
        steps = [
            v2.Resize(size, antialias=True),
            flip,
            # A margin on every side and a crop back to size: a shift with void fill.
            v2.Pad(SHIFT, fill=VOID_FILL),
            v2.RandomCrop(size),
        ]
    elif preset == "modern":
        steps = [
            v2.ScaleJitter(size, scale_range=(0.5, 2.0), antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill=VOID_FILL),
            flip,
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        ]
    else:
        raise ValueError(f"preset must be one of {PRESETS}, not {preset!r}")
    return v2.Compose([*steps, *_to_tensors(mean, std)])


class ResizeImage(v2.Transform):
    """Resize the image alone; the label keeps the size it is scored at."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = list(size)

    def transform(self, inpt: tv_tensors.Image, params: dict) -> tv_tensors.Image:
        return v2.functional.resize(inpt, self.size, antialias=True)


def evaluation_transform(
    size: tuple[int, int],
    full_size_labels: bool = False,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
) -> v2.Compose:
    """Resize without augmentation.

    Args:
        size: (height, width) the network works at, in pixels.
        full_size_labels: leave the label at its own size, for scoring there.
        mean, std: as in `training_transform`.
    """
    resize = ResizeImage(size) if full_size_labels else v2.Resize(size, antialias=True)
    return v2.Compose([resize, *_to_tensors(mean, std)])
