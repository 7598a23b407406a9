import copy
import math
import os
import signal
import types
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lednet import LEDNet, UserError
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.pairs import Sample
from lednet.data.registry import open_dataset
from lednet.data.samplers import (
    ClassUniformSampler,
    DistributedEvalSampler,
    ResumableDistributedSampler,
)
from lednet.data.transforms import Augmentation
from lednet.device import choose_device
from lednet.distributed import DistributedContext
from lednet.training import signals
from lednet.training.checkpointing import Checkpoints
from lednet.training.losses import (
    RELEASED_WEIGHTS,
    WEIGHT_OFFSETS,
    WeightedCrossEntropy,
    class_weights,
    resize_target,
)
from lednet.training.lr_schedule import lr_factor
from lednet.training.signals import Action, CheckpointTimer, StopRequest, TrainingStopped
from lednet.training.tasks import Segmentation
from lednet.training.trainer import (
    FinetuneConfig,
    NonFiniteLoss,
    Trainer,
    TrainerConfig,
    step_generator,
)

CPU = torch.device("cpu")


def test_both_released_weight_lists_follow_from_one_list_of_shares():
    shares = np.exp(1 / np.array(RELEASED_WEIGHTS["decoder"])) - WEIGHT_OFFSETS["decoder"]
    assert 0.8 < shares.sum() < 1.0  # the rest is void
    for stage, offset in WEIGHT_OFFSETS.items():
        derived = class_weights(shares, offset)
        np.testing.assert_allclose(derived, RELEASED_WEIGHTS[stage], rtol=0.01)


def test_rare_classes_weigh_more():
    weights = class_weights([0.0, 0.1, 0.9], 1.10)
    assert weights.tolist() == pytest.approx(
        [1 / math.log(1.1), 1 / math.log(1.2), 1 / math.log(2)]
    )


def test_loss_is_pytorchs_weighted_mean_without_void():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 5, 6), torch.randint(0, 3, (2, 5, 6))
    target[0, :2] = 255
    total, weight = WeightedCrossEntropy([1.0, 2.0, 5.0], 4)(logits, target)
    expected = F.cross_entropy(logits, target, torch.tensor([1.0, 2, 5, 0]), ignore_index=255)
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)


def test_targets_shrink_to_the_centre_of_each_cell():
    target = torch.arange(16 * 24).view(1, 16, 24) % 251
    small = resize_target(target, (2, 3))
    assert torch.equal(small, target[:, 4::8, 4::8])
    assert resize_target(torch.full((1, 97, 131), 255), (13, 17)).unique().tolist() == [255]


def test_poly_schedule_has_one_value_an_epoch():
    assert lr_factor("poly", 0, 300) == lr_factor("poly", 0.99, 300) == 1.0
    assert lr_factor("poly", 150.5, 300) == pytest.approx(0.5**0.9)
    assert lr_factor("poly", 299, 300) == pytest.approx((1 / 300) ** 0.9)


def test_exponential_schedule_is_the_releases_for_imagenet():
    epochs = [lr_factor("exponential", epoch - 1, 150) for epoch in (1, 15, 16, 17, 150)]
    assert epochs == pytest.approx([1, 1, 0.95, 0.95**2, 0.95**135])


def test_cosine_schedule_moves_with_every_step_behind_its_warm_up():
    assert lr_factor("cosine", 0, 10) == 1 and lr_factor("cosine", 5, 10) == pytest.approx(0.5)
    assert lr_factor("cosine", 2.5, 10) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    warm = [lr_factor("cosine", done, 12, warmup=2) for done in (0, 0.5, 1, 2, 7)]
    assert warm == pytest.approx([0.01, 0.2575, 0.505, 1, 0.5])


@pytest.mark.parametrize(("length", "size"), [(10, 1), (10, 3), (2, 3)])
def test_samplers_deal_out_every_image(length, size):
    worlds = [DistributedContext(rank, size, CPU) for rank in range(size)]
    once = [list(DistributedEvalSampler(length, world)) for world in worlds]
    assert sorted(chain(*once)) == list(range(length))
    shuffled = [list(ResumableDistributedSampler(length, world, seed=1)) for world in worlds]
    assert len({len(part) for part in shuffled}) == 1
    dealt = list(chain(*shuffled))
    assert set(dealt) == set(range(length)) and len(dealt) < length + size


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ResumableDistributedSampler(50, DistributedContext(0, 1, CPU), seed)
        sampler.epoch = epoch
        return list(sampler)

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(*key)) for key in ((1, 1), (1, 2), (2, 1))}) == 3


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_another_number_of_processes_goes_on_with_what_is_left(before, after):
    """As a run does that was stopped two batches of 3 into its epoch."""
    images = 2 * 3 * before
    worlds = [DistributedContext(rank, before, CPU) for rank in range(before)]
    done = {
        i for w in worlds for i in ResumableDistributedSampler(29, w, seed=1).indices()[: 2 * 3]
    }
    left = set()
    for rank in range(after):
        sampler = ResumableDistributedSampler(29, DistributedContext(rank, after, CPU), seed=1)
        sampler.start = images // after
        left |= set(sampler)
    assert done | left == set(range(29)) and len(done & left) < 2 * after


