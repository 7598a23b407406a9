import os
import pickle
from pathlib import Path

import pytest
import torch

from lednet import LEDNet, UserError, load_model, load_weights
from lednet.checkpoint import save_checkpoint
from lednet.model import EncoderClassifier

TO_REFERENCE = (
    ("encoder_head.", "encoder.output_conv."),
    ("encoder.0.norm.", "encoder.initial_block.bn."),
    ("encoder.0.conv.", "encoder.initial_block.conv."),
    ("decoder.pooled.", "decoder.apn.branch1.1.conv."),
    ("decoder.mid.", "decoder.apn.mid.0.conv."),
    ("decoder.down3.", "decoder.apn.down3.0.conv."),
    ("decoder.last.", "decoder.apn.down3.1.conv."),
    ("decoder.down1.", "decoder.apn.down1.conv."),
    ("decoder.down2.", "decoder.apn.down2.conv."),
    ("decoder.lateral1.", "decoder.apn.conv1.conv."),
    ("decoder.lateral2.", "decoder.apn.conv2.conv."),
)
BRANCHES = {
    "left": {0: "conv3x1_1_l", 2: "conv1x3_1_l", 3: "bn1_l",
             5: "conv3x1_2_l", 7: "conv1x3_2_l", 8: "bn2_l"},
    "right": {0: "conv1x3_1_r", 2: "conv3x1_1_r", 3: "bn1_r",
              5: "conv1x3_2_r", 7: "conv3x1_2_r", 8: "bn2_r"},
}  # fmt: skip


def reference_name(name: str) -> str:
    """Our key name in the words of the original release."""
    for ours, theirs in TO_REFERENCE:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    _, index, part, *rest = name.split(".")
    start = f"encoder.layers.{int(index) - 1}"
    if part in BRANCHES:
        return ".".join([start, BRANCHES[part][int(rest[0])], *rest[1:]])
    return ".".join([start, {"norm": "bn"}.get(part, part), *rest])


@pytest.fixture
def net() -> LEDNet:
    torch.manual_seed(1)
    return LEDNet(20)


def assert_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bundled", [False, True])
def test_reference_names_prefixes_and_bundles_are_understood(net, tmp_path, prefix, bundled):
    state = {prefix + reference_name(key): value for key, value in net.state_dict().items()}
    assert any(key.startswith(f"{prefix}encoder.layers.14.conv3x1_2_r") for key in state)
    torch.save({"state_dict": state, "epoch": 3} if bundled else state, tmp_path / "w.pth")
    other = LEDNet(20)
    report = load_weights(other, tmp_path / "w.pth")
    assert len(report.loaded) == len(state) and report.complete
    assert str(report) == f"{len(state)} loaded, 0 missing, 0 unexpected, 0 of another shape"
    assert_equal(net, other)


@pytest.mark.parametrize(
    "other", [LEDNet(7), LEDNet(20, "d128"), LEDNet(20, "d128", pyramid_channels=16)]
)
def test_network_is_rebuilt_from_its_weights(other, tmp_path):
    save_checkpoint(tmp_path / "w.pth", other, {"classes": ["a"]})
    net, meta = load_model(tmp_path / "w.pth")
    assert (net.num_classes, net.variant) == (other.num_classes, other.variant)
    assert net.pyramid_channels == other.pyramid_channels
    assert meta == {"classes": ["a"]} and not net.training
    assert_equal(net, other)


@pytest.mark.parametrize(
    "wanted, word",
    [(LEDNet(20, "d128"), "d128"), (LEDNet(12), "num_classes=12")],
)
def test_other_variant_or_class_count_is_refused_and_changes_nothing(net, tmp_path, wanted, word):
    save_checkpoint(tmp_path / "w.pth", net, {})
    before = {key: value.clone() for key, value in wanted.state_dict().items()}
    with pytest.raises(UserError, match=f"w.pth.*{word}.*of another shape"):
        load_weights(wanted, tmp_path / "w.pth")
    assert all(torch.equal(before[key], value) for key, value in wanted.state_dict().items())


def test_missing_and_unknown_keys_are_refused(net, tmp_path):
    state = dict(net.state_dict())
    state["encoder.99.weight"] = state.pop("decoder.mid.0.bias")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 missing, 1 unexpected.*decoder.mid.0.bias is missing"):
        load_weights(LEDNet(20), tmp_path / "w.pth")


