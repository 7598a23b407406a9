"""Which label file belongs to which image: pairs are made by name, never by order."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lednet.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Sample(NamedTuple):
    """An image file and its label file; `label` is None where labels are withheld."""

    image: Path
    label: Path | None


def require_file(file: Path | None, what: str) -> Path:
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


class FileIndex(NamedTuple):
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

    def unmatched_files(self) -> list[Path]:
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


def pair_files(listing: FileIndex) -> list[Sample]:
    """Pairs of a split's files, sorted by name.

    Raises:
        UserError: partners are missing or doubled; names the first ones and their number.
    """
    images = _one_each(listing.images, "images")
    if listing.labels is None:
        return [Sample(images[key], None) for key in sorted(images)]
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
    return [Sample(images[key], labels[key]) for key in sorted(images)]


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


def split_holdout(
    pairs: list[Sample], held_out: bool, every: int = 0, names: str = ""
) -> list[Sample]:
    """Split training pairs in two: some are held out for validation.

    Args:
        held_out: whether to return the held-out pairs or the rest.
        every: hold out every n-th pair, or with 0
        names: those whose images' names begin so, for instance a whole recording.
    """

    def is_held_out(i: int, pair: Sample) -> bool:
        return i % every == every - 1 if every else pair.image.name.startswith(names)

    return [pair for i, pair in enumerate(pairs) if is_held_out(i, pair) == held_out]
