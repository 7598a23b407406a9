"""Several processes that train together, over gloo on the CPU, against one that does it alone.

Every process runs `work` once and leaves what it saw in a file; the tests compare.
"""

import copy
import math
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lednet.data.loaders import make_loaders
from lednet.data.pairs import Sample
from lednet.data.samplers import ResumableDistributedSampler
from lednet.data.transforms import Augmentation
from lednet.distributed import DistributedContext
from lednet.model import LEDNet
from lednet.training.checkpointing import Checkpoints
from lednet.training.loop import Progress, StageComponents, TrainingRun, train_stages
from lednet.training.losses import WeightedCrossEntropy, resize_target
from lednet.training.run_dir import RunDir
from lednet.training.signals import Action, CheckpointTimer, StopRequest, TrainingStopped
from lednet.training.stages import Stage
from lednet.training.tasks import Segmentation
from lednet.training.trainer import EpochState, Trainer, TrainerConfig

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
WEIGHTS = (1.0, 5.0, 20.0)
BATCH, STEPS, LR = 2, 3, 0.5
COUNT = 7
"""Images of the uneven data: neither processes nor batches divide it."""
PATIENCE = 200
"""Seconds after which processes that wait for each other are given up."""


class Still(Augmentation):
    """Changes nothing."""

    def forward(self, images, labels, generator):
        return self.normalize(images, labels)


class Noise(Dataset):
    """Random images; label maps with more of the heavy class, and less void, as they go on."""

    def __init__(self, count: int):
        self.pairs = [Sample(Path(f"{i}.png"), None) for i in range(count)]
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8, generator=generator)
        label = torch.randint(0, 2, (16, 24), dtype=torch.uint8, generator=generator)
        label[:, : 3 * index] = 2
        label[2 * index + 1 :] = 255
        return image, label


class Dealt(list):
    """Batches in place of a loader."""

    @property
    def sampler(self) -> range:
        return range(sum(len(images) for images, _ in self))


def small_model() -> nn.Sequential:
    """Without norms, whose statistics are of each batch alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))


def make_trainer(world: DistributedContext, model: nn.Module, **options: Any) -> Trainer:
    task = Segmentation(WeightedCrossEntropy(WEIGHTS, 4), Still(), "abc")
    return Trainer(model, task, 2, world, TrainerConfig(**options))


def joint_batches(size: int) -> list[tuple[Tensor, Tensor]]:
    """One for each step; process r takes the r-th part of each. The first is all void."""
    samples = [Noise(COUNT)[i % COUNT] for i in range(STEPS * size * BATCH)]
    images, labels = map(torch.stack, zip(*samples, strict=True))
    labels[:BATCH] = 255
    return list(zip(images.split(size * BATCH), labels.split(size * BATCH), strict=True))


# What every process does


def work(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    world = DistributedContext(rank, size, CPU)
    seen = {
        "updates": {accumulate: updates(world, accumulate) for accumulate in (1, 2)},
        "uneven": uneven_data(world),
        "tally": restored_tally(world),
        "actions": actions(world),
        "buffers": buffers(world),
        "stopped": stopped_fit(world, folder),
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


def updates(world: DistributedContext, accumulate: int) -> dict[str, list[Tensor]]:
    """Gradients of every update, and the weights after the last."""
    trainer = make_trainer(world, small_model(), accumulate=accumulate, lr=LR)
    # Adam would hide a wrong scale.
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), LR)
    gradients: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(flat(p.grad for p in trainer.model.parameters()))
    )
    own = slice(world.rank * BATCH, (world.rank + 1) * BATCH)
    loader = Dealt((images[own], labels[own]) for images, labels in joint_batches(world.size))
    result = trainer.train_one_epoch(loader, "title", (1, 0, 1))
    weights = flat(trainer.model.parameters())
    return {"gradients": gradients, "weights": weights, "loss": result["loss"]}


def uneven_data(world: DistributedContext) -> dict[str, Any]:
    """A validation and an epoch over data that cannot be dealt out evenly."""
    train, val = Noise(COUNT), Noise(COUNT)
    loaders = make_loaders(train, val, world, BATCH, workers=0, seed=1)
    trainer = make_trainer(world, small_model(), lr=0.0)
    kept = []
    compute = trainer.task.compute

    def keeping(counts: Tensor) -> dict[str, Any]:
        kept.append(counts.clone())
        return compute(counts)

    trainer.task.compute = keeping
    scored = trainer.evaluate(loaders[1], "val")
    trainer.task.compute = compute
    _, single = make_loaders(train, Noise(1), world, BATCH, workers=0, seed=1)
    tally = trainer.new_epoch_state()
    trainer.train_one_epoch(loaders[0], "title", (1, 0, 1), tally)
    return {
        "scored": scored,
        "scored on one": trainer.evaluate(single, "one"),  # most have nothing to do
        "counts": kept[0],
        "trained on": train.seen,
        "scored on": val.seen,
        "training pixels": int(world.all_reduce_sum(tally.counts.clone()).sum()),
        "steps": tally.step,
    }


def restored_tally(world: DistributedContext) -> dict[str, Any]:
    """An interrupted epoch's counts before it was saved, after, and some steps on."""
    tally = EpochState(torch.zeros(3, 4, dtype=torch.int64))
    tally.step, tally.images, tally.skipped = 4, 9, 1
    tally.sums += torch.tensor([0.25, 3.0]) * (world.rank + 1)
    tally.counts += world.rank + 1
    saved = tally.state(world)
    again = EpochState(torch.zeros(3, 4, dtype=torch.int64))
    again.restore(copy.deepcopy(saved), world)
    restored = again.state(world)
    again.sums += world.rank
    return {"saved": saved, "restored": restored, "later": again.state(world)}


