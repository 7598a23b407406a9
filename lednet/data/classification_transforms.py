"""What happens to an image of a classification data set between the file and the network.

The loader hands over the whole picture, squeezed to a square, and the size it had. Crops are
cut a batch at a time, on whatever device the batch is on; they are laid out in fractions of
the picture, where squeezing changes nothing, and have their shape in the original.
`lednet.data.transforms` does the same for segmentation.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lednet.data.transforms import JITTER, PRESETS, color_jitter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AREAS = (0.08, 1.0)
"""Smallest and largest share of the picture that a random crop has."""
ASPECTS = (3 / 4, 4 / 3)
"""Width to height of a random crop, drawn evenly on a logarithmic scale."""
ATTEMPTS = 10
"""To draw a crop that fits into the picture."""
CENTRAL = 224 / 256
"""Share of the picture's short side that a central crop has."""

BOX_DRAWS = 2 * ATTEMPTS + 2
COLOR_DRAWS = 3


class ImageAugmentation(nn.Module):
    """Random changes of a training batch, on the device of the batch.

    Interpolation is plain bilinear, without a filter against aliasing: the pictures should
    come in little larger than `size`, 256 px for 224.

    Args:
        size: side of the crops that come out, in pixels.
        preset: "paper": a random part of the picture and a flip; "modern": colour jitter too.
        num_classes: length of mixed labels.
        mean, std: normalisation of the [0, 1] image.
        mixup: mix each image and label with another's, in shares drawn from
            Beta(mixup, mixup) (Zhang et al., arXiv 1710.09412); 0 for none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int = 224,
        preset: str = "paper",
        num_classes: int = 1000,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        mixup: float = 0.0,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {PRESETS}, not {preset!r}")
        if mixup < 0:
            raise ValueError("mixup must not be negative")
        self.size, self.preset, self.num_classes, self.mixup = size, preset, num_classes, mixup
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(
        self, images: Tensor, targets: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: (N, 3, S, S) uint8, the whole pictures.
            targets: (N, 3) int64, of each its class, and its width and height in the original.
            generator: of the CPU, so that no result depends on the device's own.

        Returns:
            (N, 3, size, size) float32, normalised, and the classes, (N,) int64; with mixup
            the share of each class, (N, num_classes) float32.
        """
        draws = torch.rand(len(images), BOX_DRAWS + 1 + COLOR_DRAWS, generator=generator)
        draws = draws.to(images.device, non_blocking=images.is_cuda)  # no waiting for its queue
        box, flip, color = draws.split((BOX_DRAWS, 1, COLOR_DRAWS), dim=1)
        images = crop_resize(images, random_boxes(targets[:, 1:], box), flip < 0.5, self.size)
        if self.preset == "modern":
            images = color_jitter(images, 1 + JITTER * (2 * color - 1))
        images, labels = (images - self.mean).div_(self.std), targets[:, 0]
        if self.mixup == 0:
            return images, labels
        share = sample_mixup_lambda(self.mixup, generator)
        return mixup(images, share), mixup(F.one_hot(labels, self.num_classes).float(), share)

    def normalize(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Without anything random, for validation: the central crop, normalised.

        It is what remains of a picture whose short side is brought to 256 px and whose
        central 224x224 px are cut out, at any `size`.

        Args and returns as for `forward`, without mixup.
        """
        boxes = central_boxes(targets[:, 1:])
        images = crop_resize(
            images, boxes, torch.zeros_like(boxes[:, :1], dtype=torch.bool), self.size
        )
        return (images - self.mean).div_(self.std), targets[:, 0]


def random_boxes(sizes: Tensor, draws: Tensor) -> Tensor:
    """Crops as torchvision's `RandomResizedCrop` draws them, not rounded to whole pixels.

    Every attempt draws an area and a shape; the first one that fits lies anywhere in the
    picture. Where none fits, it is the largest crop in the centre with a permitted shape.

    Args:
        sizes: (N, 2) width and height of the originals.
        draws: (N, BOX_DRAWS) uniform in [0, 1).

    Returns:
        (N, 4): left, top, width and height in fractions of the picture.
    """
    areas, shapes, place = draws.split((ATTEMPTS, ATTEMPTS, 2), dim=1)
    picture = sizes[:, :1] / sizes[:, 1:]  # (N, 1), width to height
    area = AREAS[0] + (AREAS[1] - AREAS[0]) * areas  # (N, ATTEMPTS)
    low, high = map(math.log, ASPECTS)
    aspect = torch.exp(low + (high - low) * shapes)

    largest = picture.clamp(*ASPECTS)
    # The last column always fits.
    widths = torch.cat(((area * aspect / picture).sqrt(), (largest / picture).clamp(max=1)), dim=1)
    heights = torch.cat(((area * picture / aspect).sqrt(), (picture / largest).clamp(max=1)), dim=1)
    fits = (widths <= 1) & (heights <= 1)  # (N, ATTEMPTS + 1)
    first = fits.int().argmax(dim=1, keepdim=True)
    extent = torch.cat((widths.gather(1, first), heights.gather(1, first)), dim=1)  # (N, 2)
    place = torch.where(first == ATTEMPTS, 0.5, place)
    return torch.cat((place * (1 - extent), extent), dim=1)


def central_boxes(sizes: Tensor) -> Tensor:
    """Squares in the centre, with `CENTRAL` of the short side; in and out as `random_boxes`."""
    extent = CENTRAL * sizes.amin(dim=1, keepdim=True) / sizes  # (N, 2)
    return torch.cat(((1 - extent) / 2, extent), dim=1)


def crop_resize(images: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Bring a part of each picture to `size` x `size` pixels.

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
    grid = 2 * torch.stack((xs, ys), dim=-1) - 1  # (N, size, size, 2), -1 to 1 over the picture
    images = images.contiguous().float()  # one layout, whatever the loader's
    crops = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    return crops.mul_(1 / 255)


def sample_mixup_lambda(alpha: float, generator: torch.Generator) -> float:
    """From Beta(alpha, alpha). Torch draws that from its global generator alone."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def mixup(x: Tensor, share: float) -> Tensor:
    """Of each sample `share`, and of the one before it in the batch the rest."""
    return torch.lerp(x.roll(1, dims=0), x, share)
