"""The scripts as a user runs them: processes of their own, from another folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lednet.checkpoint import load_checkpoint
from lednet.data.labels import cityscapes_scheme
from lednet.training.checkpointing import Checkpoints
from lednet.training.run_dir import MEASURED_KEYS

SMALL = ("--height", 64, "--width", 128, "--num-workers", 1, "--device", "cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def trained(toy_cityscapes, tmp_path_factory) -> Path:
    """A run of both stages, two epochs each, on 6 images in batches of 4 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(toy_cityscapes, folder)
    return folder


def train_command(toy: Path, folder: Path, *flags: object) -> list[str]:
    command = [sys.executable, ROOT / "train/main.py", "--datadir", toy, "--savedir", folder]
    command += [*SMALL, "--num-epochs", 2, "--batch-size", 4, *flags]
    return [str(word) for word in command]


def train(toy: Path, folder: Path, *flags: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        train_command(toy, folder, *flags), capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result


def records(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stages(folder: Path) -> list[tuple[str, int]]:
    return [(record["stage"], record["epoch"]) for record in records(folder)]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = (load_checkpoint(path)["state_dict"] for path in (a, b))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


ALL_EPOCHS = [("encoder", 1), ("encoder", 2), ("decoder", 1), ("decoder", 2)]


def test_run_folder_holds_what_it_should(trained, toy_cityscapes):
    steps = 2 * 2 * 2  # batches, epochs, stages
    assert {path.name for path in trained.iterdir()} == {
        "options.json", "log.jsonl", "log.txt", "model.txt", "curves.png", ".lock",
        "encoder_best.pth", "best.pth",
        *(f"checkpoint_{number:09d}.pth" for number in (steps, steps - 2)),
    }  # fmt: skip
    assert stages(trained) == ALL_EPOCHS
    for record in records(trained):
        assert record["train_loss"] > 0 and 0 <= record["val_miou"] <= 1
        assert len(record["val_class_iou"]) == 19
    options = json.loads((trained / "options.json").read_text())
    assert options["options"]["datadir"] == str(toy_cityscapes)
    assert options["environment"]["torch"] == torch.__version__
    assert "925,663 parameters" in (trained / "model.txt").read_text()
    meta = load_checkpoint(trained / "best.pth")["meta"]
    assert meta["classes"] == list(cityscapes_scheme().classes) and meta["size"] == [64, 128]


def test_learning_rate_follows_the_paper(trained):
    rates = [record["lr"] for record in records(trained)]
    assert rates == pytest.approx([5e-4, 5e-4 * 0.5**0.9] * 2)


def test_killed_run_resumes_to_identical_weights(trained, toy_cityscapes, tmp_path):
    folder = tmp_path / "killed"
    for epochs_done in (1, 3):  # once inside each stage
        flags = ("--resume",) if folder.exists() else ()
        process = subprocess.Popen(
            train_command(toy_cityscapes, folder, *flags),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while len(records(folder)) < epochs_done:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # With --resume alone, the run's own options come back.
    result = subprocess.run(
        [sys.executable, ROOT / "train/main.py", "--savedir", folder, "--resume"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "resuming decoder after epoch" in result.stdout
    assert stages(folder) == ALL_EPOCHS
    for name in (*(path.name for path in Checkpoints(trained).paths()), "best.pth"):
        assert_same_weights(folder / name, trained / name)

    def without_speed(folder: Path) -> list[dict]:
        return [record | dict.fromkeys(MEASURED_KEYS) for record in records(folder)]

    assert without_speed(folder) == without_speed(trained)


def test_score_equals_the_one_in_the_log(trained, toy_cityscapes, run_script, tmp_path):
    best = max(r["val_miou"] for r in records(trained) if r["stage"] == "decoder")
    outputs = {name: tmp_path / name for name in ("out.json", "bars.png", "sheet.png")}
    result = run_script(
        "test/eval_iou.py", "--weights", trained, "--datadir", toy_cityscapes, "--device", "cpu",
        "--eval-size", "network", "--json", outputs["out.json"], "--plot", outputs["bars.png"],
        "--contact-sheet", outputs["sheet.png"],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(outputs["out.json"].read_text())
    assert figures["miou"] == pytest.approx(best, abs=1e-6)
    assert set(figures["class_iou"]) == set(cityscapes_scheme().classes)
    assert figures["images"] == 3 and 0 <= figures["pixel_accuracy"] <= 1
    assert f"{figures['miou']:.4f}" in result.stdout
    assert all(path.stat().st_size > 100 for path in outputs.values())


def test_two_processes_count_every_image_once(toy_cityscapes, run_script, tmp_path):
    folder = tmp_path / "two"
    result = run_script(
        "train/main.py", "--datadir", toy_cityscapes, "--savedir", folder, *SMALL,
        "--num-epochs", 1, "--batch-size", 2, launcher=TORCHRUN,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert stages(folder) == [("encoder", 1), ("decoder", 1)]
    scored = run_script(
        "test/eval_iou.py", "--weights", folder, "--datadir", toy_cityscapes, "--device", "cpu",
        "--eval-size", "network", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    miou = json.loads((tmp_path / "out.json").read_text())["miou"]
    assert miou == pytest.approx(records(folder)[-1]["val_miou"], abs=1e-6)


def test_starting_points_do_what_their_names_say(trained, toy_cityscapes, tmp_path):
    encoder = trained / "encoder_best.pth"
    one = ("--num-epochs", 1)
    result = train(toy_cityscapes, tmp_path / "a", *one, "--pretrainedEncoder", encoder)
    assert "--pretrainedEncoder: 489 loaded, 0 missing" in result.stdout
    assert "2 skipped" in result.stdout
    assert stages(tmp_path / "a") == [("decoder", 1)]
    with socket.socket() as unused:  # a port where nobody answers
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        flags = ("--decoder", "--state", trained, "--visualize", "--port", port, "--epochs-save", 1)
        result = train(toy_cityscapes, tmp_path / "b", *one, *flags, "--no-iouTrain")
    assert "--state: 547 loaded, 0 missing" in result.stdout
    assert result.stderr.count("warning") == 1 and "no visdom server" in result.stderr
    assert stages(tmp_path / "b") == [("decoder", 1)]
    assert records(tmp_path / "b")[0]["train_miou"] is None
    assert (tmp_path / "b/decoder_epoch001.pth").is_file()


def test_coarse_annotations_train(toy_cityscapes, tmp_path):
    flags = ("--annotations", "coarse", "--num-epochs", 1, "--decoder", "--batch-size", 1)
    result = train(toy_cityscapes, tmp_path / "coarse", *flags)
    assert "8 training and 3 validation images" in result.stdout  # train_extra and train


SCRIPTS = (
    "train/main.py",
    "datasets/prepare_cityscapes.py",
    "datasets/prepare_cityscapes_zips.py",
    "test/eval_iou.py",
    "test/eval_cityscapes_server.py",
    "test/eval_cityscapes_color.py",
    "test/eval_forward_time.py",
    "utils/check_upload.py",
    "utils/export_model.py",
    "utils/predict.py",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_the_screen(run_inside, script):
    result = run_inside(script, "--help")
    assert result.returncode == 0 and "python " + script in result.stdout
