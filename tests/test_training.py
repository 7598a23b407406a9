"""Losses, schedules, samplers, the trainer, and runs that are stopped and resumed."""

import errno
import fcntl
import lzma
import math
import os
import shutil
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fakes import (
    ALONE,
    CPU,
    KEYS,
    FakeLoader,
    StopAt,
    Unaugmented,
    assert_same_runs,
    assert_same_tensors,
    noise_batches,
    record_by_calling,
    small_trainer,
    tiny_run,
)
from torch import nn

from lednet import LEDNet, UserError, signals
from lednet.checkpoint import load_checkpoint
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.registry import open_dataset
from lednet.data.samplers import (
    ClassUniformSampler,
    DistributedEvalSampler,
    ResumableDistributedSampler,
)
from lednet.data.transforms import Augmentation
from lednet.device import choose_device
from lednet.distributed import DistributedContext
from lednet.signals import StopRequest
from lednet.training.checkpointing import Checkpoints
from lednet.training.loop import report_result
from lednet.training.losses import (
    RELEASED_WEIGHTS,
    WEIGHT_OFFSETS,
    WeightedCrossEntropy,
    class_weights,
    resize_target,
)
from lednet.training.lr_schedule import lr_factor
from lednet.training.run_dir import RunDir, read_options, read_records
from lednet.training.signals import Action, CheckpointTimer, TrainingStopped
from lednet.training.trainer import NonFiniteLoss, step_generator

# Losses and schedules


def test_class_weights_of_one_distribution_give_both_released_lists():
    shares = np.exp(1 / np.array(RELEASED_WEIGHTS["decoder"])) - WEIGHT_OFFSETS["decoder"]
    assert 0.8 < shares.sum() < 1.0  # the rest is void
    for stage, offset in WEIGHT_OFFSETS.items():
        derived = class_weights(shares, offset)
        np.testing.assert_allclose(derived, RELEASED_WEIGHTS[stage], rtol=0.01)


def test_loss_with_void_is_pytorchs_weighted_mean():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 5, 6), torch.randint(0, 3, (2, 5, 6))
    target[0, :2] = 255
    total, weight = WeightedCrossEntropy([1.0, 2.0, 5.0], 4)(logits, target)
    expected = F.cross_entropy(logits, target, torch.tensor([1.0, 2, 5, 0]), ignore_index=255)
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)


def test_resize_target_takes_the_centre_of_each_cell():
    target = torch.arange(16 * 24).view(1, 16, 24) % 251
    assert torch.equal(resize_target(target, (2, 3)), target[:, 4::8, 4::8])
    assert resize_target(torch.full((1, 97, 131), 255), (13, 17)).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("schedule", "epochs", "warmup", "expected"),
    [
        ("poly", 300, 0, {0: 1, 0.99: 1, 150.5: 0.5**0.9, 299: (1 / 300) ** 0.9}),
        ("exponential", 150, 0, {0: 1, 14: 1, 15: 0.95, 16: 0.95**2, 149: 0.95**135}),
        ("cosine", 10, 0, {0: 1, 2.5: (1 + math.sqrt(0.5)) / 2, 5: 0.5}),
        ("cosine", 12, 2, {0: 0.01, 0.5: 0.2575, 1: 0.505, 2: 1, 7: 0.5}),
    ],
)
def test_lr_factor_follows_the_schedule(schedule, epochs, warmup, expected):
    found = [lr_factor(schedule, done, epochs, warmup) for done in expected]
    assert found == pytest.approx([*expected.values()])


# Samplers


def contexts(size: int) -> list[DistributedContext]:
    return [DistributedContext(rank, size, CPU) for rank in range(size)]


@pytest.mark.parametrize(("length", "size"), [(10, 1), (10, 3), (2, 3)])
def test_samplers_distribute_every_image(length, size):
    once = [list(DistributedEvalSampler(length, context)) for context in contexts(size)]
    assert sorted(chain(*once)) == list(range(length))
    shuffled = [list(ResumableDistributedSampler(length, c, seed=1)) for c in contexts(size)]
    assert len({len(part) for part in shuffled}) == 1
    joint = list(chain(*shuffled))
    assert set(joint) == set(range(length)) and len(joint) < length + size


