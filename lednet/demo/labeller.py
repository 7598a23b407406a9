"""What the live page asks for: uploads read within limits, and labelled one at a time."""

import base64
import io
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lednet.data.image_io import open_image, to_rgb
from lednet.data.labels import LabelScheme
from lednet.errors import UserError
from lednet.export.formats import is_exported
from lednet.inference.backends import BACKENDS, is_available
from lednet.inference.predictor import Predictor
from lednet.inference.video import VideoFrame, VideoReader
from lednet.inference.writers import (
    PredictionWriter,
    class_shares,
    count_pixels,
    predict_video,
    video_output,
)
from lednet.visualization import Visualizer, data_uri, shrink

MAX_SIDE = 16_384
"""Pixels, beyond which an image has no sensible label map."""
SHOWN_SIDE = 2048
"""Pixels: larger images are labelled in full and shown reduced."""


@dataclass(frozen=True)
class Limits:
    """Of what the page takes.

    Attributes:
        upload: bytes.
        pixels: of an image, or of a video's frame.
        seconds, frames: of a video.
    """

    upload: int = 100_000_000
    pixels: int = 50_000_000
    seconds: float = 60
    frames: int = 3000


@dataclass
class Progress:
    """Of a video, as the thread that labels it writes and others read.

    Attributes:
        total: frames, if known.
        stop: set by whoever does not want the video any more.
    """

    done: int = 0
    total: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def advance(self) -> None:
        self.done += 1


def decode_image(data: bytes, max_pixels: int = Limits.pixels) -> np.ndarray:
    """RGB, (H, W, 3) uint8, of an image file's bytes, upright. Its size is checked before it is
    decoded.

    Raises:
        UserError: and nothing else, whatever the bytes are: as `open_image` and `to_rgb`, or a
            side beyond `MAX_SIDE`.
    """
    image = open_image(io.BytesIO(data), max_pixels)
    if max(image.size) > MAX_SIDE:
        raise UserError(f"the image has a side of more than {MAX_SIDE:,} pixels: make it smaller")
    return to_rgb(image)


class SharedPredictor(Predictor):
    """A predictor that works on one image at a time, in the order in which threads ask.

    All of them share one thread, as they share the processor.
    """

    _worker = ThreadPoolExecutor(1, "network")

    def timed(self, image: Any) -> tuple[np.ndarray, float]:
        """The label map, and the seconds that it took, without the wait."""
        return self._worker.submit(self._time, image).result()

    def _time(self, image: Any) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        label = self(image).labels
        return label, time.perf_counter() - start


