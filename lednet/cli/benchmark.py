"""The command `lednet benchmark`: measure the speed of a network."""

import argparse
from collections.abc import Sequence

from lednet.cli import parsers
from lednet.inference.benchmark import benchmark, benchmark_rows
from lednet.inference.predictor import Predictor
from lednet.io import require_writable, write_json
from lednet.model import LEDNet


def open_predictor(args: argparse.Namespace) -> Predictor:
    options = {key: getattr(args, key) for key in ("backend", "precision", "fold", "cache")}
    weights = args.weights or LEDNet(args.num_classes, args.variant)
    return Predictor(weights, (args.height, args.width), device=args.device, **options)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsers.benchmark().parse_args(argv)
    require_writable(args.json)
    image_size = args.image_height, args.image_width
    card = benchmark(open_predictor(args), image_size, args.batch_size, args.warmup, args.runs)
    print("\n".join(f"{name:32} {value}" for name, value in benchmark_rows(card)))
    if args.json:
        write_json(args.json, card)
