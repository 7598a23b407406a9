"""Benchmark evaluation of a Cityscapes split, from a network or from predictions on disk."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from lednet.data.cityscapes import cityscapes_labels, cityscapes_pairs, detect_cityscapes_encoding
from lednet.data.dataset import read_label
from lednet.data.image_io import open_image, read_ids, read_image, write_label_map
from lednet.data.labels import (
    IGNORE_INDEX,
    LabelScheme,
    cityscapes_id_scheme,
    cityscapes_label_ids,
)
from lednet.data.pairs import list_examples, require_file
from lednet.errors import UserError
from lednet.evaluation.cityscapes_metrics import (
    EVALUATED_CLASSES,
    NUM_IDS,
    BenchmarkScores,
    count_image,
)
from lednet.evaluation.cityscapes_submission import frame_name, prediction_name
from lednet.evaluation.evaluator import LabelMapper
from lednet.files import LABEL_SUFFIXES, find_files, unused_images
from lednet.io import map_ordered


class Frame(NamedTuple):
    """One frame of a split: its name `<city>_<seq>_<frame>` and its files.

    A file is None if it was not requested (image) or does not exist (label, instance image).
    """

    name: str
    image: Path | None
    label: Path | None = None
    instances: Path | None = None


def find_frames(
    root: str | os.PathLike, split: str, labels: str = "auto", images: bool = True
) -> tuple[list[Frame], LabelScheme]:
    """List the frames of a Cityscapes split with fine annotations, sorted by name.

    Args:
        root: folder that holds `gtFine` and `leftImg8bit`.
        split: "train", "val" or "test".
        labels: encoding of the label files: "auto", "labelIds" or "labelTrainIds".
        images: whether `leftImg8bit` is needed.

    Returns:
        The frames, and the scheme that reads their labels as label ids.

    Raises:
        UserError: see `cityscapes_pairs`; also if only some labels have instance images.
    """
    root = Path(root)
    if split == "test":
        pairs = cityscapes_pairs(root, split)
        return [Frame(frame_name(pair.image), pair.image) for pair in pairs], cityscapes_id_scheme()
    if labels == "auto":
        labels = detect_cityscapes_encoding(root, split, "fine")
    files = cityscapes_labels(root, split, encoding=labels)
    if not files:
        raise UserError(f"{root / 'gtFine' / split} holds no *_{labels}.png: check --labels")
    pairs = cityscapes_pairs(root, split, encoding=labels) if images else []
    image_of = {frame_name(pair.image): pair.image for pair in pairs}
    frames = []
    for name, label in sorted(files.items()):
        instances = label.with_name(label.name.replace(labels, "instanceIds"))
        found = instances if instances.is_file() else None
        frames.append(Frame(name, image_of.get(name), label, found))
    incomplete = [frame.name for frame in frames if frame.instances is None]
    if 0 < len(incomplete) < len(frames):
        raise UserError(
            f"{len(incomplete)} of {len(frames)} labels have no *_instanceIds.png in their folder "
            f"({list_examples(incomplete)}): unpack them again, or remove all instance images to "
            "evaluate without iIoU"
        )
    return frames, cityscapes_id_scheme(labels)


def find_predictions(folder: str | os.PathLike, frames: Sequence[Frame]) -> dict[str, Path]:
    """Prediction files by frame name: any `<city>_<seq>_<frame>*.png` below `folder`.

    Other lossless formats are accepted; hidden and system files are skipped (`lednet.files`).

    Raises:
        UserError: the folder does not exist, a frame has no prediction or two, or a prediction has
            no frame.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give label-id PNGs with --predictions")
    found: dict[str, Path] = {}
    files = find_files(folder)
    used = [path for path in files if path.suffix.lower() in LABEL_SUFFIXES]
    for path in used:
        first = found.setdefault(frame_name(path), path)
        if first != path:
            raise UserError(f"{first} and {path.name} are of one frame: keep one of them")
    names = {frame.name for frame in frames}
    unused = [path.name for path in unused_images(files, set(used))]
    lossy = f"; {list_examples(unused)} cannot hold ids: write PNG" if unused else ""
    for problem, unmatched, total, next_step in (
        ("frames have no prediction", names - found.keys(), names, "add them" + lossy),
        ("predictions have no ground truth", found.keys() - names, found, "add it, or remove them"),
    ):
        if unmatched:
            raise UserError(
                f"{folder}: {len(unmatched)} of {len(total)} {problem} "
                f"({list_examples(unmatched)}): {next_step}"
            )
    return found