@pytest.mark.parametrize(
    ("length", "context", "seed", "epoch", "expected"),
    [
        (12, DistributedContext(0, 1, CPU), 3, 0, [11, 2, 8, 1, 10, 0, 6, 4, 9, 3, 5, 7]),
        (12, DistributedContext(0, 1, CPU), 3, 7, [8, 10, 7, 2, 1, 5, 11, 9, 3, 4, 6, 0]),
        (7, DistributedContext(1, 3, CPU), 5, 4, [1, 3, 2]),
    ],
)
def test_sampler_order_is_that_of_earlier_checkpoints(length, context, seed, epoch, expected):
    sampler = ResumableDistributedSampler(length, context, seed)
    sampler.epoch = epoch
    assert sampler.indices() == expected


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_sampler_resumed_with_other_processes_yields_the_remaining_images(before, after):
    """The run was stopped after two batches of 3."""
    samplers = [ResumableDistributedSampler(29, context, seed=1) for context in contexts(before)]
    done = set(chain(*(sampler.indices()[: 2 * 3] for sampler in samplers)))
    remaining = set()
    for context in contexts(after):
        sampler = ResumableDistributedSampler(29, context, seed=1)
        sampler.start = 2 * 3 * before // after
        remaining |= set(sampler)
    assert done | remaining == set(range(29)) and len(done & remaining) < 2 * after


def class_uniform(counts: np.ndarray, fraction: float, epoch=1, context=ALONE, seed=1):
    sampler = ClassUniformSampler(counts, fraction, context, seed)
    sampler.epoch = epoch
    return sampler


def test_class_uniform_sampler_draws_classes_and_their_images_equally_often():
    """Class 0 is in every image, class 1 in the first ten, class 3 in the first half."""
    counts = np.zeros((1000, 5), dtype=np.int64)
    counts[:, 0], counts[:500, 3], counts[:, 4] = 1_000_000, 30, 7  # void last; class 2 nowhere
    counts[:10, 1] = 10 ** np.arange(10)  # the number of pixels has no effect
    epochs = 60
    times = np.zeros(1000)
    for epoch in range(epochs):
        order = class_uniform(counts, 0.5, epoch).indices()
        assert len(order) == 1000
        times += np.bincount(order, minlength=1000) / epochs
    # Of 500 draws, a third for each class; a permutation has each image once in 1000 places.
    each = [500 / 3 / images for images in (1000, 10, 500)]
    assert times[:10].sum() == pytest.approx(10 * (sum(each) + 0.5), rel=0.03)  # 174, not 10
    assert times[:10] == pytest.approx(np.full(10, sum(each) + 0.5), rel=0.15)
    assert times[10:500].sum() == pytest.approx(490 * (each[0] + each[2] + 0.5), rel=0.03)
    assert times[500:].sum() == pytest.approx(500 * (each[0] + 0.5), rel=0.03)
    assert times[500:].all()


@pytest.mark.parametrize(("fraction", "drawn"), [(0.02, 1), (0.25, 9), (0.5, 18), (1.0, 37)])
def test_class_uniform_sampler_replaces_the_given_fraction(fraction, drawn):
    counts = np.zeros((37, 3), dtype=np.int64)
    counts[:, 2] = 100
    counts[5, 1] = 1  # so each draw is image 5
    numbers, places = set(), set()
    for epoch in range(200):
        plain = ResumableDistributedSampler(37, ALONE, seed=1)
        plain.epoch = epoch
        pairs = list(zip(plain.indices(), class_uniform(counts, fraction, epoch), strict=True))
        changed = {place for place, (before, after) in enumerate(pairs) if before != after}
        assert all(pairs[place][1] == 5 for place in changed)
        numbers.add(len(changed))
        places |= changed
    # One less where image 5 is drawn for its own place.
    assert numbers == ({36} if fraction == 1 else {drawn - 1, drawn})
    assert places == set(range(37))


def test_class_uniform_sampler_ignores_absent_classes_and_void():
    counts = np.zeros((20, 6), dtype=np.int64)
    counts[:, 5] = 9
    assert sorted(class_uniform(counts, 1)) == list(range(20))
    counts[3, 1] = counts[[4, 5, 19], 4] = 2
    counts[7] = 0  # a label that could not be read
    drawn = [index for epoch in range(50) for index in class_uniform(counts, 1, epoch)]
    assert set(drawn) == {3, 4, 5, 19} and drawn.count(3) == pytest.approx(500, rel=0.15)


