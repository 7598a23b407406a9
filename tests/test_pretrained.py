"""Weights that are handed on: their layout, their checksum, the names they go by."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from make_golden import GOLDEN, released_answer

from lednet import LEDNet, UserError, load_model
from lednet.checkpoint import CONFIG, TENSORS, save_checkpoint, save_pretrained
from lednet.data.labels import camvid_scheme, cityscapes_scheme
from lednet.hub import RELEASED as RELEASED_FOLDER, list_pretrained
from lednet.model import count_parameters

META = {"dataset": "CamVid", "classes": ["sky", "car"], "size": [32, 64], "mean": [0, 0, 0]}


def network(variant: str = "d20", num_classes: int = 3, **options) -> LEDNet:
    torch.manual_seed(5)
    return LEDNet(num_classes, variant, **options).eval()


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "mine", network(), META)
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("variant", "options"), [("d20", {}), ("d128", {}), ("d128", {"pyramid_channels": 24})]
)
def test_comes_back_as_it_was(tmp_path, variant, options):
    net = network(variant, **options)
    save_pretrained(tmp_path, net, META)
    back, meta = load_model(tmp_path)
    assert meta == META and not back.training
    assert back.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in back.state_dict().items())
    again = LEDNet.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(again(x), net(x))


def test_every_damaged_byte_is_noticed(folder):
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file.*download both again"):
        LEDNet.from_pretrained(folder)


def test_missing_tensors(folder):
    (folder / TENSORS).unlink()
    with pytest.raises(UserError, match=r"holds no best\.pth"):
        LEDNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json"),
        ("[]", "does not describe a LEDNet"),
        ('{"model_type": "bert"}', "does not describe a LEDNet"),
        ('{"model_type": "lednet"}', "lacks `network`"),
        ('{"model_type": "lednet", "network": {}, "meta": {}}', "its SHA-256 differs"),
    ],
)
def test_strange_config(folder, content, words):
    (folder / CONFIG).write_text(content)
    with pytest.raises(UserError, match=words):
        LEDNet.from_pretrained(folder)


def test_unknown_name():
    with pytest.raises(UserError, match=r"no weights at nothing-d20: .*released name \("):
        LEDNet.from_pretrained("nothing-d20")


def test_torch_hub_builds_and_loads(folder):
    net = torch.hub.load(str(ROOT), "lednet", source="local", pretrained=str(folder))
    assert net.num_classes == 3
    wide = torch.hub.load(str(ROOT), "lednet", 5, "d128", source="local")
    assert (wide.num_classes, wide.variant) == (5, "d128")


@pytest.fixture
def run(tmp_path):
    """A run's folder, with all that a card is made of."""
    scheme = camvid_scheme()
    folder = tmp_path / "run"
    meta = {"dataset": "CamVid", "classes": list(scheme.classes), "size": [32, 64],
            "mean": [0, 0, 0], "std": [1, 1, 1]}  # fmt: skip
    save_checkpoint(folder / "best.pth", network(num_classes=scheme.num_outputs), meta)
    options = {
        "command": ["python", "train/main.py", "--dataset", "camvid"],
        "options": {"height": 32, "width": 64},
        "environment": {"commit": "abc123", "torch": "9.9"},
        "hardware": "2 x abacus",
    }
    (folder / "options.json").write_text(json.dumps(options))
    stages = ("8x16-1", "8x16-1", "decoder")
    (folder / "log.jsonl").write_text("".join(f'{{"stage": "{s}"}}\n' for s in stages))
    return folder


