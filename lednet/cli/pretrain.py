"""The command `lednet pretrain`: pretrain the encoder as a classifier."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from lednet.checkpoint import load_checkpoint, load_state
from lednet.cli import parsers, train_args
from lednet.cli.common import ROOT, recipe_folder
from lednet.data.cache import CLASSIFICATION_FLAGS, CachedDataset, command_line
from lednet.data.classification_transforms import IMAGENET_MEAN, IMAGENET_STD, ImageAugmentation
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.imagefolder import ImageFolderDataset
from lednet.data.loaders import end_loading, make_loaders
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.hub import load_weights
from lednet.io import process_command
from lednet.model import EncoderClassifier
from lednet.training.launch import config_from_args, launch, open_run, train_run
from lednet.training.loop import StageComponents
from lednet.training.run_dir import environment
from lednet.training.signals import CheckpointTimer
from lednet.training.stages import Stage
from lednet.training.tasks import Classification
from lednet.training.trainer import Trainer, seed_everything

ENCODER_FILE = "encoder.pth"


def run_path(args: argparse.Namespace) -> Path:
    return train_args.run_folder(args.savedir or "imagenet")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    args = train_args.parse_flags(parsers.pretrain(), run_path, recipe_folder("imagenet"), argv)
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
        options, defaults = vars(args), vars(parsers.pretrain().parse_args([]))
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
            "command": shlex.join(process_command()),
            "images": len(train_data),
            **{key: str(value) for key, value in environment().items()},
        },
    }
    net = EncoderClassifier(len(classes))
    run = open_run(args, run_path(args), net, [stage], meta, timer)
    log = run.run_dir.log
    if not args.resume and args.state:
        log(f"--state: {load_weights(net, args.state)}")

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

    about = (
        f"{len(classes)} classes, {len(train_data)} training and {len(val_data)} validation "
        f"images at {size}x{size}"
    )
    train_run(args, run, build_stage, about, "top-1")


def main(argv: Sequence[str] | None = None) -> Path:
    """Pretrain, resume, or evaluate; returns the folder of the run."""
    args = parse_options(argv)
    launch(args, evaluate if args.evaluate else train)
    return run_path(args)
