"""The official Cityscapes archives, and a check that an extracted tree is complete."""

import re
from collections.abc import Iterable
from pathlib import Path

from lednet.data.cityscapes import CITYSCAPES_ARCHIVES, archive_of
from lednet.data.pairs import list_examples
from lednet.data.prepare.zips import Archive
from lednet.errors import UserError
from lednet.files import match_files

FRAMES = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
"""Published number of images in each split."""

SPLITS = {
    "leftImg8bit": ("train", "val", "test", "train_extra"),
    "gtFine": ("train", "val", "test"),
    "gtCoarse": ("train", "val", "train_extra"),
}
"""Splits of each kind of file. Labels of test are void except for the ego vehicle and border."""

ENDINGS = {
    "leftImg8bit.png": "leftImg8bit",
    "gtFine_labelIds.png": "gtFine",
    "gtFine_polygons.json": "gtFine",
    "gtCoarse_labelIds.png": "gtCoarse",
    "gtCoarse_polygons.json": "gtCoarse",
}
"""Files that are counted, and their kind. Polygons are optional, since training does not read them.
"""

BLACK_FRAME = "troisdorf_000000_000073"
"""A frame of train_extra that is published as a black image with an empty label."""

_ANNOTATION = r"_(?:(?:color|instanceIds|labelIds)\.png|polygons\.json)"
_MEMBER = re.compile(
    "|".join(
        rf"{kind}/(?:{'|'.join(splits)})/(?P<{kind}>[a-z-]{{1,40}})/(?P={kind})_[0-9]{{6}}_[0-9]{{6}}_{kind}"
        + (r"\.png" if kind == "leftImg8bit" else _ANNOTATION)
        for kind, splits in SPLITS.items()
    )
    + r"|README|license\.txt"
)
"""Names of the files to extract: the name of each contains that of its folder, the city."""


def find_archives(sources: Iterable[Path]) -> list[Path]:
    """The files among `sources`, and the official zips in folders among them.

    Raises a `UserError` if a source does not exist, or is a folder without an official zip.
    """
    found: dict[Path, None] = {}
    official = sorted(set(CITYSCAPES_ARCHIVES.values()))
    for source in sources:
        paths = [source / name for name in official] if source.is_dir() else [source]
        paths = [path for path in paths if path.is_file()]
        if not paths and source.is_dir():
            raise UserError(
                f"{source} holds none of {', '.join(official)}: name the zips one by one"
            )
        if not paths:
            raise UserError(f"no file or folder {source}: check the path")
        found |= dict.fromkeys(paths)
    return list(found)


def open_archive(path: Path) -> Archive:
    """Open an official archive; a `UserError` if it has no files of the tree, or see `Archive`."""
    archive = Archive(path, _MEMBER)
    if not any("/" in member.filename for member in archive.files):
        raise UserError(
            f"{path} holds no files of Cityscapes' tree (leftImg8bit, gtFine, gtCoarse): give the "
            "official zips as they were downloaded"
        )
    return archive


def check_tree(root: Path) -> tuple[str, list[str]]:
    """Compare a tree with the published numbers, and its images with its labels.

    A folder that does not exist is no problem, since any subset of the archives may be used.

    Returns:
        A table of the number of frames, "" if there are none, and a sentence for each problem.
    """
    frames = {ending: _frames(root, kind, ending) for ending, kind in ENDINGS.items()}
    optional = {end: found for end, found in frames.items() if end.endswith(".json")}
    shown = {end: f for end, f in frames.items() if any(f.values()) or (f and end not in optional)}
    problems = [
        f"{root / kind / split} holds {len(names):,} *_{ending} of {FRAMES[split]:,}: "
        f"unpack {archive_of(kind, split)} again"
        for ending, kind in ENDINGS.items()
        for split, names in frames[ending].items()
        if len(names | ({BLACK_FRAME} if split == "train_extra" else set())) != FRAMES[split]
        and ending not in optional
    ]
    images = frames["leftImg8bit.png"]
    for kind in ("gtFine", "gtCoarse"):
        labels = frames[f"{kind}_labelIds.png"]
        for split in (split for split in labels if split in images):
            image, label = ("leftImg8bit", images[split]), (kind, labels[split])
            for (here, names), (there, partners), what in (
                (image, label, "images of {} have no label"),
                (label, image, "labels of {} have no image"),
            ):
                if lone := names - partners:
                    problems.append(
                        f"{len(lone):,} {what.format(f'{here}/{split}')} in {there}/{split} "
                        f"({list_examples(lone)}): unpack {archive_of(there, split)} again"
                    )
    rows = [("", *FRAMES)] if shown else []
    for ending, found in shown.items():
        rows.append((ending, *(f"{len(found[s]):,}" if s in found else "-" for s in FRAMES)))
    table = [f"{name:22}" + "".join(f"{cell:>13}" for cell in cells) for name, *cells in rows]
    return "\n".join(table), problems


def _frames(root: Path, kind: str, ending: str) -> dict[str, set[str]]:
    """Names of the frames that have a file with this ending, by existing split."""
    return {
        split: {p.name.removesuffix(f"_{ending}") for p in match_files(folder, f"*/*_{ending}")}
        for split in SPLITS[kind]
        if (folder := root / kind / split).is_dir()
    }