def test_encoder_alone_is_taken_and_the_rest_reported(net, tmp_path):
    save_checkpoint(tmp_path / "w.pth", net, {})
    other = LEDNet(5)
    decoder = {key: value.clone() for key, value in other.decoder.state_dict().items()}
    report = load_weights(other, tmp_path / "w.pth", part="encoder.")
    assert_equal(net.encoder, other.encoder)
    assert all(torch.equal(decoder[k], v) for k, v in other.decoder.state_dict().items())
    assert set(report.skipped) == {k for k in net.state_dict() if not k.startswith("encoder.")}


def test_encoder_goes_from_classifier_to_network_bit_for_bit(tmp_path):
    torch.manual_seed(2)
    classifier, net = EncoderClassifier(9), LEDNet(5)
    save_checkpoint(tmp_path / "w.pth", classifier, {"dataset": "imagenet"})
    report = load_weights(net, tmp_path / "w.pth", part="encoder.")
    assert report.skipped == ["classifier.weight", "classifier.bias"]
    assert_equal(classifier.encoder, net.encoder)
    x = torch.rand(2, 3, 40, 48)
    with torch.no_grad():
        assert torch.equal(classifier.eval().encoder(x), net.eval().encoder(x))


def test_the_releases_imagenet_classifier_is_understood(tmp_path):
    torch.manual_seed(2)
    classifier = EncoderClassifier(9)
    state = {
        "module.features." + reference_name(key): value
        for key, value in classifier.state_dict().items()
        if key.startswith("encoder.")
    }
    state["module.classifier.linear.weight"] = classifier.classifier.weight
    state["module.classifier.linear.bias"] = classifier.classifier.bias
    torch.save({"state_dict": state, "arch": "lednet"}, tmp_path / "w.pth")
    net, other = LEDNet(5), EncoderClassifier(9)
    report = load_weights(net, tmp_path / "w.pth", part="encoder.")
    assert report.skipped == ["classifier.weight", "classifier.bias"]
    assert_equal(classifier.encoder, net.encoder)
    assert not load_weights(other, tmp_path / "w.pth").skipped
    assert_equal(classifier, other)


def test_classifiers_of_other_classes_and_other_networks_are_told_apart(net, tmp_path):
    save_checkpoint(tmp_path / "w.pth", EncoderClassifier(9), {})
    with pytest.raises(UserError, match=r"w\.pth does not fit EncoderClassifier\(num_classes=4\)"):
        load_weights(EncoderClassifier(4), tmp_path / "w.pth")
    with pytest.raises(UserError, match="no LEDNet decoder"):
        load_model(tmp_path / "w.pth")
    save_checkpoint(tmp_path / "w.pth", net, {})
    with pytest.raises(UserError, match=r"num_classes=20.*classifier.weight is missing"):
        load_weights(EncoderClassifier(20), tmp_path / "w.pth")


def test_encoder_stage_weights_are_no_full_network(net, tmp_path):
    save_checkpoint(tmp_path / "w.pth", net.encoder_stage(), {})
    with pytest.raises(UserError, match="no LEDNet decoder"):
        load_model(tmp_path / "w.pth")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(net, tmp_path, plain_pickle):
    trap = tmp_path / "sprung"
    content = {"state_dict": net.state_dict(), "args": Bomb(trap)}
    if plain_pickle:
        (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb(trap)))
    else:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth .*plain tensors"):
        load_weights(net, tmp_path / "w.pth")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x89PNG\r\n", b"\x80\x04]."])
def test_files_that_are_no_checkpoint_are_refused(net, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth"):
        load_weights(net, tmp_path / "w.pth")


def test_truncated_checkpoint_is_refused(net, tmp_path):
    save_checkpoint(tmp_path / "w.pth", net, {})
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"w\.pth is damaged"):
        load_weights(net, tmp_path / "w.pth")


def test_failed_write_leaves_the_old_file_and_nothing_else(net, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "w.pth", net, {})
    before = (tmp_path / "w.pth").read_bytes()

    def torn(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(UserError, match=r"cannot write .*w\.pth: No space left"):
        save_checkpoint(tmp_path / "w.pth", net, {})
    assert (tmp_path / "w.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
