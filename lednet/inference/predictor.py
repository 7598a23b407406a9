"""End-to-end inference: preprocessing, forward pass and upsampling to a full-size label map."""

import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lednet.data.image_io import open_image, to_rgb
from lednet.data.labels import LabelScheme, require_classes
from lednet.errors import UserError
from lednet.export.formats import ExportedModel, is_exported, load
from lednet.export.wrappers import EndToEndModel
from lednet.hub import input_size
from lednet.inference.backends import build_runner, choose_backend, exported_runner
from lednet.inference.sparse_argmax import upsample_argmax
from lednet.model import LEDNet, argmax_at, count_parameters, load_model, resize, upsample_scores

ImageInput = (
    np.ndarray
    | Image.Image
    | Tensor
    | str
    | os.PathLike
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
)
"""What `Predictor` is called with; see `read_input`."""

STRIDE = 8
"""Input pixels per logit along each axis."""


class TileSpan(NamedTuple):
    """One tile along one axis: its input, and the part of its output that is used."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def tile_spans(length: int, tile: int, overlap: int) -> list[TileSpan]:
    """Cover `length` with tiles of size `tile` that overlap by at least `overlap`.

    Each overlap is divided in the middle between its two tiles; the used parts cover the axis
    exactly once.
    """
    if tile >= length:
        return [TileSpan(0, length, 0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    borders = [0, *((a + tile + b) // 2 for a, b in itertools.pairwise(starts)), length]
    return [
        TileSpan(start, start + tile, *own)
        for start, own in zip(starts, itertools.pairwise(borders), strict=True)
    ]


class Predictor:
    """A network with its pre- and postprocessing: uint8 images to label maps.

    Images are resized to the network's size as uint8 (antialiased, as in training), scaled to
    [0, 1] and normalized; the logits are upsampled to the image's size before the argmax.

    Args:
        net: is not modified. Or an exported file with logits, which has its own normalization.
        size: (height, width) in pixels that the network runs at.
        mean, std: normalization of the [0, 1] image, per channel.
        backend: one of `lednet.inference.backends.BACKENDS`; "auto" (the fastest that is
            installed); or None ("eager" for a network, its own runtime for a file).
        precision: a key of `lednet.device.AMP_DTYPES`; for a file, the one it was opened with.
        fold: fuse batch norms into the convolutions (equal outputs, faster).
        scales: sizes relative to `size` whose class probabilities are averaged.
        flip: average with the output for the mirrored image.
        tile: (height, width) in pixels, multiples of 8, to run a `size` that does not fit into
            memory tile by tile; the global pooling then covers a tile instead of the image.
        overlap: of adjacent tiles in pixels, a multiple of 8.

    Attributes:
        net: the network; for a file, the one it was written from, without weights.
        backend, precision: the backend or runtime used, and the precision of the convolutions.
        runner: a `lednet.inference.backends.InferenceFn`.
        parameters: number of parameters of `net`.
        meta: metadata of the weights or the file; empty for a bare network.

    Raises:
        UserError: as `build_runner`, or tiles that are not compatible with the other options.
    """

    def __init__(
        self,
        net: LEDNet | ExportedModel,
        size: tuple[int, int],
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
        *,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        precision: str = "fp32",
        fold: bool = True,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: tuple[int, int] | None = None,
        overlap: int = 128,
    ):
        self.scales, self.flip = tuple(scales), flip
        if tile and self.uses_tta:
            raise UserError("--tile does not go together with --scales or --flip: choose one")
        if tile and not 0 <= overlap < min(tile):
            raise UserError(f"an overlap of {overlap} does not suit tiles of {tile}: choose less")
        if tile and any(side % STRIDE for side in (*tile, overlap)):
            raise UserError(f"tiles of {tile} and their overlap of {overlap}: give multiples of 8")
        if not scales or min(scales) <= 0:
            raise UserError("--scales must be positive: give 1, or 0.75 1 1.25")
        self.device = torch.device(device)
        self.net: LEDNet
        if isinstance(net, ExportedModel):
            self.net, self.backend = net.build_meta_model(), net.runtime
            self.runner = exported_runner(net)
            precision = "int8" if net.meta["precision"] == "int8" else precision
            fold = True
        else:
            self.net = net
            self.backend = choose_backend(self.device) if backend == "auto" else backend or "eager"
            graph = EndToEndModel(net, mean, std, fold=fold).eval()
            self.runner = build_runner(self.backend, graph, self.device, precision)
        height, width = size
        self.size, self.tile, self.overlap = (height, width), tile, overlap
        self.precision, self.folded = precision, fold
        self.parameters = count_parameters(self.net)
        self.meta: dict[str, Any] = {}

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        scheme: LabelScheme | None = None,
        default_size: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Self:
        """Build a predictor from the weights, run folder or exported file at `path`.

        Args:
            scheme: classes that the weights must have; None for no check.
            default_size: for weights without a stored training size.
            height, width: another size in pixels to run the network at.
            options: of the class.

        Raises:
            UserError: as `load_model`, `require_classes` and `input_size`; an exported file
                with label maps, or options that the file has fixed.
        """
        net: LEDNet | ExportedModel
        if is_exported(path):
            net, meta = _open_logits(Path(path), options)
            model = net.build_meta_model()
        else:
            model, meta = load_model(path)
            net = model
            options = {key: meta[key] for key in ("mean", "std") if key in meta} | options
        if scheme is not None:
            require_classes(model, meta, scheme, path)
        predictor = cls(net, input_size(meta, default_size, height, width), **options)
        predictor.meta = meta
        return predictor

    def prepare(self, images: Tensor, scale: float = 1.0) -> Tensor:
        """Resize images on the device.

        images: (N, 3, H, W) uint8 -> (N, h, w, 3) uint8
        """
        size = [round(scale * side) for side in self.size]
        resized = v2.functional.resize(images.to(self.device), size, antialias=True)
        return resized.permute(0, 2, 3, 1).contiguous()

    def forward_logits(self, prepared: Tensor) -> Tensor:
        """Logits before the last upsampling, tile by tile if `tile` is set.

        prepared: (N, h, w, 3) uint8 -> (N, C, ceil(h/8), ceil(w/8)) float32
        """
        if not self.tile:
            return self.runner(prepared)
        low = [-(-length // STRIDE) for length in prepared.shape[1:3]]
        spans = (
            tile_spans(length, side // STRIDE, self.overlap // STRIDE)
            for length, side in zip(low, self.tile, strict=True)
        )
        output = torch.empty(0)
        for y, x in itertools.product(*spans):
            rows, columns = (slice(s.start * STRIDE, s.stop * STRIDE) for s in (y, x))
            logits = self.runner(prepared[:, rows, columns].contiguous())
            if not output.numel():
                output = logits.new_empty(*logits.shape[:2], *low)
            used = [slice(s.own_start - s.start, s.own_stop - s.start) for s in (y, x)]
            own = [slice(s.own_start, s.own_stop) for s in (y, x)]
            output[:, :, own[0], own[1]] = logits[:, :, used[0], used[1]]
        return output

    @torch.inference_mode()
    def scores(self, images: Tensor) -> Tensor:
        """Class scores at the network's size: logits, or mean probabilities with `uses_tta`.

        images: (N, 3, H, W) uint8 -> (N, C, *size) float32
        """
        if not self.uses_tta:
            return resize(self.forward_logits(self.prepare(images)), self.size)
        total = torch.zeros((), device=self.device)
        for scale in self.scales:
            prepared = self.prepare(images, scale)
            for axes in ((), (3,))[: 1 + self.flip]:  # to mirror
                low = self.runner(prepared.flip([axis - 1 for axis in axes]))
                probabilities = resize(low, prepared.shape[1:3]).softmax(dim=1).flip(axes)
                total = total + upsample_scores(probabilities, self.size)
        return total / (len(self.scales) * (1 + self.flip))

    @property
    def uses_tta(self) -> bool:
        """Whether the outputs of several scales or of the mirrored image are averaged."""
        return self.flip or self.scales != (1.0,)

    @torch.inference_mode()
    def label_maps(self, images: Tensor, *sizes: Sequence[int]) -> list[Tensor]:
        """Label maps at each of `sizes`, (height, width); by default at the images' own size.

        images: (N, 3, H, W) uint8 -> for each size (N, *size) uint8 on the device: class indices,
        of which the network's last output (void) is the highest.
        """
        sizes = sizes or (images.shape[-2:],)
        if not self.uses_tta and self.device.type == "cpu":
            low = self.forward_logits(self.prepare(images))
            return [upsample_argmax(low, self.size, size) for size in sizes]
        scores = self.scores(images)
        return [
            torch.cat([argmax_at(one, size).to(torch.uint8) for one in scores.split(1)])
            for size in sizes
        ]

    @overload
    def __call__(self, image: ImageInput) -> np.ndarray: ...
    @overload
    def __call__(self, image: list[Any] | tuple[Any, ...]) -> list[np.ndarray]: ...

    def __call__(
        self, image: ImageInput | list[Any] | tuple[Any, ...]
    ) -> np.ndarray | list[np.ndarray]:
        """Label map (H, W) uint8 of one image, at its size. Threads may share a predictor.

        Args:
            image: see `read_input`; a list or tuple of images gives a list of label maps.

        Raises:
            UserError: not an image, or not 8-bit.
        """
        if isinstance(image, list | tuple):
            return [self._label_map(one) for one in image]
        return self._label_map(image)

    def _label_map(self, image: ImageInput) -> np.ndarray:
        images = torch.tensor(np.ascontiguousarray(read_input(image))).permute(2, 0, 1)[None]
        return self.label_maps(images)[0][0].cpu().numpy()


def read_input(image: ImageInput) -> np.ndarray:
    """Convert what a predictor is called with to RGB, (H, W, 3) uint8.

    Args:
        image: a path; the bytes of an image file, or the file opened in binary mode; a PIL image
            of any mode (rotated by its EXIF orientation); or uint8, as an array (H, W, 3) RGB,
            (H, W, 4) or (H, W), or as a tensor (3, H, W), (4, H, W), (1, H, W) or (H, W).

    Raises:
        UserError: not an image, or not 8-bit.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.layout != torch.strided or image.is_meta:
            raise UserError(f"an image has uint8 values, not a tensor of {image.dtype}: convert it")
        if image.ndim != 2 and not (image.ndim == 3 and image.shape[0] in (1, 3, 4)):
            raise UserError(
                f"a tensor is one image (3, H, W), not {tuple(image.shape)}: permute it, or give "
                "several images as a list"
            )
        array = image.cpu().numpy()
        return to_rgb(array if array.ndim == 2 else array.transpose(1, 2, 0))
    if isinstance(image, np.ndarray):
        if image.ndim > 3:
            raise UserError(
                f"an array is one image (H, W, 3), not {image.shape}: give several as a list"
            )
        return to_rgb(np.asarray(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return to_rgb(open_image(io.BytesIO(image)))
    if isinstance(image, str) and "://" in image:
        raise UserError(f"{image} is a URL: download it, and give the path or the bytes")
    if isinstance(image, str | os.PathLike):
        if not os.fspath(image):
            raise UserError("the path of the image is empty: give one")
        return to_rgb(open_image(Path(os.fsdecode(image))))
    if hasattr(image, "encoding"):  # as files opened as text have
        raise UserError("a file opened as text is no image: open it with mode 'rb'")
    if hasattr(image, "read") and hasattr(image, "seek"):
        return to_rgb(open_image(image))
    raise UserError(
        f"{type(image).__name__} is no image: give a path, the bytes of a file, a PIL image, a "
        "uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"
    )


def _open_logits(path: Path, options: dict[str, Any]) -> tuple[ExportedModel, dict[str, Any]]:
    """Open an exported file for a predictor; the file and its metadata."""
    exported = load(
        path,
        threads=torch.get_num_threads(),
        device=torch.device(options.get("device", "cpu")).type,
        precision=options.get("precision", "fp32"),
    )
    meta = exported.meta
    if meta["output"] != "logits":
        raise UserError(f"{path} returns labels: export it with --output logits")
    if options.get("backend") not in (None, "auto", exported.runtime):
        raise UserError(f"{path} is run by {exported.runtime}: leave --backend out")
    return exported, meta
