"""The command `lednet export`: export a network to a file, and check its outputs."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from lednet.cli import parsers
from lednet.cli.common import dataset_options
from lednet.cli.live_page import SAMPLES
from lednet.data.image_io import open_image, to_rgb
from lednet.data.labels import require_classes
from lednet.data.registry import open_dataset
from lednet.errors import UserError
from lednet.evaluation.evaluator import evaluate, require_labels
from lednet.exporting.exporter import Parity, ParityError, export
from lednet.exporting.formats import FORMATS, MIN_TRACED_SIDE, ExportedModel, require_packages
from lednet.files import IMAGE_SUFFIXES, find_files
from lednet.hub import input_size, resolve_weights
from lednet.inference.predictor import Predictor
from lednet.io import require_writable
from lednet.model import LEDNet, load_model
from lednet.progress import progress_bar

EXIT_STATUS = 1
"""The outputs of the file differ from the network's."""
MIN_AGREEMENT = {"fp32": 0.9999, "int8": 0.9}
MAX_DIFFERENCE = {"fp32": 1e-3, "int8": 0.5}
"""Largest difference between two logits, relative to the largest logit."""


def list_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give a folder of images")
    paths = find_files(folder, IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {folder}: check the folder")
    return paths


def spread(paths: list[Path], count: int) -> list[Path]:
    """`count` evenly spaced `paths`, or all if there are fewer."""
    return [paths[i * len(paths) // count] for i in range(count)] if count < len(paths) else paths


def read_images(paths: list[Path] | None, name: str) -> Iterator[Image.Image]:
    """The images of `paths`, or else the samples of the live page."""
    if paths is None:
        paths = SAMPLES
    for path in progress_bar(paths, desc=name, unit="image"):
        yield Image.fromarray(to_rgb(open_image(path)))


def batch_of(image: Image.Image, size: Sequence[int]) -> np.ndarray:
    """(1, *size, 3) uint8"""
    return np.array(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))[None]


def batches(
    images: Iterable[Image.Image], size: Sequence[int], dynamic: bool
) -> Iterator[np.ndarray]:
    """Batches to compare on: (1, *size, 3); for `dynamic` also pairs of another, odd size."""
    odd = tuple(max(MIN_TRACED_SIDE, side * 3 // 4 | 1) for side in size)
    if dynamic:
        size = tuple(max(MIN_TRACED_SIDE, side) for side in size)
    for image in images:
        yield batch_of(image, size)
        if dynamic:
            pixels = batch_of(image, odd)
            yield np.concatenate((pixels, pixels[:, :, ::-1]))


def miou_gate(
    args: argparse.Namespace, net: LEDNet, meta: dict, size: tuple[int, int]
) -> Callable[[ExportedModel], None]:
    """A check that compares a file's mIoU with the network's and prints both."""
    data = open_dataset(args.dataset, args.datadir, "val", **dataset_options(args))
    require_classes(net, meta, data.scheme, args.weights)

    def miou(predictor: Predictor, name: str) -> float:
        images = progress_bar(DataLoader(data), desc=name, unit="image")
        confusion = evaluate(
            predictor.label_maps, images, data.scheme.num_classes, predictor.device
        )
        require_labels(confusion, "--datadir")
        return 100 * confusion.mean_iou()

    normalization = {key: meta[key] for key in ("mean", "std") if key in meta}
    before = miou(Predictor(net, size, **normalization, backend="eager"), "fp32")

    def accept(exported: ExportedModel) -> None:
        after = miou(Predictor(exported, size), "int8")
        print(
            f"mIoU on the {len(data)} val images of {data.scheme.name}: {before:.2f} before, "
            f"{after:.2f} as int8"
        )
        if not before - after <= args.max_drop:
            raise ParityError(
                f"the mIoU falls from {before:.2f} to {after:.2f}, by more than {args.max_drop} "
                "points; nothing was written"
            )

    return accept


def main(argv: Sequence[str] | None = None) -> Parity:
    """Export, and print the files and their agreement with the network, which is returned."""
    try:
        return export_network(parsers.export().parse_args(argv))
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)


def export_network(args: argparse.Namespace) -> Parity:
    int8, row = args.precision == "int8", FORMATS[args.format]
    if int8 and not args.calibrate:
        raise UserError("--precision int8 needs images: give a folder of them with --calibrate")
    if args.datadir is None and (args.classes or args.val_stride or args.val_prefix):
        raise UserError("--classes and --val-* are of the data set: give its folder with --datadir")
    if not int8 and (args.calibrate or args.datadir):
        raise UserError("--calibrate and --datadir are for --precision int8: leave them out")
    weights = resolve_weights(args.weights)
    path = args.out or weights.with_name(f"{weights.stem}{'-int8' * int8}{row.suffix}")
    require_writable(path, (row.suffix,))
    require_packages(args.format, args.precision)
    check = list_images(args.check_images) if args.check_images else None
    net, meta = load_model(args.weights)
    size = input_size(meta, None, args.height, args.width)
    calibration = accept = None
    if int8:
        paths = spread(list_images(args.calibrate), args.calibration_images)
        check = check or spread(paths, len(SAMPLES))
        calibration = [batch_of(image, size) for image in read_images(paths, "calibration")]
        if args.datadir:
            accept = miou_gate(args, net, meta, size)
    agreement, difference = args.min_agreement, args.max_difference
    parity = export(
        net, meta, path, args.format, size,
        batches(read_images(check, "check"), size, args.dynamic),
        output=args.output, dynamic=args.dynamic, calibration=calibration,
        min_agreement=MIN_AGREEMENT[args.precision] if agreement is None else agreement,
        max_difference=MAX_DIFFERENCE[args.precision] if difference is None else difference,
        accept=accept,
    )  # fmt: skip
    for file in (path, *map(path.with_suffix, row.companions)):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    print(
        f"{args.output} as the network's over {parity.images} images: {parity.agreement:.6f} of "
        f"the pixels agree, largest logit difference {parity.max_difference:.1e} of the largest "
        "logit"
    )
    return parity
