"""Files of any content are read, or refused with one sentence; no code in them is run."""

import argparse
import hashlib
import io
import json
import pickle
import shutil
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import numpy as np
import pytest
import torch
import yaml
from conftest import make_camvid
from fakes import small_trainer
from fuzzing import (
    Hang,
    Trap,
    altered,
    as_json,
    damaged,
    ends_well,
    foreign,
    json_files,
    png_of,
    values,
    zip_of,
)
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import save
from test_predict import make_video
from torch import nn

from lednet import LEDNet, UserError, load_model, load_weights
from lednet.checkpoint import CONFIG, TENSORS, load_checkpoint
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import read_label
from lednet.data.folders import read_class_file
from lednet.data.image_io import FORMATS, open_image, read_image
from lednet.data.labels import IGNORE_INDEX, cityscapes_scheme
from lednet.data.pairs import Sample
from lednet.data.registry import open_dataset
from lednet.evaluation.cityscapes_evaluator import FrameResult, read_instances
from lednet.evaluation.cityscapes_submission import check_submission
from lednet.exporting.common import ExportedModel
from lednet.exporting.formats import FORMATS as EXPORT_FORMATS, ExportOptions, load
from lednet.exporting.wrappers import EndToEndModel
from lednet.inference.progress_log import ProgressLog
from lednet.inference.video import VideoReader
from lednet.io import LIMIT, MAX_YAML, max_pixels, read_yaml
from lednet.training.checkpointing import Checkpoints
from lednet.training.config import set_options, set_recipe
from lednet.training.loop import Progress, TrainingRun, report_mismatch
from lednet.training.run_dir import RunDir, read_options, read_records
from lednet.training.stages import Stage
from lednet.validation.inspection import inspect_pair

pytestmark = pytest.mark.filterwarnings("ignore")

PIXELS = 250_000
SCHEME = cityscapes_scheme()
TRAP = "sprung"
"""File that code in any of the inputs would create, in the current folder."""

Files = dict[str, bytes]
"""Content of the files that a parser reads, by name."""


class Parser(NamedTuple):
    """Row of `PARSERS`.

    Attributes:
        valid: makes valid inputs, given an empty folder.
        damage: makes a strategy of other inputs from the valid ones.
        read: reads an input, given the path of its first file, and checks the result.
        mentions: texts of which one is part of every error (default: the name of the file).
        share: multiple of hypothesis' number of examples.
    """

    valid: Callable[[Path], list[Files]]
    damage: Callable[[list[Files]], st.SearchStrategy[Files]]
    read: Callable[[Path], Any]
    mentions: Sequence[str] = ()
    share: float = 1


def one_file(
    name: str, contents: Sequence[bytes], odd: st.SearchStrategy[bytes], *row: Any, **options: Any
) -> Parser:
    """Row of a parser of single files: damaged `contents`, and `odd` ones."""
    inputs = (foreign(contents) | odd).map(lambda content: {name: content})
    valid = [{name: content} for content in contents]
    return Parser(lambda folder: valid, lambda _: inputs, *row, **options)


# YAML and JSON

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
OPTIONS = {"command": ["python"], "options": {"lr": 0.1, "num_epochs": 3, "out": "x"}}
RECORDS = [{"stage": "encoder", "epoch": 1, "val_miou": 0.5}, {"stage": "decoder", "epoch": 1}]
SETTINGS = {"weights": "abc", "size": [3, 4]}
PROGRESS_LOG = [
    SETTINGS,
    {"name": "a", "full": [[7, 7, 20], [8, 7, 1]], "network": [], "instances": [[0.0] * 4] * 8},
    {"name": "b", "full": [[0, 33, 2]]},
]
SNIPPETS = (
    "&a [*a]", "*a", "&a", "<<: *a", "{<<: {a: b}}", "2001-99-99", "2001-01-01", "1:2:3", "0x_",
    ".nan", "-.inf", "1e999", "~", "? ", "- ", "[", "]", "{", "}", ": ", "|", ">-", "%YAML 9.9",
    "---", "...", "'", '"', "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "0o9",
    "!!int x", "!!float x", "!!timestamp x", "!!null x", "\t", "\\x", "\0", "\u2028", "\ufeff", "#",
    "=", "classes:", "name:", "- {name: a, id: ", "9" * 5000, "[" * 300, "- " * 300, "{a: " * 300,
    f"!!python/object/apply:os.system ['touch {TRAP}']",
    f"!!python/object/apply:builtins.open ['{TRAP}', 'w']",
    "!!python/name:os.system", "!!python/module:os",
)  # fmt: skip


