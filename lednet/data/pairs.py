"""Image files and their label files: found in folders, and matched by name, never by order."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lednet.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABEL_SUFFIXES = (".png",)


class Sample(NamedTuple):
    """An image file and its label file; `label` is None where labels are withheld."""

    image: Path
    label: Path | None


class SplitSpec(NamedTuple):
    """The split to list; the fields are described in `lednet.data.registry.open_dataset`.

    With `holds_out`, "val" is held out of "train", and needs no folder of its own.
    """

    root: Path
    split: str
    annotations: str = "fine"
    labels: str = "auto"
    class_file: str | os.PathLike | None = None
    holds_out: bool = False


class FileIndex(NamedTuple):
    """The files of a split by the name that matches them, not matched yet.

    Attributes:
        images: image files of each name, of which there should be one.
        labels: label files of each name; None where they are withheld.
        folders: folders in which no other images are expected.
        place: location of the split, for messages.
    """

    images: dict[str, list[Path]]
    labels: dict[str, list[Path]] | None
    folders: tuple[Path, ...]
    place: str

    def unmatched_files(self) -> list[Path]:
        """Images in `folders` that are not used because of their format or name."""
        used = {
            p for files in (self.images, self.labels or {}) for ps in files.values() for p in ps
        }
        formats = Image.registered_extensions()
        return [
            path
            for folder in self.folders
            for path in sorted(folder.rglob("*.*"))
            if path.suffix.lower() in formats and path not in used and path.name[0] != "."
        ]


def require_file(file: Path | None, what: str) -> Path:
    """Return `file`, or raise a `UserError` if it is None: the split has no `what`."""
    if file is None:
        raise UserError(f"there are no {what}, which are needed here: choose another split")
    return file


def list_examples(names: Iterable[str], limit: int = 3) -> str:
    """The first names in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def find_files(
    folder: Path, next_step: str, ending: str = "", suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> dict[str, list[Path]]:
    """Find files in `folder` and its subfolders.

    Args:
        next_step: what to do if there is no such folder, for the message.
        ending: end of the files' names before the suffix.
        suffixes: in lower case; files may have them in any case. Hidden files are skipped.

    Returns:
        Files by their name without ending and suffix, in the order of their paths.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {next_step}")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob(f"*{ending}.*")):
        if path.suffix.lower() in suffixes and path.name[0] != ".":
            found.setdefault(path.stem.removesuffix(ending), []).append(path)
    if not found and suffixes == IMAGE_SUFFIXES:
        raise UserError(
            f"{folder} holds no images (png, jpg or webp): check the data folder and split"
        )
    return found


def require_unique(files: dict[str, list[Path]], what: str) -> dict[str, Path]:
    """The only file of each name; a `UserError` lists names with several."""
    doubled = [f"{first} / {other.name}" for first, *others in files.values() for other in others]
    if doubled:
        raise UserError(
            f"{len(doubled)} {what} have the name of another one ({list_examples(doubled)}): "
            "keep one of each"
        )
    return {name: paths[0] for name, paths in files.items()}


def pair_files(index: FileIndex) -> list[Sample]:
    """Pair the images and labels of a split, sorted by name.

    Raises:
        UserError: some have no partner or two; names the first ones and their number.
    """
    images = require_unique(index.images, "images")
    if index.labels is None:
        return [Sample(images[name], None) for name in sorted(images)]
    labels = require_unique(index.labels, "labels")
    for files, partners, what, partner in (
        (images, labels, "images", "label"),
        (labels, images, "labels", "image"),
    ):
        if lone := files.keys() - partners.keys():
            raise UserError(
                f"{index.place}: {len(lone)} of {len(files)} {what} have no {partner} "
                f"({list_examples(lone)}): add the {partner}s or remove the {what}"
            )
    return [Sample(images[name], labels[name]) for name in sorted(images)]
