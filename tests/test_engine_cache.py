"""Exported networks that are kept between runs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import need
from test_inference import Pointwise

from lednet.exporting.common import RunOptions
from lednet.exporting.wrappers import EndToEndModel
from lednet.inference import backends, engine_cache
from lednet.inference.engine_cache import cache_entry, is_cached, open_exported

SHAPE = (1, 32, 48)
IMAGES = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    need("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setenv("LEDNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_graph() -> EndToEndModel:
    return EndToEndModel(Pointwise(), fold=False).eval()


@pytest.fixture
def graph() -> EndToEndModel:
    torch.manual_seed(0)
    return make_graph()


def test_open_exported_second_call_reads_the_cache(cache, graph, monkeypatch):
    first = open_exported(graph, "onnx", SHAPE, RunOptions())
    monkeypatch.setattr("lednet.exporting.formats.write_onnx", None)
    second = open_exported(graph, "onnx", SHAPE, RunOptions())
    assert is_cached(graph, "onnx", SHAPE) and second.path.is_relative_to(cache)
    np.testing.assert_array_equal(first(IMAGES), second(IMAGES))
    assert len(list((cache / "engines").iterdir())) == 1  # nothing unfinished is left


def test_cache_entry_depends_on_what_changes_the_file(cache, graph):
    entries = [
        cache_entry(graph, "onnx", SHAPE),
        cache_entry(graph, "openvino", SHAPE),
        cache_entry(graph, "onnx", (2, 32, 48)),
        cache_entry(make_graph(), "onnx", SHAPE),
    ]
    graph.pixel_mean += 0.1
    entries.append(cache_entry(graph, "onnx", SHAPE))
    assert len(set(entries)) == 5


def test_open_exported_damaged_file_is_written_again(cache, graph, caplog):
    expected = open_exported(graph, "onnx", SHAPE, RunOptions())(IMAGES)
    file = cache_entry(graph, "onnx", SHAPE) / "network.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    found = open_exported(graph, "onnx", SHAPE, RunOptions())(IMAGES)
    np.testing.assert_array_equal(found, expected)
    assert "damaged" in caplog.text and file.stat().st_size > 1000


def test_open_exported_without_cache_writes_nothing(cache, graph):
    open_exported(graph, "onnx", SHAPE, RunOptions(), cache=False)
    assert not cache.exists()


def test_keep_deletes_what_was_not_used_for_longest(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_cache, "MAX_FILES", 2)
    (tmp_path / "new").mkdir()
    for age, name in enumerate("abc"):
        engine_cache._keep(tmp_path / "new", cache / name)
        os.utime(cache / name, (1000 - age, 1000 - age))
    engine_cache._keep(tmp_path / "new", cache / "d")
    assert sorted(path.name for path in cache.iterdir()) == ["a", "d"]


def test_open_exported_unwritable_cache_is_reported(cache, graph, caplog):
    cache.write_text("a file where the folder should be")
    assert open_exported(graph, "onnx", SHAPE, RunOptions())(IMAGES).shape == (1, 5, 4, 6)
    assert "is not kept" in caplog.text


def test_choose_backend_few_images_use_a_cached_engine(cache, graph, monkeypatch):
    monkeypatch.setattr(backends, "is_available", lambda backend, device: backend == "onnxruntime")
    cpu, size = torch.device("cpu"), SHAPE[1:]
    assert backends.choose_backend(cpu, graph, size, images=20) == "eager"
    open_exported(graph, "onnx", SHAPE, RunOptions())
    assert backends.choose_backend(cpu, graph, size, images=20) == "onnxruntime"
    assert backends.choose_backend(cpu, graph, size, images=1) == "eager"
