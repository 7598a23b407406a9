"""Training with more than one part: pretrained encoders, curricula, classification."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn

from lednet import UserError
from lednet.checkpoint import load_checkpoint
from lednet.data.classification_transforms import IMAGENET_MEAN, IMAGENET_STD, ImageAugmentation
from lednet.distributed import DistributedContext
from lednet.model import load_model
from lednet.training.loop import Progress
from lednet.training.run_dir import MEASURED_KEYS, read_records
from lednet.training.signals import Action, CheckpointTimer
from lednet.training.stages import parse_curriculum, parse_sizes, plan_stages
from lednet.training.tasks import Classification
from lednet.training.trainer import FinetuneConfig, Trainer, TrainerConfig

CPU = torch.device("cpu")
KEYS = (1, 0, 1)
SMALL = ("--batch-size", 2, "--num-workers", 0, "--device", "cpu", "--save-minutes", 0)


# Classification as a task


class WholePicture(ImageAugmentation):
    """No crops: what comes out is known."""

    def forward(self, images, targets, generator):
        return images.float() / 255, targets[:, 0]

    def normalize(self, images, targets):
        return images.float() / 255, targets[:, 0]


def classification(smoothing: float = 0.0, classes: str = "abcdefg") -> Classification:
    augmentation = WholePicture(8, num_classes=len(classes))
    return Classification(augmentation, tuple(classes), smoothing)


def test_first_and_five_guesses_are_counted():
    task = classification()
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    counts = task.new_state()
    task.update(counts, logits, torch.tensor([0, 4, 5, 6]), exact=True)
    assert counts.tolist() == [1, 2, 4]
    task.update(counts, logits[:1], torch.tensor([[0.6, 0.4, 0, 0, 0, 0, 0]]), exact=False)
    assert task.compute(counts) == {"top1": 2 / 5, "top5": 3 / 5}
    assert task.compute(task.new_state()) == {"top1": None, "top5": None}


def test_few_classes_are_all_among_five():
    task = classification(classes="ab")
    counts = task.new_state()
    task.update(counts, torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([1, 1]), exact=True)
    assert task.compute(counts) == {"top1": 0.5, "top5": 1.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_pytorchs(smoothing):
    torch.manual_seed(0)
    task = classification(smoothing)
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    target = torch.tensor([[3, 8, 8], [0, 8, 8], [6, 8, 8], [1, 8, 8], [1, 8, 8]])
    logits = torch.randn(5, 7)
    _, soft = task.augment(images, target, torch.Generator())
    total, weight = task.loss(logits, soft)
    expected = F.cross_entropy(logits, target[:, 0], label_smoothing=smoothing)
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)
    _, hard = task.normalize(images, target)
    assert torch.equal(hard, target[:, 0])  # validation is never smoothed


def test_label_smoothing_of_mixed_labels_keeps_their_sum():
    torch.manual_seed(0)
    task = Classification(ImageAugmentation(8, num_classes=4, mixup=0.5), "abcd", 0.2)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    target = torch.tensor([[i % 4, 8, 8] for i in range(6)])
    _, labels = task.augment(images, target, torch.Generator().manual_seed(1))
    assert torch.allclose(labels.sum(1), torch.ones(6)) and labels.min() >= 0.05 - 1e-6


# A part that has been trained before


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        return self.head(self.encoder(x).mean((2, 3)))


class Batches(list):
    @property
    def sampler(self):
        return range(sum(len(batch[0]) for batch in self))


def batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Batches((x, torch.tensor([[0, 8, 8], [1, 8, 8], [2, 8, 8], [3, 8, 8]])) for x in images)


def trainer_of(model: TwoParts, lr_factor: float = 1.0, frozen: int = 0, **options) -> Trainer:
    optimization = TrainerConfig("sgd", weight_decay=0.1, schedule="cosine", **options)
    pretrained = FinetuneConfig(model.encoder, lr_factor, frozen)
    return Trainer(
        model,
        classification(),
        4,
        DistributedContext(0, 1, CPU),
        optimization,
        pretrained=pretrained,
    )


def test_frozen_part_stays_as_it_is_and_then_moves():
    model = TwoParts()
    trainer = trainer_of(model, frozen=1, lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.start_epoch(1)
    trainer.train_one_epoch(batches(2), "frozen", KEYS)
    now = model.state_dict()
    assert all(torch.equal(now[key], before[key]) for key in now if key.startswith("encoder."))
    assert not torch.equal(now["head.weight"], before["head.weight"])
    trainer.start_epoch(2)
    trainer.train_one_epoch(batches(2), "free", (1, 0, 2))
    now = model.state_dict()
    for key in ("encoder.0.weight", "encoder.1.weight", "encoder.1.running_mean", "head.weight"):
        assert not torch.equal(now[key], before[key]), key


def test_pretrained_part_learns_at_its_own_rate():
    steps = []
    for factor in (1.0, 0.25):
        model = TwoParts()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = trainer_of(model, factor, lr=0.1)
        trainer.start_epoch(1)
        trainer.train_one_epoch(batches(1), "one step", KEYS)
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    whole, slow = steps
    for name in whole:
        times = 0.25 if name.startswith("encoder.") else 1.0
        assert torch.allclose(slow[name], times * whole[name], atol=1e-7), name


def test_learning_rate_moves_within_an_epoch():
    model = TwoParts()
    trainer = trainer_of(model, 0.5, lr=0.1)
    rates = []
    assert trainer.start_epoch(2) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)) / 2)
    trainer.train_one_epoch(
        batches(2), "title", KEYS,
        after_step=lambda: rates.append([g["lr"] for g in trainer.optimizer.param_groups]),
    )  # fmt: skip
    factors = [(1 + math.cos(math.pi * done / 4)) / 2 for done in (1, 1.5)]
    assert rates == [pytest.approx([0.1 * f, 0.05 * f]) for f in factors]


def test_next_stage_goes_on_from_the_averaged_weights():
    model = TwoParts()
    trainer = trainer_of(model, lr=0.5, ema_decay=0.9)
    trainer.train_one_epoch(batches(3), "title", KEYS)
    average = {key: value.clone() for key, value in trainer.eval_model.state_dict().items()}
    assert not torch.equal(model.head.weight, average["head.weight"])
    trainer.copy_ema_to_model()
    assert all(torch.equal(value, average[key]) for key, value in model.state_dict().items())


# Curricula


def test_curriculum_is_read_and_laid_out():
    parts = parse_curriculum("coarse:100, fine:200")
    assert parts == [("coarse", 100), ("fine", 200)]
    stages = plan_stages(parts, encoder_epochs=7)
    assert [(s.name, s.part, s.annotations, s.epochs) for s in stages] == [
        ("encoder", "encoder", "coarse", 7),
        ("coarse-1", "decoder", "coarse", 100),
        ("fine-2", "decoder", "fine", 200),
    ]
    assert [s.best_file for s in stages] == ["encoder_best.pth", "coarse-1_best.pth", "best.pth"]
    again = plan_stages(parse_curriculum("fine:1,both:2,fine:3"))
    assert len({s.name for s in again}) == len({s.best_file for s in again}) == 3
    (alone,) = plan_stages([("fine", 300)])
    assert (alone.name, alone.best_file) == ("decoder", "best.pth")


@pytest.mark.parametrize(
    "text", ["", "coarse", "coarse:0", "rough:3", "coarse:1;fine:2", "fine:-1"]
)
def test_other_curricula_are_refused(text):
    with pytest.raises(UserError, match="as in coarse:100,fine:200"):
        parse_curriculum(text)


def test_smaller_sizes_come_between_the_encoder_and_the_full_size():
    smaller = parse_sizes("120x160:60, 240x320:30")
    assert smaller == [((120, 160), 60), ((240, 320), 30)] and parse_sizes("") == []
    stages = plan_stages([("both", 9)], 5, smaller)
    assert [(s.part, s.size, s.epochs, s.annotations) for s in stages] == [
        ("encoder", None, 5, "both"),
        ("decoder", (120, 160), 60, "both"),
        ("decoder", (240, 320), 30, "both"),
        ("decoder", None, 9, "both"),
    ]
    assert stages[-1].best_file == "best.pth"
    twice = plan_stages([("fine", 9)], None, parse_sizes("8x8:1,8x8:2"))
    assert len({s.name for s in twice}) == len({s.best_file for s in twice}) == 3


@pytest.mark.parametrize("text", ["120x160", "120:5", "120x160:0", "0x160:5", "8x8:1;9x9:2", ","])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="as in 128x256:50,256x512:50"):
        parse_sizes(text)


@pytest.mark.parametrize("step", [2, 5], ids=["small", "full"])
def test_progressive_resizing_goes_on_where_it_was_stopped(
    run_inside, camvid, tmp_path, monkeypatch, step
):
    """3 steps an epoch; scores of the small stage are at the labels' full size."""
    flags = ("--dataset", "camvid", "--datadir", camvid, "--height", 40, "--width", 64, *SMALL,
             "--decoder", "--progressive", "16x24:1", "--num-epochs", 1)  # fmt: skip
    whole = run_inside("train/main.py", *flags, "--savedir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "Full network at 16x24: 1 epochs of 5 training and 3 validation" in whole.stdout
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        stopped = run_inside("train/main.py", *flags, "--savedir", tmp_path / "run")
        assert stopped.returncode == 143
    again = run_inside("train/main.py", "--savedir", tmp_path / "run", "--resume")
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "run", tmp_path / "whole", ("16x24-1_best.pth", "best.pth"))
    _, meta = load_model(tmp_path / "run")
    assert meta["size"] == [40, 64]


