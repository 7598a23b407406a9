"""Score weights on a data set: IoU of each class, mIoU, pixel accuracy.

    python test/eval_iou.py --weights save/cityscapes-d20 --datadir /data/cityscapes
    python test/eval_iou.py --weights best.pth --dataset camvid --datadir /data/camvid

The image is resized to the network's size, its logits back to the label's size, and
the argmax is taken there: what is scored is the label file as it is on disk. With
--at network the labels are resized instead, as during training. Weights of the
original release are opened too.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from lednet.data.dataset import SegmentationDataset
from lednet.data.registry import DATASETS, DEFAULT_SIZES, open_dataset
from lednet.device import AMP_DTYPES, choose_device
from lednet.errors import UserError, exit_on_user_error
from lednet.evaluation.evaluator import evaluate, require_labels
from lednet.inference.backends import BACKENDS
from lednet.inference.predictor import Predictor
from lednet.inference.writers import sample_sheet
from lednet.io import write_json
from lednet.metrics import ConfusionMatrix
from lednet.plots import plot_class_iou

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth) or exported file")
    parser.add_argument("--dataset", choices=DATASETS, default="cityscapes")
    parser.add_argument("--datadir", type=Path, help="data set's folder (datasets/<dataset>)")
    parser.add_argument("--subset", choices=("train", "train_extra", "val", "test"), default="val")
    parser.add_argument("--annotations", choices=("fine", "coarse"), default="fine")
    parser.add_argument("--labels", choices=("auto", "labelIds", "labelTrainIds"), default="auto",
                        help="what Cityscapes label files hold (told by their names)")
    parser.add_argument("--classes", type=Path, help="class file of own data (classes.yaml)")
    parser.add_argument("--val-every", type=int, default=0, metavar="N",
                        help="the hold-out that the training used")
    parser.add_argument("--val-names", metavar="PREFIX", help="the same")
    parser.add_argument("--at", choices=("full", "network"), default="full",
                        help="score at the label files' size, or at the network's")
    parser.add_argument("--height", type=int, help="network input in pixels (as trained)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S",
                        help="average the answers at these sizes, relative to the input (1)")
    parser.add_argument("--flip", action="store_true", help="and those to the mirrored image")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    parser.add_argument("--backend", choices=("auto", *BACKENDS),
                        help="what runs the network (eager); auto: the fastest that is installed")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True,
                        help="fold batch norm into the convolutions: the same answers, faster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw a bar for each class")
    parser.add_argument("--sheet", type=Path, metavar="PNG",
                        help="draw input | truth | prediction of some images")
    parser.add_argument("--sheet-images", type=int, default=6, metavar="N")
    # fmt: on
    return parser


def collate(samples: list) -> list:
    if len({target.shape for _, target in samples}) > 1:
        raise UserError("the labels of a batch differ in size: use --batch-size 1")
    return default_collate(samples)


def score(
    args: argparse.Namespace, predictor: Predictor, data: SegmentationDataset
) -> ConfusionMatrix:
    if args.at == "network":
        data.size = predictor.size
    loader: DataLoader = DataLoader(
        data, args.batch_size, num_workers=args.num_workers, collate_fn=collate
    )
    with tqdm(total=len(data), desc=f"{args.subset}", unit="image", dynamic_ncols=True) as bar:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for images, target in loader:
                yield images, target
                bar.update(len(images))

        return evaluate(predictor.label_maps, batches(), data.scheme.num_classes, predictor.device)


def print_table(result: dict) -> None:
    width = max(map(len, result["class_iou"]))
    for name, iou in result["class_iou"].items():
        print(f"{name:{width}}  {'absent' if iou is None else f'{iou:6.4f}'}")
    print(f"{'mIoU':{width}}  {result['miou']:6.4f}")
    print(f"{'pixel accuracy':{width}}  {result['pixel_accuracy']:6.4f}")


def main() -> None:
    args = build_parser().parse_args()
    root = args.datadir or ROOT / "datasets" / args.dataset
    data = open_dataset(
        args.dataset,
        root,
        args.subset,
        annotations=args.annotations,
        labels=args.labels,
        class_file=args.classes,
        val_every=args.val_every,
        val_names=args.val_names,
    )
    predictor = Predictor.from_weights(
        args.weights, data.scheme, DEFAULT_SIZES.get(args.dataset), args.height, args.width,
        device=choose_device(args.device), backend=args.backend, precision=args.precision,
        fold=args.fold, scales=args.scales, flip=args.flip,
    )  # fmt: skip
    confusion = score(args, predictor, data)
    where = f"{root} {args.subset}"
    require_labels(confusion, where)
    result = confusion.summary(data.scheme.classes)
    result |= {
        "command": shlex.join(["python", *sys.argv]),
        "images": len(data),
        "weights": str(args.weights),
        "dataset": args.dataset,
        "subset": args.subset,
        "network_size": list(predictor.size),
        "scales": list(predictor.scales),
        "flip": predictor.flip,
        "scored_at": args.at,
    }
    print_table(result)
    height, width = predictor.size
    print(
        f"{len(data)} images of {where}, network {height}x{width}, scored at "
        f"{'the label files' if args.at == 'full' else 'the network'}' size"
    )
    title = f"{root.name} {args.subset}: mIoU {result['miou']:.3f}"
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot_class_iou(result["class_iou"], data.scheme, args.plot, title)
    if args.sheet:
        sample_sheet(predictor, data, args.sheet, args.sheet_images)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
