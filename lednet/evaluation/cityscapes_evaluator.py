"""Benchmark evaluation of a Cityscapes split, from a network or from predictions on disk."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from lednet.data.cityscapes import cityscapes_labels, cityscapes_pairs, detect_cityscapes_encoding
from lednet.data.dataset import read_label
from lednet.data.image_io import open_image, read_image, write_label_map
from lednet.data.labels import LabelScheme, cityscapes_id_scheme, cityscapes_label_ids
from lednet.data.pairs import list_examples, require_file
from lednet.errors import UserError
from lednet.evaluation.cityscapes_metrics import (
    AVERAGE_INSTANCE_SIZE,
    NUM_IDS,
    BenchmarkScores,
    ImageCounts,
    count_image,
)
from lednet.evaluation.cityscapes_submission import frame_name, prediction_name
from lednet.evaluation.evaluator import LabelMapper
from lednet.io import map_ordered


class Frame(NamedTuple):
    """One frame of a split: its name `<city>_<seq>_<frame>` and its files.

    None stands for images that were not asked for, labels that are withheld, and a split
    without instance images.
    """

    name: str
    image: Path | None
    label: Path | None
    instances: Path | None


def find_frames(
    root: str | os.PathLike, split: str, labels: str = "auto", images: bool = True
) -> tuple[list[Frame], LabelScheme]:
    """Frames of a Cityscapes split with fine annotations, sorted by name.

    Args:
        root: folder that holds `gtFine` and `leftImg8bit`.
        labels: "auto", "labelIds" or "labelTrainIds": what the label files hold.
        images: whether `leftImg8bit` is needed.

    Returns:
        The frames, and the scheme to read their labels with: as label ids.

    Raises:
        UserError: see `cityscapes_pairs`; also if only some labels have instance images.
    """
    root = Path(root)
    if split == "test":
        pairs = cityscapes_pairs(root, split)
        frames = [Frame(frame_name(pair.image), pair.image, None, None) for pair in pairs]
        return frames, cityscapes_id_scheme()
    if labels == "auto":
        labels = detect_cityscapes_encoding(root, split, "fine")
    files = cityscapes_labels(root, split, encoding=labels)
    if not files:
        raise UserError(f"{root / 'gtFine' / split} holds no *_{labels}.png: check --labels")
    image_of = {}
    if images:
        pairs = cityscapes_pairs(root, split, encoding=labels)
        image_of = {frame_name(pair.image): pair.image for pair in pairs}
    instances = _instance_files(files, labels)
    frames = [
        Frame(name, image_of.get(name), label, instances.get(name))
        for name, label in sorted(files.items())
    ]
    return frames, cityscapes_id_scheme(labels)


def _instance_files(labels: dict[str, Path], encoding: str) -> dict[str, Path]:
    files = {
        name: path.with_name(path.name.replace(encoding, "instanceIds"))
        for name, path in labels.items()
    }
    found = {name: path for name, path in files.items() if path.is_file()}
    if found and len(found) < len(files):
        missing = list_examples(files.keys() - found.keys())
        raise UserError(
            f"{len(files) - len(found)} of {len(files)} labels have no *_instanceIds.png beside "
            f"them ({missing}): unpack them again, or remove them all to do without iIoU"
        )
    return found


def find_predictions(folder: str | os.PathLike, frames: Sequence[Frame]) -> dict[str, Path]:
    """Prediction files by frame name: any `<city>_<seq>_<frame>*.png` below `folder`.

    Raises:
        UserError: no such folder, a frame without a prediction or with two, or a
            prediction without a frame.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give label-id PNGs with --predictions")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        name = frame_name(path)
        if name in found:
            raise UserError(f"{found[name]} and {path.name} are of one frame: keep one of them")
        found[name] = path
    names = {frame.name for frame in frames}
    if missing := names - found.keys():
        raise UserError(
            f"{folder}: {len(missing)} of {len(names)} frames have no prediction "
            f"({list_examples(missing)}): add them"
        )
    if unknown := found.keys() - names:
        raise UserError(
            f"{folder}: {len(unknown)} of {len(found)} predictions have no ground truth "
            f"({list_examples(unknown)}): add it, or remove them"
        )
    return found


@dataclass
class FrameResult:
    """Counts of one frame at the label file's size and at the network's size.

    Both are None if labels are withheld; `network` is also None for predictions from disk.
    """

    name: str
    full: ImageCounts | None = None
    network: ImageCounts | None = None

    def to_json(self) -> dict[str, Any]:
        """Values for JSON, with the non-zero entries of the matrices."""
        entry: dict[str, Any] = {"name": self.name}
        for key, counts in (("full", self.full), ("network", self.network)):
            if counts is not None:
                cells = np.argwhere(counts.matrix)
                entry[key] = np.column_stack((cells, counts.matrix[tuple(cells.T)])).tolist()
        if self.full is not None and self.full.instances is not None:
            entry["instances"] = self.full.instances.tolist()
        return entry

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "FrameResult":
        counts: dict[str, ImageCounts] = {}
        for key in ("full", "network"):
            if key in entry:
                matrix = np.zeros((NUM_IDS, NUM_IDS), np.int64)
                for true_id, predicted_id, pixels in entry[key]:
                    matrix[true_id, predicted_id] = pixels
                counts[key] = ImageCounts(matrix)
        if "instances" in entry:
            instances = np.array(entry["instances"], np.float64)
            counts["full"].instances = instances.reshape(len(AVERAGE_INSTANCE_SIZE), 4)
        return cls(entry["name"], **counts)