def yaml_row(name: str, whole: dict, read: Callable[[Path], Any]) -> Parser:
    lines = yaml.safe_dump(whole).splitlines(keepends=True)
    pieces = st.lists(st.sampled_from([*SNIPPETS, *lines, "\n", " ", ", "]) | st.text(max_size=3))
    texts = st.one_of(
        altered(whole).map(lambda value: yaml.safe_dump(value, allow_unicode=True)),
        altered(whole).map(json.dumps),
        pieces.map("".join),
    )
    content = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    utf_16 = content.map(lambda text: text.decode("utf-8", "replace").encode("utf-16"))
    valid = [yaml.safe_dump(whole).encode(), json.dumps(whole).encode()]
    return one_file(name, valid, content | utf_16, read)


def read_classes(path: Path) -> None:
    scheme = read_class_file(path)
    assert 0 < scheme.num_classes == len(scheme.colors) < IGNORE_INDEX
    assert all(isinstance(name, str) and len(name) < MAX_YAML for name in scheme.classes)
    assert scheme.palette.shape == (256, 3) and {*scheme.file_ids} <= {*range(256)}


def with_options(apply: Callable[[argparse.ArgumentParser], None]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    parser.add_argument("--num-epochs", type=int)
    parser.add_argument("--augment", choices=("paper", "modern"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--out", type=Path)
    apply(parser)
    args = parser.parse_args([])
    assert args.augment in (None, "paper", "modern") and args.compile in (None, True, False)
    assert isinstance(args.num_epochs, int | None) and isinstance(args.lr, float | None)


def read_run_options(path: Path) -> None:
    (path.parent / "log.jsonl").write_bytes(b"")
    options = read_options(path.parent)
    with_options(lambda parser: set_options(parser, options, path))


def read_progress(path: Path) -> None:
    for entry in ProgressLog(path.parent, SETTINGS, check=FrameResult.from_json).entries.values():
        result = FrameResult.from_json(entry)
        for counts in (result.full, result.network):
            assert counts is None or counts.matrix.shape == (34, 34)


def lines_row(name: str, records: list, read: Callable[[Path], Any]) -> Parser:
    def as_lines(values: Any) -> bytes:
        return b"".join(as_json(v) + b"\n" for v in (values if isinstance(values, list) else [0]))

    odd = altered(records).map(as_lines) | st.just(b"[" * 100_000 + b"\n")
    return one_file(name, [as_lines(records)], odd, read, (name, "input"))


# Images and videos

NOISE = np.random.default_rng(0).integers(0, 34, (9, 14, 4), np.uint8)
GREY, RGB = Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE[..., :3])
RGBA, PALETTE = Image.fromarray(NOISE), GREY.convert("P")
DEEP = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 1000)
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x011A], EXIF[0x010F] = 6, 72.0, "maker"


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


PNGS = [
    encoded(GREY, "PNG"),
    encoded(PALETTE, "PNG", transparency=b"\0\1\2"),
    encoded(RGB, "PNG", exif=EXIF),
    encoded(RGBA, "PNG", save_all=True, append_images=[RGBA.rotate(180)]),
    *(encoded(image, "PNG") for image in (DEEP, GREY.convert("1"), GREY.convert("LA"))),
]
IMAGES = [
    *PNGS,
    encoded(RGB, "JPEG", exif=EXIF),
    encoded(RGB, "JPEG", progressive=True),
    encoded(RGB.convert("CMYK"), "JPEG"),
    encoded(RGB, "MPO", save_all=True, append_images=[RGB]),
    *(encoded(image, "BMP") for image in (GREY, PALETTE)),
    encoded(RGBA, "WEBP", exif=EXIF),
    encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(90)]),
    *(encoded(RGB, "TIFF", compression=name, exif=EXIF)
      for name in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
    encoded(DEEP, "TIFF", save_all=True, append_images=[DEEP]),
    encoded(RGB.convert("LAB"), "TIFF"),
]  # fmt: skip
FLOATS = encoded(Image.fromarray(np.float32(NOISE[..., 0])), "TIFF")
OTHER_FORMATS = [
    *(encoded(RGB, name) for name in ("GIF", "PPM", "ICO", "EPS", "TGA", "PCX", "JPEG2000")),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(sprung) (w) file closefile\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/hostname'/></svg>",
]


def read_by_all(path: Path) -> None:
    """Read an image with every reader of image files."""
    label = ends_well(lambda: read_label(path, SCHEME), path.name)
    assert label is None or set(np.unique(label)) <= {*range(SCHEME.num_classes), IGNORE_INDEX}
    instances = ends_well(lambda: read_instances(path), path.name)
    if instances is not None:
        assert instances.ndim == 2 and 0 <= instances.min() <= instances.max() < 34000
    found = inspect_pair(Sample(path, path))
    image = ends_well(lambda: read_image(path), path.name)
    assert found.problems or (image is not None and found.image_size == image.shape[1::-1])
    image = read_image(path)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert 0 < image.shape[0] * image.shape[1] <= PIXELS


def png_chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


