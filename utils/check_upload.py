"""Check predictions before they are uploaded to the Cityscapes benchmark server.

    python utils/check_upload.py results.zip
    python utils/check_upload.py save/predictions --subset val --datadir /data/cityscapes

Takes the zip, or the folder to make it of. Checks number and names of the files, and format, size
and ids of every image; the 1525 images of the test subset take ten to twenty seconds on two cores.
With --datadir the frames must be exactly those of its images.
"""

import argparse
from pathlib import Path

from lednet.cli.common import POSITIVE, make_parser, print_help_early


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("path", type=Path, help="zip or folder of predictions")
    parser.add_argument("--subset", choices=("test", "val"), default="test",
                        help="subset that was predicted")
    parser.add_argument("--datadir", type=Path, help="Cityscapes folder with the subset's images")
    parser.add_argument("--height", type=POSITIVE, default=1024, metavar="PIXELS",
                        help="height of every image")
    parser.add_argument("--width", type=POSITIVE, default=2048, metavar="PIXELS",
                        help="width of every image")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import sys

from lednet.errors import EXIT_STATUS, exit_on_user_error
from lednet.evaluation.cityscapes_submission import NUM_FILES, check_submission, image_frames


def main() -> None:
    args = build_parser().parse_args()
    frames = image_frames(args.datadir, args.subset) if args.datadir else None
    size = (args.height, args.width)
    problems = check_submission(args.path, args.subset, frames=frames, size=size)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(EXIT_STATUS)
    count = NUM_FILES[args.subset] if frames is None else len(frames)
    print(f"OK: {count} files of {args.path} have valid names, sizes and ids")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
