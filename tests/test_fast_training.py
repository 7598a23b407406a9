"""Data in device memory, the recorded training step, and training for a fixed time."""

import copy
import signal

import pytest
import torch
from test_training import CPU, KEYS, Loader, batches, small_trainer

from lednet import LEDNet, UserError
from lednet.checkpoint import load_checkpoint
from lednet.data import device_cache
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.device_cache import DeviceLoader
from lednet.data.loaders import make_loaders
from lednet.data.registry import open_training_data
from lednet.distributed import DistributedContext
from lednet.training import time_budget
from lednet.training.checkpointing import Checkpoints
from lednet.training.cuda_graph import CapturedStep
from lednet.training.loop import StageComponents, TrainingRun, train_stages
from lednet.training.run_dir import RunDir, read_records
from lednet.training.signals import CheckpointTimer, StopRequest, TrainingStopped
from lednet.training.stages import Stage
from lednet.training.time_budget import TimeBudget
from lednet.training.trainer import LossMonitor, TrainerConfig


@pytest.fixture(params=["files", "cache", "skip damaged"])
def data(request, camvid, tmp_path):
    train, val = open_training_data("camvid", camvid, 24, 32)
    if request.param == "cache":
        build_cache(tmp_path / "cache", {"train": train})
        return CachedDataset(tmp_path / "cache/train", train, ""), val
    return (SkipCorruptDataset(train) if request.param == "skip damaged" else train), val


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_device_loader_yields_the_batches_of_a_data_loader(data, rank, size):
    world = DistributedContext(rank, size, CPU)
    for epoch, start in ((1, 0), (2, 0), (3, 1)):
        pairs = zip(
            make_loaders(*data, world, 2, 0, seed=1),
            make_loaders(*data, world, 2, 0, seed=1, on_device=True),
            strict=True,
        )
        for plain, stored in pairs:
            assert isinstance(stored, DeviceLoader)
            for loader in (plain, stored):
                loader.sampler.epoch, loader.sampler.start = epoch, start
            expected, found = list(plain), list(stored)
            assert len(found) == len(stored) == len(plain)
            for batch, other in zip(expected, found, strict=True):
                for a, b in zip(batch, other, strict=True):
                    assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def test_device_loader_stores_only_this_process_share_of_validation(data):
    _, val = make_loaders(*data, DistributedContext(1, 2, CPU), 2, 0, seed=1, on_device=True)
    assert len(val.images) == len(val.sampler) == 1


@pytest.mark.parametrize(("size", "needed"), [(1, "0.00 GB"), (2, "0.00 GB")])
def test_data_larger_than_the_memory_is_refused(data, size, needed, monkeypatch):
    bytes_needed = size * len(data[0]) * 4 * 24 * 32
    monkeypatch.setattr(device_cache, "free_memory", lambda device: bytes_needed)
    with pytest.raises(UserError, match=rf"needs {needed} on cpu, where 0.00 GB are free: use"):
        make_loaders(*data, DistributedContext(0, size, CPU), 2, 0, seed=1, on_device=True)
    monkeypatch.setattr(device_cache, "free_memory", lambda device: 2 * bytes_needed)
    make_loaders(*data, DistributedContext(0, size, CPU), 2, 0, seed=1, on_device=True)


def test_free_memory_of_a_cpu_is_known_on_linux():
    free = device_cache.free_memory(CPU)
    assert free is None or free > 1_000_000


def record_by_calling(call):
    """Stands in for a CUDA graph: a replay calls again, and writes to the recorded tensors."""
    outputs = call()

    def replay() -> None:
        for kept, new in zip(outputs, call(), strict=True):
            kept.copy_(new)

    return replay, outputs


def captured_trainer(record=record_by_calling, **options):
    trainer = small_trainer(**options)
    trainer.record = record
    trainer._make_capturable(trainer.optimizer)
    return trainer


def eager_trainer(**options):
    """One whose learning rate is a float32 number as in a recorded step."""
    trainer = captured_trainer(**options)
    trainer._captured_step = lambda images, target: None
    return trainer