@pytest.mark.parametrize("size", [2, 3])
def test_class_uniform_order_does_not_depend_on_the_number_of_processes(size):
    counts = np.random.default_rng(0).integers(0, 3, (29, 5))
    whole = class_uniform(counts, 0.6).indices()
    samplers = [class_uniform(counts, 0.6, context=context) for context in contexts(size)]
    joint = list(chain(*zip(*samplers, strict=True)))
    assert joint[:29] == whole and joint[29:] == whole[: -29 % size]
    for sampler in samplers:
        sampler.start = 6
        assert list(sampler) == sampler.indices()[6:] and len(sampler) == sampler.num_samples - 6
    assert whole != class_uniform(counts, 0.6, seed=2).indices()
    assert whole != class_uniform(counts, 0.6, epoch=2).indices()


def test_skip_corrupt_dataset_replaces_and_counts_unreadable_pairs(own_camvid):
    data = SkipCorruptDataset(open_dataset("camvid", own_camvid, "train"))
    valid = [data[i] for i in range(len(data))]
    assert not data.damaged.any()
    for number in (1, 4):
        (own_camvid / f"train/train_{number:03d}.png").write_bytes(b"torn")
    (own_camvid / "trainannot/train_002.png").unlink()
    for index, other in ((0, 0), (1, 3), (3, 3), (4, 0)):  # 2 is read for 1 only
        assert all(map(torch.equal, data[index], valid[other]))
    assert data.damaged.nonzero().flatten().tolist() == [1, 2, 4]
    for path in (own_camvid / "train").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match="is damaged"):
        data[0]


# The trainer


class NaNAt(WeightedCrossEntropy):
    """The loss is NaN in one step, counted from 0."""

    def __init__(self, step: int):
        super().__init__([1.0] * 3, 4)
        self.step = step

    def forward(self, logits, target):
        loss, weight = super().forward(logits, target)
        self.step -= 1
        return (loss * math.nan if self.step == -1 else loss), weight


class InfiniteGradients(WeightedCrossEntropy):
    def forward(self, logits, target):
        logits.register_hook(lambda gradient: gradient * math.inf)
        return super().forward(logits, target)


def test_train_one_epoch_with_nan_loss_names_step_and_images():
    trainer, loader = small_trainer(), noise_batches(3)
    trainer.task.loss = NaNAt(1)
    names = ", ".join(f"{i}.png" for i in loader.sampler.indices()[2:4])
    message = f"the loss is nan in step 2 of encoder 1/1, of {names}$"
    with pytest.raises(NonFiniteLoss, match=message):
        trainer.train_one_epoch(loader, "encoder 1/1", KEYS)


@pytest.mark.parametrize("loss", [NaNAt(0), InfiniteGradients([1.0] * 3, 4)], ids=lambda x: type(x))
def test_skipped_step_changes_neither_weights_nor_running_statistics(loss):
    trainer = small_trainer(skip_bad_steps=True)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.task.loss = loss
    result = trainer.train_one_epoch(noise_batches(1), "title", KEYS)
    assert result["skipped"] == 1 and result["loss"] == 0
    assert_same_tensors(before, trainer.model.state_dict())


def test_steps_after_a_skipped_one_are_taken():
    trainer = small_trainer(skip_bad_steps=True)
    trainer.task.loss = NaNAt(1)
    before = trainer.model[0].weight.clone()
    result = trainer.train_one_epoch(noise_batches(3), "title", KEYS)
    assert result["skipped"] == 1 and math.isfinite(result["loss"])
    assert not torch.equal(trainer.model[0].weight, before)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_gradients_are_clipped():
    norms = []
    for limit in (None, 1e-3):
        trainer = small_trainer(clip_norm=limit)

        def note(*_, trainer=trainer):
            norms.append(nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]))

        trainer.optimizer.register_step_pre_hook(note)
        trainer.train_one_epoch(noise_batches(1), "title", KEYS)
    assert norms[0] > 0.01 and norms[1].item() == pytest.approx(1e-3, rel=1e-3)


