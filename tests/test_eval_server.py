"""test/eval_cityscapes_server.py as a user runs it, on toy streets."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from make_golden import formula_state
from PIL import Image
from test_bad_input import assert_refused

from lednet import LEDNet
from lednet.checkpoint import load_state, save_checkpoint
from lednet.errors import UserError
from lednet.evaluation.cityscapes_evaluator import find_frames, find_predictions, score_predictions
from lednet.inference.progress_log import ProgressLog

SCRIPT = "test/eval_cityscapes_server.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
OFFICIAL_KEYS = {
    "confMatrix", "priors", "labels", "classScores", "classInstScores", "categoryScores",
    "categoryInstScores", "averageScoreClasses", "averageScoreInstClasses",
    "averageScoreCategories", "averageScoreInstCategories",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run folder with weights by formula, for 48x96."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    net = LEDNet(20)
    load_state(net, formula_state(net), "formula")
    save_checkpoint(folder / "best.pth", net, {"size": [48, 96], "dataset": "Cityscapes"})
    return folder


@pytest.fixture
def evaluate(run_script, run_inside, toy_cityscapes, weights):
    """Run the script on the toy's val split; `--no-speed` unless asked for.

    With `launcher` in processes of its own, () standing for a single one.
    """

    def run(*flags: object, root: Path = toy_cityscapes, speed: bool = False, launcher=None):
        source = () if "--predictions" in flags else ("--weights", weights)
        timing = ("--warmup", 0, "--runs", 2) if speed else ("--no-speed",)
        command = (
            SCRIPT, *source, "--datadir", root, "--device", "cpu", "--num-workers", 1, *timing,
            *flags,
        )  # fmt: skip
        if launcher is None:
            return run_inside(*command)
        return run_script(*command, launcher=launcher)

    return run


def read(path: Path) -> dict:
    figures = json.loads(path.read_text())
    figures.pop("options")
    return figures


@pytest.fixture(scope="module")
def reference(tmp_path_factory, toy_cityscapes, weights) -> Path:
    """The folder of one whole evaluation, not to be changed."""
    import subprocess
    import sys

    from conftest import ROOT

    out = tmp_path_factory.mktemp("reference") / "out"
    subprocess.run(
        [sys.executable, ROOT / SCRIPT, "--weights", weights, "--datadir", toy_cityscapes,
         "--out", out, "--device", "cpu", "--no-speed", "--num-workers", "1"],
        check=True, capture_output=True, env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return out


def test_one_command_scores_measures_and_writes(evaluate, weights, tmp_path):
    out, figures_file = tmp_path / "out", tmp_path / "figures.json"
    result = evaluate("--out", out, "--json", figures_file, "--report", speed=True, launcher=())
    assert result.returncode == 0, result.stderr
    figures = json.loads(figures_file.read_text())
    assert figures == json.loads((out / "results.json").read_text())
    assert figures.keys() >= OFFICIAL_KEYS and figures["images"] == 3
    assert sum(map(sum, figures["confMatrix"])) == 3 * 64 * 128
    assert sum(map(sum, figures["atNetworkSize"]["confMatrix"])) == 3 * 48 * 96
    assert figures["speed"]["parameters"] == 925_663
    for words in ("network alone", "image to labels", "p95", "925,663", "folded", "48x96"):
        assert words in result.stdout
    assert f"{figures['averageScoreClasses']:.4f}" in result.stdout
    assert f"{figures['averageScoreInstCategories']:.4f}" in result.stdout
    assert f"{figures['atNetworkSize']['averageScoreClasses']:.4f}" in result.stdout
    assert "3/3" in result.stderr  # the progress bar

    names = sorted(path.name for path in (out / "predictions").iterdir())
    assert len(names) == 3 and all(name.endswith("_pred_labelIds.png") for name in names)
    image = Image.open(out / "predictions" / names[0])
    assert image.mode == "L" and image.size == (128, 64)
    page = (out / "report.html").read_text()
    assert all(name.removesuffix("_pred_labelIds.png") in page for name in names)


def test_default_folder_lies_beside_the_run(evaluate, weights):
    assert evaluate("--max-images", 1).returncode == 0
    assert (weights.parent / "run-eval-val" / "results.json").is_file()
    shutil.rmtree(weights.parent / "run-eval-val")


def test_scores_are_those_of_eval_iou(reference, run_script, toy_cityscapes, weights, tmp_path):
    figures = read(reference / "results.json")
    for at, ours in (("full", figures), ("network", figures["atNetworkSize"])):
        out = tmp_path / f"{at}.json"
        result = run_script(
            "test/eval_iou.py", "--weights", weights, "--datadir", toy_cityscapes, "--at", at,
            "--json", out, "--device", "cpu",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert ours["averageScoreClasses"] == pytest.approx(
            json.loads(out.read_text())["miou"], abs=1e-4
        )


def test_files_on_disk_have_the_same_figures(evaluate, reference, tmp_path):
    result = evaluate("--predictions", reference / "predictions", "--json", tmp_path / "f.json",
                      "--report", tmp_path / "r.html")  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures, expected = read(tmp_path / "f.json"), read(reference / "results.json")
    assert {key: figures[key] for key in OFFICIAL_KEYS} == {
        key: expected[key] for key in OFFICIAL_KEYS
    }
    assert figures["pixelAccuracy"] == expected["pixelAccuracy"]
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_images_are_not_needed_for_files_on_disk(evaluate, reference, toy_cityscapes, tmp_path):
    shutil.copytree(toy_cityscapes / "gtFine", tmp_path / "data" / "gtFine")
    flags = ("--predictions", reference / "predictions", "--json", tmp_path / "f.json")
    assert evaluate(*flags, root=tmp_path / "data").returncode == 0
    assert read(tmp_path / "f.json")["images"] == 3


def test_two_processes_give_the_same_file(evaluate, reference, tmp_path):
    result = evaluate("--out", tmp_path / "two", launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "two" / "results.json") == read(reference / "results.json")
    flags = ("--predictions", tmp_path / "two" / "predictions", "--json", tmp_path / "f.json")
    assert evaluate(*flags, launcher=TORCHRUN).returncode == 0
    assert read(tmp_path / "f.json")["confMatrix"] == read(reference / "results.json")["confMatrix"]


def test_interrupted_run_goes_on(evaluate, reference, tmp_path):
    out = tmp_path / "out"
    assert evaluate("--out", out, "--max-images", 2).returncode == 0
    journal = out / "progress-0.jsonl"
    settings, first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(settings + first + second[:40])  # cut off in the middle of a line
    kept = sorted((out / "predictions").iterdir())[0]
    before = kept.stat().st_mtime_ns
    result = evaluate("--out", out)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 images are done already" in result.stdout
    assert kept.stat().st_mtime_ns == before
    assert read(out / "results.json") == read(reference / "results.json")
    assert len(journal.read_text().splitlines()) == 4
    again = evaluate("--out", out)
    assert "3 of 3 images are done already" in again.stdout
    assert read(out / "results.json") == read(reference / "results.json")


def test_lost_prediction_is_made_again(evaluate, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    lost = next((tmp_path / "out" / "predictions").iterdir())
    lost.unlink()
    assert "2 of 3 images are done" in evaluate("--out", tmp_path / "out").stdout
    assert lost.is_file()


def test_other_settings_are_not_mixed(evaluate, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    assert_refused(evaluate("--out", tmp_path / "out", "--flip"), "flip False, not True")
    result = evaluate("--out", tmp_path / "out", "--flip", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "out" / "results.json") != read(reference / "results.json")


def test_averaged_answers_score_alike_in_eval_iou(
    evaluate, reference, run_inside, toy_cityscapes, weights, tmp_path
):
    flags = ("--scales", 0.75, 1, "--flip")
    assert evaluate("--out", tmp_path / "out", *flags).returncode == 0
    result = run_inside(
        "test/eval_iou.py", "--weights", weights, "--datadir", toy_cityscapes, *flags,
        "--json", tmp_path / "iou.json", "--device", "cpu", "--num-workers", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "iou.json").read_text())
    assert found["scales"] == [0.75, 1] and found["flip"] is True
    expected = read(tmp_path / "out" / "results.json")["averageScoreClasses"]
    assert found["miou"] == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(read(reference / "results.json")["averageScoreClasses"], 1e-4)


@pytest.mark.parametrize("flags", [("--batch-size", 3), ("--no-fold",)])
def test_options_that_do_not_change_the_answer(evaluate, reference, tmp_path, flags):
    assert evaluate("--out", tmp_path / "out", *flags).returncode == 0
    expected = read(reference / "results.json")["averageScoreClasses"]
    found = read(tmp_path / "out" / "results.json")["averageScoreClasses"]
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [("--scales", 0.75, 1, 1.25, "--flip"), ("--tile", 32, 48, "--overlap", 16),
     ("--height", 64, "--width", 128), ("--precision", "bf16")],
)  # fmt: skip
def test_options_run(evaluate, tmp_path, flags):
    result = evaluate("--out", tmp_path / "out", "--max-images", 1, *flags)
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "out" / "results.json")["images"] == 1


def test_upload_of_the_test_split_needs_no_labels(evaluate, toy_cityscapes, tmp_path):
    shutil.copytree(toy_cityscapes / "leftImg8bit", tmp_path / "data" / "leftImg8bit")
    result = evaluate("--subset", "test", "--out", tmp_path / "out", root=tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert "1525" in result.stderr.replace(",", "")  # says how many the benchmark has
    with zipfile.ZipFile(tmp_path / "out" / "upload.zip") as archive:
        names = archive.namelist()
        with archive.open(names[0]) as file:
            ids = np.array(Image.open(file))
    images = (tmp_path / "data/leftImg8bit/test").rglob("*.png")
    assert sorted(names) == sorted(
        path.name.replace("leftImg8bit", "pred_labelIds") for path in images
    )
    assert ids.shape == (64, 128) and ids.max() <= 33


# Bad input: one sentence, exit status 2.


@pytest.fixture
def predictions(reference, tmp_path) -> Path:
    """A folder of predictions that a test may damage."""
    shutil.copytree(reference / "predictions", tmp_path / "predictions")
    return tmp_path / "predictions"


@pytest.fixture
def refuse(toy_cityscapes, predictions):
    """Score the damaged folder; returns the one sentence it is refused with."""

    def run() -> str:
        frames, scheme = find_frames(toy_cityscapes, "val", images=False)
        with pytest.raises(UserError) as error:
            files = find_predictions(predictions, frames)
            list(score_predictions(frames, scheme, [files[frame.name] for frame in frames]))
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def test_prediction_of_another_size(predictions, refuse, evaluate, tmp_path):
    path = sorted(predictions.iterdir())[1]
    Image.new("L", (64, 32)).save(path)
    sentence = refuse()
    assert path.name in sentence and "is 128x64, the prediction for it 64x32" in sentence
    flags = ("--predictions", predictions, "--json", tmp_path / "f.json")
    assert_refused(evaluate(*flags, launcher=()), sentence)
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize("value", [34, 255])
def test_prediction_with_an_id_outside_the_table(predictions, refuse, value):
    path = sorted(predictions.iterdir())[1]
    Image.new("L", (128, 64), value).save(path)
    assert f"{path} holds the id {value}, which Cityscapes does not have" in refuse()


def test_coloured_prediction(predictions, refuse):
    path = sorted(predictions.iterdir())[0]
    Image.new("RGB", (128, 64)).save(path)
    assert f"{path} has mode RGB" in refuse()


def test_truncated_prediction(predictions, refuse):
    path = sorted(predictions.iterdir())[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} is damaged" in refuse()


def test_frame_without_prediction(predictions, refuse):
    sorted(predictions.iterdir())[0].unlink()
    assert "1 of 3 frames have no prediction" in refuse()


def test_prediction_without_ground_truth(predictions, refuse):
    path = sorted(predictions.iterdir())[0]
    shutil.copy(path, predictions / "nowhere_000001_000019_pred.png")
    assert "1 of 4 predictions have no ground truth (nowhere_000001_000019)" in refuse()


def test_prediction_with_a_name_of_its_own(predictions, refuse):
    sorted(predictions.iterdir())[0].rename(predictions / "first.png")
    assert "first.png is not named" in refuse()


def test_two_predictions_of_one_frame(predictions, refuse):
    path = sorted(predictions.iterdir())[0]
    shutil.copy(path, path.with_name(path.name.replace("pred", "again")))
    assert "are of one frame: keep one" in refuse()


def test_ground_truth_missing_for_some(evaluate, toy_cityscapes, tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(toy_cityscapes, root)
    first, second = sorted((root / "gtFine/val").rglob("*_labelIds.png"))[:2]
    first.unlink()
    assert_refused(evaluate("--out", out, root=root), "1 of 3 images have no label")
    shutil.copy(second, first)
    first.with_name(first.name.replace("labelIds", "instanceIds")).unlink()
    with pytest.raises(UserError, match=r"1 of 3 labels have no \*_instanceIds.png"):
        find_frames(root, "val")
    assert not out.exists()


def test_label_of_another_size(evaluate, toy_cityscapes, tmp_path):
    shutil.copytree(toy_cityscapes, tmp_path / "data")
    label = sorted((tmp_path / "data/gtFine/val").rglob("*_labelIds.png"))[0]
    Image.new("L", (100, 50)).save(label)
    result = evaluate("--out", tmp_path / "out", root=tmp_path / "data")
    assert_refused(result, label.name, "100x50", "128x64")


def test_weights_for_another_class_count(evaluate, tmp_path):
    save_checkpoint(tmp_path / "w.pth", LEDNet(12), {"size": [48, 96]})
    result = evaluate("--weights", tmp_path / "w.pth", "--out", tmp_path / "out")
    assert_refused(result, "w.pth has 12 outputs", "Cityscapes needs 20")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-images", 0), "--max-images is 0"),
        (("--subset", "test", "--report"), "withheld"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
        (("--tile", 16, 16, "--overlap", 16), "overlap of 16"),
    ],
)
def test_options_that_make_no_sense(evaluate, tmp_path, flags, words):
    assert_refused(evaluate("--out", tmp_path / "out", *flags), words)


def test_journal_refuses_other_settings_and_survives_a_torn_header(tmp_path):
    journal = ProgressLog(tmp_path, {"size": (1, 2)})
    journal.add({"name": "a"})
    journal.add({"name": "b"})
    assert set(ProgressLog(tmp_path, {"size": (1, 2)}, rank=1).entries) == {"a", "b"}
    with pytest.raises(UserError, match=r"size \[1, 2\], not \[3, 4\]"):
        ProgressLog(tmp_path, {"size": (3, 4)})
    (tmp_path / "progress-0.jsonl").write_bytes(b'{"size": [1')
    journal = ProgressLog(tmp_path, {"size": (1, 2)})
    assert journal.entries == {}
    journal.add({"name": "c"})
    assert set(ProgressLog(tmp_path, {"size": (1, 2)}).entries) == {"c"}


def test_forward_time_needs_no_data(run_script, tmp_path):
    result = run_script(
        "test/eval_forward_time.py", "--variant", "d128", "--height", 32, "--width", 64,
        "--image-height", 64, "--image-width", 128, "--batch-size", 2, "--runs", 2, "--warmup", 1,
        "--device", "cpu", "--json", tmp_path / "card.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["parameters"] == 2_288_140 and card["batch"] == 2
    assert card["network_size"] == [32, 64] and card["image_size"] == [64, 128]
    assert "2,288,140" in result.stdout and "p95" in result.stdout
