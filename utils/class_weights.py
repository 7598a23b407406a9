"""Print how often each class occurs in the training labels, and the weights that follow.

    python utils/class_weights.py --datadir /data/cityscapes
    python utils/class_weights.py --dataset camvid --datadir /data/camvid --offsets 1.02 1.1
    python utils/class_weights.py --dataset folders --datadir mine --format json > weights.json

A class's weight is 1 / ln(c + share), its share being one of all pixels, void included: what
train/main.py --class-weights computed takes, c being 1.2 in stage 1 and 1.1 after it. Only
labels are read.
"""

import argparse
import json
import os
from pathlib import Path

import yaml

from lednet.data.dataset import pixel_shares
from lednet.data.registry import DATASETS, TRAINING_PARTS, open_training_data
from lednet.errors import UserError, exit_on_user_error
from lednet.training.losses import WEIGHT_OFFSETS, class_weights

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--dataset", choices=DATASETS, default="cityscapes")
    parser.add_argument("--datadir", type=Path, help="data set's folder (datasets/<dataset>)")
    parser.add_argument("--annotations", choices=TRAINING_PARTS, default="fine")
    parser.add_argument("--labels", choices=("auto", "labelIds", "labelTrainIds"), default="auto",
                        help="what Cityscapes label files hold (told by their names)")
    parser.add_argument("--classes", type=Path, help="class file of own data (classes.yaml)")
    parser.add_argument("--val-every", type=int, default=0, metavar="N",
                        help="the hold-out that the training is to use")
    parser.add_argument("--val-names", metavar="PREFIX", help="the same")
    parser.add_argument("--offsets", type=float, nargs="+", metavar="C",
                        default=sorted(WEIGHT_OFFSETS.values()),
                        help="c: the smaller, the heavier are rare classes (1.1 1.2, those of the "
                        "paper's full network and encoder stage)")
    parser.add_argument("--format", choices=("table", "yaml", "json"), default="table")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="decoding threads (one a core)")
    # fmt: on
    return parser


def print_table(result: dict) -> None:
    width = max(map(len, result["shares"]))
    print(f"{'':{width}}     share" + "".join(f"   c={c:<6g}" for c in result["weights"]))
    for name, share in result["shares"].items():
        weights = (column.get(name) for column in result["weights"].values())
        print(
            f"{name:{width}}  {share:8.4%}"
            + "".join(f"  {'ignored' if w is None else f'{w:.4f}':>8}" for w in weights)
        )
    print(f"{result['labels']:,} labels of {result['datadir']}, void included in the shares")


def main() -> None:
    args = build_parser().parse_args()
    if min(args.offsets) <= 1:
        raise UserError(f"--offsets {min(args.offsets):g}: give more than 1, so that no class gets "
                        "an infinite weight")  # fmt: skip
    if args.workers < 1:
        raise UserError("--workers is too small: give 1 or more")
    root = args.datadir or ROOT / "datasets" / args.dataset
    train, _ = open_training_data(
        args.dataset,
        root,
        annotations=args.annotations,
        labels=args.labels,
        class_file=args.classes,
        val_every=args.val_every,
        val_names=args.val_names,
    )
    shares = pixel_shares(train.class_counts(args.workers)).tolist()
    classes = train.scheme.classes
    result = {
        "datadir": str(root),
        "labels": len(train),
        "shares": dict(zip((*classes, "void"), shares, strict=True)),
        "weights": {
            c: dict(zip(classes, class_weights(shares[:-1], c).tolist(), strict=True))
            for c in args.offsets
        },
    }
    if args.format == "table":
        print_table(result)
    elif args.format == "json":
        print(json.dumps(result, indent=2))
    else:
        print(yaml.safe_dump(result, sort_keys=False, allow_unicode=True), end="")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
