"""Inspection of image and label files: each is decoded once and reduced to a few kilobytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from lednet.data.image_io import (
    exif_transpose_op,
    match_orientation,
    open_header,
    read_ids,
    to_rgb,
    transposed_size,
)
from lednet.data.pairs import Sample, require_file
from lednet.errors import UserError
from lednet.progress import progress_bar
from lednet.validation.duplicates import THUMBNAIL

_SIZE = THUMBNAIL[::-1]  # (width, height), the order of PIL
_MAX_BLANK_RANGE = 3  # grey levels of a blank thumbnail, darkest to lightest
_MIN_JPEG_SIZE = (256, 192)  # JPEGs are decoded at the smallest scale that is not below this size


@dataclass
class FileInspection:
    """Properties of an image and its label.

    Attributes:
        problems: (key of `lednet.validation.issues.ISSUE_TYPES`, file, remark).
        image_size, label_size: (width, height) in pixels, of the image as training turns it; None
            if unreadable.
        image_mode, label_mode: PIL modes; "" if unreadable.
        histogram: (256,) int64, pixels of each label value.
        thumbnail: the image, (*THUMBNAIL) uint8 grey; None if unreadable.
        is_blank: whether the image has a single colour.
        regions: label values at the thumbnail's pixels, (*THUMBNAIL) uint8; None if unreadable.
    """

    problems: list[tuple[str, Path, str]] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    image_mode: str = ""
    label_size: tuple[int, int] | None = None
    label_mode: str = ""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    thumbnail: np.ndarray | None = None
    is_blank: bool = False
    regions: np.ndarray | None = None


def inspect_pair(pair: Sample) -> FileInspection:
    """Decode an image and its label. Unreadable files are recorded in `problems`, not raised."""
    result = FileInspection()
    # The size of the label decides whether the image is turned.
    for file, inspect in ((pair.label, _inspect_label), (pair.image, _inspect_image)):
        if file is None:
            continue
        try:
            inspect(result, file)
        except Exception as error:  # decoders raise any type on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            result.problems.append(("damaged", file, reason.replace(str(file), "it")))
    if result.label_size and result.image_size and result.label_size != result.image_size:
        remark = "{}x{}, the image {}x{}".format(*result.label_size, *result.image_size)
        result.problems.append(("size", require_file(pair.label, "labels"), remark))
    return result


def _inspect_image(result: FileInspection, file: Path) -> None:
    """Inspect an image, turned by its EXIF as `lednet.data.dataset.read_labeled_image` does."""
    with open_header(file) as image:
        size, mode = image.size, image.mode
        image.draft(None, _MIN_JPEG_SIZE)
        image.load()
        operation, fits_both = match_orientation(exif_transpose_op(image), size, result.label_size)
        if fits_both:
            result.problems.append(("turned", file, ""))
        readable: Image.Image = image
        if mode not in ("L", "RGB"):
            try:
                readable = Image.fromarray(to_rgb(image, upright=False))
            except UserError:
                result.problems.append(("image-mode", file, mode))
                return
        if operation is not None:
            readable, size = readable.transpose(operation), transposed_size(size, operation)
        grey = readable.resize(_SIZE, Image.Resampling.BOX).convert("L")
    result.image_size, result.image_mode, result.thumbnail = size, mode, np.array(grey)
    result.is_blank = bool(np.ptp(result.thumbnail) <= _MAX_BLANK_RANGE)
    if result.is_blank:
        result.problems.append(("blank", file, ""))


def _inspect_label(result: FileInspection, file: Path) -> None:
    with open_header(file) as label:
        try:
            ids = read_ids(file)
        except UserError as error:
            label.load()  # a damaged file raises here
            reason = str(error).replace(str(file), "it").removeprefix("it ")
            result.problems.append(("label-mode", file, reason))
        else:
            result.histogram = np.bincount(ids.ravel(), minlength=256)
            result.regions = np.array(Image.fromarray(ids).resize(_SIZE, Image.Resampling.NEAREST))
        result.label_size, result.label_mode = label.size, label.mode


def inspect_pairs(pairs: Sequence[Sample], workers: int) -> Iterator[FileInspection]:
    """Inspect pairs in order with `workers` decoding processes (0: this one). Shows a bar."""
    # Without batches, `collate_fn` is applied to each item in the worker process.
    loader: DataLoader = DataLoader(
        list(pairs),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        collate_fn=inspect_pair,  # type: ignore[arg-type]
    )
    yield from progress_bar(loader, total=len(pairs), desc="inspecting", unit="pair")
