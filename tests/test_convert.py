import pytest
import torch
from test_weights import assert_equal, reference_name

from lednet import LEDNet, load_model
from lednet.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def convert(run_inside):
    return lambda *flags: run_inside("utils/convert_checkpoint.py", *flags)


@pytest.mark.parametrize("out", ["converted.pth", "folder"])
def test_convert_original_release_is_equal_and_complete(convert, tmp_path, out):
    torch.manual_seed(3)
    net = LEDNet(20)
    state = {f"module.{reference_name(key)}": value for key, value in net.state_dict().items()}
    path = tmp_path / "model_best.pth"
    torch.save({"epoch": 7, "arch": "LEDNet", "state_dict": state, "best_acc": 0.1}, path)
    result = convert("--weights", path, "--out", tmp_path / out).check()
    assert f"{len(state)} loaded, 0 missing, 0 unexpected" in result.stdout
    assert "LEDNet d20, 925,663 parameters, 20 outputs (Cityscapes and void)" in result.stdout
    converted, meta = load_model(tmp_path / out)
    assert_equal(converted, net)
    assert meta["size"] == [512, 1024] and meta["classes"][0] == "road"
    assert len(meta["colors"]) == 19 and meta["std"] == [1, 1, 1]


def test_convert_run_keeps_meta_and_drops_training_state(convert, tmp_path):
    meta = {"dataset": "mine", "classes": ["a", "b"], "colors": [[1, 2, 3], [4, 5, 6]],
            "mean": [0.1, 0.2, 0.3], "std": [0.5, 1, 2], "size": [24, 40], "miou": 0.5}  # fmt: skip
    save_checkpoint(tmp_path / "best.pth", LEDNet(3, "d128"), meta, trainer={"optimizer": {}})
    convert("--weights", tmp_path, "--out", tmp_path / "small.pth", "--height", 32).check()
    content = load_checkpoint(tmp_path / "small.pth")
    assert set(content) == {"state_dict", "meta"}
    assert content["meta"] == meta | {"size": [32, 40], "model": "LEDNet d128"}


def test_convert_existing_output_or_unknown_classes_are_refused(convert, tmp_path, weights):
    before = weights.read_bytes()
    convert("--weights", weights, "--out", weights).assert_error("add --overwrite")
    assert weights.read_bytes() == before
    folder = tmp_path / "x.pth"
    folder.mkdir()
    flags = ("--weights", weights, "--out", folder, "--overwrite")
    convert(*flags).assert_error("x.pth is a folder: choose another --out")
    torch.save(LEDNet(5).state_dict(), weights)
    flags = ("--weights", weights, "--out", tmp_path / "out")
    convert(*flags).assert_error("give --height and --width")
    assert not (tmp_path / "out").exists()
