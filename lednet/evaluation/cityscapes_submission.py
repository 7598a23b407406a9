"""Submissions to the Cityscapes benchmark: file names, the zip and its validation.

As the official package `cityscapesscripts` requires, each image has one 8-bit prediction of label
ids (0 to 33), of the image's size, found by its name `<city>_123456_123456*.png`.
"""

import contextlib
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

import numpy as np
from PIL import Image

from lednet.data.labels import CITYSCAPES_LABELS, IGNORE_INDEX
from lednet.data.pairs import list_examples
from lednet.data.prepare.cityscapes_tree import FRAMES
from lednet.data.prepare.zips import open_zip
from lednet.errors import UserError
from lednet.files import IMAGE_SUFFIXES, find_files, is_skipped
from lednet.io import write_atomically
from lednet.progress import progress_bar

NUM_FILES = {subset: FRAMES[subset] for subset in ("test", "val")}
"""Number of images of each subset."""

CITIES = {
    "test": ("berlin", "bielefeld", "bonn", "leverkusen", "mainz", "munich"),
    "val": ("frankfurt", "lindau", "munster"),
}

MAX_BYTES = 64 * 2**20
"""Larger files are not read: the pixels of a 2048x1024 label image are 2 MiB."""

_FRAME = re.compile(r"([A-Za-z-]+)_\d{6}_\d{6}(?!\d)")
_MAX_ID = max(label.id for label in CITYSCAPES_LABELS)
_MAX_TRAIN_ID = max(label.train_id for label in CITYSCAPES_LABELS if not label.ignore_in_eval)
_NOT_EVALUATED = [label.id for label in CITYSCAPES_LABELS if label.id > 0 and label.ignore_in_eval]
"""Label ids besides 0 (unlabeled) that networks with the evaluated classes do not write."""

_PROBLEMS = {
    "folder": ("folder", "in the zip", "put the images at its top level"),
    "name": ("file", "not named <city>_123456_123456*.png", "name each after its image"),
    "duplicate": ("frame", "with more than one file", "keep one of each"),
    "city": ("file", "of a city outside {subset}", "predict the images of {subset}"),
    "missing": ("frame", "without a file", "predict every image"),
    "unknown": ("file", "of a frame outside {subset}", "remove it"),
    "other": ("file", "other than .png", "remove it"),
    "large": ("file", f"over {MAX_BYTES >> 20} MiB and not read", "write label images"),
    "format": ("file", "named .png but in another format", "write PNG"),
    "damaged": ("file", "damaged or unreadable", "write it again"),
    "mode": ("file", "not 8-bit single-channel",
             "write the ids as a grey image, without a palette"),
    "size": ("file", "of the wrong size", "predict at the size of the image"),
    "ids": ("file", f"with ids outside the table, 0 to {_MAX_ID}", "write labelIds"),
    "void": ("file", f"with {IGNORE_INDEX}, the void of trainIds", "convert trainIds to labelIds"),
}  # fmt: skip
"""Type of problem -> parts of its message "<count> <noun> <what> (<names>): <next step>"."""


def frame_name(path: str | os.PathLike) -> str:
    """The prefix `<city>_<sequence>_<frame>` of an image's, label's or prediction's file name.

    Raises:
        UserError: the name has no such prefix.
    """
    match = _FRAME.match(Path(path).name)
    if not match:
        raise UserError(
            f"{path} is not named <city>_<6 digits>_<6 digits>*: give the file its Cityscapes name"
        )
    return match[0]


def prediction_name(image: str | os.PathLike) -> str:
    """File name of an image's prediction, `<city>_<sequence>_<frame>_pred_labelIds.png`.

    Raises:
        UserError: see `frame_name`.
    """
    return f"{frame_name(image)}_pred_labelIds.png"