@pytest.mark.parametrize(
    ("length", "world", "seed", "epoch", "expected"),
    [
        (12, DistributedContext(0, 1, CPU), 3, 0, [11, 2, 8, 1, 10, 0, 6, 4, 9, 3, 5, 7]),
        (12, DistributedContext(0, 1, CPU), 3, 7, [8, 10, 7, 2, 1, 5, 11, 9, 3, 4, 6, 0]),
        (7, DistributedContext(1, 3, CPU), 5, 4, [1, 3, 2]),
    ],
)
def test_order_is_the_one_that_earlier_checkpoints_were_saved_in(
    length, world, seed, epoch, expected
):
    sampler = ResumableDistributedSampler(length, world, seed)
    sampler.epoch = epoch
    assert sampler.indices() == expected


def class_uniform(counts: np.ndarray, fraction: float, epoch=1, world=None) -> ClassUniformSampler:
    sampler = ClassUniformSampler(counts, fraction, world or DistributedContext(0, 1, CPU), seed=1)
    sampler.epoch = epoch
    return sampler


def test_each_class_is_drawn_as_often_as_another_and_each_of_its_images():
    """Class 0 is in every image, class 1 in the first ten, class 3 in the first half."""
    counts = np.zeros((1000, 5), dtype=np.int64)
    counts[:, 0], counts[:500, 3], counts[:, 4] = 1_000_000, 30, 7  # void last; class 2 nowhere
    counts[:10, 1] = 10 ** np.arange(10)  # be it one pixel or many
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
def test_as_many_places_as_asked_for_are_drawn_by_class_and_the_others_are_left(fraction, drawn):
    counts = np.zeros((37, 3), dtype=np.int64)
    counts[:, 2] = 100
    counts[5, 1] = 1  # so each draw is image 5
    numbers, places = set(), set()
    for epoch in range(200):
        plain = ResumableDistributedSampler(37, DistributedContext(0, 1, CPU), seed=1)
        plain.epoch = epoch
        pairs = list(zip(plain.indices(), class_uniform(counts, fraction, epoch), strict=True))
        changed = {place for place, (before, after) in enumerate(pairs) if before != after}
        assert all(after == 5 for before, after in pairs if before != after)
        numbers.add(len(changed))
        places |= changed
    # One less where image 5 is drawn for the place that it had.
    assert numbers == ({36} if fraction == 1 else {drawn - 1, drawn})
    assert places == set(range(37))


def test_classes_that_never_occur_are_not_drawn_and_void_is_no_class():
    counts = np.zeros((20, 6), dtype=np.int64)
    counts[:, 5] = 9
    assert class_uniform(counts, 1).indices() == class_uniform(counts, 0.5).indices()
    assert sorted(class_uniform(counts, 1)) == list(range(20))
    counts[3, 1] = counts[[4, 5, 19], 4] = 2
    counts[7] = 0  # a label that could not be read
    drawn = [index for epoch in range(50) for index in class_uniform(counts, 1, epoch)]
    assert set(drawn) == {3, 4, 5, 19}
    assert drawn.count(3) == pytest.approx(500, rel=0.15)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_class_uniform_order_is_one_for_all_processes_and_goes_on_inside_an_epoch(before, after):
    counts = np.random.default_rng(0).integers(0, 3, (29, 5))

    def parts(size: int, epoch: int = 1) -> list[ClassUniformSampler]:
        return [
            class_uniform(counts, 0.6, epoch, DistributedContext(rank, size, CPU))
            for rank in range(size)
        ]

    def joint(samplers: list[ClassUniformSampler]) -> list[int]:
        """What they have before them, in the order of the steps."""
        return list(chain(*zip(*samplers, strict=True)))  # strict: equally many

    (whole,) = [sampler.indices() for sampler in parts(1)]
    assert joint(parts(before))[:29] == joint(parts(after))[:29] == whole
    assert joint(parts(before))[29:] == whole[: -29 % before]
    left = parts(after)
    for sampler in left:
        sampler.start = 6
        assert list(sampler) == sampler.indices()[6:] and len(sampler) == sampler.num_samples - 6
    assert joint(left)[: 29 - 6 * after] == whole[6 * after :]
    assert joint(parts(before)) == joint(parts(before)) != joint(parts(before, epoch=2))
    assert (
        whole != ClassUniformSampler(counts, 0.6, DistributedContext(0, 1, CPU), seed=2).indices()
    )


