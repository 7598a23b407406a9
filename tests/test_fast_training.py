"""Data in device memory, the captured training step, and training for a fixed time."""

import math
import signal
import time
import warnings

import pytest
import torch
from fakes import (
    ALONE,
    CPU,
    KEYS,
    FakeLoader,
    StopAt,
    assert_same_tensors,
    noise_batches,
    record_by_calling,
    small_trainer,
    tiny_run,
)

from lednet import UserError
from lednet.checkpoint import load_checkpoint
from lednet.data import device_cache
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.device_cache import DeviceLoader
from lednet.data.loaders import make_loaders
from lednet.data.registry import open_training_data
from lednet.device import autocast
from lednet.distributed import DistributedContext
from lednet.training import loss_reader, time_budget
from lednet.training.checkpointing import Checkpoints
from lednet.training.cuda_graph import CapturedStep
from lednet.training.loss_reader import LossReader
from lednet.training.run_dir import read_records
from lednet.training.signals import TrainingStopped
from lednet.training.time_budget import TimeBudget
from lednet.training.trainer import NonFiniteLoss, TrainerConfig

# Data in device memory


@pytest.fixture(params=["files", "cache", "skip corrupt"])
def data(request, camvid, tmp_path):
    train, val = open_training_data("camvid", camvid, 24, 32)
    if request.param == "cache":
        build_cache(tmp_path / "cache", {"train": train})
        return CachedDataset(tmp_path / "cache/train", train, ""), val
    return (SkipCorruptDataset(train) if request.param == "skip corrupt" else train), val


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_device_loader_yields_the_batches_of_a_data_loader(data, rank, size):
    context = DistributedContext(rank, size, CPU)
    on_device = make_loaders(*data, context, 2, 0, seed=1, on_device=True)
    assert len(on_device[1].images) == len(on_device[1].sampler)  # its share of the images
    plain = make_loaders(*data, context, 2, 0, seed=1)
    for epoch, start in ((1, 0), (2, 0), (3, 1)):
        for loaders in zip(plain, on_device, strict=True):
            for loader in loaders:
                loader.sampler.epoch, loader.sampler.start = epoch, start
            assert isinstance(loaders[1], DeviceLoader)
            expected, found = map(list, loaders)
            assert len(found) == len(loaders[1]) == len(loaders[0])
            for batch, other in zip(expected, found, strict=True):
                for a, b in zip(batch, other, strict=True):
                    assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("size", [1, 2])
def test_data_larger_than_the_memory_is_refused(camvid, size, monkeypatch):
    data = open_training_data("camvid", camvid, 24, 32)
    needed = size * len(data[0]) * 4 * 24 * 32
    context = DistributedContext(0, size, CPU)
    monkeypatch.setattr(device_cache, "free_memory", lambda device: needed)
    with pytest.raises(UserError, match=r"needs 0.00 GB on cpu, where 0.00 GB are free: use"):
        make_loaders(*data, context, 2, 0, seed=1, on_device=True)
    monkeypatch.setattr(device_cache, "free_memory", lambda device: 2 * needed)
    make_loaders(*data, context, 2, 0, seed=1, on_device=True)


def test_free_memory_of_a_cpu_is_known_on_linux():
    free = device_cache.free_memory(CPU)
    assert free is None or free > 1_000_000


# The captured step


def captured_trainer(record=record_by_calling, **options):
    trainer = small_trainer(**options)
    trainer.record = record
    trainer._make_capturable(trainer.optimizer)
    return trainer


def eager_trainer(**options):
    """A trainer whose learning rate is a float32 tensor as in a captured step."""
    trainer = captured_trainer(**options)
    trainer._captured_step = lambda images, target: None
    return trainer


