"""Decode ImageNet, or any folder of classes, once into a cache for fast training.

    python datasets/prepare_imagenet.py --datadir /data/imagenet --cache /fast/imagenet
    python imagenet/lednet_imagenet.py --datadir /data/imagenet --cache /fast/imagenet

The folder holds train/<class>/<image> and val/<class>/<image>. Every image is resized to a
square of --stored-size pixels, from which training takes its crops: ImageNet takes 262 GB at 256.
Prints the training command. An interrupted build is resumed by the same command, which also
updates a finished cache by decoding the shards whose files have changed. --verify reads
everything and changes nothing.
"""

import argparse
from pathlib import Path

from lednet.cli.common import POSITIVE, ROOT, make_parser, print_help_early
from lednet.cli.prepare_cache import add_cache_flags, build_or_verify


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--datadir", type=Path, default=ROOT / "datasets/imagenet",
                        help="folder with train/ and val/ (default: datasets/imagenet)")
    parser.add_argument("--stored-size", type=POSITIVE, default=256, metavar="S",
                        help="height and width of the stored squares in pixels")
    # fmt: on
    add_cache_flags(parser, "datasets/cache/imagenet-<stored size>")
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

from lednet.data.cache import CLASSIFICATION_FLAGS, command_line
from lednet.data.imagefolder import ImageFolderDataset
from lednet.errors import exit_on_user_error


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.cache is None:
        args.cache = ROOT / "datasets" / "cache" / f"imagenet-{args.stored_size}"
    train = ImageFolderDataset(args.datadir / "train", args.stored_size)
    val = ImageFolderDataset(args.datadir / "val", args.stored_size, train.classes)
    splits = {"train": train, "val": val}
    build_or_verify(args, splits, Path(__file__).resolve(), parser, CLASSIFICATION_FLAGS)
    print(
        f"{args.cache}: {len(train)} and {len(val)} images of {len(train.classes)} classes, "
        f"{args.stored_size}x{args.stored_size}; train with"
    )
    script, defaults = ROOT / "imagenet/lednet_imagenet.py", vars(parser.parse_args([]))
    print(command_line(script, vars(args), defaults, CLASSIFICATION_FLAGS))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