class FrameResult(NamedTuple):
    """Counts of one frame at the size of the label file and at the network's input size.

    Both are None if labels are withheld; `network` is also None for predictions from disk.
    """

    name: str
    full: BenchmarkScores | None = None
    network: BenchmarkScores | None = None

    def to_json(self) -> dict[str, Any]:
        """Values for JSON, with the non-zero entries of the matrices."""
        entry: dict[str, Any] = {"name": self.name}
        for key in ("full", "network"):
            if counts := getattr(self, key):
                cells = np.argwhere(counts.matrix)
                entry[key] = np.column_stack((cells, counts.matrix[tuple(cells.T)])).tolist()
        if self.full and self.full.instances is not None:
            entry["instances"] = self.full.instances.tolist()
        return entry

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "FrameResult":
        counts = {key: BenchmarkScores(images=1) for key in ("full", "network") if key in entry}
        for key, scores in counts.items():
            for true_id, predicted_id, pixels in entry[key]:
                scores.matrix[true_id, predicted_id] = pixels
        if "instances" in entry:
            counts["full"].instances = np.array(entry["instances"], np.float64).reshape(-1, 4)
        return cls(entry["name"], **counts)


def total_scores(results: Iterable[BenchmarkScores | None]) -> BenchmarkScores:
    """Scores over all images that have counts."""
    total = BenchmarkScores()
    for counts in results:
        if counts is not None:
            total.add(counts)
    return total


def read_instances(path: Path) -> np.ndarray:
    """Read an `instanceIds` image, (H, W) int32.

    Raises:
        UserError: the file is unreadable, or holds a value that is not an instance id.
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
        frame: from `find_frames`, which also returns `scheme`.
        scheme: label scheme of the frame's label.
        prediction: (H, W) uint8 label ids.
        network_prediction: (h, w) uint8 label ids at the network's input size, to which the label
            is resized (nearest neighbour).

    Raises:
        UserError: a file is unreadable, has another size, or holds an unknown id.
    """
    if frame.label is None:
        return FrameResult(frame.name)
    truth = read_label(frame.label, scheme)
    instances = None if frame.instances is None else read_instances(frame.instances)
    for path, image in ((frame.label, truth), (frame.instances, instances)):
        if image is not None and image.shape != prediction.shape:
            sizes = ("{1}x{0}".format(*a.shape) for a in (image, prediction))
            raise UserError(
                "{} is {}, the prediction for it {}: predict at the size of the ground "
                "truth".format(path, *sizes)
            )
    full = count_image(prediction, truth, instances)
    if network_prediction is None:
        return FrameResult(frame.name, full)
    mask = tv_tensors.Mask(torch.from_numpy(truth))
    resized = v2.functional.resize(mask, list(network_prediction.shape)).numpy()
    return FrameResult(frame.name, full, count_image(network_prediction, resized))


def read_prediction(path: Path) -> np.ndarray:
    """Read a prediction of label ids, (H, W) uint8.

    Raises:
        UserError: see `read_ids`; or it has an id above 33, such as the void of trainIds.
    """
    ids = read_ids(path)
    if ids.max() < NUM_IDS:
        return ids
    value = int(ids[ids >= NUM_IDS][0])
    if value == IGNORE_INDEX and ids[ids != value].max(initial=0) <= len(EVALUATED_CLASSES):
        raise UserError(
            f"{path} holds {value}, the void of trainIds, and no id above "
            f"{len(EVALUATED_CLASSES)}: convert trainIds to labelIds, 0 to {NUM_IDS - 1}"
        )
    raise UserError(
        f"{path} holds the id {value}, which Cityscapes does not have: write labelIds, 0 to "
        f"{NUM_IDS - 1}"
    )