def all_state(trainer) -> dict[str, torch.Tensor]:
    state = dict(trainer.model.state_dict())
    if trainer.ema is not None:
        state |= {f"average.{k}": v for k, v in trainer.ema.state_dict().items()}
    for i, values in enumerate(trainer.optimizer.state.values()):
        state |= {f"optimizer.{i}.{k}": v for k, v in values.items() if v is not None}
    return state


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


OPTIONS = [
    {},
    {"ema_decay": 0.9, "schedule": "cosine", "channels_last": True},
    {"optimizer": "sgd", "lr": 0.1, "clip_norm": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_recorded_steps_equal_eager_ones(options):
    """With dropout, a smaller last batch, and a second epoch at another learning rate."""
    loader = Loader([*batches(3), *batches(1, size=1)])
    trainers = eager_trainer(**options), captured_trainer(**options)
    results = []
    for trainer in trainers:
        for epoch in (1, 6):
            trainer.start_epoch(epoch)
            results.append(trainer.train_one_epoch(loader, "epoch", (1, 0, epoch)))
    assert trainers[1]._captured is not None
    for eager, recorded in zip(results[:2], results[2:], strict=True):
        assert recorded["loss"] == eager["loss"] and recorded["miou"] == eager["miou"]
    assert_same(*map(all_state, trainers))


def test_recorded_run_resumes_from_a_checkpoint():
    whole = captured_trainer(ema_decay=0.9)
    first, second = captured_trainer(ema_decay=0.9), captured_trainer(ema_decay=0.9)
    for trainer, epochs in ((whole, (1, 2)), (first, (1,)), (second, (2,))):
        if trainer is second:
            second.model.load_state_dict(first.model.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for epoch in epochs:
            trainer.start_epoch(epoch)
            trainer.train_one_epoch(Loader(batches(2)), "epoch", (1, 0, epoch))
    assert_same(all_state(second), all_state(whole))


def test_checkpoints_of_recorded_and_eager_runs_are_interchangeable():
    recorded, eager = captured_trainer(), small_trainer()
    for trainer, other in ((recorded, eager), (eager, recorded)):
        trainer.train_one_epoch(Loader(batches(2)), "epoch", KEYS)
        other.load_state_dict(copy.deepcopy(trainer.state_dict()))
        other.start_epoch(2)
        group = other.optimizer.param_groups[0]
        assert isinstance(group["lr"], torch.Tensor) == group["capturable"] == (other is recorded)


def test_construction_of_a_recorded_step_changes_nothing():
    trainer = captured_trainer()
    images, target = batches(1)[0]
    before = {key: value.clone() for key, value in all_state(trainer).items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augmented = trainer.task.augment(images, target, torch.Generator().manual_seed(0))
    CapturedStep(
        trainer._whole_step,
        *augmented,
        trainer._changed_by_a_step,
        record=record_by_calling,
    )
    after = all_state(trainer)
    assert_same(before, {key: after[key] for key in before})
    assert all(not value.any() for key, value in after.items() if key not in before)
    assert torch.equal(torch.rand(3), expected)


def test_steps_that_cannot_be_recorded_are_eager_and_announced():
    def fail(call):
        call()
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")

    said: list[str] = []
    trainer, eager = captured_trainer(record=fail), eager_trainer()
    trainer.notify = said.append
    for each in (trainer, eager):
        each.train_one_epoch(Loader(batches(3)), "epoch", KEYS)
    assert_same(all_state(trainer), all_state(eager))
    assert said == ["--cuda-graph: steps are eager instead (CUDA error: operation not permitted)"]


@pytest.mark.parametrize(
    ("device", "size", "options", "reason"),
    [
        ("cpu", 1, {}, "needs an NVIDIA GPU"),
        ("cuda", 2, {}, "needs a single process"),
        ("cuda", 1, {"precision": "fp16"}, "loss scaling"),
        ("cuda", 1, {"accumulate": 2}, "--accumulate"),
        ("cuda", 1, {"skip_bad_steps": True}, "--skip-bad-steps"),
        ("cuda", 1, {}, None),
    ],
)
def test_obstacles_to_recording_are_named(device, size, options, reason):
    trainer = small_trainer(**(options if device == "cpu" else {}))
    trainer.world = DistributedContext(0, size, torch.device(device))
    trainer.config = TrainerConfig(**options)
    obstacle = trainer._graph_obstacle()
    assert (obstacle is None) if reason is None else (reason in obstacle)


def test_cuda_graph_on_a_cpu_says_that_steps_are_eager(capsys):
    assert small_trainer(cuda_graph=True).record is None
    assert (
        "--cuda-graph: steps are eager instead (it needs an NVIDIA GPU)" in capsys.readouterr().out
    )


def test_losses_are_checked_in_groups_and_none_is_left_out(monkeypatch):
    """The grouping of a GPU, whose copies a CPU tensor stands in for."""
    seen: list[tuple[int, float]] = []
    monitor = LossMonitor(CPU, seen.extend)
    for step in range(5):
        monitor.add(step, torch.tensor(float(step)), torch.tensor([2.0, 4.0]))
        assert seen[-1] == (step, float(step)) and monitor.mean == 0.5
    monitor.finish(torch.zeros(2))
    assert len(seen) == 5


# Training for a fixed time


class Clock:
    """Time that passes by one second at each look."""

    def __init__(self, monkeypatch, seconds: float = 1.0):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(time_budget.time, "monotonic", self.read)

    def read(self) -> float:
        self.now += self.seconds
        return self.now


def test_budget_divides_the_time_by_the_costs_of_the_stages(monkeypatch):
    clock = Clock(monkeypatch, 0.0)
    budget = TimeBudget(DistributedContext(0, 1, CPU), minutes=1, costs=[1, 3])
    budget.add(10.0)  # of an earlier process
    first = budget.stage(0, 0.0)
    assert first.end == 15.0 and first.share() == pytest.approx(10 / 15, abs=1e-6)
    first.expect_validation(3.0)
    assert first.share() == pytest.approx(10 / 12, abs=1e-6)
    first.validated(1.0)
    first.expect_validation(3.0)
    assert first.share() == pytest.approx(10 / 14, abs=1e-6)
    clock.now = 20.0
    assert first.share() == 1.0
    second = budget.stage(1, budget.elapsed)
    assert (second.start, second.end) == (30.0, 60.0) and second.share() == 0.0
    assert TimeBudget(DistributedContext(0, 1, CPU)).stage(0, 0.0) is None


def timed_run(folder, minutes: float, resume: bool = False, stop_after: int | None = None):
    """A run on noise whose clock ticks at each look; returns its records and learning rates."""
    world = DistributedContext(0, 1, CPU)
    torch.manual_seed(0)
    net = LEDNet(4)
    run = RunDir(folder, resume)
    request = StopRequest()
    keeper = CheckpointTimer(world, request)
    stage = Stage("encoder", "Encoder", 5, "encoder_best.pth", part="encoder")
    meta = {"model": "LEDNet", "dataset": "noise", "mean": [0.0] * 3, "std": [1.0] * 3}
    course = TrainingRun(net, [stage], run, Checkpoints(run.path), meta, 1, keeper)
    course.validate_every = 1000
    course.budget = TimeBudget(world, minutes)
    state = course.resume() if resume else ()
    rates: list[float] = []

    def equip(stage):
        trainer = small_trainer(model=net.encoder_stage(), schedule="cosine", lr=1.0)
        trainer.num_epochs = stage.epochs
        step = trainer._update

        def update(*args):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            if len(rates) == stop_after:
                request.number = signal.SIGTERM
            return step(*args)

        trainer._update = update
        loader = make_loaders(Noise(), Noise(), world, 2, 0, seed=1)
        return StageComponents(trainer, *loader)

    try:
        progress = train_stages(course, equip, *state)
    except Exception as error:
        return error, rates
    return progress.records, rates


class Noise(torch.utils.data.Dataset):
    pairs = tuple(range(6))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        images, labels = batches(1, size=6)[0]
        return images[index], labels[index]


def test_time_limit_anneals_the_rate_to_zero_and_scores_the_last_epoch(monkeypatch, tmp_path):
    Clock(monkeypatch)
    records, rates = timed_run(tmp_path / "run", minutes=1)
    assert 5 < len(rates) < 60
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.9 and rates[-1] < 0.05
    assert [r["val_miou"] is not None for r in records] == [False] * (len(records) - 1) + [True]
    # Twice the time, about twice the steps.
    _, more = timed_run(tmp_path / "longer", minutes=2)
    assert 1.6 < len(more) / len(rates) < 2.4


def test_resumed_run_counts_the_time_it_has_used(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    stopped, first = timed_run(tmp_path / "run", minutes=1, stop_after=6)
    assert isinstance(stopped, TrainingStopped)
    used = load_checkpoint(Checkpoints(tmp_path / "run").paths()[0])["progress"]["seconds"]
    assert used > 6
    clock.now += 1e6  # between the two processes
    _, second = timed_run(tmp_path / "run", minutes=1, resume=True)
    rates = first + second
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.05
    _, alone = timed_run(tmp_path / "whole", minutes=1)
    assert abs(len(rates) - len(alone)) <= 3
    # Its time is over: nothing more is trained.
    _, third = timed_run(tmp_path / "run", minutes=1, resume=True)
    assert third == []


def test_checkpoints_without_times_are_still_read(monkeypatch, tmp_path):
    """As earlier versions wrote them."""
    Clock(monkeypatch)
    timed_run(tmp_path / "run", minutes=1, stop_after=4)
    path = Checkpoints(tmp_path / "run").paths()[0]
    content = torch.load(path, weights_only=True)
    for key in ("seconds", "stage_start"):
        del content["progress"][key]
    torch.save(content, path)
    records, _ = timed_run(tmp_path / "run", minutes=1, resume=True)
    assert records[-1]["val_miou"] is not None


def test_training_from_device_memory_equals_training_from_files(toy_cityscapes, run_script):
    """To the last bit, stopped and resumed in the middle of an epoch."""
    flags = ("--datadir", toy_cityscapes, "--height", 32, "--width", 64, "--num-epochs", 2,
             "--batch-size", 2, "--num-workers", 0, "--augment", "modern", "--decoder")  # fmt: skip
    runs = {}
    for name, extra in (("files", ()), ("device", ("--cache-device",))):
        savedir = toy_cityscapes.parent / f"fast-{name}"
        result = run_script("train/main.py", *flags, "--savedir", savedir, *extra)
        assert result.returncode == 0, result.stderr
        records = read_records(savedir)
        runs[name] = [{k: r[k] for k in r if "_miou" in k or "loss" in k} for r in records]
        runs[name].append(load_checkpoint(savedir / "best.pth")["state_dict"])
    assert runs["files"][:2] == runs["device"][:2]
    assert_same(runs["files"][2], runs["device"][2])


def test_max_minutes_ends_a_run_with_every_stage_scored(toy_cityscapes, run_script, tmp_path):
    result = run_script(
        "train/main.py", "--datadir", toy_cityscapes, "--height", 32, "--width", 64,
        "--num-epochs", 300, "--batch-size", 2, "--num-workers", 0, "--max-minutes", 0.15,
        "--savedir", tmp_path / "run", "--validate-every", 1000,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = read_records(tmp_path / "run")
    stages = {record["stage"] for record in records}
    assert stages == {"encoder", "decoder"} and (tmp_path / "run/best.pth").is_file()
    for stage in stages:
        assert [r for r in records if r["stage"] == stage][-1]["val_miou"] is not None
    assert len(records) < 300 and " left" in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--max-minutes", 0), "--max-minutes is 0: give more"),
     (("--precision", "tf32", "--device", "cpu"), "tf32 needs an NVIDIA GPU")],
)  # fmt: skip
def test_bad_values_are_refused(flags, words, toy_cityscapes, run_inside, tmp_path):
    result = run_inside(
        "train/main.py", "--datadir", toy_cityscapes, "--savedir", tmp_path / "run", *flags
    )
    assert result.returncode == 2 and words in result.stderr
    assert not (tmp_path / "run").exists()
