"""Data sets of images and label maps."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors

from lednet.data.image_io import (
    exif_transpose_op,
    match_orientation,
    open_image,
    read_ids,
    read_image,
    to_rgb,
    transposed_size,
    warn_once,
)
from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.data.pairs import Sample, list_examples, require_file
from lednet.data.transforms import resize_transform
from lednet.errors import UserError
from lednet.progress import progress_bar


def read_label(path: Path, scheme: LabelScheme) -> np.ndarray:
    """Decode a label file to class indices, (H, W) uint8; void is `IGNORE_INDEX`.

    Raises:
        UserError: see `lednet.data.image_io.read_ids`; or it has an id that is not in `scheme`.
    """
    ids = read_ids(path)
    label = scheme.lut[ids]
    if label.min() < 0:
        value = int(ids[label < 0][0])
        raise UserError(
            f"{path} holds the id {value}, which {scheme.name} does not have: correct the file, "
            "or declare what the labels hold (--labels, or the class file)"
        )
    return label.astype(np.uint8)


def read_labeled_image(pair: Sample, size: tuple[int, ...]) -> np.ndarray:
    """Decode an image whose label has `size` (height, width) to RGB, (H, W, 3) uint8.

    The EXIF orientation is applied, as in prediction, unless only the stored image has the size of
    the label. If both have it, because the image is square or turned by 180 degrees, the first
    such image of a process is logged.

    Raises:
        UserError: damaged, or of another size.
    """
    image = open_image(pair.image)
    height, width = size
    exif = exif_transpose_op(image)
    operation, fits_both = match_orientation(exif, image.size, (width, height))
    worker = get_worker_info()
    if fits_both and (worker is None or worker.id == 0):
        warn_once(
            "%s is turned by its EXIF orientation, and its label is assumed to be upright. This "
            "applies to all images whose size does not tell; if it is wrong, remove the EXIF data.",
            pair.image,
        )
    pixels = to_rgb(image, upright=operation is not None)
    if pixels.shape[:2] == size:
        return pixels
    upright = transposed_size(image.size, exif)
    turned = f" ({upright[0]}x{upright[1]} turned by its EXIF)" if exif is not None else ""
    raise UserError(
        f"{pair.label} is {width}x{height}, its image {pair.image.name} "
        f"{image.width}x{image.height}{turned}: both must have one size"
    )


class PairDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples read from one or two files each, for training and validation.

    Attributes:
        pairs: the files of each sample; a slice of it is a sequence too.
        scheme: classes of the label maps; image classification data sets have none.
    """

    pairs: Sequence[Sample]
    scheme: LabelScheme

    def __len__(self) -> int:
        return len(self.pairs)

    def count_label(self, index: int) -> np.ndarray:
        """Pixels of each class in a label map, (num_classes + 1,) int64, void last."""
        raise TypeError("images of classes have no label maps to count")

    def class_counts(self, workers: int = 4) -> np.ndarray:
        """`count_label` of all samples, (len, num_classes + 1) int64, in `workers` threads."""
        with ThreadPoolExecutor(workers) as pool:
            counts = pool.map(self.count_label, range(len(self)))
            bar = progress_bar(counts, total=len(self), desc="class shares", unit="label")
            return np.stack(list(bar))


