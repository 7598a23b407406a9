"""Build the live page, a folder of static files: the network in a browser tab.

    python docs/build_live.py
    python docs/build_live.py --weights save/mine --out www

The folder holds the page (`docs/site/live/`), ONNX Runtime Web from the npm registry, the released
weights as ONNX files and three toy street scenes. It can be put on any static host; the page
requests nothing from other hosts. What is there already is kept, so only the first build needs the
network. About a minute.
"""

import argparse
import sys
from pathlib import Path

from lednet.cli import common

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/site/live"
CACHE = ROOT / "docs/_build"
LIVE = CACHE / "site/live"
"""Default folder of the built page, which `make docs` includes."""


def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    parser.add_argument("--weights", type=Path, metavar="PATH",
                        help="weights file, run folder or released name to offer first, before "
                             "the released weights")  # fmt: skip
    parser.add_argument("--out", type=Path, default=LIVE, metavar="DIR", help="folder to write")
    return parser


if __name__ == "__main__":
    common.print_help_early(build_parser)
sys.path.insert(0, str(ROOT / "datasets"))

import base64
import hashlib
import http.client
import io
import shutil
import tarfile
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from make_toy_cityscapes import toy_scene
from PIL import Image

from lednet.data.registry import DEFAULT_SIZES
from lednet.errors import UserError, exit_on_user_error
from lednet.exporting.exporter import export
from lednet.hub import input_size, list_pretrained, resolve_weights, weights_checksum
from lednet.io import write_atomically, write_json, write_text
from lednet.model import load_model
from lednet.visualization import output_scheme

VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the archive, in Base64, as in the registry."""
RUNTIME = [
    *(f"dist/ort.{name}.min.mjs" for name in ("wasm", "webgpu", "jspi")),
    *(f"dist/ort-wasm-simd-threaded{name}.{suffix}" for name in ("", ".asyncify", ".jspi")
      for suffix in ("mjs", "wasm")),
]  # fmt: skip
"""Files of the archive: WebAssembly alone, and WebGPU for browsers without and with JSPI."""
SAMPLES = (0, 4, 7)
"""Toy street scenes."""


def fetch_runtime(cache: Path = CACHE) -> bytes:
    """The archive of ONNX Runtime Web, from `cache` or else from the npm registry.

    Raises:
        UserError: the registry cannot be reached, or the archive has another checksum.
    """
    path = cache / URL.rpartition("/")[2]
    try:
        if path.is_file():
            data = path.read_bytes()
        else:
            data = urllib.request.urlopen(URL, timeout=60).read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {URL} ({error}): connect to the internet once, or put the file at "
            f"{path}"
        ) from error
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise UserError(f"{path.name} has another checksum than version {VERSION}: remove {path}")
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            temporary.write_bytes(data)
    return data


def extract_runtime(folder: Path) -> None:
    """Write the files of `RUNTIME` to `folder`, unless they are there."""
    stamp = folder / "VERSION"  # written last
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == VERSION:
        return
    with tarfile.open(fileobj=io.BytesIO(fetch_runtime())) as archive:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUNTIME:
            member = archive.extractfile(f"package/{name}")
            assert member is not None  # the checksum is right
            with write_atomically(folder / Path(name).name) as temporary:
                temporary.write_bytes(member.read())
    write_text(stamp, VERSION)


def add_model(path: Path, folder: Path) -> dict[str, Any]:
    """Export weights to `folder`, unless they are there; returns their entry of models.json."""
    net, meta = load_model(path)
    size = input_size(meta, DEFAULT_SIZES["cityscapes"])
    scheme = output_scheme(meta, net.num_classes, path)
    name = path.parent.name if path.stem in ("best", "model") else path.stem
    file = folder / f"{name}-{weights_checksum(path)[:8]}.onnx"
    if not file.is_file():
        print(f"exporting {name} ...", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        scene = toy_scene(1, "val", 0, width=size[1], height=size[0]).image
        meta = {**meta, "classes": scheme.classes, "colors": scheme.colors}
        export(net, meta, file, "onnx", size, [np.ascontiguousarray(scene[None])], output="logits")
    scores = meta.get("scores") or [{}]
    return {
        "name": name,
        "file": f"{folder.name}/{file.name}",
        "bytes": file.stat().st_size,
        "size": list(size),
        "classes": list(scheme.classes),
        "colors": [list(color) for color in scheme.colors],
        "dataset": scheme.name,
        "images": meta.get("images"),
        "miou": scores[0].get("miou", meta.get("miou")),
        "scored": scores[0].get("images"),
        "limits": meta.get("limits"),
        "terms": meta.get("terms"),
    }


def build(folder: Path = LIVE, weights: Sequence[str | Path] = ()) -> None:
    """Write the page to `folder`, with the given or else the released weights.

    Raises:
        UserError: as `fetch_runtime`, `load_model` and `export`.
    """
    paths = [resolve_weights(path) for path in weights or list_pretrained()]
    extract_runtime(folder / "runtime")
    models = [add_model(path, folder / "models") for path in paths]
    for file in set((folder / "models").iterdir()) - {folder / model["file"] for model in models}:
        file.unlink()  # of other weights
    for number, index in enumerate(SAMPLES, start=1):
        scene = toy_scene(1, "val", index, width=768, height=384)
        with write_atomically(folder / f"sample-{number}.jpg") as temporary:
            Image.fromarray(scene.image).save(temporary, quality=90, subsampling=0)
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    write_json(folder / "models.json", models)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    build(args.out, [args.weights, *list_pretrained()] if args.weights else ())
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.rglob('*')) / 1e6:.0f} MB")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
