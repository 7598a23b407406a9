"""Whatever stands in a class file, a recipe, a log or a cache: a result or a sentence."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_camvid
from fuzzing import altered, as_json, damaged, ends_well, fewer, foreign, json_files
from hypothesis import given, strategies as st
from PIL import Image

from lednet.data.cache import MANIFEST, CachedDataset, build_cache
from lednet.data.folders import read_class_file
from lednet.data.imagefolder import ImageFolderDataset
from lednet.data.labels import IGNORE_INDEX
from lednet.data.registry import open_dataset
from lednet.errors import UserError
from lednet.evaluation.cityscapes_evaluator import FrameResult
from lednet.inference.progress_log import ProgressLog
from lednet.io import MAX_YAML, read_json
from lednet.training.config import set_options, set_recipe
from lednet.training.run_dir import read_options, read_records


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("text")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# YAML

CLASSES = {
    "classes": [
        {"name": "road", "id": 0, "color": [128, 64, 128]},
        {"name": "field", "id": 7},
        {"name": "water"},
    ],
    "ignore": [255, 254],
}
RECIPE = {
    "about": {"data": "d", "command": "c", "hours": 3, "score": "s"},
    "options": {"lr": 5e-4, "num_epochs": 7, "augment": "modern", "compile": True, "out": "here"},
}
SPRUNG = "sprung"
TAGGED = (
    "!!python/object/apply:os.system ['touch {trap}']",
    "!!python/object/apply:builtins.open ['{trap}', 'w']",
    "!!python/name:os.system",
    "!!python/module:os",
)
SNIPPETS = (
    "&a [*a]", "*a", "&a", "<<: *a", "{<<: {a: b}}", "2001-99-99", "2001-01-01", "1:2:3", "0x_",
    ".nan", "-.inf", "1e999", "~", "? ", "- ", "[", "]", "{", "}", ": ", "|", ">-", "%YAML 9.9",
    "---", "...", "'", '"', "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "0o9",
    "!!int x", "!!float x", "!!timestamp x", "!!null x", "\t", "\\x", "\0", "\u2028", "\ufeff", "#",
    "=", "classes:", "name:", "- {name: a, id: ", "9" * 5000, "[" * 300, "- " * 300, "{a: " * 300,
    *TAGGED,
)  # fmt: skip


def yaml_texts(whole: dict) -> st.SearchStrategy[str]:
    """YAML and JSON like `whole`, of other content, or put together from odd pieces."""
    sound = altered(whole).map(lambda value: yaml.safe_dump(value, allow_unicode=True))
    lines = yaml.safe_dump(whole).splitlines(keepends=True)
    pieces = st.lists(st.sampled_from([*SNIPPETS, *lines, "\n", " ", ", "]) | st.text(max_size=3))
    return sound | altered(whole).map(json.dumps) | pieces.map("".join)


def yaml_files(whole: dict) -> st.SearchStrategy[bytes]:
    texts = yaml_texts(whole).map(lambda text: text.encode("utf-8", "surrogatepass"))
    sound = [yaml.safe_dump(whole).encode(), json.dumps(whole).encode()]
    codes = texts.map(lambda text: text.decode("utf-8", "replace").encode("utf-16"))
    return st.one_of(texts, texts, foreign(sound), codes)


def arm(content: bytes, place: Path) -> bytes:
    return content.replace(b"{trap}", str(place / SPRUNG).encode())


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_sound_files_are_read(place, dump):
    scheme = read_class_file(write(place / "classes.yaml", dump(CLASSES).encode()))
    assert scheme.classes == ("road", "field", "water") and scheme.lut[7] == 1
    mine = parser()
    set_recipe(mine, write(place / "mine.yaml", dump(RECIPE).encode()))
    assert mine.parse_args([]).num_epochs == 7


@given(content=yaml_files(CLASSES))
def test_class_files(place, content):
    path = write(place / "classes.yaml", arm(content, place))
    scheme = ends_well(lambda: read_class_file(path), path.name)
    assert not (place / SPRUNG).exists()
    if scheme is not None:
        assert 0 < scheme.num_classes == len(scheme.colors) < IGNORE_INDEX
        assert all(isinstance(name, str) and len(name) < MAX_YAML for name in scheme.classes)
        assert scheme.palette.shape == (256, 3) and {*scheme.file_ids} <= {*range(256)}


def parser() -> argparse.ArgumentParser:
    mine = argparse.ArgumentParser()
    mine.add_argument("--lr", type=float)
    mine.add_argument("--num-epochs", type=int)
    mine.add_argument("--augment", choices=("paper", "modern"))
    mine.add_argument("--compile", action=argparse.BooleanOptionalAction)
    mine.add_argument("--out", type=Path)
    return mine


@given(content=yaml_files(RECIPE))
def test_recipes(place, content):
    path, mine = write(place / "mine.yaml", arm(content, place)), parser()
    ends_well(lambda: set_recipe(mine, path) or True, path.name)
    assert not (place / SPRUNG).exists()
    args = mine.parse_args([])
    assert args.augment in (None, "paper", "modern") and args.compile in (None, True, False)
    assert isinstance(args.num_epochs, int | None) and isinstance(args.lr, float | None)


@pytest.mark.parametrize("read", [read_class_file, lambda path: set_recipe(parser(), path)])
@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nclasses: [{name: *b}]",
        "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nclasses: *b",
        "&a [*a]",
    ],
)
def test_aliases_are_not_followed(place, read, text):
    """Ten lines of them stand for more names than any memory holds."""
    with pytest.raises(UserError, match=r"laughs\.yaml is neither YAML nor JSON \(it has aliases"):
        read(write(place / "laughs.yaml", text.encode()))


def test_a_large_class_file_is_not_parsed(place):
    path = write(place / "large.yaml", b"#" * (MAX_YAML - 30) + b"\nclasses: [{name: a}]\n")
    assert read_class_file(path).classes == ("a",)
    write(path, path.read_bytes() + bytes(30))
    with pytest.raises(UserError, match=r"large\.yaml is over 256 KiB"):
        read_class_file(path)


# JSON

OPTIONS = {"command": ["python"], "options": {"lr": 0.1, "num_epochs": 3, "out": "x"}}
RECORDS = [{"stage": "encoder", "epoch": 1, "val_miou": 0.5}, {"stage": "decoder", "epoch": 1}]


@given(content=json_files(OPTIONS))
def test_options_of_a_run(place, content):
    run = place / "run"
    run.mkdir(exist_ok=True)
    write(run / "log.jsonl", b"")
    path = write(run / "options.json", content)
    ends_well(lambda: read_json(path) or True, path.name)
    options = ends_well(lambda: read_options(run), path.name)
    if options is not None:
        mine = parser()
        ends_well(lambda: set_options(mine, options, path), path.name)
        assert isinstance(mine.parse_args([]).num_epochs, int | None)


def lines_of(records: list) -> st.SearchStrategy[bytes]:
    """Files of one JSON value a line, such as `records`."""
    sound = b"".join(as_json(record) + b"\n" for record in records)
    odd = altered(records).map(
        lambda found: b"".join(
            as_json(line) + b"\n" for line in (found if isinstance(found, list) else [found])
        )
    )
    return st.one_of(odd, odd, foreign([sound]), st.just(b"[" * 100_000 + b"\n"))


@given(content=lines_of(RECORDS))
def test_log_of_a_run(place, content):
    run = place / "run"
    run.mkdir(exist_ok=True)
    path = write(run / "log.jsonl", content)
    records = ends_well(lambda: read_records(run), path.name)
    assert records is None or all(record["stage"] is not ... for record in records)


SETTINGS = {"weights": "abc", "size": [3, 4]}
LINES = [
    SETTINGS,
    {"name": "a", "full": [[7, 7, 20], [8, 7, 1]], "network": [], "instances": [[0.0] * 4] * 8},
    {"name": "b", "full": [[0, 33, 2]]},
]


@given(content=lines_of(LINES))
def test_journal(place, content):
    out = place / "out"
    out.mkdir(exist_ok=True)
    path = write(out / "progress-0.jsonl", content)

    def read() -> dict[str, FrameResult]:
        journal = ProgressLog(out, SETTINGS, check=FrameResult.from_json)
        return {name: FrameResult.from_json(entry) for name, entry in journal.entries.items()}

    results = ends_well(read, path.name, out)
    for name, result in (results or {}).items():
        assert isinstance(name, str)
        for counts in (result.full, result.network):
            assert counts is None or counts.matrix.shape == (34, 34)


# caches


@pytest.fixture(scope="module", params=["pairs", "classes"])
def cached(request, place):
    """Source, folder and files of a cache in three shards."""
    root = place / request.param
    if request.param == "pairs":
        source = open_dataset("camvid", make_camvid(root / "data"), "train")
        source.size = (12, 16)
    else:
        for name in ("bee/1.png", "bee/2.png", "ant/1.png", "ant/2.png", "ant/3.png"):
            (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 7), (20, 30, 40)).save(root / "data" / name)
        source = ImageFolderDataset(root / "data", size=8)
    build_cache(root / "cache", {"train": source}, shard_pairs=2)
    folder = root / "cache/train"
    return source, folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def shards(draw, whole: bytes) -> bytes:
    """The bytes of a .npy file: damaged, or of another header."""
    header = draw(
        st.sampled_from(
            [
                {"descr": "|u1", "fortran_order": True, "shape": (2, 4, 12, 16)},
                {"descr": "|O", "fortran_order": False, "shape": (2,)},
                {"descr": "<f8", "fortran_order": False, "shape": (2, 4, 12, 2)},
                {"descr": "|u1", "fortran_order": False, "shape": (10**12, 4, 12, 16)},
                {"descr": "|u1", "fortran_order": False, "shape": (-1, 4, 12, 16)},
                {"descr": "|u1", "fortran_order": False, "shape": ()},
                {"descr": "|u1", "shape": (1,)},
                "__import__('os').system('touch sprung')",
                [1, (2, 3)],
            ]
        )
    )
    text = (str(header) + " " * 60).encode()[:117].ljust(117) + b"\n"
    odd = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(2000)
    return draw(st.one_of(foreign([whole]), st.just(odd), damaged([odd])))


@fewer(2)
@given(data=st.data())
def test_caches(cached, data):
    source, folder, files = cached
    shutil.rmtree(folder)
    folder.mkdir()
    for name in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)):
        if name.endswith(".npy"):
            content = data.draw(shards(files[name]))
            if data.draw(st.booleans()):  # so long as it should be
                content = content[: len(files[name])].ljust(len(files[name]), b"\0")
        else:
            content = data.draw(json_files(json.loads(files[name])))
        files = {**files, name: content}
    for name, content in files.items():
        write(folder / name, content)

    def read_all() -> list:
        opened = CachedDataset(folder, source, "python build")
        return [opened, [opened[i] for i in range(len(opened))]]

    found = ends_well(read_all, folder, *(pair.image.name for pair in source.pairs))
    if found is not None:
        assert found[0].metadata.shape[0] == len(source)
        for ours, theirs in zip(found[1], map(source.__getitem__, range(len(source))), strict=True):
            assert ours[0].shape == theirs[0].shape and ours[0].dtype == torch.uint8

    rebuild = data.draw(st.booleans())
    built = ends_well(
        lambda: (
            build_cache(folder.parent, {"train": source}, rebuild=rebuild, shard_pairs=2) or True
        ),
        folder,
    )
    if built:  # whatever lay there, what lies there now is sound
        again = CachedDataset(folder, source, "python build")
        for i in range(len(source)):
            assert all(map(torch.equal, again[i], source[i]))
    else:
        assert not rebuild and "--rebuild" in _sentence(folder, source)
    assert not Path(SPRUNG).exists()


def _sentence(folder: Path, source) -> str:
    with pytest.raises(UserError) as caught:
        build_cache(folder.parent, {"train": source}, shard_pairs=2)
    return str(caught.value)


def test_a_damaged_manifest_names_the_way_out(cached):
    source, folder, files = cached
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in {**files, MANIFEST: b"{"}.items():
        write(folder / name, content)
    with pytest.raises(UserError, match=r"replace it with `build --rebuild`"):
        CachedDataset(folder, source, "build")
    build_cache(folder.parent, {"train": source}, rebuild=True)
    assert np.all(CachedDataset(folder, source, "build").metadata >= 0)
