"""Processes that train together over gloo on the CPU, compared with a single process.

Every process runs `work` once and saves its results; the tests compare them.
"""

import copy
import math
import signal
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fakes import (
    ALONE,
    CPU,
    KEYS,
    FakeLoader,
    NoiseDataset,
    StopAt,
    Unaugmented,
    small_trainer,
    tiny_net,
    tiny_run,
)
from torch import Tensor, nn

from lednet.data.loaders import make_loaders
from lednet.data.samplers import ResumableDistributedSampler
from lednet.distributed import DistributedContext, init_distributed
from lednet.errors import UserError
from lednet.signals import StopRequest
from lednet.training.losses import resize_target
from lednet.training.signals import Action, CheckpointTimer, TrainingStopped
from lednet.training.trainer import EpochState

SIZE, BATCH, STEPS, LR = 2, 2, 3, 0.5
COUNT = 7
"""Images of the uneven data, divisible neither by the number of processes nor by the batches."""
TIMEOUT = 200
"""Seconds after which processes that wait for each other are killed."""


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def plain_net() -> nn.Sequential:
    """A network without batch norm, whose statistics depend on each batch alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))


def joint_batches() -> list[tuple[Tensor, Tensor]]:
    """The batches of all processes, one for each step; part r is that of rank r.

    The first part of each is void.
    """
    samples = [NoiseDataset(COUNT)[i % COUNT] for i in range(STEPS * SIZE * BATCH)]
    images, labels = map(torch.stack, zip(*samples, strict=True))
    labels[:BATCH] = 255
    return list(zip(images.split(SIZE * BATCH), labels.split(SIZE * BATCH), strict=True))


# In every process


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    context = DistributedContext(rank, SIZE, CPU)
    results = {
        "updates": {accumulate: train_updates(context, accumulate) for accumulate in (1, 2)},
        "uneven": train_uneven(context),
        "states": restore_state(context),
        "actions": poll_actions(context),
        "buffers": train_buffers(context),
        "stopped": stop_and_resume(context, folder),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def train_updates(context: DistributedContext, accumulate: int) -> dict[str, Any]:
    """Gradients of every update, and the weights after the last."""
    model = plain_net()
    trainer = small_trainer(Unaugmented(), model, context, 2, accumulate=accumulate, lr=LR)
    trainer.optimizer = torch.optim.SGD(model.parameters(), LR)  # Adam would hide a wrong scale
    gradients: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(flat(p.grad for p in model.parameters()))
    )
    own = slice(context.rank * BATCH, (context.rank + 1) * BATCH)
    loader = FakeLoader((images[own], labels[own]) for images, labels in joint_batches())
    result = trainer.train_one_epoch(loader, "title", KEYS)
    return {"gradients": gradients, "weights": flat(model.parameters()), "loss": result["loss"]}


def train_uneven(context: DistributedContext) -> dict[str, Any]:
    """Validation and an epoch over data that cannot be divided evenly."""
    train, val = NoiseDataset(COUNT), NoiseDataset(COUNT)
    loaders = make_loaders(train, val, context, BATCH, workers=0, seed=1)
    trainer = small_trainer(Unaugmented(), plain_net(), context, lr=0.0)
    scores = trainer.evaluate(loaders[1], "val")
    _, single = make_loaders(train, NoiseDataset(1), context, BATCH, workers=0, seed=1)
    state = trainer.new_epoch_state()
    trainer.train_one_epoch(loaders[0], "title", KEYS, state)
    return {
        "scores": scores,
        "scores of one image": trainer.evaluate(single, "one"),  # most processes have none
        "train read": train.read,
        "val read": val.read,
        "pixels": int(context.all_reduce_sum(state.counts.clone()).sum()),
        "steps": state.step,
    }


def restore_state(context: DistributedContext) -> list[dict[str, Any]]:
    """State of an interrupted epoch: saved, restored, and after further steps."""
    state = EpochState(torch.zeros(3, 4, dtype=torch.int64))
    state.step, state.images, state.skipped = 4, 9, 1
    state.sums += torch.tensor([0.25, 3.0]) * (context.rank + 1)
    state.counts += context.rank + 1
    saved = state.state(context)
    again = EpochState(torch.zeros(3, 4, dtype=torch.int64))
    again.restore(copy.deepcopy(saved), context)
    restored = again.state(context)
    again.sums += context.rank
    return [saved, restored, again.state(context)]


def poll_actions(context: DistributedContext) -> list[int]:
    """Decisions of the timer when only the last process has a reason."""
    last = context.rank == context.size - 1
    request = StopRequest()
    timer = CheckpointTimer(context, request, every_minutes=1)
    actions = [timer.poll(1)]
    if last:
        timer._saved = -math.inf  # its clock alone says that a checkpoint is due
    actions += [timer.poll(2), timer.poll(3)]
    request.number = signal.SIGTERM if last else 0
    actions += [timer.poll(4), timer.signal]
    request.number = signal.SIGTERM if last else signal.SIGINT
    return [int(action) for action in (*actions, timer.poll(5))]


def train_buffers(context: DistributedContext) -> dict[str, Tensor]:
    """Running statistics after the last step, and after the epoch."""
    trainer = small_trainer(None, tiny_net(), context, ema_decay=0.5)
    data = NoiseDataset(COUNT), NoiseDataset(1)
    loader = make_loaders(*data, context, BATCH, workers=0, seed=1)[0]
    last = {}

    def after_step() -> None:
        last["before"] = flat(trainer.model.buffers())

    trainer.train_one_epoch(loader, "title", KEYS, after_step=after_step)
    buffers = flat(trainer.model.buffers()), flat(trainer.ema.buffers())
    return last | dict(zip(("after", "ema"), buffers, strict=True))


def stop_and_resume(context: DistributedContext, folder: Path) -> dict[str, Any]:
    """A run, once uninterrupted, and once stopped in the second epoch and resumed.

    Each process has its own folder, in which only rank 0 may write.
    """

    def run(name: str, rank: int, *steps: int, resume: bool = False):
        path = folder / name / str(rank)
        return tiny_run(path, StopAt(context, *steps), resume, epochs=(2,), ema_decay=0.9)

    whole, progress = run("whole", context.rank)
    try:
        run("stopped", context.rank, 3)
        status = 0
    except TrainingStopped as stopped:
        status = stopped.exit_status
    dist.barrier()
    files = sorted(path.name for path in (folder / "stopped/0").glob("*.pth"))
    dist.barrier()
    resumed, later = run("stopped", 0, resume=True)
    return {
        "status": status,
        "files": files,
        "weights": [flat(net.state_dict().values()) for net in (whole, resumed)],
        "records": [progress.records, later.records],
    }


# In the test


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder that the processes wrote to."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.spawn(work, (folder,), SIZE, join=False)
    end = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "they wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict[str, Any]]:
    """Results of each process."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


