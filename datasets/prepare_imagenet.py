"""Decode ImageNet, or any folder of classes, once, to be read at the speed of memory.

    python datasets/prepare_imagenet.py --datadir /data/imagenet --cache /fast/imagenet
    python imagenet/lednet_imagenet.py --datadir /data/imagenet --cache /fast/imagenet

The folder holds train/<class>/<image> and val/<class>/<image>. Every picture is brought to a
square of --stored-size pixels, which training cuts its crops from: ImageNet is 262 GB at 256.
Prints the command that trains on it. An interrupted build goes on when the command is given
again; a finished one is brought up to date, by the shards whose files have changed. --verify
changes nothing and reads every byte.
"""

import argparse
import os
from pathlib import Path

from lednet.data.cache import CLASSIFICATION_FLAGS, CachedDataset, build_cache, command_line
from lednet.data.imagefolder import ImageFolderDataset
from lednet.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--datadir", type=Path, default=ROOT / "datasets/imagenet",
                        help="folder with train/ and val/ (datasets/imagenet)")
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="folder to write (datasets/cache/imagenet-<stored size>)")
    parser.add_argument("--stored-size", type=int, default=256, metavar="S",
                        help="height and width of the stored squares in pixels (256)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="decoding processes; 0 decodes in this one (one a core)")
    parser.add_argument("--rebuild", action="store_true",
                        help="replace a cache of other options, or of other library versions")
    parser.add_argument("--verify", action="store_true",
                        help="write nothing: compare a finished cache with its checksums")
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    for name, least in (("stored_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is too small: give {least} or more")
    if args.cache is None:
        args.cache = ROOT / "datasets" / "cache" / f"imagenet-{args.stored_size}"
    train = ImageFolderDataset(args.datadir / "train", args.stored_size)
    val = ImageFolderDataset(args.datadir / "val", args.stored_size, train.classes)
    splits = {"train": train, "val": val}
    if not args.verify:
        build_cache(args.cache, splits, args.workers, args.rebuild)
    options, defaults = vars(args), vars(build_parser().parse_args([]))
    command = command_line(Path(__file__).resolve(), options, defaults, CLASSIFICATION_FLAGS)
    for name, source in splits.items():
        cached = CachedDataset(args.cache / name, source, command)
        if args.verify:
            cached.verify()
    print(
        f"{args.cache}: {len(train)} and {len(val)} images of {len(train.classes)} classes, "
        f"{args.stored_size}x{args.stored_size}; train with"
    )
    script = ROOT / "imagenet/lednet_imagenet.py"
    print(command_line(script, options, defaults, CLASSIFICATION_FLAGS))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
