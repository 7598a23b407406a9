"""Draw a toy data set in the layout of Cityscapes.

    python datasets/make_toy_cityscapes.py --out datasets/toy_cityscapes

150 street scenes, 512x256, in about 15 seconds on two cores. All 19 evaluated classes occur in
train and in val. Every tool that reads Cityscapes reads this set: file names, ids, colours, 16-bit
instances and polygons follow https://github.com/mcordts/cityscapesScripts. As in Cityscapes, the
annotation of test is a dummy (all "out of roi"), and train_extra has coarse annotations only.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
from pathlib import Path

from lednet.cli.common import (
    SEED,
    add_num_workers_flag,
    make_parser,
    print_help_early,
    usable_cpus,
)

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train": 96, "val": 24, "test": 6, "train_extra": 24}


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "datasets" / "toy_cityscapes",
        help="folder to write (default: datasets/toy_cityscapes in the repository)",
    )
    for split, count in COUNTS.items():
        flag = f"--{split.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=count, help=f"scenes in {split}")
    parser.add_argument("--width", type=int, default=512, help="width in pixels")
    parser.add_argument("--height", type=int, default=256, help="height in pixels")
    parser.add_argument("--seed", type=SEED, default=1, help="random seed")
    add_num_workers_flag(parser, min(usable_cpus(), 8), "drawing processes")
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import numpy as np
from PIL import Image
from toy_scene import Scene, annotate, draw_scene

from lednet.data.labels import cityscapes_id_scheme
from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_atomically, write_json, write_text
from lednet.progress import progress_bar

DRAWING = 1
"""Version of the drawing; increased when the same seed gives other images."""

MIN_SIZE, MAX_SIZE = 64, 8192
COLORS = np.insert(cityscapes_id_scheme().palette, 3, 255, axis=1)
"""(256, 4) uint8: RGBA of each label id."""

CITIES = {
    "train": ("lilliput", "duckburg", "laputa", "emeraldcity"),
    "val": ("brobdingnag", "gotham"),
    "test": ("atlantis", "eldorado"),
    "train_extra": ("wonderland", "schilda"),
}
ANNOTATIONS = {"test": ("gtFine",), "train_extra": ("gtCoarse",)}
"""Annotations on disk of a split; of the others both."""


def frame_name(split: str, index: int) -> str:
    """City, sequence and frame, as in aachen_000000_000019."""
    cities = CITIES[split]
    return f"{cities[index % len(cities)]}_{index // len(cities):06d}_000019"


def toy_scene(seed: int, split: str, index: int, width: int, height: int) -> Scene:
    """Scene number `index` of a split; it depends on the arguments alone."""
    return draw_scene(random.Random(f"{seed}/{split}/{index}"), width, height)


def write_png(path: Path, pixels: np.ndarray) -> None:
    with write_atomically(path) as temporary:
        Image.fromarray(pixels).save(temporary, compress_level=3)


def write_scene(root: Path, seed: int, width: int, height: int, item: tuple[str, int]) -> None:
    """Draw scene `item` = (split, index) and write its image and the files of its annotations."""
    split, index = item
    scene, name = toy_scene(seed, split, index, width, height), frame_name(split, index)
    within = Path(split) / name.split("_")[0]
    truths = {"gtFine": scene.fine, "gtCoarse": scene.coarse}
    if split == "test":
        corners = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
        outline = {"label": "out of roi", "polygon": corners}
        truths["gtFine"] = annotate([outline], width, height)
    write_png(root / "leftImg8bit" / within / f"{name}_leftImg8bit.png", scene.image)
    for kind in ANNOTATIONS.get(split, truths):
        truth, stem = truths[kind], f"{root / kind / within / name}_{kind}"
        write_png(Path(f"{stem}_labelIds.png"), truth.label_ids)
        write_png(Path(f"{stem}_instanceIds.png"), truth.instance_ids)
        write_png(Path(f"{stem}_color.png"), COLORS[truth.label_ids])
        polygons = {"imgHeight": height, "imgWidth": width, "objects": truth.objects}
        write_text(f"{stem}_polygons.json", json.dumps(polygons) + "\n")


def claim(root: Path, options: dict) -> bool:
    """Mark `root` as a toy set by toy.json; False if the finished set already exists.

    Temporary files of an interrupted run are removed. Raises a `UserError` if `root` contains
    something else.
    """
    marker = root / "toy.json"
    if marker.exists():
        found = read_json(marker)
        if not isinstance(found, dict) or found.get("options") != options:
            raise UserError(
                f"{root} holds a toy set with other options (see its toy.json); "
                "remove it or choose another --out"
            )
        if found.get("complete", False):
            return False
        for pattern in (".*_leftImg8bit.*", ".*_gtFine_*", ".*_gtCoarse_*"):
            for path in root.rglob(pattern):
                path.unlink()
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root} exists and is not a toy set, so it may be real data; choose another --out"
        )
    write_json(marker, {"options": options, "complete": False})
    return True


def write_toy_cityscapes(
    root: str | os.PathLike,
    train: int = 96,
    val: int = 24,
    test: int = 6,
    train_extra: int = 24,
    width: int = 512,
    height: int = 256,
    seed: int = 1,
    workers: int = 1,
) -> bool:
    """Write the toy data set to `root`; the files do not depend on `workers`.

    A set that was interrupted is completed if the options are the same.

    Args:
        train, val, test, train_extra: number of scenes.

    Returns:
        False if the same set already exists.

    Raises:
        UserError: sizes or counts out of range, or `root` contains something else.
    """
    root = Path(root)
    counts = {"train": train, "val": val, "test": test, "train_extra": train_extra}
    if min(counts.values()) < 0 or sum(counts.values()) == 0 or workers < 1:
        raise UserError("there must be some scenes and at least one worker; raise the counts")
    if min(width, height) < MIN_SIZE or max(width, height) > MAX_SIZE:
        raise UserError(
            f"{width}x{height} is out of range; give {MIN_SIZE} to {MAX_SIZE} pixels a side"
        )
    options = {**counts, "width": width, "height": height, "seed": seed, "drawing": DRAWING}
    if not claim(root, options):
        return False
    items = [(split, index) for split, count in counts.items() for index in range(count)]
    work = functools.partial(write_scene, root, seed, width, height)
    with multiprocessing.Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        done = pool.imap_unordered(work, items, chunksize=2) if pool else map(work, items)
        for _ in progress_bar(done, total=len(items), desc="draw", unit="scene"):
            pass
    write_json(root / "toy.json", {"options": options, "complete": True})
    return True


def main() -> None:
    options = vars(build_parser().parse_args())
    root, workers = options.pop("out"), options.pop("num_workers")
    written = write_toy_cityscapes(root, **options, workers=workers)
    print(f"wrote {root}" if written else f"already there: {root}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
