"""Transforms of image classification, a batch at a time on the device of the batch.

The loader returns whole images, resized to a square, and their original size. Crops are specified
in fractions of the image, so that the change of aspect ratio has no effect on them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lednet.data.transforms import (
    JITTER,
    PRESETS as PRESETS,
    Normalization,
    color_jitter,
    draw_uniform,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AREAS = (0.08, 1.0)
"""Smallest and largest area of a random crop, as a fraction of the image."""
ASPECTS = (3 / 4, 4 / 3)
"""Width to height of a random crop, log-uniform."""
ATTEMPTS = 10
"""Attempts to draw a crop that fits into the image."""
CENTRAL = 224 / 256
"""Side of a central crop, as a fraction of the image's short side."""
BOX_DRAWS = 2 * ATTEMPTS + 2


class ImageAugmentation(Normalization):
    """Random augmentation of a training batch, on the device of the batch.

    Interpolation is bilinear without antialiasing: images should be stored little larger than
    `size`, 256 px for 224.

    Args:
        size: side of the crops in pixels.
        preset: "paper": random crop and flip; "modern": colour jitter too.
        num_classes: length of mixed labels.
        mean, std: normalization of the [0, 1] image.
        mixup: alpha of mixup (Zhang et al., arXiv 1710.09412); 0 disables it.
    """

    def __init__(
        self,
        size: int = 224,
        preset: str = "paper",
        num_classes: int = 1000,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        mixup: float = 0.0,
    ):
        super().__init__(preset, mean, std)
        if mixup < 0:
            raise ValueError("mixup must not be negative")
        self.size, self.num_classes, self.mixup = size, num_classes, mixup

    def forward(
        self, images: Tensor, targets: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: (N, 3, S, S) uint8, whole images.
            targets: (N, 3) int64: class, and width and height of the original.
            generator: on the CPU, so that results do not depend on the device.

        Returns:
            Normalized crops (N, 3, size, size) float32, and classes (N,) int64; with mixup the
            share of each class, (N, num_classes) float32.
        """
        draws = draw_uniform(images, BOX_DRAWS + 4, generator)
        box, flip, color = draws.split((BOX_DRAWS, 1, 3), dim=1)
        images = crop_resize(images, random_boxes(targets[:, 1:], box), flip < 0.5, self.size)
        if self.preset == "modern":
            images = color_jitter(images, 1 + JITTER * (2 * color - 1))
        images, labels = (images - self.mean).div_(self.std), targets[:, 0]
        if self.mixup == 0:
            return images, labels
        share = sample_mixup_lambda(self.mixup, generator)
        return mixup(images, share), mixup(F.one_hot(labels, self.num_classes).float(), share)

    def normalize(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, without augmentation: for validation.

        Takes the crop that is left if the short side is resized to 256 px and the central 224x224
        px are cut out, and resizes it to `size`.
        """
        # Square crops, with `CENTRAL` of the short side.
        sizes = targets[:, 1:]
        extent = CENTRAL * sizes.amin(dim=1, keepdim=True) / sizes  # (N, 2)
        boxes = torch.cat(((1 - extent) / 2, extent), dim=1)
        mirror = torch.zeros_like(boxes[:, :1], dtype=torch.bool)
        images = crop_resize(images, boxes, mirror, self.size)
        return (images - self.mean).div_(self.std), targets[:, 0]


def random_boxes(sizes: Tensor, draws: Tensor) -> Tensor:
    """Crops distributed as in torchvision's `RandomResizedCrop`, not rounded to whole pixels.

    Every attempt draws an area and an aspect ratio; the first one that fits is placed at random.
    If none fits, the crop is the largest one of a permitted aspect ratio, in the centre.

    Args:
        sizes: (N, 2) width and height of the originals.
        draws: (N, BOX_DRAWS) uniform in [0, 1).

    Returns:
        (N, 4): left, top, width and height in fractions of the image.
    """
    areas, shapes, place = draws.split((ATTEMPTS, ATTEMPTS, 2), dim=1)
    ratio = sizes[:, :1] / sizes[:, 1:]  # (N, 1), width to height
    area = AREAS[0] + (AREAS[1] - AREAS[0]) * areas  # (N, ATTEMPTS)
    low, high = map(math.log, ASPECTS)
    aspect = torch.exp(low + (high - low) * shapes)

    largest = ratio.clamp(*ASPECTS)
    # The last column always fits.
    widths = torch.cat(((area * aspect / ratio).sqrt(), (largest / ratio).clamp(max=1)), dim=1)
    heights = torch.cat(((area * ratio / aspect).sqrt(), (ratio / largest).clamp(max=1)), dim=1)
    fits = (widths <= 1) & (heights <= 1)  # (N, ATTEMPTS + 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    extent = torch.cat((widths.gather(1, first), heights.gather(1, first)), dim=1)  # (N, 2)
    place = torch.where(first == ATTEMPTS, 0.5, place)
    return torch.cat((place * (1 - extent), extent), dim=1)


def crop_resize(images: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Crop each image and resize the crop to `size` x `size` pixels.

    Args:
        images: (N, 3, S, S) uint8.
        boxes: (N, 4), as `random_boxes` returns them.
        mirror: (N, 1) bool.

    Returns:
        (N, 3, size, size) float32 in [0, 1].
    """
    left, top, width, height = boxes.split(1, dim=1)
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    y = top + height * centres  # (N, size)
    x = left + width * torch.where(mirror, centres.flip(0), centres)
    ys, xs = y[:, :, None].expand(-1, -1, size), x[:, None, :].expand(-1, size, -1)
    grid = 2 * torch.stack((xs, ys), dim=-1) - 1  # (N, size, size, 2), -1 to 1 over the image
    images = images.contiguous().float()  # results depend on the memory format
    crops = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    return crops.mul_(1 / 255)


def sample_mixup_lambda(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha), for which torch has no `generator` argument."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def mixup(x: Tensor, share: float) -> Tensor:
    """`share` of each sample plus the rest of the preceding one in the batch."""
    return torch.lerp(x.roll(1, dims=0), x, share)