def actions(world: DistributedContext) -> dict[str, int]:
    """Decisions of the timer when only the last process has a reason."""
    last = world.rank == world.size - 1
    request = StopRequest()
    timer = CheckpointTimer(world, request, every_minutes=1)
    found = {"nothing": timer.poll(1)}
    if last:
        timer._saved = -math.inf  # its clock alone says that a checkpoint is due
    found["clock"] = timer.poll(2)
    found["after"] = timer.poll(3)
    request.number = signal.SIGTERM if last else 0
    found["signal"], found["stop"] = timer.poll(4), timer.signal
    request.number = signal.SIGTERM if last else signal.SIGINT
    found["two signals"] = timer.poll(5)
    return {name: int(action) for name, action in found.items()}


def buffers(world: DistributedContext) -> dict[str, Tensor]:
    """Running statistics behind the last step, and after the epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    trainer = make_trainer(world, model, ema_decay=0.5)
    loader = make_loaders(Noise(COUNT), Noise(1), world, BATCH, workers=0, seed=1)[0]
    seen = {}

    def note() -> None:
        seen["before"] = flat(model.buffers())

    trainer.train_one_epoch(loader, "title", (1, 0, 1), after_step=note)
    return seen | {"after": flat(model.buffers()), "average": flat(trainer.ema.buffers())}


class StoppedBySignal(CheckpointTimer):
    """The last process gets a signal in the run's fifth step."""

    def poll(self, step: int) -> Action:
        if step == 5 and self.world.rank == self.world.size - 1:
            self.request.number = signal.SIGTERM
        return super().poll(step)


def stopped_fit(world: DistributedContext, folder: Path) -> dict[str, Any]:
    """A run of two epochs, once whole, and once stopped within the second and resumed.

    Each process has a folder of its own, in which only the first may write.
    """

    def fit(
        name: str, keeper: type[CheckpointTimer], resume: bool = False
    ) -> tuple[LEDNet, Progress]:
        run = RunDir(folder / name / str(world.rank if not resume else 0), resume, world.is_main)
        torch.manual_seed(0)
        net = LEDNet(4)
        meta = {"model": "LEDNet", "dataset": "noise", "mean": [0.0] * 3, "std": [1.0] * 3}
        stage = Stage("encoder", "Encoder", 2, "encoder_best.pth", part="encoder")
        rules = keeper(world, StopRequest())
        course = TrainingRun(net, [stage], run, Checkpoints(run.path), meta, 1, rules)
        state = course.resume() if resume else ()

        def equip(stage: Stage) -> StageComponents:
            trainer = make_trainer(world, net.encoder_stage(), ema_decay=0.9)
            return StageComponents(
                trainer, *make_loaders(Noise(COUNT), Noise(COUNT), world, 1, workers=0, seed=1)
            )

        return net, train_stages(course, equip, *state)

    whole, progress = fit("whole", CheckpointTimer)
    try:
        fit("stopped", StoppedBySignal)
        status = 0
    except TrainingStopped as stopped:
        status = stopped.exit_status
    dist.barrier()
    parts = sorted(path.name for path in (folder / "stopped" / "0").glob("*.pth"))
    dist.barrier()
    resumed, later = fit("stopped", CheckpointTimer, resume=True)
    return {
        "exit status": status,
        "files": parts,
        "weights": flat(whole.state_dict().values()),
        "resumed weights": flat(resumed.state_dict().values()),
        "records": progress.records,
        "resumed records": later.records,
    }


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


# What they must have seen


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def together(request, tmp_path_factory) -> Iterator[tuple[int, list[dict[str, Any]], Path]]:
    """Number of processes, what each of them saw, and the folder they wrote to."""
    size, folder = request.param, tmp_path_factory.mktemp("together")
    context = torch.multiprocessing.spawn(work, (size, folder), size, join=False)
    end = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "they wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    yield size, [torch.load(folder / f"{rank}.pt") for rank in range(size)], folder


