"""The command `lednet benchmark`: measure the speed of a network."""

from collections.abc import Sequence

from lednet.cli import parsers
from lednet.cli.common import predictor_options
from lednet.inference.benchmark import benchmark, benchmark_rows
from lednet.inference.predictor import Predictor
from lednet.io import require_writable, write_json
from lednet.model import LEDNet


def main(argv: Sequence[str] | None = None) -> None:
    args = parsers.benchmark().parse_args(argv)
    require_writable(args.json)
    weights = args.weights or LEDNet(args.num_classes, args.variant)
    predictor = Predictor(weights, **predictor_options(args))
    image_size = args.image_height, args.image_width
    card = benchmark(predictor, image_size, args.batch_size, args.warmup, args.runs)
    print("\n".join(f"{name:32} {value}" for name, value in benchmark_rows(card)))
    if args.json:
        write_json(args.json, card)
