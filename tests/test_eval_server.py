"""test/eval_cityscapes_server.py and test/eval_forward_time.py on toy streets."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import run_main
from make_golden import formula_state
from PIL import Image

from lednet import LEDNet
from lednet.checkpoint import load_state, save_checkpoint
from lednet.data.dataset import read_label
from lednet.data.labels import cityscapes_scheme
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.evaluation.cityscapes_evaluator import (
    find_frames,
    find_predictions,
    require_label_ids,
    score_predictions,
)
from lednet.evaluation.cityscapes_metrics import BenchmarkScores, count_image
from lednet.inference.progress_log import ProgressLog

SCRIPT = "test/eval_cityscapes_server.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
COMMON = ("--device", "cpu", "--num-workers", 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run folder with deterministic weights for 48x96."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    net = LEDNet(20)
    load_state(net, formula_state(net), "formula")
    save_checkpoint(folder / "best.pth", net, {"size": [48, 96], "dataset": "Cityscapes"})
    return folder


@pytest.fixture
def evaluate(run_inside, toy_cityscapes, weights):
    """Run the script on the toy val split, without measuring the speed."""

    def run(*flags: object, root: Path = toy_cityscapes):
        source = () if "--predictions" in flags else ("--weights", weights)
        return run_inside(SCRIPT, *source, "--datadir", root, *COMMON, "--no-speed", *flags)

    return run


def read(path: Path) -> dict:
    """Figures of a results file or of an output folder, without options and speed."""
    figures = json.loads((path / "results.json" if path.is_dir() else path).read_text())
    return {key: value for key, value in figures.items() if key not in ("options", "speed")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, toy_cityscapes, weights) -> SimpleNamespace:
    """Output folder and printed text of a complete evaluation; read-only."""
    out = tmp_path_factory.mktemp("reference") / "out"
    stdout = run_main(
        SCRIPT, "--weights", weights, "--datadir", toy_cityscapes, "--out", out, *COMMON,
        "--report", "--json", out.with_suffix(".json"), "--warmup", 0, "--runs", 2,
    )  # fmt: skip
    return SimpleNamespace(out=out, stdout=stdout)


def test_script_scores_measures_and_writes_all_results(reference):
    out, stdout = reference.out, reference.stdout
    figures = json.loads((out / "results.json").read_text())
    assert figures == json.loads(out.with_suffix(".json").read_text())
    assert figures["images"] == 3
    assert sum(map(sum, figures["confMatrix"])) == 3 * 64 * 128
    assert sum(map(sum, figures["atNetworkSize"]["confMatrix"])) == 3 * 48 * 96
    assert figures["speed"]["parameters"] == 925_663
    for words in ("network alone", "image to labels", "p95", "925,663", "folded", "48x96"):
        assert words in stdout
    means = {line.split()[0]: line.split()[1:] for line in stdout.splitlines() if line.strip()}
    assert means["road"][0] == f"{figures['classScores']['road']:.4f}"
    assert means["mean"] == [  # of the categories, which are printed last
        f"{figures['averageScoreCategories']:.4f}",
        f"{figures['averageScoreInstCategories']:.4f}",
        f"{figures['atNetworkSize']['averageScoreCategories']:.4f}",
    ]
    names = sorted(path.name for path in (out / "predictions").iterdir())
    assert len(names) == 3 and all(name.endswith("_pred_labelIds.png") for name in names)
    image = Image.open(out / "predictions" / names[0])
    assert image.mode == "L" and image.size == (128, 64)
    page = (out / "report.html").read_text()
    assert all(name.removesuffix("_pred_labelIds.png") in page for name in names)


@pytest.mark.parametrize("flags", [("--at", "full"), ("--at", "network"), ("--scales", 0.75, 1,
                                                                          "--flip")])  # fmt: skip
def test_scores_equal_those_of_eval_iou(
    evaluate, reference, run_inside, toy_cityscapes, weights, tmp_path, flags
):
    run_inside(
        "test/eval_iou.py", "--weights", weights, "--datadir", toy_cityscapes, *COMMON, *flags,
        "--json", tmp_path / "iou.json",
    ).check()  # fmt: skip
    figures = read(reference.out)
    if "network" in flags:
        figures = figures["atNetworkSize"]
    elif "--flip" in flags:
        assert evaluate("--out", tmp_path / "out", *flags).returncode == 0
        before, figures = figures, read(tmp_path / "out")
        assert figures["averageScoreClasses"] != pytest.approx(before["averageScoreClasses"], 1e-4)
    found = json.loads((tmp_path / "iou.json").read_text())
    assert found["miou"] == pytest.approx(figures["averageScoreClasses"], abs=1e-4)


def test_predictions_on_disk_give_the_same_results_without_images(
    evaluate, reference, toy_cityscapes, tmp_path
):
    shutil.copytree(toy_cityscapes / "gtFine", tmp_path / "data" / "gtFine")
    flags = ("--predictions", reference.out / "predictions", "--json", tmp_path / "f.json")
    evaluate(*flags, root=tmp_path / "data").check()
    expected = read(reference.out)
    del expected["atNetworkSize"]
    assert read(tmp_path / "f.json") == expected
    assert evaluate(*flags, "--report", tmp_path / "r.html").returncode == 0
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_two_processes_give_the_same_results(
    run_script, evaluate, reference, toy_cityscapes, weights, tmp_path, monkeypatch
):
    run_script(
        SCRIPT, "--weights", weights, "--datadir", toy_cityscapes, *COMMON, "--no-speed", "--out",
        tmp_path / "two", launcher=TORCHRUN,
    ).check()  # fmt: skip
    assert read(tmp_path / "two") == read(reference.out)
    # The first of two processes scores every second prediction.
    context = DistributedContext(0, 2, torch.device("cpu"))
    name = "lednet.cli.evaluate_cityscapes.init_distributed"
    monkeypatch.setattr(name, lambda device: context)
    monkeypatch.setattr(DistributedContext, "all_gather", lambda self, values: values)
    flags = ("--predictions", reference.out / "predictions", "--json", tmp_path / "f.json")
    assert evaluate(*flags).returncode == 0
    assert read(tmp_path / "f.json")["images"] == 2


def test_interrupted_run_resumes_in_the_default_folder(evaluate, reference, weights):
    out = weights.parent / "run-eval-val"
    assert evaluate("--max-images", 2).returncode == 0
    log = out / "progress-0.jsonl"
    settings, first, second = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(settings + first + second[:40])  # the last line is incomplete
    kept = sorted((out / "predictions").iterdir())[0]
    before = kept.stat().st_mtime_ns
    result = evaluate().check()
    assert "1 of 3 images are done already" in result.stdout
    assert kept.stat().st_mtime_ns == before and read(out) == read(reference.out)
    assert len(log.read_text().splitlines()) == 4
    kept.unlink()
    assert "2 of 3 images are done" in evaluate().stdout
    assert kept.is_file() and read(out) == read(reference.out)


def test_run_with_other_settings_is_refused_unless_overwritten(evaluate, reference, tmp_path):
    out = Path(shutil.copytree(reference.out, tmp_path / "out"))
    flags = ("--out", out, "--batch-size", 3, "--no-fold")
    evaluate(*flags, "--flip").assert_error("flip False, not True")
    result = evaluate(*flags, "--overwrite")
    assert result.returncode == 0 and "done already" not in result.stdout
    expected = read(reference.out)["averageScoreClasses"]
    assert read(out)["averageScoreClasses"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [("--tile", 32, 48, "--overlap", 16),
     ("--height", 64, "--width", 128, "--precision", "bf16", "--num-workers", 1)],
)  # fmt: skip
def test_options_of_the_network_run(evaluate, tmp_path, flags):
    evaluate("--out", tmp_path / "out", "--max-images", 1, *flags).check()
    assert read(tmp_path / "out")["images"] == 1


def test_test_split_without_labels_gives_a_submission(evaluate, toy_cityscapes, tmp_path):
    shutil.copytree(toy_cityscapes / "leftImg8bit", tmp_path / "data" / "leftImg8bit")
    result = evaluate("--subset", "test", "--out", tmp_path / "out", root=tmp_path / "data").check()
    assert result.stderr.count("warning") == 1 and "the test split has 1525" in result.stderr
    with zipfile.ZipFile(tmp_path / "out" / "upload.zip") as archive:
        names = archive.namelist()
        ids = np.array(Image.open(io.BytesIO(archive.read(names[0]))))
    images = (tmp_path / "data/leftImg8bit/test").rglob("*.png")
    assert sorted(names) == sorted(p.name.replace("leftImg8bit", "pred_labelIds") for p in images)
    assert ids.shape == (64, 128) and ids.max() <= 33


def save(mode: str, size: tuple[int, int] = (128, 64), value: int = 0):
    return lambda path: Image.new(mode, size, value).save(path)


def copy_as(name: str):
    return lambda path: shutil.copy(path, path.with_name(name.format(path.stem)))


PREDICTION_FAULTS = {
    "size": (save("L", (64, 32)), "{path.name}: .*is 128x64, the prediction for it 64x32"),
    "id 34": (save("L", value=34), "{path} holds the id 34, which Cityscapes does not have"),
    "void of trainIds": (save("L", value=255), "{path} holds 255, the void of trainIds"),
    "jpeg": (lambda path: path.rename(path.with_suffix(".jpg")), "labelIds.jpg cannot hold ids"),
    "mode": (save("RGB"), r"{path} is a color image \(mode RGB\)"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:90]), "{path} is damaged"),
    "missing": (Path.unlink, "1 of 3 frames have no prediction"),
    "without ground truth": (
        copy_as("nowhere_000001_000019_pred.png"),
        r"1 of 4 predictions have no ground truth \(nowhere_000001_000019\)",
    ),
    "name": (lambda path: path.rename(path.with_name("first.png")), "first.png is not named"),
    "duplicate": (copy_as("{}_again.png"), "are of one frame: keep one"),
}


@pytest.mark.parametrize("fault", PREDICTION_FAULTS)
def test_faulty_prediction_is_refused(reference, toy_cityscapes, tmp_path, fault):
    folder = Path(shutil.copytree(reference.out / "predictions", tmp_path / "pred"))
    path = sorted(folder.iterdir())[1]
    damage, message = PREDICTION_FAULTS[fault]
    damage(path)
    frames, scheme = find_frames(toy_cityscapes, "val", images=False)
    with pytest.raises(UserError, match=message.format(path=path)) as error:
        files = find_predictions(folder, frames)
        list(score_predictions(frames, scheme, [files[frame.name] for frame in frames]))
    assert "\n" not in str(error.value)


def test_predictions_in_train_ids_are_recognized(reference, toy_cityscapes):
    frames, scheme = find_frames(toy_cityscapes, "val", images=False)
    lut = cityscapes_scheme().lut
    for void in (0, 19):  # of trainIds; 255 is refused when it is read
        total = BenchmarkScores()
        for frame in frames:
            truth = read_label(frame.label, scheme)
            train_ids = np.where(lut[truth] == 255, void, lut[truth]).astype(np.uint8)
            total.add(count_image(train_ids, truth))
        with pytest.raises(
            UserError, match=r"pred agree with 100% .* if read as trainIds, with 0%"
        ):
            require_label_ids(total, "pred")
    one = np.full((2, 2), 7, np.uint8)
    both = np.array([[7, 8], [7, 7]], np.uint8)
    with pytest.raises(UserError, match="trainIds"):
        require_label_ids(count_image(one * 0, one), "pred")
    require_label_ids(count_image(both * 0, both), "pred")  # void everywhere
    require_label_ids(count_image(both, both), "pred")


def test_predictions_beside_hidden_files_and_below_links_are_found(
    reference, toy_cityscapes, tmp_path
):
    frames, _ = find_frames(toy_cityscapes, "val", images=False)
    folder = tmp_path / "pred"
    folder.mkdir()
    (folder / "linked").symlink_to(reference.out / "predictions")
    for name in (f"._{frames[0].name}_pred.png", f"@eaDir/{frames[0].name}.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    found = find_predictions(folder, frames)
    assert {path.parent.name for path in found.values()} == {"linked"}


def test_incomplete_ground_truth_is_refused(evaluate, toy_cityscapes, tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(toy_cityscapes, root)
    first, second = sorted((root / "gtFine/val").rglob("*_labelIds.png"))[:2]
    first.unlink()
    evaluate("--out", out, root=root).assert_error("1 of 3 images have no label")
    shutil.copy(second, first)
    first.with_name(first.name.replace("labelIds", "instanceIds")).unlink()
    with pytest.raises(UserError, match=r"1 of 3 labels have no \*_instanceIds.png"):
        find_frames(root, "val")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--subset", "test", "--report"), ["withheld"]),
        (("--weights", "w.pth"), ["w.pth has 12 outputs", "Cityscapes needs 20"]),
    ],
)
def test_invalid_options_are_refused(evaluate, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("w.pth", LEDNet(12), {"size": [48, 96]})
    evaluate("--out", tmp_path / "out", *flags).assert_error(*words)
    assert not (tmp_path / "out").exists()


def test_progress_log_refuses_other_settings_and_drops_a_partial_header(tmp_path):
    log = ProgressLog(tmp_path, {"size": (1, 2)})
    log.add({"name": "a"})
    log.add({"name": "b"})
    assert set(ProgressLog(tmp_path, {"size": (1, 2)}, rank=1).entries) == {"a", "b"}
    with pytest.raises(UserError, match=r"size \[1, 2\], not \[3, 4\]"):
        ProgressLog(tmp_path, {"size": (3, 4)})
    (tmp_path / "progress-0.jsonl").write_bytes(b'{"size": [1')
    log = ProgressLog(tmp_path, {"size": (1, 2)})
    assert log.entries == {}
    log.add({"name": "c"})
    assert set(ProgressLog(tmp_path, {"size": (1, 2)}).entries) == {"c"}


def test_forward_time_needs_no_data(run_inside, tmp_path):
    result = run_inside(
        "test/eval_forward_time.py", "--variant", "d128", "--height", 32, "--width", 64,
        "--image-height", 64, "--image-width", 128, "--batch-size", 2, "--runs", 2, "--warmup", 1,
        "--device", "cpu", "--backend", "eager", "--json", tmp_path / "card.json",
    ).check()  # fmt: skip
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["parameters"] == 2_288_140 and card["batch"] == 2
    assert card["network_size"] == [32, 64] and card["image_size"] == [64, 128]
    assert "2,288,140" in result.stdout and "p95" in result.stdout
