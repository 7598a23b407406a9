"""benchmarks/gpu.py without a GPU: a dry run, and legs that fail, hang and end their process."""

import argparse
import importlib
import json
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from benchmarks import _common, gpu, gpu_legs, gpu_speed
from benchmarks.gpu_legs import Leg
from lednet import LEDNet
from lednet.exporting import formats

PUBLISHED, BEST = "as published, eager, fp32", "folded, graph, bf16"


@pytest.fixture
def leg(tmp_path) -> Leg:
    args = argparse.Namespace(
        seconds=300.0, dry_run=True, only=None, work=tmp_path, golden=None, state=None, data=None
    )
    return Leg(args, torch.device("cpu"), tmp_path / "leg.json")


def test_gpu_dry_run_writes_results_and_summary(run_script, tmp_path):
    out = tmp_path / "out"
    flags = ("--dry-run", "--minutes", 30, "--legs", "run", "machine", "--only", "copy|run")
    done = run_script("benchmarks/gpu.py", "--out", out, *flags)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png", "log.jsonl", "log.txt", "results.json", "summary.md", "weights.pth",
    ]  # fmt: skip
    legs = json.loads((out / "results.json").read_text())["legs"]
    assert {name: leg["status"] for name, leg in legs.items()} == {"machine": "ran", "run": "ran"}
    assert legs["machine"]["rows"][0]["best"] > 0
    run = legs["run"]["rows"][0]
    assert run["epochs"] >= 1 and run["best_val_miou"] is not None and "error" not in run
    assert done.stdout.rstrip().endswith((out / "summary.md").read_text().rstrip())


@pytest.mark.parametrize(
    ("name", "only", "count"),
    [
        ("proof", "golden d20|gradient|folded|Predictor eager fp32", 4),
        ("inference", f"^({PUBLISHED}|{BEST}); .* x1$", 4),
        ("training", "^device, fp32, eager .* x2$", 1),
    ],
)
def test_leg_dry_run_measures_and_checks(leg, name, only, count, toy_cityscapes, monkeypatch):
    monkeypatch.setattr(formats, "installed", lambda package: False)  # eager networks
    monkeypatch.setattr(gpu_speed.gc, "collect", lambda: None)  # before each of all measurements
    vars(leg.args).update(data=toy_cityscapes, dataset="cityscapes", only=only)
    getattr(importlib.import_module(f"benchmarks.{gpu.LEGS[name][0]}"), name)(leg)
    rows = {row["name"]: row for row in json.loads(leg.path.read_text())["rows"]}
    assert len(rows) == count and not [row for row in rows.values() if "error" in row]
    if name == "proof":
        assert all(row["passed"] for row in rows.values())
    elif name == "inference":
        labels = rows[f"{PUBLISHED}; labels 64x128 x1"]
        assert labels["equal_labels"] == 1 and labels["copies_fps"] > 0
        assert rows[f"{BEST}; logits 64x128 x1"]["note"] == "needs CUDA"
    else:
        assert rows["device, fp32, eager 64x128 x2"]["images_per_second"] > 0


HEAD = "import json, pathlib, subprocess, sys, time; file = pathlib.Path(sys.argv[1])\n"
CHILD = "import sys, time\nwhile True: open(sys.argv[1], 'a').write('.'); time.sleep(0.02)"
FAKE_LEGS = {
    "machine": f"""
        rows = [{{"name": "copy", "best": 2.0, "median": 1.0}}]
        state = {{"rows": rows, "info": {{}}, "current": {{"name": "second"}}}}
        file.write_text(json.dumps(state))
        command = [sys.executable, "-c", {CHILD!r}, str(file.with_name("beat"))]
        subprocess.Popen(command, start_new_session=True)
        time.sleep(60)
    """,
    "proof": "raise ValueError('no such thing')",
    "inference": """
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        file.write_text(json.dumps({"rows": [*rows, {"name": str(len(rows))}], "info": {}}))
        sys.exit(len(rows) < 2)
    """,
}
"""Programs that hang, fail, and end early twice; `file` is the file of the leg."""


