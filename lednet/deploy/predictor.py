"""Images in, label maps out: the same pre- and post-processing wherever a network answers."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from lednet.data.labels import LabelScheme
from lednet.deploy.fold import fold_batch_norm
from lednet.errors import UserError
from lednet.model import LEDNet, count_parameters
from lednet.precision import autocast
from lednet.weights import input_size, load_network, require_classes


def enlarge(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of scores to the size at which they are compared.

    scores: (N, C, h, w) -> (N, C, *size)
    """
    if scores.shape[-2:] == torch.Size(size):
        return scores
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def predict_at(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Class of every pixel at `size`: the logits are enlarged before the argmax.

    logits: (N, C, h, w) -> (N, *size) int64
    """
    return enlarge(logits, size).argmax(dim=1)


class Span(NamedTuple):
    """One tile along one axis: what it sees, and the part of it that is its own answer."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def tile_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Cover `length` with tiles of `tile` that overlap by at least `overlap` (all in pixels).

    Where two tiles overlap, each answers for its half; the own parts cover the axis once.
    """
    if tile >= length:
        return [Span(0, length, 0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    borders = [0, *((a + tile + b) // 2 for a, b in itertools.pairwise(starts)), length]
    return [
        Span(start, start + tile, *own)
        for start, own in zip(starts, itertools.pairwise(borders), strict=True)
    ]


def _sample_tile(scores: Tensor, rows: Span, columns: Span, source, size) -> tuple[Tensor, tuple]:
    """`enlarge` for one tile: its own part of what the joined scores would give at `size`.

    Args:
        scores: (1, C, rows' length, columns' length).
        source: (height, width) of the joined scores.
        size: (height, width) of the answer.

    Returns:
        (1, C, rows, columns), and the slices of the answer that they fill.
    """
    slices, coordinates = [], []
    for span, before, after in zip((rows, columns), source, size, strict=True):
        # Pixel i of the answer lies at (i + 0.5) * before / after in the source.
        first, last = (-(-(2 * b * after - before) // (2 * before)) for b in span[2:])
        center = (torch.arange(first, last, device=scores.device) + 0.5) * before / after
        slices.append(slice(first, last))
        coordinates.append(2 * (center - span.start) / (span.stop - span.start) - 1)
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack((x, y), dim=-1)[None]
    sampled = F.grid_sample(scores, grid, padding_mode="border", align_corners=False)
    return sampled, tuple(slices)


class Predictor:
    """A network with what stands before and behind it: uint8 images in, label maps out.

    The image is resized to the network's size as uint8 (antialiased, as in training),
    scaled to [0, 1] and normalised; the logits are enlarged to the image's size, and the
    argmax is taken there.

    Args:
        net: moved to `device`, not changed otherwise.
        size: (height, width) in pixels that the network works at.
        mean, std: normalisation of the [0, 1] image that the network was trained with.
        precision: a key of `lednet.precision.AMP_DTYPES`.
        fold: whether to fold batch norm into the convolutions (exact, faster).
        scales: sizes relative to `size` whose class probabilities are averaged.
        flip: average with the mirrored image's answer too.
        tile: (height, width) in pixels of tiles, for a `size` that is too large for the
            memory at once; the global pooling then sees a tile instead of the image.
        overlap: of neighbouring tiles, in pixels.

    Attributes:
        parameters: of `net` as it was given.

    Raises:
        UserError: a precision that the device lacks, or tiles that do not fit together
            with the other options.
    """

    def __init__(
        self,
        net: LEDNet,
        size: tuple[int, int],
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        fold: bool = True,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: tuple[int, int] | None = None,
        overlap: int = 128,
    ):
        if tile and tuple(scales) != (1.0,):
            raise UserError("--tile and --scales do not go together: choose one")
        if tile and not 2 <= overlap < min(tile):
            raise UserError(f"an overlap of {overlap} does not suit tiles of {tile}: choose less")
        if not scales or min(scales) <= 0:
            raise UserError("--scales must be positive: give 1, or 0.75 1 1.25")
        self.device, self.precision = torch.device(device), precision
        with autocast(self.device, precision):
            pass  # refuses what the device lacks now, not at the first image
        self.parameters = count_parameters(net)
        self.net = (fold_batch_norm(net) if fold else net).to(self.device).eval()
        self.size, self.folded = tuple(size), fold
        self.scales, self.flip = tuple(scales), flip
        self.tile, self.overlap = tile, overlap
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device).view(-1, 1, 1)

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        scheme: LabelScheme | None = None,
        default_size: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> "Predictor":
        """A predictor for the weights, or the run's folder, at `path`.

        Args:
            scheme: classes that the weights must have, if that matters.
            default_size: for weights that do not say what size they were trained at.
            height, width: another size in pixels to run the network at.
            options: as of the class.

        Raises:
            UserError: as `load_network`, `require_classes` and `input_size`.
        """
        net, meta = load_network(path)
        if scheme is not None:
            require_classes(net, meta, scheme, path)
        size = input_size(meta, default_size, height, width)
        normalization = {key: meta[key] for key in ("mean", "std") if key in meta}
        return cls(net, size, **normalization, **options)

    def prepare(self, images: Tensor, scale: float = 1.0) -> Tensor:
        """Network's input from uint8 images (N, 3, H, W): (N, 3, h, w) float32 on the device."""
        size = [round(scale * side) for side in self.size]
        images = v2.functional.resize(images.to(self.device), size, antialias=True)
        images = v2.functional.to_dtype(images, torch.float32, scale=True)
        return (images - self.mean) / self.std

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """One pass of the network over prepared images.

        x: (N, 3, h, w) -> (N, C, h, w) float32
        """
        with autocast(self.device, self.precision):
            return self.net(x).float()

    def _flipped_too(self, x: Tensor) -> Tensor:
        """The logits, or with `flip` the mean probabilities of both ways round."""
        logits = self.logits(x)
        if not self.flip:
            return logits
        mirrored = self.logits(x.flip(3)).flip(3)
        return (logits.softmax(1) + mirrored.softmax(1)) / 2

    def scores(self, images: Tensor) -> Tensor:
        """Scores of whole uint8 images at the network's size; their argmax is the answer.

        images: (N, 3, H, W) -> (N, C, *size) float32
        """
        if self.scales == (1.0,):
            return self._flipped_too(self.prepare(images))
        total = 0
        for scale in self.scales:
            scores = self._flipped_too(self.prepare(images, scale))
            probabilities = scores if self.flip else scores.softmax(1)
            total = total + enlarge(probabilities, self.size)
        return total / len(self.scales)

    @torch.inference_mode()
    def label_maps(self, images: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
        """Label maps of uint8 images at each of `sizes`, by default the images' own.

        Full-size scores are held for one image (or tile) at a time.

        images: (N, 3, H, W) -> for each size (N, *size) uint8 on the device: class indices,
        the network's last output (void) being the highest.
        """
        sizes = sizes or (tuple(images.shape[-2:]),)
        if self.tile:
            return self._tiled_label_maps(images, sizes)
        scores = self.scores(images)
        return [
            torch.cat([predict_at(one, size).to(torch.uint8) for one in scores.split(1)])
            for size in sizes
        ]

    def _tiles(self) -> Iterator[tuple[Span, Span]]:
        rows, columns = (
            tile_spans(length, tile, self.overlap)
            for length, tile in zip(self.size, self.tile, strict=True)
        )
        return ((row, column) for row in rows for column in columns)

    def _tiled_label_maps(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        answers = [
            torch.empty((len(images), *size), dtype=torch.uint8, device=self.device)
            for size in sizes
        ]
        for n, image in enumerate(images):
            x = self.prepare(image[None])
            for rows, columns in self._tiles():
                scores = self._flipped_too(
                    x[:, :, rows.start : rows.stop, columns.start : columns.stop]
                )
                for answer, size in zip(answers, sizes, strict=True):
                    part, place = _sample_tile(scores, rows, columns, self.size, size)
                    answer[(n, *place)] = part[0].argmax(dim=0).to(torch.uint8)
        return answers

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Label map (H, W) uint8 of one RGB image (H, W, 3) uint8."""
        images = torch.tensor(image).permute(2, 0, 1)[None]
        return self.label_maps(images)[0][0].cpu().numpy()
