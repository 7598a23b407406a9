"""Decode a data set once, to be read by training at the speed of memory.

    python datasets/prepare_cityscapes.py --datadir /data/cityscapes
    python train/main.py --datadir /data/cityscapes --cache datasets/cache/cityscapes-512x1024

Takes every data set that train/main.py takes, with the same flags, and prints the command
that trains on it. Cityscapes fine is 7.3 GB and some minutes, coarse or both 48 GB more in the
same folder. An interrupted build goes on when the command is given again; a finished one is
brought up to date, by the shards whose files have changed. --verify changes nothing and reads
every byte.
"""

import argparse
import os
from pathlib import Path

from lednet.data.cache import CachedDataset, build_cache, command_line
from lednet.data.registry import DATASETS, TRAINING_PARTS, cache_split, open_training_data
from lednet.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--dataset", choices=DATASETS, default="cityscapes")
    parser.add_argument("--datadir", type=Path, help="data set's folder (datasets/<dataset>)")
    parser.add_argument("--annotations", choices=TRAINING_PARTS, default="fine",
                        help="Cityscapes: coarse is train_extra and train, both is train, finely "
                        "annotated, and train_extra, coarsely; each with fine val. VOC: aug is "
                        "trainaug")
    parser.add_argument("--labels", choices=("auto", "labelIds", "labelTrainIds"), default="auto",
                        help="what Cityscapes label files hold (told by their names)")
    parser.add_argument("--classes", type=Path, help="class file of own data (classes.yaml)")
    parser.add_argument("--val-every", type=int, default=0, metavar="N",
                        help="no val split: hold out every N-th training image instead")
    parser.add_argument("--val-names", metavar="PREFIX",
                        help="or those whose names begin so, a whole recording for instance")
    parser.add_argument("--with-val", action="store_true", help="as the training")
    parser.add_argument("--height", type=int, help="training height in pixels (Cityscapes: 512)")
    parser.add_argument("--width", type=int, help="training width in pixels (Cityscapes: 1024)")
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="folder to write (datasets/cache/<dataset>-<height>x<width>)")
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
    for name, least in (("height", 1), ("width", 1), ("val_every", 0), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is too small: give {least} or more")
    train, val = open_training_data(
        args.dataset,
        args.datadir or ROOT / "datasets" / args.dataset,
        args.height,
        args.width,
        annotations=args.annotations,
        labels=args.labels,
        class_file=args.classes,
        val_every=args.val_every,
        val_names=args.val_names,
        with_val=args.with_val,
    )
    _, height, width = train.encoded_shape
    if args.cache is None:
        args.cache = ROOT / "datasets" / "cache" / f"{args.dataset}-{height}x{width}"
    splits = {cache_split(args.annotations): train, "val": val}
    if not args.verify:
        build_cache(args.cache, splits, args.workers, args.rebuild)
    options, defaults = vars(args), vars(build_parser().parse_args([]))
    command = command_line(Path(__file__).resolve(), options, defaults)
    for name, source in splits.items():
        cached = CachedDataset(args.cache / name, source, command)
        if args.verify:
            cached.verify()
    print(f"{args.cache}: {len(train)} and {len(val)} pairs, {height}x{width}; train with")
    print(command_line(ROOT / "train/main.py", options, defaults))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
