"""utils/convert_checkpoint.py: what goes in comes out, with what is known of it."""

import pytest
import torch
from test_bad_input import assert_refused
from test_weights import assert_equal, reference_name

from lednet import LEDNet, load_model
from lednet.checkpoint import load_checkpoint, save_checkpoint

SCRIPT = "utils/convert_checkpoint.py"


@pytest.fixture
def released(tmp_path):
    """A file as the original release wrote them, and its network under our names."""
    torch.manual_seed(3)
    net = LEDNet(20)
    state = {f"module.{reference_name(key)}": value for key, value in net.state_dict().items()}
    path = tmp_path / "model_best.pth"
    torch.save({"epoch": 7, "arch": "LEDNet", "state_dict": state, "best_acc": 0.1}, path)
    return path, net


@pytest.mark.parametrize("out", ["converted.pth", "folder"])
def test_original_weights_are_brought_home(run_inside, tmp_path, released, out):
    path, net = released
    result = run_inside(SCRIPT, "--weights", path, "--out", tmp_path / out)
    assert result.returncode == 0, result.stderr
    assert f"{len(net.state_dict())} loaded, 0 missing, 0 unexpected" in result.stdout
    assert "LEDNet d20, 925,663 parameters, 20 outputs (Cityscapes and void)" in result.stdout
    back, meta = load_model(tmp_path / out)
    assert_equal(back, net)
    assert meta["size"] == [512, 1024] and meta["classes"][0] == "road"
    assert len(meta["colors"]) == 19 and meta["std"] == [1, 1, 1]


def test_training_state_is_left_behind_and_the_rest_kept(run_inside, tmp_path):
    meta = {"dataset": "mine", "classes": ["a", "b"], "colors": [[1, 2, 3], [4, 5, 6]],
            "mean": [0.1, 0.2, 0.3], "std": [0.5, 1, 2], "size": [24, 40], "miou": 0.5}  # fmt: skip
    save_checkpoint(tmp_path / "best.pth", LEDNet(3, "d128"), meta, trainer={"optimizer": {}})
    result = run_inside(SCRIPT, "--weights", tmp_path, "--out", tmp_path / "small.pth",
                        "--height", 32)  # fmt: skip
    assert result.returncode == 0, result.stderr
    content = load_checkpoint(tmp_path / "small.pth")
    assert set(content) == {"state_dict", "meta"}
    assert content["meta"] == meta | {"size": [32, 40], "model": "LEDNet d128"}


def test_nothing_is_replaced_unasked(run_inside, tmp_path, released):
    path, _ = released
    before = path.read_bytes()
    assert_refused(run_inside(SCRIPT, "--weights", path, "--out", path), "add --overwrite")
    assert path.read_bytes() == before
    folder = tmp_path / "x.pth"
    folder.mkdir()
    flags = ("--weights", path, "--out", folder, "--overwrite")
    assert_refused(run_inside(SCRIPT, *flags), "x.pth is a folder: choose another --out")


def test_weights_of_unknown_classes_are_refused(run_inside, tmp_path):
    torch.save(LEDNet(5).state_dict(), tmp_path / "w.pth")
    flags = ("--weights", tmp_path / "w.pth", "--out", tmp_path / "out")
    assert_refused(run_inside(SCRIPT, *flags), "does not name its classes")
    assert not (tmp_path / "out").exists()
