"""Stand-ins for parts that tests do not exercise, and checks that tests share."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from fault_injection import same
from PIL import Image
from torch import nn

from lednet.checkpoint import load_checkpoint
from lednet.data.dataset import PairDataset
from lednet.data.loaders import make_loaders
from lednet.data.pairs import Sample
from lednet.data.samplers import ResumableDistributedSampler
from lednet.data.transforms import Augmentation
from lednet.distributed import DistributedContext
from lednet.signals import StopRequest
from lednet.training.checkpointing import Checkpoints
from lednet.training.loggers import EpochSummary
from lednet.training.loop import Progress, StageComponents, TrainingRun, train_stages
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.run_dir import MEASURED_KEYS, RunDir, read_records
from lednet.training.signals import Action, CheckpointTimer
from lednet.training.stages import Stage
from lednet.training.tasks import Segmentation
from lednet.training.trainer import Trainer, TrainerConfig


class Result(subprocess.CompletedProcess):
    """A finished script with its text output."""

    def check(self) -> "Result":
        """It ended with status 0."""
        assert self.returncode == 0, self.stdout + self.stderr
        return self

    def assert_error(self, *words: str) -> None:
        """It ended with status 2 and an error of one line that contains all `words`."""
        assert self.returncode == 2, self.stdout + self.stderr
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in self.stderr, self.stderr
        for word in words:
            assert word in errors[0]


def read(path: Path) -> np.ndarray:
    """Pixels of an image file."""
    return np.array(Image.open(path))


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder by their relative names."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def truncate(path: Path, share: float = 0.5) -> Path:
    os.truncate(path, int(share * path.stat().st_size))
    return path


def flip_bit(path: Path, at: int = -10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def need(*packages: str) -> None:
    """Skip the test where a package is not installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install '.[deploy]'")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class FakeLoggerBackend:
    """A `LoggerBackend` that keeps the summaries.

    Args:
        fails_at: "open", or the number of the call of `log`, from 1, that raises an error.
    """

    failure = "fake backend failed"

    def __init__(self, fails_at: int | str | None = None):
        self.fails_at = fails_at
        self.summaries: list[EpochSummary] = []

    def open(self) -> None:
        self._fail_at("open")

    def log(self, summary: EpochSummary) -> None:
        self._fail_at(len(self.summaries) + 1)
        self.summaries.append(summary)

    def _fail_at(self, moment: int | str) -> None:
        if moment == self.fails_at:
            raise OSError(0, "out of paper")


CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)
KEYS = (1, 0, 1)
"""(seed, stage, epoch) of `Trainer.train_one_epoch`."""


class Unaugmented(Augmentation):
    """Changes nothing."""

    def forward(self, images, labels, generator):
        return self.normalize(images, labels)


