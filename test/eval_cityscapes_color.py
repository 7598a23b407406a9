"""Colour any images by class: colour maps, and overlays on the images themselves.

    python test/eval_cityscapes_color.py --weights save/run --input photos --out save/colored

For each image below --input, <name>_color.png and <name>_overlay.png in the same
sub-folder of --out, at the image's size and with a legend below. Takes the weights of any
data set; classes and colours are those they were trained with. Pictures that are already
there are kept, so a run that was cut short goes on where it stopped. On two CPU cores a
2048x1024 image takes one to two seconds at a network size of 256x512.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from tqdm import tqdm

from lednet.data.datasets import DEFAULT_SIZES, open_image, to_rgb
from lednet.data.labels import LabelScheme
from lednet.data.pairs import IMAGE_SUFFIXES
from lednet.deploy.backends import BACKENDS
from lednet.deploy.predictor import Predictor
from lednet.errors import UserError, exit_on_user_error
from lednet.evaluation.draw import colorize, output_scheme, overlay, with_legend, write_picture
from lednet.precision import AMP_DTYPES
from lednet.training.distributed import choose_device

KINDS = ("color", "overlay")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth) or exported file")
    parser.add_argument("--input", type=Path, required=True,
                        help="an image, or a folder searched with its sub-folders (png, jpg)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--what", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--alpha", type=float, default=0.5,
                        help="share of the class's colour in the overlay, 0 to 1 (0.5)")
    parser.add_argument("--legend", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--overwrite", action="store_true",
                        help="draw again what is already there")
    parser.add_argument("--height", type=int, help="network input in pixels (as trained)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--backend", choices=("auto", *BACKENDS),
                        help="what runs the network (eager); auto: the fastest that is installed")
    parser.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    # fmt: on
    return parser


def find_images(source: Path, out: Path) -> dict[Path, Path]:
    """Images at or below `source`, by the path below `out` that their pictures' names begin with.

    An `out` inside `source` holds results, not inputs. Two images with one name are refused.
    """
    if source.is_file():
        return {out / source.stem: source}
    if not source.is_dir():
        raise UserError(f"no image or folder {source}: check --input")
    if source.resolve() == out.resolve():
        raise UserError(f"--out {out} is the folder of the images: choose another one")
    results = out.resolve() if source.resolve() in out.resolve().parents else None
    images: dict[Path, Path] = {}
    for path in sorted(source.rglob("*")):
        skipped = path.name.startswith(".") or results in path.resolve().parents
        if skipped or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        target = out / path.relative_to(source).with_suffix("")
        if target in images:
            raise UserError(
                f"{images[target]} and {path.name} would be drawn in the same files: "
                "rename one of them"
            )
        images[target] = path
    if not images:
        raise UserError(f"{source} holds no images (png or jpg): check --input")
    return images


def draw(
    kind: str, image: np.ndarray, label: np.ndarray, scheme: LabelScheme, args: argparse.Namespace
) -> np.ndarray:
    """The picture of one kind, RGB; in an overlay void is not drawn, nor explained."""
    if kind == "color":
        picture = colorize(label, scheme)
    else:
        picture = overlay(image, label, scheme, args.alpha)
    return with_legend(picture, scheme, void=kind == "color") if args.legend else picture


def main() -> None:
    args = build_parser().parse_args()
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha is {args.alpha}: give a share from 0 to 1")
    images = find_images(args.input, args.out)
    predict = Predictor.from_weights(
        args.weights, None, DEFAULT_SIZES["cityscapes"], args.height, args.width,
        device=choose_device(args.device), backend=args.backend, precision=args.precision,
    )  # fmt: skip
    scheme = output_scheme(predict.meta, predict.net.num_classes, args.weights)
    drawn = 0
    with tqdm(images.items(), "draw", unit="image", dynamic_ncols=True) as bar:
        for target, path in bar:
            pictures = {kind: target.with_name(f"{target.name}_{kind}.png") for kind in args.what}
            if not args.overwrite:
                pictures = {kind: file for kind, file in pictures.items() if not file.exists()}
            if not pictures:
                continue
            image = to_rgb(open_image(path))
            label = predict(image)
            for kind, file in pictures.items():
                write_picture(file, draw(kind, image, label, scheme, args))
            drawn += 1
    kept = len(images) - drawn
    note = f"; {kept} were there already (--overwrite draws them again)" if kept else ""
    print(f"{drawn} of {len(images)} images drawn in {args.out}{note}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
