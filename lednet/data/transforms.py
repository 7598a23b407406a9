"""What happens to an image and its label between the file and the network.

Two halves: resizing, one sample at a time on the CPU, always with the same result, so
that it can be kept (`lednet.data.cache`); and `Augmentation`, random, a batch at a time
on whatever device the batch is on. Between them everything is uint8. Image and label
move alike, images with bilinear interpolation, labels with nearest-neighbour, whose
values never change. What comes in from outside the picture is void in the label.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from lednet.data.labels import IGNORE_INDEX

PRESETS = ("paper", "modern")
SHIFT = 2
"""Largest translation of the paper's recipe in pixels (official training code)."""
SCALES = (0.5, 2.0)
JITTER = 0.3
"""Colour factors of "modern" are 1 - JITTER to 1 + JITTER."""


def resize_transform(size: tuple[int, int]) -> v2.Compose:
    """Resize to `size`, (height, width) in pixels; out come plain uint8 tensors.

    (Image uint8 (3, H, W), Mask uint8 (H, W)) -> (uint8 (3, *size), uint8 size)
    """
    return v2.Compose([v2.Resize(size, antialias=True), v2.ToPureTensor()])


class Augmentation(nn.Module):
    """Random changes of a training batch, on the device of the batch.

    Args:
        preset: "paper": flip, shift by up to 2 px, pixels as they are (the letter's
            recipe); "modern": colour jitter, scale 0.5 to 2 with a crop to the same
            size, flip.
        mean, std: normalisation of the [0, 1] image; the paper has none.
        size: (height, width) in pixels that images are brought to first, antialiased, and
            labels of training with them; None leaves them as they come.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        preset: str = "paper",
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {PRESETS}, not {preset!r}")
        self.change = {"paper": random_flip_translate, "modern": color_jitter_random_scale}[preset]
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: (N, 3, H, W) uint8.
            labels: (N, H, W) uint8.
            generator: of the CPU, so that no result depends on the device's own.

        Returns:
            (N, 3, H, W) float32, normalised (black outside the picture), and
            (N, H, W) int64, `IGNORE_INDEX` there.
        """
        if self.size:
            images = self._resized(images)
            labels = F.interpolate(labels[:, None], self.size, mode="nearest-exact")[:, 0]
        draws = torch.rand(len(images), 7, generator=generator)
        draws = draws.to(images.device, non_blocking=images.is_cuda)  # no waiting for its queue
        images, labels = self.change(images, labels, draws)
        return self._normalized(images), labels.long()

    def _resized(self, images: Tensor) -> Tensor:
        return v2.functional.resize(images, self.size, antialias=True)

    def normalize(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns, without any change: for validation. Labels keep their size.

        Args:
            images: (N, 3, H, W) uint8, or float32 in [0, 1].
        """
        return self._normalized(self._resized(images) if self.size else images), labels.long()

    def _normalized(self, images: Tensor) -> Tensor:
        """From bytes or [0, 1] to what the network takes."""
        if images.dtype == torch.uint8:
            images = images.float().mul_(1 / 255)
        images = images.contiguous()  # one layout, whatever the loader's: results depend on it
        return (images - self.mean).div_(self.std)


def gather(planes: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Pick whole pixels of each sample.

    Args:
        planes: (N, C, H, W).
        rows, columns: (N, H') and (N, W') source coordinates; outside the picture too.

    Returns:
        (N, C, H', W'), and which of it comes from inside the picture, (N, 1, H', W') bool;
        the rest is to be overwritten.
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
    """The paper's: mirror half of the samples, then shift each by up to `SHIFT` px.

    draws: (N, 7) uniform in [0, 1).
    """
    height, width = labels.shape[-2:]
    flip = draws[:, :1] < 0.5
    down, right = ((draws[:, 1:3] * (2 * SHIFT + 1)).long() - SHIFT).split(1, dim=1)
    rows = torch.arange(height, device=images.device) - down  # (N, H)
    columns = torch.arange(width, device=images.device) - right  # (N, W)
    columns = torch.where(flip, width - 1 - columns, columns)
    # The label travels as a fourth channel: it cannot go another way than the image.
    moved, inside = gather(torch.cat((images, labels[:, None]), dim=1), rows, columns)
    return moved[:, :3] * inside, moved[:, 3].masked_fill(~inside[:, 0], IGNORE_INDEX)


def color_jitter_random_scale(
    images: Tensor, labels: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Change the colours, mirror half of the samples, scale each within `SCALES`.

    A picture made larger is cropped anywhere, one made smaller lies anywhere in the frame.

    draws: (N, 7) uniform in [0, 1).
    """
    height, width = labels.shape[-2:]
    images = color_jitter(images.float().mul_(1 / 255), 1 + JITTER * (2 * draws[:, 4:] - 1))
    # In units of half the frame, as grid_sample has them: -1 to 1 both ways.
    mirror = torch.where(draws[:, :1] < 0.5, -1.0, 1.0)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draws[:, 3:4]
    place = (2 * draws[:, 1:3] - 1) * (1 - scale)

    def centres(n: int) -> Tensor:
        return (2 * torch.arange(n, device=images.device) + 1) / n - 1

    # No affine_grid: its matrix product may run in TF32, too coarse to tell pixels apart.
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