def image_frames(root: str | os.PathLike, subset: str) -> set[str]:
    """Frame names of the images in `<root>/leftImg8bit/<subset>`.

    Raises:
        UserError: there are no images, or one has no Cityscapes name.
    """
    folder = Path(root) / "leftImg8bit" / subset
    files = find_files(folder, IMAGE_SUFFIXES) if folder.is_dir() else []
    frames = {frame_name(path) for path in files if path.stem.endswith("_leftImg8bit")}
    if not frames:
        raise UserError(f"{folder} holds no *_leftImg8bit images: check --datadir and --subset")
    return frames


def write_submission(path: str | os.PathLike, files: Iterable[str | os.PathLike]) -> None:
    """Write `files` to a zip without folders, atomically. Equal files give equal bytes.

    Raises:
        UserError: two files have the same name, or one cannot be read.
    """
    ordered = sorted(map(Path, files), key=lambda file: file.name)
    duplicates = [name for name, n in Counter(file.name for file in ordered).items() if n > 1]
    if duplicates:
        raise UserError(
            f"{path} would contain several files of one name ({list_examples(duplicates)}): "
            "keep one of each"
        )
    with write_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in ordered:
            try:
                data = file.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}; predict it") from error
            # No time, user or operating system is stored; PNGs are compressed already.
            member = zipfile.ZipInfo(file.name)
            member.create_system = 3
            member.external_attr = 0o100644 << 16
            archive.writestr(member, data, zipfile.ZIP_STORED)


class _File(NamedTuple):
    """A file of a submission: name including folders, size in bytes, function to read it."""

    name: str
    num_bytes: int
    read: Callable[[], bytes]


def check_submission(
    path: str | os.PathLike,
    subset: str = "test",
    *,
    frames: Collection[str] | None = None,
    size: tuple[int, int] = (1024, 2048),
    progress: bool = True,
) -> list[str]:
    """Find everything that the benchmark would reject or misread. Nothing is extracted to disk.

    Hidden and system files, such as those that macOS adds to a zip, are skipped (`lednet.files`).

    Args:
        path: the zip, or the folder (searched recursively) to make it of.
        subset: "test" or "val", for the number of files and their cities.
        frames: required frame names, from `frame_name`, instead of the subset's number and cities.
        size: (height, width) of every image.
        progress: whether to show a progress bar.

    Returns:
        A sentence for each type of problem, naming the first files; empty for a valid submission.

    Raises:
        UserError: the path does not exist, or is not a readable zip.
    """
    if subset not in NUM_FILES:
        raise ValueError(f"subset must be one of {tuple(NUM_FILES)}, not {subset!r}")
    path = Path(path)
    problems: dict[str, list[str]] = defaultdict(list)
    counts = np.zeros(256, np.int64)
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            files = [
                _File(f.relative_to(path).as_posix(), f.stat().st_size, f.read_bytes)
                for f in find_files(path)
                if f.is_file()
            ]
        else:
            archive = stack.enter_context(open_zip(path))
            files = [
                _File(m.filename, m.file_size, partial(_read_member, archive, m))
                for m in sorted(archive.infolist(), key=lambda member: member.filename)
                if not any(map(is_skipped, m.filename.split("/")))
            ]
            folders = {f.name.split("/")[0] + "/" for f in files if "/" in f.name}
            problems["folder"] = sorted(folders)
        problems["other"] = [f.name for f in files if not f.name.endswith((".png", "/"))]
        images = [file for file in files if file.name.endswith(".png")]
        _check_names([image.name for image in images], subset, frames, problems)
        # Each thread holds one file; decompression and decoding release the GIL.
        pool = stack.enter_context(ThreadPoolExecutor(min(4, os.cpu_count() or 1)))
        results = pool.map(lambda image: _check_image(image, size), images)
        hidden = not progress
        bar = progress_bar(results, total=len(images), desc=path.name, unit="file", disable=hidden)
        for image, (remarks, pixels) in zip(images, bar, strict=True):
            counts += pixels
            for kind, remark in remarks.items():
                problems[kind].append(f"{image.name}: {remark}" if remark else image.name)
    sentences = []
    required = NUM_FILES[subset] if frames is None else len(frames)
    if len(images) != required:
        sentences.append(
            f"{path} holds {len(images)} .png files, but {required} are required: "
            f"add one for each image of {subset}"
        )
    sentences += [_sentence(kind, problems[kind], subset) for kind in _PROBLEMS if problems[kind]]
    if _are_train_ids(counts):
        sentences.append(
            f"the files of {path} hold no id above {_MAX_TRAIN_ID} and mostly ids that are not "
            "evaluated, so they are probably trainIds: convert them to labelIds"
        )
    return sentences


