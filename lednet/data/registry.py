"""The built-in data sets: location of their files, and the classes of their labels."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lednet.data.cityscapes import ground_truth, open_cityscapes
from lednet.data.dataset import SegmentationDataset
from lednet.data.folders import CLASS_FILES as CLASS_FILES, open_camvid, open_folders
from lednet.data.labels import LabelScheme
from lednet.data.pairs import FileIndex, Sample, SplitSpec, list_examples, pair_files
from lednet.data.voc import ade20k_folder, open_ade20k, open_voc, voc_list
from lednet.errors import UserError

logger = logging.getLogger(__name__)


class DatasetSpec(NamedTuple):
    """Layout of a data set on disk.

    Attributes:
        list: classes and files of a split.
        place: file or folder, of the data set's folder and a split, that exists if the split does.
        size: default (height, width) in pixels; None for that of the first image.
        annotations: kinds of annotations that it has.
    """

    list: Callable[[SplitSpec], tuple[LabelScheme, FileIndex]]
    place: Callable[[Path, str], Path]
    size: tuple[int, int] | None
    annotations: tuple[str, ...] = ("fine",)


# fmt: off
DATASETS = {
    "cityscapes": DatasetSpec(
        open_cityscapes, lambda root, split: root / "leftImg8bit" / split, (512, 1024),
        ("fine", "coarse"),
    ),
    "camvid": DatasetSpec(open_camvid, lambda root, split: root / split, (360, 480)),
    "voc": DatasetSpec(open_voc, voc_list, (512, 512), ("fine", "aug")),
    "ade20k": DatasetSpec(
        open_ade20k, lambda root, split: ade20k_folder(root, "images", split), (512, 512),
    ),
    "folders": DatasetSpec(open_folders, lambda root, split: root / "images" / split, None),
}
# fmt: on

DEFAULT_SIZES = {name: spec.size for name, spec in DATASETS.items() if spec.size}
"""(height, width) that the published numbers of each data set refer to; a square for those whose
images have many sizes."""

TRAINING_PARTS = {
    "fine": (("train", "fine"),),
    "coarse": (("train_extra", "coarse"), ("train", "coarse")),
    "both": (("train", "fine"), ("train_extra", "coarse")),
    "aug": (("train", "aug"),),
}
"""Splits to train on and the annotations of each. "coarse" and "both" are of Cityscapes, "aug" of
VOC."""


def list_split(
    name: str, root: str | os.PathLike, split: str, **options: Any
) -> tuple[LabelScheme, FileIndex]:
    """The classes of a data set, and the files of a split.

    Args:
        name, root, split: as for `open_dataset`; of own data without splits, `split` is "".
        options: other fields of `SplitSpec`.

    Raises:
        UserError: there is no such folder, image or kind of annotations, or see `read_class_file`.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {tuple(DATASETS)}, not {name!r}")
    spec, known = SplitSpec(Path(root), split, **options), DATASETS[name]
    if not spec.root.is_dir():
        raise UserError(f"no folder {root}: give the data set's folder with --datadir")
    if spec.annotations not in known.annotations:
        kinds = " or ".join(known.annotations)
        raise UserError(f"{name} has no {spec.annotations} annotations: choose {kinds}")
    return known.list(spec._replace(split="train") if spec.holds_out and split == "val" else spec)


def hold_out_split(
    pairs: list[Sample], split: str, val_stride: int, val_prefix: str | None, place: str
) -> list[Sample]:
    """The part of `pairs` that belongs to `split`; all, if nothing is held out of "train".

    Raises a `UserError` if both ways are chosen, or nothing is left.
    """
    if val_stride and val_prefix:
        raise UserError("--val-stride and --val-prefix each hold images out: give one of them")
    if not (val_stride or val_prefix) or split not in ("train", "val"):
        return pairs
    if val_stride:
        held_out = {*pairs[val_stride - 1 :: val_stride]}
    else:
        held_out = {pair for pair in pairs if _has_prefix(pair.image, val_prefix or "")}
    chosen = [pair for pair in pairs if (pair in held_out) == (split == "val")]
    if not chosen:
        flag = f"--val-stride {val_stride}" if val_stride else f"--val-prefix {val_prefix}"
        raise UserError(f"{place} {split} is empty after {flag}: hold out others")
    return chosen


