"""Classification, pretrained encoders, and runs of several stages."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import ALONE, KEYS, StopAt, assert_same_runs, run_main
from PIL import Image
from torch import nn

from lednet import UserError
from lednet.checkpoint import load_checkpoint
from lednet.data.classification_transforms import IMAGENET_MEAN, IMAGENET_STD, ImageAugmentation
from lednet.model import load_model
from lednet.training import launch
from lednet.training.run_dir import read_options, read_records
from lednet.training.stages import parse_curriculum, parse_sizes, plan_stages
from lednet.training.tasks import Classification
from lednet.training.trainer import FinetuneConfig, Trainer, TrainerConfig

SMALL = ("--batch-size", 2, "--num-workers", 0, "--device", "cpu", "--save-minutes", 0)


@pytest.fixture
def stop_at(monkeypatch):
    """Call it with steps: runs receive SIGTERM in them."""

    def patch(*steps: int) -> None:
        monkeypatch.setattr(launch, "CheckpointTimer", lambda context, *_: StopAt(context, *steps))

    return patch


# Classification as a task


class Uncropped(ImageAugmentation):
    """Changes nothing."""

    def forward(self, images, targets, generator):
        return self.normalize(images, targets)

    def normalize(self, images, targets):
        return images.float() / 255, targets[:, 0]


def classification(smoothing: float = 0.0, classes: str = "abcdefg") -> Classification:
    return Classification(Uncropped(8, num_classes=len(classes)), tuple(classes), smoothing)


def test_classification_counts_top1_and_top5():
    task = classification()
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    counts = task.new_state()
    task.update(counts, logits, torch.tensor([0, 4, 5, 6]), exact=True)
    assert counts.tolist() == [1, 2, 4]
    task.update(counts, logits[:1], torch.tensor([[0.6, 0.4, 0, 0, 0, 0, 0]]), exact=False)
    assert task.compute(counts) == {"top1": 2 / 5, "top5": 3 / 5}
    assert task.compute(task.new_state()) == {"top1": None, "top5": None}
    few = classification(classes="ab")
    counts = few.new_state()
    few.update(counts, torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([1, 1]), exact=True)
    assert few.compute(counts) == {"top1": 0.5, "top5": 1.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_loss_is_pytorchs(smoothing):
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


# A pretrained part


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


def make_trainer(model: TwoParts, lr_factor: float = 1.0, frozen: int = 0, **options) -> Trainer:
    config = TrainerConfig("sgd", weight_decay=0.1, schedule="cosine", **options)
    pretrained = FinetuneConfig(model.encoder, lr_factor, frozen)
    return Trainer(model, classification(), 4, ALONE, config, pretrained=pretrained)


def test_frozen_part_changes_only_in_later_epochs():
    model = TwoParts()
    trainer = make_trainer(model, frozen=1, lr=0.1)
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


def test_pretrained_part_has_its_own_learning_rate():
    """The updates of a step, and the rates within an epoch."""
    updates = []
    for factor in (1.0, 0.25):
        model = TwoParts()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = make_trainer(model, factor, lr=0.1)
        trainer.start_epoch(1)
        trainer.train_one_epoch(batches(1), "one step", KEYS)
        updates.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name in updates[0]:
        times = 0.25 if name.startswith("encoder.") else 1.0
        assert torch.allclose(updates[1][name], times * updates[0][name], atol=1e-7), name
    rates = []
    assert trainer.start_epoch(2) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)) / 2)
    trainer.train_one_epoch(
        batches(2), "title", KEYS,
        after_step=lambda: rates.append([g["lr"] for g in trainer.optimizer.param_groups]),
    )  # fmt: skip
    factors = [(1 + math.cos(math.pi * done / 4)) / 2 for done in (1, 1.5)]
    assert rates == [pytest.approx([0.1 * f, 0.025 * f]) for f in factors]


def test_copy_ema_to_model_replaces_the_weights():
    model = TwoParts()
    trainer = make_trainer(model, lr=0.5, ema_decay=0.9)
    trainer.train_one_epoch(batches(3), "title", KEYS)
    average = {key: value.clone() for key, value in trainer.eval_model.state_dict().items()}
    assert not torch.equal(model.head.weight, average["head.weight"])
    trainer.copy_ema_to_model()
    assert all(torch.equal(value, average[key]) for key, value in model.state_dict().items())


# Stages


def test_plan_stages_of_a_curriculum_and_smaller_sizes():
    parts = parse_curriculum("coarse:100, fine:200")
    smaller = parse_sizes("120x160:60, 240x320:30")
    assert parts == [("coarse", 100), ("fine", 200)] and parse_sizes("") == []
    assert smaller == [((120, 160), 60), ((240, 320), 30)]
    stages = plan_stages(parts, 7, smaller)
    assert [(s.name, s.part, s.annotations, s.size, s.epochs, s.best_file) for s in stages] == [
        ("encoder", "encoder", "coarse", None, 7, "encoder_best.pth"),
        ("120x160-2", "decoder", "coarse", (120, 160), 60, "120x160-2_best.pth"),
        ("240x320-3", "decoder", "coarse", (240, 320), 30, "240x320-3_best.pth"),
        ("coarse-1", "decoder", "coarse", None, 100, "coarse-1_best.pth"),
        ("fine-2", "decoder", "fine", None, 200, "best.pth"),
    ]
    repeated = plan_stages(
        parse_curriculum("fine:1,both:2,fine:3"), None, parse_sizes("8x8:1,8x8:2")
    )
    assert len({s.name for s in repeated}) == len({s.best_file for s in repeated}) == 5
    (alone,) = plan_stages([("both", 300)])
    assert (alone.name, alone.best_file, alone.annotations) == ("decoder", "best.pth", "both")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_curriculum, x) for x in ("", "coarse", "coarse:0", "rough:3", "coarse:1;fine:2",
                                          "fine:-1")),
        *((parse_sizes, x) for x in ("120x160", "120:5", "120x160:0", "0x160:5", "8x8:1;9x9:2",
                                     ",")),
    ],
)  # fmt: skip
def test_malformed_stages_are_refused(parse, text):
    with pytest.raises(UserError, match=r"as in (coarse:100,fine:200|128x256:50,256x512:50)"):
        parse(text)


@pytest.fixture(scope="module")
def curriculum(toy_cityscapes, tmp_path_factory):
    """An uninterrupted run of four stages: its flags, folder and output."""
    folder = tmp_path_factory.mktemp("curriculum") / "whole"
    flags = (
        "--datadir", toy_cityscapes, "--height", 32, "--width", 64, *SMALL,
        "--encoder-epochs", 1, "--progressive", "16x32:1", "--curriculum", "coarse:1,fine:1",
        "--class-uniform", 0.5, "--ema-decay", 0.5,
    )  # fmt: skip
    return flags, folder, run_main("train/main.py", *flags, "--savedir", folder)


def test_curriculum_trains_each_stage_on_its_data(curriculum):
    _, folder, output = curriculum
    stages = [(record["stage"], record["epoch"]) for record in read_records(folder)]
    assert stages == [("encoder", 1), ("16x32-2", 1), ("coarse-1", 1), ("fine-2", 1)]
    for line in (
        "Full network at 16x32: 1 epochs of 8 training and 3 validation images",
        "Full network, 1: coarse: 1 epochs of 8 training and 3 validation images",
        "Full network, 2: fine: 1 epochs of 6 training and 3 validation images",
    ):
        assert line in output
    assert load_model(folder)[1]["size"] == [32, 64]


def test_curriculum_stopped_in_each_kind_of_stage_resumes_bit_exactly(
    run_inside, curriculum, tmp_path, stop_at
):
    """8 coarse images and 6 fine ones, two a step: 4 steps in each stage, and 3 in the last."""
    flags, folder, _ = curriculum
    savedir = ("--savedir", tmp_path / "run")
    stop_at(2, 6, 14)
    assert run_inside("train/main.py", *flags, *savedir).returncode == 143
    for _ in range(2):
        assert run_inside("train/main.py", *savedir, "--resume").returncode == 143
    run_inside("train/main.py", *savedir, "--resume").check()
    names = ("encoder_best.pth", "16x32-2_best.pth", "coarse-1_best.pth", "best.pth")
    assert_same_runs(tmp_path / "run", folder, *names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--curriculum", "coarse:1", "--annotations", "both"), "leave --annotations out"),
        (("--class-uniform", 0), "--class-uniform is 0.0: give more than 0"),
        (("--freeze-encoder", -1), "--freeze-encoder: '-1' is not a whole number of at least 0"),
        (("--curriculum", "coarse:1,fine:1"), "coarse"),
    ],
)
def test_main_with_invalid_flags_is_refused(train, tmp_path, flags, message):
    train(*flags).assert_error(message)
    assert not (tmp_path / "run").exists()


# The script that pretrains


CLASSES = ("blue", "green", "red")
QUICK = ("--recipe", "modern", "--num-epochs", 8, "--warmup-epochs", 1, "--lr", 0.05,
         "--mixup", 0.05, "--ema-decay", 0.5)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of three classes, which differ in colour: 8 of each to train, 2 to validate."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for channel, name in enumerate(CLASSES[::-1]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (30 + i, 40, 3))
                pixels[..., channel] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def pretraining_flags(images, folder) -> tuple:
    return ("--datadir", images, "--savedir", folder, "--stored-size", 40, "--crop-size", 32,
            "--batch-size", 4, "--num-workers", 0, "--device", "cpu",
            "--save-minutes", 0)  # fmt: skip


@pytest.fixture
def pretrain(run_inside, images):
    def run(folder, *flags):
        return run_inside("imagenet/lednet_imagenet.py", *pretraining_flags(images, folder), *flags)

    return run


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run_main("imagenet/lednet_imagenet.py", *pretraining_flags(images, folder), *QUICK)
    return folder


def test_pretraining_learns_colours_and_writes_the_encoder(pretrained):
    content = load_checkpoint(pretrained / "encoder.pth")
    assert all(key.startswith("encoder.") for key in content["state_dict"])
    meta = content["meta"]
    assert meta["classes"] == list(CLASSES) and meta["size"] == [32, 32]
    assert meta["mean"] == pytest.approx(IMAGENET_MEAN)
    assert meta["std"] == pytest.approx(IMAGENET_STD)
    assert meta["provenance"]["images"] == 24
    assert "lednet_imagenet.py" in meta["provenance"]["command"]
    best = load_checkpoint(pretrained / "best.pth")["state_dict"]
    assert {"classifier.weight", "classifier.bias"} <= best.keys()
    assert all(torch.equal(best[key], value) for key, value in content["state_dict"].items())
    records = read_records(pretrained)
    assert max(record["val_top1"] for record in records) > 0.9
    assert all(record["val_top5"] == 1 for record in records)  # of three classes
    assert (pretrained / "curves.png").exists()


def test_pretraining_from_a_cache_stopped_and_resumed_ends_bit_exactly_the_same(
    pretrain, pretrained, run_inside, images, tmp_path, stop_at
):
    """24 images, four a step: 6 steps an epoch, so that step 12 is the last of an epoch."""
    cache = ("--cache", tmp_path / "cache")
    pretrain(tmp_path / "run", *QUICK, *cache).assert_error("datasets/prepare_imagenet.py")
    flags = ("--datadir", images, *cache, "--stored-size", 40, "--workers", 0)
    run_inside("datasets/prepare_imagenet.py", *flags).check()
    stop_at(3, 12)
    assert pretrain(tmp_path / "run", *QUICK, *cache).returncode == 143
    assert pretrain(tmp_path / "run", "--resume").returncode == 143
    pretrain(tmp_path / "run", "--resume").check()
    assert_same_runs(tmp_path / "run", pretrained, "best.pth", "encoder.pth")


def test_evaluate_prints_the_logged_score(pretrain, pretrained, tmp_path):
    meta = load_checkpoint(pretrained / "best.pth")["meta"]
    result = pretrain(tmp_path / "none", "--evaluate", pretrained / "best.pth").check()
    assert f"top-1 {meta['top1']:.4f}  top-5 1.0000" in result.stdout
    assert not (tmp_path / "none").exists()


def test_evaluate_of_other_classes_is_refused(pretrain, pretrained, images, tmp_path):
    own = shutil.copytree(images, tmp_path / "own")
    for split in ("train", "val"):
        (own / split / "red").rename(own / split / "crimson")
    flags = ("--datadir", own, "--evaluate", pretrained / "best.pth")
    pretrain(tmp_path / "run", *flags).assert_error("was trained on other classes")


def test_pretraining_defaults_are_the_papers(pretrain, tmp_path):
    pretrain(tmp_path / "run", "--num-epochs", 1).check()
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    expected = {"lr": 0.1, "weight_decay": 1e-4, "schedule": "exponential", "augment": "paper",
                "label_smoothing": 0, "mixup": 0, "ema_decay": 0, "warmup_epochs": 0}  # fmt: skip
    assert {key: options[key] for key in expected} == expected
    (checkpoint,) = (tmp_path / "run").glob("checkpoint_*.pth")
    state = load_checkpoint(checkpoint)["trainer"]
    group = state["optimizer"]["param_groups"][0]
    assert group["momentum"] == 0.9 and group["weight_decay"] == 1e-4 and group["lr"] == 0.1
    assert "average" not in state  # --ema-decay 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recipe", "modern", "--num-epochs", 5), "--warmup-epochs 5 leaves nothing"),
        (("--label-smoothing", 1), "--label-smoothing is 1.0: give 0 to below 1"),
        (("--crop-size", 0), "--crop-size: '0' is not a whole number of at least 1"),
        (("--evaluate", "nowhere.pth"), "no weights at nowhere.pth"),
    ],
)
def test_pretraining_with_invalid_flags_is_refused(pretrain, tmp_path, flags, message):
    pretrain(tmp_path / "run", *flags).assert_error(message)
    assert not (tmp_path / "run").exists()


def test_truncated_image_is_reported_or_skipped(pretrain, images, tmp_path):
    own = shutil.copytree(images, tmp_path / "own")
    path = own / "train/red/3.png"
    path.write_bytes(path.read_bytes()[:200])
    flags = ("--datadir", own, "--num-epochs", 1)
    pretrain(tmp_path / "run", *flags).assert_error("train/red/3.png is damaged")
    result = pretrain(tmp_path / "other", *flags, "--skip-corrupt").check()
    assert "damaged and replaced by others: 3.png" in result.stdout


# Fine-tuning


def test_pretrained_encoder_and_its_normalization_are_kept_after_resuming(
    train, run_inside, pretrained, tmp_path, stop_at
):
    """The encoder is frozen, so that its weights show; its file is needed only at the start."""
    encoder = shutil.copy(pretrained / "encoder.pth", tmp_path)
    stop_at(2)
    result = train("--num-epochs", 2, "--freeze-encoder", 2, "--pretrainedEncoder", encoder)
    assert result.returncode == 143
    assert "--pretrainedEncoder: " in result.stdout and " 0 missing" in result.stdout
    (tmp_path / "encoder.pth").unlink()
    run_inside("train/main.py", "--savedir", tmp_path / "run", "--resume").check()
    content = load_checkpoint(tmp_path / "run/best.pth")
    assert content["meta"]["mean"] == pytest.approx(IMAGENET_MEAN)
    assert content["meta"]["std"] == pytest.approx(IMAGENET_STD)
    assert content["meta"]["stage"] == "decoder"  # no stage 1
    state = load_checkpoint(pretrained / "encoder.pth")["state_dict"]
    assert all(torch.equal(content["state_dict"][key], value) for key, value in state.items())
    assert read_options(tmp_path / "run")["freeze_encoder"] == 2
