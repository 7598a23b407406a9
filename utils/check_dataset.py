"""Look at every file of a data set and say what is wrong with it.

    python utils/check_dataset.py --datadir /data/cityscapes
    python utils/check_dataset.py --dataset camvid --datadir /data/camvid
    python utils/check_dataset.py --dataset folders --datadir mine --val-every 6

Pairs, sizes, modes, damaged files, values that labels should not hold, classes that do not occur,
images that two splits share: prints what it finds, and leaves report.html, report.json and
sheet.png (labels on their images, the most doubtful first) in --out. A core looks at 13 Cityscapes
pairs a second, or 350 of CamVid. docs/check_dataset.md explains each finding.

Exit status: 0 if there is nothing to mend, 1 if something was found (see --fail-on), 2 if the
check could not run.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from lednet.data.registry import DATASETS
from lednet.errors import UserError, exit_on_user_error
from lednet.io import write_json
from lednet.training.losses import WEIGHT_OFFSETS, class_weights
from lednet.validation.checks import ValidationReport, validate_dataset
from lednet.validation.issues import SEVERITIES, counted
from lednet.validation.report import summary, worst_aligned, write_dataset_page, write_sheet
from lednet.validation.splits import CHECKED, open_splits

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--dataset", choices=DATASETS, default="cityscapes")
    parser.add_argument("--datadir", type=Path, help="data set's folder (datasets/<dataset>)")
    parser.add_argument("--annotations", choices=CHECKED, default="fine",
                        help="Cityscapes: coarse checks train_extra too. VOC: aug is trainaug")
    parser.add_argument("--labels", choices=("auto", "labelIds", "labelTrainIds"), default="auto",
                        help="what Cityscapes label files hold (told by their names)")
    parser.add_argument("--classes", type=Path, help="class file of own data (classes.yaml)")
    parser.add_argument("--val-every", type=int, default=0, metavar="N",
                        help="the hold-out that the training is to use")
    parser.add_argument("--val-names", metavar="PREFIX", help="the same")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder of the reports (save/check-<dataset>)")
    parser.add_argument("--images", type=int, default=12, metavar="N",
                        help="pairs on the contact sheet")
    parser.add_argument("--fail-on", choices=("error", "warning", "never"), default="warning",
                        help="the least finding that makes the exit status 1 (warning)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="decoding processes; 0 decodes in this one (one a core)")
    # fmt: on
    return parser


def print_findings(diagnosis: ValidationReport) -> None:
    for finding in diagnosis.findings:
        print(f"{finding.severity:8} {finding}")
    pairs = ", ".join(f"{len(split.pairs):,} {split.name}" for split in diagnosis.splits)
    counts = ", ".join(counted(diagnosis.count(severity), severity) for severity in SEVERITIES)
    print(f"{diagnosis.root}: {pairs} pairs; {counts}")


def main() -> None:
    args = build_parser().parse_args()
    if args.workers < 0 or args.images < 0 or args.val_every < 0:
        raise UserError("--workers, --images and --val-every cannot be negative: give 0 or more")
    root = args.datadir or ROOT / "datasets" / args.dataset
    out = args.out or ROOT / "save" / f"check-{args.dataset}"
    splits, findings = open_splits(
        args.dataset,
        root,
        annotations=args.annotations,
        labels=args.labels,
        class_file=args.classes,
        val_every=args.val_every,
        val_names=args.val_names,
    )
    diagnosis = validate_dataset(root, splits, findings, args.workers)
    weights = {}
    if diagnosis.shares is not None:
        weights = {
            f"c = {offset:.2f}": class_weights(diagnosis.shares[:-1], offset).tolist()
            for offset in sorted(WEIGHT_OFFSETS.values())
        }
    rows = worst_aligned(diagnosis, args.images)
    if rows:
        write_sheet(out / "sheet.png", rows, diagnosis)
    write_dataset_page(out / "report.html", f"{root.name}: data set", diagnosis, rows, weights)
    command = {"command": shlex.join(["python", *sys.argv]), "dataset": args.dataset}
    write_json(out / "report.json", command | summary(diagnosis, weights))
    print_findings(diagnosis)
    print(f"page, values and contact sheet: {out}")
    grave = SEVERITIES[: SEVERITIES.index(args.fail_on) + 1] if args.fail_on != "never" else ()
    sys.exit(int(any(map(diagnosis.count, grave))))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