def _has_prefix(path: Path, prefix: str) -> bool:
    """Whether the name, or the name with its folder ("rec1/0.png"), begins with `prefix`."""
    return path.name.startswith(prefix) or f"{path.parent.name}/{path.name}".startswith(prefix)


def open_dataset(
    name: str,
    root: str | os.PathLike,
    split: str,
    *,
    annotations: str = "fine",
    labels: str = "auto",
    class_file: str | os.PathLike | None = None,
    val_stride: int = 0,
    val_prefix: str | None = None,
) -> SegmentationDataset:
    """Open one split of a data set: its files are paired, but not read yet.

    Args:
        name: a key of `DATASETS`; "folders" is own data (`images` and `labels`, with or without a
            folder for each split inside, and a class file).
        root: the data set's folder.
        split: "train", "val", "test" or, for Cityscapes' coarse images, "train_extra".
        annotations: "fine" or, of Cityscapes, "coarse", of VOC, "aug".
        labels: "auto" (by the file names), "labelIds" or "labelTrainIds" (Cityscapes).
        class_file: classes of own data; default `classes.yaml` in `root`.
        val_stride: instead of a validation folder, hold out every n-th training image as
            "val"; 0 for data that has one.
        val_prefix: or those whose names begin with this.

    Raises:
        UserError: see `list_split`, `pair_files` and `hold_out_split`.
    """
    scheme, index = list_split(
        name, root, split, annotations=annotations, labels=labels, class_file=class_file,
        holds_out=bool(val_stride or val_prefix),
    )  # fmt: skip
    if index.unused:
        logger.warning(
            "%s: %d image files are not used, because of their format or name: %s",
            index.place, len(index.unused), list_examples(path.name for path in index.unused),
        )  # fmt: skip
    pairs = hold_out_split(pair_files(index), split, val_stride, val_prefix, str(root))
    return SegmentationDataset(pairs, scheme)


def cache_split(annotations: str) -> str:
    """Name of the training data's folder in a cache, which may hold several."""
    return "train" if annotations == "fine" else f"train_{annotations}"


def open_training_data(
    name: str,
    root: str | os.PathLike,
    height: int | None = None,
    width: int | None = None,
    *,
    annotations: str = "fine",
    with_val: bool = False,
    **options: Any,
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Open training and validation data at working size.

    Args:
        height, width: working size in pixels; default: that of `DEFAULT_SIZES`, or of own data's
            first image.
        annotations: a key of `TRAINING_PARTS`; validation data always have fine annotations.
        with_val: train on the validation data too, for a final model; its score on them does not
            measure generalization.
        options: `labels`, `class_file`, `val_stride` and `val_prefix` of `open_dataset`.

    Raises:
        UserError: see `open_dataset`; or the parts' labels have different encodings, or training
            and validation share images without `with_val`.
    """
    kinds = TRAINING_PARTS[annotations]
    parts = [open_dataset(name, root, split, annotations=kind, **options) for split, kind in kinds]
    scheme = parts[0].scheme
    if any(part.scheme != scheme for part in parts):
        folders = " and ".join(f"{ground_truth(kind)}/{split}" for split, kind in kinds)
        raise UserError(
            f"of {folders} in {root}, one holds labelIds and the other labelTrainIds: give both "
            "the same, or name what both hold with --labels"
        )
    val = open_dataset(name, root, "val", **options)
    shared = {p.image for part in parts for p in part.pairs} & {p.image for p in val.pairs}
    if shared and not with_val:
        raise UserError(
            f"{len(shared)} of {len(val)} validation images of {root} are among those trained on "
            f"({list_examples(path.name for path in shared)}): correct the lists, hold out by "
            "--val-prefix, or add --with-val"
        )
    parts += [val] * with_val
    train = SegmentationDataset([pair for part in parts for pair in part.pairs], scheme)
    default = DEFAULT_SIZES.get(name) or train.read(0)[0].shape[:2]
    train.size = val.size = (height or default[0], width or default[1])
    return train, val
