"""Command lines of the original release's README files, on toy streets."""

import shutil

import pytest
import torch
from test_weights import reference_name

from lednet import LEDNet
from lednet.cli.released_flags import translate

SIZE = ("--height", 32, "--width", 64)


@pytest.fixture
def save(tmp_path, monkeypatch):
    """A folder like the release's, with its save/logs, seen from its test/."""
    (tmp_path / "save/logs").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    monkeypatch.chdir(tmp_path / "test")
    torch.manual_seed(0)
    state = {f"module.{reference_name(k)}": v for k, v in LEDNet(20).state_dict().items()}
    torch.save(state, tmp_path / "save/logs/model_best.pth")
    stage = {k: v for k, v in state.items() if ".decoder." not in k}
    bundle = {"epoch": 3, "arch": "Net(...)", "state_dict": stage, "best_acc": 0.1, "optimizer": {}}
    torch.save(bundle, tmp_path / "save/logs/model_best_enc.pth.tar")
    return tmp_path / "save/logs"


def test_train_commands_of_the_release_run(run_inside, save, toy_cityscapes):
    data = ("--datadir", toy_cityscapes, "--num-epochs", 1, "--batch-size", 3, *SIZE)
    more = ("--device", "cpu", "--num-workers", 0)
    steps = ("--steps-loss", 50, "--steps-plot", 0, "--iouVal")
    run = ("--savedir", save.parent / "trained")
    result = run_inside("train/main.py", *run, "--model", "lednet", *steps, *data, *more).check()
    assert "note: --model has no effect" in result.stderr
    assert (save.parent / "trained/best.pth").is_file()
    shutil.rmtree(save.parent / "trained")
    state = ("--decoder", "--state", "../save/logs/model_best_enc.pth.tar")
    result = run_inside("train/main.py", *run, "--name", "lednet", *data, *state, *more).check()
    assert "Stage 1" not in result.stdout and (save.parent / "trained/best.pth").is_file()


@pytest.mark.parametrize("name", ["cityscapes_server", "cityscapes_color", "iou"])
def test_evaluation_commands_of_the_release_run(name, run_inside, save, toy_cityscapes, tmp_path):
    weights = ("--loadDir", "../save/logs/", "--loadWeights", "model_best.pth")
    data = ("--datadir", toy_cityscapes, "--subset", "val", "--loadModel", "lednet.py")
    more = {"iou": (), "cityscapes_server": ("--no-speed", "--out", tmp_path / "out")}
    out = more.get(name, ("--out", tmp_path / "out"))
    result = run_inside(f"test/eval_{name}.py", *data, *weights, "--cpu", *SIZE, *out).check()
    if name == "cityscapes_color":
        assert "3 of 3 images" in result.stdout


def test_forward_time_command_of_the_release_runs(run_inside):
    flags = ("--batch-size=2", "--width", 64, "--height", 32, "-m", "lednet")
    small = ("--image-height", 32, "--image-width", 64, "--runs", 2, "--backend", "eager")
    run_inside("test/eval_forward_time.py", *flags, *small).check()


def test_translate_own_flags_are_left_alone():
    argv = ["--model", "x", "--out=a", "--cpu", "--steps-loss=5", "--loadWeights=b.pth"]
    assert translate(argv, {"--model"}) == [
        "--model", "x", "--out=a", "--device", "cpu", "--weights", "../save/logs/b.pth",
    ]  # fmt: skip


def test_translate_flags_of_another_script_stay_unknown(run_inside):
    assert translate(["--subset", "val"], {"--datadir"}) == ["--subset", "val"]
    result = run_inside("utils/predict.py", "a.png", "--model", "mine.pth")
    result.assert_error("unrecognized arguments: --model mine.pth")
