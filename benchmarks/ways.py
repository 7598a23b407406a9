"""Compare ways to train: an encoder pretrained or not, coarse annotations first or not, recipes.

    python benchmarks/ways.py finetuning --datadir /data/camvid \
        --pictures /data/imagefolder_cifar10 --runs save/ways
    python benchmarks/ways.py coarse --runs save/ways
    python benchmarks/ways.py ablation --datadir /data/camvid --runs save/ways \
        --seeds 1 2 --together

Each way is trained with every seed, by the commands that the JSON file records; runs that are
there already are gone on with, so the command may be stopped and given again. The results go to
benchmarks/results/<experiment>.json and .png. "finetuning" (CamVid at 180x240) takes 40 minutes
on two cores with bf16, "coarse" (toy streets, drawn if need be) 15. "ablation" changes one thing
at a time in the recipe camvid, in 4 more epochs of a network that has had 100, and scores on a
recording that it does not train on: 35 minutes.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lednet.device import choose_device, describe_device
from lednet.errors import UserError, exit_on_user_error
from lednet.io import write_atomically, write_between_marks, write_json
from lednet.training.run_dir import environment, read_records

ROOT = Path(__file__).resolve().parents[1]

COLORS = ("#4c78a8", "#f58518")


class Way(NamedTuple):
    """A command of train/main.py, less seed and folder.

    Attributes:
        flags: {runs} stands for the folder of all runs, {seed} for the seed.
        stage: whose epochs are compared, the last one.
    """

    flags: str
    stage: str = "decoder"


class Experiment(NamedTuple):
    """Ways to train that are compared.

    Attributes:
        title: of the plot.
        before: commands whose results the ways use, with {runs}; those with {seed}, for each.
        common: flags of all ways.
        ways: by name.
    """

    title: str
    before: tuple[str, ...]
    common: str
    ways: dict[str, Way]


FAST = "--precision bf16 --channels-last --num-workers 1 --device cpu"
SMALL_CAMVID = "--recipe camvid --datadir {datadir} --val-prefix 0006R0 --height 180 --width 240 "
SMALL_CAMVID += "--precision bf16 --channels-last --num-workers 0 --device cpu --no-iouTrain"
EXPERIMENTS = {
    "finetuning": Experiment(
        "CamVid at 180x240",
        (
            "imagenet/lednet_imagenet.py --datadir {pictures} --recipe modern --stored-size 72 "
            "--crop-size 64 --batch-size 64 --num-epochs 60 --lr 0.05 --mixup 0 "
            f"{FAST} --savedir {{runs}}/pictures --resume auto",
        ),
        "--dataset camvid --datadir {datadir} --height 180 --width 240 --num-epochs 10 "
        f"--batch-size 6 --augment modern {FAST}",
        {
            "from scratch": Way("--decoder"),
            "pretrained encoder": Way("--pretrainedEncoder {runs}/pictures/encoder.pth"),
        },
    ),
    "coarse": Experiment(
        "Toy streets at 128x256: 48 fine images, 192 coarse ones",
        ("datasets/make_toy_cityscapes.py --out {runs}/toy --train 48 --train-extra 144",),
        f"--datadir {{runs}}/toy --height 128 --width 256 --batch-size 6 --lr 1e-3 {FAST}",
        {
            "fine": Way("--encoder-epochs 4 --num-epochs 12"),
            "coarse then fine": Way("--encoder-epochs 4 --curriculum coarse:8,fine:12", "fine-2"),
        },
    ),
    "ablation": Experiment(
        "CamVid at 180x240, recording 0006R0 held out: 4 epochs after 100",
        (
            "-m torch.distributed.run --standalone --nproc-per-node 2 train/main.py "
            f"{SMALL_CAMVID} --progressive 120x160:60 --num-epochs 40 --batch-size 3 "
            "--savedir {runs}/base --resume auto",
        ),
        f"{SMALL_CAMVID} --num-epochs 4 --warmup-epochs 1 --lr 5e-4 --state {{runs}}/base",
        {
            "unchanged": Way(""),
            "without EMA": Way("--ema-decay 0"),
            "no class weights": Way("--class-weights none"),
            "class-uniform half": Way("--class-uniform 0.5"),
            "paper augmentation": Way("--augment paper"),
        },
    ),
}


def run(commands: Sequence[str], together: bool) -> None:
    """Run commands, one after the other or at once with a thread each.

    Raises:
        UserError: one failed.
    """
    environ = dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if together else {})
    running = []
    for command in commands:
        print(f"$ python {command}", flush=True)
        argv = [sys.executable, *shlex.split(command)]
        running.append(subprocess.Popen(argv, cwd=ROOT, env=environ))
        if not together:
            running[-1].wait()
    for command, process in zip(commands, running, strict=True):
        if status := process.wait():
            raise UserError(f"`python {command}` ended with status {status}: see above")


def curve(folder: Path, stage: str) -> list[float]:
    """Validation mIoU after each epoch of a stage."""
    return [record["val_miou"] for record in read_records(folder) if record["stage"] == stage]


def summary(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    last, best = [c[-1] for c in curves], [max(c) for c in curves]
    return {
        "last": {"mean": statistics.mean(last), "std": statistics.stdev(last), "each": last},
        "best": {"mean": statistics.mean(best), "std": statistics.stdev(best), "each": best},
        "curves": [list(c) for c in curves],
    }


def plot_curves(axis: Axes, ways: dict[str, dict[str, Any]]) -> None:
    """All curves, thin, and their mean over the seeds."""
    for (name, way), color in zip(ways.items(), COLORS, strict=True):
        for values in way["curves"]:
            axis.plot(range(1, len(values) + 1), values, color=color, linewidth=0.7, alpha=0.6)
        mean = [statistics.mean(values) for values in zip(*way["curves"], strict=True)]
        last = way["last"]
        label = f"{name}: {last['mean']:.3f} ± {last['std']:.3f}"
        axis.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2.5, label=label)
    axis.set(xlabel="epoch of the full network's last stage", ylabel="val mIoU")
    axis.legend(loc="lower right")
    axis.set_ylim(bottom=0)


def plot_last(axis: Axes, ways: dict[str, dict[str, Any]]) -> None:
    """What each seed came to, best way on top; a line at the first way's mean."""
    order = sorted(ways, key=lambda name: ways[name]["last"]["mean"])
    for row, name in enumerate(order):
        last = ways[name]["last"]
        axis.plot(last["each"], [row] * len(last["each"]), "o", color=COLORS[0], alpha=0.6)
        axis.plot(last["mean"], row, "|", color="black", markersize=14)
    first = next(iter(ways))
    axis.axvline(ways[first]["last"]["mean"], color=COLORS[1], linewidth=1)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("val mIoU after the last epoch: each seed, and the mean")