def total_scores(results: Iterable[ImageCounts | None]) -> BenchmarkScores:
    """Scores over all images that have counts."""
    scores = BenchmarkScores()
    for counts in results:
        if counts is not None:
            scores.add(counts)
    return scores


def read_instances(path: Path) -> np.ndarray:
    """An `instanceIds` image, (H, W) int32.

    Raises:
        UserError: unreadable, or a value that is not an instance id.
    """
    instances = np.array(open_image(path)).astype(np.int32)
    if instances.ndim != 2 or instances.min() < 0 or instances.max() >= NUM_IDS * 1000:
        raise UserError(f"{path} is not an image of instance ids (0 to 33999): copy it again")
    return instances


def score_frame(
    frame: Frame,
    scheme: LabelScheme,
    prediction: np.ndarray,
    network_prediction: np.ndarray | None = None,
) -> FrameResult:
    """Compare a prediction with the ground truth of its frame.

    Args:
        scheme: to read the label with, as `find_frames` gave it.
        prediction: (H, W) uint8 label ids.
        network_prediction: (h, w) uint8 label ids at the network's size, where the labels
            are reduced to it (nearest neighbour).

    Raises:
        UserError: a file is unreadable, of another size or holds an unknown id.
    """
    if frame.label is None:
        return FrameResult(frame.name)
    truth = read_label(frame.label, scheme)
    instances = None if frame.instances is None else read_instances(frame.instances)
    for path, found in ((frame.label, truth), (frame.instances, instances)):
        if found is not None and found.shape != prediction.shape:
            raise UserError(
                f"{path} is {_size(found)}, the prediction for it {_size(prediction)}: predict at "
                "the size of the ground truth"
            )
    result = FrameResult(frame.name, count_image(prediction, truth, instances))
    if network_prediction is not None:
        mask = tv_tensors.Mask(torch.from_numpy(truth))
        reduced = v2.functional.resize(mask, list(network_prediction.shape)).numpy()
        result.network = count_image(network_prediction, reduced)
    return result


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def score_predictions(
    frames: Sequence[Frame], scheme: LabelScheme, files: Sequence[Path], workers: int = 2
) -> Iterator[FrameResult]:
    """Score label-id PNGs, one for each frame, reading with `workers` threads.

    Raises:
        UserError: as `score_frame`; names the file.
    """
    ids = cityscapes_id_scheme()

    def job(frame: Frame, path: Path) -> FrameResult:
        prediction = read_label(path, ids)
        try:
            return score_frame(frame, scheme, prediction)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    with ThreadPoolExecutor(workers) as pool:
        jobs = (partial(job, *pair) for pair in zip(frames, files, strict=True))
        yield from map_ordered(pool, jobs, 2 * workers)


class _Images(Dataset):
    """The frames' images, (3, H, W) uint8."""

    def __init__(self, frames: Sequence[Frame]):
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        file = require_file(self.frames[index].image, "images")
        return torch.from_numpy(read_image(file)).permute(2, 0, 1)


def _stack(images: list[Tensor]) -> Tensor:
    if len({image.shape for image in images}) > 1:
        raise UserError("the images of a batch differ in size: use --batch-size 1")
    return torch.stack(images)


def predict_frames(
    label_maps: LabelMapper,
    network_size: tuple[int, int],
    frames: Sequence[Frame],
    scheme: LabelScheme,
    folder: Path,
    batch_size: int = 1,
    workers: int = 2,
) -> Iterator[FrameResult]:
    """Predict every frame, write its label ids to `folder`, and score it where it has a label.

    Scores are computed at the image's size and at `network_size`, (height, width). The file is on
    disk before the result is returned. Images are decoded in `workers`
    processes; writing and scoring run in as many threads beside the network.

    Raises:
        UserError: as `score_frame`; also images of several sizes in one batch.
    """
    label_ids = torch.from_numpy(cityscapes_label_ids())

    def finish(frame: Frame, full: np.ndarray, network: np.ndarray) -> FrameResult:
        result = score_frame(frame, scheme, full, network)
        write_label_map(folder / prediction_name(frame.name), full)
        return result

    def jobs() -> Iterator[Callable[[], FrameResult]]:
        loader = DataLoader(_Images(frames), batch_size, num_workers=workers, collate_fn=_stack)
        queue = iter(frames)
        for images in loader:
            maps = label_maps(images, tuple(images.shape[-2:]), network_size)
            full, network = (label_ids[m.cpu().int()].numpy() for m in maps)
            for one in zip(full, network, strict=True):
                yield partial(finish, next(queue), *one)

    threads = max(1, workers)
    with ThreadPoolExecutor(threads) as pool:
        yield from map_ordered(pool, jobs(), 2 * threads)