def test_absent_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("cuda")


KEYS = (1, 0, 1)


def small_trainer(
    augmentation: Augmentation | None = None,
    model: nn.Module | None = None,
    pretrained: FinetuneConfig | None = None,
    **options,
) -> Trainer:
    torch.manual_seed(0)
    model = LEDNet(4).encoder_stage() if model is None else model
    criterion = WeightedCrossEntropy([1.0, 5.0, 2.0], 4)
    task = Segmentation(criterion, augmentation or Augmentation(), "abc")
    optimization = TrainerConfig(**options)
    return Trainer(
        model, task, 10, DistributedContext(0, 1, CPU), optimization, pretrained=pretrained
    )


def batches(count: int, size: int = 2) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, 3, (size, 32, 32), dtype=torch.uint8, generator=generator),
        )
        for _ in range(count)
    ]


class Loader(list):
    """Batches with what else a trainer asks a loader for."""

    batch_size = 2

    @property
    def sampler(self):
        return ResumableDistributedSampler(
            sum(len(images) for images, _ in self), DistributedContext(0, 1, CPU), seed=1
        )

    @property
    def dataset(self):
        count = sum(len(images) for images, _ in self)
        return types.SimpleNamespace(pairs=[Sample(Path(f"{i}.png"), None) for i in range(count)])


class Poisoned(WeightedCrossEntropy):
    """No number for a loss in one step."""

    def __init__(self, step: int):
        super().__init__([1.0] * 3, 4)
        self.step = step

    def forward(self, logits, target):
        loss, weight = super().forward(logits, target)
        self.step -= 1
        return (loss * math.nan if self.step == -1 else loss), weight


def test_not_finite_loss_names_step_and_images():
    trainer, loader = small_trainer(), Loader(batches(3))
    trainer.task.loss = Poisoned(1)
    names = ", ".join(f"{i}.png" for i in loader.sampler.indices()[2:4])
    with pytest.raises(
        NonFiniteLoss, match=f"the loss is nan in step 2 of encoder 1/1, of {names}$"
    ):
        trainer.train_one_epoch(loader, "encoder 1/1", KEYS)


def test_bad_steps_leave_no_trace():
    """Neither in the weights nor in the running statistics, which the step has touched."""
    trainer = small_trainer(skip_bad_steps=True)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.task.loss = Poisoned(0)
    result = trainer.train_one_epoch(Loader(batches(1)), "title", KEYS)
    assert result["skipped"] == 1 and result["loss"] == 0
    after = trainer.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    trainer.task.loss = Poisoned(1)
    result = trainer.train_one_epoch(Loader(batches(3)), "title", KEYS)
    assert result["skipped"] == 1 and math.isfinite(result["loss"])
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_bad_gradients_of_a_good_loss_are_a_bad_step():
    class Steep(WeightedCrossEntropy):
        def forward(self, logits, target):
            logits.register_hook(lambda gradient: gradient * math.inf)
            return super().forward(logits, target)

    trainer = small_trainer(skip_bad_steps=True)
    trainer.task.loss = Steep([1.0] * 3, 4)
    result = trainer.train_one_epoch(Loader(batches(1)), "title", KEYS)
    assert result["skipped"] == 1
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def uneven(loader: list) -> list:
    """Batches whose weights differ much: one nearly all void."""
    loader[0][1][:, 2:] = 255
    return loader


def test_accumulated_batches_are_one_large_batch():
    def weights(loader: Loader, accumulate: int) -> torch.Tensor:
        class Still(Augmentation):
            def forward(self, images, labels, generator):
                return self.normalize(images, labels)

        torch.manual_seed(0)
        trainer = small_trainer(Still(), nn.Conv2d(3, 4, 3), accumulate=accumulate)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 1.0)
        trainer.train_one_epoch(loader, "title", KEYS)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    small = uneven(batches(3))
    joint = [tuple(map(torch.cat, zip(*part, strict=True))) for part in (small[:2], small[2:])]
    found, expected = weights(Loader(small), 2), weights(Loader(joint), 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped():
    norms = []
    for limit in (None, 1e-3):
        trainer = small_trainer(clip_norm=limit)

        def note(*_, trainer=trainer):
            norms.append(nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]))

        trainer.optimizer.register_step_pre_hook(note)
        trainer.train_one_epoch(Loader(batches(1)), "title", KEYS)
    assert norms[0] > 0.01
    assert norms[1].item() == pytest.approx(1e-3, rel=1e-3)