class SegmentationDataset(PairDataset):
    """Images with their label maps: (uint8 (3, H, W), uint8 (H, W)).

    Args:
        pairs: image and label files; a pair without a label gets an all-void one.
        scheme: the classes and their values in label files.
        size: (height, width) in pixels to resize images and labels to; None keeps that of each
            file. Only samples of one size can be cached.
    """

    def __init__(
        self, pairs: Sequence[Sample], scheme: LabelScheme, size: tuple[int, int] | None = None
    ):
        self.pairs, self.scheme, self.size = list(pairs), scheme, size

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and class indices (H, W) of a sample, at the size of the files."""
        pair = self.pairs[index]
        if pair.label is None:
            image = read_image(pair.image, upright=True)
            return image, np.full(image.shape[:2], IGNORE_INDEX, dtype=np.uint8)
        label = read_label(pair.label, self.scheme)
        return read_labeled_image(pair, label.shape), label

    def prepare(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Convert the arrays of `read` to tensors of the working size, (3, H, W) and (H, W)."""
        pixels, classes = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)
        if self.size is None:
            return pixels, classes
        return resize_transform(self.size)(tv_tensors.Image(pixels), tv_tensors.Mask(classes))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.prepare(*self.read(index))

    def count_label(self, index: int) -> np.ndarray:
        """As `PairDataset.count_label`, at the size of the file."""
        file = require_file(self.pairs[index].label, "labels")
        return _count_classes(read_label(file, self.scheme), self.scheme)

    @property
    def encoded_shape(self) -> tuple[int, int, int]:
        """Shape of a sample in a cache: red, green, blue and the class index."""
        if self.size is None:
            raise ValueError("only samples of one size can be cached: give the data a size")
        return (4, *self.size)

    def cache_options(self) -> dict[str, Any]:
        return {
            "size": list(self.encoded_shape[1:]),
            "classes": list(self.scheme.classes),
            "label values": sorted(map(list, self.scheme.file_ids.items())),
        }

    def encode(self, index: int) -> tuple[Tensor, list[int]]:
        """A sample for a cache; its metadata are the pixels of each class as in `count_label`."""
        image, label = self.read(index)
        pixels, classes = self.prepare(image, label)
        return torch.cat((pixels, classes[None])), _count_classes(label, self.scheme).tolist()

    def decode(self, planes: Tensor, metadata: list[int]) -> tuple[Tensor, Tensor]:
        return planes[:3], planes[3]


class SkipCorruptDataset(PairDataset):
    """Training data in which a sample that cannot be read is replaced by the next one that can.

    Attributes:
        damaged: (len,) bool, in shared memory: samples that were replaced so far, or whose label
            could not be counted.
    """

    def __init__(self, data: PairDataset):
        self.data, self.pairs = data, data.pairs
        if hasattr(data, "scheme"):
            self.scheme = data.scheme
        self.damaged = torch.zeros(len(data), dtype=torch.bool).share_memory_()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        for step in range(len(self)):
            other = (index + step) % len(self)
            try:
                return self.data[other]
            except UserError as error:
                self.damaged[other] = True
                last = error
        raise last

    def count_label(self, index: int) -> np.ndarray:
        """Pixels of each class; zeros if the label cannot be read."""
        try:
            return self.data.count_label(index)
        except UserError:
            self.damaged[index] = True
            return np.zeros(self.scheme.num_classes + 1, dtype=np.int64)

    def class_counts(self, workers: int = 4) -> np.ndarray:
        """`count_label` of all samples; raises a `UserError` if no label can be read."""
        counts = super().class_counts(workers)
        if not counts.any():
            self.data.count_label(0)
        return counts


def _count_classes(label: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    counts = np.bincount(label.ravel(), minlength=256)
    return np.append(counts[: scheme.num_classes], counts[IGNORE_INDEX])


def pixel_shares(class_counts: np.ndarray) -> np.ndarray:
    """Share of each class of all pixels, (num_classes + 1,) float64 of sum 1, void last.

    Args:
        class_counts: (len, num_classes + 1), of `SegmentationDataset.class_counts`.
    """
    total = class_counts.sum(axis=0)
    return total / total.sum()


def require_common_class(train: PairDataset, val: PairDataset) -> None:
    """Read labels until a class is found in both data sets, usually the first two.

    Raises:
        UserError: there is no such class, so that nothing can be learned or scored.
    """
    parts = {"training": (train, set[int]()), "validation": (val, set[int]())}
    for index in range(max(len(train), len(val))):
        for data, found in parts.values():
            if index < len(data):
                found.update(np.flatnonzero(data.count_label(index)[:-1]).tolist())
        if parts["training"][1] & parts["validation"][1]:
            return
    for name, (data, found) in parts.items():
        if not found:
            if isinstance(data, SkipCorruptDataset):
                data.data.count_label(0)  # raises if the labels are damaged
            raise UserError(
                f"the {name} labels of {data.scheme.name} ({len(data)} files) hold void only: "
                "check the label files, and the ids of the class file"
            )
    lists = (
        f"{name} labels hold {list_examples(data.scheme.classes[i] for i in sorted(found))}"
        for name, (data, found) in parts.items()
    )
    raise UserError(
        f"{' and '.join(lists)}, and no class in common: choose other validation images"
    )
