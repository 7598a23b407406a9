"""Exported files: outputs equal to the network's, metadata, the parity check, the script."""

import functools
import json
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from fakes import need as need_packages
from PIL import Image
from test_inference import SHORT_STAGES, formula_net
from torch import nn

import lednet.exporting.wrappers
import lednet.model
from lednet import LEDNet, UserError
from lednet.checkpoint import save_checkpoint
from lednet.data.labels import camvid_scheme
from lednet.exporting import executorch
from lednet.exporting.exporter import (
    Parity,
    ParityError,
    check_parity,
    export,
    reference_logits,
    require_parity,
)
from lednet.exporting.formats import FORMATS, ExportOptions, Format, load
from lednet.exporting.fuse import fuse_conv_bn
from lednet.exporting.wrappers import EndToEndModel
from lednet.inference.benchmark import benchmark
from lednet.inference.predictor import Predictor
from lednet.metrics import ConfusionMatrix

SCRIPT = "utils/export_model.py"
SIZE = (71, 105)
META = {
    "dataset": "Streets, näher",
    "classes": [f"class {i}" for i in range(19)],
    "colors": [[i, 2 * i, 255 - i] for i in range(19)],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "size": list(SIZE),
}
NORMALIZATION = META["mean"], META["std"]
every_format = pytest.mark.parametrize("format", tuple(FORMATS))


def need(format: str, *extra: str, dynamic: bool = False) -> None:
    need_packages(*FORMATS[format].packages, *extra)
    if dynamic and torch.__version__.startswith("2.6."):
        pytest.skip("--dynamic needs a torch newer than 2.6")


@pytest.fixture(scope="module", autouse=True)
def short_stages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lednet.model, "ENCODER_STAGES", SHORT_STAGES)
        yield


