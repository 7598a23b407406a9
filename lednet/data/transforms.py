"""Transforms of images and label maps.

Resizing is deterministic and done one sample at a time on the CPU, so that its results can be
cached as uint8. `Augmentation` is random, and done a batch at a time on the device of the batch.
Images are interpolated bilinearly, labels by nearest neighbour.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from lednet.data.labels import IGNORE_INDEX

PRESETS = ("paper", "modern")
SHIFT = 2
"""Largest translation of "paper" in pixels (official training code)."""
SCALES = (0.5, 2.0)
JITTER = 0.3
"""Colour factors of "modern" are 1 - JITTER to 1 + JITTER."""


def resize_transform(size: tuple[int, int]) -> v2.Compose:
    """Resize to `size`, (height, width) in pixels, and return plain uint8 tensors."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.ToPureTensor()])


class Normalization(nn.Module):
    """Holds `mean` and `std` of the [0, 1] image, (3, 1, 1), and the preset of the augmentation."""

    mean: Tensor
    std: Tensor

    def __init__(self, preset: str, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {PRESETS}, not {preset!r}")
        self.preset = preset
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))


def draw_uniform(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` numbers in [0, 1) for each image, (N, count), moved to the device of the batch."""
    draws = torch.rand(len(images), count, generator=generator)
    return draws.to(images.device, non_blocking=images.is_cuda)  # does not wait for its queue


class Augmentation(Normalization):
    """Random augmentation of a training batch, on the device of the batch.

    Args:
        preset: "paper": flip and shift by up to 2 px, as in the paper; "modern": colour jitter,
            scale 0.5 to 2 with a crop to the same size, flip.
        mean, std: normalization of the [0, 1] image; the paper has none.
        size: (height, width) in pixels to resize images, antialiased, and training labels to
            first; None keeps their size.
    """

    def __init__(
        self,
        preset: str = "paper",
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
        size: tuple[int, int] | None = None,
    ):
        super().__init__(preset, mean, std)
        self.size = size

    def forward(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: (N, 3, H, W) uint8.
            labels: (N, H, W) uint8.
            generator: on the CPU, so that results do not depend on the device.

        Returns:
            Normalized images (N, 3, H, W) float32, and labels (N, H, W) int64. Pixels from outside
            the image are black before normalization, and `IGNORE_INDEX`.
        """
        if self.size:
            images = self._resized(images)
            labels = F.interpolate(labels[:, None], self.size, mode="nearest-exact")[:, 0]
        change = random_flip_translate if self.preset == "paper" else color_jitter_random_scale
        images, labels = change(images, labels, draw_uniform(images, 7, generator))
        return self._normalized(images), labels.long()

    def normalize(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, without augmentation: for validation. Labels keep their size.

        images: (N, 3, H, W) uint8, or float32 in [0, 1].
        """
        return self._normalized(self._resized(images) if self.size else images), labels.long()

    def _resized(self, images: Tensor) -> Tensor:
        return v2.functional.resize(images, self.size, antialias=True)

    def _normalized(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float().mul_(1 / 255)
        images = images.contiguous()  # results depend on the memory format
        return (images - self.mean).div_(self.std)


def gather(planes: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Gather rows and columns of pixels of each sample.

    Args:
        planes: (N, C, H, W).
        rows, columns: (N, H') and (N, W') source coordinates, which may be outside the image.

    Returns:
        (N, C, H', W'), and a mask (N, 1, H', W') of the pixels from inside the image; the values
        of the others are undefined.
    """
    n, c, height, width = planes.shape
    sample = torch.arange(n, device=planes.device).view(n, 1, 1)
    channel = torch.arange(c, device=planes.device).view(1, c, 1)
    picked = planes[sample, channel, rows.clamp(0, height - 1)[:, None]]  # (N, C, H', W)
    column = columns.clamp(0, width - 1)[:, None, None]
    picked = picked.gather(3, column.expand(*picked.shape[:3], -1))  # (N, C, H', W')
    down, across = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    return picked, (down[:, :, None] & across[:, None, :])[:, None]


def random_flip_translate(images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the samples, then shift each by up to `SHIFT` px.

    draws: (N, 7) uniform in [0, 1).
    """
    height, width = labels.shape[-2:]
    flip = draws[:, :1] < 0.5
    down, right = ((draws[:, 1:3] * (2 * SHIFT + 1)).long() - SHIFT).split(1, dim=1)
    rows = torch.arange(height, device=images.device) - down  # (N, H)
    columns = torch.arange(width, device=images.device) - right  # (N, W)
    columns = torch.where(flip, width - 1 - columns, columns)
    # The label is a fourth channel, so that it stays aligned with the image.
    moved, inside = gather(torch.cat((images, labels[:, None]), dim=1), rows, columns)
    return moved[:, :3] * inside, moved[:, 3].masked_fill(~inside[:, 0], IGNORE_INDEX)


def color_jitter_random_scale(
    images: Tensor, labels: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Jitter the colours, mirror half of the samples, scale each within `SCALES`.

    Enlarged images are cropped, reduced ones padded, both at a random position.

    draws: (N, 7) uniform in [0, 1).
    """
    height, width = labels.shape[-2:]
    images = color_jitter(images.float().mul_(1 / 255), 1 + JITTER * (2 * draws[:, 4:] - 1))
    # Coordinates as of grid_sample: -1 to 1 from edge to edge.
    mirror = torch.where(draws[:, :1] < 0.5, -1.0, 1.0)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draws[:, 3:4]
    place = (2 * draws[:, 1:3] - 1) * (1 - scale)

    def centres(n: int) -> Tensor:
        return (2 * torch.arange(n, device=images.device) + 1) / n - 1

    # Not affine_grid: its matrix product may run in TF32, whose precision is below one pixel.
    y = (centres(height) - place[:, :1]) / scale  # (N, H)
    x = (mirror * centres(width) - place[:, 1:]) / scale  # (N, W)
    rows, columns = ((y + 1) * height / 2).floor().long(), ((x + 1) * width / 2).floor().long()
    moved, inside = gather(labels[:, None], rows, columns)
    ys, xs = y[:, :, None].expand(-1, -1, width), x[:, None, :].expand(-1, height, -1)
    grid = torch.stack((xs, ys), dim=-1)  # (N, H, W, 2)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    return images.mul_(inside), moved.masked_fill_(~inside, IGNORE_INDEX)[:, 0]


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each sample, in this order.

    images: (N, 3, H, W) in [0, 1]; factors: (N, 3), 1 changes nothing.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp_(0, 1)
    mean = rgb_to_grayscale(images).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp_(0, 1)
    return torch.lerp(rgb_to_grayscale(images), images, saturation).clamp_(0, 1)


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Luma, ITU-R BT.601: (N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
