"""Released weights: layout, checksum, names and model cards."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from make_golden import GOLDEN, released_outputs

from lednet import LEDNet, UserError, load_model
from lednet.checkpoint import CONFIG, TENSORS, save_checkpoint, save_pretrained
from lednet.data.labels import camvid_scheme, cityscapes_scheme
from lednet.hub import list_pretrained
from lednet.model import count_parameters

META = {"dataset": "CamVid", "classes": ["sky", "car"], "size": [32, 64], "mean": [0, 0, 0]}
CLASSES = camvid_scheme().classes
RELEASED = {
    "camvid-d20": (922_535, CLASSES),
    "cityscapes-d20": (925_663, cityscapes_scheme().classes),
    "toy-d20": (925_663, cityscapes_scheme().classes),
}
"""Parameters and classes of all released weights, as in their cards."""


def network(num_classes: int = 3, *arguments) -> LEDNet:
    torch.manual_seed(5)
    return LEDNet(num_classes, *arguments).eval()


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "mine", network(), META)
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("save", "arguments"),
    [
        (save_pretrained, (7,)),
        (save_pretrained, (3, "d128")),
        (save_checkpoint, (3, "d128", 24)),
    ],
)
def test_load_model_saved_network_is_rebuilt(tmp_path, save, arguments):
    net = network(*arguments)
    path = tmp_path / "best.pth" if save is save_checkpoint else tmp_path
    save(path, net, META)
    loaded, meta = load_model(tmp_path)
    assert meta == META and not loaded.training
    assert loaded.extra_repr() == net.extra_repr()
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (TENSORS, b"damaged", r"model\.safetensors is not the file.*download both again"),
        (TENSORS, None, r"holds no best\.pth"),
        (CONFIG, b"{", r"config\.json is not valid JSON"),
        (CONFIG, b'{"model_type": "bert"}', "does not describe a LEDNet"),
        (CONFIG, b'{"model_type": "lednet"}', "lacks `network`"),
    ],
)
def test_from_pretrained_damaged_folder_is_refused(folder, name, content, words):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        LEDNet.from_pretrained(folder)


def test_from_pretrained_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no weights at nothing-d20: .*released name \(camvid-d20"):
        LEDNet.from_pretrained("nothing-d20")


def test_torch_hub_builds_and_loads(folder):
    net = torch.hub.load(str(ROOT), "lednet", source="local", pretrained=str(folder))
    assert net.num_classes == 3
    wide = torch.hub.load(str(ROOT), "lednet", 5, "d128", source="local")
    assert (wide.num_classes, wide.variant) == (5, "d128")


def test_list_pretrained_is_complete():
    assert list_pretrained() == sorted(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_outputs_equal_the_stored_ones(name):
    parameters, classes = RELEASED[name]
    net, meta = load_model(name)
    assert count_parameters(net) == parameters
    assert tuple(meta["classes"]) == classes
    stored, now = np.load(GOLDEN / f"{name}.npz")["logits"], released_outputs(name)["logits"]
    assert stored.std() > 0.05
    np.testing.assert_allclose(now, stored, rtol=0, atol=1e-4 * np.abs(stored).max())


@pytest.fixture
def release(run_inside, tmp_path):
    """Release runs; returns the result, the card and the page."""
    page, val = tmp_path / "results.md", tmp_path / "val.json"
    page.write_text("# R\n\n<!-- utils/release_weights.py writes from here -->\n<!-- to here -->\n")

    def run(*runs, classes=CLASSES):
        ious = {name: i / 20 for i, name in enumerate(classes)} | {classes[-1]: None}
        content = {"class_iou": ious, "miou": 0.34567, "pixel_accuracy": 0.8, "subset": "val",
                   "images": 7, "network_size": [32, 64], "scored_at": "full",
                   "command": "python test/eval_iou.py"}  # fmt: skip
        val.write_text(json.dumps(content))
        result = run_inside("utils/release_weights.py", "--name", "new", "--runs", *runs,
                            "--scores", val, "--out", tmp_path / "out", "--page", page)  # fmt: skip
        card = tmp_path / "out/new/README.md"
        return result, card.read_text() if card.exists() else "", page.read_text()

    return run


def test_release_run_writes_weights_card_and_table(release, tmp_path):
    run = tmp_path / "run"
    meta = META | {"classes": list(CLASSES), "std": [1, 1, 1]}
    save_checkpoint(run / "best.pth", network(12), meta)
    options = {
        "command": ["python", "train/main.py", "--dataset", "camvid"],
        "options": {"height": 32, "width": 64},
        "environment": {"commit": "abc123", "torch": "9.9"},
        "hardware": "2 x abacus",
    }
    (run / "options.json").write_text(json.dumps(options))
    stages = ("8x16-1", "8x16-1", "decoder")
    (run / "log.jsonl").write_text("".join(f'{{"stage": "{s}"}}\n' for s in stages))

    result, card, _ = release(run, classes=["a", "b"])
    result.assert_error("holds no scores of CamVid")
    result, card, page = release(run)
    result.check()
    for words in (
        "0.3457",
        "2 epochs at 8x16, then 1 epochs at 32x64",
        json.loads((tmp_path / "out/new" / CONFIG).read_text())["sha256"],
        "| class | val |\n|---|---|\n| sky | 0.000 |",
        "| pole | 0.100 |",
        f"| {CLASSES[-1]} | absent |",
        "From scratch, 2 epochs",
        "`python train/main.py --dataset camvid` (commit abc123, torch 9.9, 2 x abacus)",
    ):
        assert words in card
    assert "| CamVid | 0.3457 | 0.8000 | val, 7 images" in page
    assert LEDNet.from_pretrained(tmp_path / "out/new").num_classes == 12


def test_release_run_from_released_weights_keeps_history(release, train, tmp_path):
    earlier = [
        {"command": "train --state old.pth", "stages": ["7 epochs at 9x9"], "commit": "c",
         "torch": "t", "hardware": "h"}
    ]  # fmt: skip
    meta = {"dataset": "CamVid", "classes": list(CLASSES), "training": earlier}
    state = tmp_path / "old"
    save_pretrained(state, network(12), meta)
    for name in ("one", "two"):
        flags = ("--with-val", "--decoder", "--state", state, "--savedir", tmp_path / name)
        train("--height", 16, "--width", 24, *flags).check()
        state = tmp_path / name
    assert load_model(state)[1]["earlier"] == earlier
    result, card, _ = release(tmp_path / "one", state)
    result.check()
    assert "From the weights old.pth, 7 epochs at 9x9, then 1 epochs at 16x24, then" in card
    assert "val (trained on), 7 images" in card and "Trained on train and val." in card


def test_from_pretrained_reads_the_hub_cache_without_a_network(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--somebody--streets", "0123456789" * 4
    torch.manual_seed(0)
    net = LEDNet(5)
    net.save_pretrained(repository / "snapshots" / commit, {"size": [48, 64]})
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    found = LEDNet.from_pretrained("somebody/streets")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), found.parameters(), strict=True))
    assert load_model("hf-hub:somebody/streets")[1]["size"] == [48, 64]
    with pytest.raises(UserError, match="no weights somebody/else here or on the Hugging Face Hub"):
        LEDNet.from_pretrained("somebody/else")
