"""Print the share of each class in the training labels, and the class weights.

    python utils/class_weights.py --datadir /data/cityscapes
    python utils/class_weights.py --dataset camvid --datadir /data/camvid --offsets 1.02 1.1
    python utils/class_weights.py --dataset folders --datadir mine --format json > weights.json

The weight of a class is 1 / ln(c + share), with its share of all pixels, void included. It is the
weight of train/main.py --class-weights computed, with c = 1.2 in stage 1 and 1.1 after it. Only
labels are read.
"""

import argparse

from lednet.cli import common


def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    # fmt: off
    common.add_dataset_flags(parser, hold_out="the same value as in training")
    parser.add_argument("--offsets", type=float, nargs="+", metavar="C", default=[1.1, 1.2],
                        help="c of the formula; smaller values give more weight to rare classes. "
                             "1.1 and 1.2 are those of the paper's full network and encoder stage")
    parser.add_argument("--format", choices=("table", "yaml", "json"), default="table",
                        help="output format")
    common.add_num_workers_flag(parser, common.usable_cpus(), "decoding threads")
    # fmt: on
    return parser


if __name__ == "__main__":
    common.print_help_early(build_parser)

import json

import yaml

from lednet.data.dataset import pixel_shares
from lednet.data.registry import open_training_data
from lednet.errors import UserError, exit_on_user_error
from lednet.training.losses import class_weights


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
        raise UserError(f"--offsets {min(args.offsets):g} gives a class an infinite weight: give "
                        "more than 1")  # fmt: skip
    root = args.datadir or common.ROOT / "datasets" / args.dataset
    train, _ = open_training_data(args.dataset, root, **common.dataset_options(args))
    shares = pixel_shares(train.class_counts(max(1, args.num_workers))).tolist()
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
