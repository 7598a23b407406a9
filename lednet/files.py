"""Finding files: the same rules for data sets, inputs, predictions and calibration images.

Linked folders are followed. Hidden files and folders, and those that file systems, archives and
network drives leave in a data set, are skipped: `._a.png`, `.ipynb_checkpoints`, `__MACOSX`,
`@eaDir`. Names are compared in Unicode normalization form C, because macOS stores accented letters
in two ways.
"""

import glob
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath

from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of image files, in lower case; the formats of `lednet.data.image_io.FORMATS`."""

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
"""Suffixes of label maps: lossless formats that store one value per pixel."""

SYSTEM_FOLDERS = frozenset(
    (
        "__MACOSX", "Network Trash Folder", "Temporary Items",  # macOS
        "$RECYCLE.BIN", "System Volume Information", "RECYCLER",  # Windows
        "@eaDir", "#recycle", "@Recycle", "@__thumb", "@Recently-Snapshot",  # network drives
        "lost+found", "__pycache__",
    )
)  # fmt: skip
"""Folders, besides hidden ones, whose files are not part of a data set."""


def is_skipped(name: str) -> bool:
    """Whether a file or folder of this name is hidden or the system's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def find_files(folder: str | os.PathLike, suffixes: Collection[str] | None = None) -> list[Path]:
    """Files in a folder and its subfolders, sorted by path.

    Args:
        suffixes: in lower case, with the dot; upper case in file names is accepted. None finds
            files of any suffix.

    Returns:
        Paths that start with `folder`. A link to a missing file is included, so that reading it
        reports the missing file.
    """
    return sorted(
        path
        for path in _walk(Path(folder), ())
        if suffixes is None or path.suffix.lower() in suffixes
    )


def _walk(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the files below a folder.

    parents: device and inode of the folders above, to detect links that form a loop.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_skipped(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*parents, here))
            else:
                yield Path(entry.path)


def split_pattern(source: str) -> tuple[Path, str] | None:
    """Split a pattern such as "city [1]/**/*.png" into an existing folder and a pattern below it.

    Brackets and spaces in names of existing folders are not part of the pattern.

    Returns:
        None if `source` contains no wildcard below its existing folders.
    """
    parts = PurePath(source).parts
    folder = Path(parts[0]) if PurePath(source).is_absolute() else Path()
    rest = list(parts[1:] if PurePath(source).is_absolute() else parts)
    while rest and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    return (folder, os.path.join(*rest)) if rest and any(map(glob.has_magic, rest)) else None


def match_files(folder: Path, pattern: str, suffixes: Collection[str] | None = None) -> list[Path]:
    """Files below `folder` that match a pattern relative to it, sorted; skips as `find_files`."""
    paths = (Path(name) for name in glob.glob(pattern, root_dir=folder, recursive=True))
    return sorted(
        folder / path
        for path in paths
        if not any(map(is_skipped, path.parts))
        and (suffixes is None or path.suffix.lower() in suffixes)
        and not (folder / path).is_dir()
    )


def normalized(name: str) -> str:
    """`name` in the Unicode normalization form that file names are compared in."""
    return unicodedata.normalize("NFC", name)


def key_files(paths: Iterable[Path], folder: Path, ending: str = "") -> dict[str, list[Path]]:
    """Group files by their path relative to `folder`, without `ending` and suffix."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        key = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        found.setdefault(normalized(key), []).append(path)
    return found


def unused_images(folders: Iterable[Path], used: Collection[Path]) -> list[Path]:
    """Files in `folders` that Pillow knows as images by their suffix and that are not in `used`."""
    formats = Image.registered_extensions()
    return [
        path
        for folder in folders
        for path in find_files(folder)
        if path.suffix.lower() in formats and path not in used
    ]
