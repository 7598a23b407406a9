"""Compare ways to train: a pretrained encoder, coarse annotations first, changes of a recipe.

    python benchmarks/ways.py finetuning --datadir /data/camvid \
        --pictures /data/imagefolder_cifar10 --runs save/ways
    python benchmarks/ways.py coarse --runs save/ways
    python benchmarks/ways.py ablation --datadir /data/camvid --runs save/ways \
        --seeds 1 2 --together

Each way is trained with every seed, by the commands in the JSON file; existing runs are resumed,
so an interrupted command can be repeated. The results are written to
benchmarks/results/<experiment>.json and .png. "finetuning" (CamVid at 180x240) takes 40 minutes
on two cores with bf16, "coarse" (toy streets, drawn if needed) 15. "ablation" changes one option
at a time in the recipe camvid, in 4 more epochs after 100, and scores on a held-out recording:
35 minutes.
"""

import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._common import RESULTS, ROOT, Row, conditions, make_parser, markdown, save_figure
from lednet.device import choose_device
from lednet.errors import UserError, exit_on_user_error
from lednet.io import write_between_marks, write_json
from lednet.training.run_dir import read_records

COLORS = ("#4c78a8", "#f58518")
FAST = "--precision bf16 --channels-last --device cpu --num-workers"
SMALL_CAMVID = "--recipe camvid --datadir {datadir} --val-prefix 0006R0 --height 180 --width 240 "
SMALL_CAMVID += f"{FAST} 0 --no-iouTrain"


class Experiment(NamedTuple):
    """Ways to train that are compared. {runs} is the folder of all runs, {seed} the seed.

    Attributes:
        title: title of the plot.
        before: a command whose results the ways use; with {seed}, run for each seed.
        common: flags of train/main.py for all ways.
        ways: further flags of each way by its name.
        stages: the last stage of each way, whose epochs are compared.
    """

    title: str
    before: str
    common: str
    ways: dict[str, str]
    stages: tuple[str, ...]


EXPERIMENTS = {
    "finetuning": Experiment(
        "CamVid at 180x240",
        "imagenet/lednet_imagenet.py --datadir {pictures} --recipe modern --stored-size 72 "
        "--crop-size 64 --batch-size 64 --num-epochs 60 --lr 0.05 --mixup 0 "
        f"{FAST} 1 --savedir {{runs}}/pictures --resume auto",
        "--dataset camvid --datadir {datadir} --height 180 --width 240 --num-epochs 10 "
        f"--batch-size 6 --augment modern {FAST} 1",
        {
            "from scratch": "--decoder",
            "pretrained encoder": "--pretrainedEncoder {runs}/pictures/encoder.pth",
        },
        ("decoder",) * 2,
    ),
    "coarse": Experiment(
        "Toy streets at 128x256: 48 fine images, 192 coarse ones",
        "datasets/make_toy_cityscapes.py --out {runs}/toy --train 48 --train-extra 144",
        f"--datadir {{runs}}/toy --height 128 --width 256 --batch-size 6 --lr 1e-3 {FAST} 1",
        {
            "fine": "--encoder-epochs 4 --num-epochs 12",
            "coarse then fine": "--encoder-epochs 4 --curriculum coarse:8,fine:12",
        },
        ("decoder", "fine-2"),
    ),
    "ablation": Experiment(
        "CamVid at 180x240, recording 0006R0 held out: 4 epochs after 100",
        "-m torch.distributed.run --standalone --nproc-per-node 2 train/main.py "
        f"{SMALL_CAMVID} --progressive 120x160:60 --num-epochs 40 --batch-size 3 "
        "--savedir {runs}/base --resume auto",
        f"{SMALL_CAMVID} --num-epochs 4 --warmup-epochs 1 --lr 5e-4 --state {{runs}}/base",
        {
            "unchanged": "",
            "without EMA": "--ema-decay 0",
            "no class weights": "--class-weights none",
            "class-uniform half": "--class-uniform 0.5",
            "paper augmentation": "--augment paper",
        },
        ("decoder",) * 5,
    ),
}


