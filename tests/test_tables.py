"""Sums and tables of the benchmark scripts."""

import json

import pytest

from benchmarks import time_to_accuracy, ways
from lednet import UserError


def write_run(folder, *epochs):
    """A run's log: (stage, seconds, val mIoU) of each epoch."""
    folder.mkdir()
    records = [{"stage": s, "seconds": t, "val_miou": v} for s, t, v in epochs]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_timeline_sums_all_epochs_and_runs(tmp_path):
    one = write_run(tmp_path / "one", ("encoder", 1800, 0.9), ("8x8-1", 1800, 0.3))
    two = write_run(tmp_path / "two", ("decoder", 900, None), ("decoder", 900, 0.6))
    times = time_to_accuracy.timeline([one, two])
    assert times == [(1.0, 0.3), (1.5, 0.6)]  # stage 1 has no full network
    reached = [time_to_accuracy.first_reached(times, t) for t in (0.3, 0.31, 0.61)]
    assert reached == [1.0, 1.5, None]
    result = {"hardware": "h", "reached": {"0.31": 1.5, "0.61": None}, "timeline": times}
    assert "| h | 1.50 h | not reached | 0.600 in 1.50 h |" in time_to_accuracy.table(result)


def test_timeline_log_without_seconds_is_refused(tmp_path):
    folder = write_run(tmp_path / "old")
    (folder / "log.jsonl").write_text('{"stage": "decoder", "val_miou": 0.5}\n')
    with pytest.raises(UserError, match="train anew"):
        time_to_accuracy.timeline([folder])


def test_ways_table_compares_with_the_first_seed_by_seed():
    found = {
        "as it is": ways.summary([[0.1, 0.3], [0.1, 0.5]]),
        "other": ways.summary([[0.9, 0.29], [0.2, 0.53]]),
    }
    rows = ways.table(found, {"as it is": "", "other": "--x 1"}).splitlines()
    assert rows[2] == "| as it is |  | 0.400 | 0.300, 0.500 |  |"
    assert rows[3] == "| other | `--x 1` | 0.410 | 0.290, 0.530 | +0.010, 1 of 2 seeds |"
