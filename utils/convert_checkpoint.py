"""Convert weights: files of the original release, training checkpoints, released folders.

    python utils/convert_checkpoint.py --weights model_best.pth --out lednet-cityscapes.pth
    python utils/convert_checkpoint.py --weights save/cityscapes-d20 --out lednet-cityscapes

Prints how many keys were loaded, missing or unexpected. An output name that ends in .pth or .pt is
one file, any other a folder in Hugging Face's layout (config.json, model.safetensors). Both contain
the weights, classes, colours, normalisation and input size, without the state of the optimizer.
Takes a second.
"""

import argparse
from pathlib import Path

from lednet.cli.common import add_input_size_flags, make_parser, print_help_early


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--weights", type=Path, required=True,
                        help="weights file, run folder (its best.pth) or released name")
    parser.add_argument("--out", type=Path, required=True, help="file (.pth) or folder to write")
    add_input_size_flags(parser, "that of the weights, otherwise the usual one of the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

from typing import Any

from lednet.checkpoint import compare_keys, load_checkpoint, save_checkpoint, save_pretrained
from lednet.data.registry import DEFAULT_SIZES
from lednet.errors import UserError, exit_on_user_error
from lednet.hub import input_size, resolve_weights
from lednet.model import LEDNet, count_parameters, load_model
from lednet.visualization import output_scheme

NO_NORMALIZATION = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
"""Of weights without this entry: the original release trained on raw [0, 1] images."""


def complete_meta(net: LEDNet, meta: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """`meta`, completed with the entries that files of other projects lack.

    Raises:
        UserError: neither the weights nor the flags give the size.
    """
    scheme = output_scheme(meta, net.num_classes, args.weights)
    default = DEFAULT_SIZES.get(scheme.name.lower())
    return {
        "model": f"LEDNet {net.variant}",
        "dataset": scheme.name,
        "classes": list(scheme.classes),
        "colors": [list(color) for color in scheme.colors],
        **NO_NORMALIZATION,
        **meta,
        "size": list(input_size(meta, default, args.height, args.width)),
    }


def main() -> None:
    args = build_parser().parse_args()
    as_file = args.out.suffix in (".pth", ".pt")
    if args.out.exists():
        if not args.overwrite:
            raise UserError(f"{args.out} exists: add --overwrite, or choose another --out")
        if args.out.is_dir() == as_file:
            kind = "a folder" if as_file else "a file"
            raise UserError(f"{args.out} is {kind}: choose another --out")
    net, meta = load_model(args.weights)
    state = load_checkpoint(resolve_weights(args.weights))["state_dict"]
    meta = complete_meta(net, meta, args)
    (save_checkpoint if as_file else save_pretrained)(args.out, net, meta)
    print(f"{args.weights}: {compare_keys(net, state)}")
    height, width = meta["size"]
    print(
        f"{args.out}: {meta['model']}, {count_parameters(net):,} parameters, {net.num_classes} "
        f"outputs ({meta['dataset']} and void), input {height}x{width}"
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
