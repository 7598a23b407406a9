"""benchmarks/gpu.py without a GPU: a dry run, and legs that fail, hang and end their process."""

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from benchmarks import gpu, gpu_legs, gpu_speed
from benchmarks.gpu_legs import Leg
from lednet import LEDNet

ONLY = (
    "^copy|^fp32 product|tests/golden d20|^as published, eager, fp32; .* x1$"
    "|^folded, graph.* x1$|^device, fp32, eager.* x2$|^training run$"
)
"""Measurements of the dry run: a few of each leg."""


def test_dry_run_of_every_leg(run_script, tmp_path):
    out = tmp_path / "out"
    flags = ("--dry-run", "--minutes", 30, "--only", ONLY)
    done = run_script("benchmarks/gpu.py", "--out", out, *flags)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png", "log.jsonl", "log.txt", "results.json", "summary.md", "weights.pth",
    ]  # fmt: skip
    legs = json.loads((out / "results.json").read_text())["legs"]
    assert {name: leg["status"] for name, leg in legs.items()} == dict.fromkeys(gpu.WEIGHTS, "ran")
    rows = {row["name"]: row for leg in legs.values() for row in leg["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    assert rows["tests/golden d20 fp32"]["passed"]
    published = rows["as published, eager, fp32; labels 64x128 x1"]
    assert published["equal_labels"] == 1 and 0 < published["floor_ms"] < published["p50_ms"]
    assert rows["device, fp32, eager 64x128 x2"]["images_per_second"] > 0
    assert rows["training run"]["epochs"] >= 1 and rows["training run"]["best_val_miou"] is not None
    summary = (out / "summary.md").read_text()
    assert done.stdout.rstrip().endswith(summary.rstrip())  # printed last
    assert "| as published, eager, fp32 | labels | 64x128 x1 |" in summary
    assert "| folded, graph, bf16 | logits | 64x128 x1 |" in summary and "needs CUDA" in summary


def fake_legs(monkeypatch, **programs: str) -> None:
    """Replace the legs by small programs, which find JSON and the file of their leg in `file`."""
    head = "import json, pathlib, subprocess, sys, time; file = pathlib.Path(sys.argv[1])\n"

    def command(name: str, work: Path) -> list[str]:
        program = head + textwrap.dedent(programs[name])
        return [sys.executable, "-c", program, str(work / f"{name}.json")]

    monkeypatch.setattr(gpu, "leg_command", command)


def run_fake_legs(tmp_path, *legs: str, minutes: float = 1.0) -> tuple[dict, str]:
    args = argparse.Namespace(legs=legs, minutes=minutes, out=tmp_path / "out", dry_run=True)
    args.out.mkdir()
    (tmp_path / "work").mkdir()
    results = gpu.run_legs(args, tmp_path / "work")
    assert json.loads((args.out / "results.json").read_text()) == results
    return results["legs"], (args.out / "log.txt").read_text()


def test_leg_that_raises_is_logged_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    fake_legs(
        monkeypatch,
        machine="raise ValueError('no such thing')",
        proof="file.write_text(json.dumps({'rows': [{'name': 'a', 'value': 1, 'passed': True}]}))",
    )
    legs, log = run_fake_legs(tmp_path, "machine", "proof")
    assert (legs["machine"]["status"], legs["proof"]["status"]) == ("failed", "ran")
    assert "Traceback" in log and "ValueError: no such thing" in log
    assert "| a | 1 |  | yes |  |" in (tmp_path / "out/summary.md").read_text()


def test_leg_over_its_limit_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.05)"
    fake_legs(
        monkeypatch,
        machine=f"""
            rows = [{{"name": "copy", "best": 2.0, "median": 1.0}}]
            file.write_text(json.dumps({{"rows": rows, "current": {{"name": "second"}}}}))
            subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
            time.sleep(60)
        """,
    )
    legs, _ = run_fake_legs(tmp_path, "machine", minutes=0.05)
    assert legs["machine"]["status"] == "over its limit" and legs["machine"]["seconds"] < 10
    first, second = legs["machine"]["rows"]
    assert first["best"] == 2 and second["name"] == "second" and "error" in second
    size = beat.stat().st_size
    time.sleep(0.5)
    assert size == beat.stat().st_size


def test_leg_whose_process_ends_is_continued(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    fake_legs(
        monkeypatch,
        machine="""
            rows = json.loads(file.read_text())["rows"] if file.exists() else []
            file.write_text(json.dumps({"rows": [*rows, {"name": str(len(rows))}]}))
            sys.exit(len(rows) < 2)
        """,
    )
    legs, _ = run_fake_legs(tmp_path, "machine")
    assert legs["machine"]["status"] == "ran"
    assert [row["name"] for row in legs["machine"]["rows"]] == ["0", "1", "2"]


def test_legs_for_which_no_time_is_left_are_named(tmp_path, capsys):
    args = argparse.Namespace(legs=["machine", "run"], minutes=0.1, out=tmp_path, dry_run=True)
    legs = gpu.run_legs(args, tmp_path)["legs"]
    assert {leg["status"] for leg in legs.values()} == {"left out"}
    assert "machine: left out" in capsys.readouterr().out


@pytest.fixture
def leg(tmp_path) -> Leg:
    args = argparse.Namespace(seconds=60.0, dry_run=True, only=None, work=tmp_path)
    return Leg(args, torch.device("cpu"), tmp_path / "leg.json")


def test_measurements_fail_one_by_one(leg, capsys):
    def wrong() -> dict:
        raise RuntimeError("out of\nluck")

    leg.measure("first", lambda: {"value": float("nan")}, batch=2)
    leg.measure("second", wrong, batch=3)
    leg.measure("third", lambda: {}, cuda=True)
    leg.measure("fourth", lambda: {}, needs=1e6)
    leg.measure("first", wrong)  # is done already
    rows = json.loads(leg.path.read_text())
    first, second, third = rows["rows"]
    assert (first["value"], first["batch"]) == ("nan", 2)
    assert (second["error"], second["batch"]) == ("RuntimeError: out of luck", 3)
    assert third["note"] == "needs CUDA" and rows["left_out"] == ["fourth"]
    assert "Traceback" in capsys.readouterr().out


def test_leg_that_is_started_again_goes_on_after_the_measurement_that_ended_it(leg):
    leg.measure("first", lambda: {"value": 1})
    leg.save(current={"name": "second", "batch": 3})
    again = Leg(leg.args, leg.device, leg.path)
    assert [row["name"] for row in again.rows] == ["first", "second"]
    assert again.rows[1]["batch"] == 3 and "log.txt" in again.rows[1]["error"]


def test_traffic_counts_inputs_and_outputs_of_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    pixels = 8 * 12
    expected = (3 + 5) * pixels + (5 + 5 / 4) * pixels
    assert gpu_speed.count_traffic(net, (8, 12)) == expected


@pytest.mark.parametrize("scope", [gpu_speed.LOGITS, gpu_speed.LABELS])
def test_every_variant_computes_the_same(scope):
    torch.manual_seed(0)
    net, images = LEDNet(20).eval(), torch.randint(0, 256, (1, 40, 56, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    x = ((images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = net(x)
        for how in (gpu_speed.PUBLISHED, gpu_speed.Variant(), gpu_speed.Variant(shuffles=False)):
            core = gpu_speed.make_core(how, net)
            if scope == gpu_speed.LOGITS:
                torch.testing.assert_close(gpu_speed.ToLogits(core)(x), logits)
            else:
                labels = gpu_speed.ToLabels(core, mean, std, how)(images)
                assert (labels == logits.argmax(1)).float().mean() > 0.999


def test_refuses_what_is_not_there(run_inside, tmp_path):
    done = run_inside("benchmarks/gpu.py", "--dry-run")
    assert done.returncode == 2 and "--out" in done.stderr
    done = run_inside("benchmarks/gpu.py", "--out", tmp_path / "out", "--data", tmp_path / "none")
    assert done.returncode == 2 and "check --data" in done.stderr


def test_results_are_written_into_the_docs(monkeypatch, tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text((ROOT / "docs/gpu.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(gpu, "PAGE", page)
    rows = [{"name": "copy 1 GiB", "unit": "GB/s", "best": 3000.0, "median": 2900.0}]
    leg = {"status": "ran", "seconds": 9.0, "limit": 20.0, "rows": rows, "info": {"device": "G"}}
    results = {"command": "python benchmarks/gpu.py", "legs": {"machine": leg}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    command = ["gpu.py", "--write-docs", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu.main() == 0
    text = page.read_text(encoding="utf-8")
    assert "| copy 1 GiB | 3,000 | 2,900 | GB/s |  |" in text and "Not yet run" not in text


def test_scores_of_a_log(tmp_path):
    lines = [
        {"epoch": 1, "seconds": 2.0, "images_per_second": 10.0, "val_miou": None},
        {"epoch": 2, "seconds": 3.0, "images_per_second": 30.0, "val_miou": 0.25},
        {"epoch": 3, "seconds": 3.0, "images_per_second": 20.0, "val_miou": 0.2},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu_legs.scores(path)
    assert (found["epochs"], found["best_val_miou"], found["best_epoch"]) == (3, 0.25, 2)
    assert found["last_val_miou"] == 0.2 and found["curve"] == [[2, 0.25], [3, 0.2]]
    assert gpu_legs.scores(tmp_path / "none") == {}