def scores(path, classes):
    ious = {name: i / 20 for i, name in enumerate(classes)} | {classes[-1]: None}
    content = {"class_iou": ious, "miou": 0.34567, "pixel_accuracy": 0.8, "subset": "val",
               "images": 7, "network_size": [32, 64], "scored_at": "full",
               "command": "python test/eval_iou.py"}  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_release_from_a_run(run, run_script, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# R\n\n<!-- utils/release_weights.py writes from here -->\n<!-- to here -->\n")
    flags = ("--name", "toy", "--runs", run, "--out", tmp_path / "out", "--page", page)
    classes = camvid_scheme().classes
    val = scores(tmp_path / "val.json", classes)
    result = run_script("utils/release_weights.py", *flags, "--scores", val)
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "out/toy/README.md").read_text()
    config = json.loads((tmp_path / "out/toy" / CONFIG).read_text())
    for words in (
        "0.3457",
        "2 epochs at 8x16, then 1 epochs at 32x64",
        config["sha256"],
        "| pole | 0.100 |",
        f"| {classes[-1]} | absent |",
        "From scratch, 2 epochs",
        "`python train/main.py --dataset camvid` (commit abc123, torch 9.9, 2 x abacus)",
    ):
        assert words in card
    assert "| CamVid | 0.3457 | 0.8000 | val, 7 images" in page.read_text()
    assert LEDNet.from_pretrained(tmp_path / "out/toy").num_classes == 12

    other = scores(tmp_path / "other.json", ["a", "b"])
    result = run_script("utils/release_weights.py", *flags, "--scores", other)
    assert result.returncode == 2 and "holds no scores of CamVid" in result.stderr


def test_training_goes_on_from_released_weights_and_says_so(run_inside, camvid, tmp_path):
    """What they came from is carried into the next card, and through runs in between."""
    classes = camvid_scheme().classes
    earlier = [{"command": "first", "stages": ["7 epochs at 9x9"], "commit": "c", "torch": "t",
                "hardware": "h"}]  # fmt: skip
    meta = {"dataset": "CamVid", "classes": list(classes), "training": earlier}
    save_pretrained(tmp_path / "old", network(num_classes=12), meta)
    state = tmp_path / "old"
    for name in ("one", "two"):
        flags = ("--dataset", "camvid", "--datadir", camvid, "--height", 16, "--width", 24,
                 "--num-workers", 0, "--device", "cpu", "--num-epochs", 1, "--with-val",
                 "--decoder", "--state", state, "--savedir", tmp_path / name)  # fmt: skip
        result = run_inside("train/main.py", *flags)
        assert result.returncode == 0, result.stderr
        state = tmp_path / name
    assert load_model(state)[1]["earlier"] == earlier
    page = tmp_path / "results.md"
    page.write_text("<!-- utils/release_weights.py writes from here -->\n<!-- to here -->\n")
    val = scores(tmp_path / "val.json", classes)
    result = run_inside("utils/release_weights.py", "--name", "new", "--runs", tmp_path / "one",
                        state, "--scores", val, "--out", tmp_path / "out",
                        "--page", page)  # fmt: skip
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "out/new/README.md").read_text()
    assert "7 epochs at 9x9, then 1 epochs at 16x24, then 1 epochs at 16x24" in card
    assert "val (trained on), 7 images" in card and "Trained on train and val." in card


RELEASED = {
    "camvid-d20": (922_535, camvid_scheme().classes),
    "cityscapes-d20": (925_663, cityscapes_scheme().classes),
    "cityscapes-demo-d20": (925_663, cityscapes_scheme().classes),
}
"""Parameters and classes of each, as its card states them."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights(name):
    """Its answer is the one that tests/make_golden.py stored when it was released."""
    parameters, classes = RELEASED[name]
    net, meta = load_model(name)
    assert count_parameters(net) == parameters
    assert tuple(meta["classes"]) == classes
    stored, now = np.load(GOLDEN / f"{name}.npz")["logits"], released_answer(name)["logits"]
    assert stored.std() > 0.05  # the file itself must say something
    np.testing.assert_allclose(now, stored, rtol=0, atol=1e-4 * np.abs(stored).max())
    assert (RELEASED_FOLDER / name / TENSORS).stat().st_size < 10e6


def test_all_released_weights_are_tested():
    assert list_pretrained() == sorted(RELEASED)
