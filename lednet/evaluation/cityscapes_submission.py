"""Predictions as the Cityscapes benchmark wants them: file names, label images, the zip.

The authority is the official package `cityscapesscripts`: one 8-bit image of label ids
(0 to 33) for each image, of the image's size, found by its name
`<city>_123456_123456*.png`.
"""

import io
import os
import re
import struct
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from lednet.data.labels import CITYSCAPES_LABELS
from lednet.data.pairs import IMAGE_SUFFIXES
from lednet.data.prepare.cityscapes_tree import FRAMES
from lednet.data.prepare.zips import open_zip
from lednet.errors import UserError
from lednet.io import write_atomically

NUM_FILES = {subset: FRAMES[subset] for subset in ("test", "val")}
"""Images of each subset."""

CITIES = {
    "test": ("berlin", "bielefeld", "bonn", "leverkusen", "mainz", "munich"),
    "val": ("frankfurt", "lindau", "munster"),
}

MAX_BYTES = 64 * 2**20
"""Larger files are not read: the pixels of a 2048x1024 label image are 2 MiB."""

_FRAME = re.compile(r"([A-Za-z-]+)_\d{6}_\d{6}(?!\d)")
_MAX_ID = max(label.id for label in CITYSCAPES_LABELS)
_MAX_TRAIN_ID = max(label.train_id for label in CITYSCAPES_LABELS if not label.ignore_in_eval)
_VOID_TRAIN_ID = 255


def frame_name(path: str | os.PathLike) -> str:
    """`<city>_<sequence>_<frame>`, with which names of images, labels and predictions begin.

    Raises:
        UserError: the name does not begin like that.
    """
    match = _FRAME.match(Path(path).name)
    if not match:
        raise UserError(
            f"{path} is not named <city>_<6 digits>_<6 digits>*: give the file the name it has "
            "in Cityscapes"
        )
    return match[0]


def prediction_name(image: str | os.PathLike) -> str:
    """File name of an image's prediction, `<city>_<sequence>_<frame>_pred_labelIds.png`.

    Raises:
        UserError: as `frame_name`.
    """
    return f"{frame_name(image)}_pred_labelIds.png"


def image_frames(root: str | os.PathLike, subset: str) -> set[str]:
    """Frame names of the images below `<root>/leftImg8bit/<subset>`.

    Raises:
        UserError: no images there, or one whose name is not Cityscapes'.
    """
    folder = Path(root) / "leftImg8bit" / subset
    images = (p for p in folder.rglob("*_leftImg8bit.*") if p.suffix.lower() in IMAGE_SUFFIXES)
    frames = {frame_name(path) for path in images}
    if not frames:
        raise UserError(f"{folder} holds no *_leftImg8bit images: check --datadir and --subset")
    return frames


def write_submission(path: str | os.PathLike, files: Iterable[str | os.PathLike]) -> None:
    """Put `files` into a zip without folders, atomically; equal files give equal bytes.

    Raises:
        UserError: two files of one name, or one that cannot be read.
    """
    ordered = sorted(map(Path, files), key=lambda file: file.name)
    doubled = [name for name, count in Counter(f.name for f in ordered).items() if count > 1]
    if doubled:
        raise UserError(
            f"two files for {path} have one name ({_examples(doubled)}): keep one of each"
        )
    with write_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in ordered:
            try:
                data = file.read_bytes()
            except OSError as error:
                raise UserError(
                    f"cannot read {file}: {error.strerror}; predict it again"
                ) from error
            # No clock, user or system goes in; a PNG is compressed already.
            member = zipfile.ZipInfo(file.name)
            member.create_system = 3
            member.external_attr = 0o100644 << 16
            archive.writestr(member, data, zipfile.ZIP_STORED)


class _File(NamedTuple):
    """A file of an upload, not read yet: its name there with folders, and its size."""

    name: str
    num_bytes: int
    read: Callable[[], bytes]

    @property
    def frame(self) -> re.Match | None:
        """The frame at the start of the name, group 1 its city; None if there is none."""
        return _FRAME.match(self.name.rsplit("/", 1)[-1])


