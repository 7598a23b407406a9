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

from lednet.errors import UserError

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
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        entries = [] if here in parents else sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {folder} ({error.strerror}): make it readable"
        ) from error
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
    path = PurePath(source)
    folder, rest = Path(path.anchor), [*path.relative_to(path.anchor).parts]
    while rest and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    return (folder, os.path.join(*rest)) if rest and any(map(glob.has_magic, rest)) else None


def match_files(folder: Path, pattern: str) -> list[Path]:
    """Files below `folder` that match a pattern relative to it, sorted; skips as `find_files`."""
    paths = (Path(name) for name in glob.glob(pattern, root_dir=folder, recursive=True))
    return sorted(
        folder / path
        for path in paths
        if not any(map(is_skipped, path.parts)) and not (folder / path).is_dir()
    )


def normalized(name: str) -> str:
    """`name` in the Unicode normalization form that file names are compared in."""
    return unicodedata.normalize("NFC", name)


def unused_images(files: Iterable[Path], used: Collection[Path]) -> list[Path]:
    """Those of `files` that are not in `used`, and that Pillow knows as images by their suffix."""
    formats = Image.registered_extensions()
    return [path for path in files if path.suffix.lower() in formats and path not in used]


def expand_home(text: str) -> str:
    """`text` with a leading `~/` as the home folder, which shells leave in `--flag=~/folder`."""
    return os.path.expanduser(text) if text.startswith("~/") else text


def require_content(path: str | os.PathLike) -> None:
    """Raise a `UserError` if `path` is text in place of a binary file that was not downloaded: a
    pointer of Git LFS, or a web page."""
    try:
        with open(path, "rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError:
        return
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS instead of the file: git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(
            f"{path} is a web page instead of the file: open it in a browser, and download again"
        )


def read_text(path: str | os.PathLike) -> str:
    """Read a text file that people edit: UTF-8, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, or has another encoding.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return decode_text(content, path)


def decode_text(content: bytes, path: str | os.PathLike) -> str:
    """Decode the content of `path`; see `read_text`."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        raise UserError(f"{path} is UTF-16 or UTF-32 text: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 text (line {line}): save it as UTF-8") from error