BOMB = zlib.compress(bytes(3 << 20), 9)
KINDS = b"IHDR PLTE IDAT IEND tRNS tEXt zTXt iTXt iCCP gAMA eXIf acTL fcTL fdAT aaaa".split()
sides = st.sampled_from([0, 1, 7, 499, 500, 501, 65536, 2**31 - 1, 2**32 - 1])
bits, modes = st.sampled_from([1, 2, 4, 8, 16, 3]), st.sampled_from([0, 2, 3, 4, 6, 1])
headers = st.builds(lambda *h: struct.pack(">IIBBBBB", *h, 0, 0, 0), sides, sides, bits, modes)
payloads = st.one_of(
    headers,
    st.binary(max_size=40),
    st.binary(max_size=300).map(zlib.compress),
    st.sampled_from([b"", BOMB, b"key\0\0" + BOMB, b"key\0\1\0\0\0" + BOMB, bytes(2000)]),
)


@st.composite
def chunky_pngs(draw) -> bytes:
    """PNG files with correct checksums and chunks of any content."""
    chunks = png_chunks(draw(st.sampled_from(PNGS)))
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(chunks) - 1))
        kind, data = chunks[i]
        content = headers if kind == b"IHDR" else payloads | damaged([data])
        odd = draw(st.sampled_from([kind, kind, *KINDS])), draw(content)
        chunks[i : i + 1] = draw(
            st.sampled_from([[odd], [odd], [odd, chunks[i]], [chunks[i]] * 100])
        )
    return png_of(chunks)


TAGS = (254, 256, 257, 258, 259, 262, 270, 273, 274, 277, 278, 279, 282, 284, 317, 320, 322, 323,
        324, 325, 330, 338, 339, 347, 34665, 34675, 50000)  # fmt: skip
"""Of sizes, number formats, compression, strips, tiles, palettes, further folders and EXIF."""
tags = st.tuples(
    st.sampled_from(TAGS),
    st.integers(0, 18),
    st.sampled_from([0, 1, 2, 3, 2**16, 2**32 - 1]),
    st.sampled_from([*range(9), 16, 32, 200, 2**31, 2**32 - 1]),
)


@st.composite
def tagged_tiffs(draw) -> bytes:
    """TIFF files of one directory with any tags."""
    usual = [(256, 4, 1, draw(sides)), (257, 4, 1, draw(sides)), (273, 4, 1, 8)]
    found = sorted([*usual, *draw(st.lists(tags, max_size=14))])
    next_directory = draw(st.sampled_from([0, 8, 9, 2**32 - 1]))
    return (
        b"II*\0" + struct.pack("<IH", 8, len(found))
        + b"".join(struct.pack("<HHII", *tag) for tag in found)
        + struct.pack("<I", next_directory) + draw(st.binary(max_size=200))
    )  # fmt: skip


bmps = st.builds(
    lambda size, width, height, planes, bits, compression, colors, rest: (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 200, 0, 54, size, width, height, planes, bits,
                            compression, 0, 0, 0, colors, 0) + rest
    ),
    st.sampled_from([12, 40, 40, 40, 64, 108, 124, 0, 2**31]),
    *[st.sampled_from([0, 1, 5, 600, -1, -5, 2**31 - 1, -(2**31)])] * 2,
    st.integers(0, 2), st.sampled_from([1, 4, 8, 16, 24, 32, 0, 7]), st.integers(0, 6),
    st.sampled_from([0, 2, 256, 257, 2**32 - 1]), st.binary(max_size=300),
)  # fmt: skip


FRAME = "berlin_000000_000019"
members = st.dictionaries(
    st.sampled_from([f"{FRAME}.png", f"../{FRAME}.png", f"/{FRAME}.png"])
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    chunky_pngs() | st.sampled_from(PNGS),
    max_size=3,
)
uploads = st.builds(
    zip_of, members, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
)


def read_submission(path: Path) -> None:
    problems = check_submission(path, frames=[FRAME], size=NOISE.shape[:2], progress=False)
    assert all("\n" not in problem for problem in problems)
    assert not [path for path in path.parent.iterdir() if path.is_dir()]  # nothing is unpacked


def video_of(suffix: str) -> bytes:
    codec = "mpeg4" if suffix == "avi" else "libx264"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{suffix}")
        return make_video(path, 4, Fraction(25), size=(16, 32), codec=codec).read_bytes()


def read_video(path: Path) -> int:
    with VideoReader(path) as video:
        frames = [frame.image for frame, _ in zip(video, range(12), strict=False)]
    assert all(f.dtype == np.uint8 and f.shape[0] * f.shape[1] <= PIXELS for f in frames)
    return len(frames)


# Caches


def camvid_source(folder: Path) -> Any:
    source = open_dataset("camvid", folder, "train")
    source.size = (12, 16)
    return source


