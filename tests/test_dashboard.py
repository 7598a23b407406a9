"""The displays: a real visdom server, and event files read by TensorBoard's own reader."""

import contextlib
import io
import json
import multiprocessing
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from lednet import LEDNet
from lednet.data.registry import open_dataset
from lednet.data.transforms import Augmentation
from lednet.training.loggers import PICTURE_HEIGHT, MetricLogger, charts_of
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.run_dir import read_records
from lednet.training.signals import CheckpointTimer
from lednet.training.tasks import Segmentation
from lednet.visualization import colorize

visdom = pytest.importorskip("visdom")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lednet.training.tensorboard_logger import TensorBoardBackend
from lednet.training.visdom_logger import VisdomBackend


def record(epoch: int, stage: str = "decoder", **values: object) -> dict:
    """A line of a log whose losses tell the epoch; every second one has no validation."""
    val = {"val_loss": epoch + 0.5, "val_miou": 0.25, "val_class_iou": {"sky": 0.5, "a/b c": None}}
    if epoch % 2:
        val = {"val_loss": None, "val_miou": None}
    return {
        "stage": stage,
        "epoch": epoch,
        "lr": 5e-4,
        "train_loss": float(epoch),
        "train_miou": 0.125,
        **val,
        "images_per_second": 8.0,
        "process_memory_mb": 300,
        **values,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int, folder: str) -> None:
    from visdom.server.run_server import start_server

    # As `python -m visdom.server`, less its download of web assets.
    start_server(port=port, hostname="127.0.0.1", base_url="", env_path=folder)


