"""Time from the command `lednet predict` to its result, for a few images.

    python benchmarks/first_answer.py --images 1 10 100

Every run is a new process, for each backend with an empty cache of exported networks ("cold") and
with the file of an earlier run ("warm"). The rows show from how many images on a backend pays, on
which `lednet.inference.backends.FEW_IMAGES` is based.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import ROOT, make_parser, write_record
from lednet.errors import UserError, exit_on_user_error

BACKENDS = ("auto", "eager", "onnxruntime", "openvino")


def seconds(images: list[Path], backend: str, folder: Path) -> tuple[float, str]:
    """Seconds of a run, and the line that names the backend."""
    command = [sys.executable, "-m", "lednet", "predict", *map(str, images), "--overwrite",
               "--backend", backend, "--out", str(folder / "out")]  # fmt: skip
    environ = {**os.environ, "LEDNET_CACHE": str(folder / "cache")}
    start = time.perf_counter()
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return time.perf_counter() - start, done.stdout.splitlines()[0]


def main() -> None:
    parser = make_parser(__doc__, "--json")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=BACKENDS)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{i:04d}.png" for i in range(max(args.images))]
        street = Image.open(ROOT / "docs/toy_street.png").resize((480, 360))
        for path in paths:
            street.save(path)
        for count in args.images:
            for backend in args.backends:
                with tempfile.TemporaryDirectory() as folder:
                    for cache in ("cold", "warm"):
                        took, line = seconds(paths[:count], backend, Path(folder))
                        used = line.partition("(")[2].split()[0]
                        rows.append({"images": count, "backend": backend, "used": used,
                                     "cache": cache, "seconds": took})  # fmt: skip
                        print(f"{count:4} images  {backend:11} {used:11} {cache}  {took:6.1f} s",
                              flush=True)  # fmt: skip
    write_record(args.json, torch.device("cpu"), {"results": rows})


if __name__ == "__main__":
    with exit_on_user_error():
        main()