def require_label_ids(scores: BenchmarkScores, folder: str | os.PathLike) -> None:
    """Check that predictions are not in fact trainIds, which would be scored as other classes.

    Raises:
        UserError: no predicted id is above 19, and as trainIds they agree far better.
    """
    ids = cityscapes_label_ids()[: len(EVALUATED_CLASSES)]
    truth = scores.matrix[ids]
    total = truth.sum(axis=1)
    as_label_ids = truth[range(len(ids)), ids]
    as_train_ids = truth[range(len(ids)), range(len(ids))]
    shares = [float(hits.sum() / max(1, total.sum())) for hits in (as_label_ids, as_train_ids)]
    # A single class may be void (id 0) predicted for road, unless nothing else is there.
    several = (as_train_ids > 0).sum() >= min(2, int((total > 0).sum()))
    if not truth[:, len(ids) + 1 :].any() and several and shares[1] > 2 * shares[0] + 0.1:
        raise UserError(
            f"the predictions in {folder} agree with {shares[1]:.0%} of the labelled pixels if "
            f"read as trainIds, with {shares[0]:.0%} as labelIds: convert trainIds to labelIds, "
            f"0 to {NUM_IDS - 1}"
        )


def score_predictions(
    frames: Sequence[Frame], scheme: LabelScheme, files: Sequence[Path], workers: int = 2
) -> Iterator[FrameResult]:
    """Score one label-id PNG for each frame, reading with `workers` threads.

    Raises:
        UserError: see `score_frame`; names the file.
    """

    def job(frame: Frame, path: Path) -> FrameResult:
        prediction = read_prediction(path)
        try:
            return score_frame(frame, scheme, prediction)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    with ThreadPoolExecutor(workers) as pool:
        jobs = (partial(job, *pair) for pair in zip(frames, files, strict=True))
        yield from map_ordered(pool, jobs, 2 * workers)


def _read_images(frames: Sequence[Frame]) -> Tensor:
    """Batch of images, (N, 3, H, W) uint8."""
    images = [read_image(require_file(frame.image, "images")) for frame in frames]
    if len({image.shape for image in images}) > 1:
        raise UserError("the images of a batch differ in size: use --batch-size 1")
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])


def predict_frames(
    label_maps: LabelMapper,
    network_size: tuple[int, int],
    frames: Sequence[Frame],
    scheme: LabelScheme,
    folder: Path,
    batch_size: int = 1,
    workers: int = 2,
) -> Iterator[FrameResult]:
    """Predict every frame, write its label ids to `folder`, and score it if it has a label.

    Scores are computed at the image's size and at `network_size`, (height, width). The file is on
    disk before the result is returned. `workers` processes decode images, and as many threads
    write and score predictions.

    Raises:
        UserError: see `score_frame`; also if images of a batch differ in size.
    """
    label_ids = torch.from_numpy(cityscapes_label_ids())

    def finish(frame: Frame, full: np.ndarray, network: np.ndarray) -> FrameResult:
        result = score_frame(frame, scheme, full, network)
        write_label_map(folder / prediction_name(frame.name), full)
        return result

    def jobs() -> Iterator[Callable[[], FrameResult]]:
        # The frames are the data set; worker processes read images in `collate_fn`.
        loader: DataLoader = DataLoader(
            list(frames),  # type: ignore[arg-type]
            batch_size,
            num_workers=workers,
            collate_fn=_read_images,
        )
        queue = iter(frames)
        for images in loader:
            maps = label_maps(images, tuple(images.shape[-2:]), network_size)
            full, network = (label_ids[m.cpu().int()].numpy() for m in maps)
            for pair in zip(full, network, strict=True):
                yield partial(finish, next(queue), *pair)

    threads = max(1, workers)
    with ThreadPoolExecutor(threads) as pool:
        yield from map_ordered(pool, jobs(), 2 * threads)