def run(commands: Sequence[str], together: bool) -> None:
    """Run commands, one after the other, or at once with one thread each.

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


def summary(curves: Sequence[Sequence[float]]) -> Row:
    """Last and best val mIoU of the runs of a way: mean, standard deviation and each."""
    ends = {"last": [c[-1] for c in curves], "best": [max(c) for c in curves]}
    found: Row = {
        key: {"mean": statistics.mean(each), "std": statistics.stdev(each), "each": each}
        for key, each in ends.items()
    }
    return found | {"curves": [list(c) for c in curves]}


def plot_curves(axis: Axes, ways: dict[str, Row]) -> None:
    """All curves, thin, and their mean over the seeds."""
    for (name, way), color in zip(ways.items(), COLORS, strict=True):
        for values in way["curves"]:
            axis.plot(range(1, len(values) + 1), values, color=color, linewidth=0.7, alpha=0.6)
        mean = [statistics.mean(values) for values in zip(*way["curves"], strict=True)]
        label = f"{name}: {way['last']['mean']:.3f} ± {way['last']['std']:.3f}"
        axis.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2.5, label=label)
    axis.set(xlabel="epoch of the full network's last stage", ylabel="val mIoU")
    axis.legend(loc="lower right")
    axis.set_ylim(bottom=0)


def plot_last(axis: Axes, ways: dict[str, Row]) -> None:
    """The last score of each seed, best way on top; a line at the first way's mean."""
    order = sorted(ways, key=lambda name: ways[name]["last"]["mean"])
    for row, name in enumerate(order):
        last = ways[name]["last"]
        axis.plot(last["each"], [row] * len(last["each"]), "o", color=COLORS[0], alpha=0.6)
        axis.plot(last["mean"], row, "|", color="black", markersize=14)
    axis.axvline(next(iter(ways.values()))["last"]["mean"], color=COLORS[1], linewidth=1)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("val mIoU after the last epoch: each seed, and the mean")


def table(ways: dict[str, Row], flags: dict[str, str]) -> str:
    """Markdown: the last mIoU of each way, and its gain over the first way, seed by seed."""
    first = next(iter(ways.values()))["last"]
    rows = []
    for name, way in ways.items():
        last, gain = way["last"], ""
        if last is not first:
            better = sum(a > b for a, b in zip(last["each"], first["each"], strict=True))
            gain = f"{last['mean'] - first['mean']:+.3f}, {better} of {len(last['each'])} seeds"
        each = ", ".join(f"{value:.3f}" for value in last["each"])
        quoted = flags[name] and f"`{flags[name]}`"
        rows.append((name, quoted, f"{last['mean']:.3f}", each, gain))
    return markdown(("way", "flags", "val mIoU", "each seed", "gain"), rows)


def main() -> None:
    parser = make_parser(__doc__, "--page")
    # fmt: off
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--datadir", type=Path, help="CamVid, for finetuning and ablation")
    parser.add_argument("--pictures", type=Path, help="folders of classes, for finetuning")
    parser.add_argument("--runs", type=Path, default=Path("save/ways"),
                        help="folder of all runs, below the repository (default: save/ways)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--together", action="store_true",
                        help="run the seeds at once, with one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    # fmt: on
    args = parser.parse_args()
    if len(args.seeds) < 2:
        raise UserError("one seed has no spread: give two --seeds or more")
    experiment = EXPERIMENTS[args.experiment]
    for flag in ("datadir", "pictures"):
        if f"{{{flag}}}" in experiment.before + experiment.common and not vars(args)[flag]:
            raise UserError(f"{args.experiment} needs data: give --{flag}")
    paths = {key: shlex.quote(str(vars(args)[key])) for key in ("datadir", "pictures", "runs")}

    def for_each_seed(command: str) -> list[str]:
        return list(dict.fromkeys(command.format(seed=seed, **paths) for seed in args.seeds))

    before = for_each_seed(experiment.before)
    run(before, args.together)
    result = conditions(choose_device("cpu")) | {
        "seeds": args.seeds,
        "before": [f"python {command}" for command in before],
        "commands": {},
        "ways": {},
    }
    if args.experiment == "finetuning":
        records = read_records(ROOT / args.runs / "pictures")
        result["pretraining"] = max(records, key=lambda record: record["val_top1"])
    for (name, flags), stage in zip(experiment.ways.items(), experiment.stages, strict=True):
        place = f"{args.runs}/{args.experiment}-{name.replace(' ', '-')}"
        commands = for_each_seed(
            f"train/main.py {experiment.common} {flags} --seed {{seed}} --savedir "
            f"{shlex.quote(place)}-{{seed}} --resume auto"
        )
        run(commands, args.together)
        logs = (read_records(ROOT / f"{place}-{seed}") for seed in args.seeds)
        curves = [[r["val_miou"] for r in log if r["stage"] == stage] for log in logs]
        result["ways"][name] = summary(curves)
        result["commands"][name] = f"python {commands[0]}"
        write_json(args.out / f"{args.experiment}.json", result)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    (plot_curves if len(result["ways"]) == len(COLORS) else plot_last)(axis, result["ways"])
    axis.set_title(experiment.title, fontsize=11)
    axis.grid(alpha=0.3)
    save_figure(figure, args.out / f"{args.experiment}.png")
    text = table(result["ways"], experiment.ways)
    print(text)
    if args.page:
        write_between_marks(args.page, f"benchmarks/ways.py {args.experiment}", text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