def plot(path: Path, title: str, ways: dict[str, dict[str, Any]]) -> None:
    """Two ways as curves, more by their ends."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    (plot_curves if len(ways) == len(COLORS) else plot_last)(axis, ways)
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)


def table(ways: dict[str, dict[str, Any]], flags: dict[str, str]) -> str:
    """Markdown: each way's last mIoU, and what it gained on the first way, seed by seed."""
    first, *_ = ways.values()
    rows = ["| way | flags | val mIoU | each seed | gain |", "|---|---|---|---|---|"]
    for name, way in ways.items():
        last = way["last"]
        gain = last["mean"] - first["last"]["mean"]
        better = sum(a > b for a, b in zip(last["each"], first["last"]["each"], strict=True))
        rows.append(
            f"| {name} | {f'`{flags[name]}`' if flags[name] else ''} | {last['mean']:.3f} | "
            f"{', '.join(f'{value:.3f}' for value in last['each'])} | "
            + ("|" if way is first else f"{gain:+.3f}, {better} of {len(last['each'])} seeds |")
        )
    return "\n".join(rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--datadir", type=Path, help="CamVid, for finetuning and ablation")
    parser.add_argument("--pictures", type=Path, help="folders of classes, for finetuning")
    parser.add_argument("--runs", type=Path, default=Path("save/ways"),
                        help="folder of all runs, below the repository (save/ways)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--together", action="store_true",
                        help="the seeds at once, with a thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--page", type=Path, help="write the table between this page's marks")
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.experiment == "finetuning" and not (args.datadir and args.pictures):
        raise UserError("finetuning needs CamVid and pictures: give --datadir and --pictures")
    if len(args.seeds) < 2:
        raise UserError("one seed has no spread: give two --seeds or more")
    if args.experiment == "ablation" and not args.datadir:
        raise UserError("ablation needs CamVid: give --datadir")
    experiment = EXPERIMENTS[args.experiment]
    places = {key: shlex.quote(str(vars(args)[key])) for key in ("datadir", "pictures", "runs")}

    def written_out(command: str) -> list[str]:
        """For each seed, without duplicates."""
        return list(dict.fromkeys(command.format(seed=seed, **places) for seed in args.seeds))

    before = [written_out(command) for command in experiment.before]
    for commands in before:
        run(commands, args.together)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "device": describe_device(choose_device("cpu")),
        "environment": environment(ROOT),
        "seeds": args.seeds,
        "before": [f"python {command}" for commands in before for command in commands],
        "commands": {},
        "ways": {},
    }
    if args.experiment == "finetuning":
        records = read_records(ROOT / args.runs / "pictures")
        result["pretraining"] = max(records, key=lambda record: record["val_top1"])
    for name, way in experiment.ways.items():
        place = f"{args.runs}/{args.experiment}-{name.replace(', ', '-').replace(' ', '-')}"
        command = f"train/main.py {experiment.common} {way.flags} --seed {{seed}} --savedir "
        command += shlex.quote(place) + "-{seed} --resume auto"
        run(written_out(command), args.together)
        curves = [curve(ROOT / f"{place}-{seed}", way.stage) for seed in args.seeds]
        result["ways"][name] = summary(curves)
        result["commands"][name] = f"python {written_out(command)[0]}"
        write_json(args.out / f"{args.experiment}.json", result)
    ways = result["ways"]
    plot(args.out / f"{args.experiment}.png", experiment.title, ways)
    text = table(ways, {name: way.flags for name, way in experiment.ways.items()})
    print(text)
    if args.page:
        write_between_marks(args.page, f"benchmarks/ways.py {args.experiment}", text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
