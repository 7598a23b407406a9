"""Pretrain LEDNet's encoder as a classifier, on ImageNet or any folders of classes.

    python imagenet/lednet_imagenet.py --datadir /data/imagenet
    python imagenet/lednet_imagenet.py --datadir /data/imagenet --recipe modern --precision bf16
    python imagenet/lednet_imagenet.py --savedir imagenet --resume
    python imagenet/lednet_imagenet.py --datadir /data/imagenet --evaluate save/imagenet/best.pth
    torchrun --nproc-per-node=4 imagenet/lednet_imagenet.py --datadir /data/imagenet --batch-size 64

The data are in train/<class>/* and val/<class>/*. The run's folder in save/ then holds
encoder.pth, the best epoch's encoder with its normalization, for

    python train/main.py --datadir /data/cityscapes --pretrainedEncoder save/imagenet/encoder.pth

The default is the paper's recipe: SGD 0.1 with momentum 0.9 and weight decay 1e-4, batch 256,
150 epochs, constant for 15, then times 0.95 an epoch; random crops of 224x224, flipped. "modern":
cosine after a warm-up, label smoothing, mixup, colour jitter, a moving average of the weights.
Hours to expect on ImageNet: docs/training.md. 2,000 small images take minutes on two cores.
"""

import argparse
from pathlib import Path

from lednet.cli import common, train_args

ROOT = Path(__file__).resolve().parents[1]


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--datadir", type=Path, default=ROOT / "datasets/imagenet",
                      help="folder with train/ and val/ (default: datasets/imagenet)")
    data.add_argument("--stored-size", type=common.POSITIVE, default=256, metavar="S",
                      help="images are resized to SxS pixels, from which the crops are taken")
    data.add_argument("--crop-size", type=common.POSITIVE, default=224, metavar="S",
                      help="side of the network's input")
    data.add_argument("--cache", type=Path, metavar="DIR",
                      help="read the decoded images that datasets/prepare_imagenet.py has written "
                           "to DIR")
    train_args.add_loading_flags(data)

    recipe = parser.add_argument_group("recipe", "the defaults come from --recipe")
    train_args.add_recipe_flags(recipe, "SGD with momentum 0.9")
    recipe.add_argument("--augment", choices=common.AUGMENTATIONS,
                        help="paper: crop and flip; modern: colour too")
    recipe.add_argument("--label-smoothing", type=common.at_least(0, float), metavar="X",
                        help="0 to below 1")
    recipe.add_argument("--mixup", type=common.at_least(0, float), metavar="A",
                        help="alpha of Beta(A, A); 0: none")

    net = parser.add_argument_group("network")
    net.add_argument("--state", type=Path, help="start from the weights of a classifier")
    net.add_argument("--evaluate", type=Path, metavar="FILE",
                     help="evaluate these weights on val instead of training")
    train_args.add_run_flags(parser, "imagenet")
    return parser
# fmt: on


if __name__ == "__main__":
    common.print_help_early(build_parser)

import functools
import shlex
import sys
from collections.abc import Sequence

from lednet.checkpoint import load_checkpoint, load_state
from lednet.data.cache import CLASSIFICATION_FLAGS, CachedDataset, command_line
from lednet.data.classification_transforms import IMAGENET_MEAN, IMAGENET_STD, ImageAugmentation
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.imagefolder import ImageFolderDataset
from lednet.data.loaders import end_loading, make_loaders
from lednet.distributed import DistributedContext
from lednet.errors import UserError, exit_on_user_error
from lednet.hub import load_weights
from lednet.model import EncoderClassifier, count_parameters
from lednet.training.launch import config_from_args, launch, open_run, prepare_net
from lednet.training.loop import StageComponents, report_result, train_stages
from lednet.training.run_dir import environment
from lednet.training.signals import CheckpointTimer
from lednet.training.stages import Stage
from lednet.training.tasks import Classification
from lednet.training.trainer import Trainer, seed_everything

ENCODER_FILE = "encoder.pth"


def run_path(args: argparse.Namespace) -> Path:
    return train_args.run_folder(ROOT, args.savedir or "imagenet")


def parse_options() -> argparse.Namespace:
    args = train_args.parse_flags(build_parser(), run_path, ROOT / "imagenet/recipes")
    if not 0 <= args.label_smoothing < 1:
        raise UserError(f"--label-smoothing is {args.label_smoothing}: give 0 to below 1")
    train_args.require_schedule(args, args.num_epochs)
    return args


