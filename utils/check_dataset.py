"""Inspect every file of a data set and report what is wrong with it.

    python utils/check_dataset.py --datadir /data/cityscapes
    python utils/check_dataset.py --dataset camvid --datadir /data/camvid
    python utils/check_dataset.py --dataset folders --datadir mine --val-stride 6

Checks pairs, sizes, modes, damaged files, label values, absent classes, and images that occur in
two splits. Prints the findings, and writes report.html, report.json and sheet.png (labels on their
images, worst aligned first) to --out. A core inspects 13 Cityscapes pairs a second, or 350 of
CamVid. docs/check_dataset.md explains each finding.

Exit status: 0 without findings, 1 with findings (see --fail-on), 2 if the check could not run.
"""

import argparse
import os
from pathlib import Path

from lednet.cli.common import (
    COUNT,
    add_dataset_flags,
    add_num_workers_flag,
    make_parser,
    print_help_early,
)

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    add_dataset_flags(parser, ("fine", "coarse", "aug"), "the hold-out that training will use")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder of the reports (default: save/check-<dataset>)")
    parser.add_argument("--images", type=COUNT, default=12, metavar="N",
                        help="pairs on the contact sheet")
    parser.add_argument("--fail-on", choices=("error", "warning", "never"), default="warning",
                        help="lowest severity that makes the exit status 1")
    add_num_workers_flag(parser, os.cpu_count() or 1,
                         "decoding processes; 0 decodes in the main process")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import shlex
import sys

from lednet.errors import exit_on_user_error
from lednet.io import require_writable, write_json
from lednet.training.losses import WEIGHT_OFFSETS, class_weights
from lednet.validation.checks import validate_dataset
from lednet.validation.issues import SEVERITIES, counted
from lednet.validation.report import summary, worst_aligned, write_dataset_page, write_sheet
from lednet.validation.splits import open_splits


def main() -> None:
    args = build_parser().parse_args()
    root = args.datadir or ROOT / "datasets" / args.dataset
    out = args.out or ROOT / "save" / f"check-{args.dataset}"
    require_writable(out, folder=True)
    splits, issues = open_splits(
        args.dataset, root, annotations=args.annotations, labels=args.labels,
        class_file=args.classes, val_stride=args.val_stride, val_prefix=args.val_prefix,
    )  # fmt: skip
    report = validate_dataset(root, splits, issues, args.num_workers)
    weights = {}
    if report.shares is not None:
        weights = {
            f"c = {offset:.2f}": class_weights(report.shares[:-1], offset).tolist()
            for offset in sorted(WEIGHT_OFFSETS.values())
        }
    rows = worst_aligned(report, args.images)
    if rows:
        write_sheet(out / "sheet.png", rows, report)
    write_dataset_page(out / "report.html", f"{root.name}: data set", report, rows, weights)
    command = {"command": shlex.join(["python", *sys.argv]), "dataset": args.dataset}
    write_json(out / "report.json", command | summary(report, weights))
    for issue in report.issues:
        print(f"{issue.severity:8} {issue}")
    pairs = ", ".join(f"{len(split.pairs):,} {split.name}" for split in splits)
    counts = ", ".join(counted(report.count(severity), severity) for severity in SEVERITIES)
    print(f"{root}: {pairs} pairs; {counts}")
    print(f"reports: {out}")
    failing = () if args.fail_on == "never" else SEVERITIES[: SEVERITIES.index(args.fail_on) + 1]
    sys.exit(int(any(map(report.count, failing))))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