@functools.cache
def street_like(*shape: int) -> np.ndarray:
    """Images (*shape, 3) with regions of different colours, and some noise."""
    rng = np.random.default_rng(sum(shape))
    coarse = torch.from_numpy(rng.uniform(0, 255, (shape[0], 3, 4, 5)))
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="bicubic").permute(0, 2, 3, 1)
    noisy = smooth.numpy() + rng.normal(0, 12, (*shape, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def normalized(images: np.ndarray) -> torch.Tensor:
    """Computed independently of the exported graph."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    for channel, (mean, std) in enumerate(zip(*NORMALIZATION, strict=True)):
        x[:, channel] = (x[:, channel] - mean) / std
    return x


@torch.no_grad()
def diverse_net(variant: str = "d20", outputs: int = 20) -> LEDNet:
    """A network that predicts many classes: the means of their logits are made equal."""
    net = formula_net(variant, outputs)
    features = net.encoder(normalized(street_like(2, 72, 104)))
    convolution, norm, relu = net.decoder.pooled
    norm.weight *= 0.05  # the global pooling must not decide alone
    pooled = norm(convolution(features.mean(dim=(2, 3), keepdim=True)))
    means = (net.decoder(features) - relu(pooled)).mean(dim=(0, 2, 3))
    norm.bias += means.max() - means + 1 - pooled.mean(dim=(0, 2, 3))
    return net


@torch.no_grad()
def network_logits(net: LEDNet, images: np.ndarray) -> np.ndarray:
    return net.decoder(net.encoder(normalized(images))).numpy()


@torch.no_grad()
def network_labels(net: LEDNet, images: np.ndarray, classes: int = 5) -> np.ndarray:
    labels = net(normalized(images)).argmax(dim=1).numpy()
    assert len(np.unique(labels)) >= classes  # a constant output would prove nothing
    return labels


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def net(short_stages):
    return diverse_net()


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    """Call it with a format for (path of labels, path of logits, parity), written once."""

    @functools.cache
    def exported(format: str) -> tuple[Path, Path, Parity]:
        need(format)
        folder, row = tmp_path_factory.mktemp(format), FORMATS[format]
        (folder / "logits").mkdir()
        path, logits = folder / f"net{row.suffix}", folder / f"logits/net{row.suffix}"

        def keep(file):
            for suffix in (row.suffix, *row.companions):
                shutil.copy(file.path.with_suffix(suffix), logits.with_suffix(suffix))

        images = [street_like(1, *SIZE)]
        return path, logits, export(net, META, path, format, SIZE, images, accept=keep)

    return exported


@pytest.fixture
def weights(net, tmp_path):
    save_checkpoint(tmp_path / "run/best.pth", net, META)
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(street_like(1, 70 + i, 100)[0]).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


@every_format
def test_exported_file_takes_read_only_images_without_a_warning(format, exported):
    run, images = load(exported(format)[0]), street_like(1, *SIZE)
    expected = run(images.copy())
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(images), expected)
        reference_logits(LEDNet(20).eval(), images, META)


@every_format
def test_export_fixed_size_equals_network(format, exported, net):
    path, _, parity = exported(format)
    assert parity.agreement >= 0.9999 and parity.max_difference < 1e-5 and parity.images == 1
    run, images = load(path), street_like(1, *SIZE)[:, ::-1]  # not contiguous
    found = run(images)
    assert found.dtype == np.uint8 and found.shape == (1, *SIZE)
    assert (found == network_labels(net, images.copy())).mean() >= 0.9999
    files = [file for file in path.parent.iterdir() if file.is_file()]
    assert {file.suffix for file in files} == {path.suffix, *FORMATS[format].companions}
    for file in files:
        assert b"export/wrappers.py" not in file.read_bytes(), f"{file}: a path of this machine"
    expected = {"lednet": lednet.__version__, "dataset": META["dataset"], "output": "labels"}
    assert expected.items() <= run.metadata.items()
    for key in ("classes", "colors", "mean", "std", "size"):
        assert json.loads(run.metadata[key]) == META[key], key
    assert json.loads(run.metadata["outputs"]) == 20
    assert run.bounds == ((1, 1), (71, 71), (105, 105))
    for shape, words in (
        ((1, 64, 105), "batch 1, height 71 and width 105, not 1 x 64 x 105"),
        ((2, 71, 105), "not 2 x 71 x 105"),
    ):
        with pytest.raises(UserError, match=words):
            run(street_like(*shape))
    with pytest.raises(UserError, match="8-bit RGB"):
        run(np.zeros((1, *SIZE, 3), dtype=np.float32))


@pytest.mark.parametrize(("format", "least"), [("onnx", 1), ("openvino", 8)])
def test_export_dynamic_takes_any_size(format, least, net, tmp_path):
    need(format, dynamic=True)
    path = tmp_path / f"net{FORMATS[format].suffix}"
    module = EndToEndModel(net, *NORMALIZATION, output="labels")
    FORMATS[format].write(module, path, ExportOptions((1, *SIZE), dynamic=True))
    run = load(path)
    assert run.bounds == ((1, None), (least, None), (least, None))
    for shape, classes in (((1, 65, 65), 5), ((3, 131, 66), 5), ((1, 8, 9), 1), ((2, 33, 8), 1)):
        images = street_like(*shape)
        assert (run(images) == network_labels(net, images, classes)).mean() >= 0.9999, shape


def test_onnx_file_has_expected_graph(exported):
    path, _, _ = exported("onnx")
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path, load_external_data=False).graph
    assert [i.name for i in graph.input] == ["image"]
    assert [(o.name, o.type.tensor_type.elem_type) for o in graph.output] == [
        ("labels", onnx.TensorProto.UINT8)
    ]
    assert not any(i.data_location for i in graph.initializer)  # weights inside
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    assert len(resizes) == 4
    for node in resizes:
        assert any(attribute.s == b"align_corners" for attribute in node.attribute)


@pytest.mark.parametrize("size", [(300, 400), SIZE, (1, 1)])
def test_onnx_snippet_of_the_docs_equals_predictor(exported, net, tmp_path, size):
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    file = exported("onnx")[1]
    shutil.copy(file, tmp_path / "best.onnx")
    image = Image.fromarray(street_like(1, *SIZE)[0]).resize(size[::-1])
    image.save(tmp_path / "street.jpg", quality=95)
    program = snippet + "\nimport sys\nassert 'torch' not in sys.modules\nnp.save('labels', labels)"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    expected = Predictor(file)(tmp_path / "street.jpg").labels
    found = np.load(tmp_path / "labels.npy")
    assert found.shape == expected.shape and (found == expected).mean() >= 0.999


def test_torch_archive_runs_without_repository(exported, net):
    path, images = exported("torch")[0], street_like(1, *SIZE)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "lednet"]:
            patch.setitem(sys.modules, name, None)  # importing it fails
        found = torch.export.load(path).module()(torch.from_numpy(images)).numpy()
    assert (found == network_labels(net, images)).mean() >= 0.9999


# Predictor with an exported file


@every_format
def test_predictor_exported_file_equals_network(format, exported, net):
    _, path, _ = exported(format)
    images = torch.from_numpy(street_like(3, 100, 140)).permute(0, 3, 1, 2)
    plain, predictor = (
        Predictor(net, SIZE, *NORMALIZATION, backend="eager"),
        Predictor(path),
    )
    assert predictor.size == SIZE and predictor.meta["classes"] == META["classes"]
    assert predictor.backend == load(path).runtime
    expected = plain.label_maps(images)[0]
    found = predictor.label_maps(images)[0]  # three images, one by one
    assert found.unique().numel() > 4 and (found == expected).float().mean() >= 0.9999
    assert (predictor(images[1]) == expected[1].numpy()).mean() >= 0.9999
    if format == "torch":
        cards = [benchmark(p, SIZE, warmup=0, runs=1) for p in (plain, predictor)]
        for key in ("parameters", "gmacs", "precision", "batch_norm", "forward_size"):
            assert cards[0][key] == cards[1][key], key
        assert cards[1]["backend"] == "torch.export"


def test_predictor_options_fixed_by_file_are_rejected(exported, net, tmp_path):
    labels, path, _ = exported("torch")
    foreign = tmp_path / "net.pt2"
    FORMATS["torch"].write(EndToEndModel(net), foreign, ExportOptions((1, *SIZE)))
    for file, scheme, options, words in (
        (path, None, {"backend": "eager"}, "run by torch.export: leave --backend out"),
        (path, None, {"precision": "bf16"}, "--precision fp32, not bf16"),
        (path, None, {"device": torch.device("cuda")}, "--device cpu, not cuda"),
        (path, camvid_scheme(), {}, "20 outputs, CamVid needs 12"),
        (labels, None, {}, "--output logits"),
        (foreign, None, {}, "does not say what network"),
    ):
        with pytest.raises(UserError, match=words):
            Predictor(file, scheme=scheme, **options)
    with pytest.raises(UserError, match="height 71 and width 105, not 1 x 64 x 105"):
        Predictor(path, (64, None))(street_like(1, *SIZE)[0])


# int8


def test_int8_export_is_small_and_close(run_inside, photos, tmp_path):
    need("openvino", "nncf")
    torch.manual_seed(0)
    net = LEDNet(20).train()
    with torch.no_grad():
        for _ in range(20):  # statistics as after training; those of `diverse_net` overflow
            net(normalized(street_like(2, 72, 104)))
    save_checkpoint(tmp_path / "best.pth", net, META)
    result = run_inside(SCRIPT, "--weights", tmp_path / "best.pth", "--format", "openvino",
                        "--output", "logits", "--precision", "int8", "--calibrate", photos,
                        "--min-agreement", 0).check()  # fmt: skip
    assert "over 3 images" in result.stdout
    path = tmp_path / "best-int8.xml"
    parameters = sum(p.numel() for p in net.parameters())
    assert path.with_suffix(".bin").stat().st_size < 2 * parameters  # 4 bytes each in float32
    predictor = Predictor(path)
    assert predictor.precision == "int8"
    images = torch.from_numpy(street_like(1, *SIZE)).permute(0, 3, 1, 2)
    plain = Predictor(net.eval(), SIZE, *NORMALIZATION, backend="eager")
    expected, found = (p.forward_logits(p.prepare(images)) for p in (plain, predictor))
    error = ((found - expected).norm() / (expected - expected.mean()).norm()).item()
    assert 1e-4 < error < 0.1


def test_int8_export_miou_drop_writes_nothing(run_inside, camvid, tmp_path, monkeypatch):
    """With a format that does not quantize: the scores are replaced as well."""
    monkeypatch.setitem(FORMATS, "torch", FORMATS["torch"]._replace(int8="json"))
    scores = iter((0.5, 0.49))
    monkeypatch.setattr(ConfusionMatrix, "mean_iou", lambda self: next(scores))
    save_checkpoint(tmp_path / "best.pth", diverse_net(outputs=12), {"size": [48, 64]})
    result = run_inside(SCRIPT, "--weights", tmp_path / "best.pth", "--format", "torch",
                        "--output", "logits", "--precision", "int8", "--calibrate",
                        camvid / "train", "--dataset", "camvid", "--datadir", camvid)  # fmt: skip
    assert result.returncode == 1
    assert "mIoU on the 3 val images of CamVid: 50.00 before, 49.00" in result.stdout
    assert re.search(r"mIoU .* from 50.00 to 49.00.* nothing was written", result.stderr)
    assert not list(tmp_path.glob("*int8*"))


# The parity check


def test_check_parity_counts_pixels_and_relates_logits(net):
    images = [street_like(1, *SIZE), street_like(2, 67, 101)]

    def seven_labels_wrong(batch):
        labels = network_labels(net, batch)
        labels[0, 0, :7] = 255
        return labels

    def first_logit_off(batch, error=0.01, batch_size=1):
        logits = reference_logits(net, batch, META)
        if len(batch) == batch_size:
            logits[0, 0, 0, 0] += error * logits.abs().max()
        return logits.numpy()

    parity = check_parity(seven_labels_wrong, net, META, images)
    assert parity == Parity(1 - 14 / (71 * 105 + 2 * 67 * 101), None, 3)
    for run, *run_logits in ([first_logit_off], [seven_labels_wrong, first_logit_off]):
        parity = check_parity(run, net, META, images[:1], *run_logits)
        assert parity.max_difference == pytest.approx(0.01, rel=1e-3) and parity.agreement > 0.9
    for size in (1, 2):  # NaN in the first or in the last batch
        broken = functools.partial(first_logit_off, error=np.nan, batch_size=size)
        assert np.isnan(check_parity(broken, net, META, images).max_difference), size
    with pytest.raises(ValueError, match="no images"):
        check_parity(seven_labels_wrong, net, META, [])


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        (Parity(0.9998, 0.0, 4), "agrees with the network in 0.999800"),
        (Parity(1.0, 2e-3, 4), r"differ by 2.0e-03 of the largest"),
        (Parity(1.0, float("nan"), 4), "differ by nan"),
    ],
)
def test_require_parity_below_thresholds_fails(parity, words):
    for accepted in (Parity(0.9999, 1e-3, 4), Parity(1.0, None, 4)):
        require_parity(accepted, 0.9999, 1e-3)
    with pytest.raises(ParityError, match=words):
        require_parity(parity, 0.9999, 1e-3)


def test_export_failing_parity_keeps_existing_files(net, tmp_path, monkeypatch):
    """Both files of a format that has two; only the parity check is real here."""

    def write(module, path, options):
        path.write_text("newer")
        path.with_suffix(".bin").write_text("newer")

    def zeros(images):
        return np.zeros((1, 20, 9, 14), dtype=np.float32)

    row = Format(".xml", (), write, lambda path, options: zeros, companions=(".bin",))
    monkeypatch.setitem(FORMATS, "openvino", row)
    pair = [tmp_path / "net.bin", tmp_path / "net.xml"]
    for file in pair:
        file.write_text("older")
    arguments = net, META, pair[1], "openvino", SIZE, [street_like(1, *SIZE)]
    with pytest.raises(ParityError):
        export(*arguments)
    assert {file: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(pair, "older")
    export(*arguments, min_agreement=0, max_difference=np.inf)
    assert {file: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(pair, "newer")


# The script


def test_script_dynamic_writes_beside_weights(run_inside, weights, net):
    need("torch", dynamic=True)
    result = run_inside(SCRIPT, "--weights", weights, "--format", "torch",
                        "--output", "logits", "--dynamic").check()  # fmt: skip
    assert "over 9 images" in result.stdout and "pixels agree" in result.stdout
    run = load(weights / "best.pt2")
    assert run.metadata["output"] == "logits"
    for shape in ((1, 80, 90), (3, 131, 66)):
        assert_close(run(street_like(*shape)), network_logits(net, street_like(*shape)))
    with pytest.raises(UserError, match="height 65 or more and width 65 or more"):
        run(street_like(1, 64, 80))


def test_script_own_images_and_d128_weights_without_metadata(run_inside, photos, tmp_path):
    need("onnx")
    net = diverse_net("d128", outputs=7)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    arguments = ("--weights", tmp_path / "net.pth", "--output", "logits", "--height", 71,
                 "--width", 105, "--check-images", photos)  # fmt: skip
    result = run_inside(SCRIPT, *arguments).check()
    assert "over 3 images: 1.0000" in result.stdout
    exported, images = load(tmp_path / "net.onnx", threads=1), street_like(1, *SIZE)
    assert exported(images).dtype == np.float32 and "classes" not in exported.metadata
    with torch.no_grad():
        expected = net.decoder(net.encoder(torch.from_numpy(images).permute(0, 3, 1, 2) / 255))
    assert_close(exported(images), expected.numpy())


def test_script_wrong_graph_writes_nothing(run_inside, weights, tmp_path, monkeypatch):
    def fuse_wrongly(net):
        fused = fuse_conv_bn(net)
        fused.decoder.mid[0].weight.mul_(1.05)
        return fused

    monkeypatch.setattr(lednet.exporting.wrappers, "fuse_conv_bn", fuse_wrongly)
    arguments = ("--weights", weights, "--format", "torch", "--output", "logits", "--out")
    result = run_inside(SCRIPT, *arguments, tmp_path / "out/new.pt2")
    assert result.returncode == 1 and "nothing was written" in result.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--out net.pt2 --format onnx", "none of .onnx"),
        ("--height 0", "--height: .0. is not"),
        ("--check-images {tmp}/run", "no image"),
        ("--check-images {tmp}/broken --format torch --output logits", "is damaged"),
        ("--format executorch --dynamic", "fixed size|pip install executorch"),
        ("--weights {tmp}/bare.pth", "give --height and --width"),
        ("--precision int8", "--calibrate"),
        ("--val-names a", "give its folder with --datadir"),
        ("--out {tmp}/net.xyz", r"cannot write .*none of \.onnx"),
        ("--calibrate {tmp}", "leave them out"),
        ("--precision int8 --format openvino --calibrate {tmp}/run", "no image"),
        ("--precision int8 --calibrate {tmp}/photos --format onnx", "int8 is not for onnx: give"),
    ],
)
def test_script_wrong_options_exit_status_2(arguments, words, run_inside, weights, photos, net):
    need("onnx")
    tmp_path = weights.parent
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/street.png").write_bytes(b"no image")
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments.split()]
    result = run_inside(SCRIPT, "--weights", weights, *arguments)
    assert result.returncode == 2
    assert re.search(words, result.stderr), result.stderr
    assert "error: " in result.stderr and "Traceback" not in result.stderr


def test_missing_packages_are_named(run_inside, weights, monkeypatch):
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run_inside(SCRIPT, "--weights", weights, "--format", "onnx")
    assert result.returncode == 2
    assert "pip install onnxscript onnxruntime\n" in result.stderr
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load("net.onnx")


def test_incompatible_executorch_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", types.ModuleType("executorch"))
    partitioner = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    monkeypatch.setitem(sys.modules, partitioner, None)
    monkeypatch.setattr(executorch.importlib.metadata, "version", lambda name: "0.1")
    options = ExportOptions((1, *SIZE))
    with pytest.raises(UserError, match=r"executorch 0.1 .* torch .* executorch==1.5.1"):
        FORMATS["executorch"].write(EndToEndModel(net), tmp_path / "net.pte", options)


@every_format
def test_load_missing_or_damaged_file_is_named(format, tmp_path):
    need(format)
    path = tmp_path / f"net{FORMATS[format].suffix}"
    with pytest.raises(UserError, match="no exported network at"):
        load(path)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be opened"):
        load(path)
    with pytest.raises(UserError, match=r"one of \.onnx, \.xml"):
        load(tmp_path / "net.tflite")