def _are_train_ids(counts: np.ndarray) -> bool:
    """Whether pixels, counted by id (256,), are those of trainIds.

    Label ids up to 18 alone are no sign: a few images may show only road (7) and building (11).
    Most ids of that range are not evaluated as label ids, and are large classes as trainIds.
    """
    known = counts[: _MAX_ID + 1]
    if known[_MAX_TRAIN_ID + 1 :].any():
        return False
    unusual = known[_NOT_EVALUATED].sum()
    return bool(unusual and 2 * (known[0] + unusual) > known.sum())


def _sentence(kind: str, names: Sequence[str], subset: str) -> str:
    noun, what, next_step = _PROBLEMS[kind]
    count = f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"
    # Names in a zip may contain any bytes, including line breaks.
    examples = list_examples(name if name.isprintable() else ascii(name) for name in names)
    what, next_step = what.format(subset=subset), next_step.format(subset=subset)
    return f"{count} {what} ({examples}): {next_step}"


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    # `zipfile` limits the decompressed size for these two methods only.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("unsupported compression method")
    with archive.open(member) as file:
        return file.read(member.file_size)


def _check_names(
    names: Iterable[str],
    subset: str,
    frames: Collection[str] | None,
    problems: dict[str, list[str]],
) -> None:
    by_frame = defaultdict(list)
    for name in names:
        match = _FRAME.match(name.rsplit("/", 1)[-1])
        if not match:
            problems["name"].append(name)
            continue
        by_frame[match[0]].append(name)
        if frames is None and match[1] not in CITIES[subset]:
            problems["city"].append(name)
        elif frames is not None and match[0] not in frames:
            problems["unknown"].append(name)
    problems["duplicate"] = [" / ".join(group) for group in by_frame.values() if len(group) > 1]
    problems["missing"] = [frame for frame in frames or () if frame not in by_frame]


_NO_PIXELS = np.zeros(256, np.int64)


def _check_image(image: _File, size: tuple[int, int]) -> tuple[dict[str, str], np.ndarray]:
    """Problems of one image (key of `_PROBLEMS` -> remark), and its pixels of each id (256,)."""
    if image.num_bytes > MAX_BYTES:
        return {"large": f"{image.num_bytes >> 20} MiB"}, _NO_PIXELS
    try:
        return _check_png(image.read(), size)
    except Exception:  # zipfile, struct and PIL raise any type on damaged files
        return {"damaged": ""}, _NO_PIXELS


# PNG specification, 5.2 (signature) and 11.2.1 (header and colour types)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


def _check_png(data: bytes, size: tuple[int, int]) -> tuple[dict[str, str], np.ndarray]:
    if not _PNG_SIGNATURE.startswith(data[:8]):
        return {"format": ""}, _NO_PIXELS
    width, height, bits, color_type = struct.unpack_from(">IIBB", data, 16)
    problems = {}
    if (height, width) != tuple(size):
        problems["size"] = f"{width}x{height}"
    if (bits, color_type) != (8, 0):
        problems["mode"] = f"{bits}-bit {_COLOR_TYPES.get(color_type, 'unknown')}"
    # Larger images are not decoded: they could exhaust the memory.
    if "mode" in problems or height > size[0] or width > size[1]:
        return problems, _NO_PIXELS
    Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # checksums
    counts = np.array(Image.open(io.BytesIO(data), formats=["PNG"]).histogram())
    if counts[IGNORE_INDEX]:
        problems["void"] = ""
    outside = np.flatnonzero(counts[_MAX_ID + 1 : IGNORE_INDEX])
    if len(outside):
        problems["ids"] = str(_MAX_ID + 1 + outside[0])
    return problems, counts