def test_ema_follows_the_weights():
    trainer = small_trainer(ema_decay=0.28, lr=0.01)
    expected = {}
    for decay in (0, 2 / 11, 3 / 12, 0.28, 0.28):  # rising to it as (1 + n) / (10 + n)
        trainer.train_one_epoch(noise_batches(1), "title", KEYS)
        now = {k: v.clone() for k, v in trainer.model.state_dict().items() if v.is_floating_point()}
        expected = {k: decay * expected.get(k, v) + (1 - decay) * v for k, v in now.items()}
    found = trainer.eval_model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["0.weight"], now["0.weight"])
    with pytest.raises(UserError, match="started without --ema-decay"):
        trainer.load_state_dict(small_trainer().state_dict())


def test_channels_last_gives_the_same_loss():
    trainers = [small_trainer(channels_last=layout) for layout in (False, True)]
    for trainer in trainers:
        trainer.model[3].p = 0.0  # dropout draws in the order of the memory
    weights = [next(t.model.parameters()) for t in trainers]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    losses = [t.train_one_epoch(noise_batches(1), "title", KEYS)["loss"] for t in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_lowers_the_loss_and_evaluates():
    trainer = small_trainer(lr=1e-2)
    loader = FakeLoader([*noise_batches(2), *noise_batches(1, size=1)])
    losses = [trainer.train_one_epoch(loader, "title", KEYS)["loss"] for _ in range(9)]
    assert losses[-1] < 0.8 * losses[0]
    result = trainer.evaluate(loader, "val")
    assert 0 <= result["miou"] <= 1 and len(result["class_iou"]) == 3


def test_bf16_training_keeps_fp32_weights_and_fp16_on_a_cpu_is_refused():
    trainer = small_trainer(precision="bf16")
    assert math.isfinite(trainer.train_one_epoch(noise_batches(1), "bf16", KEYS)["loss"])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        small_trainer(precision="fp16").train_one_epoch(noise_batches(1), "fp16", KEYS)


def test_choose_device_without_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda")


class SeedRecorder(Augmentation):
    def forward(self, images, labels, generator):
        self.seeds = [*getattr(self, "seeds", []), generator.initial_seed()]
        return super().forward(images, labels, generator)


def test_each_step_has_its_own_seed():
    def seeds(*keys: int) -> list[int]:
        augmentation = SeedRecorder()
        trainer, loader = small_trainer(augmentation), noise_batches(3)
        trainer.train_one_epoch(loader, "title", keys)
        trainer.evaluate(loader, "val")  # draws nothing
        return augmentation.seeds

    first = seeds(1, 0, 1)
    assert first == [step_generator(1, 0, 1, step, 0).initial_seed() for step in range(3)]
    others = [seeds(2, 0, 1), seeds(1, 1, 1), seeds(1, 0, 2)]
    others.append([step_generator(1, 0, 1, step, 1).initial_seed() for step in range(3)])
    assert len({*first, *chain(*others)}) == 15


def test_evaluate_does_not_depend_on_the_augmentation():
    presets = [Augmentation(preset) for preset in ("paper", "modern")]
    results = [small_trainer(preset).evaluate(noise_batches(2), "val") for preset in presets]
    assert results[0] == results[1]


# When to save, when to stop, and what is kept


def test_checkpoint_timer_saves_by_steps_and_by_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    request = StopRequest()
    pattern = [Action.CONTINUE, Action.CONTINUE, Action.SAVE] * 2
    timer = CheckpointTimer(ALONE, request, every_steps=3)
    assert [timer.poll(step) for step in range(1, 7)] == pattern
    timer = CheckpointTimer(ALONE, request, every_minutes=2)
    actions = []
    for clock[0] in (60, 61, 121, 130, 131, 242):
        actions.append(timer.poll(1))
    assert actions == pattern
    assert CheckpointTimer(ALONE, request).poll(5) == Action.CONTINUE
    assert timer.stop_signal() == timer.signal == 0
    request.number = signal.SIGTERM
    assert timer.poll(1) == Action.STOP and timer.signal == signal.SIGTERM
    assert timer.stop_signal() == signal.SIGTERM
    request.number = signal.SIGHUP  # 1, the value of Action.SAVE
    assert timer.poll(1) == Action.STOP and timer.signal == signal.SIGHUP


def test_stop_request_leaves_ignored_signals_ignored(monkeypatch):
    """As `nohup` and background jobs of a shell set them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        with request.watching():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not request.number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_request_ends_at_a_later_signal(monkeypatch):
    """But not at one soon after the first: schedulers and torchrun send a signal twice."""
    clock, raised = [0.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.signal, "raise_signal", raised.append)
    request, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    with request.watching():
        for clock[0], number in ((10.0, signal.SIGTERM), (11.0, signal.SIGINT)):
            os.kill(os.getpid(), number)
            assert request.number == signal.SIGTERM and not raised
        clock[0] = 13.0
        os.kill(os.getpid(), signal.SIGINT)
        assert raised == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
    statuses = [TrainingStopped(number).exit_status for number in (signal.SIGTERM, signal.SIGINT)]
    assert statuses == [143, 130]


def test_run_dir_on_a_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    def refuse(*arguments) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    RunDir(tmp_path / "run")
    assert "run is not protected against a second run" in caplog.text


def test_checkpoints_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (3, 20, 100):
        checkpoints.save(number, nn.Linear(1, 1), {"number": number})
    names = [path.name for path in checkpoints.paths()]
    assert names == ["checkpoint_000000100.pth", "checkpoint_000000020.pth"]
    _, content, warnings = checkpoints.load_latest()
    assert content["meta"]["number"] == 100 and not warnings


@pytest.mark.parametrize("damage", ["cut", "one byte", "empty"])
def test_load_latest_with_damaged_checkpoint_takes_the_one_before(damage, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    torch.manual_seed(0)
    for number in (1, 2):
        checkpoints.save(number, nn.Linear(50, 50), {"number": number})
    newest = checkpoints.paths()[0]
    content = bytearray(newest.read_bytes())
    if damage == "one byte":  # within the weights: PyTorch opens the file
        place = content.index(torch.load(newest)["state_dict"]["weight"].numpy().tobytes())
        content[place + 100] ^= 1
    newest.write_bytes({"cut": content[:-100], "one byte": content, "empty": b""}[damage])
    path, found, warnings = checkpoints.load_latest()
    assert found["meta"]["number"] == 1 and path.name == "checkpoint_000000001.pth"
    assert len(warnings) == 1 and f"{newest} is damaged" in warnings[0]
    assert newest.with_suffix(".damaged").exists() and not newest.exists()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="start a new run"):
        checkpoints.load_latest()


# Runs


@pytest.fixture
def scores(monkeypatch):
    """Validation scores of the epochs, instead of measured ones."""
    values: list[float | None] = []
    result = {"loss": 1.0, "class_iou": {}}
    monkeypatch.setattr(
        "lednet.training.trainer.Trainer.evaluate",
        lambda *_, **__: result | {"miou": values.pop(0)},
    )
    monkeypatch.setattr("lednet.training.loop.plot_curves", lambda *_: None)
    return values


def epoch_of(path) -> int:
    return load_checkpoint(path)["meta"]["epoch"]


def test_best_weights_are_those_of_the_best_epoch(scores, tmp_path):
    scores += [0.2, 0.9, 0.5, None, 0.9, 0.1]
    net, progress = tiny_run(tmp_path, epochs=(6,), run_options={"keep_every": 2})
    assert epoch_of(tmp_path / "s0_best.pth") == 2 and progress.best_score == 0.9
    kept = tmp_path / "s0_epoch002.pth"
    assert_same_tensors(
        *(load_checkpoint(p)["state_dict"] for p in (tmp_path / "s0_best.pth", kept))
    )
    assert not torch.equal(load_checkpoint(kept)["state_dict"]["0.weight"], net[0].weight)
    assert len([*tmp_path.glob("s0_epoch*.pth")]) == 3 and len([*tmp_path.glob("check*")]) == 2


def test_resumed_run_remembers_the_best_score(scores, tmp_path):
    scores += [0.2, 0.9, 0.5, 0.95]
    with pytest.raises(TrainingStopped):
        tiny_run(tmp_path, StopAt(ALONE, 9), epochs=(4,))
    tiny_run(tmp_path, StopAt(ALONE, 16), epochs=(3,), resume=True)
    assert epoch_of(tmp_path / "s0_best.pth") == 2
    tiny_run(tmp_path, epochs=(4,), resume=True)
    assert epoch_of(tmp_path / "s0_best.pth") == 4


def test_each_stage_has_its_own_best_score(scores, tmp_path):
    scores += [0.8, 0.3]
    tiny_run(tmp_path, epochs=(1, 1))
    assert (tmp_path / "s1_best.pth").exists()


def test_validate_every_validates_also_the_last_epoch_of_a_stage(scores, tmp_path):
    scores += [0.1] * 4
    tiny_run(tmp_path, epochs=(3, 2), run_options={"validate_every": 2})
    validated = [record["val_miou"] is not None for record in read_records(tmp_path)]
    assert validated == [False, True, True, False, True]


RUNS = {
    "adam": {"augmentation": "modern"},
    "ema, accumulated": {"ema_decay": 0.5, "accumulate": 2},
    "sgd, from device memory": {"optimizer": "sgd", "loading": {"on_device": True}},
    "captured": {"ema_decay": 0.5, "capture": True},
    "class-uniform": {
        "loading": {"class_counts": np.tile([5, 0, 9, 1], (7, 1)), "class_uniform": 0.5}
    },
    "skip bad steps": {"skip_bad_steps": True, "clip_norm": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_run_stopped_anywhere_and_resumed_ends_bit_exactly_the_same(name, tmp_path, monkeypatch):
    """In the first and second epoch of a stage, at the end of an epoch, and in the second stage."""
    monkeypatch.setattr("lednet.training.loop.plot_curves", lambda *_: None)
    options = {key: value for key, value in RUNS[name].items() if key != "augmentation"}

    def change(trainer) -> None:
        if RUNS[name].get("augmentation"):
            trainer.task.augment = Augmentation("modern")
        if capture:
            trainer.record = record_by_calling
            trainer._make_capturable(trainer.optimizer)

    capture = options.pop("capture", False)
    tiny_run(tmp_path / "whole", change=change, **options)
    last = load_checkpoint(Checkpoints(tmp_path / "whole").paths()[0])["progress"]["steps"]
    assert last == 16 // options.get("accumulate", 1)  # 7 images, 2 a step: every image is used
    resume = False
    for step in (1, last // 4, last * 3 // 8, last // 2, last - 2):
        with pytest.raises(TrainingStopped):
            tiny_run(tmp_path / "parts", StopAt(ALONE, step), resume, change, **options)
        resume = True
    tiny_run(tmp_path / "parts", resume=True, change=change, **options)
    newest = Checkpoints(tmp_path / "whole").paths()[0].name
    names = ("s0_best.pth", "s1_best.pth", newest)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", *names)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (NaNAt(2), {}, "the loss is nan in step 3 of s0 1/2, of "),
        (None, {"lr": 1e39}, "the weights are not finite after 1 steps"),
    ],
    ids=["loss", "weights"],
)
def test_non_finite_run_stops_with_a_sentence_and_a_valid_checkpoint(
    loss, options, message, tmp_path
):
    def change(trainer) -> None:
        trainer.task.loss = loss or trainer.task.loss

    timer = StopAt(ALONE, every_steps=1)
    with pytest.raises(UserError, match=f"{message}.*: continue with --resume and a lower --lr"):
        tiny_run(tmp_path, timer, change=change, **options)
    found = Checkpoints(tmp_path).paths()
    assert len(found) == (2 if loss else 0)
    for path in found:
        assert all(v.isfinite().all() for v in load_checkpoint(path)["state_dict"].values())


def test_skipped_steps_are_logged(tmp_path, scores):
    scores += [0.1] * 2
    loss = NaNAt(2)
    change = lambda trainer: setattr(trainer.task, "loss", loss)  # noqa: E731
    tiny_run(tmp_path, change=change, epochs=(2,), skip_bad_steps=True)
    first, second = read_records(tmp_path)
    assert first["skipped"] == 1 and "skipped" not in second


def test_resume_with_other_stages_is_refused(tmp_path, scores):
    scores += [0.1] * 2
    tiny_run(tmp_path, epochs=(1, 1))
    with pytest.raises(UserError, match="is in stage s1, which these options leave out"):
        tiny_run(tmp_path, epochs=(1,), resume=True)


@pytest.mark.parametrize(
    ("classes", "values", "words"),
    [
        (["b", "a"], [[0, 0], [5, 1]], "class 0 was a, and is b"),
        (["a"], [[0, 0], [5, 255]], "class 1 was b, and is absent"),
        (["a", "b"], [[0, 1], [5, 0]], "label value 0 was a, and is b"),
        (["a", "b"], [[0, 0], [5, 1], [9, 255]], "label value 9 was absent, and is void"),
    ],
)
def test_resume_with_other_classes_is_refused(scores, tmp_path, classes, values, words):
    scores += [0.1, 0.1]
    tiny_run(tmp_path, epochs=(1,), meta={"classes": ["a", "b"], "label_values": [[0, 0], [5, 1]]})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"checkpoint_.*: {words}\. Restore"):
        meta = {"classes": classes, "label_values": values}
        tiny_run(tmp_path, epochs=(2,), resume=True, meta=meta)
    assert sorted(tmp_path.iterdir()) == before


def test_resume_from_a_checkpoint_without_label_values_compares_names_only(scores, tmp_path):
    scores += [0.1, 0.1]
    tiny_run(tmp_path, epochs=(1,), meta={"classes": ["a"]})
    meta = {"classes": ["a"], "label_values": [[0, 0]]}
    tiny_run(tmp_path, epochs=(2,), resume=True, meta=meta)
    assert len(read_records(tmp_path)) == 2


def test_report_result_names_only_files_that_exist(scores, tmp_path, capsys):
    for score, words in ((None, "no s0_best.pth (no epoch has"), (0.5, "0.500; weights")):
        scores.append(score)
        folder = tmp_path / str(score)
        run, progress = tiny_run(folder, epochs=(1,), return_run=True)
        report_result(run, progress, "mIoU", "s0_best.pth")
        line = capsys.readouterr().out.splitlines()[-1]
        assert words in line and "-1" not in line
        names = [word.strip(";,") for word in line.split() if word.startswith(str(tmp_path))]
        assert Path(names[0]).exists()


def test_disabled_last_class_is_never_predicted_and_stays_disabled():
    torch.manual_seed(0)
    net = LEDNet(4, "d128", 4)
    net.disable_last_class()
    trainer = small_trainer(Unaugmented(), net, lr=0.1, weight_decay=0.1, ema_decay=0.5)
    trainer.train_one_epoch(noise_batches(3, 4), "title", KEYS)
    for model in (net, trainer.eval_model):
        logits = model.eval()(torch.rand(2, 3, 32, 48))
        assert not logits[:, -1].any() and logits[:, :-1].any()


def test_run_of_version_0_1_is_resumed(own_camvid, tmp_path, run_inside):
    """Its options have their earlier names, and its weights one value each, to be small."""
    folder = shutil.copytree(ROOT / "tests/run_v01", tmp_path / "run")
    (packed,) = folder.glob("checkpoint_*.pth.xz")
    packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    assert {"val_stride", "val_prefix", "skip_corrupt"} <= read_options(folder).keys()
    result = run_inside(
        "train/main.py", "--savedir", folder, "--datadir", own_camvid, "--resume",
    ).check()  # fmt: skip
    assert "resuming decoder after epoch 1, 1 batches into the next" in result.stdout
    assert [record["epoch"] for record in read_records(folder)] == [1, 2]


def test_accumulated_batches_equal_one_large_batch():
    def weights(loader: FakeLoader, accumulate: int) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = small_trainer(Unaugmented(), nn.Conv2d(3, 4, 3), accumulate=accumulate)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 1.0)
        trainer.train_one_epoch(loader, "title", KEYS)
        return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()

    small = noise_batches(3)
    small[0][1][:, 2:] = 255  # nearly all void: the weights of the batches differ much
    joint = [tuple(map(torch.cat, zip(*part, strict=True))) for part in (small[:2], small[2:])]
    found, expected = weights(small, 2), weights(FakeLoader(joint), 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