def groups(size: int, accumulate: int) -> list[tuple[Tensor, Tensor]]:
    """What one process would have in each update: all batches of all processes at once."""
    joint = joint_batches(size)
    parts = [joint[i : i + accumulate] for i in range(0, len(joint), accumulate)]
    return [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of PyTorch's own weighted mean over a batch."""
    logits = model(images / 255)
    labels = resize_target(labels.long(), logits.shape[-2:])
    weight = torch.tensor([*WEIGHTS, 0.0])
    loss = F.cross_entropy(logits, labels, weight, ignore_index=255)
    return flat(torch.autograd.grad(loss, list(model.parameters()))).float()


def move(model: nn.Module, step: Tensor) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) - step, model.parameters()
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_are_those_of_the_joint_batch(together, accumulate):
    size, seen, _ = together
    model = small_model()
    expected = []
    for images, labels in groups(size, accumulate):
        expected.append(gradient(model, images, labels))
        parts = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        means = [gradient(model, *part) for part in parts if (part[1] != 255).any()]
        wrong = torch.stack(means).sum(0) / len(parts)  # the mean of each part's mean
        assert (wrong - expected[-1]).norm() > 1e-3 * expected[-1].norm()  # else it tests nothing
        move(model, LR * expected[-1])
    for process in seen:
        found = process["updates"][accumulate]
        assert len(found["gradients"]) == len(expected)
        for ours, theirs in zip(found["gradients"], expected, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)
        weights = flat(model.parameters())
        torch.testing.assert_close(found["weights"], weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["weights"], seen[0]["updates"][accumulate]["weights"])
        assert found["loss"] == seen[0]["updates"][accumulate]["loss"]


def test_uneven_validation_counts_every_image_once(together):
    _, seen, _ = together
    alone = uneven_data(ALONE)
    assert sorted(i for process in seen for i in process["uneven"]["scored on"]) == [*range(COUNT)]
    for process in seen:
        found = process["uneven"]
        assert torch.equal(found["counts"], alone["counts"])
        for name in ("scored", "scored on one"):
            assert found[name]["class_iou"] == alone[name]["class_iou"]
            assert found[name]["miou"] == alone[name]["miou"]
            assert found[name]["loss"] == pytest.approx(alone[name]["loss"], rel=1e-5)


def test_uneven_training_repeats_the_first_few(together):
    size, seen, _ = together
    order = ResumableDistributedSampler(COUNT, ALONE, seed=1).indices()
    share = math.ceil(COUNT / size)
    padded = order + order[: share * size - COUNT]
    assert len(padded) > COUNT
    pixels = 0
    for rank, process in enumerate(seen):
        assert process["uneven"]["trained on"] == padded[rank::size]
        assert process["uneven"]["steps"] == math.ceil(share / BATCH)
        pixels = process["uneven"]["training pixels"]
    labels = torch.stack([Noise(COUNT)[i][1] for i in padded])
    labels = resize_target(labels, (14, 22))  # what two pixels of convolution leave
    assert pixels == int((labels != 255).sum())


def test_restored_tally_has_the_same_joint_sums(together):
    size, seen, _ = together
    total = size * (size + 1) // 2
    for process in seen:
        saved, restored, later = (process["tally"][k] for k in ("saved", "restored", "later"))
        for state in (saved, restored):
            assert (state["step"], state["images"], state["skipped"]) == (4, 9, 1)
            assert state["sums"].tolist() == [0.25 * total, 3.0 * total]
            assert state["counts"].unique().tolist() == [total]
        others = total - size  # 0 + 1 + ... + (size - 1)
        assert later["sums"].tolist() == [0.25 * total + others, 3.0 * total + others]


def test_all_processes_get_the_same_action(together):
    _, seen, _ = together
    for process in seen:
        assert process["actions"] == {
            "nothing": Action.CONTINUE,
            "clock": Action.SAVE,
            "after": Action.CONTINUE,
            "signal": Action.STOP,
            "stop": signal.SIGTERM,
            "two signals": Action.STOP,
        }


def test_statistics_are_shared_after_the_epoch(together):
    _, seen, _ = together
    first, *others = (process["buffers"] for process in seen)
    for other in others:
        assert not torch.equal(other["before"], first["before"])  # else it tests nothing
        assert torch.equal(other["after"], first["after"])
        assert torch.equal(other["average"], first["average"])


def test_only_the_first_process_writes(together):
    _, seen, folder = together
    for name in ("whole", "stopped"):
        assert [path.name for path in (folder / name).iterdir()] == ["0"]
    written = {path.name for path in (folder / "whole/0").iterdir()}
    assert {"log.jsonl", "log.txt", "curves.png", "encoder_best.pth"} <= written
    assert all(process["stopped"]["files"] == seen[0]["stopped"]["files"] for process in seen)


def test_stopped_run_ends_as_if_it_had_not_been(together):
    _, seen, _ = together
    first = seen[0]["stopped"]
    assert "checkpoint_000000005.pth" in first["files"]
    epochs = [record["epoch"] for record in first["records"]]
    assert epochs == [1, 2]
    for process in seen:
        found = process["stopped"]
        assert found["exit status"] == 128 + signal.SIGTERM
        for weights in (found["weights"], found["resumed weights"]):
            assert torch.equal(weights, first["weights"])
        for ours, theirs in zip(found["resumed records"], first["records"], strict=True):
            for key in ("train_loss", "val_loss"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
            for key in ("train_miou", "val_miou", "lr"):
                assert ours[key] == theirs[key]