def test_average_follows_the_weights():
    trainer = small_trainer(ema_decay=0.28, lr=0.01)
    expected = None
    for decay in (0, 2 / 11, 3 / 12, 0.28, 0.28):  # rising to it as (1 + n) / (10 + n)
        trainer.train_one_epoch(Loader(batches(1)), "title", KEYS)
        now = {k: v.clone() for k, v in trainer.model.state_dict().items() if v.is_floating_point()}
        expected = {key: decay * (expected or now)[key] + (1 - decay) * now[key] for key in now}
    found = trainer.eval_model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["encoder.0.conv.weight"], now["encoder.0.conv.weight"])
    other = small_trainer(ema_decay=0.75)
    other.load_state_dict(trainer.state_dict())
    name = "encoder.0.conv.bias"
    assert torch.equal(other.eval_model.state_dict()[name], found[name])
    with pytest.raises(UserError, match="started without --ema-decay"):
        other.load_state_dict(small_trainer().state_dict())


def test_channels_last_answers_alike():
    trainers = [small_trainer(channels_last=layout) for layout in (False, True)]
    for dropout in (m for t in trainers for m in t.model.modules() if isinstance(m, nn.Dropout2d)):
        dropout.p = 0.0  # it draws in the order of the memory
    weights = [next(t.model.parameters()) for t in trainers]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    losses = [t.train_one_epoch(Loader(batches(1)), "title", KEYS)["loss"] for t in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Numbers(torch.utils.data.Dataset):
    pairs = tuple(Sample(Path(f"{i}.png"), None) for i in range(7))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        images, labels = batches(1, size=7)[0]
        return images[index], labels[index]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_epoch_that_was_interrupted_ends_as_if_it_had_not_been(stop, accumulate):
    """With dropout, augmentation, average, a partial batch, and the epoch's figures."""
    if stop % accumulate and stop < 4:
        pytest.skip("between two updates nothing is saved")
    world = DistributedContext(0, 1, CPU)
    options = {"ema_decay": 0.9, "accumulate": accumulate}

    def loader(start: int) -> torch.utils.data.DataLoader:
        sampler = ResumableDistributedSampler(7, world, seed=1)
        sampler.start = start
        return torch.utils.data.DataLoader(Numbers(), 2, sampler=sampler)

    whole = small_trainer(**options)
    expected = whole.train_one_epoch(loader(0), "whole", KEYS)

    saved = {}
    first = small_trainer(**options)
    tally = first.new_epoch_state()

    def save():
        if tally.step == stop:
            parts = (first.model.state_dict(), first.state_dict(), tally.state(world))
            saved["state"] = copy.deepcopy(parts)

    first.train_one_epoch(loader(0), "first part", KEYS, tally, save)
    second = small_trainer(**options)
    model, state, counted = saved["state"]
    second.model.load_state_dict(model)
    second.load_state_dict(state)
    tally = second.new_epoch_state()
    tally.restore(counted, world)
    assert tally.images == min(2 * stop, 7)
    found = second.train_one_epoch(loader(tally.images), "second part", KEYS, tally)

    for key in ("loss", "miou"):
        assert found[key] == expected[key]
    for ours, theirs in ((second.model, whole.model), (second.ema, whole.ema)):
        a, b = ours.state_dict(), theirs.state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)


# When to save, when to stop, and what is kept


def test_checkpoint_timer_saves_by_steps_and_by_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    world, request = DistributedContext(0, 1, CPU), StopRequest()
    pattern = [Action.CONTINUE, Action.CONTINUE, Action.SAVE] * 2
    timer = CheckpointTimer(world, request, every_steps=3)
    assert [timer.poll(step) for step in range(1, 7)] == pattern
    timer = CheckpointTimer(world, request, every_minutes=2)
    actions = []
    for clock[0] in (60, 61, 121, 130, 131, 242):
        actions.append(timer.poll(1))
    assert actions == pattern
    assert CheckpointTimer(world, request).poll(5) == Action.CONTINUE
    assert timer.stop_signal() == timer.signal == 0
    request.number = signal.SIGTERM
    assert timer.poll(1) == Action.STOP and timer.signal == signal.SIGTERM
    assert timer.stop_signal() == signal.SIGTERM


