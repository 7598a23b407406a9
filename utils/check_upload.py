"""Check predictions before they are uploaded to the Cityscapes benchmark server.

    python utils/check_upload.py results.zip
    python utils/check_upload.py save/predictions --subset val --datadir /data/cityscapes

Takes the zip, or the folder it is to be made of. Looks at number and names of the files,
and at the format, size and ids of every image; the 1525 of the test subset take ten to
twenty seconds on two cores. With --datadir the frames must be exactly those of its images.
"""

import argparse
import sys
from pathlib import Path

from lednet.errors import EXIT_STATUS, exit_on_user_error
from lednet.evaluation.cityscapes_submission import NUM_FILES, check_submission, image_frames


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="zip or folder of predictions")
    parser.add_argument("--subset", choices=tuple(NUM_FILES), default="test")
    parser.add_argument("--datadir", type=Path, help="Cityscapes folder with the subset's images")
    parser.add_argument("--height", type=int, default=1024, help="of every image, in pixels")
    parser.add_argument("--width", type=int, default=2048)
    return parser


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
    print(f"OK: {count} files of {args.path} are named, sized and filled as the server expects")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
