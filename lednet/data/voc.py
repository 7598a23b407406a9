"""The Pascal VOC data set: where its images and labels are."""

import os
from pathlib import Path

from lednet.data.pairs import IMAGE_SUFFIXES, FileIndex, _by_name, _require_folder, list_examples
from lednet.errors import UserError


def voc_list(root: Path, split: str, annotations: str = "fine") -> Path:
    """The list of a Pascal VOC split. The augmented "train" has one of its own: "trainaug"."""
    name = "trainaug" if (split, annotations) == ("train", "aug") else split
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def list_voc(root: str | os.PathLike, split: str, annotations: str = "fine") -> FileIndex:
    """Files of a Pascal VOC tree that the list of a split names; others are expected there too.

    Args:
        root: folder that holds `JPEGImages`, `SegmentationClass` and `ImageSets`.
        split: "train", "val", "trainval", or "test", whose labels are withheld.
        annotations: "fine" or "aug", whose "train" is `trainaug` with the labels of
            `SegmentationClassAug`. All other splits are the same in both.

    Raises:
        UserError: the list or a folder is missing, it names nothing, or an image that is not
            there.
    """
    root = Path(root)
    path = voc_list(root, split, annotations)
    added = path.stem == "trainaug"
    next_step = "unpack VOCtrainval_11-May-2012.tar again, or name another folder with --datadir"
    if added:
        next_step = "add SBD's list and labels (datasets/README.md), or choose fine annotations"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {next_step}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): {next_step}") from error
    # Some copies of trainaug give the paths of image and label in place of a name.
    names = {Path(line.split()[0]).stem: None for line in lines if line.strip()}
    if not names:
        raise UserError(f"{path} names no images: {next_step}")
    image_folder = _require_folder(root / "JPEGImages", next_step)
    there = _by_name(p for p in image_folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    images = {name: there[name] for name in names if name in there}
    lost = names.keys() - images.keys()
    if lost:
        raise UserError(
            f"{path} names {len(lost)} images that are not in {image_folder} "
            f"({list_examples(lost)}): unpack the archive again"
        )
    if split == "test":
        return FileIndex(images, None, (), str(path))
    label_folder = root / ("SegmentationClassAug" if added else "SegmentationClass")
    _require_folder(label_folder, next_step)
    labels = {name: [label_folder / f"{name}.png"] for name in names}
    labels = {name: [label] for name, [label] in labels.items() if label.is_file()}
    return FileIndex(images, labels, (), str(path))