def valid_cache(folder: Path) -> list[Files]:
    source = camvid_source(make_camvid(folder / "data"))
    build_cache(folder / "cache", {"train": source}, shard_pairs=2)
    return [
        {f"train/{path.name}": path.read_bytes() for path in (folder / "cache/train").iterdir()}
    ]


def read_cache(path: Path) -> None:
    folder, source = path.parent, camvid_source(path.parents[2] / "data")

    def read(exactly: bool) -> None:
        cached = CachedDataset(folder, source, "python build")
        for i in range(len(source)):
            assert cached[i][0].shape == source[i][0].shape
            assert not exactly or all(map(torch.equal, cached[i], source[i]))

    def build(**options: bool) -> bool:
        build_cache(folder.parent, {"train": source}, shard_pairs=2, **options)
        return True

    try:
        read(exactly=False)
    finally:  # a build repairs the cache, or says how to
        if not ends_well(build, "--rebuild"):
            build(rebuild=True)
        read(exactly=True)


NPY_HEADERS = [
    {"descr": "|u1", "fortran_order": True, "shape": (2, 4, 12, 16)},
    {"descr": "|O", "fortran_order": False, "shape": (2,)},
    {"descr": "<f8", "fortran_order": False, "shape": (2, 4, 12, 2)},
    {"descr": "|u1", "fortran_order": False, "shape": (10**12, 4, 12, 16)},
    {"descr": "|u1", "fortran_order": False, "shape": (-1, 4, 12, 16)},
    {"descr": "|u1", "fortran_order": False, "shape": ()},
    {"descr": "|u1", "shape": (1,)},
    f"__import__('os').system('touch {TRAP}')",
    [1, (2, 3)],
]


def npy_of(header: Any) -> bytes:
    text = str(header).encode()[:117].ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(2000)


@st.composite
def damaged_caches(draw, valid: list[Files]) -> Files:
    files = dict(valid[0])
    for name in draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)):
        whole = files[name]
        if name.endswith(".npy"):
            odd = st.sampled_from(NPY_HEADERS).map(npy_of)
            content = draw(foreign([whole]) | odd)
            if draw(st.booleans()):  # of the expected length
                content = content[: len(whole)].ljust(len(whole), b"\0")
            files[name] = content
        else:
            files[name] = draw(json_files(json.loads(whole)))
    return files


# Weights

