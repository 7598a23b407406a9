"""A page in your browser: drop an image or a video, or use the webcam, and see its classes.

    python utils/demo_app.py
    python utils/demo_app.py --weights save/mine --open

Then open http://127.0.0.1:8080. Needs NiceGUI (pip install nicegui), and for videos PyAV
(pip install av). The page is for this machine: see docs/demo_app.md before you change --host.
"""

import argparse
from pathlib import Path

from lednet.demo.labeller import Labeller, Limits
from lednet.device import choose_device
from lednet.errors import UserError, exit_on_user_error
from lednet.export.formats import installed
from lednet.hub import list_pretrained
from lednet.inference.backends import BACKENDS, choose_backend

ROOT = Path(__file__).resolve().parents[1]

EXAMPLE = ROOT / "docs" / "toy_street.png"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, nargs="+", default=[], metavar="PATH",
                        help="weights files, run folders or exported files to offer beside the "
                             "released weights")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to serve at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--open", action="store_true", help="open a browser")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS),
                        help="that is chosen at first; auto: the fastest that is installed (auto)")
    parser.add_argument("--max-upload", type=float, default=100, metavar="MB",
                        help="largest file (100)")
    parser.add_argument("--max-pixels", type=float, default=50, metavar="MILLIONS",
                        help="largest image, or frame of a video (50)")
    parser.add_argument("--max-seconds", type=float, default=60, help="longest video (60)")
    parser.add_argument("--max-frames", type=int, default=3000, help="of a video (3000)")
    # fmt: on
    args = parser.parse_args()
    for name in ("port", "max_upload", "max_pixels", "max_seconds", "max_frames"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(
                f"--{name.replace('_', '-')} must be positive: leave it out, or raise it"
            )
    return args


def main() -> None:
    args = parse_options()
    if not installed("nicegui"):
        raise UserError("the page needs NiceGUI: pip install nicegui")
    from lednet.demo.page import serve

    limits = Limits(
        int(args.max_upload * 1e6), int(args.max_pixels * 1e6), args.max_seconds, args.max_frames
    )
    device = choose_device(args.device)
    backend = choose_backend(device) if args.backend == "auto" else args.backend
    weights = {str(path): path for path in (*args.weights, *map(Path, list_pretrained()))}
    labeller = Labeller(weights, device, limits)
    if backend not in labeller.backends:
        raise UserError(f"the backend {backend} is not installed: see docs/deploy.md")
    for path in args.weights or list(weights)[:1]:  # a wrong path is told now
        labeller.prepare(str(path), backend)
    example = EXAMPLE if EXAMPLE.is_file() else None
    serve(labeller, backend, args.host, args.port, example=example, show=args.open)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
