"""The official Cityscapes archives, and whether a tree holds all that they hold."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lednet.data.cityscapes import CITYSCAPES_ARCHIVES, archive_of
from lednet.data.pairs import list_examples
from lednet.data.prepare.zips import Archive, ZipLimits
from lednet.errors import UserError

FRAMES = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}
"""Images of each split, as published."""

SPLITS = {
    "leftImg8bit": ("train", "val", "test", "train_extra"),
    "gtFine": ("train", "val", "test"),
    "gtCoarse": ("train", "val", "train_extra"),
}
"""Of each kind of files. The labels of test are void but for the car itself and the border."""

BLACK_FRAME = "troisdorf_000000_000073"
"""Of train_extra; published as a black image with an empty label."""

LIMITS = ZipLimits(file=2**24, total=100 * 10**9)
"""The pixels of a colour label take 8 MB, the largest archive unpacks to 44 GB. Polygons shrink to
a twentieth when they are packed, the images beside them hardly."""

_ANNOTATION = r"_(?:(?:color|instanceIds|labelIds)\.png|polygons\.json)"
_MEMBER = re.compile(
    "|".join(
        rf"{kind}/(?:{'|'.join(splits)})/(?P<{kind}>[a-z-]+)/(?P={kind})_[0-9]{{6}}_[0-9]{{6}}_{kind}"
        + (r"\.png" if kind == "leftImg8bit" else _ANNOTATION)
        for kind, splits in SPLITS.items()
    )
    + r"|README|license\.txt"
)
"""Files of the tree: the city stands in the name of each."""


def find_archives(sources: Iterable[Path]) -> list[Path]:
    """Zips that are named one by one, and the official ones in folders.

    Raises:
        UserError: there is no such file or folder, or a folder without any.
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
    """One of the official archives, its directory checked.

    Raises:
        UserError: see `Archive`; or it holds nothing of Cityscapes.
    """
    archive = Archive(path, _MEMBER, LIMITS)
    if not any("/" in member.filename for member in archive.files):
        raise UserError(
            f"{path} holds no files of Cityscapes' tree (leftImg8bit, gtFine, gtCoarse): give the "
            "official zips as they were downloaded"
        )
    return archive


class Tree(NamedTuple):
    """What lies in a Cityscapes tree.

    Attributes:
        counts: frames of each kind of file and split; only of folders that are there.
        problems: a sentence for each thing that is incomplete.
        notes: sentences of what is good to know.
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

    A folder that is not there at all is not missed: any of the archives will do.
    """
    tree = Tree({}, [], [])
    images = _frames(root, "leftImg8bit", "leftImg8bit.png")
    _compare_counts(root, "leftImg8bit", "leftImg8bit.png", images, tree)
    for kind in ("gtFine", "gtCoarse"):
        labels = _frames(root, kind, f"{kind}_labelIds.png")
        _compare_counts(root, kind, f"{kind}_labelIds.png", labels, tree)
        polygons = _frames(root, kind, f"{kind}_polygons.json")
        if any(polygons.values()):  # training reads none
            tree.counts[f"{kind}_polygons.json"] = _counts(polygons)
        for split in (split for split in labels if split in images):
            pairs = f"leftImg8bit/{split}", f"{kind}/{split}"
            _compare_frames(*pairs, images[split] - labels[split], "images", "label", tree)
            _compare_frames(*pairs[::-1], labels[split] - images[split], "labels", "image", tree)
    black = root / f"leftImg8bit/train_extra/troisdorf/{BLACK_FRAME}_leftImg8bit.png"
    if black.exists():
        tree.notes.append(
            f"{black} is black, as published, and its coarse label empty: leave both or remove both"
        )
    return tree


def _frames(root: Path, kind: str, ending: str) -> dict[str, set[str]]:
    """Names of the frames that have a file of this ending, by the splits that are there."""
    return {
        split: {path.name.removesuffix(f"_{ending}") for path in folder.glob(f"*/*_{ending}")}
        for split in SPLITS[kind]
        if (folder := root / kind / split).is_dir()
    }


def _counts(frames: dict[str, set[str]]) -> dict[str, int]:
    return {split: len(names) for split, names in frames.items()}


def _compare_counts(
    root: Path, kind: str, ending: str, frames: dict[str, set[str]], tree: Tree
) -> None:
    if frames:
        tree.counts[ending] = _counts(frames)
    for split, names in frames.items():
        may_be_removed = {BLACK_FRAME} if split == "train_extra" else set()
        if len(names | may_be_removed) != FRAMES[split]:
            tree.problems.append(
                f"{root / kind / split} holds {len(names):,} *_{ending} of {FRAMES[split]:,}: "
                f"unpack {archive_of(kind, split)} again"
            )


def _compare_frames(
    here: str, there: str, lone: set[str], what: str, partner: str, tree: Tree
) -> None:
    if lone:
        tree.problems.append(
            f"{len(lone):,} {what} of {here} have no {partner} in {there} ({list_examples(lone)}): "
            f"unpack {archive_of(*there.split('/'))} again"
        )