def check_submission(
    path: str | os.PathLike,
    subset: str = "test",
    *,
    frames: Collection[str] | None = None,
    size: tuple[int, int] = (1024, 2048),
    progress: bool = True,
) -> list[str]:
    """Find what the benchmark would refuse or misread. Nothing is unpacked to disk.

    Args:
        path: the zip, or the folder (searched with its subfolders) it is to be made of.
        subset: "test" or "val": the number of files, and their cities.
        frames: the exact frames wanted, as `frame_name` gives them, in place of the
            subset's number and cities.
        size: (height, width) of every image.
        progress: show a progress bar.

    Returns:
        A sentence for each kind of problem, naming the first files that have it. Empty
        if the upload is good.

    Raises:
        UserError: no such path, or no zip that can be opened.
    """
    if subset not in NUM_FILES:
        raise ValueError(f"subset must be one of {tuple(NUM_FILES)}, not {subset!r}")
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        files = [
            _File(f.relative_to(path).as_posix(), f.stat().st_size, f.read_bytes) for f in found
        ]
        return _check(path, files, subset, frames, size, progress)
    with open_zip(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.filename)
        files = [
            _File(m.filename, m.file_size, partial(_read_member, archive, m))
            for m in members
            if not m.filename.endswith("/")
        ]
        folders = sorted({m.filename.split("/")[0] + "/" for m in members if "/" in m.filename})
        flat = _problem(folders, "folder", "in the zip", "put the images at its top level")
        return flat + _check(path, files, subset, frames, size, progress)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    # The other methods inflate without a limit, whatever size the member declares.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("unknown compression")
    with archive.open(member) as file:
        return file.read(member.file_size)


def _check(
    path: Path,
    files: Sequence[_File],
    subset: str,
    frames: Collection[str] | None,
    size: tuple[int, int],
    progress: bool,
) -> list[str]:
    """`check_submission` for a zip and a folder alike."""
    images = [file for file in files if file.name.endswith(".png")]
    others = [file.name for file in files if not file.name.endswith(".png")]
    return [
        *_check_names(path, images, subset, frames),
        *_problem(others, "file", "other than .png", "leave it out"),
        *_check_images(path, images, size, progress),
    ]


def _check_names(
    path: Path, images: Sequence[_File], subset: str, frames: Collection[str] | None
) -> list[str]:
    problems = []
    wanted = NUM_FILES[subset] if frames is None else len(frames)
    if len(images) != wanted:
        problems.append(
            f"{path} holds {len(images)} .png files, and {wanted} are wanted: "
            f"give one for each image of {subset}"
        )
    unnamed = [image.name for image in images if not image.frame]
    pattern = "not named <city>_123456_123456*.png"
    problems += _problem(unnamed, "file", pattern, "name each after its image")
    named = defaultdict(list)
    for image in images:
        if image.frame:
            named[image.frame[0]].append(image)
    doubled = [" / ".join(i.name for i in same) for same in named.values() if len(same) > 1]
    problems += _problem(doubled, "frame", "with more than one file", "keep one of each")
    if frames is None:
        foreign = [i.name for i in images if i.frame and i.frame[1] not in CITIES[subset]]
        what = f"of a city outside {subset}"
        return problems + _problem(foreign, "file", what, f"predict the images of {subset}")
    frames = set(frames)
    missing = sorted(frames - named.keys())
    unknown = [image.name for image in images if image.frame and image.frame[0] not in frames]
    return [
        *problems,
        *_problem(missing, "frame", "without a file", "predict every image"),
        *_problem(unknown, "file", f"of a frame outside {subset}", "leave it out"),
    ]


class _FileCheck(NamedTuple):
    """What a look at one image found: kind of problem (of `_WRONG`) -> remark, and its ids."""

    wrong: dict[str, str]
    ids: tuple[int, ...] = ()


