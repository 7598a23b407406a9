"""Draw class colours of any images: colour maps, and overlays on the images.

    python test/eval_cityscapes_color.py --weights save/run --input photos --out save/colored

For each image in --input, writes <name>_color.png and <name>_overlay.png to the same subfolder of
--out, at the image's size and with a legend below. Takes the weights of any data set, with the
classes and colours of their training. Existing outputs are kept, so that an interrupted run is
resumed by the same command. On two CPU cores a 2048x1024 image takes one to two seconds at a
network size of 256x512. utils/predict.py does more: label maps, videos, class shares.
"""

import argparse
from pathlib import Path

from lednet.cli import common

KINDS = ("color", "overlay")


def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, released=True)
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth), released name or exported "
                             "file")
    parser.add_argument("--input", type=Path, required=True,
                        help="an image, or a folder that is searched with its subfolders")
    parser.add_argument("--out", type=Path, default=common.ROOT / "save" / "colored",
                        help="folder for the output images (default: save/colored)")
    parser.add_argument("--outputs", choices=KINDS, nargs="+", default=KINDS, help="what to draw")
    common.add_overlay_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="draw existing outputs again")
    common.add_input_size_flags(parser)
    common.add_backend_flags(parser)
    # fmt: on
    return parser


if __name__ == "__main__":
    common.print_help_early(build_parser)

from lednet.errors import exit_on_user_error, raise_if_problems
from lednet.inference.inputs import find_inputs
from lednet.inference.predictor import Predictor
from lednet.inference.writers import PredictionJob, PredictionWriter, errors_of, predict_images
from lednet.io import require_writable
from lednet.progress import progress_bar
from lednet.visualization import Visualizer


def main() -> None:
    args = build_parser().parse_args()
    require_writable(args.out, folder=True)
    images = find_inputs([args.input], args.out)
    options = common.predictor_options(args)
    predictor = Predictor(args.weights, expected_images=len(images), **options)
    scheme = predictor.scheme
    output = PredictionWriter(args.out, args.outputs, Visualizer(scheme, args.alpha, args.legend))
    tasks = []
    for name, path in images.items():
        files = output.image_files(name)
        if not args.overwrite:
            files = {kind: file for kind, file in files.items() if not file.exists()}
        if files:
            tasks.append(PredictionJob(name, path, files))
    with progress_bar(total=len(tasks), desc="draw", unit="image") as bar:
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
