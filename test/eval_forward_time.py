"""Measure the speed of a network: the network alone, and from image to label map. No data needed.

    python test/eval_forward_time.py
    python test/eval_forward_time.py --weights save/cityscapes-d20 --precision fp16 --batch-size 8

The same card as test/eval_cityscapes_server.py prints. The images are random; weights
change the answers, not the time, so none are needed. On a CPU half a minute.
"""

import argparse
from pathlib import Path

from lednet.data.registry import DEFAULT_SIZES
from lednet.device import AMP_DTYPES, choose_device
from lednet.errors import UserError, exit_on_user_error
from lednet.inference.backends import BACKENDS
from lednet.inference.benchmark import benchmark, benchmark_rows
from lednet.inference.predictor import Predictor
from lednet.io import write_json
from lednet.model import VARIANTS, LEDNet

IMAGE_SIZE = (1024, 2048)
"""(height, width) of a Cityscapes image."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path,
                        help="weights file, run folder or exported file; default: none, see "
                             "--variant")
    parser.add_argument("--variant", choices=VARIANTS, default="d20")
    parser.add_argument("--num-classes", type=int, default=20, help="outputs, void among them")
    parser.add_argument("--height", type=int, help="network input in pixels (as trained, or 512)")
    parser.add_argument("--width", type=int, help="(as trained, or 1024)")
    parser.add_argument("--image-height", type=int, default=IMAGE_SIZE[0],
                        help="of the images that label maps are made for, in pixels (1024)")
    parser.add_argument("--image-width", type=int, default=IMAGE_SIZE[1], help="(2048)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--backend", choices=("auto", *BACKENDS),
                        help="what runs the network (eager); auto: the fastest that is installed")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True,
                        help="fold batch norm into the convolutions: the same answers, faster")
    parser.add_argument("--warmup", type=int, default=3, help="passes before the clock starts")
    parser.add_argument("--runs", type=int, default=20, help="timed passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    # fmt: on
    return parser


def open_predictor(args: argparse.Namespace) -> Predictor:
    options = {
        "device": choose_device(args.device),
        "backend": args.backend,
        "precision": args.precision,
        "fold": args.fold,
    }
    default = DEFAULT_SIZES["cityscapes"]
    if args.weights:
        return Predictor.from_weights(
            args.weights, None, default, args.height, args.width, **options
        )
    size = args.height or default[0], args.width or default[1]
    return Predictor(LEDNet(args.num_classes, args.variant), size, **options)


def main() -> None:
    args = build_parser().parse_args()
    for name in ("height", "width", "image_height", "image_width", "batch_size", "runs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
    image_size = args.image_height, args.image_width
    card = benchmark(open_predictor(args), image_size, args.batch_size, args.warmup, args.runs)
    print("\n".join(f"{name:32} {value}" for name, value in benchmark_rows(card)))
    if args.json:
        write_json(args.json, card)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
