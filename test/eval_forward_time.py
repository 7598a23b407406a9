"""Measure the speed of a network: the network alone, and from image to label map. No data needed.

    python test/eval_forward_time.py
    python test/eval_forward_time.py --weights save/cityscapes-d20 --precision fp16 --batch-size 8

The same table as test/eval_cityscapes_server.py prints. The images are random, and so are the
weights by default, because they do not change the time. On a CPU half a minute.
"""

import argparse
from pathlib import Path

from lednet.cli.common import (
    COUNT,
    POSITIVE,
    VARIANTS,
    add_backend_flags,
    add_input_size_flags,
    make_parser,
    print_help_early,
)

IMAGE_SIZE = (1024, 2048)
"""(height, width) of a Cityscapes image."""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--weights", type=Path,
                        help="weights file, run folder, released name or exported file (default: "
                             "random weights, see --variant)")
    parser.add_argument("--variant", choices=VARIANTS, default="d20", help="network to measure")
    parser.add_argument("--num-classes", type=POSITIVE, default=20,
                        help="outputs of the network, void included")
    add_input_size_flags(parser, "as trained, otherwise 512x1024")
    parser.add_argument("--image-height", type=POSITIVE, default=IMAGE_SIZE[0], metavar="PIXELS",
                        help="height of the images")
    parser.add_argument("--image-width", type=POSITIVE, default=IMAGE_SIZE[1], metavar="PIXELS",
                        help="width of the images")
    parser.add_argument("--batch-size", type=POSITIVE, default=1, help="images per batch")
    add_backend_flags(parser, fold=True)
    parser.add_argument("--warmup", type=COUNT, default=3, metavar="N", help="passes before timing")
    parser.add_argument("--runs", type=POSITIVE, default=20, metavar="N", help="timed passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

from lednet.data.registry import DEFAULT_SIZES
from lednet.device import choose_device
from lednet.errors import exit_on_user_error
from lednet.inference.benchmark import benchmark, benchmark_rows
from lednet.inference.predictor import Predictor
from lednet.io import require_writable, write_json
from lednet.model import LEDNet


def open_predictor(args: argparse.Namespace) -> Predictor:
    options = {key: getattr(args, key) for key in ("backend", "precision", "fold")}
    options["device"] = choose_device(args.device)
    default = DEFAULT_SIZES["cityscapes"]
    if args.weights:
        return Predictor.from_weights(
            args.weights, None, default, args.height, args.width, **options
        )
    size = args.height or default[0], args.width or default[1]
    return Predictor(LEDNet(args.num_classes, args.variant), size, **options)


def main() -> None:
    args = build_parser().parse_args()
    require_writable(args.json)
    image_size = args.image_height, args.image_width
    card = benchmark(open_predictor(args), image_size, args.batch_size, args.warmup, args.runs)
    print("\n".join(f"{name:32} {value}" for name, value in benchmark_rows(card)))
    if args.json:
        write_json(args.json, card)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
