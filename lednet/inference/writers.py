"""Predictions of images and videos as files: label maps, pictures, and the classes' shares."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lednet.data.dataset import SegmentationDataset
from lednet.data.image_io import open_image, to_rgb, write_label_map
from lednet.data.labels import LabelScheme
from lednet.errors import UserError
from lednet.inference.pipeline import run_pipeline
from lednet.inference.predictor import Predictor
from lednet.inference.video import VideoEncoder, VideoFrame, write_video
from lednet.io import write_folder_atomically
from lednet.plots import contact_sheet
from lednet.visualization import VISUALIZATIONS, Visualizer, write_picture

OUTPUTS = ("labels", *VISUALIZATIONS)
PHOTO_OUTPUTS = ("overlay", "side")
"""Pictures with the image in them."""


class PredictionJob(NamedTuple):
    """An image to predict, and the file of each kind that is to be written for it."""

    name: str
    path: Path
    outputs: dict[str, Path]


class PredictionWriter:
    """Where results lie, and how they are drawn.

    Args:
        folder: of all results.
        kinds: of `OUTPUTS`.
        photo: suffix of an image's `PHOTO_OUTPUTS`, ".png" or ".jpg"; the others are PNG.
        values: (256,) uint8, what a label map on disk has for each class index, if not that.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Sequence[str],
        painter: Visualizer,
        photo: str = ".png",
        values: np.ndarray | None = None,
    ):
        self.folder, self.kinds, self.painter = folder, kinds, painter
        self.photo, self.values = photo, values

    def image_files(self, name: str) -> dict[str, Path]:
        """Path of each kind."""
        suffixes = {kind: self.photo if kind in PHOTO_OUTPUTS else ".png" for kind in self.kinds}
        return {kind: self.folder / f"{name}_{kind}{end}" for kind, end in suffixes.items()}

    def video_files(self, name: str) -> dict[str, Path]:
        """The same. That of "labels" is a folder with a label map for each frame."""
        suffixes = {kind: "" if kind == "labels" else ".mp4" for kind in self.kinds}
        return {kind: self.folder / f"{name}_{kind}{end}" for kind, end in suffixes.items()}

    def write(self, kind: str, path: Path, image: np.ndarray, label: np.ndarray) -> None:
        """
        Args:
            image: (H, W, 3) uint8 RGB.
            label: (H, W) uint8 class indices.
        """
        if kind == "labels":
            write_label_map(path, label if self.values is None else self.values[label])
        else:
            write_picture(path, self.painter.draw(kind, image, label))


class VideoWriter:
    """The files of one video while they grow; opened by `video_output`."""

    def __init__(
        self,
        output: PredictionWriter,
        unit: Fraction,
        folder: Path | None,
        writers: dict[str, VideoEncoder],
    ):
        self._output, self._folder, self._writers = output, folder, writers
        self.unit = unit
        self.size = (0, 0)
        """Height and width of the frames."""

    def add(self, frame: VideoFrame, label: np.ndarray) -> None:
        self.size = label.shape
        if self._folder:
            path = self._folder / f"{frame.number:06d}.png"
            self._output.write("labels", path, frame.image, label)
        for kind, writer in self._writers.items():
            writer.append(self._output.painter.draw(kind, frame.image, label), frame.ticks)

    @property
    def padded(self) -> list[str]:
        """Kinds whose pictures have an odd side, to which a line was added."""
        return [kind for kind, writer in self._writers.items() if writer.padded]


@contextmanager
def video_output(
    output: PredictionWriter, name: str, rate: Fraction, unit: Fraction
) -> Iterator[VideoWriter]:
    """Open the files of a video; they are there when the block ends well, and else none is.

    Args:
        rate: frames a second.
        unit: of the frames' ticks, in seconds.

    Raises:
        UserError: they cannot be written.
    """
    paths = output.video_files(name)
    with ExitStack() as stack:
        labels = paths.pop("labels", None)
        folder = labels and stack.enter_context(write_folder_atomically(labels))
        writers = {
            kind: stack.enter_context(write_video(path, rate, unit)) for kind, path in paths.items()
        }
        yield VideoWriter(output, unit, folder, writers)


