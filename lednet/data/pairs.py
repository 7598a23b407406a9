"""Image files and their label files: found in folders, and matched by name, never by order."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lednet.errors import UserError
from lednet.files import IMAGE_SUFFIXES, find_files, normalized, unused_images


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
        unused: images in the folders of the split whose format or name is not supported.
        place: location of the split, for messages.
    """

    images: dict[str, list[Path]]
    labels: dict[str, list[Path]] | None
    unused: list[Path]
    place: str


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


class NamedFiles(NamedTuple):
    """Files of a folder by the name that matches image and label; see `name_files`."""

    names: dict[str, list[Path]]
    unused: list[Path]


def name_files(
    folder: Path,
    next_step: str,
    ending: str = "",
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    relative: bool = False,
) -> NamedFiles:
    """Find files in `folder` and its subfolders; see `lednet.files.find_files`.

    Args:
        next_step: what to do if there is no such folder, for the message.
        ending: end of the files' names before the suffix.
        suffixes: in lower case; files may have them in any case.
        relative: name files by their path relative to `folder`, instead of the file name.

    Returns:
        Files by their name without ending and suffix, in the order of their paths; and images
        of other formats or names.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {next_step}")
    names: dict[str, list[Path]] = {}
    files = find_files(folder)
    used = [p for p in files if p.suffix.lower() in suffixes and p.stem.endswith(ending)]
    for path in used:
        name = (path.relative_to(folder) if relative else Path(path.name)).with_suffix("")
        names.setdefault(normalized(name.as_posix()).removesuffix(ending), []).append(path)
    unused = unused_images(files, set(used))
    if not names and suffixes == IMAGE_SUFFIXES:
        found = f" named *{ending}" if ending else f" ({', '.join(IMAGE_SUFFIXES)})"
        other = f", but {list_examples(p.name for p in unused)}" if unused else ""
        raise UserError(f"{folder} holds no images{found}{other}: check the data folder and split")
    return NamedFiles(names, unused)


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