META = {
    "dataset": "x", "size": [32, 64], "classes": ["a", "b"], "colors": [[1, 2, 3], [4, 5, 6]],
    "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "stage": "decoder", "epoch": 2, "miou": 0.5,
}  # fmt: skip


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def parts_of(archive: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


STATE = small_net().state_dict()
BUNDLE = {"state_dict": STATE, "meta": META, "epoch": 3, "arch": "x", "best_acc": 0.5}
CHECKPOINTS = [
    saved(BUNDLE),
    saved({f"module.{key}": value for key, value in STATE.items()}),
    saved(BUNDLE, _use_new_zipfile_serialization=False),  # as the original release's .pth.tar
]
PARTS = parts_of(CHECKPOINTS[0])
PICKLE = next(name for name in PARTS if name.endswith("data.pkl"))
PIECES = [
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch\nload\n", b"ctorch.hub\nload\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
    b"cbuiltins\nexec\n", b"cbuiltins\nopen\n", b"c__builtin__\ngetattr\n", b"cnumpy\nload\n",
    b"cpathlib\nPath.touch\n", b"X\x0c\0\0\0touch sprung", b"\x8a\x08" + b"\x7f" * 8,
    b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"q\x01", b"h\x01", b"\x85R", b"tR", b"(ltR.",
]  # fmt: skip
OPCODES = b"()*.0123BCFGIJKLMNPQRSTUVX]abcdeghijlopqrstu}" + bytes(range(128, 150))


@st.composite
def programs(draw) -> bytes:
    """Pickles: traps, damaged ones of checkpoints, and instructions in any order."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        trap = Trap(Path(TRAP), draw(st.integers(0, 2)))
        inside = {"state_dict": {"a": trap}}
        places = [trap, {"state_dict": trap}, inside, {"meta": [trap]}, (1, trap)]
        return pickle.dumps(draw(st.sampled_from(places)), draw(st.integers(0, 5)))
    if kind == 1:
        return draw(damaged([PARTS[PICKLE], pickle.dumps(META, 2), b"\x80\x02}q\x01."]))
    opcodes = st.sampled_from(OPCODES).map(lambda code: bytes([code]))
    pieces = st.one_of(st.sampled_from(PIECES), opcodes, st.binary(max_size=5))
    return b"\x80\x02" + b"".join(draw(st.lists(pieces, max_size=14))) + b"."


@st.composite
def pickled(draw) -> bytes:
    """`programs` in the files that PyTorch opens, of now and before 1.6."""
    program = draw(programs())
    wrap = draw(st.sampled_from(["raw", "zip", "zip", "zip", "deflated", "legacy", "names"]))
    if wrap == "raw":
        return program
    if wrap == "legacy":
        head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {}})
        return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2)
    parts = {**PARTS, PICKLE: program}
    if wrap == "names":
        parts = {name.replace("archive", "../x"): part for name, part in parts.items()}
        parts[f"../../{TRAP}"] = b"x"
    return zip_of(parts, zipfile.ZIP_DEFLATED if wrap == "deflated" else zipfile.ZIP_STORED)


@st.composite
def odd_zips(draw, parts: Files, odd: Callable[[bytes], st.SearchStrategy[bytes]]) -> bytes:
    """Zip files with correct checksums, of `parts` of which some are odd or missing."""
    parts = dict(parts)
    for name in draw(st.lists(st.sampled_from(sorted(parts)), min_size=1, max_size=2, unique=True)):
        parts[name] = draw(odd(parts[name]))
        if draw(st.integers(0, 9)) == 0:
            del parts[name]
    return zip_of(parts)


odd_tensors = st.deferred(
    lambda: st.sampled_from(
        [
            torch.zeros(1).expand(10**9),
            torch.zeros(1).expand(10**6, 128, 1, 1),
            torch.zeros(2, 1, 1, 1, dtype=torch.complex64),
            torch.zeros(2, 1, 1, 1).to_sparse(),
            torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
            torch.zeros(2, device="meta"),
            torch.zeros(0),
            torch.tensor(0),
            torch.full((2,), float("nan")),
            torch.zeros(2, dtype=torch.bool),
            torch.zeros(2, dtype=torch.float8_e4m3fn),
            nn.Parameter(torch.zeros(2)),
        ]
    )
)


def saved_either_way(content: object, legacy: bool) -> bytes:
    try:
        return saved(content, _use_new_zipfile_serialization=not legacy)
    except RuntimeError:  # the legacy form cannot hold some tensors
        return saved(content)


odd_bundles = st.builds(saved_either_way, altered(BUNDLE, values | odd_tensors), st.booleans())


def read_checkpoint(path: Path) -> None:
    state = load_checkpoint(path)["state_dict"]
    assert all(isinstance(key, str) for key in state)
    assert sum(value.nbytes for value in state.values()) <= path.stat().st_size
    ends_well(lambda: load_model(path), path.name)
    load_weights(small_net(), path)


NET = LEDNet(3)
FULL = {key: value.half() for key, value in NET.state_dict().items()}


@st.composite
def odd_shapes(draw, _: list) -> Files:
    """Full state dicts in which some tensors have another shape, which takes no memory."""
    state = dict(FULL)
    names = ["decoder.mid.0.weight", "decoder.down1.0.weight", "decoder.lateral1.0.weight",
             "encoder.0.conv.weight", sorted(FULL)[7]]  # fmt: skip
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        shape = draw(st.lists(st.sampled_from([0, 1, 3, 128, 10**4]), max_size=4))
        whole = draw(st.booleans()) and len(shape) < 2
        state[name] = torch.zeros(shape) if whole else torch.zeros(1).expand(shape or [1])
    return {"full.pth": saved({"state_dict": state, "meta": draw(altered(META))})}


def read_network(path: Path) -> None:
    net, meta = load_model(path)
    assert net.num_classes == 3 and isinstance(meta, dict)
    height, width = meta.get("size") or (1, 1)
    assert height * width <= 10**8


def released(tensors: bytes) -> Files:
    checksum = hashlib.sha256(tensors).hexdigest()
    about = {"model_type": "lednet", "network": {"num_classes": 3}, "meta": META}
    return {TENSORS: tensors, CONFIG: as_json({**about, "sha256": checksum})}


def safetensors_of(header: object, data: bytes, length: int | None = None) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADER = {"__metadata__": {"format": "pt"}, "a": TENSOR, "b": {**TENSOR, "data_offsets": [24, 48]}}
dtypes = st.sampled_from(
    ["BOOL", "F4", "F6_E2M3", "U8", "I8", "F8_E5M2", "F8_E8M0", "I16", "BF16", "U64", "C64", "X"]
)
safetensors = st.builds(
    safetensors_of,
    altered(HEADER, values | dtypes),
    st.binary(max_size=60) | st.just(bytes(48)),
    st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]),
)


def damaged_release(valid: list[Files]) -> st.SearchStrategy[Files]:
    """Odd tensors with a correct checksum, or another config.json."""
    config = json_files(json.loads(valid[0][CONFIG])).map(lambda c: {**valid[0], CONFIG: c})
    return safetensors.flatmap(lambda whole: foreign([whole])).map(released) | config


CHECKPOINT = "checkpoint_000000007.pth"
EPOCH = {"step": 1, "images": 2, "skipped": 0, "sums": torch.zeros(2), "counts": torch.zeros(3, 4)}
PROGRESS = Progress("decoder", 2, 7, 0.5, [RECORDS[1] | {"train_loss": 0.1}], EPOCH).state()
RESUMABLE = {**BUNDLE, "progress": PROGRESS, "trainer": {"optimizer": {}, "scaler": {}}}


def resume_run(path: Path) -> None:
    (path.parent / "log.jsonl").unlink(missing_ok=True)
    (path.parent / "log.txt").write_text("")
    folder = RunDir.__new__(RunDir)
    folder.path, folder.main, folder.log = path.parent, True, lambda text: None
    stages = [Stage("decoder", "2", 3)]
    meta = {"classes": META["classes"]}
    run = TrainingRun(small_net(), stages, folder, Checkpoints(path.parent), meta, 1, timer=None)
    progress, _ = run.resume()
    assert progress.stage == "decoder" and isinstance(progress.epoch, int)
    assert (path.parent / "log.jsonl").exists()


# Exported models


class SmallModel(EndToEndModel):
    """A network that every format can hold."""

    def __init__(self):
        nn.Module.__init__(self)
        self.output = "logits"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2).float()[:, :, ::8, ::8] * 2


EXPORT_META = {
    "outputs": 3, "variant": "d20", "pyramid_channels": None, "size": [16, 24],
    "precision": "fp32", "classes": ["a", "b"], "colors": [[1, 2, 3]] * 2,
}  # fmt: skip


def as_metadata(meta: Any) -> dict[str, str]:
    meta = meta if isinstance(meta, dict) else {"x": meta}
    return {key: json.dumps(value) for key, value in meta.items()}


def export_small(folder: Path, format: str) -> Files:
    row = EXPORT_FORMATS[format]
    for package in row.packages:
        pytest.importorskip(package)
    path = folder / f"net{row.suffix}"
    metadata = as_metadata(EXPORT_META) | {"output": "logits"}
    row.write(SmallModel().eval(), path, ExportOptions((1, 16, 24), metadata=metadata))
    names = [path.with_suffix(suffix).name for suffix in (row.suffix, *row.companions)]
    return {name: (folder / name).read_bytes() for name in names}


@st.composite
def damaged_exports(draw, valid: list[Files]) -> Files:
    files = dict(valid[0])
    name = draw(st.sampled_from(sorted(files)))
    return {**files, name: draw(foreign([files[name]]))}


tempting = st.sampled_from(
    ["torch.os.system", "torch.hub.load", "_operator.call", "math.exp", TRAP, "10**10**10",
     "torch.ops.aten.from_file.default", "torch.ops.aten.mul.Tensor", "s0", "aten", "#x",
     f"__import__('os').system('touch {TRAP}')", "exec(chr(49))"]
)  # fmt: skip


def altered_graphs(valid: list[Files]) -> st.SearchStrategy[Files]:
    ((path, content),) = valid[0].items()

    def odd(part: bytes) -> st.SearchStrategy[bytes]:
        try:
            return altered(json.loads(part), values | tempting).map(as_json)
        except ValueError:
            return st.just(part)

    return odd_zips(parts_of(content), odd).map(lambda archive: {path: archive})


def read_exported(path: Path) -> None:
    model = load(path)
    assert model.meta
    model.build_meta_model()


def export_row(format: str, damage: Callable = damaged_exports) -> Parser:
    return Parser(lambda folder: [export_small(folder, format)], damage, read_exported, share=0.2)


PARSERS = {
    "class file": yaml_row("classes.yaml", CLASSES, read_classes),
    "recipe": yaml_row(
        "mine.yaml", RECIPE, lambda path: with_options(lambda parser: set_recipe(parser, path))
    ),
    "options": one_file("options.json", [as_json(OPTIONS)], json_files(OPTIONS), read_run_options),
    "log": lines_row("log.jsonl", RECORDS, lambda path: read_records(path.parent)),
    "progress log": lines_row("progress-0.jsonl", PROGRESS_LOG, read_progress),
    "image": one_file(
        "image.png", IMAGES, chunky_pngs() | tagged_tiffs() | bmps | damaged([FLOATS]),
        read_by_all, share=4,
    ),
    "submission": one_file(
        "up.zip",
        [zip_of({f"{FRAME}.png": PNGS[0], "a/b.txt": b"x"}, zipfile.ZIP_DEFLATED),
         zip_of({f"../{FRAME}.png": PNGS[0], "/etc/x.png": PNGS[1]}, zipfile.ZIP_BZIP2)],
        uploads, read_submission,
    ),
    "video": one_file(
        "clip.mp4", [video_of(suffix) for suffix in ("mp4", "mkv", "avi", "ts")],
        st.binary(), read_video,
    ),
    "cache": Parser(valid_cache, damaged_caches, read_cache, ("train", ".png"), share=0.5),
    "checkpoint": one_file(
        "w.pth", CHECKPOINTS,
        pickled() | odd_bundles | odd_zips(PARTS, lambda part: foreign([part])),
        read_checkpoint, share=3,
    ),
    "network": Parser(lambda _: [{"full.pth": saved(FULL)}], odd_shapes, read_network, share=0.1),
    "release": Parser(
        lambda _: [released(save(FULL))], damaged_release, read_network, (TENSORS, CONFIG)
    ),
    "run": one_file(
        CHECKPOINT, [saved(RESUMABLE)], altered(RESUMABLE, values | odd_tensors).map(saved),
        resume_run,
    ),
    "onnx": export_row("onnx"),
    "openvino": export_row("openvino"),
    "torch": export_row("torch"),
    "graph of torch": export_row("torch", altered_graphs),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, in which no trap may go off; images have few pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LIMIT, str(PIXELS))
    return tmp_path


def write(folder: Path, files: Files) -> Path:
    """Replace the content of the folder; returns the path of the first file."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


@pytest.mark.parametrize("name", PARSERS)
def test_parser_any_input_is_read_or_refused(folder, name):
    parser = PARSERS[name]
    valid = parser.valid(folder)
    for files in valid:
        parser.read(write(folder / "input", files))

    @settings(max_examples=max(1, int(settings.default.max_examples * parser.share)))
    @given(files=parser.damage(valid))
    def check(files: Files) -> None:
        path = write(folder / "input", files)
        ends_well(lambda: parser.read(path), *(parser.mentions or [path.name]))
        assert not (folder / TRAP).exists() and not (folder.parent / TRAP).exists()

    check()


@pytest.mark.parametrize("how", range(3))
def test_trap_unsafe_reader_sets_it_off(folder, how):
    pickle.loads(pickle.dumps(Trap(folder / TRAP, how)))
    assert (folder / TRAP).exists()


def test_ends_well_anything_but_result_or_sentence_fails(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    assert ends_well(lambda: 7, "x") == 7
    with pytest.raises(Hang):
        ends_well(lambda: time.sleep(30), "x")
    with pytest.raises(ZeroDivisionError):
        ends_well(lambda: 1 / 0, "x")

    def refuse(sentence: str) -> None:
        raise UserError(sentence)

    assert ends_well(lambda: refuse("x is damaged"), "x") is None
    for sentence in ("it is damaged", "x is\ndamaged", ""):
        with pytest.raises(AssertionError):
            ends_well(lambda sentence=sentence: refuse(sentence), "x")


# Limits


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nclasses: [{name: *b}]",
        "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nclasses: *b",
        "&a [*a]",
    ],
)
def test_read_yaml_aliases_are_refused(folder, text):
    path = write(folder, {"laughs.yaml": text.encode()})
    with pytest.raises(UserError, match=r"laughs\.yaml is neither YAML nor JSON \(it has aliases"):
        read_yaml(path)


