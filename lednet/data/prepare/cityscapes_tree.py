"""The official Cityscapes archives, and a check that an extracted tree is complete."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lednet.data.cityscapes import CITYSCAPES_ARCHIVES, archive_of
from lednet.data.pairs import list_examples
from lednet.data.prepare.zips import Archive
from lednet.errors import UserError

FRAMES = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
"""Published number of images in each split."""

SPLITS = {
    "leftImg8bit": ("train", "val", "test", "train_extra"),
    "gtFine": ("train", "val", "test"),
    "gtCoarse": ("train", "val", "train_extra"),
}
"""Splits of each kind of file. Labels of test are void except for the ego vehicle and border."""

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
    """Paths of zips: files among `sources`, and the official zips in folders among them.

    Raises:
        UserError: a source does not exist, or is a folder without an official zip.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            official = sorted(set(CITYSCAPES_ARCHIVES.values()))
            inside = [source / name for name in official if (source / name).is_file()]
            if not inside:
                raise UserError(
                    f"{source} holds none of {', '.join(official)}: name the zips one by one"
                )
            found += inside
        elif source.is_file():
            found.append(source)
        else:
            raise UserError(f"no file or folder {source}: check the path")
    return list(dict.fromkeys(found))


def open_archive(path: Path) -> Archive:
    """Open one of the official archives.

    Raises:
        UserError: see `Archive`, or it has no files of Cityscapes.
    """
    archive = Archive(path, _MEMBER)
    if not any("/" in member.filename for member in archive.files):
        raise UserError(
            f"{path} holds no files of Cityscapes' tree (leftImg8bit, gtFine, gtCoarse): give the "
            "official zips as they were downloaded"
        )
    return archive


class Tree(NamedTuple):
    """Content of a Cityscapes tree.

    Attributes:
        counts: number of frames by kind of file and split, for folders that exist.
        problems: a sentence for each incomplete folder.
        notes: sentences of information.
    """

    counts: dict[str, dict[str, int]]
    problems: list[str]
    notes: list[str]

    def table(self) -> str:
        width = max(map(len, self.counts), default=0)
        lines = ["".join((" " * width, *(f"{split:>13}" for split in FRAMES)))]
        for kind, counts in self.counts.items():
            cells = (f"{counts[split]:,}" if split in counts else "-" for split in FRAMES)
            lines.append("".join((f"{kind:{width}}", *(f"{cell:>13}" for cell in cells))))
        return "\n".join(lines)


def check_tree(root: Path) -> Tree:
    """Compare a tree with the published numbers, and its images with its labels.

    A folder that does not exist is no problem, since any subset of the archives may be used.
    """
    tree = Tree({}, [], [])
    images = _check_counts(root, "leftImg8bit", "leftImg8bit.png", tree)
    for kind in ("gtFine", "gtCoarse"):
        labels = _check_counts(root, kind, f"{kind}_labelIds.png", tree)
        polygons = _frames(root, kind, f"{kind}_polygons.json")
        if any(polygons.values()):  # optional, since training does not read them
            tree.counts[f"{kind}_polygons.json"] = {s: len(polygons[s]) for s in polygons}
        for split in (split for split in labels if split in images):
            image, label = ("leftImg8bit", images[split]), (kind, labels[split])
            for (here, names), (there, partners), what in (
                (image, label, "images of {} have no label"),
                (label, image, "labels of {} have no image"),
            ):
                if lone := names - partners:
                    tree.problems.append(
                        f"{len(lone):,} {what.format(f'{here}/{split}')} in {there}/{split} "
                        f"({list_examples(lone)}): unpack {archive_of(there, split)} again"
                    )
    black = root / f"leftImg8bit/train_extra/troisdorf/{BLACK_FRAME}_leftImg8bit.png"
    if black.exists():
        tree.notes.append(
            f"{black} is black, as published, and its coarse label empty: leave both or remove both"
        )
    return tree


def _frames(root: Path, kind: str, ending: str) -> dict[str, set[str]]:
    """Names of the frames that have a file with this ending, by existing split."""
    return {
        split: {path.name.removesuffix(f"_{ending}") for path in folder.glob(f"*/*_{ending}")}
        for split in SPLITS[kind]
        if (folder := root / kind / split).is_dir()
    }


def _check_counts(root: Path, kind: str, ending: str, tree: Tree) -> dict[str, set[str]]:
    """Count the frames that have a file with this ending, and return their names by split."""
    frames = _frames(root, kind, ending)
    if frames:
        tree.counts[ending] = {split: len(names) for split, names in frames.items()}
    for split, names in frames.items():
        removable = {BLACK_FRAME} if split == "train_extra" else set()
        if len(names | removable) != FRAMES[split]:
            tree.problems.append(
                f"{root / kind / split} holds {len(names):,} *_{ending} of {FRAMES[split]:,}: "
                f"unpack {archive_of(kind, split)} again"
            )
    return frames