def all_state(trainer) -> dict[str, torch.Tensor]:
    state = dict(trainer.model.state_dict())
    if trainer.ema is not None:
        state |= {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    for i, values in enumerate(trainer.optimizer.state.values()):
        state |= {f"optimizer.{i}.{k}": v for k, v in values.items() if v is not None}
    return state


OPTIONS = [
    {},
    {"ema_decay": 0.9, "schedule": "cosine", "channels_last": True},
    {"optimizer": "sgd", "lr": 0.1, "clip_norm": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_captured_steps_equal_eager_ones(options):
    """With dropout, a smaller last batch, and a second epoch at another learning rate."""
    loader = FakeLoader([*noise_batches(3), *noise_batches(1, size=1)])
    trainers = eager_trainer(**options), captured_trainer(**options)
    results = []
    for trainer in trainers:
        for epoch in (1, 6):
            trainer.start_epoch(epoch)
            results.append(trainer.train_one_epoch(loader, "epoch", (1, 0, epoch)))
    assert trainers[1]._captured is not None
    for eager, captured in zip(results[:2], results[2:], strict=True):
        assert captured["loss"] == eager["loss"] and captured["miou"] == eager["miou"]
    assert_same_tensors(*map(all_state, trainers))


def test_checkpoints_of_captured_and_eager_runs_are_interchangeable():
    captured, eager = captured_trainer(), small_trainer()
    for trainer, other in ((captured, eager), (eager, captured)):
        trainer.train_one_epoch(noise_batches(2), "epoch", KEYS)
        other.load_state_dict(trainer.state_dict())
        other.start_epoch(2)
        group = other.optimizer.param_groups[0]
        assert isinstance(group["lr"], torch.Tensor) == group["capturable"] == (other is captured)


def test_captured_step_construction_changes_no_state():
    trainer = captured_trainer()
    batch = trainer.task.augment(*noise_batches(1)[0], torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in all_state(trainer).items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    CapturedStep(trainer._whole_step, *batch, trainer._mutable_tensors, record=record_by_calling)
    after = all_state(trainer)
    assert_same_tensors(before, {key: after[key] for key in before})
    assert all(not value.any() for key, value in after.items() if key not in before)
    assert torch.equal(torch.rand(3), expected)


def test_failed_capture_is_announced_and_steps_are_eager():
    def fail(call):
        call()
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")

    messages: list[str] = []
    trainer, eager = captured_trainer(record=fail), eager_trainer()
    trainer.notify = messages.append
    for each in (trainer, eager):
        each.train_one_epoch(noise_batches(3), "epoch", KEYS)
    assert_same_tensors(all_state(trainer), all_state(eager))
    reason = "CUDA error: operation not permitted"
    assert messages == [f"--cuda-graph: steps are eager instead ({reason})"]


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
def test_graph_obstacle_is_named(device, size, options, reason):
    trainer = small_trainer()
    trainer.dist_context = DistributedContext(0, size, torch.device(device))
    trainer.config = TrainerConfig(**options)
    obstacle = trainer._graph_obstacle()
    assert (obstacle is None) if reason is None else (reason in obstacle)


def test_cuda_graph_on_a_cpu_is_announced_as_eager(capsys):
    assert small_trainer(cuda_graph=True).record is None
    message = "--cuda-graph: steps are eager instead (it needs an NVIDIA GPU)"
    assert message in capsys.readouterr().out


class FakeEvent:
    """A CUDA event; counts the waits."""

    waits = 0

    def record(self) -> None: ...

    def synchronize(self) -> None:
        FakeEvent.waits += 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_losses_are_read_completely_and_late_on_a_gpu(device, monkeypatch):
    """On a GPU a group is read when the next one has been copied, or in the end."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "waits", 0)
    monkeypatch.setattr(loss_reader, "READ_EVERY", 2)
    reader, loss, read = LossReader(torch.device(device)), torch.zeros(()), []
    for step in range(5):
        loss.fill_(step)  # the memory of a CUDA graph
        read.append(reader.add(step, loss, torch.tensor([step, 2.0])))
    read.append(reader.finish(torch.tensor([6.0, 2.0])))
    if device == "cpu":
        assert read == [{0: 0}, {1: 1}, {2: 2}, {3: 3}, {4: 4}, {}]
        assert (FakeEvent.waits, reader.mean) == (0, 2)
    else:
        assert read == [{}, {}, {}, {0: 0, 1: 1}, {}, {2: 2, 3: 3, 4: 4}]
        assert (FakeEvent.waits, reader.mean) == (3, 3)


def test_last_losses_of_an_epoch_are_checked(monkeypatch):
    """Those that are read after the last step, as on a GPU."""
    monkeypatch.setattr(LossReader, "add", lambda self, step, loss, sums: {})
    monkeypatch.setattr(LossReader, "finish", lambda self, sums: {4: math.inf})
    with pytest.raises(NonFiniteLoss, match="the loss is inf in step 5"):
        small_trainer().train_one_epoch(FakeLoader(noise_batches(5)), "epoch", KEYS)


# Training for a fixed time


class FakeClock:
    """A clock that advances by some time at each reading."""

    def __init__(self, monkeypatch, seconds: float = 1.0):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(time_budget.time, "monotonic", self.read)
        monkeypatch.setattr("lednet.training.loop.plot_curves", lambda *_: None)

    def read(self) -> float:
        self.now += self.seconds
        return self.now


def test_time_budget_is_divided_by_the_costs_of_the_stages(monkeypatch):
    clock = FakeClock(monkeypatch, 0.0)
    budget = TimeBudget(ALONE, minutes=1, costs=[1, 3])
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
    assert TimeBudget(ALONE).stage(0, 0.0) is None


def timed_run(folder, minutes: float = 1, resume: bool = False, stop: int = 0, rates=None):
    """A run whose clock advances at each reading; returns its learning rates, also in `rates`."""
    rates = [] if rates is None else rates

    def note_rates(trainer) -> None:
        trainer.optimizer.register_step_pre_hook(
            lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"])
        )

    options = {"validate_every": 1000, "budget": TimeBudget(ALONE, minutes)}
    try:
        tiny_run(
            folder, StopAt(ALONE, stop), resume, note_rates, (5,), run_options=options,
            schedule="cosine", lr=1.0,
        )  # fmt: skip
    except TrainingStopped as stopped:
        assert stop and stopped.exit_status == 128 + signal.SIGTERM
    return rates


def test_time_limit_anneals_the_rate_and_validates_the_last_epoch(monkeypatch, tmp_path):
    FakeClock(monkeypatch)
    rates = timed_run(tmp_path / "run")
    assert 5 < len(rates) < 60
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.9 and rates[-1] < 0.05
    validated = [record["val_miou"] is not None for record in read_records(tmp_path / "run")]
    assert validated == [False] * (len(validated) - 1) + [True]
    longer = timed_run(tmp_path / "longer", minutes=2)
    assert 1.6 < len(longer) / len(rates) < 2.4


def test_time_limit_does_not_reserve_the_time_of_compilation(monkeypatch, tmp_path):
    """The first step, which compiles the network, says nothing about the time of validation."""
    FakeClock(monkeypatch)
    expected, rates, now = timed_run(tmp_path / "run"), [], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + 1e4 * bool(rates))
    assert len(timed_run(tmp_path / "compiled", rates=rates)) == len(expected)


@pytest.mark.parametrize("version", ["0.1", "now"])
def test_resumed_run_counts_the_time_before(monkeypatch, tmp_path, version):
    clock = FakeClock(monkeypatch)
    first = timed_run(tmp_path / "run", stop=6)
    path = Checkpoints(tmp_path / "run").paths()[0]
    content = load_checkpoint(path)
    assert content["progress"]["seconds"] > 6
    if version == "0.1":  # its checkpoints have no times
        for key in ("seconds", "stage_start"):
            del content["progress"][key]
        torch.save(content, path)
    clock.now += 1e6  # between the two processes
    second = timed_run(tmp_path / "run", resume=True)
    assert read_records(tmp_path / "run")[-1]["val_miou"] is not None
    if version == "now":
        rates = first + second
        assert rates == sorted(rates, reverse=True) and rates[-1] < 0.05
        assert abs(len(rates) - len(timed_run(tmp_path / "whole"))) <= 3
        assert timed_run(tmp_path / "run", resume=True) == []  # its time is over


def test_max_minutes_validates_every_stage(toy_cityscapes, run_inside, tmp_path):
    result = run_inside(
        "train/main.py", "--datadir", toy_cityscapes, "--height", 32, "--width", 64,
        "--num-epochs", 300, "--batch-size", 2, "--num-workers", 0, "--max-minutes", 0.02,
        "--savedir", tmp_path / "run", "--validate-every", 1000, "--device", "cpu",
        "--cache-device",
    ).check()  # fmt: skip
    last = {record["stage"]: record["val_miou"] for record in read_records(tmp_path / "run")}
    assert last.keys() == {"encoder", "decoder"} and None not in last.values()
    assert (tmp_path / "run/best.pth").is_file() and " left" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-minutes", 0), "--max-minutes is 0: give more"),
        (("--precision", "tf32", "--device", "cpu"), "tf32 needs an NVIDIA GPU"),
    ],
)
def test_bad_values_are_refused(flags, message, train, tmp_path):
    train(*flags).assert_error(message)
    assert not (tmp_path / "run").exists()


def test_autocast_of_several_threads_restores_the_settings_of_tf32():
    """While one thread computes in fp32, none uses TF32; in the end, all is as before."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, gpu = (cudnn.allow_tf32, matmul.allow_tf32), torch.device("cuda")
    allowed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast, without a GPU
        first, second = autocast(gpu, "fp32"), autocast(gpu, "tf32")
        for step in ("enter first", "enter second", "leave first", "leave second"):
            context = first if step.endswith("first") else second
            if step.startswith("enter"):
                context.__enter__()
            else:
                context.__exit__(None, None, None)
            allowed.append((cudnn.allow_tf32, matmul.allow_tf32))
    assert allowed == [(False, False), (False, False), (True, True), before]
