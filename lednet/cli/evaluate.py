"""The command `lednet evaluate`: score weights on a data set."""

import os
from collections.abc import Sequence

from torch.utils.data import DataLoader, default_collate

from lednet.cli import parsers
from lednet.cli.common import ROOT, dataset_options, predictor_options, report_header
from lednet.data.dataset import SegmentationDataset
from lednet.data.registry import open_dataset
from lednet.errors import UserError
from lednet.evaluation.evaluator import (
    PREDICTED_ONLY,
    class_presence,
    count_scored,
    evaluate,
    require_labels,
)
from lednet.inference.predictor import Predictor
from lednet.io import require_writable, write_json
from lednet.plots import contact_sheet, plot_class_iou
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


def draw_samples(
    predictor: Predictor, data: SegmentationDataset, path: str | os.PathLike, images: int
) -> None:
    """Draw a contact sheet of `images` images spaced evenly over a data set to a PNG file."""
    count = min(images, len(data))
    samples = (data.read(i * len(data) // count) for i in range(count))
    rows = [(image, target, predictor(image).labels) for image, target in samples]
    contact_sheet(rows, data.scheme, path)


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate, print a table, and write the files; returns the scores and their conditions."""
    args = parsers.evaluate().parse_args(argv)
    require_writable(args.json)
    require_writable(args.plot, (".png", ".jpg", ".jpeg", ".pdf", ".svg"))
    require_writable(args.contact_sheet, (".png", ".jpg", ".jpeg"))
    root = args.datadir or ROOT / "datasets" / args.dataset
    data = open_dataset(args.dataset, root, args.subset, **dataset_options(args))
    options = predictor_options(args)
    predictor = Predictor(args.weights, scheme=data.scheme, expected_images=len(data), **options)
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
        **report_header(args, predictor),
        "images": len(data),
        "dataset": args.dataset,
        "subset": args.subset,
        "scales": list(predictor.scales),
        "flip": predictor.flip,
        "scored_at": args.eval_size,
    }
    print_table(result)
    height, width = predictor.size
    print(
        f"{count_scored(presence)}, {len(data)} images of {where}, network {height}x{width}, "
        "scored at "
        f"{'the label files' if args.eval_size == 'full' else 'the network'}' size, backend "
        f"{predictor.backend}"
    )
    title = f"{root.name} {args.subset}: mIoU {result['miou']:.3f} of {count_scored(presence)}"
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot_class_iou(result["class_iou"], data.scheme, args.plot, title)
    if args.contact_sheet:
        draw_samples(predictor, data, args.contact_sheet, args.sheet_images)
    return result