def count_pixels(label: np.ndarray, num_outputs: int) -> list[int]:
    """Pixels of each of a network's outputs, void last, in (H, W) uint8 class indices."""
    return Image.fromarray(label).histogram()[:num_outputs]


def class_shares(pixels: Iterable[Sequence[int]], scheme: LabelScheme) -> dict[str, float]:
    """Share of each class, void among them, of all pixels together.

    Args:
        pixels: as of `count_pixels`, for each image.
    """
    total = np.sum([np.array(one, np.int64) for one in pixels], axis=0)
    names = (*scheme.classes, "void")
    return dict(zip(names, (total / total.sum()).tolist(), strict=True))


def predict_images(
    predictor: Predictor,
    tasks: Iterable[PredictionJob],
    output: PredictionWriter,
    progress: Callable[[], object],
    *,
    keep: Callable[[dict[str, Any]], object] = lambda entry: None,
    workers: int = 2,
) -> list[dict[str, Any]]:
    """Predict images and write their files; decoding, drawing and writing run beside.

    An image that cannot be read is passed over.

    Args:
        progress: called after each image.
        keep: is given each entry without an error, when the files are on disk, by a thread
            that writes.
        workers: threads that decode, and as many that draw and write.

    Returns:
        An entry for each image, in order: "name", "path", and either "error", why it was
        passed over, or "height", "width", and "pixels" as of `count_pixels`.

    Raises:
        UserError: a file cannot be written.
    """

    def read(task: PredictionJob) -> tuple[PredictionJob, np.ndarray | UserError]:
        try:
            return task, to_rgb(open_image(task.path))
        except UserError as error:
            return task, error

    def predict(loaded: tuple[PredictionJob, np.ndarray | UserError]) -> tuple:
        task, image = loaded
        return task, image, None if isinstance(image, UserError) else predictor(image)

    def write(answer: tuple) -> dict[str, Any]:
        task, image, label = answer
        entry: dict[str, Any] = {"name": task.name, "path": str(task.path)}
        if label is None:
            return entry | {"error": str(image)}
        for kind, path in task.outputs.items():
            output.write(kind, path, image, label)
        height, width = label.shape
        pixels = count_pixels(label, predictor.net.num_classes)
        entry |= {"height": height, "width": width, "pixels": pixels}
        keep(entry)
        return entry

    return run_pipeline(tasks, read, predict, write, progress, readers=workers, writers=workers)


def predict_video(
    predictor: Predictor,
    frames: Iterator[VideoFrame],
    files: VideoWriter,
    progress: Callable[[], object],
) -> list[dict[str, Any]]:
    """Predict the frames of a video; decoding, drawing and encoding run beside.

    Args:
        progress: called after each frame.

    Returns:
        An entry for each frame, in order: "frame", its number, "seconds" from the first one,
        and "pixels" as of `count_pixels`.
    """

    def read(_: None) -> VideoFrame | None:
        return next(frames, None)

    def predict(frame: VideoFrame) -> tuple[VideoFrame, np.ndarray]:
        return frame, predictor(frame.image)

    def write(answer: tuple[VideoFrame, np.ndarray]) -> dict[str, Any]:
        frame, label = answer
        files.add(frame, label)
        pixels = count_pixels(label, predictor.net.num_classes)
        seconds = float(frame.ticks * files.unit)
        return {"frame": frame.number, "seconds": seconds, "pixels": pixels}

    return run_pipeline(
        itertools.repeat(None), read, predict, write, progress, readers=1, writers=1
    )


def errors_of(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Why images were passed over, of the entries of `predict_images`."""
    return [entry["error"] for entry in entries if "error" in entry]


def sample_sheet(
    predictor: Predictor, data: SegmentationDataset, path: str | os.PathLike, images: int
) -> None:
    """Draw a contact sheet of `images` pictures spread evenly over `data`.

    Args:
        path: PNG to write.
    """
    count = min(images, len(data))
    rows = []
    for i in range(count):
        pixels, truth = data.read(i * len(data) // count)
        rows.append((pixels, truth, predictor(pixels)))
    contact_sheet(rows, data.scheme, path)
