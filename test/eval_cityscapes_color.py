"""Colour any images by class: colour maps, and overlays on the images themselves.

    python test/eval_cityscapes_color.py --weights save/run --input photos --out save/colored

For each image below --input, <name>_color.png and <name>_overlay.png in the same
sub-folder of --out, at the image's size and with a legend below. Takes the weights of any
data set; classes and colours are those they were trained with. Pictures that are already
there are kept, so a run that was cut short goes on where it stopped. On two CPU cores a
2048x1024 image takes one to two seconds at a network size of 256x512.
utils/predict.py does more: label maps, videos, the classes' shares.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from lednet.data.registry import DEFAULT_SIZES
from lednet.device import AMP_DTYPES, choose_device
from lednet.errors import UserError, exit_on_user_error, raise_if_problems
from lednet.inference.backends import BACKENDS
from lednet.inference.inputs import find_inputs
from lednet.inference.predictor import Predictor
from lednet.inference.writers import PredictionJob, PredictionWriter, errors_of, predict_images
from lednet.visualization import Visualizer, output_scheme

KINDS = ("color", "overlay")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth) or exported file")
    parser.add_argument("--input", type=Path, required=True,
                        help="an image, or a folder searched with its sub-folders")
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


def main() -> None:
    args = build_parser().parse_args()
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha is {args.alpha}: give a share from 0 to 1")
    images = find_inputs([args.input], args.out)
    predictor = Predictor.from_weights(
        args.weights, None, DEFAULT_SIZES["cityscapes"], args.height, args.width,
        device=choose_device(args.device), backend=args.backend, precision=args.precision,
    )  # fmt: skip
    scheme = output_scheme(predictor.meta, predictor.net.num_classes, args.weights)
    output = PredictionWriter(args.out, args.what, Visualizer(scheme, args.alpha, args.legend))
    tasks = []
    for name, path in images.items():
        files = output.image_files(name)
        if not args.overwrite:
            files = {kind: file for kind, file in files.items() if not file.exists()}
        if files:
            tasks.append(PredictionJob(name, path, files))
    with tqdm(total=len(tasks), desc="draw", unit="image", dynamic_ncols=True) as bar:
        entries = predict_images(predictor, tasks, output, bar.update)
    errors = errors_of(entries)
    drawn = len(entries) - len(errors)
    kept = len(images) - len(tasks)
    note = f"; {kept} were there already (--overwrite draws them again)" if kept else ""
    print(f"{drawn} of {len(images)} images drawn in {args.out}{note}")
    raise_if_problems(errors)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