def test_run_legs_survives_legs_that_hang_fail_and_end(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    monkeypatch.setattr(gpu, "leg_command", lambda name, work: [
        sys.executable, "-c", HEAD + textwrap.dedent(FAKE_LEGS[name]), str(work / f"{name}.json")
    ])  # fmt: skip
    args = argparse.Namespace(legs=list(FAKE_LEGS), minutes=0.25, out=tmp_path, dry_run=True)
    legs = gpu.run_legs(args, tmp_path)["legs"]
    size = (tmp_path / "beat").stat().st_size
    time.sleep(0.2)
    assert json.loads((tmp_path / "results.json").read_text())["legs"] == legs
    assert [leg["status"] for leg in legs.values()] == ["over its limit", "failed", "ran"]
    first, second = legs["machine"]["rows"]
    assert first["best"] == 2 and second["name"] == "second" and "error" in second
    assert [row["name"] for row in legs["inference"]["rows"]] == ["0", "1", "2"]
    log = (tmp_path / "log.txt").read_text()
    assert "ValueError: no such thing" in log and log.count("=== proof") == 1
    assert "| copy | 2 | 1 |  |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "beat").stat().st_size == size  # the child is killed, too


def test_run_legs_without_time_leaves_legs_out(tmp_path, capsys):
    args = argparse.Namespace(legs=["machine", "run"], minutes=0.1, out=tmp_path, dry_run=True)
    legs = gpu.run_legs(args, tmp_path)["legs"]
    assert {leg["status"] for leg in legs.values()} == {"left out"}
    assert "machine: left out" in capsys.readouterr().out


def test_measure_keeps_rows_and_facts_of_failures(leg, capsys):
    def fail() -> dict:
        leg.note(kept=1)
        raise RuntimeError("out of\nluck")

    leg.measure("first", lambda: {"value": float("nan")}, batch=2)
    leg.measure("second", fail, batch=3)
    leg.measure("third", lambda: {}, cuda=True)
    leg.measure("fourth", lambda: {}, needs=1e6)
    leg.measure("first", fail)  # is done already
    rows = json.loads(leg.path.read_text())
    first, second, third = rows["rows"]
    assert (first["value"], first["batch"]) == ("nan", 2)
    assert (second["error"], second["batch"]) == ("RuntimeError: out of luck", 3)
    assert second["kept"] == 1 and third["note"] == "needs CUDA" and rows["left_out"] == ["fourth"]
    assert "Traceback" in capsys.readouterr().out
    leg.save(current={"name": "fifth", "batch": 3})  # its process ends, and is started again
    *_, last = Leg(leg.args, leg.device, leg.path).rows
    assert last["name"] == "fifth" and "log.txt" in last["error"]


def test_summarize_marks_noisy_times():
    assert _common.summarize([10.0] * 9 + [20.0] * 2, 2) | {"p95_ms": 0} == {
        "p50_ms": 10, "p95_ms": 0, "fps": 200, "noisy": True, "runs": 11,
    }  # fmt: skip
    assert not _common.summarize([10.0] * 99 + [20.0])["noisy"]


def test_count_traffic_adds_inputs_and_outputs_of_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    expected = (3 + 5 + 5 + 5 / 4) * 8 * 12
    assert gpu_speed.count_traffic(net, (8, 12)) == expected


@pytest.mark.parametrize("variant", [gpu_speed.Variant(), gpu_speed.Variant(shuffles=False)])
def test_variant_computes_the_labels_of_the_network(variant):
    torch.manual_seed(0)
    net, images = LEDNet(20).eval(), torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    normalization = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization.values())
    module = gpu_speed.make_module(variant, net, normalization)
    with torch.no_grad():
        expected = net((images.float() / 255 - mean) / std).argmax(1)
        assert (module(images) == expected).float().mean() > 0.999


def test_gpu_with_missing_options_is_refused(run_inside, tmp_path):
    run_inside("benchmarks/gpu.py", "--dry-run").assert_error("--out")
    missing = ("--out", tmp_path / "out", "--data", tmp_path / "none")
    run_inside("benchmarks/gpu.py", *missing).assert_error("check --data")


def test_summary_shows_all_rows_as_tables():
    rows = [
        {"name": "a", "value": 0.98765, "passed": False},
        {"name": "b", "value": 4321.0, "passed": True, "note": "one|two"},
    ]
    run = {"name": "training run", "class_iou": {"road": 0.5, "car": None}, "curve": [[2, 0.25]]}
    ended = {"status": "ran", "seconds": 9.0, "limit": 20.0}
    legs = {
        "proof": {**ended, "info": {}, "rows": rows, "left_out": ["c"]},
        "run": {**ended, "info": {"command": "python train/main.py"}, "rows": [run]},
    }
    text = gpu.summary({"command": "c", "dry_run": False, "legs": legs})
    assert "| proof | ran | 9 | 20 | 2 | 1 |" in text
    assert "| a | 0.9877 | no |  |\n| b | 4,321 | yes | one/two |" in text
    assert "command python train/main.py" in text and "left for: c." in text
    assert "- class iou: road 0.5\n- curve: 2: 0.25" in text


def test_scores_of_log_are_those_of_best_and_last_epoch(tmp_path):
    scores = ((1, None), (2, 0.25), (3, 0.2))
    lines = [
        {"stage": "decoder", "epoch": e, "seconds": 2.0, "images_per_second": 9.0, "val_miou": v}
        for e, v in scores
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu_legs.scores(tmp_path)
    assert (found["epochs"], found["best_val_miou"], found["best_epoch"]) == (3, 0.25, 2)
    assert found["last_val_miou"] == 0.2 and found["curve"] == [[2, 0.25], [3, 0.2]]
