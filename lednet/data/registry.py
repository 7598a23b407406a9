"""The data sets that are built in: where their files lie, and what the values of labels mean."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lednet.data.cityscapes import detect_cityscapes_encoding, ground_truth, list_cityscapes
from lednet.data.dataset import SegmentationDataset
from lednet.data.folders import list_folders, read_class_file
from lednet.data.labels import LabelScheme, camvid_scheme, cityscapes_scheme
from lednet.data.pairs import FileIndex, Sample, list_examples, pair_files, split_holdout
from lednet.data.voc import list_voc, voc_list
from lednet.errors import UserError

CLASS_FILES = Path(__file__).parent / "classes"
"""Of data sets whose classes are published as tables."""


class SplitSpec(NamedTuple):
    """Which files are asked for; the fields are the arguments of `list_split`."""

    root: Path
    split: str
    annotations: str
    labels: str
    class_file: str | os.PathLike | None
    holds_out: bool


def _cityscapes(query: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    root, split, annotations, labels, *_ = query
    if labels == "auto":
        labels = (
            "labelIds"  # unused: there are none to read
            if split == "test"
            else detect_cityscapes_encoding(root, split, annotations)
        )
    return cityscapes_scheme(labels), list_cityscapes(root, split, annotations, labels)


def _camvid(query: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    root, split = query.root, query.split
    return camvid_scheme(), list_folders(root / split, root / f"{split}annot")


def _folders(query: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    root, split = query.root, query.split
    scheme = read_class_file(query.class_file or root / "classes.yaml")
    inside = split if (root / "images" / split).is_dir() or not query.holds_out else ""
    return scheme, list_folders(root / "images" / inside, root / "labels" / inside)


def _root_of(root: Path, inner: Sequence[str], sign: str, archive: str) -> Path:
    """The folder that holds `sign`: `root`, or one of those inside as the archive unpacks.

    Raises:
        UserError: none does, or several do.
    """
    found = [folder for name in ("", *inner) if ((folder := root / name) / sign).is_dir()]
    if not found:
        raise UserError(
            f"no {sign} in {root} or its {' or '.join(inner)}: unpack {archive} there, or name "
            "another folder with --datadir"
        )
    if len(found) > 1:
        raise UserError(
            f"both {found[0]} and {found[1]} hold {sign}: name the one to take with --datadir"
        )
    return found[0]


def _voc_root(root: Path) -> Path:
    inner = ("VOC2012", "VOCdevkit/VOC2012")
    return _root_of(root, inner, "ImageSets/Segmentation", "VOCtrainval_11-May-2012.tar")


def _voc(query: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    listing = list_voc(_voc_root(query.root), query.split, query.annotations)
    return read_class_file(CLASS_FILES / "VOC.yaml"), listing


def _ade20k_folder(root: Path, kind: str, split: str) -> Path:
    """Of a split's "images" or "annotations"."""
    root = _root_of(root, ("ADEChallengeData2016",), "images", "ADEChallengeData2016.zip")
    return root / kind / {"train": "training", "val": "validation"}.get(split, split)


