"""Which label file belongs to which image: pairs are made by name, never by order."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lednet.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CITYSCAPES_ENCODINGS = ("labelIds", "labelTrainIds")
CITYSCAPES_ARCHIVES = {
    "leftImg8bit": "leftImg8bit_trainvaltest.zip",
    "leftImg8bit/train_extra": "leftImg8bit_trainextra.zip",
    "gtFine": "gtFine_trainvaltest.zip",
    "gtCoarse": "gtCoarse.zip",
}
"""Which download a folder comes from."""


class Pair(NamedTuple):
    """An image file and its label file; `label` is None where labels are withheld."""

    image: Path
    label: Path | None


def present(file: Path | None, what: str) -> Path:
    """The file, where a split must have it.

    Args:
        what: such files, for the message.

    Raises:
        UserError: there is none.
    """
    if file is None:
        raise UserError(f"there are no {what}, which are needed here: choose another split")
    return file


def _require_folder(folder: Path, next_step: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {next_step}")
    return folder


def list_examples(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class Listing(NamedTuple):
    """The files of a split by the name that pairs them, not paired yet.

    Attributes:
        images, labels: files of each name, of which there should be one; `labels` is None
            where they are withheld.
        folders: in which nothing else is expected.
        place: of the split, for messages.
    """

    images: dict[str, list[Path]]
    labels: dict[str, list[Path]] | None
    folders: tuple[Path, ...]
    place: str

    def overlooked(self) -> list[Path]:
        """Pictures in `folders` whose format or name is not taken."""
        taken = {path for paths in self.images.values() for path in paths}
        taken.update(path for paths in (self.labels or {}).values() for path in paths)
        formats = Image.registered_extensions()
        return [
            path
            for folder in self.folders
            for path in sorted(folder.rglob("*.*"))
            if path.suffix.lower() in formats
            and path not in taken
            and not path.name.startswith(".")
        ]


def _by_name(paths: Iterable[Path], ending: str = "") -> dict[str, list[Path]]:
    """Key each path by its file name less `ending` and suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(paths):
        found.setdefault(path.stem.removesuffix(ending), []).append(path)
    return found


def _one_each(files: dict[str, list[Path]], what: str) -> dict[str, Path]:
    doubled = [f"{first} / {other.name}" for first, *others in files.values() for other in others]
    if doubled:
        raise UserError(
            f"{len(doubled)} {what} stand twice for one name ({list_examples(doubled)}): "
            "keep one of each"
        )
    return {name: paths[0] for name, paths in files.items()}


def match(listing: Listing) -> list[Pair]:
    """Pairs of a split's files, sorted by name.

    Raises:
        UserError: partners are missing or doubled; names the first ones and their number.
    """
    images = _one_each(listing.images, "images")
    if listing.labels is None:
        return [Pair(images[key], None) for key in sorted(images)]
    labels, place = _one_each(listing.labels, "labels"), listing.place
    without_label = images.keys() - labels.keys()
    if without_label:
        raise UserError(
            f"{place}: {len(without_label)} of {len(images)} images have no label "
            f"({list_examples(without_label)}): add the labels or remove the images"
        )
    without_image = labels.keys() - images.keys()
    if without_image:
        raise UserError(
            f"{place}: {len(without_image)} of {len(labels)} labels have no image "
            f"({list_examples(without_image)}): add the images or remove the labels"
        )
    return [Pair(images[key], labels[key]) for key in sorted(images)]


def _images_below(folder: Path, ending: str = "") -> list[Path]:
    return [
        path
        for path in folder.rglob(f"*{ending}.*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]


def _refuse_empty(images: Collection, folder: Path) -> None:
    if not images:
        raise UserError(
            f"{folder} holds no images (png, jpg or webp): check the data folder and split"
        )


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
) -> Listing:
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
    return Listing(images, labels, (image_folder,), f"{root} {split}")


def cityscapes_pairs(
    root: str | os.PathLike, split: str, annotations: str = "fine", encoding: str = "labelIds"
) -> list[Pair]:
    """Pairs of a tree in the official Cityscapes layout, sorted by name.

    Args as of `list_cityscapes`.

    Raises:
        UserError: as `list_cityscapes` and `match`.
    """
    return match(list_cityscapes(root, split, annotations, encoding))


def list_folders(image_folder: str | os.PathLike, label_folder: str | os.PathLike) -> Listing:
    """Files of two folders, an image and its label having the same name before the suffix.

    Labels are PNG. Subfolders are searched too.

    Raises:
        UserError: as `list_cityscapes`.
    """
    next_step = "check --datadir and the layout in datasets/README.md"
    image_folder = _require_folder(Path(image_folder), next_step)
    label_folder = _require_folder(Path(label_folder), next_step)
    images = _by_name(_images_below(image_folder))
    _refuse_empty(images, image_folder)
    labels = _by_name(p for p in label_folder.rglob("*.png") if not p.name.startswith("."))
    folders = (image_folder, label_folder)
    return Listing(images, labels, folders, str(label_folder))


def voc_list(root: Path, split: str, annotations: str = "fine") -> Path:
    """The list of a Pascal VOC split. The augmented "train" has one of its own: "trainaug"."""
    name = "trainaug" if (split, annotations) == ("train", "aug") else split
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def list_voc(root: str | os.PathLike, split: str, annotations: str = "fine") -> Listing:
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
        return Listing(images, None, (), str(path))
    label_folder = root / ("SegmentationClassAug" if added else "SegmentationClass")
    _require_folder(label_folder, next_step)
    labels = {name: [label_folder / f"{name}.png"] for name in names}
    labels = {name: [label] for name, [label] in labels.items() if label.is_file()}
    return Listing(images, labels, (), str(path))


def hold_out(pairs: list[Pair], held_out: bool, every: int = 0, names: str = "") -> list[Pair]:
    """Split training pairs in two: some are held out for validation.

    Args:
        held_out: whether to return the held-out pairs or the rest.
        every: hold out every n-th pair, or with 0
        names: those whose images' names begin so, for instance a whole recording.
    """

    def is_held_out(i: int, pair: Pair) -> bool:
        return i % every == every - 1 if every else pair.image.name.startswith(names)

    return [pair for i, pair in enumerate(pairs) if is_held_out(i, pair) == held_out]
