"""The command `lednet check`: check the files of a data set."""

import shlex
import sys
from collections.abc import Sequence

from lednet.cli import parsers
from lednet.cli.common import ROOT, dataset_options
from lednet.io import process_command, require_writable, write_json
from lednet.training.losses import WEIGHT_OFFSETS, class_weights
from lednet.validation.checks import validate_dataset
from lednet.validation.issues import SEVERITIES, counted
from lednet.validation.report import summary, worst_aligned, write_dataset_page, write_sheet
from lednet.validation.splits import open_splits


def main(argv: Sequence[str] | None = None) -> None:
    args = parsers.check().parse_args(argv)
    root = args.datadir or ROOT / "datasets" / args.dataset
    out = args.out or ROOT / "save" / f"check-{args.dataset}"
    require_writable(out, folder=True)
    splits, issues = open_splits(args.dataset, root, **dataset_options(args))
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
    command = {"command": shlex.join(process_command()), "dataset": args.dataset}
    write_json(out / "report.json", command | summary(report, weights))
    for issue in report.issues:
        print(f"{issue.severity:8} {issue}")
    pairs = ", ".join(f"{len(split.pairs):,} {split.name}" for split in splits)
    counts = ", ".join(counted(report.count(severity), severity) for severity in SEVERITIES)
    print(f"{root}: {pairs} pairs; {counts}")
    print(f"reports: {out}")
    failing = () if args.fail_on == "never" else SEVERITIES[: SEVERITIES.index(args.fail_on) + 1]
    sys.exit(int(any(map(report.count, failing))))