class Labeller:
    """Labels images and videos with each of some weights on each backend that is installed.

    Args:
        weights: by the names that the page offers; no others can be had.
    """

    def __init__(
        self, weights: Mapping[str, Path], device: torch.device, limits: Limits | None = None
    ):
        self.weights, self.device, self.limits = weights, device, limits or Limits()
        self.backends = [name for name in BACKENDS if is_available(name, device)]
        self._ready: dict[tuple[str, str], tuple[SharedPredictor, LabelScheme]] = {}
        self._preparing = threading.Lock()

    def is_ready(self, weights: str, backend: str) -> bool:
        """Whether `prepare` has nothing to do, which may be the work of a minute."""
        return (weights, backend) in self._ready

    def prepare(self, weights: str, backend: str) -> tuple[SharedPredictor, LabelScheme]:
        """A predictor that has run once, as the first run builds what the others use.

        An exported file runs on its own backend.

        Raises:
            UserError: the weights cannot be loaded, or the backend fails.
        """
        key = weights, backend
        if key not in self._ready:
            with self._preparing:
                if key not in self._ready:  # another thread may have been at it
                    self._ready[key] = self._open(self.weights[weights], backend)
        return self._ready[key]

    def _open(self, path: Path, backend: str) -> tuple[SharedPredictor, LabelScheme]:
        predictor = SharedPredictor(
            path, device=self.device, backend="auto" if is_exported(path) else backend
        )
        scheme = predictor.scheme
        height, width = predictor.size
        try:
            for more in (0, 1):  # without and with resizing: torch.compile tells the two apart
                predictor(np.zeros((height + more, width, 3), np.uint8))
        except RuntimeError as error:  # torch.compile without a compiler, for instance
            raise UserError(f"{backend} does not run here: choose another") from error
        return predictor, scheme

    def label_image(
        self, data: bytes, weights: str, backend: str, with_image: bool = True
    ) -> dict[str, Any]:
        """What the browser needs to show the image of these bytes with its classes.

        Returns:
            Ready for JSON. "classes": name and RGB of each, void last, with None; "shares" of
            them; "width" and "height" of the image; "network_ms", from the image to its label map,
            and "whole_ms", with decoding, waiting and packing. For drawing: "labels", (rows,
            columns) uint8, deflated, in base64; "columns", "rows"; "image", a data URI, if asked
            for.

        Raises:
            UserError: as `decode_image` and `prepare`.
        """
        predictor, scheme = self.prepare(weights, backend)
        start = time.perf_counter()
        image = decode_image(data, self.limits.pixels)
        label, seconds = predictor.timed(image)
        pixels = count_pixels(label, predictor.net.num_classes)
        height, width = label.shape
        shown = min(SHOWN_SIDE, max(1, SHOWN_SIDE * width // height))
        image, small = shrink(image, label, width=shown) if width > shown else (image, label)
        answer = _listing([pixels], scheme) | {
            "width": width,
            "height": height,
            "rows": small.shape[0],
            "columns": small.shape[1],
            "labels": base64.b64encode(zlib.compress(small.tobytes(), 1)).decode("ascii"),
            "image": data_uri(Image.fromarray(image)) if with_image else None,
            "network_ms": 1000 * seconds,
        }
        return answer | {"whole_ms": 1000 * (time.perf_counter() - start)}

    def label_video(
        self,
        source: Path,
        weights: str,
        backend: str,
        alpha: float,
        progress: Progress,
    ) -> dict[str, Any]:
        """Write video_overlay.mp4 beside `source`, every frame of it tinted by class.

        Returns:
            "classes", "shares", "width" and "height" as of `label_image`, "frames", "whole_ms" of
            one of them, and "problem", a sentence if some are missing.

        Raises:
            UserError: no video, one beyond the limits, or it was stopped.
        """
        predictor, scheme = self.prepare(weights, backend)
        start = time.perf_counter()
        output = PredictionWriter(
            source.parent, ("overlay",), Visualizer(scheme, alpha, legend=False)
        )
        with VideoReader(source, max_pixels=self.limits.pixels) as reader:
            progress.total = reader.expected
            self._require_short(reader, reader.expected or 0)
            with video_output(output, "video", reader.rate, reader.time_base) as files:
                frames = self._within_limits(reader, progress)
                entries = predict_video(predictor, frames, files, progress.advance)
        return _listing((entry["pixels"] for entry in entries), scheme) | {
            "width": files.size[1],
            "height": files.size[0],
            "frames": len(entries),
            "whole_ms": 1000 * (time.perf_counter() - start) / len(entries),
            "problem": reader.problem,
        }

    def _require_short(self, reader: VideoReader, frames: int, seconds: float = 0) -> None:
        seconds = max(seconds, float(frames / reader.rate))
        if frames > self.limits.frames or seconds > self.limits.seconds:
            raise UserError(
                f"{reader.source} is longer than {self.limits.seconds:g} seconds or "
                f"{self.limits.frames:,} frames, the limit here: cut it, or use utils/predict.py"
            )

    def _within_limits(self, reader: VideoReader, progress: Progress) -> Iterator[VideoFrame]:
        """The frames, while they are wanted; a file need not tell the truth about its length."""
        for frame in reader:
            if progress.stop.is_set():
                raise UserError(f"{reader.source} was stopped")
            self._require_short(reader, frame.number + 1, float(frame.pts * reader.time_base))
            yield frame


def _listing(pixels: Iterable[Sequence[int]], scheme: LabelScheme) -> dict[str, Any]:
    """Classes and shares of all images together, as of `Labeller.label_image`."""
    return {
        "classes": [*zip(scheme.classes, scheme.colors, strict=True), ("void", None)],
        "shares": list(class_shares(pixels, scheme).values()),
    }
