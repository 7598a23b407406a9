"""Logging of a run: a real visdom server, and event files read by TensorBoard's own reader."""

import io
import json
import multiprocessing
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeLoggerBackend
from PIL import Image

from lednet import LEDNet
from lednet.data.registry import open_dataset
from lednet.data.transforms import Augmentation
from lednet.training.loggers import MAX_IMAGE_HEIGHT, MetricLogger, example_images, make_charts
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.run_dir import read_records
from lednet.training.tasks import Segmentation
from lednet.visualization import colorize

visdom = pytest.importorskip("visdom")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lednet.training.tensorboard_logger import TensorBoardBackend
from lednet.training.visdom_logger import VisdomBackend

IMAGE_TAGS = [f"input, target, prediction/{number}" for number in (1, 2)]


def record(epoch: int, stage: str = "decoder", **values: object) -> dict:
    """A line of `log.jsonl`. Only even epochs are validated."""
    val = {"val_loss": None, "val_miou": None}
    if epoch % 2 == 0:
        val = {"val_loss": epoch + 0.5, "val_miou": 0.25}
        val["val_class_iou"] = {"sky": 0.5, "a/b c": None}
    return {
        "stage": stage, "epoch": epoch, "lr": 5e-4, "train_loss": float(epoch),
        "train_miou": 0.125, "images_per_second": 8.0, "process_memory_mb": 300, **val, **values,
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int, folder: str) -> None:
    from visdom.server.run_server import start_server

    # As `python -m visdom.server`, without its download of web assets.
    start_server(port=port, hostname="127.0.0.1", base_url="", env_path=folder)


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Port of a visdom server. Each test has its own environment there."""
    port, folder = free_port(), tmp_path_factory.mktemp("visdom")
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, str(folder)), daemon=True
    )
    process.start()
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    else:
        pytest.fail("the visdom server did not start")
    yield port
    process.kill()
    process.join()


@pytest.fixture
def data(camvid):
    data = open_dataset("camvid", camvid, "val")
    data.size = (48, 64)
    return data


@pytest.fixture
def task(data) -> Segmentation:
    return Segmentation(WeightedCrossEntropy([1.0] * 11, 12), Augmentation(), data.scheme.classes)


@pytest.fixture
def log(data, task):
    """Log some epochs of a run, each with the records of the epochs before."""
    net, loader = LEDNet(12).train(), SimpleNamespace(dataset=data)

    def run(backends, epochs, **values) -> MetricLogger:
        backends = backends if isinstance(backends, list) else [backends]
        logger = MetricLogger(backends, data.scheme)
        for epoch in epochs:
            records = [record(1, "encoder"), *(record(e, **values) for e in range(1, epoch + 1))]
            logger.log(records, task, net, loader)
        assert net.training
        return logger

    return run


def test_make_charts_has_every_logged_value(task):
    assert make_charts([record(1), record(2, gpu_memory_mb=70)], task) == {
        "loss": {"train": [(1, 1.0), (2, 2.0)], "val": [(2, 2.5)]},
        "mIoU": {"train": [(1, 0.125), (2, 0.125)], "val": [(2, 0.25)]},
        "per-class IoU": {"sky": [(2, 0.5)]},
        "learning rate": {"start of epoch": [(1, 5e-4), (2, 5e-4)]},
        "throughput": {"images per second": [(1, 8.0), (2, 8.0)]},
        "memory in MB": {"process": [(1, 300), (2, 300)], "GPU": [(2, 70)]},
    }


def test_example_images_show_input_target_and_prediction(data, task):
    class ConstantNet(LEDNet):
        """Predicts class 3 everywhere."""

        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full(x[:, 0].shape, 3), 12).movedim(-1, 1)

    arguments = ConstantNet(12), task, SimpleNamespace(dataset=data), data.scheme, 1
    (shown,) = example_images(*arguments)
    image, target = data[0]
    gap = np.full((48, 4, 3), 255)
    prediction = np.full((48, 64, 3), data.scheme.colors[3])
    parts = (image.permute(1, 2, 0), gap, colorize(target.numpy(), data.scheme), gap, prediction)
    np.testing.assert_array_equal(shown, np.hstack(parts))
    data.size = (2 * MAX_IMAGE_HEIGHT, 64)
    assert example_images(*arguments)[0].shape == (MAX_IMAGE_HEIGHT, 100, 3)


@pytest.mark.parametrize("fails_at", ["open", 1, 2])
def test_metric_logger_drops_a_failing_backend_with_one_warning(log, capsys, fails_at):
    failing, working = FakeLoggerBackend(fails_at), FakeLoggerBackend()
    log([failing, working], (1, 2, 3))
    assert [summary.epoch for summary in working.summaries] == [1, 2, 3]
    assert len(failing.summaries) == (0 if fails_at == "open" else fails_at - 1)
    assert capsys.readouterr().err == (
        "warning: fake backend failed (out of paper); training continues without it\n"
    )


class TestVisdom:
    def windows(self, port: int, name: str, *windows: str) -> list[dict]:
        client = visdom.Visdom(port=port, env=name, use_incoming_socket=False)
        texts = [client._send({"eid": name, "win": w}, endpoint="win_data") for w in windows]
        return [json.loads(text)["content"] for text in texts]

    def test_log_sends_curves_and_images(self, port, log):
        log(VisdomBackend("whole", port=port), (1, 2, 3))
        names = ("decoder loss", "decoder memory in MB", "decoder: input, target, prediction")
        loss, memory, images = self.windows(port, "whole", *names)
        curves = {trace["name"]: (trace["x"], trace["y"]) for trace in loss["data"]}
        assert curves == {"train": ([1, 2, 3], [1, 2, 3]), "val": ([2], [2.5])}
        assert memory["data"][0]["name"] == "process" and memory["data"][0]["y"] == [300] * 3
        assert images["src"].startswith("data:image")

    def test_log_after_resume_has_each_epoch_once(self, port, log):
        log(VisdomBackend("resumed", port=port), (1, 2, 3))
        log(VisdomBackend("resumed", port=port), (3, 4))
        (loss,) = self.windows(port, "resumed", "decoder loss")
        assert loss["data"][0]["x"] == [1, 2, 3, 4]

    @pytest.mark.parametrize("stops", ["before the run", "after an epoch"])
    def test_lost_server_costs_one_warning(self, port, log, capsys, stops):
        backend = VisdomBackend("lost", port=free_port())
        if stops == "after an epoch":
            backend = VisdomBackend("lost", port=port)
            connect = backend.open
            backend.open = lambda: (connect(), setattr(backend.client, "port", free_port()))
        log(backend, (1, 2))
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no visdom server at http://localhost:" in error


def read_events(folder, stage: str = "decoder") -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder / stage), size_guidance=sizes).Reload()


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


class TestTensorBoard:
    def test_log_writes_curves_and_images(self, data, log, tmp_path):
        log(TensorBoardBackend(tmp_path), (1, 2, 3))
        events = read_events(tmp_path)
        assert sorted(events.Tags()["scalars"]) == [
            "learning rate/start of epoch", "loss/train", "loss/val", "mIoU/train", "mIoU/val",
            "memory in MB/process", "per-class IoU/sky", "throughput/images per second",
        ]  # fmt: skip
        assert sorted(events.Tags()["images"]) == IMAGE_TAGS
        assert points(events, "loss/train") == [(1, 1), (2, 2), (3, 3)]
        assert points(events, "loss/val") == [(2, 2.5)]
        (*_, layout) = events.Tensors("custom_scalars__config__")
        assert b"per-class" in layout.tensor_proto.string_val[0]
        images = events.Images(IMAGE_TAGS[1])
        assert [image.step for image in images] == [1, 2, 3]
        image = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
        assert image.shape == (48, 200, 3)
        np.testing.assert_array_equal(image[:, :64], data[1][0].permute(1, 2, 0))

    @pytest.mark.parametrize(
        ("before", "after", "memory"),
        [
            ((1, 2, 3), (3, 4), [100, 100, 200, 200]),  # from a checkpoint before epoch 3
            ((1, 2), (3,), [100, 100, 200]),
            ((), (3,), [200, 200, 200]),  # begun without --tensorboard
        ],
    )
    def test_log_after_resume_has_each_epoch_once(self, log, tmp_path, before, after, memory):
        log(TensorBoardBackend(tmp_path), before, process_memory_mb=100)
        log(TensorBoardBackend(tmp_path), after, process_memory_mb=200)
        assert len(list((tmp_path / "decoder").iterdir())) == bool(before) + 1
        events = read_events(tmp_path)
        epochs = list(range(1, len(memory) + 1))
        assert points(events, "loss/train") == [(epoch, epoch) for epoch in epochs]
        assert points(events, "memory in MB/process") == list(zip(epochs, memory, strict=True))
        shown = [image.step for image in events.Images(IMAGE_TAGS[0])]
        assert shown == (epochs if before else [3])

    def test_log_separates_stages(self, task, tmp_path):
        logger = MetricLogger([TensorBoardBackend(tmp_path)])
        records = [record(1, "encoder"), record(2, "encoder"), record(1, train_loss=7.0)]
        for end in (1, 2, 3):
            logger.log(records[:end], task, LEDNet(12), SimpleNamespace())
        assert points(read_events(tmp_path, "encoder"), "loss/train") == [(1, 1), (2, 2)]
        assert points(read_events(tmp_path), "loss/train") == [(1, 7)]

    @pytest.mark.parametrize("problem", ["file in place", "folder lost"])
    def test_write_error_costs_one_warning(self, log, tmp_path, capfd, problem):
        folder = tmp_path / "run"
        backend = TensorBoardBackend(folder)
        if problem == "file in place":
            folder.write_text("a file, not a folder")
            log(backend, (1, 2))
        else:
            show = backend.log
            backend.log = lambda summary: (show(summary), shutil.rmtree(folder))
            log(backend, (1, 2, 3))
        error = capfd.readouterr().err
        reason = "File exists" if problem == "file in place" else "No such file or directory"
        assert error == (
            f"warning: cannot write to {folder} ({reason}); training continues without it\n"
        )


@pytest.mark.parametrize(
    ("flag", "package"), [("--visualize", "visdom"), ("--tensorboard", "tensorboard")]
)
def test_training_without_the_package_is_refused(train, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    loaded = (f"lednet.training.{package}_logger", "tensorboard.", "torch.utils.tensorboard")
    for name in [name for name in sys.modules if name.startswith(loaded)]:
        monkeypatch.delitem(sys.modules, name)
    train(flag).assert_error(f"error: {flag} needs ")


def test_training_logs_each_epoch_to_tensorboard(train, tmp_path):
    train("--num-epochs", 2, "--batch-size", 5, "--decoder", "--tensorboard").check()
    records, events = read_records(tmp_path / "run"), read_events(tmp_path / "run/tensorboard")
    for tag, key in (("loss/train", "train_loss"), ("mIoU/val", "val_miou")):
        assert points(events, tag) == [(r["epoch"], pytest.approx(r[key])) for r in records]
    assert [r["epoch"] for r in records] == [1, 2] and records[0]["process_memory_mb"] > 50