@contextlib.contextmanager
def running_server(folder):
    """(port, process)"""
    port = free_port()
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
    yield port, process
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Of a server that all tests share; each has its own environment there."""
    with running_server(tmp_path_factory.mktemp("visdom")) as (port, _):
        yield port


class Loader:
    def __init__(self, dataset):
        self.dataset = dataset


@pytest.fixture
def data(camvid):
    data = open_dataset("camvid", camvid, "val")
    data.size = (48, 64)
    return data


def task(data) -> Segmentation:
    return Segmentation(WeightedCrossEntropy([1.0] * 11, 12), Augmentation(), data.scheme.classes)


def show(display, data, epochs, net=None, **values) -> MetricLogger:
    """Show a run that goes on from epochs[0] - 1, epoch by epoch."""
    dashboard = MetricLogger([display], data.scheme)
    net = net or LEDNet(12).train()
    for epoch in epochs:
        records = [record(1, "encoder"), *(record(e, **values) for e in range(1, epoch + 1))]
        dashboard.show(records, task(data), net, Loader(data))
    return dashboard


def test_charts_hold_what_the_log_holds(data):
    charts = charts_of([record(1), record(2, gpu_memory_mb=70)], task(data))
    assert charts == {
        "loss": {"train": [(1, 1.0), (2, 2.0)], "val": [(2, 2.5)]},
        "mIoU": {"train": [(1, 0.125), (2, 0.125)], "val": [(2, 0.25)]},
        "per-class IoU": {"sky": [(2, 0.5)]},
        "learning rate": {"start of epoch": [(1, 5e-4), (2, 5e-4)]},
        "throughput": {"images per second": [(1, 8.0), (2, 8.0)]},
        "memory in MB": {"process": [(1, 300), (2, 300)], "GPU": [(2, 70)]},
    }


def test_pictures_show_input_target_and_prediction(data):
    """A net that answers class 3 everywhere; and a picture that is too high."""

    class Three(LEDNet):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full(x[:, 0].shape, 3), 12).movedim(-1, 1)

    dashboard = MetricLogger([], data.scheme, images=1)
    (picture,) = dashboard._pictures(data.scheme, task(data), Three(12), Loader(data))
    image, target = data[0]
    assert picture.shape == (48, 64 + 4 + 64 + 4 + 64, 3)
    np.testing.assert_array_equal(picture[:, :64], image.permute(1, 2, 0))
    np.testing.assert_array_equal(picture[:, 68:132], colorize(target.numpy(), data.scheme))
    np.testing.assert_array_equal(picture[:, 136:], np.full((48, 64, 3), data.scheme.colors[3]))
    assert (picture[:, 64:68] == 255).all() and (picture[:, 132:136] == 255).all()

    data.size = (2 * PICTURE_HEIGHT, 64)
    (picture,) = dashboard._pictures(data.scheme, task(data), Three(12), Loader(data))
    assert picture.shape == (PICTURE_HEIGHT, 100, 3)


class TestVisdom:
    def windows(self, port: int, name: str, *windows: str) -> list[dict]:
        client = visdom.Visdom(port=port, env=name, use_incoming_socket=False)
        answers = [client._send({"eid": name, "win": w}, endpoint="win_data") for w in windows]
        return [json.loads(answer)["content"] for answer in answers]

    def test_curves_and_pictures_arrive(self, port, data):
        net = LEDNet(12).train()
        show(VisdomBackend("whole", port=port), data, (1, 2, 3), net)
        assert net.training
        names = ("decoder loss", "decoder memory in MB", "decoder: input, target, prediction")
        loss, memory, pictures = self.windows(port, "whole", *names)
        curves = {trace["name"]: (trace["x"], trace["y"]) for trace in loss["data"]}
        assert curves == {"train": ([1, 2, 3], [1, 2, 3]), "val": ([2], [2.5])}
        assert memory["data"][0]["name"] == "process" and memory["data"][0]["y"] == [300] * 3
        assert pictures["src"].startswith("data:image")

    def test_resumed_run_has_each_epoch_once(self, port, data):
        show(VisdomBackend("resumed", port=port), data, (1, 2, 3))
        show(VisdomBackend("resumed", port=port), data, (3, 4))
        (loss,) = self.windows(port, "resumed", "decoder loss")
        assert loss["data"][0]["x"] == [1, 2, 3, 4]

    def test_page_opens(self, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/env/run") as page:
            assert page.status == 200

    def test_absent_server_costs_one_warning(self, data, capsys):
        show(VisdomBackend("run", port=free_port()), data, (1, 2))
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and "no visdom server answers" in output.err

    def test_server_that_dies_costs_one_warning(self, data, tmp_path, capsys):
        with running_server(tmp_path) as (port, process):
            dashboard = show(VisdomBackend("run", port=port), data, (1,))
            process.kill()
            process.join()
        capsys.readouterr()
        for epoch in (2, 3):
            dashboard.show([record(epoch)], task(data), LEDNet(12), Loader(data))
        assert capsys.readouterr().err.count("warning") == 1


def read_events(folder, stage: str = "decoder") -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder / stage), size_guidance=sizes).Reload()


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


class TestTensorBoard:
    def test_event_files_hold_curves_and_pictures(self, data, tmp_path):
        show(TensorBoardBackend(tmp_path), data, (1, 2, 3))
        events = read_events(tmp_path)
        pictures = [f"input, target, prediction/{number}" for number in (1, 2)]
        assert sorted(events.Tags()["scalars"]) == [
            "learning rate/start of epoch",
            "loss/train",
            "loss/val",
            "mIoU/train",
            "mIoU/val",
            "memory in MB/process",
            "per-class IoU/sky",
            "throughput/images per second",
        ]
        assert sorted(events.Tags()["images"]) == pictures
        assert points(events, "loss/train") == [(1, 1), (2, 2), (3, 3)]
        assert points(events, "loss/val") == [(2, 2.5)]
        assert points(events, "per-class IoU/sky") == [(2, 0.5)]
        images = events.Images(pictures[1])
        assert [image.step for image in images] == [1, 2, 3]
        picture = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
        assert picture.shape == (48, 200, 3)
        np.testing.assert_array_equal(picture[:, :64], data[1][0].permute(1, 2, 0))

    def test_resumed_run_has_each_epoch_once(self, data, tmp_path, monkeypatch):
        """Going on from a checkpoint before the last epoch that was shown."""
        show(TensorBoardBackend(tmp_path), data, (1, 2, 3), process_memory_mb=100)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 60)  # another file
        show(TensorBoardBackend(tmp_path), data, (3, 4), process_memory_mb=200)
        assert len(list((tmp_path / "decoder").iterdir())) == 2
        events = read_events(tmp_path)
        assert points(events, "loss/train") == [(1, 1), (2, 2), (3, 3), (4, 4)]
        memory = points(events, "memory in MB/process")
        assert memory == [(1, 100), (2, 100), (3, 200), (4, 200)]
        images = events.Images("input, target, prediction/1")
        assert [image.step for image in images] == [1, 2, 3, 4]

    def test_display_asked_for_later_has_the_epochs_before(self, data, tmp_path):
        show(TensorBoardBackend(tmp_path), data, (3,))
        assert points(read_events(tmp_path), "loss/train") == [(1, 1), (2, 2), (3, 3)]

    def test_stages_do_not_mix(self, data, tmp_path):
        dashboard = MetricLogger([TensorBoardBackend(tmp_path)])
        records = [record(1, "encoder"), record(2, "encoder"), record(1, train_loss=7.0)]
        for end in (1, 2, 3):
            dashboard.show(records[:end], task(data), LEDNet(12), Loader(data))
        assert points(read_events(tmp_path, "encoder"), "loss/train") == [(1, 1), (2, 2)]
        assert points(read_events(tmp_path), "loss/train") == [(1, 7)]

    def test_lost_folder_costs_one_warning(self, data, tmp_path, capfd):
        dashboard = show(TensorBoardBackend(tmp_path / "run"), data, (1,))
        shutil.rmtree(tmp_path / "run")
        capfd.readouterr()
        for epoch in (2, 3):
            dashboard.show([record(epoch)], task(data), LEDNet(12), Loader(data))
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and f"cannot write to {tmp_path / 'run'} (No such" in error

    def test_unwritable_folder_costs_one_warning(self, data, tmp_path, capfd):
        (tmp_path / "run").write_text("a file, no folder")
        show(TensorBoardBackend(tmp_path / "run"), data, (1, 2))
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "(File exists); training goes on" in error


def test_one_display_outlives_the_other(data, tmp_path, capsys):
    displays = [VisdomBackend("run", port=free_port()), TensorBoardBackend(tmp_path)]
    MetricLogger(displays, data.scheme).show([record(1)], task(data), LEDNet(12), Loader(data))
    assert capsys.readouterr().err.count("warning") == 1
    assert any((tmp_path / "decoder").iterdir())


@pytest.mark.parametrize(
    ("flag", "package"), [("--visualize", "visdom"), ("--tensorboard", "tensorboard")]
)
def test_missing_package_is_named(run_inside, toy_cityscapes, tmp_path, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"lednet.training.{package}_logger")
    for name in [
        name for name in sys.modules if name.startswith(("tensorboard.", "torch.utils.tensorboard"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    result = run_inside(
        "train/main.py", "--datadir", toy_cityscapes, "--savedir", tmp_path / "run", flag
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {flag} needs ") and result.stderr.count("\n") == 1


def test_stopped_and_resumed_training_shows_each_epoch_once(
    run_inside, camvid, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    command = (
        "train/main.py", "--dataset", "camvid", "--datadir", camvid, "--savedir", run,
        "--height", 48, "--width", 64, "--num-epochs", 3, "--batch-size", 3, "--num-workers", 0,
        "--device", "cpu", "--decoder", "--tensorboard",
    )  # fmt: skip
    with monkeypatch.context() as patch:  # two steps an epoch: in the middle of the second
        patch.setattr(
            CheckpointTimer, "order", lambda _, steps: signal.SIGTERM if steps == 3 else 0
        )
        assert run_inside(*command).returncode == 128 + signal.SIGTERM
    assert [r["epoch"] for r in read_records(run)] == [1]
    result = run_inside(*command, "--resume")
    assert result.returncode == 0, result.stderr
    records = read_records(run)
    assert [r["epoch"] for r in records] == [1, 2, 3]
    events = read_events(run / "tensorboard")
    for tag, key in (
        ("loss/train", "train_loss"), ("loss/val", "val_loss"), ("mIoU/val", "val_miou"),
        ("learning rate/start of epoch", "lr"), ("memory in MB/process", "process_memory_mb"),
        ("throughput/images per second", "images_per_second"),
    ):  # fmt: skip
        logged = [(r["epoch"], pytest.approx(r[key])) for r in records]
        assert points(events, tag) == logged, tag
    assert records[0]["process_memory_mb"] > 50