def open_data(
    args: argparse.Namespace, split: str, classes: Sequence[str] | None = None
) -> ImageFolderDataset | CachedDataset:
    """A split; `classes` are those that it must have."""
    data = ImageFolderDataset(args.datadir / split, args.stored_size, classes)
    if args.cache:
        options, defaults = vars(args), vars(build_parser().parse_args([]))
        script = ROOT / "datasets/prepare_imagenet.py"
        command = command_line(script, options, defaults, CLASSIFICATION_FLAGS)
        return CachedDataset(args.cache / split, data, command)
    return data


def evaluate(
    args: argparse.Namespace, dist_context: DistributedContext, timer: CheckpointTimer
) -> None:
    """Print the scores of --evaluate."""
    val = open_data(args, "val")
    net = EncoderClassifier(len(val.classes))
    content = load_checkpoint(args.evaluate)
    known = content.get("meta", {}).get("classes")
    if known is not None and tuple(known) != tuple(val.classes):
        raise UserError(
            f"{args.evaluate} was trained on other classes than those of {args.datadir}: evaluate "
            "it on the data that it was trained on"
        )
    report = load_state(net, content["state_dict"], args.evaluate)
    augmentation = ImageAugmentation(args.crop_size, num_classes=len(val.classes))
    task = Classification(augmentation, val.classes)
    config = config_from_args(args, ema_decay=None)
    trainer = Trainer(net.to(dist_context.device), task, 1, dist_context, config)
    _, loader = make_loaders(val, val, dist_context, args.batch_size, args.num_workers, args.seed)
    try:
        scores = trainer.evaluate(loader, "val")
    finally:
        end_loading(loader)
    if dist_context.is_main:
        print(report)
        print(
            f"top-1 {scores['top1']:.4f}  top-5 {scores['top5']:.4f}  loss {scores['loss']:.4f}  "
            f"of {len(val)} images at {args.crop_size}x{args.crop_size}"
        )


def train(
    args: argparse.Namespace, dist_context: DistributedContext, timer: CheckpointTimer
) -> None:
    train_data = open_data(args, "train")
    classes, size = train_data.classes, args.crop_size
    val_data = open_data(args, "val", classes)
    title = f"Classifier: {len(classes)} classes"
    stage = Stage("classifier", title, args.num_epochs, encoder_file=ENCODER_FILE)
    seed_everything(args.seed)
    meta = {
        "model": "LEDNet's encoder",
        "dataset": args.datadir.name,
        "classes": list(classes),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "size": [size, size],
        "provenance": {
            "command": shlex.join(["python", *sys.argv]),
            "images": len(train_data),
            **{key: str(value) for key, value in environment(ROOT).items()},
        },
    }
    net = EncoderClassifier(len(classes))
    run = open_run(args, run_path(args), net, [stage], meta, timer)
    log = run.run_dir.log
    state = run.resume() if args.resume else ()
    if not args.resume and args.state:
        log(f"--state: {load_weights(net, args.state)}")
    prepare_net(args, run, ROOT)

    def build_stage(stage: Stage) -> StageComponents:
        augmentation = ImageAugmentation(size, args.augment, len(classes), mixup=args.mixup)
        task = Classification(augmentation, classes, args.label_smoothing)
        config = config_from_args(args, optimizer="sgd")
        trainer = Trainer(net, task, stage.epochs, dist_context, config, notify=log)
        data = SkipCorruptDataset(train_data) if args.skip_corrupt else train_data
        loaders = make_loaders(
            data, val_data, dist_context, args.batch_size, args.num_workers, args.seed,
            on_device=args.cache_device,
        )  # fmt: skip
        return StageComponents(trainer, *loaders)

    log(
        f"{len(classes)} classes, {len(train_data)} training and {len(val_data)} validation "
        f"images at {size}x{size}; {count_parameters(net):,} parameters, on {dist_context.size} x "
        f"{dist_context.device}; {run.run_dir.path}"
    )
    progress = train_stages(run, build_stage, *state)
    report_result(run, progress, "top-1", ENCODER_FILE)


if __name__ == "__main__":
    with exit_on_user_error():
        args = parse_options()
        launch(args, functools.partial(evaluate if args.evaluate else train, args))