def tiny_net() -> nn.Sequential:
    """A network of 4 outputs at 1/2 size, with batch norm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3),
        nn.Conv2d(6, 4, 1),
    )  # fmt: skip


def small_trainer(
    augmentation: Augmentation | None = None,
    model: nn.Module | None = None,
    dist_context: DistributedContext = ALONE,
    num_epochs: int = 10,
    **options,
) -> Trainer:
    """A trainer of 3 classes and void, with weights that differ much."""
    criterion = WeightedCrossEntropy([1.0, 5.0, 20.0], 4)
    task = Segmentation(criterion, augmentation or Augmentation(), "abc")
    model = tiny_net() if model is None else model
    return Trainer(model, task, num_epochs, dist_context, TrainerConfig(**options))


class NoiseDataset(PairDataset):
    """Random images; label maps with more of class 2, and less void, as the index grows.

    Attributes:
        read: indices in the order in which they were read.
    """

    def __init__(self, count: int):
        self.pairs = [Sample(Path(f"{i}.png"), None) for i in range(count)]
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8, generator=generator)
        label = torch.randint(0, 2, (16, 24), dtype=torch.uint8, generator=generator)
        label[:, : 3 * index] = 2
        label[2 * index + 1 :] = 255
        return image, label


class FakeLoader(list):
    """Batches (images, targets) with the attributes that a trainer needs of a loader."""

    batch_size = 2

    @property
    def sampler(self) -> ResumableDistributedSampler:
        return ResumableDistributedSampler(len(self.dataset), ALONE, seed=1)

    @property
    def dataset(self) -> NoiseDataset:
        return NoiseDataset(sum(len(images) for images, _ in self))


def noise_batches(count: int, size: int = 2) -> FakeLoader:
    samples = [NoiseDataset(9)[3 + i % 5] for i in range(count * size)]
    images, labels = map(torch.stack, zip(*samples, strict=True))
    return FakeLoader(zip(images.split(size), labels.split(size), strict=True))


def record_by_calling(call):
    """A `Recorder` without CUDA: a replay calls again, and writes to the recorded tensors."""
    outputs = call()

    def replay() -> None:
        for recorded, new in zip(outputs, call(), strict=True):
            recorded.copy_(new)

    return replay, outputs


class StopAt(CheckpointTimer):
    """A timer whose last process receives SIGTERM in the given steps."""

    def __init__(self, dist_context: DistributedContext, *steps: int, **options):
        super().__init__(dist_context, StopRequest(), **options)
        self.steps = steps

    def poll(self, step: int) -> Action:
        if step in self.steps and self.dist_context.rank == self.dist_context.size - 1:
            self.request.number = signal.SIGTERM
        return super().poll(step)


def tiny_run(
    folder: Path,
    timer: CheckpointTimer | None = None,
    resume: bool = False,
    change: Callable[[Trainer], None] = lambda trainer: None,
    epochs: tuple[int, ...] = (2, 2),
    loading: Mapping = MappingProxyType({}),
    run_options: Mapping = MappingProxyType({}),
    meta: Mapping = MappingProxyType({}),
    return_run: bool = False,
    **options,
) -> tuple[nn.Module | TrainingRun, Progress]:
    """Train `tiny_net` in the run folder `folder`, 7 images in batches of 2.

    Args:
        change: called with the trainer of each stage.
        epochs: epochs of each stage.
        meta: further entries of the run's.
        return_run: return the run instead of its network.
        loading, run_options, options: of `make_loaders`, `TrainingRun` and `small_trainer`.
    """
    timer = timer or StopAt(ALONE)
    context = timer.dist_context
    net = tiny_net()
    stages = [Stage(f"s{i}", f"Stage {i}", n, f"s{i}_best.pth") for i, n in enumerate(epochs)]
    about = {"model": "tiny", "dataset": "noise", "mean": [0.0] * 3, "std": [1.0] * 3, **meta}
    run_dir = RunDir(folder, resume, context.is_main)
    checkpoints = Checkpoints(folder)
    run = TrainingRun(net, stages, run_dir, checkpoints, about, 1, timer, **run_options)
    state = run.resume() if resume else ()

    def build_stage(stage: Stage) -> StageComponents:
        trainer = small_trainer(None, net, context, stage.epochs, **options)
        change(trainer)
        data = NoiseDataset(7), NoiseDataset(7)
        return StageComponents(trainer, *make_loaders(*data, context, 2, 0, 1, **loading))

    progress = train_stages(run, build_stage, *state)
    return run if return_run else net, progress


def assert_same_tensors(first: Mapping, second: Mapping) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def assert_same_runs(first: Path, second: Path, *names: str) -> None:
    """Both run folders have the same log, apart from speed and memory, and the same weights."""
    logs = [read_records(folder) for folder in (first, second)]
    for record in chain(*logs):
        for key in MEASURED_KEYS:
            record.pop(key, None)
    assert logs[0] == logs[1]
    for name in names:
        contents = [load_checkpoint(folder / name) for folder in (first, second)]
        assert_same_tensors(*(content["state_dict"] for content in contents))
        assert same(*(content.get("trainer") for content in contents))


def run_main(script: str, *args: object) -> str:
    """Run a script of the repository in this process, for fixtures of a module; its output."""
    command = [str(Path(__file__).parents[1] / script), *map(str, args)]
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
    return output.getvalue()