def test_read_yaml_large_file_is_not_parsed(folder):
    path = write(folder, {"large.yaml": b"#" * (MAX_YAML - 6) + b"\n[a]\n\n"})
    assert read_yaml(path) == ["a"]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"large\.yaml is over 256 KiB"):
        read_yaml(path)


@pytest.mark.parametrize("content", OTHER_FORMATS)
def test_open_image_other_format_is_refused(folder, content):
    path = write(folder, {"other.png": content})
    with pytest.raises(UserError, match=r"other\.png is damaged \(or no PNG"):
        open_image(path)


@pytest.mark.parametrize("format", FORMATS)
def test_open_image_one_pixel_too_many_is_refused_undecoded(folder, format, monkeypatch):
    path = write(folder, {"large": encoded(Image.new("L", (501, 499)), format)})
    assert open_image(path).size == (501, 499)  # 249,999 pixels
    path.write_bytes(encoded(Image.new("L", (501, 500)), format))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="large has 501x500 pixels, and 250,000 are"):
        open_image(path)
    assert inspect_pair(Sample(path, None)).problems[0][:2] == ("damaged", path)


@pytest.mark.parametrize("value", ["", "0", "-5", "many", "1e6", "²", "9" * 30])
def test_max_pixels_invalid_value_is_refused(value, monkeypatch):
    monkeypatch.setenv(LIMIT, value)
    with pytest.raises(UserError, match=LIMIT):
        max_pixels()


