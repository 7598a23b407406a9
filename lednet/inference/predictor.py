"""End-to-end inference: preprocessing, forward pass and upsampling to a full-size label map."""

import io
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lednet.data.image_io import open_image, to_rgb
from lednet.data.labels import LabelScheme, require_classes
from lednet.device import choose_device
from lednet.errors import UserError
from lednet.exporting.formats import ExportedModel, is_exported, load
from lednet.exporting.wrappers import EndToEndModel
from lednet.hub import input_size
from lednet.inference.backends import build_runner, choose_backend, exported_runner
from lednet.inference.result import Segmentation
from lednet.inference.sparse_argmax import upsample_argmax
from lednet.inference.tiles import STRIDE, tile_spans
from lednet.inference.video import open_video
from lednet.io import map_ordered
from lednet.model import LEDNet, argmax_at, count_parameters, load_model, resize, upsample_scores
from lednet.visualization import output_scheme

logger = logging.getLogger(__name__)

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


class Predictor:
    """A network with its pre- and postprocessing: images to label maps.

        predictor = Predictor("camvid-d20")
        result = predictor("street.jpg")
        result.labels, result.shares, result.overlay()

    Images are resized to the network's size as uint8 (antialiased, as in training), scaled to
    [0, 1] and normalized; the logits are upsampled to the image's size before the argmax.

    Args:
        weights: name of released weights, weights file, run folder (its best weights) or exported
            file with logits; or a network, which is not modified; or an opened exported file.
        size: (height, width) in pixels that the network runs at; None, for one or both: as
            trained, or the usual size of the data set if the weights do not state one.
        mean, std: normalization of the [0, 1] image, per channel (default: that of the weights).
            An exported file has its own.
        scheme: classes that the weights must have; None for no check.
        device: "cpu", "cuda", "mps", or "auto" for the first available of CUDA, MPS and CPU.
        backend: one of `lednet.inference.backends.BACKENDS`, or "auto" for the fastest that is
            installed. An exported file is run by its own runtime.
        precision: a key of `lednet.device.AMP_DTYPES`; for an opened file, the one that it was
            opened with.
        fold: fuse batch norms into the convolutions (equal outputs, faster).
        scales: sizes relative to `size` whose class probabilities are averaged.
        flip: average with the output for the mirrored image.
        tile: (height, width) in pixels, multiples of 8, to run a `size` that does not fit into
            memory tile by tile; the global pooling then covers a tile instead of the image.
        overlap: of adjacent tiles in pixels, a multiple of 8.
        expected_images: number of images to come, if known; for few, "auto" chooses "eager",
            which needs no time to start.
        cache: keep what a backend exports for later; see `lednet.inference.engine_cache`.

    Attributes:
        net: the network; for a file, the one it was written from, without weights.
        backend, precision: the backend or runtime used, and the precision of the convolutions.
        runner: a `lednet.inference.backends.InferenceFn`.
        parameters: number of parameters of `net`.
        meta: metadata of the weights or the file; empty for a bare network.

    Raises:
        UserError: the weights cannot be read, or have other classes than `scheme`; no size is
            known; or a device, backend, precision or tiles that cannot be used.
    """

    def __init__(
        self,
        weights: str | os.PathLike | LEDNet | ExportedModel,
        size: tuple[int | None, int | None] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        scheme: LabelScheme | None = None,
        device: torch.device | str = "auto",
        backend: str = "auto",
        precision: str = "fp32",
        fold: bool = True,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: tuple[int, int] | None = None,
        overlap: int = 128,
        expected_images: int | None = None,
        cache: bool = True,
    ):
        self.scales, self.flip = tuple(scales), flip
        self.tile, self.overlap = tile, overlap
        self._require_compatible_options()
        self.device = choose_device(device) if isinstance(device, str) else device
        self._source = "the network"
        if isinstance(weights, str | os.PathLike):
            self._source = os.fspath(weights)
            weights, self.meta = _open(Path(weights), self.device, backend, precision)
        else:
            self.meta = weights.meta if isinstance(weights, ExportedModel) else {}
        exported = weights if isinstance(weights, ExportedModel) else None
        self.net = weights.build_meta_model() if isinstance(weights, ExportedModel) else weights
        if scheme is not None:
            require_classes(self.net, self.meta, scheme, self._source)
        height, width = size or (None, None)
        need_default = "size" not in self.meta and None in (height, width)
        default = _default_size(self.scheme) if need_default else None
        self.size = input_size(self.meta, default, height, width)
        self.folded = fold or bool(exported)
        self.precision = precision
        if exported:
            self.backend, self.runner = exported.runtime, exported_runner(exported)
            if self.meta["precision"] == "int8":
                self.precision = "int8"
        else:
            mean = self.meta.get("mean", (0, 0, 0)) if mean is None else mean
            std = self.meta.get("std", (1, 1, 1)) if std is None else std
            graph = EndToEndModel(self.net, mean, std, fold=fold).eval()
            if backend == "auto":
                backend = choose_backend(self.device, graph, self.size, expected_images)
            self.backend = backend
            self.runner = build_runner(backend, graph, self.device, precision, cache)
        self.parameters = count_parameters(self.net)

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        scheme: LabelScheme | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Self:
        """Earlier form of the constructor."""
        return cls(path, (height, width), scheme=scheme, **options)

    def _require_compatible_options(self) -> None:
        tile, overlap = self.tile, self.overlap
        if tile and self.uses_tta:
            raise UserError("--tile does not go together with --scales or --flip: choose one")
        if tile and not 0 <= overlap < min(tile):
            raise UserError(f"an overlap of {overlap} does not suit tiles of {tile}: choose less")
        if tile and any(side % STRIDE for side in (*tile, overlap)):
            raise UserError(f"tiles of {tile} and their overlap of {overlap}: give multiples of 8")
        if not self.scales or min(self.scales) <= 0:
            raise UserError("--scales must be positive: give 1, or 0.75 1 1.25")

    @cached_property
    def scheme(self) -> LabelScheme:
        """Names and colors of the classes; "class 0" and so on if the weights do not name them."""
        return output_scheme(self.meta, self.net.num_classes, self._source)

    def prepare(self, images: Tensor, scale: float = 1.0) -> Tensor:
        """Resize images on the device.

        images: (N, 3, H, W) uint8 -> (N, h, w, 3) uint8
        """
        size = [round(scale * side) for side in self.size]
        return resize_images(images.to(self.device), size).permute(0, 2, 3, 1).contiguous()

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
    def __call__(self, image: ImageInput, *, confidence: bool = False) -> Segmentation: ...
    @overload
    def __call__(
        self, image: list[Any] | tuple[Any, ...], *, confidence: bool = False
    ) -> list[Segmentation]: ...

    def __call__(
        self, image: ImageInput | list[Any] | tuple[Any, ...], *, confidence: bool = False
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or each of a list or tuple. Threads may share a predictor.

        Args:
            image: see `read_input`.
            confidence: also compute the probability of the predicted class of every pixel.

        Raises:
            UserError: not an image, or not 8-bit.
        """
        if isinstance(image, list | tuple):
            return [self._segment(one, confidence) for one in image]
        return self._segment(image, confidence)

    @torch.inference_mode()
    def _segment(self, image: ImageInput, confidence: bool) -> Segmentation:
        pixels = read_input(image)
        images = torch.tensor(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        if not confidence:
            labels = self.label_maps(images)[0][0].cpu().numpy()
            return Segmentation(labels, pixels, self.scheme)
        scores = upsample_scores(self.scores(images), pixels.shape[:2])
        probabilities = scores if self.uses_tta else scores.softmax(dim=1)
        labels = scores.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        largest = probabilities.amax(dim=1)[0].float().cpu().numpy()
        return Segmentation(labels, pixels, self.scheme, largest)

    def stream(self, source: str | os.PathLike) -> Iterator[Segmentation]:
        """Segment the frames of a video one by one. Two frames are decoded ahead.

        Args:
            source: video file, or "camera:N" for /dev/videoN, which has no end. Needs PyAV.

        Raises:
            UserError: the video cannot be read, or PyAV is not installed.
        """
        with open_video(source) as video, ThreadPoolExecutor(1) as pool:
            frames = iter(video)
            reads = itertools.repeat(partial(next, frames, None))
            for frame in map_ordered(pool, reads, ahead=2):
                if frame is None:
                    break
                yield self._segment(frame.image, confidence=False)
        if video.problem:
            logger.warning("%s", video.problem)


def resize_images(images: Tensor, size: Sequence[int]) -> Tensor:
    """Antialiased bilinear interpolation, equal to torchvision's, which takes seconds to import.

    images: (N, 3, H, W) uint8 -> (N, 3, *size) uint8
    """
    if images.shape[-2:] == torch.Size(size):
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, size, mode="bilinear", antialias=True)
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().byte()


def _default_size(scheme: LabelScheme) -> tuple[int, int] | None:
    from lednet.data.registry import DEFAULT_SIZES  # imports torchvision

    return DEFAULT_SIZES.get(scheme.name.lower())


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


def _open(
    path: Path, device: torch.device, backend: str, precision: str
) -> tuple[LEDNet | ExportedModel, dict[str, Any]]:
    """The network or exported file at `path`, and its metadata."""
    if not is_exported(path):
        return load_model(path)
    threads = torch.get_num_threads()
    exported = load(path, threads=threads, device=device.type, precision=precision)
    meta = exported.meta
    if meta["output"] != "logits":
        raise UserError(f"{path} returns labels: export it with --output logits")
    if backend not in ("auto", exported.runtime):
        raise UserError(f"{path} is run by {exported.runtime}: leave --backend out")
    return exported, meta
