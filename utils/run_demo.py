"""Generate toy streets, train both stages on them, and evaluate the network.

    python utils/run_demo.py

`make demo` runs this script. It prints the command of each phase, and takes about three minutes on
two idle CPU cores; the mIoU on the toy's val split should be at least 0.60. A finished demo is not
trained again: `make clean-demo` removes it.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from lednet.errors import UserError, exit_on_user_error
from lednet.inference.benchmark import benchmark
from lednet.inference.predictor import Predictor
from lednet.io import read_json, write_json
from lednet.training.run_dir import holds_run

ROOT = Path(__file__).resolve().parents[1]

DATA = ROOT / "datasets" / "toy_cityscapes"
RUN = ROOT / "save" / "demo"
SPEED_SIZE, IMAGE_SIZE = (512, 1024), (1024, 2048)
"""(height, width) of the network's input, and of the images, in the measurement of the speed."""

# Small images, few epochs and a larger learning rate than the paper's.
TRAINING = ("--height", "128", "--width", "256", "--encoder-epochs", "3", "--num-epochs", "8",
            "--batch-size", "4", "--lr", "2e-3", "--num-workers", "2",
            "--class-weights", "computed")  # fmt: skip


def run_phase(name: str, script: str, *arguments: str) -> float:
    """Run a script of the repository, showing the command; returns its seconds."""
    command = ["python", script, *arguments]
    print(f"\n== {name}\n$ {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    status = subprocess.run([sys.executable, *command[1:]], cwd=ROOT).returncode
    if status:
        raise UserError(f"the phase '{name}' ended with status {status}: see its message above")
    return time.perf_counter() - start


def run_all() -> dict:
    """Run every phase in order; returns the summary."""
    data, run = str(DATA.relative_to(ROOT)), str(RUN.relative_to(ROOT))
    seconds = {"toy data": run_phase("toy data", "datasets/make_toy_cityscapes.py", "--out", data)}
    resume = ["--resume"] if holds_run(RUN) else []
    seconds["training"] = run_phase(
        "training", "train/main.py", "--datadir", data, "--savedir", run, *TRAINING, *resume
    )
    seconds["evaluation"] = run_phase(
        "evaluation", "test/eval_iou.py", "--weights", run, "--datadir", data,
        "--json", f"{run}/scores.json", "--plot", f"{run}/class_iou.png",
        "--sheet", f"{run}/contact_sheet.png",
    )  # fmt: skip
    seconds["report"] = run_phase(
        "report", "test/eval_cityscapes_server.py", "--weights", run, "--datadir", data,
        "--out", f"{run}/eval", "--overwrite", "--report", "--no-speed",
    )  # fmt: skip
    scores = read_json(RUN / "scores.json")
    start = time.perf_counter()
    predictor = Predictor(RUN, SPEED_SIZE)
    speed = benchmark(predictor, IMAGE_SIZE, runs=10, max_seconds=5)
    seconds["speed"] = time.perf_counter() - start
    return {
        "miou": scores["miou"],
        "class_iou": scores["class_iou"],
        "pixel_accuracy": scores["pixel_accuracy"],
        "parameters": speed["parameters"],
        "fps": speed["forward"]["fps"],
        "device": speed["device"],
        "speed": speed,
        "seconds": seconds,
    }


def show(summary: dict) -> None:
    """Print the result, its files, and the next commands."""
    speed, run = summary["speed"], RUN.relative_to(ROOT)
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())
    print(f"""
LEDNet d20, {summary["parameters"]:,} parameters, trained on toy streets
  mIoU on the toy's val split   {summary["miou"]:.3f}
  network alone                 {summary["fps"]:.1f} FPS at {SPEED_SIZE[0]}x{SPEED_SIZE[1]}, \
{speed["backend"]} fp32, {summary["device"]}
  image to label map            {speed["image_to_label_map"]["fps"]:.1f} FPS at \
{IMAGE_SIZE[0]}x{IMAGE_SIZE[1]}
  took                          {took}

Look at
  {run}/eval/report.html        the whole evaluation as a page, every image in it
  {run}/contact_sheet.png       input | truth | prediction
  {run}/curves.png              loss and mIoU of both stages
  {run}/class_iou.png           IoU of each class
  {run}/summary.json            these figures, for programs
  {run}/best.pth                the weights

Next, with real data (datasets/README.md says where to get it)
  python train/main.py --datadir /data/cityscapes --savedir cityscapes-d20
  python train/main.py --dataset camvid --datadir /data/camvid --savedir camvid-d20
  python test/eval_cityscapes_server.py --weights save/cityscapes-d20 --datadir /data/cityscapes
""")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    path = RUN / "summary.json"
    if path.is_file():
        print("This demo has run before; `make clean-demo` removes it.")
    else:
        write_json(path, run_all())
    show(read_json(path))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