def test_signal_is_noted_and_a_later_one_ends(monkeypatch):
    """But not one at the same time: schedulers and torchrun send the same signal twice."""
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
    assert (
        TrainingStopped(signal.SIGTERM).exit_status == 143
        and TrainingStopped(signal.SIGINT).exit_status == 130
    )


def test_the_last_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (3, 20, 100):
        checkpoints.save(number, nn.Linear(1, 1), {"number": number})
    assert [path.name for path in checkpoints.paths()] == [
        "checkpoint_000000100.pth", "checkpoint_000000020.pth"
    ]  # fmt: skip
    _, content, complaints = checkpoints.load_latest()
    assert content["meta"]["number"] == 100 and not complaints


@pytest.mark.parametrize("harm", ["cut", "one byte", "empty"])
def test_damaged_checkpoint_falls_back_and_says_so(harm, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    torch.manual_seed(0)
    for number in (1, 2):
        checkpoints.save(number, nn.Linear(50, 50), {"number": number})
    newest = checkpoints.paths()[0]
    content = bytearray(newest.read_bytes())
    if harm == "one byte":  # within the weights: it opens, and has other numbers
        place = content.index(torch.load(newest)["state_dict"]["weight"].numpy().tobytes())
        content[place + 100] ^= 1
        assert torch.load(newest)["state_dict"]["weight"].shape == (50, 50)
    newest.write_bytes({"cut": content[:-100], "one byte": content, "empty": b""}[harm])
    path, found, complaints = checkpoints.load_latest()
    assert found["meta"]["number"] == 1 and path.name == "checkpoint_000000001.pth"
    assert len(complaints) == 1 and f"{newest} is damaged" in complaints[0]
    assert newest.with_suffix(".damaged").exists() and not newest.exists()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="start a new run"):
        checkpoints.load_latest()


def test_unreadable_pair_is_replaced_and_counted(own_camvid):
    data = SkipCorruptDataset(open_dataset("camvid", own_camvid, "train"))
    sound = [data[i] for i in range(len(data))]
    assert not data.damaged.any()
    (own_camvid / "train/train_001.png").write_bytes(b"torn")
    (own_camvid / "trainannot/train_002.png").unlink()
    for index, other in ((0, 0), (1, 3), (2, 3), (3, 3)):
        assert all(map(torch.equal, data[index], sound[other]))
    assert data.damaged.nonzero().flatten().tolist() == [1, 2]
    for path in (own_camvid / "train").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match="is damaged"):
        data[0]


def test_training_lowers_the_loss_and_counts_every_image():
    trainer = small_trainer(lr=1e-3)
    loader = Loader([*batches(2), (*[x[:1] for x in batches(1)[0]],)])
    first = trainer.train_one_epoch(loader, "first", KEYS)
    for _ in range(8):
        last = trainer.train_one_epoch(loader, "later", KEYS)
    assert last["loss"] < 0.8 * first["loss"]
    result = trainer.evaluate(loader, "val")
    assert 0 <= result["miou"] <= 1 and len(result["class_iou"]) == 3


def test_bf16_trains():
    trainer = small_trainer(precision="bf16")
    assert math.isfinite(trainer.train_one_epoch(Loader(batches(1)), "bf16", KEYS)["loss"])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        small_trainer(precision="fp16").train_one_epoch(Loader(batches(1)), "fp16", KEYS)


class Watched(Augmentation):
    """Notes the seed of every change."""

    def forward(self, images, labels, generator):
        self.seeds = [*getattr(self, "seeds", []), generator.initial_seed()]
        return super().forward(images, labels, generator)


def test_each_step_draws_from_its_own_place_in_the_run():
    def seeds(seed: int, stage: int, epoch: int) -> list[int]:
        augmentation = Watched()
        trainer, loader = small_trainer(augmentation), Loader(batches(3))
        trainer.train_one_epoch(loader, "title", (seed, stage, epoch))
        trainer.evaluate(loader, "val")  # draws nothing
        return augmentation.seeds

    first = seeds(1, 0, 1)
    assert first == [step_generator(1, 0, 1, step, 0).initial_seed() for step in range(3)]
    others = [seeds(2, 0, 1), seeds(1, 1, 1), seeds(1, 0, 2)]
    others.append([step_generator(1, 0, 1, step, 1).initial_seed() for step in range(3)])
    assert len({*first, *(seed for run in others for seed in run)}) == 15


def test_scores_do_not_depend_on_the_augmentation():
    loader = Loader(batches(2))
    results = [small_trainer(Augmentation(p)).evaluate(loader, "val") for p in ("paper", "modern")]
    assert results[0] == results[1]
