"""Progress in terminals and in log files."""

import io
import sys

import pytest

from lednet import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def install(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return install


def run(total, **options):
    with progress.progress_bar(total=total, desc="train 1", unit="image", **options) as bar:
        for _ in range(total):
            bar.update()


def test_progress_bar_file_short_work_writes_nothing(stderr):
    stream = stderr(io.StringIO())
    run(1000)
    assert stream.getvalue() == ""


def test_progress_bar_file_long_work_writes_lines(stderr, monkeypatch):
    monkeypatch.setattr(progress, "MIN_INTERVAL", 0)
    stream = stderr(io.StringIO())
    run(1000, lines=4)
    text = stream.getvalue()
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 4 <= len(lines) <= 6
    assert lines[-2].startswith("train 1: 80% of 1000 images, ") and "left" in lines[-2]


def test_progress_bar_file_unknown_total_counts(stderr, monkeypatch):
    monkeypatch.setattr(progress, "MIN_INTERVAL", 0)
    stream = stderr(io.StringIO())
    assert list(progress.progress_bar(iter(range(3)), desc="scan", unit="file")) == [0, 1, 2]
    assert "scan: 3 files" in stream.getvalue()


def test_progress_bar_terminal_is_a_bar(stderr):
    stream = stderr(Terminal())
    run(10)
    assert "\r" in stream.getvalue()
