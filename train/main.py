"""Train LEDNet: the encoder on labels at 1/8 size, then the full network.

    python train/main.py --datadir /data/cityscapes
    python train/main.py --dataset camvid --datadir /data/camvid --num-epochs 50
    python train/main.py --savedir cityscapes-d20 --resume
    torchrun --nproc-per-node=4 train/main.py --datadir /data/cityscapes
    torchrun --nproc-per-node=4 --max-restarts=3 train/main.py --savedir long --resume auto

The defaults are the paper's recipe: Adam 5e-4, weight decay 1e-4, poly decay 0.9,
300 epochs, class-weighted cross-entropy, 512x1024. Times and scores to expect are
in README.md. Everything a run writes lies in its folder below save/.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lednet.data.cache import CachedDataset, command_line
from lednet.data.datasets import (
    DATASETS,
    SegmentationDataset,
    SkippingDataset,
    open_training_data,
    pixel_shares,
)
from lednet.data.transforms import PRESETS, Augmentation, resize_transform
from lednet.errors import UserError, exit_on_user_error
from lednet.files import plain_values, write_text
from lednet.model import VARIANTS, LEDNet, count_parameters
from lednet.precision import AMP_DTYPES, autocast
from lednet.training.checkpoints import Checkpoints
from lednet.training.dashboard import Dashboard
from lednet.training.distributed import (
    World,
    join_world,
    leave_world,
    lost_processes,
    synchronize_batch_norm,
)
from lednet.training.engine import Optimization, Trainer, seed_everything
from lednet.training.fit import PROGRESS_KEYS, Fit, Progress
from lednet.training.loading import make_loaders, worker_failures
from lednet.training.loss import (
    RELEASED_WEIGHTS,
    WEIGHT_OFFSETS,
    WeightedCrossEntropy,
    class_weights,
)
from lednet.training.runs import BEST, STAGES, RunFolder, holds_run, read_options
from lednet.training.stopping import Keeper, Stopped, StopRequest
from lednet.weights import load_state, load_weights

NO_NORMALIZATION = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""The paper trains on raw [0, 1] images."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    switch = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="cityscapes")
    data.add_argument("--datadir", type=Path, help="data set's folder (datasets/<dataset>)")
    data.add_argument(
        "--annotations",
        choices=("fine", "coarse"),
        default="fine",
        help="Cityscapes: coarse trains on train_extra, and validates on fine val",
    )
    data.add_argument(
        "--labels",
        choices=("auto", "labelIds", "labelTrainIds"),
        default="auto",
        help="what Cityscapes label files hold (told by their names)",
    )
    data.add_argument("--classes", type=Path, help="class file of own data (classes.yaml)")
    data.add_argument(
        "--val-every",
        type=int,
        default=0,
        metavar="N",
        help="no val split: hold out every N-th training image instead",
    )
    data.add_argument("--height", type=int, help="training height in pixels (Cityscapes: 512)")
    data.add_argument("--width", type=int, help="training width in pixels (Cityscapes: 1024)")
    data.add_argument(
        "--augment",
        choices=PRESETS,
        default="paper",
        help="paper: flip and shift; modern: scale, crop, flip, colour",
    )
    data.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="read the pairs that datasets/prepare_cityscapes.py has decoded there",
    )
    data.add_argument(
        "--num-workers", type=int, default=min(4, os.cpu_count() or 1), help="loading processes"
    )
    data.add_argument(
        "--skip-damaged",
        action="store_true",
        help="replace training images that cannot be read by others, count and name them",
    )

    net = parser.add_argument_group("network")
    net.add_argument(
        "--variant",
        choices=VARIANTS,
        default="d20",
        help="d20: lighter, 0.93 M parameters; d128: heavier, 2.29 M",
    )
    net.add_argument(
        "--pyramid-channels", type=int, metavar="D", help="another width for d128's pyramid"
    )
    net.add_argument("--state", type=Path, help="weights of a full network to start from")
    net.add_argument(
        "--pretrainedEncoder",
        type=Path,
        dest="pretrained_encoder",
        help="weights to take the encoder from; skips stage 1",
    )
    net.add_argument("--decoder", action="store_true", help="start at stage 2")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--num-epochs", type=int, default=300, help="of each stage")
    recipe.add_argument("--encoder-epochs", type=int, help="of stage 1 (as --num-epochs)")
    recipe.add_argument("--batch-size", type=int, default=5, help="images a step, per process")
    recipe.add_argument("--lr", type=float, default=5e-4)
    recipe.add_argument("--weight-decay", type=float, default=1e-4)
    recipe.add_argument(
        "--class-weights",
        choices=("auto", "released", "computed", "none"),
        default="auto",
        help="auto: the released list for Cityscapes fine, else 1/ln(c+share) "
        "of the training labels",
    )
    recipe.add_argument("--seed", type=int, default=1)
    recipe.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches whose gradients make a step"
    )
    recipe.add_argument(
        "--clip-norm", type=float, metavar="X", help="largest norm of the gradients (no limit)"
    )
    recipe.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="score and keep a moving average of the weights, 0.999 for instance",
    )
    recipe.add_argument(
        "--sync-batch-norm",
        action="store_true",
        help="batch norm over the images of all GPUs (untested)",
    )
    recipe.add_argument(
        "--skip-bad-steps",
        action="store_true",
        help="leave out a step whose loss is not finite, instead of stopping",
    )

    speed = parser.add_argument_group("speed")
    speed.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    speed.add_argument(
        "--channels-last", action="store_true", help="memory layout that suits bf16 and fp16"
    )
    speed.add_argument("--compile", action="store_true", help="torch.compile the network")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--savedir",
        default=None,
        help="run folder; a bare name lies below save/ (<dataset>-<variant>)",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        choices=("always", "auto"),
        const="always",
        help="continue the run in --savedir with its options; flags given override. auto: "
        "where there is none yet, start it (for torchrun --max-restarts and job queues)",
    )
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    run.add_argument(
        "--cuda", action="store_const", const="cuda", dest="device", help="same as --device cuda"
    )
    run.add_argument(
        "--iouTrain",
        action=switch,
        default=True,
        dest="iou_train",
        help="measure the mIoU of the training batches too",
    )
    run.add_argument(
        "--save-minutes",
        type=float,
        default=10,
        metavar="X",
        help="a checkpoint every X minutes, besides the one after each epoch; 0: none (10)",
    )
    run.add_argument(
        "--save-steps", type=int, default=0, metavar="N", help="and every N steps; 0: none"
    )
    run.add_argument(
        "--keep-checkpoints", type=int, default=2, metavar="N", help="to resume from (2)"
    )
    run.add_argument(
        "--epochs-save",
        type=int,
        default=0,
        metavar="N",
        help="also keep the weights of every N-th epoch",
    )
    run.add_argument("--visualize", action="store_true", help="show the run on a visdom server")
    run.add_argument("--port", type=int, default=8097, help="of the visdom server")
    return parser  # fmt: skip


def run_path(args: argparse.Namespace) -> Path:
    """A bare --savedir lies below save/, anything with a slash where it says."""
    name = args.savedir or f"{args.dataset}-{args.variant}"
    return ROOT / "save" / name if Path(name).name == name else Path(name)


def parse_options() -> argparse.Namespace:
    """Arguments; with --resume the run's own options are the defaults."""
    parser = build_parser()
    args = parser.parse_args()
    if args.resume == "auto" and not holds_run(run_path(args)):
        args.resume = None
    if args.resume:
        saved = read_options(run_path(args))
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{key: value for key, value in saved.items() if key in known})
        args = parser.parse_args()
    for name in (
        "num_epochs",
        "batch_size",
        "encoder_epochs",
        "height",
        "width",
        "pyramid_channels",
        "accumulate",
        "keep_checkpoints",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
    for name in ("val_every", "num_workers", "epochs_save", "save_minutes", "save_steps"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is negative: give 0 or more")
    if args.pyramid_channels and args.variant != "d128":
        raise UserError("--pyramid-channels goes with --variant d128: give both or neither")
    if args.clip_norm is not None and args.clip_norm <= 0:
        raise UserError(f"--clip-norm is {args.clip_norm}: give more than 0")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise UserError(f"--ema-decay is {args.ema_decay}: give a number between 0 and 1")
    if args.val_every == 1:
        raise UserError("--val-every 1 leaves nothing to train on: give 2 or more")
    return args


def open_data(args: argparse.Namespace) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation data at working size; fills in --height and --width."""
    train, val, size = open_training_data(
        args.dataset,
        args.datadir or ROOT / "datasets" / args.dataset,
        args.height,
        args.width,
        annotations=args.annotations,
        labels=args.labels,
        class_file=args.classes,
        val_every=args.val_every,
    )
    args.height, args.width = size
    if args.cache:
        defaults = vars(build_parser().parse_args([]))
        command = command_line(ROOT / "datasets/prepare_cityscapes.py", vars(args), defaults)
        return (
            CachedDataset(args.cache / "train", train, size, command),
            CachedDataset(args.cache / "val", val, size, command),
        )
    train.transform = val.transform = resize_transform(size)
    return train, val


def weights_for(args: argparse.Namespace, train: SegmentationDataset) -> dict[str, list[float]]:
    """Class weights of each stage."""
    choice = args.class_weights
    if choice == "auto":
        released = args.dataset == "cityscapes" and args.annotations == "fine"
        choice = "released" if released else "computed"
    if choice == "released":
        if args.dataset != "cityscapes":
            raise UserError("--class-weights released is for Cityscapes: choose computed")
        return {stage: list(weights) for stage, weights in RELEASED_WEIGHTS.items()}
    if choice == "none":
        return dict.fromkeys(STAGES, [1.0] * train.scheme.num_classes)
    shares = pixel_shares(train, max(1, args.num_workers))[: train.scheme.num_classes]
    return {stage: class_weights(shares, c).tolist() for stage, c in WEIGHT_OFFSETS.items()}


def starting_point(
    args: argparse.Namespace, net: LEDNet, run: RunFolder, checkpoints: Checkpoints
) -> tuple[Progress, dict | None]:
    """Load what the flags ask for; returns where to begin, and a trainer's state to restore."""
    if args.resume:
        path, checkpoint, complaints = checkpoints.load_latest(run.main)
        for complaint in complaints:
            run.say(f"{complaint}; going on from {path.name}")
        if not {"meta", "trainer", "progress"} <= checkpoint.keys():
            raise UserError(f"{path} holds weights alone: start a new run with --state {path}")
        load_state(net, checkpoint["state_dict"], path)
        meta, state = checkpoint["meta"], checkpoint["progress"]
        progress = Progress(meta["stage"], meta["epoch"], **{k: state[k] for k in PROGRESS_KEYS})
        run.write_records(progress.records)
        step = progress.tally["step"] if progress.tally else 0
        within = f", {step} batches into the next" if step else ""
        run.say(f"resuming {progress.stage} after epoch {progress.epoch}{within} ({path.name})")
        return progress, checkpoint["trainer"]
    if args.state:
        run.say(f"--state: {load_weights(net, args.state)}")
    if args.pretrained_encoder:
        report = load_weights(net, args.pretrained_encoder, part="encoder.")
        run.say(f"--pretrainedEncoder: {report}")
    skip = args.decoder or args.pretrained_encoder
    return Progress("decoder" if skip else "encoder"), None


def train_stages(args: argparse.Namespace, world: World) -> None:
    """Build data and network, then train the stages that are left."""
    train, val = open_data(args)
    run = RunFolder(run_path(args), bool(args.resume), world.is_main)
    checkpoints = Checkpoints(run.path, args.keep_checkpoints)
    scheme = train.scheme
    seed_everything(args.seed)
    net = LEDNet(scheme.num_outputs, args.variant, args.pyramid_channels)
    progress, trainer_state = starting_point(args, net, run, checkpoints)
    net.to(world.device)
    if args.sync_batch_norm:
        net = synchronize_batch_norm(net, world)
    weights = weights_for(args, train)
    if args.skip_damaged:
        train = SkippingDataset(train)
    mean, std = NO_NORMALIZATION
    augmentation = Augmentation(args.augment, mean, std)
    run.write_options(plain_values(vars(args)), ROOT)
    if world.is_main:
        write_text(run.path / "model.txt", f"{net}\n\n{count_parameters(net):,} parameters\n")
    run.say(
        f"{scheme.name}: {len(train)} training and {len(val)} validation images at "
        f"{args.height}x{args.width}; LEDNet {args.variant}, {count_parameters(net):,} "
        f"parameters, on {world.size} x {world.device}; {run.path}"
    )
    dashboard = None
    if args.visualize and world.is_main:
        dashboard = Dashboard(run.path.name, scheme, augmentation, port=args.port)
    meta = {
        "dataset": scheme.name,
        "classes": list(scheme.classes),
        "colors": [list(color) for color in scheme.colors],
        "mean": list(mean),
        "std": list(std),
        "size": [args.height, args.width],
    }
    epochs = {"encoder": args.encoder_epochs or args.num_epochs, "decoder": args.num_epochs}
    optimization = Optimization(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Optimization)}
    )
    request = StopRequest()
    keeper = Keeper(world, request, args.save_steps, args.save_minutes)
    with request.watching(), worker_failures():
        for stage in STAGES[STAGES.index(progress.stage) :]:
            if stage != progress.stage:
                progress = Progress(stage, steps=progress.steps, records=progress.records)
                trainer_state = None
            # The head of stage 1 has no part in stage 2.
            net.encoder_head.requires_grad_(stage == "encoder")
            trainer = Trainer(
                net.encoder_stage() if stage == "encoder" else net,
                WeightedCrossEntropy(weights[stage], scheme.num_outputs),
                augmentation,
                scheme.num_classes,
                epochs[stage],
                world,
                optimization,
                args.iou_train,
            )
            if trainer_state is not None:
                trainer.load_state_dict(trainer_state)
            loaders = make_loaders(train, val, world, args.batch_size, args.num_workers, args.seed)
            fit = Fit(
                trainer,
                net,
                loaders,
                progress,
                run,
                checkpoints,
                meta,
                args.seed,
                keeper,
                dashboard,
                args.epochs_save,
            )
            fit.train()
    run.say(
        f"done: best val mIoU {progress.best_miou:.3f}; weights {run.path / BEST['decoder']}, "
        f"curves {run.path / 'curves.png'}"
    )


def main() -> None:
    args = parse_options()
    with lost_processes():
        world = join_world(args.device)
    try:
        with autocast(world.device, args.precision):
            pass  # refuses a precision that the device lacks, before anything is written
        with lost_processes():
            train_stages(args, world)
    except Stopped as stopped:
        if world.is_main:
            print(f"{stopped}; go on with --resume", file=sys.stderr)
        sys.exit(stopped.exit_status)
    finally:
        leave_world()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