def test_open_image_limit_can_be_above_pillows(folder, monkeypatch):
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    huge = png_of([(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")])
    path = write(folder, {"huge.png": huge})
    monkeypatch.delenv(LIMIT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000_000)
    with pytest.raises(UserError, match="20000x10000 pixels, and 100,000,000 are"):
        open_image(path)
    monkeypatch.setenv(LIMIT, "300000000")
    with pytest.raises(UserError, match=r"huge\.png is damaged"):  # not too large
        open_image(path)


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.ts\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
    ],
)
def test_video_playlist_reads_no_other_file(folder, text):
    secret = video_of("ts")
    path = write(folder, {"list.mp4": text.encode(), "secret.ts": secret})
    assert read_video(path.with_name("secret.ts")) == 4
    with pytest.raises(UserError, match=r"list\.mp4 cannot be read as a video"):
        VideoReader(path)


def test_load_checkpoint_compressed_is_not_expanded(folder):
    parts = {**PARTS, PICKLE.replace("data.pkl", "data/0"): bytes(20 << 20)}
    path = write(folder, {"w.pth": zip_of(parts, zipfile.ZIP_DEFLATED)})
    assert path.stat().st_size < 1 << 17
    with pytest.raises(UserError, match=r"w\.pth is damaged or no PyTorch checkpoint"):
        load_checkpoint(path)


def test_load_model_wide_network_is_refused_before_it_is_allocated(folder):
    state = FULL | {
        "decoder.lateral1.0.weight": torch.zeros(1, 1, 1, 1),
        "decoder.down1.0.weight": torch.zeros(4000),  # 1.6 GB in down2
    }
    path = write(folder, {"wide.pth": saved(state)})
    assert ends_well(lambda: load_model(path), path.name) is None


# Values in memory


@given(
    state=st.deferred(lambda: altered(conv_trainer().state_dict(), values | odd_tensors)),
    epoch=altered(EPOCH, values | odd_tensors),
)
def test_trainer_any_state_is_restored_or_refused(state, epoch):
    trainer = conv_trainer()
    trainer.load_state_dict(conv_trainer().state_dict())  # those that fit are restored
    trainer.new_epoch_state().restore(EPOCH, trainer.dist_context)

    def resume() -> None:
        with report_mismatch():
            trainer.load_state_dict(state)
            trainer.new_epoch_state().restore(epoch, trainer.dist_context)

    ends_well(resume, "checkpoint")


def conv_trainer() -> Any:
    return small_trainer(model=nn.Conv2d(3, 4, 3, stride=8, padding=1))


@given(
    meta=altered(EXPORT_META).map(as_metadata),
    output=st.sampled_from(["logits", "labels", "", "{"]),
    size=st.just({}) | st.just({"size": "[" * 100_000}),
)
def test_exported_model_any_metadata_is_read_or_refused(meta, output, size):
    metadata = meta | {"output": output} | size
    model = ExportedModel(Path("net.onnx"), "x", ((1, 1),) * 3, metadata, lambda images: images)
    found = ends_well(lambda: model.meta, "net.onnx")
    if found is not None:
        assert all(isinstance(side, int) and side > 0 for side in found["size"])
        ends_well(model.build_meta_model, "net.onnx")


# Code in .pt2 archives

PICKLED = {"config": {"a": {"path_name": "weight_0", "is_param": True, "use_pickle": True,
                            "tensor_meta": None}}}  # fmt: skip
TREE = '[1, {"type": "%s", "context": %s, "children_spec": []}]'
ENUM = json.dumps('{"\\u005f_enum__": true, "fqn": "antigravity:x", "name": "x"}')
FACTORY = '{"default_factory_module": "antigravity", "default_factory_name": "x"}'


@pytest.fixture(scope="module")
def pt2(tmp_path_factory) -> Files:
    (content,) = export_small(tmp_path_factory.mktemp("pt2"), "torch").values()
    return parts_of(content)


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("data/sample_inputs/model.pt", pickle.dumps(Trap(Path(TRAP), 0))),
        ("data/weights/model_weights_config.json", as_json(PICKLED)),
        ("data/constants/opaque_obj_0", b""),
        ("data/aotinductor/model/x.so", b"\x7fELF"),
        ("x.json", as_json({"target": "torch.os.system"})),
        ("x.json", as_json({"nested": [{"as_operator": "_operator.call"}]})),
        ("x.json", as_json({"expr_str": "exec(chr(49))"})),
        ("x.json", as_json({"expr_str": "9**9**9"})),
        ("x.json", as_json({"guards_code": ["open('sprung', 'w')"]})),
        ("x.json", as_json({"in_spec": TREE % ("builtins.dict", ENUM)})),
        ("x.json", as_json({"out_spec": TREE % ("collections.defaultdict", FACTORY)})),
        ("MODELS/model.json", b"{}"),
    ],
)
def test_load_pt2_that_could_run_code_is_refused(folder, pt2, member, content):
    root = next(iter(pt2)).partition("/")[0]
    path = write(folder, {"net.pt2": zip_of({**pt2, f"{root}/{member}": content})})
    with pytest.raises(UserError, match=r"net\.pt2 cannot be opened") as caught:
        load(path)
    assert isinstance(caught.value.__cause__, ValueError | pickle.UnpicklingError)
    path.write_bytes(zip_of(pt2))
    assert load(path).bounds == ((1, 1), (16, 16), (24, 24))
