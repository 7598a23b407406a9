"""Score weights on a data set: IoU of each class, mIoU, pixel accuracy.

    python test/eval_iou.py --weights save/cityscapes-d20 --datadir /data/cityscapes
    python test/eval_iou.py --weights best.pth --dataset camvid --datadir /data/camvid

The image is resized to the network's input, and the logits are resized to the label's size before
the argmax. With --eval-size network the labels are resized instead, as during training. Weights of
the original release can be loaded too.
"""

import argparse
from pathlib import Path

from lednet.cli.common import (
    POSITIVE,
    add_alias,
    add_backend_flags,
    add_dataset_flags,
    add_input_size_flags,
    add_num_workers_flag,
    add_test_time_flags,
    make_parser,
    print_help_early,
)

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth), released name or exported "
                             "file")
    add_dataset_flags(parser, ("fine", "coarse"), "the hold-out that the training used")
    parser.add_argument("--subset", choices=("train", "train_extra", "val", "test"), default="val",
                        help="split to evaluate")
    parser.add_argument("--eval-size", choices=("full", "network"), default="full",
                        help="evaluate at the size of the label files or of the network's input")
    add_alias(parser, "--at", "--eval-size")
    add_input_size_flags(parser)
    add_test_time_flags(parser)
    parser.add_argument("--batch-size", type=POSITIVE, default=1, help="images per batch")
    add_num_workers_flag(parser, 2)
    add_backend_flags(parser, fold=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the IoU of each class")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG",
                        help="draw input, truth and prediction of some images")
    add_alias(parser, "--sheet", "--contact-sheet")
    parser.add_argument("--sheet-images", type=POSITIVE, default=6, metavar="N",
                        help="images on the contact sheet")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import shlex
import sys

from torch.utils.data import DataLoader, default_collate

from lednet.data.registry import DEFAULT_SIZES, open_dataset
from lednet.device import choose_device
from lednet.errors import UserError, exit_on_user_error
from lednet.evaluation.evaluator import (
    PREDICTED_ONLY,
    class_presence,
    count_scored,
    evaluate,
    require_labels,
)
from lednet.inference.predictor import Predictor
from lednet.inference.writers import sample_sheet
from lednet.io import require_writable, write_json
from lednet.plots import plot_class_iou
from lednet.progress import progress_bar


def collate(samples: list) -> list:
    if len({target.shape for _, target in samples}) > 1:
        raise UserError("the labels of a batch differ in size: use --batch-size 1")
    return default_collate(samples)


def print_table(result: dict) -> None:
    width = max(map(len, result["class_iou"]))
    scores = ("mIoU", result["miou"]), ("pixel accuracy", result["pixel_accuracy"])
    for name, score in (*result["class_iou"].items(), *scores):
        print(f"{name:{width}}  {'absent' if score is None else f'{score:6.4f}'}", end="")
        only = result["class_presence"].get(name) == PREDICTED_ONLY and score == 0
        print("  in no label, but predicted" * only)


def main() -> None:
    args = build_parser().parse_args()
    require_writable(args.json)
    require_writable(args.plot, (".png", ".jpg", ".jpeg", ".pdf", ".svg"))
    require_writable(args.contact_sheet, (".png", ".jpg", ".jpeg"))
    root = args.datadir or ROOT / "datasets" / args.dataset
    data = open_dataset(
        args.dataset, root, args.subset, annotations=args.annotations, labels=args.labels,
        class_file=args.classes, val_stride=args.val_stride, val_prefix=args.val_prefix,
    )  # fmt: skip
    predictor = Predictor.from_weights(
        args.weights, data.scheme, DEFAULT_SIZES.get(args.dataset), args.height, args.width,
        device=choose_device(args.device), backend=args.backend, precision=args.precision,
        fold=args.fold, scales=args.scales, flip=args.flip,
    )  # fmt: skip
    if args.eval_size == "network":
        data.size = predictor.size
    loader: DataLoader = DataLoader(
        data, args.batch_size, num_workers=args.num_workers, collate_fn=collate
    )
    batches = progress_bar(loader, desc=args.subset, unit="batch")
    confusion = evaluate(predictor.label_maps, batches, data.scheme.num_classes, predictor.device)
    where = f"{root} {args.subset}"
    require_labels(confusion, where)
    result = confusion.summary(data.scheme.classes)
    presence = class_presence(result["class_iou"], confusion.counts.sum(dim=1).tolist())
    result |= {
        "class_presence": presence,
        "command": shlex.join(["python", *sys.argv]),
        "images": len(data),
        "weights": str(args.weights),
        "dataset": args.dataset,
        "subset": args.subset,
        "network_size": list(predictor.size),
        "scales": list(predictor.scales),
        "flip": predictor.flip,
        "scored_at": args.eval_size,
    }
    print_table(result)
    height, width = predictor.size
    print(
        f"{count_scored(presence)}, {len(data)} images of {where}, network {height}x{width}, "
        "scored at "
        f"{'the label files' if args.eval_size == 'full' else 'the network'}' size"
    )
    title = f"{root.name} {args.subset}: mIoU {result['miou']:.3f} of {count_scored(presence)}"
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot_class_iou(result["class_iou"], data.scheme, args.plot, title)
    if args.contact_sheet:
        sample_sheet(predictor, data, args.contact_sheet, args.sheet_images)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