def mean_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of PyTorch's weighted mean over a batch."""
    logits = model(images / 255)
    labels = resize_target(labels.long(), logits.shape[-2:])
    weight = torch.tensor([1.0, 5.0, 20.0, 0.0])
    loss = F.cross_entropy(logits, labels, weight, ignore_index=255)
    return flat(torch.autograd.grad(loss, list(model.parameters()))).float()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_equal_those_of_the_joint_batch(results, accumulate):
    model, expected, joint = plain_net(), [], joint_batches()
    for i in range(0, STEPS, accumulate):
        images, labels = map(torch.cat, zip(*joint[i : i + accumulate], strict=True))
        expected.append(mean_gradient(model, images, labels))
        parts = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        means = [mean_gradient(model, *part) for part in parts if (part[1] != 255).any()]
        mean_of_means = torch.stack(means).sum(0) / len(parts)
        assert (mean_of_means - expected[-1]).norm() > 1e-3 * expected[-1].norm()  # distinguishable
        with torch.no_grad():
            weights = nn.utils.parameters_to_vector(model.parameters()) - LR * expected[-1]
            nn.utils.vector_to_parameters(weights, model.parameters())
    first = results[0]["updates"][accumulate]
    for result in results:
        found = result["updates"][accumulate]
        for ours, theirs in zip(found["gradients"], expected, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)
        weights = flat(model.parameters())
        torch.testing.assert_close(found["weights"], weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["weights"], first["weights"]) and found["loss"] == first["loss"]


