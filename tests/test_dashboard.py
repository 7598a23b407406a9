"""The display, against a real visdom server."""

import json
import multiprocessing
import socket
import time

import pytest
import torch

from lednet import LEDNet
from lednet.data.datasets import open_dataset
from lednet.data.transforms import Augmentation
from lednet.training.dashboard import Dashboard
from lednet.training.loss import WeightedCrossEntropy
from lednet.training.tasks import Segmentation

visdom = pytest.importorskip("visdom")

RECORD = {"stage": "decoder", "lr": 5e-4, "train_loss": 2.0, "val_loss": 2.5,
          "train_miou": 0.2, "val_miou": None}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int, folder: str) -> None:
    from visdom.server.run_server import start_server

    # As `python -m visdom.server`, less its download of web assets.
    start_server(port=port, hostname="127.0.0.1", base_url="", env_path=folder)


@pytest.fixture
def server(tmp_path):
    """A running server: (port, process)."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, str(tmp_path)), daemon=True
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


def test_curves_and_pictures_arrive(server, data):
    port, _ = server
    dashboard = Dashboard("run", task(data), data.scheme, port=port)
    net = LEDNet(12).train()
    for epoch in (1, 2, 3):
        dashboard.show({**RECORD, "epoch": epoch}, net, Loader(data))
    assert net.training

    client = visdom.Visdom(port=port, env="run", use_incoming_socket=False)
    windows = [
        client._send({"eid": "run", "win": name}, endpoint="win_data")
        for name in ("decoder loss", "decoder pictures")
    ]
    loss, pictures = map(json.loads, windows)
    curves = {trace["name"]: trace for trace in loss["content"]["data"]}
    assert curves["train"]["x"] == [1, 2, 3] and curves["val"]["y"] == [2.5, 2.5, 2.5]
    assert pictures["content"]["src"].startswith("data:image")


def test_absent_server_costs_one_warning(data, capsys):
    dashboard = Dashboard("run", task(data), data.scheme, port=free_port())
    dashboard.show({**RECORD, "epoch": 1}, torch.nn.Identity(), Loader(data))
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "no visdom server answers" in output.err


def test_server_that_dies_costs_one_warning(server, data, capsys):
    port, process = server
    dashboard = Dashboard("run", task(data), data.scheme, port=port)
    net = LEDNet(12)
    dashboard.show({**RECORD, "epoch": 1}, net, Loader(data))
    process.kill()
    process.join()
    capsys.readouterr()
    for epoch in (2, 3):
        dashboard.show({**RECORD, "epoch": epoch}, net, Loader(data))
    output = capsys.readouterr()
    assert output.err.count("warning") == 1
