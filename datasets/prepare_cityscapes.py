"""Decode a data set once into a cache, from which training reads as fast as from memory.

    python datasets/prepare_cityscapes.py --datadir /data/cityscapes
    python train/main.py --datadir /data/cityscapes --cache datasets/cache/cityscapes-512x1024

Accepts every data set of train/main.py with the same flags, and prints the training command.
Cityscapes fine takes 7.3 GB and some minutes; coarse or both take another 48 GB in the same
folder. An interrupted build is resumed by the same command, which also updates a finished cache
by decoding the shards whose files have changed. --verify reads everything and changes nothing.
"""

import argparse
from pathlib import Path

from lednet.cli import common
from lednet.cli.common import ROOT
from lednet.cli.prepare_cache import add_cache_flags, build_or_verify


def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    common.add_dataset_flags(parser)
    parser.add_argument(
        "--with-val", action="store_true", help="train on the validation images too"
    )
    common.add_input_size_flags(parser, "that of the data set, 512x1024 for Cityscapes")
    add_cache_flags(parser, "datasets/cache/<dataset>-<height>x<width>")
    return parser


if __name__ == "__main__":
    common.print_help_early(build_parser)

from lednet.data.cache import SEGMENTATION_FLAGS, command_line
from lednet.data.registry import cache_split, open_training_data
from lednet.errors import exit_on_user_error


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    train, val = open_training_data(
        args.dataset, args.datadir or ROOT / "datasets" / args.dataset, args.height, args.width,
        with_val=args.with_val, **common.dataset_options(args),
    )  # fmt: skip
    _, height, width = train.encoded_shape
    if args.cache is None:
        args.cache = ROOT / "datasets" / "cache" / f"{args.dataset}-{height}x{width}"
    splits = {cache_split(args.annotations): train, "val": val}
    build_or_verify(args, splits, Path(__file__).resolve(), parser, SEGMENTATION_FLAGS)
    print(f"{args.cache}: {len(train)} and {len(val)} pairs, {height}x{width}; train with")
    print(command_line(ROOT / "train/main.py", vars(args), vars(parser.parse_args([]))))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
