"""The Cityscapes data set: location of its images and labels."""

import os
from pathlib import Path

from lednet.data.labels import LabelScheme, cityscapes_scheme
from lednet.data.pairs import (
    FileIndex,
    NamedFiles,
    Sample,
    SplitSpec,
    name_files,
    pair_files,
    require_unique,
)
from lednet.errors import UserError
from lednet.files import IMAGE_SUFFIXES, LABEL_SUFFIXES

CITYSCAPES_ARCHIVES = {
    "leftImg8bit": "leftImg8bit_trainvaltest.zip",
    "leftImg8bit/train_extra": "leftImg8bit_trainextra.zip",
    "gtFine": "gtFine_trainvaltest.zip",
    "gtCoarse": "gtCoarse.zip",
}
"""The download that each folder comes from."""


def ground_truth(annotations: str) -> str:
    """The Cityscapes name of "fine" or "coarse" annotations in folders and file names."""
    return f"gt{annotations.capitalize()}"


def archive_of(kind: str, split: str) -> str:
    """The download that the folder `kind`/`split` comes from."""
    return CITYSCAPES_ARCHIVES.get(f"{kind}/{split}", CITYSCAPES_ARCHIVES[kind])


def _find(root: str | os.PathLike, kind: str, split: str, ending: str) -> NamedFiles:
    """Files of a split by frame (`<city>_<sequence>_<frame>`), in leftImg8bit, gtFine, gtCoarse."""
    next_step = f"unpack {archive_of(kind, split)} into {root}, or specify another --datadir"
    if (kind, split) == ("gtFine", "train_extra"):
        next_step = "choose coarse annotations, train_extra has no others"
    suffixes = IMAGE_SUFFIXES if kind == "leftImg8bit" else LABEL_SUFFIXES
    return name_files(Path(root, kind, split), next_step, f"_{kind}{ending}", suffixes)


def detect_cityscapes_encoding(root: Path, split: str, annotations: str) -> str:
    """Detect from the file names whether labels are labelIds, which come first, or labelTrainIds.

    Raises a `UserError` if there are neither.
    """
    kind = ground_truth(annotations)
    for encoding in ("labelIds", "labelTrainIds"):
        if _find(root, kind, split, f"_{encoding}").names:
            return encoding
    raise UserError(
        f"{Path(root, kind, split)} holds neither *_{kind}_labelIds.png nor "
        f"*_{kind}_labelTrainIds.png: unpack the annotations there"
    )


def cityscapes_labels(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> dict[str, Path]:
    """Label files of a split by frame, as in `list_cityscapes`; images may be missing."""
    files = _find(root, ground_truth(annotations), split, f"_{encoding}")
    return require_unique(files.names, "labels")


def list_cityscapes(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> FileIndex:
    """List the files of a tree in the official Cityscapes layout.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine` or `gtCoarse`.
        split: "train", "val", "test", or "train_extra" (coarse only). The labels of "test" are
            withheld by the benchmark.
        annotations: "fine" or "coarse".
        encoding: "labelIds" or "labelTrainIds".

    Raises:
        UserError: a folder is missing, or holds no images.
    """
    images = _find(root, "leftImg8bit", split, "")
    labels = None
    if split != "test":
        labels = _find(root, ground_truth(annotations), split, f"_{encoding}").names
    return FileIndex(images.names, labels, images.unused, f"{root} {split}")


def cityscapes_pairs(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> list[Sample]:
    """The samples of a split, sorted by name; arguments and errors as for `list_cityscapes`."""
    return pair_files(list_cityscapes(root, split, annotations, encoding))


def open_cityscapes(spec: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    root, split, annotations, encoding, *_ = spec
    if encoding == "auto":  # there are no labels of test
        known = split == "test"
        encoding = "labelIds" if known else detect_cityscapes_encoding(root, split, annotations)
    return cityscapes_scheme(encoding), list_cityscapes(root, split, annotations, encoding)
