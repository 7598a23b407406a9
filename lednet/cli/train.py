"""The command `lednet train`: train both stages."""

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lednet.checkpoint import compare_keys, load_checkpoint, load_state
from lednet.cli import parsers, train_args
from lednet.cli.common import ROOT, dataset_options, recipe_folder
from lednet.data.cache import CachedDataset, command_line
from lednet.data.dataset import (
    SegmentationDataset,
    SkipCorruptDataset,
    pixel_shares,
    require_common_class,
)
from lednet.data.loaders import make_loaders
from lednet.data.registry import cache_split, open_training_data
from lednet.data.transforms import Augmentation
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.hub import resolve_weights
from lednet.model import LEDNet
from lednet.training import losses
from lednet.training.launch import config_from_args, launch, open_run, train_run
from lednet.training.loop import StageComponents, TrainingRun
from lednet.training.signals import CheckpointTimer
from lednet.training.stages import Stage, parse_curriculum, parse_sizes, plan_stages
from lednet.training.tasks import Segmentation
from lednet.training.trainer import FinetuneConfig, Trainer, seed_everything


def run_path(args: argparse.Namespace) -> Path:
    return train_args.run_folder(args.savedir or f"{args.dataset}-{args.variant}")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    args = train_args.parse_flags(parsers.train(), run_path, recipe_folder("train"), argv)
    if args.pyramid_channels and args.variant != "d128":
        raise UserError("--pyramid-channels goes with --variant d128: give both or neither")
    if args.reset_head and not args.state:
        raise UserError("--reset-head goes with --state: give both or neither")
    if args.val_stride == 1:
        raise UserError("--val-stride 1 leaves nothing to train on: give 2 or more")
    if args.class_uniform is not None and not 0 < args.class_uniform <= 1:
        raise UserError(f"--class-uniform is {args.class_uniform}: give more than 0, at most 1")
    if args.curriculum and args.annotations != "fine":
        raise UserError("--curriculum names the annotations of each part: leave --annotations out")
    train_args.require_schedule(args, min(stage.epochs for stage in stages_of(args)))
    return args


def stages_of(args: argparse.Namespace) -> list[Stage]:
    parts = [(args.annotations, args.num_epochs)]
    if args.curriculum:
        parts = parse_curriculum(args.curriculum)
    encoder_epochs = args.encoder_epochs or parts[0][1]
    if args.decoder or args.pretrained_encoder:
        encoder_epochs = None
    return plan_stages(parts, encoder_epochs, parse_sizes(args.progressive or ""))


def stage_costs(stages: list[Stage], args: argparse.Namespace) -> list[float]:
    """Cost of each stage in epochs at full size, by which --max-minutes is divided."""
    full = args.height * args.width
    return [stage.epochs * (math.prod(stage.size) / full if stage.size else 1) for stage in stages]


class Data:
    """Training and validation data of a stage, at working size; fills in --height and --width."""

    def __init__(self, args: argparse.Namespace, annotations: str):
        train: SegmentationDataset | CachedDataset
        val: SegmentationDataset | CachedDataset
        train, val = open_training_data(
            args.dataset, args.datadir or ROOT / "datasets" / args.dataset, args.height, args.width,
            with_val=args.with_val, **dataset_options(args) | {"annotations": annotations},
        )  # fmt: skip
        _, args.height, args.width = train.encoded_shape
        self.scheme, self.workers = train.scheme, max(1, args.num_workers)
        if args.cache:
            defaults = vars(parsers.train().parse_args([]))
            options = {**vars(args), "annotations": annotations}
            command = command_line(ROOT / "datasets/prepare_cityscapes.py", options, defaults)
            train = CachedDataset(args.cache / cache_split(annotations), train, command)
            val = CachedDataset(args.cache / "val", val, command)
        self.train = SkipCorruptDataset(train) if args.skip_corrupt else train
        self.val = val

    @functools.cached_property
    def class_counts(self) -> np.ndarray:
        """Pixels of each class in each training label, (len, num_classes + 1), read once."""
        return self.train.class_counts(self.workers)


def weights_for(args: argparse.Namespace, stage: Stage, data: Data) -> list[float]:
    """Class weights of a stage."""
    choice, num_classes = args.class_weights, data.scheme.num_classes
    if choice == "auto":
        released = args.dataset == "cityscapes" and stage.annotations == "fine"
        choice = "released" if released else "computed"
    if choice == "released":
        if args.dataset != "cityscapes":
            raise UserError("--class-weights released is for Cityscapes: choose computed")
        return list(losses.RELEASED_WEIGHTS[stage.part])
    if choice == "none":
        return [1.0] * num_classes
    shares = pixel_shares(data.class_counts)[:num_classes]
    return losses.class_weights(shares, losses.WEIGHT_OFFSETS[stage.part]).tolist()


def head_keys(net: LEDNet) -> set[str]:
    """Keys of the tensors of `net` whose shape depends on the number of classes."""
    own, channels = net.state_dict(), net.pyramid_channels if net.variant == "d128" else None
    with torch.device("meta"):
        larger = LEDNet(net.num_classes + 1, net.variant, channels).state_dict()
    return {key for key, value in own.items() if value.shape != larger[key].shape}