_WRONG = {
    "large": (f"over {MAX_BYTES >> 20} MiB and not read", "write label images"),
    "format": ("called .png and of another format", "write PNG"),
    "damaged": ("damaged or unreadable", "write it again"),
    "mode": ("not 8-bit single-channel", "write the ids as a grey image, with no palette"),
    "size": ("of the wrong size", "predict at the size of the image"),
    "ids": (f"with ids outside the table, 0 to {_MAX_ID}", "write labelIds"),
    "void": (f"with {_VOID_TRAIN_ID}, the void of trainIds", "convert trainIds to labelIds"),
}
"""Kind of problem with an image -> what is wrong, and the next step."""


def _check_images(
    path: Path, images: Sequence[_File], size: tuple[int, int], progress: bool
) -> list[str]:
    names = defaultdict(list)
    ids: set[int] = set()
    # A thread holds one file at a time; both inflating and decoding run beside Python.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        looks = pool.map(lambda image: _check_file(image, size), images)
        bar = tqdm(
            looks, path.name, len(images), unit="file", disable=not progress, dynamic_ncols=True
        )
        for image, look in zip(images, bar, strict=True):
            ids.update(look.ids)
            for kind, remark in look.wrong.items():
                names[kind].append(f"{image.name}: {remark}" if remark else image.name)
    problems = []
    for kind, (what, next_step) in _WRONG.items():
        problems += _problem(names[kind], "file", what, next_step)
    if ids and max(ids) <= _MAX_TRAIN_ID:
        problems.append(
            f"no file of {path} holds an id above {_MAX_TRAIN_ID}, so they look like trainIds: "
            "convert them to labelIds"
        )
    return problems


def _check_file(image: _File, size: tuple[int, int]) -> _FileCheck:
    """Read and check one image; whatever its bytes are, this returns."""
    if image.num_bytes > MAX_BYTES:
        return _FileCheck({"large": f"{image.num_bytes >> 20} MiB"})
    try:
        return _check_bytes(image.read(), size)
    except Exception:  # parsers of three kinds, on bytes of any kind
        return _FileCheck({"damaged": ""})


# From PNG's specification: how a file starts (5.2), colour types (11.2.1)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY = 0
_COLOR_TYPES = {_GREY: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


def _check_bytes(data: bytes, size: tuple[int, int]) -> _FileCheck:
    if not _PNG_SIGNATURE.startswith(data[:8]):
        return _FileCheck({"format": ""})
    width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
    wrong = {}
    if (height, width) != tuple(size):
        wrong["size"] = f"{width}x{height}"
    if (bits, color) != (8, _GREY):
        wrong["mode"] = f"{bits}-bit {_COLOR_TYPES.get(color, 'unknown')}"
    # A larger image than expected is not decoded: it may be made to fill the memory.
    if "mode" in wrong or height > size[0] or width > size[1]:
        return _FileCheck(wrong)
    Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # the check sums
    counts = Image.open(io.BytesIO(data), formats=["PNG"]).histogram()
    ids = tuple(value for value, count in enumerate(counts) if count)
    outside = [value for value in ids if _MAX_ID < value != _VOID_TRAIN_ID]
    if outside:
        wrong["ids"] = f"{outside[0]}"
    if _VOID_TRAIN_ID in ids:
        wrong["void"] = ""
    return _FileCheck(wrong, tuple(value for value in ids if value != _VOID_TRAIN_ID))


def _problem(names: Sequence[str], noun: str, what: str, next_step: str) -> list[str]:
    """A sentence that names the first of `names`; nothing if there are none."""
    if not names:
        return []
    count = f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"
    return [f"{count} {what} ({_examples(names)}): {next_step}"]


def _examples(names: Sequence[str], limit: int = 3) -> str:
    """The first names; a zip may hold any bytes as a name, which must not break the line."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
