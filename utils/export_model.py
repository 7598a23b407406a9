"""Export a network to a file that runs without this repository, and check its outputs.

    python utils/export_model.py --weights save/cityscapes-d20 --format onnx
    python utils/export_model.py --weights save/cityscapes-d20 --format openvino --dynamic
    python utils/export_model.py --weights save/cityscapes-d20 --format executorch --out net.pte
    python utils/export_model.py --weights save/camvid-d20 --format openvino --output logits \\
        --precision int8 --calibrate /data/camvid/train --dataset camvid --datadir /data/camvid

    pip install ".[deploy]"   # packages of the formats; torch needs none

The file takes RGB images (N, H, W, 3) uint8 of the network's size and returns class indices
(N, H, W) uint8. Files exported with --output logits can be given as --weights to the other
scripts and to `Predictor`. Before the file is moved into place, its output is compared with the
network's in PyTorch: at least 0.9999 of the pixels must agree. Otherwise the exit status is 1 and
nothing is written.

With int8, 0.9 of the pixels must agree, and with --datadir the mIoU on the val images may drop by
half a point at most.

Half a minute on a CPU for a small fixed size, a minute or two for --dynamic, int8 and
executorch.
"""

import argparse
import sys
from pathlib import Path

from lednet.cli import common

ROOT = Path(__file__).resolve().parents[1]
TOY_IMAGES = 4


def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth) or released name")
    parser.add_argument("--format", choices=("onnx", "openvino", "torch", "executorch"),
                        default="onnx", help="format of the file")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="file to write (default: the name of the weights with the suffix of "
                             "the format)")
    common.add_input_size_flags(parser)
    parser.add_argument("--dynamic", action="store_true",
                        help="accept any batch and size; otherwise one image of one size, which is "
                             "faster in some runtimes")
    parser.add_argument("--output", choices=("labels", "logits"), default="labels",
                        help="class indices at the size of the image, or logits at 1/8 of it")
    parser.add_argument("--check-images", type=Path, metavar="DIR",
                        help="compare the outputs on every image below DIR (default: some of "
                             f"--calibrate, or {TOY_IMAGES} toy street scenes)")
    parser.add_argument("--min-agreement", type=common.at_least(0, float), metavar="SHARE",
                        help="share of the pixels that must get the same class (default: 0.9999; "
                             "int8: 0.9)")
    parser.add_argument("--max-difference", type=common.at_least(0, float), metavar="X",
                        help="allowed difference between two logits, relative to the largest "
                             "(default: 1e-3; int8: 0.5)")
    int8 = parser.add_argument_group("int8")
    int8.add_argument("--precision", choices=("fp32", "int8"), default="fp32",
                      help="int8: convolutions in 8 bits, several times faster on many CPUs")
    int8.add_argument("--calibrate", type=Path, metavar="DIR",
                      help="images for the calibration of int8, such as those of the training")
    int8.add_argument("--calibration-images", type=common.POSITIVE, default=64, metavar="N",
                      help="number of images to use, evenly spaced")
    common.add_dataset_flags(
        int8, ("fine", "coarse"), "the hold-out that the training used",
        "folder of the data set on whose val images network and file are evaluated",
    )
    int8.add_argument("--max-drop", type=common.at_least(0, float), default=0.5, metavar="POINTS",
                      help="allowed drop of the mIoU in percentage points")
    # fmt: on
    return parser


if __name__ == "__main__":
    common.print_help_early(build_parser)
sys.path.insert(0, str(ROOT / "datasets"))

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from make_toy_cityscapes import toy_scene
from PIL import Image
from torch.utils.data import DataLoader

from lednet.data.image_io import open_image, to_rgb
from lednet.data.labels import require_classes
from lednet.data.registry import open_dataset
from lednet.errors import UserError, exit_on_user_error
from lednet.evaluation.evaluator import evaluate, require_labels
from lednet.export.exporter import ParityError, export
from lednet.export.formats import FORMATS, MIN_TRACED_SIDE, ExportedModel, require_packages
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
    """The images of `paths`, or else some toy street scenes."""
    if paths is None:
        scenes = (toy_scene(1, "val", i, width=512, height=256) for i in range(TOY_IMAGES))
        yield from (Image.fromarray(scene.image) for scene in scenes)
        return
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
    data = open_dataset(
        args.dataset, args.datadir, "val", annotations=args.annotations, labels=args.labels,
        class_file=args.classes, val_stride=args.val_stride, val_prefix=args.val_prefix,
    )  # fmt: skip
    require_classes(net, meta, data.scheme, args.weights)

    def miou(predictor: Predictor, name: str) -> float:
        images = progress_bar(DataLoader(data), desc=name, unit="image")
        confusion = evaluate(
            predictor.label_maps, images, data.scheme.num_classes, predictor.device
        )
        require_labels(confusion, "--datadir")
        return 100 * confusion.mean_iou()

    normalization = {key: meta[key] for key in ("mean", "std") if key in meta}
    before = miou(Predictor(net, size, **normalization), "fp32")

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


def main() -> None:
    args = build_parser().parse_args()
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
        check = check or spread(paths, TOY_IMAGES)
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


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main()
        except ParityError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_STATUS)
