"""Build of the live page, a folder of static files: the network in a browser tab.

The folder holds the page, ONNX Runtime Web from the npm registry, and weights as ONNX files. It can
be put on any static host; the page requests nothing from other hosts. What is there already is
kept, so only the first build needs the network.
"""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lednet.data.registry import DEFAULT_SIZES
from lednet.errors import UserError
from lednet.exporting.exporter import export
from lednet.hub import input_size, list_pretrained, resolve_weights, weights_checksum
from lednet.inference.engine_cache import cache_folder
from lednet.io import write_atomically, write_json, write_text
from lednet.model import load_model
from lednet.visualization import output_scheme

_PACKAGE = Path(__file__).resolve().parents[1]
PAGE = _PACKAGE.parent / "docs/site/live"
if not PAGE.is_dir():
    PAGE = _PACKAGE / "live_page"
SAMPLES = sorted(PAGE.glob("sample-*.jpg"))
"""Toy street scenes, which the page offers."""
VERSION = "1.30.0"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the archive, in Base64, as in the registry."""
RUNTIME = [
    *(f"dist/ort.{name}.min.mjs" for name in ("wasm", "webgpu", "jspi")),
    *(f"dist/ort-wasm-simd-threaded{name}.{suffix}" for name in ("", ".asyncify", ".jspi")
      for suffix in ("mjs", "wasm")),
]  # fmt: skip
"""Files of the archive: WebAssembly alone, and WebGPU for browsers without and with JSPI."""


def fetch_runtime() -> bytes:
    """The archive of ONNX Runtime Web: cached, or else downloaded by `npm pack`.

    Raises:
        UserError: npm is not installed, it cannot download, or the archive has another checksum.
    """
    path = cache_folder() / "npm" / ARCHIVE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        package, folder = f"onnxruntime-web@{VERSION}", str(path.parent)
        command = ["npm", "pack", package, "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(
                f"ONNX Runtime Web is downloaded by npm, which is not installed: install Node.js, "
                f"or put {ARCHIVE} into {path.parent}"
            ) from error
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"npm cannot download onnxruntime-web {VERSION} ({error.stderr.strip()[-200:]}): "
                f"connect to the internet once, or put {ARCHIVE} into {path.parent}"
            ) from error
    data = path.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise UserError(f"{path} has another checksum than version {VERSION}: remove it")
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
        image = Image.open(SAMPLES[0]).resize((size[1], size[0]))
        meta = {**meta, "classes": scheme.classes, "colors": scheme.colors}
        export(net, meta, file, "onnx", size, [np.asarray(image)[None]], output="logits")
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


def build(folder: Path, weights: Sequence[str | Path] = ()) -> None:
    """Write the page to `folder`, with the given or else the released weights.

    Raises:
        UserError: as `fetch_runtime`, `load_model` and `export`.
    """
    paths = [resolve_weights(path) for path in weights or list_pretrained()]
    extract_runtime(folder / "runtime")
    models = [add_model(path, folder / "models") for path in paths]
    for file in set((folder / "models").iterdir()) - {folder / model["file"] for model in models}:
        file.unlink()  # of other weights
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    write_json(folder / "models.json", models)
