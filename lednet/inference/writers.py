"""Write predictions of images and videos: label maps, visualizations and class shares."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lednet.data.image_io import open_image, to_rgb, write_label_map
from lednet.data.labels import LabelScheme
from lednet.errors import UserError
from lednet.inference.pipeline import run_pipeline
from lednet.inference.predictor import Predictor
from lednet.inference.video import VideoEncoder, VideoFrame, write_video
from lednet.io import nearest_existing, temporary_path, write_folder_atomically
from lednet.visualization import VISUALIZATIONS, ImageTooLarge, Visualizer, write_picture

OUTPUTS = ("labels", *VISUALIZATIONS)
PHOTO_OUTPUTS = ("overlay", "side")
"""Outputs that contain the input image."""


class PredictionJob(NamedTuple):
    """An image to predict, and the path of each output to write."""

    name: str
    path: Path
    outputs: dict[str, Path]


@dataclass
class PredictionWriter:
    """Writes the outputs of images, and names the files of all outputs.

    Attributes:
        folder: folder of the results.
        kinds: outputs to write, of `OUTPUTS`.
        visualizer: draws the outputs other than "labels".
        photo_suffix: suffix of an image's `PHOTO_OUTPUTS`, ".png" or ".jpg". Others are PNG.
        label_values: (256,) uint8, the value in label maps for each class index (default: the
            index).
    """

    folder: Path
    kinds: Sequence[str]
    visualizer: Visualizer
    photo_suffix: str = ".png"
    label_values: np.ndarray | None = None

    def image_files(self, name: str) -> dict[str, Path]:
        """Path of each output of an image."""
        suffixes = {kind: self.photo_suffix for kind in PHOTO_OUTPUTS}
        return self._files(name, {kind: suffixes.get(kind, ".png") for kind in self.kinds})

    def video_files(self, name: str) -> dict[str, Path]:
        """Path of each output of a video. "labels" is a folder with one label map per frame."""
        return self._files(name, {kind: "" if kind == "labels" else ".mp4" for kind in self.kinds})

    def _files(self, name: str, suffixes: dict[str, str]) -> dict[str, Path]:
        return {kind: self.folder / f"{name}_{kind}{end}" for kind, end in suffixes.items()}

    def write(self, kind: str, path: Path, image: np.ndarray, label: np.ndarray) -> None:
        """Write one output of an image (H, W, 3) uint8 RGB with class indices (H, W) uint8."""
        if kind == "labels":
            write_label_map(path, label if self.label_values is None else self.label_values[label])
        else:
            write_picture(path, self.visualizer.draw(kind, image, label))


def is_name_too_long(path: Path) -> bool:
    """Whether the file system of the folder of `path` cannot hold its name while it is written."""
    most = os.pathconf(nearest_existing(path.parent), "PC_NAME_MAX")
    return len(os.fsencode(temporary_path(path).name)) > most


@dataclass
class VideoWriter:
    """Writes the outputs of a video frame by frame. Created by `video_output`.

    Attributes:
        writer: names and draws the outputs.
        time_base: seconds per unit of the frames' timestamps.
        folder: folder of the label maps, if they are written.
        encoders: the encoder of each visualization.
        size: height and width of the frames.
    """

    writer: PredictionWriter
    time_base: Fraction
    folder: Path | None
    encoders: dict[str, VideoEncoder]
    size: tuple[int, ...] = (0, 0)

    def add(self, frame: VideoFrame, label: np.ndarray) -> None:
        """Write the outputs of a frame, with its (H, W) uint8 class indices."""
        self.size = label.shape
        if self.folder:
            self.writer.write("labels", self.folder / f"{frame.number:06d}.png", frame.image, label)
        for kind, encoder in self.encoders.items():
            drawn = self.writer.visualizer.draw(kind, frame.image, label)
            encoder.append(drawn, frame.pts, frame.pixel_aspect)

    @property
    def padded(self) -> list[str]:
        """Outputs of which a row or column was repeated, because the frames have an odd side."""
        odd = any(side % 2 for side in self.size)
        return [kind for kind, encoder in self.encoders.items() if encoder.padded and odd]


@contextmanager
def video_output(
    output: PredictionWriter, name: str, rate: Fraction, time_base: Fraction
) -> Iterator[VideoWriter]:
    """Open the output files of a video. They appear only if the block succeeds.

    Args:
        rate: average frames per second.
        time_base: seconds per unit of the frames' timestamps.

    Raises:
        UserError: A file cannot be written.
    """
    paths = output.video_files(name)
    with ExitStack() as stack:
        labels = paths.pop("labels", None)
        folder = labels and stack.enter_context(write_folder_atomically(labels))
        encoders = {
            kind: stack.enter_context(write_video(path, rate, time_base))
            for kind, path in paths.items()
        }
        yield VideoWriter(output, time_base, folder, encoders)


def count_pixels(label: np.ndarray, num_outputs: int) -> list[int]:
    """Number of pixels of each network output in (H, W) uint8 class indices. Void is last."""
    return Image.fromarray(label).histogram()[:num_outputs]


def class_shares(pixels: Iterable[Sequence[int]], scheme: LabelScheme) -> dict[str, float]:
    """Share of each class, and of void, in all pixels of several images.

    Args:
        pixels: results of `count_pixels`, one for each image.
    """
    total = np.sum([np.array(one, np.int64) for one in pixels], axis=0)
    return dict(zip((*scheme.classes, "void"), (total / total.sum()).tolist(), strict=True))


def predict_images(
    predictor: Predictor,
    jobs: Iterable[PredictionJob],
    output: PredictionWriter,
    progress: Callable[[], object],
    *,
    on_written: Callable[[dict[str, Any]], object] = lambda entry: None,
    num_workers: int = 2,
) -> list[dict[str, Any]]:
    """Predict images and write their outputs. Threads decode, draw and write meanwhile.

    Args:
        progress: called after each image.
        on_written: called with an image's entry when its files are on disk, by the thread that
            wrote them.
        num_workers: number of threads that decode, and of threads that draw and write.

    Returns:
        An entry for each image, in order: "name", "path", "height", "width", and "pixels" from
        `count_pixels`; "error" instead of the last three for an image that cannot be read, or is
        too large for the format of an output.

    Raises:
        UserError: A file cannot be written.
    """

    def read(job: PredictionJob) -> tuple[PredictionJob, np.ndarray | UserError]:
        try:
            return job, to_rgb(open_image(job.path))
        except UserError as error:
            return job, error

    def predict(loaded: tuple[PredictionJob, np.ndarray | UserError]) -> tuple:
        job, image = loaded
        return job, image, None if isinstance(image, UserError) else predictor(image).labels

    def write(predicted: tuple) -> dict[str, Any]:
        job, image, label = predicted
        entry: dict[str, Any] = {"name": job.name, "path": str(job.path)}
        if label is None:
            return entry | {"error": str(image)}
        try:
            for kind, path in job.outputs.items():
                output.write(kind, path, image, label)
        except ImageTooLarge as error:
            return entry | {"error": f"{job.path}: {error} (--image-format png)"}
        entry["height"], entry["width"] = label.shape
        entry["pixels"] = count_pixels(label, predictor.net.num_classes)
        on_written(entry)
        return entry

    return run_pipeline(
        jobs, read, predict, write, progress, readers=num_workers, writers=num_workers
    )


def predict_video(
    predictor: Predictor,
    frames: Iterator[VideoFrame],
    output: VideoWriter,
    progress: Callable[[], object],
    on_frame: Callable[[dict[str, Any]], object] | None = None,
) -> list[dict[str, Any]]:
    """Predict the frames of a video. Threads decode, draw and encode meanwhile.

    Args:
        progress: called after each frame.
        on_frame: called with each entry, in order; nothing is returned then.

    Returns:
        An entry for each frame, in order: "frame", its number; "seconds" since the first frame;
        "pixels" from `count_pixels`.
    """

    def predict(frame: VideoFrame) -> tuple[VideoFrame, np.ndarray]:
        return frame, predictor(frame.image).labels

    def write(predicted: tuple[VideoFrame, np.ndarray]) -> dict[str, Any]:
        frame, label = predicted
        output.add(frame, label)
        pixels = count_pixels(label, predictor.net.num_classes)
        seconds = float(frame.pts * output.time_base)
        return {"frame": frame.number, "seconds": seconds, "pixels": pixels}

    return run_pipeline(
        itertools.repeat(frames), lambda frames: next(frames, None), predict, write, progress,
        readers=1, writers=1, on_result=on_frame,
    )  # fmt: skip


def errors_of(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Why images were skipped, from the entries of `predict_images`."""
    return [entry["error"] for entry in entries if "error" in entry]
