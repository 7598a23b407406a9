"""Images in one folder for each class, ImageNet's layout: `train/<class>/<name>.jpg`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from lednet.data.dataset import PairDataset
from lednet.data.image_io import open_image, to_rgb
from lednet.data.pairs import Sample, list_examples
from lednet.errors import UserError
from lednet.files import IMAGE_SUFFIXES, is_skipped


class ImageFolderDataset(PairDataset):
    """Images and their classes: (uint8 (3, size, size), int64 (3,)).

    The whole image is resized to a square, so that it can be cached, and crops are taken later.
    The target is the class index, and the width and height of the original after EXIF rotation.

    Args:
        folder: folder of the split; holds a folder for each class.
        size: height and width of the square in pixels.
        classes: classes of the training split, which must be the same (default: the names of the
            folders, sorted).

    Attributes:
        classes: class names; a class's index here is its training target.
        pairs: image files without labels, by class and name.

    Raises:
        UserError: no such folder, no classes in it or others than `classes`, or a class without
            images.
    """

    pairs: "ImageFiles"

    def __init__(
        self, folder: str | os.PathLike, size: int = 256, classes: Sequence[str] | None = None
    ):
        folder, self.size = Path(folder), size
        found = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
        if not found:
            raise UserError(
                f"{folder} holds no folders: there must be one of images for each class, see "
                "datasets/README.md"
            )
        self.classes = tuple(found if classes is None else classes)
        if other := sorted({*found} ^ {*self.classes}):
            verb = "has" if other[0] in found else "lacks"
            raise UserError(
                f"{folder} {verb} the class {other[0]}, unlike the training images: both must "
                "have the same class folders"
            )
        names = {name: _image_names(folder / name) for name in self.classes}
        if empty := [name for name, images in names.items() if not images]:
            raise UserError(
                f"{len(empty)} of the {len(found)} class folders in {folder} hold no images "
                f"({list_examples(empty)}): add some ({', '.join(IMAGE_SUFFIXES)}) or remove them"
            )
        self.pairs = ImageFiles(folder, self.classes, list(names.values()))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.decode(*self.encode(index))

    @property
    def encoded_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def cache_options(self) -> dict[str, Any]:
        return {"size": [self.size, self.size], "classes": list(self.classes)}

    def encode(self, index: int) -> tuple[Tensor, list[int]]:
        image = to_rgb(open_image(self.pairs[index].image))
        height, width = image.shape[:2]
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        square = v2.functional.resize(pixels, [self.size, self.size], antialias=True)
        return square.contiguous(), [int(self.pairs.targets[index]), width, height]

    def decode(self, planes: Tensor, metadata: list[int]) -> tuple[Tensor, Tensor]:
        return planes, torch.tensor(metadata)


class ImageFiles(Sequence[Sample]):
    """Image files as samples without labels, created on access.

    A list of them would take a gigabyte for ImageNet, and as much again in each worker process,
    since reference counting copies shared memory.

    Attributes:
        targets: (len,) int64, the class index of each file.
    """

    def __init__(self, folder: Path, classes: Sequence[str], names: Sequence[Sequence[str]]):
        self.folder, self.classes = folder, classes
        self.targets = np.repeat(np.arange(len(classes)), [len(files) for files in names])
        self._names = np.array([os.fsencode(name) for files in names for name in files])

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        name = os.fsdecode(self._names[index])
        return Sample(self.folder.joinpath(self.classes[self.targets[index]], name), None)


def _entries(folder: Path) -> list[os.DirEntry]:
    """Entries that are not hidden. Only the folder itself is read: it may have many files."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_skipped(entry.name)]
    except OSError as error:
        raise UserError(
            f"no folder {folder} to read ({error.strerror}): give with --datadir the one above"
        ) from error


def _image_names(folder: Path) -> list[str]:
    entries = (
        e for e in _entries(folder) if e.name.lower().endswith(IMAGE_SUFFIXES) and e.is_file()
    )
    return sorted(entry.name for entry in entries)