def test_epochs_between_are_not_scored(run_inside, camvid, tmp_path):
    flags = ("--dataset", "camvid", "--datadir", camvid, "--height", 16, "--width", 24, *SMALL,
             "--decoder", "--num-epochs", 5, "--validate-every", 2)  # fmt: skip
    result = run_inside("train/main.py", *flags, "--savedir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    scored = [record["val_miou"] is not None for record in read_records(tmp_path / "run")]
    assert scored == [False, True, False, True, True]
    losses = [record["val_loss"] is not None for record in read_records(tmp_path / "run")]
    assert losses == scored


def stop_at(monkeypatch, step: int) -> None:
    """Let a SIGTERM come in a certain step of a run."""

    def poll(timer: CheckpointTimer, number: int) -> Action:
        timer.signal = int(signal.SIGTERM)
        return Action.STOP if number == step else Action.CONTINUE

    monkeypatch.setattr(CheckpointTimer, "poll", poll)


def run_process(*command) -> str:
    """What a script prints, with as many threads as the tests have."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def same_end(one, other, names) -> None:
    """Both runs have the same log but for speed, and the same weights."""
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    for log in logs:
        for record in log:
            for key in MEASURED_KEYS:
                record.pop(key, None)  # a CPU has no gpu_memory_mb
    assert logs[0] == logs[1]
    for name in names:
        a, b = (load_checkpoint(run / name)["state_dict"] for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("step", [4, 10, 14], ids=["encoder", "coarse", "fine"])
def test_curriculum_goes_on_where_it_was_stopped(
    run_inside, toy_cityscapes, whole_curriculum, tmp_path, monkeypatch, step
):
    """8 coarse and 6 fine images, two a step: 4 steps an epoch, and then 3."""
    flags = (*whole_curriculum["flags"], "--savedir", tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run_inside("train/main.py", *flags).returncode == 143
    result = run_inside("train/main.py", *flags, "--resume")
    assert result.returncode == 0, result.stderr
    same_end(
        tmp_path / "run",
        whole_curriculum["folder"],
        ("encoder_best.pth", "coarse-1_best.pth", "best.pth"),
    )


@pytest.fixture(scope="module")
def whole_curriculum(toy_cityscapes, tmp_path_factory):
    """A curriculum that nothing disturbed, and its flags."""
    folder = tmp_path_factory.mktemp("curriculum") / "whole"
    flags = (
        "--datadir", toy_cityscapes, "--height", 32, "--width", 64, *SMALL,
        "--curriculum", "coarse:2,fine:2", "--encoder-epochs", 1, "--class-uniform", 0.5,
        "--ema-decay", 0.5,
    )  # fmt: skip
    text = run_process(ROOT / "train/main.py", *flags, "--savedir", folder)
    return {"flags": flags, "folder": folder, "text": text}


def test_curriculum_trains_each_part_on_its_own_data(whole_curriculum):
    folder, text = whole_curriculum["folder"], whole_curriculum["text"]
    lines = (folder / "log.jsonl").read_text().splitlines()
    stages = [(record["stage"], record["epoch"]) for record in map(json.loads, lines)]
    assert stages == [
        ("encoder", 1),
        ("coarse-1", 1),
        ("coarse-1", 2),
        ("fine-2", 1),
        ("fine-2", 2),
    ]
    assert "Full network, 1: coarse: 2 epochs of 8 training and 3 validation images" in text
    assert "Full network, 2: fine: 2 epochs of 6 training and 3 validation images" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--curriculum", "coarse:1", "--annotations", "both"), "leave --annotations out"),
        (("--class-uniform", 0), "--class-uniform is 0.0: give more than 0"),
        (("--freeze-encoder", -1), "--freeze-encoder: '-1' is not a whole number of at least 0"),
        (("--dataset", "camvid", "--curriculum", "coarse:1,fine:1"), "coarse"),
    ],
)
def test_what_does_not_go_together_is_refused(run_inside, camvid, tmp_path, flags, sentence):
    result = run_inside(
        "train/main.py", "--datadir", camvid, "--savedir", tmp_path / "run", *SMALL, *flags
    )
    assert result.returncode == 2 and sentence in result.stderr
    assert not (tmp_path / "run").exists()


# The script


CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures that their colour tells apart, 12 of each to train on and 4 to validate."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for channel, name in enumerate(CLASSES[::-1]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (30 + i, 40, 3))
                pixels[..., channel] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def pretrain(run_inside, pictures):
    def run(folder, *flags):
        size = ("--stored-size", 40, "--crop-size", 32, "--batch-size", 4, "--num-workers", 0)
        common = ("--datadir", pictures, "--savedir", folder, "--device", "cpu", *size)
        return run_inside("imagenet/lednet_imagenet.py", *common, "--save-minutes", 0, *flags)

    return run


QUICK = ("--recipe", "modern", "--num-epochs", 8, "--warmup-epochs", 1, "--lr", 0.05,
         "--mixup", 0.05, "--ema-decay", 0.5)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(pictures, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run_process(
        ROOT / "imagenet/lednet_imagenet.py", "--datadir", pictures, "--savedir", folder,
        "--device", "cpu", "--stored-size", 40, "--crop-size", 32, "--batch-size", 4,
        "--num-workers", 0, "--save-minutes", 0, *QUICK,
    )  # fmt: skip
    return folder


def test_pretraining_learns_colours_and_writes_the_encoder(pretrained):
    content = load_checkpoint(pretrained / "encoder.pth")
    assert all(key.startswith("encoder.") for key in content["state_dict"])
    meta = content["meta"]
    assert meta["classes"] == list(CLASSES) and meta["size"] == [32, 32]
    assert meta["mean"] == pytest.approx(IMAGENET_MEAN)
    assert meta["std"] == pytest.approx(IMAGENET_STD)
    assert (
        meta["provenance"]["images"] == 36 and "lednet_imagenet.py" in meta["provenance"]["command"]
    )
    best = load_checkpoint(pretrained / "best.pth")["state_dict"]
    assert {"classifier.weight", "classifier.bias"} <= best.keys()
    assert all(torch.equal(best[key], value) for key, value in content["state_dict"].items())
    records = [json.loads(x) for x in (pretrained / "log.jsonl").read_text().splitlines()]
    assert max(record["val_top1"] for record in records) > 0.9
    assert all(record["val_top5"] == 1 for record in records)  # of three classes
    assert (pretrained / "curves.png").exists()


@pytest.mark.parametrize("step", [3, 18, 40])
def test_pretraining_goes_on_where_it_was_stopped(
    pretrain, pretrained, tmp_path, monkeypatch, step
):
    """36 images, four a step: 9 steps an epoch, so that step 18 is the last of one."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert pretrain(tmp_path / "run", *QUICK).returncode == 143
    result = pretrain(tmp_path / "run", "--resume")
    assert result.returncode == 0, result.stderr
    same_end(tmp_path / "run", pretrained, ("best.pth", "encoder.pth"))


def test_evaluate_gives_the_logged_score(pretrain, pretrained, tmp_path):
    meta = load_checkpoint(pretrained / "best.pth")["meta"]
    result = pretrain(tmp_path / "none", "--evaluate", pretrained / "best.pth")
    assert result.returncode == 0, result.stderr
    assert f"top-1 {meta['top1']:.4f}  top-5 1.0000" in result.stdout
    assert not (tmp_path / "none").exists()


def test_cached_pictures_train_to_the_same_weights(
    pretrain, pretrained, run_inside, pictures, tmp_path
):
    cache = ("--datadir", pictures, "--cache", tmp_path / "cache", "--stored-size", 40)
    refused = pretrain(tmp_path / "run", *QUICK, "--cache", tmp_path / "cache")
    assert refused.returncode == 2 and "datasets/prepare_imagenet.py" in refused.stderr
    built = run_inside("datasets/prepare_imagenet.py", *cache, "--workers", 0)
    assert built.returncode == 0, built.stderr
    result = pretrain(tmp_path / "run", *QUICK, "--cache", tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    same_end(tmp_path / "run", pretrained, ("best.pth",))


def test_two_processes_train_and_count_each_picture_once(run_script, pictures, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    result = run_script(
        "imagenet/lednet_imagenet.py", "--datadir", pictures, "--savedir", tmp_path / "run",
        "--device", "cpu", "--stored-size", 40, "--crop-size", 32, "--batch-size", 5,
        "--num-workers", 0, "--num-epochs", 1, launcher=torchrun,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert record["val_top1"] * 12 == pytest.approx(round(record["val_top1"] * 12))
    assert record["val_top5"] == 1
    alone = run_script(
        "imagenet/lednet_imagenet.py", "--datadir", pictures, "--device", "cpu",
        "--stored-size", 40, "--crop-size", 32, "--num-workers", 0,
        "--evaluate", tmp_path / "run" / "best.pth",
    )  # fmt: skip
    assert f"top-1 {record['val_top1']:.4f}" in alone.stdout, alone.stderr


def test_no_average_is_kept_where_the_recipe_has_one(pretrain, tmp_path):
    result = pretrain(tmp_path / "run", *QUICK, "--num-epochs", 2, "--ema-decay", 0)
    assert result.returncode == 0, result.stderr
    checkpoint = sorted((tmp_path / "run").glob("checkpoint_*.pth"))[-1]
    assert "average" not in load_checkpoint(checkpoint)["trainer"]


def test_other_classes_are_refused(pretrain, pretrained, pictures, tmp_path):
    own = shutil.copytree(pictures, tmp_path / "own")
    for split in ("train", "val"):
        (own / split / "red").rename(own / split / "crimson")
    flags = ("--datadir", own, "--evaluate", pretrained / "best.pth")
    result = pretrain(tmp_path / "run", *flags)
    assert result.returncode == 2 and "tells other classes apart" in result.stderr


def test_paper_recipe_is_the_default(pretrain, tmp_path):
    result = pretrain(tmp_path / "run", "--num-epochs", 1)
    assert result.returncode == 0, result.stderr
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    wanted = {"lr": 0.1, "weight_decay": 1e-4, "schedule": "exponential", "augment": "paper",
              "label_smoothing": 0, "mixup": 0, "ema_decay": 0, "warmup_epochs": 0}  # fmt: skip
    assert {key: options[key] for key in wanted} == wanted
    checkpoint = next((tmp_path / "run").glob("checkpoint_*.pth"))
    group = load_checkpoint(checkpoint)["trainer"]["optimizer"]["param_groups"][0]
    assert group["momentum"] == 0.9 and group["weight_decay"] == 1e-4 and group["lr"] == 0.1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--recipe", "modern", "--num-epochs", 5), "--warmup-epochs 5 leaves nothing"),
        (("--label-smoothing", 1), "--label-smoothing is 1.0: give 0 to below 1"),
        (("--crop-size", 0), "--crop-size: '0' is not a whole number of at least 1"),
        (("--evaluate", "nowhere.pth"), "no weights at nowhere.pth"),
    ],
)
def test_pretraining_refuses(pretrain, tmp_path, flags, sentence):
    result = pretrain(tmp_path / "run", *flags)
    assert result.returncode == 2 and sentence in result.stderr
    assert not (tmp_path / "run").exists()


def test_truncated_picture_is_named_or_skipped(pretrain, pictures, tmp_path, run_inside):
    own = shutil.copytree(pictures, tmp_path / "own")
    path = own / "train/red/3.png"
    path.write_bytes(path.read_bytes()[:200])
    flags = ("--datadir", own, "--num-epochs", 1)
    refused = pretrain(tmp_path / "run", *flags)
    assert refused.returncode == 2 and "train/red/3.png is damaged" in refused.stderr
    result = pretrain(tmp_path / "other", *flags, "--skip-corrupt")
    assert result.returncode == 0, result.stderr
    assert "damaged and replaced by others: 3.png" in result.stdout


# Fine-tuning


def test_pretrained_encoder_brings_its_normalisation(run_inside, pretrained, camvid, tmp_path):
    result = run_inside(
        "train/main.py", "--dataset", "camvid", "--datadir", camvid, *SMALL, "--height", 24,
        "--width", 32, "--num-epochs", 2, "--savedir", tmp_path / "run", "--freeze-encoder", 2,
        "--pretrainedEncoder", pretrained / "encoder.pth",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--pretrainedEncoder: " in result.stdout and " 0 missing" in result.stdout
    content = load_checkpoint(tmp_path / "run" / "best.pth")
    assert content["meta"]["mean"] == pytest.approx(IMAGENET_MEAN)
    assert content["meta"]["stage"] == "decoder"  # no stage 1
    encoder = load_checkpoint(pretrained / "encoder.pth")["state_dict"]
    assert all(torch.equal(content["state_dict"][key], value) for key, value in encoder.items())
    score = run_inside(
        "test/eval_iou.py", "--weights", tmp_path / "run", "--dataset", "camvid",
        "--datadir", camvid, "--height", 24, "--width", 32, "--json", tmp_path / "scores.json",
        "--device", "cpu",
    )  # fmt: skip
    assert score.returncode == 0, score.stderr


def test_resumed_run_keeps_the_encoders_normalisation(
    run_inside, pretrained, camvid, tmp_path, monkeypatch
):
    encoder = tmp_path / "encoder.pth"
    encoder.write_bytes((pretrained / "encoder.pth").read_bytes())
    flags = (
        "--dataset", "camvid", "--datadir", camvid, *SMALL, "--height", 24, "--width", 32,
        "--num-epochs", 2, "--savedir", tmp_path / "run", "--pretrainedEncoder", encoder,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_inside("train/main.py", *flags).returncode == 143
    encoder.unlink()  # it is not needed any more
    result = run_inside("train/main.py", "--savedir", tmp_path / "run", "--resume")
    assert result.returncode == 0, result.stderr
    content = load_checkpoint(tmp_path / "run" / "best.pth")
    assert content["meta"]["std"] == pytest.approx(IMAGENET_STD)


def test_progress_of_another_plan_is_refused(run_inside, whole_curriculum):
    result = run_inside(
        "train/main.py", "--savedir", whole_curriculum["folder"], "--resume",
        "--curriculum", "fine:2",
    )  # fmt: skip
    assert result.returncode == 2 and "is in stage fine-2, which these options" in result.stderr


def test_progress_names_no_score_before_the_first():
    assert Progress("encoder").best_score < 0
