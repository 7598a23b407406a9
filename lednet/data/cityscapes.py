"""The Cityscapes data set: where its images and labels are."""

import os
from pathlib import Path

from lednet.data.pairs import (
    FileIndex,
    Sample,
    _by_name,
    _images_below,
    _one_each,
    _refuse_empty,
    _require_folder,
    pair_files,
)
from lednet.errors import UserError

CITYSCAPES_ENCODINGS = ("labelIds", "labelTrainIds")


CITYSCAPES_ARCHIVES = {
    "leftImg8bit": "leftImg8bit_trainvaltest.zip",
    "leftImg8bit/train_extra": "leftImg8bit_trainextra.zip",
    "gtFine": "gtFine_trainvaltest.zip",
    "gtCoarse": "gtCoarse.zip",
}
"""Which download a folder comes from."""


def ground_truth(annotations: str) -> str:
    """What Cityscapes calls "fine" or "coarse" annotations in folders and file names."""
    return f"gt{annotations.capitalize()}"


def archive_of(kind: str, split: str) -> str:
    """The download that a folder of Cityscapes comes from."""
    return CITYSCAPES_ARCHIVES.get(f"{kind}/{split}", CITYSCAPES_ARCHIVES[kind])


def _cityscapes_folder(root: str | os.PathLike, kind: str, split: str) -> Path:
    """Folder of a split's images ("leftImg8bit") or labels ("gtFine", "gtCoarse")."""
    folder = f"{kind}/{split}"
    archive = archive_of(kind, split)
    next_step = f"unpack {archive} into {root}, or name another folder with --datadir"
    if folder == "gtFine/train_extra":
        next_step = "choose coarse annotations, train_extra has no others"
    return _require_folder(Path(root, folder), next_step)


def detect_cityscapes_encoding(root: Path, split: str, annotations: str) -> str:
    """Tell from the file names whether a split's labels are labelIds or labelTrainIds.

    Where both kinds lie side by side, as after the official preparation script, it is
    labelIds, from which the others were made.

    Raises:
        UserError: neither is there.
    """
    kind = ground_truth(annotations)
    folder = _cityscapes_folder(root, kind, split)
    for encoding in CITYSCAPES_ENCODINGS:
        if any(folder.rglob(f"*_{kind}_{encoding}.png")):
            return encoding
    raise UserError(
        f"{folder} holds neither *_{kind}_labelIds.png nor *_{kind}_labelTrainIds.png: "
        "unpack the annotations there"
    )


def cityscapes_labels(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> dict[str, Path]:
    """Label files of a Cityscapes split by the name of their frame (`<city>_<seq>_<frame>`).

    Args and errors as `cityscapes_pairs`; images need not be there.
    """
    return _one_each(_list_cityscapes_labels(root, split, annotations, encoding), "labels")


def _list_cityscapes_labels(
    root: str | os.PathLike, split: str, annotations: str, encoding: str
) -> dict[str, list[Path]]:
    kind = ground_truth(annotations)
    folder = _cityscapes_folder(root, kind, split)
    ending = f"_{kind}_{encoding}"
    return _by_name(folder.rglob(f"*{ending}.png"), ending)


def list_cityscapes(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> FileIndex:
    """Files of a tree in the official Cityscapes layout.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine` or `gtCoarse`.
        split: "train", "val", "test", or "train_extra" (coarse only). Labels of "test"
            are withheld by the benchmark: its pairs have none.
        annotations: "fine" or "coarse".
        encoding: "labelIds" or "labelTrainIds".

    Raises:
        UserError: a folder is missing, or holds no images.
    """
    root = Path(root)
    image_folder = _cityscapes_folder(root, "leftImg8bit", split)
    ending = "_leftImg8bit"
    images = _by_name(_images_below(image_folder, ending), ending)
    _refuse_empty(images, image_folder)
    labels = None
    if split != "test":
        labels = _list_cityscapes_labels(root, split, annotations, encoding)
    return FileIndex(images, labels, (image_folder,), f"{root} {split}")


def cityscapes_pairs(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> list[Sample]:
    """Pairs of a tree in the official Cityscapes layout, sorted by name.

    Args as of `list_cityscapes`.

    Raises:
        UserError: as `list_cityscapes` and `pair_files`.
    """
    return pair_files(list_cityscapes(root, split, annotations, encoding))
