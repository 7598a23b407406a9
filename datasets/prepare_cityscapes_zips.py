"""Unpack the official Cityscapes zips, and check that the tree is complete.

    python datasets/prepare_cityscapes_zips.py ~/Downloads --datadir /data/cityscapes
    python datasets/prepare_cityscapes_zips.py leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
    python datasets/prepare_cityscapes_zips.py --datadir /data/cityscapes      # only the check

Accepts any of leftImg8bit_trainvaltest.zip (11 GB), gtFine_trainvaltest.zip (241 MB),
gtCoarse.zip (1.3 GB) and leftImg8bit_trainextra.zip (44 GB). Only files of the official tree are
unpacked, each one atomically. An interrupted run is resumed by the same command: existing files
with the right size and checksum are kept. If something is missing, the exit status is 2.
"""

import argparse
from pathlib import Path

from lednet.cli.common import ROOT, make_parser, print_help_early


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("zips", type=Path, nargs="*",
                        help="official zips, or folders that hold them; none: only check the tree")
    parser.add_argument("--datadir", type=Path, default=ROOT / "datasets" / "cityscapes",
                        help="folder to unpack into (default: datasets/cityscapes)")
    # fmt: on
    for flag, encoding, note in (
        ("--labels-from-polygons", "labelIds", ""),
        ("--train-ids-from-polygons", "labelTrainIds", "; training here does not need them"),
    ):
        text = f"draw missing *_{encoding}.png from *_polygons.json{note}"
        parser.add_argument(flag, action="store_true", help=text)
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

from lednet.data.pairs import list_examples
from lednet.data.prepare.cityscapes_tree import BLACK_FRAME, check_tree, find_archives, open_archive
from lednet.data.prepare.polygons import write_missing_labels
from lednet.data.prepare.zips import extract_all
from lednet.errors import UserError, exit_on_user_error, raise_if_problems


def main() -> None:
    args = build_parser().parse_args()
    root = args.datadir
    archives = [open_archive(path) for path in find_archives(args.zips)]
    for archive in archives:
        if names := archive.left_out:
            print(f"{archive.path}: {len(names)} files are not part of the tree and are not "
                  f"unpacked ({list_examples(names)})")  # fmt: skip
    if archives:
        written = extract_all(archives, root)
        files = sum(len(archive.files) for archive in archives)
        print(f"{root}: {written:,} files written, {files - written:,} existed already")
    elif not root.is_dir():
        raise UserError(f"no folder {root}: name the official zips, or --datadir")
    problems: dict[str, None] = {}
    for encoding, wanted in (
        ("labelIds", args.labels_from_polygons),
        ("labelTrainIds", args.train_ids_from_polygons),
    ):
        if wanted:
            drawn, unread = write_missing_labels(root, encoding)
            print(f"{root}: {drawn:,} {encoding} drawn from polygons")
            problems |= dict.fromkeys(unread)
    table, incomplete = check_tree(root)
    if not table:
        raise UserError(f"{root} holds no files of Cityscapes: name the official zips")
    print(table)
    black = root / f"leftImg8bit/train_extra/troisdorf/{BLACK_FRAME}_leftImg8bit.png"
    if black.exists():
        print(f"{black} is black, as published, and its coarse label empty: leave both or remove "
              "both")  # fmt: skip
    raise_if_problems([*problems, *incomplete])
    print(f"{root}: all unpacked folders are complete")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
