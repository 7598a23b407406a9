"""Compare ways to train: an encoder pretrained or not, coarse annotations first or not.

    python benchmarks/ways.py finetuning --datadir /data/camvid \
        --pictures /data/imagefolder_cifar10 --runs save/ways
    python benchmarks/ways.py coarse --runs save/ways

Each way is trained with every seed, by the commands that the JSON file records; runs that are
there already are gone on with, so the command may be stopped and given again. The results go to
benchmarks/results/<experiment>.json and .png. "finetuning" (CamVid at 180x240) takes 40 minutes
on two cores with bf16, "coarse" (toy streets, drawn if need be) 15.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure

from lednet.errors import UserError, exit_on_user_error
from lednet.files import write_atomically, write_json
from lednet.deploy.speed import describe_device
from lednet.training.distributed import choose_device
from lednet.training.runs import environment

COLORS = ("#4c78a8", "#f58518")


class Experiment(NamedTuple):
    """Two ways to train, each a command of train/main.py less seed and folder.

    Attributes:
        title: of the plot.
        before: commands whose results the ways use.
        ways: by name; {runs} stands for the folder of all runs.
        stages: those whose epochs are compared, each the last one of a way.
    """

    title: str
    before: tuple[str, ...]
    ways: dict[str, str]
    stages: tuple[str, ...]


FAST = "--precision bf16 --channels-last --num-workers 1 --device cpu"
EXPERIMENTS = {
    "finetuning": Experiment(
        "CamVid at 180x240",
        (
            "imagenet/lednet_imagenet.py --datadir {pictures} --recipe modern --stored-size 72 "
            "--crop-size 64 --batch-size 64 --num-epochs 60 --lr 0.05 --mixup 0 "
            f"{FAST} --savedir {{runs}}/pictures --resume auto",
        ),
        {
            "from scratch": "--decoder",
            "pretrained encoder": "--pretrainedEncoder {runs}/pictures/encoder.pth",
        },
        ("decoder", "decoder"),
    ),
    "coarse": Experiment(
        "Toy streets at 128x256: 48 fine images, 192 coarse ones",
        ("datasets/make_toy_cityscapes.py --out {runs}/toy --train 48 --train-extra 144",),
        {
            "fine": "--encoder-epochs 4 --num-epochs 12",
            "coarse then fine": "--encoder-epochs 4 --curriculum coarse:8,fine:12",
        },
        ("decoder", "fine-2"),
    ),
}
COMMON = {
    "finetuning": "--dataset camvid --datadir {datadir} --height 180 --width 240 --num-epochs 10 "
    f"--batch-size 6 --augment modern {FAST}",
    "coarse": f"--datadir {{runs}}/toy --height 128 --width 256 --batch-size 6 --lr 1e-3 {FAST}",
}


def run(command: str) -> None:
    """
    Raises:
        UserError: it failed.
    """
    print(f"$ python {command}", flush=True)
    status = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode
    if status:
        raise UserError(f"`python {command}` ended with status {status}: see what it says above")


def curve(folder: Path, stage: str) -> list[float]:
    """Validation mIoU after each epoch of a stage."""
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record["val_miou"] for record in records if record["stage"] == stage]


def summary(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    last, best = [c[-1] for c in curves], [max(c) for c in curves]
    return {
        "last": {"mean": statistics.mean(last), "std": statistics.stdev(last), "each": last},
        "best": {"mean": statistics.mean(best), "std": statistics.stdev(best), "each": best},
        "curves": [list(c) for c in curves],
    }


def plot(path: Path, title: str, ways: dict[str, dict[str, Any]]) -> None:
    """All curves, thin, and their mean over the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for (name, way), color in zip(ways.items(), COLORS, strict=True):
        for values in way["curves"]:
            axis.plot(range(1, len(values) + 1), values, color=color, linewidth=0.7, alpha=0.6)
        mean = [statistics.mean(values) for values in zip(*way["curves"], strict=True)]
        last = way["last"]
        label = f"{name}: {last['mean']:.3f} ± {last['std']:.3f}"
        axis.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2.5, label=label)
    axis.set(title=title, xlabel="epoch of the full network's last stage", ylabel="val mIoU")
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--datadir", type=Path, help="CamVid, for finetuning")
    parser.add_argument("--pictures", type=Path, help="folders of classes, for finetuning")
    parser.add_argument("--runs", type=Path, default=Path("save/ways"),
                        help="folder of all runs, below the repository (save/ways)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    # fmt: on
    args = parser.parse_args()
    if args.experiment == "finetuning" and not (args.datadir and args.pictures):
        raise UserError("finetuning needs CamVid and pictures: give --datadir and --pictures")
    if len(args.seeds) < 2:
        raise UserError("one seed has no spread: give two --seeds or more")
    experiment = EXPERIMENTS[args.experiment]
    places = {key: shlex.quote(str(vars(args)[key])) for key in ("datadir", "pictures", "runs")}
    for command in experiment.before:
        run(command.format(**places))
    ways, commands = {}, {}
    for (name, flags), stage in zip(experiment.ways.items(), experiment.stages, strict=True):
        command = f"train/main.py {COMMON[args.experiment]} {flags}".format(**places)
        curves = []
        for seed in args.seeds:
            folder = (
                args.runs / f"{args.experiment}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            )
            run(f"{command} --seed {seed} --savedir {shlex.quote(str(folder))} --resume auto")
            curves.append(curve(folder, stage))
        ways[name], commands[name] = summary(curves), f"python {command}"
    before = [f"python {command.format(**places)}" for command in experiment.before]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": describe_device(choose_device("cpu")),
        "environment": environment(ROOT),
        "seeds": args.seeds,
        "before": before,
        "commands": commands,
        "ways": ways,
    }
    if args.experiment == "finetuning":
        log = ROOT / args.runs / "pictures/log.jsonl"
        records = map(json.loads, log.read_text().splitlines())
        result["pretraining"] = max(records, key=lambda record: record["val_top1"])
    write_json(args.out / f"{args.experiment}.json", result)
    plot(args.out / f"{args.experiment}.png", experiment.title, ways)
    for name, way in ways.items():
        print(f"{name:24} last {way['last']['mean']:.3f} ± {way['last']['std']:.3f}  "
              f"best {way['best']['mean']:.3f} ± {way['best']['std']:.3f}")  # fmt: skip


if __name__ == "__main__":
    with exit_on_user_error():
        main()
