"""Unpack the official Cityscapes zips, and check that the tree is complete.

    python datasets/prepare_cityscapes_zips.py ~/Downloads --datadir /data/cityscapes
    python datasets/prepare_cityscapes_zips.py leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip
    python datasets/prepare_cityscapes_zips.py --datadir /data/cityscapes      # only the check

Any of leftImg8bit_trainvaltest.zip (11 GB), gtFine_trainvaltest.zip (241 MB), gtCoarse.zip
(1.3 GB) and leftImg8bit_trainextra.zip (44 GB) will do. Only the files of the official tree are
unpacked, each one whole or not at all. If it is stopped, the same command goes on: what is there
with the right checksum is left alone. Exit status 2 and a sentence if something is missing.
"""

import argparse
from pathlib import Path

from lednet.data.pairs import list_examples
from lednet.data.prepare.cityscapes_tree import check_tree, find_archives, open_archive
from lednet.data.prepare.polygons import write_missing_labels
from lednet.data.prepare.zips import unpack_all
from lednet.errors import UserError, exit_on_user_error, raise_if_problems

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("zips", type=Path, nargs="*",
                        help="official zips, or folders that hold them; none: only check the tree")
    parser.add_argument("--datadir", type=Path, default=ROOT / "datasets" / "cityscapes",
                        help="folder to unpack into (datasets/cityscapes)")
    parser.add_argument("--labels-from-polygons", action="store_true",
                        help="draw the *_labelIds.png that are not there from *_polygons.json")
    parser.add_argument("--train-ids-from-polygons", action="store_true",
                        help="and the *_labelTrainIds.png, for other programs: training here "
                        "needs none")
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    archives = [open_archive(path) for path in find_archives(args.zips)]
    for archive in archives:
        if archive.left_out:
            names = list_examples(archive.left_out)
            print(f"{archive.path}: {len(archive.left_out)} files are no part of the tree and stay "
                  f"inside ({names})")  # fmt: skip
    if archives:
        written = unpack_all(archives, args.datadir)
        files = sum(len(archive.files) for archive in archives)
        print(f"{args.datadir}: {written:,} files written, {files - written:,} were there already")
    elif not args.datadir.is_dir():
        raise UserError(f"no folder {args.datadir}: name the official zips, or --datadir")
    problems = []
    for encoding, wanted in (
        ("labelIds", args.labels_from_polygons),
        ("labelTrainIds", args.train_ids_from_polygons),
    ):
        if wanted:
            drawn, unread = write_missing_labels(args.datadir, encoding)
            print(f"{args.datadir}: {drawn:,} {encoding} drawn from polygons")
            problems += [problem for problem in unread if problem not in problems]
    tree = check_tree(args.datadir)
    if not tree.counts:
        raise UserError(f"{args.datadir} holds nothing of Cityscapes: name the official zips")
    print(tree.table())
    for note in tree.notes:
        print(note)
    raise_if_problems([*problems, *tree.problems])
    print(f"{args.datadir}: complete, as far as it was unpacked")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
