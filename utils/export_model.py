"""Write a network to a file that runs without this repository, and prove that it answers alike.

    python utils/export_model.py --weights save/cityscapes-d20 --format onnx
    python utils/export_model.py --weights save/cityscapes-d20 --format openvino --dynamic
    python utils/export_model.py --weights save/cityscapes-d20 --format executorch --out net.pte

    pip install -r requirements-deploy.txt   # what the formats need; torch needs nothing

Bytes in, bytes out: the file takes RGB images (N, H, W, 3) uint8 of the network's size and
returns class indices (N, H, W) uint8. Before it is moved into place it runs in its own
runtime beside the network in PyTorch; it has to agree in 0.9999 of the pixels, and
usually does in all. Exit status 1 if it does not; then nothing is written.

Half a minute on a CPU for a small fixed size, a minute or two for --dynamic and executorch.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]

import numpy as np
from make_toy_cityscapes import toy_scene
from PIL import Image

from lednet.data.datasets import open_image, to_rgb
from lednet.data.pairs import IMAGE_SUFFIXES
from lednet.deploy.export import FORMATS, MIN_TRACED_SIDE, OUTPUTS, Parity, ParityError, export
from lednet.errors import UserError, exit_on_user_error
from lednet.weights import input_size, load_network, weights_file

EXIT_STATUS = 1
"""The file answers otherwise than the network."""

TOY_IMAGES = 4


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, or a run folder (its best.pth)")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="file to write; default: the weights' name with the format's ending")
    parser.add_argument("--height", type=int, help="of the images it takes, in pixels (as trained)")
    parser.add_argument("--width", type=int, help="(as trained)")
    parser.add_argument("--dynamic", action="store_true",
                        help="take any batch and size; else one image of one size, which is "
                             "faster in some runtimes")
    parser.add_argument("--output", choices=tuple(OUTPUTS), default="labels",
                        help="class indices at the image's size, or logits at 1/8 of it")
    parser.add_argument("--check-images", type=Path, metavar="DIR",
                        help=f"compare on every image below DIR; default: {TOY_IMAGES} toy streets")
    parser.add_argument("--min-agreement", type=float, default=0.9999,
                        help="share of the pixels that must get the same class")
    parser.add_argument("--max-difference", type=float, default=1e-3,
                        help="allowed between two logits, relative to the largest logit")
    # fmt: on
    return parser


def check_images(folder: Path | None) -> Iterator[Image.Image]:
    """The images below `folder`, or toy streets."""
    if folder is None:
        for i in range(TOY_IMAGES):
            yield Image.fromarray(toy_scene(1, "val", i, width=512, height=256).image)
        return
    for path in list_images(folder):
        yield Image.fromarray(to_rgb(open_image(path)))


def list_images(folder: Path) -> list[Path]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"no image ({', '.join(IMAGE_SUFFIXES)}) below {folder}: check --check-images"
        )
    return paths


def batches(folder: Path | None, size: tuple[int, int], dynamic: bool) -> Iterator[np.ndarray]:
    """What to compare on: (1, *size, 3); for `dynamic` also pairs of another, odd size."""
    odd = tuple(max(MIN_TRACED_SIDE, side * 3 // 4 | 1) for side in size)
    if dynamic:
        size = tuple(max(MIN_TRACED_SIDE, side) for side in size)
    for image in check_images(folder):
        yield np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))[None]
        if dynamic:
            pixels = np.array(image.resize(odd[::-1], Image.Resampling.BILINEAR))
            yield np.stack((pixels, pixels[:, ::-1]))


def print_result(path: Path, format: str, output: str, parity: Parity) -> None:
    for file in (path, *(path.with_suffix(suffix) for suffix in FORMATS[format].beside)):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    print(
        f"{output} as the network's over {parity.images} images: {parity.agreement:.6f} of the "
        f"pixels agree, largest logit difference {parity.max_difference:.1e} of the largest logit"
    )


def main() -> None:
    args = build_parser().parse_args()
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give 1 or more")
    if args.check_images:
        list_images(args.check_images)  # refuses an empty folder before the work
    net, meta = load_network(args.weights)
    size = input_size(meta, None, args.height, args.width)
    path = args.out or weights_file(args.weights).with_suffix(FORMATS[args.format].suffix)
    parity = export(
        net,
        meta,
        path,
        args.format,
        size,
        batches(args.check_images, size, args.dynamic),
        output=args.output,
        dynamic=args.dynamic,
        min_agreement=args.min_agreement,
        max_difference=args.max_difference,
    )
    print_result(path, args.format, args.output, parity)


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main()
        except ParityError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_STATUS)