def require_outputs(net: LEDNet, state: dict[str, Tensor], path: Path) -> None:
    """Raise a `UserError` if `state` differs from `net` in the number of classes, and only so."""
    report = compare_keys(net, state)
    mismatched = {key for key, *_ in report.mismatched}
    if mismatched and mismatched <= head_keys(net) and not report.missing + report.unexpected:
        raise UserError(
            f"--state {path} has {report.mismatched[0][2][0]} outputs, and these classes need "
            f"{net.num_classes}: add --reset-head to train new layers of the classes, or take the "
            "encoder only with --pretrainedEncoder"
        )


def load_initial_weights(args: argparse.Namespace, run: TrainingRun, net: LEDNet) -> None:
    """Load the weights of --state and --pretrainedEncoder into `net` of a new run, with their
    normalization and, for the model card, the description of their training."""
    for flag, path, part in (
        ("--state", args.state, ""),
        ("--pretrainedEncoder", args.pretrained_encoder, "encoder."),
    ):
        if path:
            content = load_checkpoint(resolve_weights(path))
            state, meta = content["state_dict"], content.get("meta", {})
            new = head_keys(net) if args.reset_head and not part else ()
            state |= {key: net.state_dict()[key] for key in new if key in state}
            target: nn.Module = net
            if args.decoder and not any(key.startswith("decoder.") for key in state):
                target = net.encoder_stage()  # the weights of stage 1
            elif not part:
                require_outputs(net, state, path)
            report = load_state(target, state, path, part)
            run.meta |= {key: meta[key] for key in ("mean", "std") if key in meta}
            if flag == "--state" and (earlier := meta.get("training", meta.get("earlier"))):
                run.meta["earlier"] = earlier
            layers = sorted({key.rsplit(".", 2 if "decoder" in key else 1)[0] for key in new})
            kept = f", of which {len(new)} are new ({', '.join(layers)})" if new else ""
            run.run_dir.log(f"{flag}: {report}{kept}")


def train(
    args: argparse.Namespace, dist_context: DistributedContext, timer: CheckpointTimer
) -> None:
    """Build data and network, then train the remaining stages."""
    stages = stages_of(args)
    open_data = functools.lru_cache(maxsize=1)(functools.partial(Data, args))
    scheme = open_data(stages[0].annotations).scheme
    seed_everything(args.seed)
    net = LEDNet(scheme.num_outputs, args.variant, args.pyramid_channels)
    meta = {
        "model": f"LEDNet {args.variant}",
        "dataset": scheme.name,
        "classes": list(scheme.classes),
        "label_values": sorted(map(list, scheme.file_ids.items())),
        "colors": [list(color) for color in scheme.colors],
        "mean": [0.0, 0.0, 0.0],  # the paper trains on raw [0, 1] images
        "std": [1.0, 1.0, 1.0],
        "size": [args.height, args.width],
    }
    run = open_run(
        args, run_path(args), net, stages, meta, timer, stage_costs(stages, args), scheme
    )
    log = run.run_dir.log
    if not args.resume:
        load_initial_weights(args, run, net)
        if not scheme.has_void:
            net.disable_last_class()

    def build_stage(stage: Stage) -> StageComponents:
        data = open_data(stage.annotations)
        require_common_class(data.train, data.val)
        height, width = stage.size or (args.height, args.width)
        epochs = f"{stage.epochs} epochs" if args.max_minutes is None else "epochs"
        log(
            f"{stage.title}: {epochs} of {len(data.train)} training and "
            f"{len(data.val)} validation images of {scheme.name} at {height}x{width}"
        )
        model: nn.Module = net.encoder_stage()
        pretrained = None
        if stage.part == "decoder":
            model = net
            pretrained = FinetuneConfig(net.encoder, args.encoder_lr_factor, args.freeze_encoder)
        # The head of stage 1 has no part in stage 2.
        net.encoder_head.requires_grad_(stage.part == "encoder")
        task = Segmentation(
            losses.WeightedCrossEntropy(weights_for(args, stage, data), scheme.num_outputs),
            Augmentation(args.augment, run.meta["mean"], run.meta["std"], stage.size),
            scheme.classes,
        )
        trainer = Trainer(
            model, task, stage.epochs, dist_context, config_from_args(args), args.iou_train,
            pretrained, log,
        )  # fmt: skip
        loaders = make_loaders(
            data.train, data.val, dist_context, args.batch_size, args.num_workers, args.seed,
            class_counts=data.class_counts if args.class_uniform else None,
            class_uniform=args.class_uniform or 0.0,
            on_device=args.cache_device,
        )  # fmt: skip
        return StageComponents(trainer, *loaders)

    train_run(args, run, build_stage, f"LEDNet {args.variant}", "mIoU")


def main(argv: Sequence[str] | None = None) -> Path:
    """Train or resume a run; returns its folder."""
    args = parse_options(argv)
    launch(args, train)
    return run_path(args)
