"""Training and scoring with the scripts, from the flags to the files."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from fakes import assert_same_runs, run_main

from lednet.checkpoint import load_checkpoint
from lednet.data.labels import cityscapes_scheme
from lednet.training import run_dir
from lednet.training.run_dir import read_records

EPOCHS = [("encoder", 1), ("encoder", 2), ("decoder", 1), ("decoder", 2)]


def flags(toy: Path, folder: Path, *more: object) -> list[str]:
    size = ("--height", 32, "--width", 64, "--batch-size", 4, "--num-epochs", 2)
    common = ("--datadir", toy, "--savedir", folder, "--num-workers", 0, "--device", "cpu")
    return [str(word) for word in (*common, *size, *more)]


@pytest.fixture(scope="module")
def trained(toy_cityscapes, tmp_path_factory) -> Path:
    """A run of both stages, two epochs each, on 6 images in batches of 4 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_main("train/main.py", *flags(toy_cityscapes, folder))
    return folder


def stages(folder: Path) -> list[tuple[str, int]]:
    return [(record["stage"], record["epoch"]) for record in read_records(folder)]


def test_train_run_folder_is_complete(trained, toy_cityscapes):
    steps = 2 * 2 * 2  # batches, epochs, stages
    assert {path.name for path in trained.iterdir()} == {
        "options.json", "log.jsonl", "log.txt", "model.txt", "curves.png", ".lock",
        "encoder_best.pth", "best.pth",
        *(f"checkpoint_{number:09d}.pth" for number in (steps, steps - 2)),
    }  # fmt: skip
    assert stages(trained) == EPOCHS
    assert [r["lr"] for r in read_records(trained)] == pytest.approx([5e-4, 5e-4 * 0.5**0.9] * 2)
    for record in read_records(trained):
        assert record["train_loss"] > 0 and 0 <= record["val_miou"] <= 1
        assert len(record["val_class_iou"]) == 19
    options = json.loads((trained / "options.json").read_text())
    assert options["options"]["datadir"] == str(toy_cityscapes)
    assert options["environment"]["torch"] == torch.__version__
    assert "925,663 parameters" in (trained / "model.txt").read_text()
    meta = load_checkpoint(trained / "best.pth")["meta"]
    assert meta["classes"] == list(cityscapes_scheme().classes) and meta["size"] == [32, 64]


def test_train_resume_takes_the_options_and_repeats_the_weights(trained, tmp_path, run_inside):
    folder = tmp_path / "stopped"
    shutil.copytree(trained, folder)
    last = "checkpoint_000000008.pth"
    (folder / last).unlink()
    result = run_inside("train/main.py", "--savedir", folder, "--resume").check()
    assert "resuming decoder after epoch 1" in result.stdout
    assert_same_runs(folder, trained, last, "best.pth")


def test_environment_has_no_commit_of_a_repository_around_the_package(monkeypatch):
    assert run_dir.environment()["commit"] is not None or not (run_dir.REPOSITORY / ".git").exists()
    monkeypatch.setattr(run_dir, "REPOSITORY", run_dir.REPOSITORY / "tests")
    assert run_dir.environment()["commit"] is None


def test_eval_iou_score_equals_the_log(trained, toy_cityscapes, run_inside, tmp_path):
    best = max(r["val_miou"] for r in read_records(trained) if r["stage"] == "decoder")
    outputs = {name: tmp_path / name for name in ("out.json", "bars.png", "sheet.png")}
    result = run_inside(
        "test/eval_iou.py", "--weights", trained, "--datadir", toy_cityscapes, "--device", "cpu",
        "--eval-size", "network", "--json", outputs["out.json"], "--plot", outputs["bars.png"],
        "--contact-sheet", outputs["sheet.png"], "--num-workers", 0,
    ).check()  # fmt: skip
    scores = json.loads(outputs["out.json"].read_text())
    assert scores["miou"] == pytest.approx(best, abs=1e-6)
    assert set(scores["class_iou"]) == set(cityscapes_scheme().classes)
    assert scores["images"] == 3 and 0 <= scores["pixel_accuracy"] <= 1
    assert f"{scores['miou']:.4f}" in result.stdout
    assert all(path.stat().st_size > 100 for path in outputs.values())


@pytest.mark.parametrize(
    ("more", "output"),
    [
        (("--pretrainedEncoder", "{run}/encoder_best.pth"), "Encoder: 489 loaded, 0 missing"),
        (("--decoder", "--state", "{run}", "--epochs-save", 1, "--no-iouTrain", "--visualize",
          "--port", "{port}"), "--state: 547 loaded, 0 missing"),
        (("--decoder", "--annotations", "coarse", "--batch-size", 1),
         "8 training and 3 validation images"),  # train_extra and train
    ],
)  # fmt: skip
def test_train_starting_points_and_annotations(
    trained, toy_cityscapes, run_inside, tmp_path, more, output
):
    with socket.socket() as unused:  # nothing listens on this port
        unused.bind(("127.0.0.1", 0))
        more = [str(flag).format(run=trained, port=unused.getsockname()[1]) for flag in more]
        folder = tmp_path / "run"
        args = flags(toy_cityscapes, folder, "--num-epochs", 1, *more)
        result = run_inside("train/main.py", *args)
    result.check()
    assert output in result.stdout
    assert stages(folder) == [("decoder", 1)]
    if "--visualize" in more:
        assert result.stderr.count("warning") == 1 and "no visdom server" in result.stderr
        assert read_records(folder)[0]["train_miou"] is None
        assert (folder / "decoder_epoch001.pth").is_file()