def _ade20k(query: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    images, labels = (
        _ade20k_folder(query.root, kind, query.split) for kind in ("images", "annotations")
    )
    return read_class_file(CLASS_FILES / "ADE20K.yaml"), list_folders(images, labels)


class DatasetSpec(NamedTuple):
    """How a data set lies on disk.

    Attributes:
        list: class scheme and files of a split.
        place: of the data set's folder and a split, what is there where the split is.
        size: (height, width) in pixels that it is brought to if nothing else is said; None for
            that of the first image.
        annotations: kinds that it has.
    """

    list: Callable[[SplitSpec], tuple[LabelScheme, FileIndex]]
    place: Callable[[Path, str], Path]
    size: tuple[int, int] | None
    annotations: tuple[str, ...] = ("fine",)


# fmt: off
DATASETS = {
    "cityscapes": DatasetSpec(
        _cityscapes, lambda root, split: root / "leftImg8bit" / split, (512, 1024),
        ("fine", "coarse"),
    ),
    "camvid": DatasetSpec(_camvid, lambda root, split: root / split, (360, 480)),
    "voc": DatasetSpec(
        _voc, lambda root, split: voc_list(_voc_root(root), split), (512, 512), ("fine", "aug"),
    ),
    "ade20k": DatasetSpec(
        _ade20k, lambda root, split: _ade20k_folder(root, "images", split), (512, 512),
    ),
    "folders": DatasetSpec(_folders, lambda root, split: root / "images" / split, None),
}
# fmt: on

DEFAULT_SIZES = {name: layout.size for name, layout in DATASETS.items() if layout.size}
"""(height, width) that the published numbers of each data set refer to; of those whose images
come in many sizes, upright and lying, the square that others train on."""


def list_split(
    name: str,
    root: str | os.PathLike,
    split: str,
    *,
    annotations: str = "fine",
    labels: str = "auto",
    class_file: str | os.PathLike | None = None,
    holds_out: bool = False,
) -> tuple[LabelScheme, FileIndex]:
    """Which files make up a split, and what the values of their labels mean.

    Args:
        holds_out: "val" is to be held out of "train", which need then not have a folder of
            its own.
        The others as of `lednet.data.registry.open_dataset`; of own data without splits, `split`
        is "".

    Raises:
        UserError: see `lednet.data.pairs` and `read_class_file`.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {tuple(DATASETS)}, not {name!r}")
    root, layout = Path(root), DATASETS[name]
    if not root.is_dir():
        raise UserError(f"no folder {root}: give the data set's folder with --datadir")
    if annotations not in layout.annotations:
        there = " or ".join(layout.annotations)
        raise UserError(f"{name} has no {annotations} annotations: choose {there}")
    split = "train" if holds_out and split == "val" else split
    return layout.list(SplitSpec(root, split, annotations, labels, class_file, holds_out))


def hold_out_split(
    pairs: list[Sample], split: str, val_stride: int, val_prefix: str | None, place: str
) -> list[Sample]:
    """What of the pairs belongs to "train" or "val"; all, where nothing is held out.

    Raises:
        UserError: both ways are chosen, or nothing is left.
    """
    if val_stride and val_prefix:
        raise UserError("--val-stride and --val-prefix each hold images out: give one of them")
    if not (val_stride or val_prefix) or split not in ("train", "val"):
        return pairs
    pairs = split_holdout(pairs, split == "val", val_stride, val_prefix or "")
    if not pairs:
        flag = f"--val-stride {val_stride}" if val_stride else f"--val-prefix {val_prefix}"
        raise UserError(f"{place} {split} is empty after {flag}: hold out others")
    return pairs


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
    """Open one split of a data set, its files paired and none of them read yet.

    Args:
        name: a key of `lednet.data.registry.DATASETS`; "folders" is own data (`images` and
            `labels`, with or without a folder for each split inside, and a class file).
        root: the data set's folder.
        split: "train", "val", "test" or, for Cityscapes' coarse images, "train_extra".
        annotations: "fine" or, of Cityscapes, "coarse", of VOC, "aug".
        labels: "auto" (by the file names), "labelIds" or "labelTrainIds" (Cityscapes).
        class_file: classes of own data; default `classes.yaml` in `root`.
        val_stride: instead of a validation folder, hold out every n-th training image as
            "val"; 0 for data that has one.
        val_prefix: or those whose names begin so.

    Raises:
        UserError: see `list_split`, `lednet.data.pairs.pair_files` and `hold_out_split`.
    """
    scheme, listing = list_split(
        name, root, split, annotations=annotations, labels=labels, class_file=class_file,
        holds_out=bool(val_stride or val_prefix),
    )  # fmt: skip
    pairs = hold_out_split(pair_files(listing), split, val_stride, val_prefix, str(root))
    return SegmentationDataset(pairs, scheme)


TRAINING_PARTS = {
    "fine": (("train", "fine"),),
    "coarse": (("train_extra", "coarse"), ("train", "coarse")),
    "both": (("train", "fine"), ("train_extra", "coarse")),
    "aug": (("train", "aug"),),
}
"""What is trained on: splits and the annotations of each. "coarse" and "both" are of Cityscapes,
"aug" of VOC."""


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
    """What training reads: training data and validation data, at working size.

    Args:
        height, width: of the working size in pixels; by default that of `DEFAULT_SIZES`, or of
            own data's first image.
        annotations: a key of `TRAINING_PARTS`; those of the validation data are always fine.
        with_val: train on the validation data too, for a final model; its score on them is then
            none of a generalisation.
        options: `labels`, `class_file`, `val_stride` and `val_prefix` of `open_dataset`.

    Raises:
        UserError: see `open_dataset`; or the parts' labels are of different kinds, or training
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
            f"({list_examples(path.name for path in shared)}): mend the lists, or hold out by "
            "--val-prefix, or add --with-val"
        )
    parts += [val] * with_val
    train = SegmentationDataset([pair for part in parts for pair in part.pairs], scheme)
    default = DEFAULT_SIZES.get(name) or train.read(0)[0].shape[:2]
    train.size = val.size = (height or default[0], width or default[1])
    return train, val