def test_uneven_validation_counts_every_image_once(results):
    alone = train_uneven(ALONE)
    read = [index for result in results for index in result["uneven"]["val read"]]
    assert sorted(read) == list(range(COUNT))
    for result in results:
        for name in ("scores", "scores of one image"):
            found, expected = result["uneven"][name], alone[name]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert found["class_iou"] == expected["class_iou"]
            assert found["miou"] == expected["miou"]


def test_uneven_training_repeats_the_first_images(results):
    order = ResumableDistributedSampler(COUNT, ALONE, seed=1).indices()
    share = math.ceil(COUNT / SIZE)
    padded = order + order[: share * SIZE - COUNT]
    assert len(padded) > COUNT
    labels = torch.stack([NoiseDataset(COUNT)[i][1] for i in padded])
    labels = resize_target(labels, (14, 22))  # the size after an unpadded convolution
    for rank, result in enumerate(results):
        assert result["uneven"]["train read"] == padded[rank::SIZE]
        assert result["uneven"]["steps"] == math.ceil(share / BATCH)
        assert result["uneven"]["pixels"] == int((labels != 255).sum())


def test_restored_epoch_state_has_the_same_joint_sums(results):
    total = SIZE * (SIZE + 1) // 2
    others = total - SIZE  # 0 + 1 + ... + (SIZE - 1)
    for result in results:
        saved, restored, later = result["states"]
        for state in (saved, restored):
            assert (state["step"], state["images"], state["skipped"]) == (4, 9, 1)
            assert state["sums"].tolist() == [0.25 * total, 3.0 * total]
            assert state["counts"].unique().tolist() == [total]
        assert later["sums"].tolist() == [0.25 * total + others, 3.0 * total + others]


def test_all_processes_take_the_same_action(results):
    expected = [Action.CONTINUE, Action.SAVE, Action.CONTINUE, Action.STOP, signal.SIGTERM]
    for result in results:
        assert result["actions"] == [*expected, Action.STOP]


def test_running_statistics_are_equal_after_the_epoch(results):
    first, *others = (result["buffers"] for result in results)
    for other in others:
        assert not torch.equal(other["before"], first["before"])
        assert torch.equal(other["after"], first["after"])
        assert torch.equal(other["ema"], first["ema"])


def test_only_rank_0_writes_files(folder, results):
    for name in ("whole", "stopped"):
        assert [path.name for path in (folder / name).iterdir()] == ["0"]
    written = {path.name for path in (folder / "whole/0").iterdir()}
    assert {"log.jsonl", "log.txt", "curves.png", "s0_best.pth"} <= written


def test_stopped_run_of_several_processes_resumes(results):
    first = results[0]["stopped"]
    assert "checkpoint_000000003.pth" in first["files"]
    assert [record["epoch"] for record in first["records"][0]] == [1, 2]
    for result in results:
        found = result["stopped"]
        assert found["status"] == 128 + signal.SIGTERM
        for weights in found["weights"]:
            assert torch.equal(weights, first["weights"][0])
        for ours, theirs in zip(found["records"][1], first["records"][0], strict=True):
            for key in ("train_loss", "val_loss"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
            for key in ("train_miou", "val_miou", "lr"):
                assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "but RANK is not set: start several processes with torchrun"),
        ({"WORLD_SIZE": "two"}, "but WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "but LOCAL_RANK is 'x'"),
    ],
)
def test_init_distributed_with_an_incomplete_environment_is_refused(monkeypatch, values, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        init_distributed("cpu")


def test_init_distributed_with_more_processes_than_gpus_is_refused(monkeypatch):
    names = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "MASTER_PORT": "1"}
    for name, value in {**names, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"process 3 of this machine has no GPU \(2 can be used\)"):
        init_distributed("cuda")
