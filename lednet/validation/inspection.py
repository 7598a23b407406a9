"""One look at each pair of files: everything that is to be known of them, in little memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lednet.data.image_io import exif_transpose_op, open_header, to_rgb
from lednet.data.pairs import Sample, require_file
from lednet.errors import UserError
from lednet.validation.duplicates import THUMBNAIL

Item = TypeVar("Item")

LABEL_MODES = ("L", "P")

_SIZE = THUMBNAIL[::-1]  # (width, height), as PIL has it
_JPEG_SIZE = (256, 192)
"""A JPEG is decoded at the smallest fraction of its size that is not below this."""


@dataclass
class FileInspection:
    """What was seen of a pair.

    Attributes:
        problems: (kind of `lednet.validation.issues.OUTPUTS`, file, remark).
        image_size, label_size: (width, height) in pixels, None where it cannot be read.
        image_mode, label_mode: as PIL names them.
        ids: pixels of each value of the label.
        thumbnail: the image, (*THUMBNAIL) uint8 grey.
        regions: values of the label at the thumbnail's pixels, (*THUMBNAIL) uint8.
    """

    problems: list[tuple[str, Path, str]] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    image_mode: str = ""
    label_size: tuple[int, int] | None = None
    label_mode: str = ""
    ids: dict[int, int] = field(default_factory=dict)
    thumbnail: np.ndarray | None = None
    regions: np.ndarray | None = None


def inspect_pair(pair: Sample) -> FileInspection:
    """Decode image and label once each; whatever their bytes are, this returns."""
    look = FileInspection()
    for file, see in ((pair.image, _see_image), (pair.label, _see_label)):
        if file is None:
            continue
        try:
            see(look, file)
        except Exception as error:  # parsers of many kinds, on bytes of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            look.problems.append(("damaged", file, reason.replace(str(file), "it")))
    if look.label_size and look.image_size and look.label_size != look.image_size:
        remark = "{}x{}, the image {}x{}".format(*look.label_size, *look.image_size)
        look.problems.append(("size", require_file(pair.label, "labels"), remark))
    return look


def _see_image(look: FileInspection, file: Path) -> None:
    with open_header(file) as image:
        size, mode = image.size, image.mode
        image.draft(None, _JPEG_SIZE)
        image.load()
        if exif_transpose_op(image):
            look.problems.append(("turned", file, ""))
        plain: Image.Image = image
        if mode not in ("L", "RGB"):
            try:
                plain = Image.fromarray(to_rgb(image, upright=False))
            except UserError:
                look.problems.append(("image-mode", file, mode))
                return
        grey = plain.resize(_SIZE, Image.Resampling.BOX).convert("L")
    look.image_size, look.image_mode, look.thumbnail = size, mode, np.array(grey)


def _see_label(look: FileInspection, file: Path) -> None:
    with open_header(file) as label:
        label.load()
        look.label_size, look.label_mode = label.size, label.mode
        if label.mode not in LABEL_MODES:
            look.problems.append(("label-mode", file, label.mode))
            return
        look.ids = {value: count for value, count in enumerate(label.histogram()) if count}
        look.regions = np.array(label.resize(_SIZE, Image.Resampling.NEAREST))


class _Inspections(Dataset):
    def __init__(self, pairs: Sequence[Sample]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> FileInspection:
        return inspect_pair(self.pairs[index])


def _identity(sample: Item) -> Item:
    return sample


def inspect_pairs(pairs: Sequence[Sample], workers: int) -> Iterator[FileInspection]:
    """A look at each pair, in order; shows a progress bar.

    Args:
        workers: decoding processes, each a few pairs ahead; 0 decodes in this one.
    """
    loader = DataLoader(
        _Inspections(pairs), batch_size=None, num_workers=workers, collate_fn=_identity
    )
    yield from tqdm(loader, "looking", len(pairs), unit="pair", dynamic_ncols=True)
