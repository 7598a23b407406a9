"""The data sets Pascal VOC and ADE20K: location of their images and labels."""

import os
from pathlib import Path, PureWindowsPath

from lednet.data.folders import CLASS_FILES, list_folders, read_class_file
from lednet.data.labels import LabelScheme
from lednet.data.pairs import FileIndex, SplitSpec, list_examples, name_files
from lednet.errors import UserError
from lednet.files import LABEL_SUFFIXES, read_text


def _root_of(root: Path, subfolders: tuple[str, ...], content: str, archive: str) -> Path:
    """The one of `root` and its subfolders, as the archive unpacks, that holds `content`."""
    found = [folder for name in ("", *subfolders) if ((folder := root / name) / content).is_dir()]
    if not found:
        raise UserError(
            f"no {content} in {root} or its {' or '.join(subfolders)}: unpack {archive} there, or "
            "specify another folder with --datadir"
        )
    if len(found) > 1:
        raise UserError(f"both {found[0]} and {found[1]} hold {content}: choose one by --datadir")
    return found[0]


def voc_list(root: Path, split: str) -> Path:
    """The file that lists the images of a Pascal VOC split."""
    subfolders, lists = ("VOC2012", "VOCdevkit/VOC2012"), "ImageSets/Segmentation"
    return _root_of(root, subfolders, lists, "VOCtrainval_11-May-2012.tar") / lists / f"{split}.txt"


def list_voc(root: str | os.PathLike, split: str, annotations: str = "fine") -> FileIndex:
    """List the files of a Pascal VOC split, as named in `ImageSets/Segmentation`.

    Args:
        root: folder of the data set.
        split: "train", "val", "trainval", or "test", whose labels are withheld.
        annotations: "fine" or "aug", whose "train" is `trainaug` with the labels of
            `SegmentationClassAug`. All other splits are the same in both.

    Raises:
        UserError: the list, a folder or an image is missing, or the list is empty.
    """
    augmented = (split, annotations) == ("train", "aug")
    path = voc_list(Path(root), "trainaug" if augmented else split)
    root = path.parents[2]
    next_step = "unpack VOCtrainval_11-May-2012.tar again, or specify another folder with --datadir"
    if augmented:
        next_step = "add SBD's list and labels (datasets/README.md), or choose fine annotations"
    if not path.is_file():
        raise UserError(f"no file {path}: {next_step}")
    lines = read_text(path).splitlines()
    # Some copies of trainaug have the paths of image and label instead of a name.
    names = {PureWindowsPath(line.split()[0]).stem: None for line in lines if line.strip()}
    if not names:
        raise UserError(f"{path} names no images: {next_step}")
    found = name_files(root / "JPEGImages", next_step).names
    images = {name: found[name] for name in names if name in found}
    if missing := names.keys() - images.keys():
        raise UserError(
            f"{path} names {len(missing)} images that are not in {root / 'JPEGImages'} "
            f"({list_examples(missing)}): unpack the archive again"
        )
    labels = None
    if split != "test":
        folder = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
        found = name_files(folder, next_step, suffixes=LABEL_SUFFIXES).names
        labels = {name: found[name] for name in names if name in found}
    return FileIndex(images, labels, [], str(path))


def open_voc(spec: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    scheme = read_class_file(CLASS_FILES / "VOC.yaml")
    return scheme, list_voc(spec.root, spec.split, spec.annotations)


def ade20k_folder(root: Path, kind: str, split: str) -> Path:
    """Folder of a split's "images" or "annotations"."""
    root = _root_of(root, ("ADEChallengeData2016",), "images", "ADEChallengeData2016.zip")
    return root / kind / {"train": "training", "val": "validation"}.get(split, split)


def open_ade20k(spec: SplitSpec) -> tuple[LabelScheme, FileIndex]:
    folders = (ade20k_folder(spec.root, kind, spec.split) for kind in ("images", "annotations"))
    return read_class_file(CLASS_FILES / "ADE20K.yaml"), list_folders(*folders)
