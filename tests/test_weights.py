import pickle

import pytest
import torch
from fuzzing import Trap

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
    """The original release's name of one of our keys."""
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


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bundled", [False, True])
def test_load_weights_reference_names_and_prefixes_are_mapped(net, tmp_path, prefix, bundled):
    state = {prefix + reference_name(key): value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if bundled else state, tmp_path / "w.pth")
    other = LEDNet(20)
    report = load_weights(other, tmp_path / "w.pth")
    assert report.complete
    assert str(report) == f"{len(state)} loaded, 0 missing, 0 unexpected, 0 of another shape"
    assert_equal(net, other)


def test_load_weights_reference_classifier_is_mapped(tmp_path):
    torch.manual_seed(2)
    classifier = EncoderClassifier(9)
    state = {
        "module.features." + reference_name(key): value
        for key, value in classifier.encoder.state_dict(prefix="encoder.").items()
    }
    state |= classifier.classifier.state_dict(prefix="module.classifier.linear.")
    torch.save({"state_dict": state, "arch": "lednet"}, tmp_path / "w.pth")
    net, other = LEDNet(5), EncoderClassifier(9)
    report = load_weights(net, tmp_path / "w.pth", part="encoder.")
    assert report.skipped == ["classifier.weight", "classifier.bias"]
    assert_equal(classifier.encoder, net.encoder)
    assert not load_weights(other, tmp_path / "w.pth").skipped
    assert_equal(classifier, other)


def test_load_weights_part_changes_only_the_encoder(net, tmp_path):
    save_checkpoint(tmp_path / "w.pth", net, {})
    other = LEDNet(5)
    decoder = {key: value.clone() for key, value in other.decoder.state_dict().items()}
    report = load_weights(other, tmp_path / "w.pth", part="encoder.")
    assert_equal(net.encoder, other.encoder)
    assert all(torch.equal(decoder[k], v) for k, v in other.decoder.state_dict().items())
    assert set(report.skipped) == {k for k in net.state_dict() if not k.startswith("encoder.")}


@pytest.mark.parametrize(
    ("saved", "wanted", "words"),
    [
        (lambda: LEDNet(20), lambda: LEDNet(20, "d128"), r"w\.pth.*d128.*of another shape"),
        (lambda: LEDNet(20), lambda: LEDNet(12), r"w\.pth.*num_classes=12.*of another shape"),
        (lambda: EncoderClassifier(9), lambda: EncoderClassifier(4), r"Classifier\(num_classes=4"),
        (lambda: LEDNet(20), lambda: EncoderClassifier(20), "classifier.weight is missing"),
    ],
)
def test_load_weights_other_network_is_refused_and_unchanged(tmp_path, saved, wanted, words):
    save_checkpoint(tmp_path / "w.pth", saved(), {})
    net = wanted()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match=words):
        load_weights(net, tmp_path / "w.pth")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_load_weights_missing_and_unexpected_keys_are_refused(net, tmp_path):
    state = dict(net.state_dict())
    state["encoder.99.weight"] = state.pop("decoder.mid.0.bias")
    torch.save(state, tmp_path / "w.pth")
    words = r"1 missing, 1 unexpected.*decoder.mid.0.bias is missing; encoder.99.weight is unknown"
    with pytest.raises(UserError, match=words):
        load_weights(net, tmp_path / "w.pth")


@pytest.mark.parametrize("module", [LEDNet(20).encoder_stage(), EncoderClassifier(9)])
def test_load_model_part_of_a_network_is_refused(tmp_path, module):
    save_checkpoint(tmp_path / "w.pth", module, {})
    with pytest.raises(UserError, match="no LEDNet decoder"):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_load_weights_code_is_refused_and_not_run(net, tmp_path, plain_pickle):
    trap = Trap(tmp_path / "trap", 0)
    if plain_pickle:
        (tmp_path / "w.pth").write_bytes(pickle.dumps(trap))
    else:
        torch.save({"state_dict": net.state_dict(), "args": trap}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth .*plain tensors"):
        load_weights(net, tmp_path / "w.pth")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "another format"])
def test_load_weights_damaged_file_is_refused(net, tmp_path, damage):
    save_checkpoint(tmp_path / "w.pth", net, {})
    content = bytearray((tmp_path / "w.pth").read_bytes())
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"empty": b"", "truncated": content[:middle], "flipped": flipped}
    (tmp_path / "w.pth").write_bytes(damaged.get(damage, b"\x89PNG\r\n"))
    with pytest.raises(UserError, match=r"w\.pth is damaged|w\.pth is not a checkpoint"):
        load_weights(net, tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_weights_that_are_not_finite_are_refused(net, tmp_path, value):
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state["encoder.0.conv.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w\.pth has values that are not finite \(encoder\.0\.conv"
    ):
        load_weights(net, tmp_path / "w.pth")
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ([], '"meta" of .* is no dictionary'),
        ({"size": [32]}, '"size"'),
        ({"size": [0, 32]}, '"size"'),
        ({"size": [20_000, 20_000]}, '"size"'),
        ({"classes": ["a", 1]}, '"classes"'),
        ({"colors": [[0, 0, 256]]}, '"colors"'),
        ({"mean": [0, 0, float("nan")]}, '"mean"'),
        ({"std": [1, 1, 0]}, '"std"'),
    ],
)
def test_load_model_invalid_meta_is_refused(tmp_path, meta, words):
    save_checkpoint(tmp_path / "w.pth", LEDNet(3), meta)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "w.pth")
